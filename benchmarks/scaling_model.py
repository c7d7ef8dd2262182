"""Scaling of a sharded decode on paper: what ranks exchange, and what efficiency that predicts.

    wan-vae bench scaling --model             # prints the table of docs/performance.md
    python benchmarks/scaling_model.py        # the same

A model, not a measurement: `benchmarks/suite/scaling.py` says what is exact and what is assumed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.suite.scaling import LINKS, MeasuredPicture, predict
from wan_vae.config import wan21

# NVIDIA H100, our kernels: benchmarks/results/2026-11-28-h100x4-ranks.md, over 21 latent frames.
CLIP_FRAMES = 21
PICTURES = (
    MeasuredPicture("480p", 60, 104, 398.0 / 21),
    MeasuredPicture("720p", 90, 160, 962.7 / 21),
)


def table() -> str:
    """The table as Markdown."""
    config = wan21()
    lines = [
        "| picture | GPUs | cut | rows | latent frames | messages | halo MB | attention MB | "
        + " | ".join(f"{link.name}: efficiency (speed-up)" for link in LINKS)
        + " |",
        "|---|---:|---|---:|---:|---:|---:|---:|" + "---:|" * len(LINKS),
    ]
    for picture in PICTURES:
        for ranks in (2, 4, 8, 16):
            found = [
                predict(config, picture, ranks, link, clip_frames=CLIP_FRAMES) for link in LINKS
            ]
            p = found[0]
            speeds = (f"{f.efficiency:.0%} ({f.efficiency * ranks:.1f}x)" for f in found)
            lines.append(
                f"| {picture.name} | {ranks} | {p.axis} | {p.rows} | {p.frames} | {p.messages} | "
                f"{p.halo_bytes / 1e6:.1f} | {p.attention_bytes / 1e6:.1f} | "
                + " | ".join(speeds)
                + " |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
