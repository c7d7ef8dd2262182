"""Scaling of a sharded decode on paper: what ranks exchange, and what efficiency that predicts.

    python benchmarks/scaling_model.py        # prints the table of docs/sharding.md

A model, not a measurement: see `wan_vae/sharding/scaling.py` for what is exact and what is assumed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.suite.scaling import LINKS, planned_frames, predict
from wan_vae.config import wan21
from wan_vae.sharding.plan import plan_shards


@dataclass(frozen=True)
class Case:
    """A picture in latent pixels, and the time of one latent frame on one GPU as measured."""

    name: str
    height: int
    width: int
    one_gpu_ms: float


# NVIDIA H100, our kernels: benchmarks/results/2026-11-28-h100x4-ranks.md, over 21 latent frames.
CLIP_FRAMES = 21
CASES = (Case("480p", 60, 104, 398.0 / 21), Case("720p", 90, 160, 962.7 / 21))


def table() -> str:
    """The table as Markdown."""
    config = wan21()
    lines = [
        "| picture | GPUs | cut | rows | latent frames | messages | halo MB | attention MB | "
        + " | ".join(f"{link.name}: efficiency (speed-up)" for link in LINKS)
        + " |",
        "|---|---:|---|---:|---:|---:|---:|---:|" + "---:|" * len(LINKS),
    ]
    for case in CASES:
        for ranks in (2, 4, 8, 16):
            size = case.height, case.width
            clip = (1, config.z_dim, CLIP_FRAMES, *size)
            frames = planned_frames(config, clip, plan_shards(*size, ranks))
            found = [
                predict(config, *size, ranks, link, case.one_gpu_ms, frames=frames)
                for link in LINKS
            ]
            p = found[0]
            speeds = (f"{f.efficiency:.0%} ({f.efficiency * ranks:.1f}x)" for f in found)
            lines.append(
                f"| {case.name} | {ranks} | {p.axis} | {p.rows} | {p.frames} | {p.messages} | "
                f"{p.halo_bytes / 1e6:.1f} | {p.attention_bytes / 1e6:.1f} | "
                + " | ".join(speeds)
                + " |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
