"""What a sharded decode would take on 2, 4 and 8 GPUs, emulated on one.

    python benchmarks/emulated_scaling.py [--output FOLDER] [--device cuda:0] [--repeats 5]

Each shard's real shapes, halos and kernels are timed in turn; the slowest shard and the modelled
exchange give a chunk's time. Prints Markdown; a folder gets emulated.md and emulated.json. On the
CPU it runs a narrow model on small pictures, which says that it works and nothing about scaling.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.suite.emulation import Emulated, emulate
from benchmarks.suite.ranks import random_vae
from benchmarks.suite.results import repeatable
from benchmarks.suite.scaling import LINKS
from wan_vae.config import WanVAEConfig, wan21
from wan_vae.device import device_name, pick_device, versions

# Efficiency that the emulation must reach, by ranks (NVLink).
GOALS = {2: 0.90, 4: 0.80, 8: 0.65}


@dataclass(frozen=True)
class Picture:
    """A latent picture and the ranks to share it among."""

    name: str
    height: int
    width: int
    ranks: tuple[int, ...] = tuple(GOALS)


PICTURES = (Picture("480p", 60, 104), Picture("720p", 90, 160))
SMALL = (Picture("small", 6, 10, (2, 4)),)


def measure(
    config: WanVAEConfig, pictures: tuple[Picture, ...], device, repeats: int
) -> dict[str, list[Emulated]]:
    """Picture name -> emulations on every link and rank count."""
    vae = random_vae(config, device)
    return {p.name: emulate(vae, p.height, p.width, p.ranks, LINKS, repeats) for p in pictures}


def markdown(found: dict[str, list[Emulated]], device, command: str) -> str:
    """The results as Markdown."""
    made = ", ".join(f"{k} {v}" for k, v in versions().items() if v)
    lines = [
        "# Emulated scaling",
        "",
        f"- {device_name(device)}; {made}",
        f"- command: `{command}`",
        "- emulated on one device: shards in turn, milliseconds a steady chunk; the link modelled",
        "",
        "| picture | ranks | cut | latent frames a chunk | one device | slowest shard | link "
        "| link ms | efficiency |",
        "|---|---:|---|---:|---:|---:|---|---:|---:|",
    ]
    for name, rows in found.items():
        lines += [
            f"| {name} | {e.ranks} | {e.axis} | {e.frames} | {e.one_ms:.2f} "
            f"| {max(e.shard_ms):.2f} | {e.link} | {e.link_ms:.2f} | {e.efficiency:.0%} |"
            for e in rows
        ]
    return "\n".join(lines) + "\n"


def missed(found: dict[str, list[Emulated]]) -> list[str]:
    """Emulations on NVLink below the goal, in words."""
    return [
        f"{name} on {e.ranks}: {e.efficiency:.0%}, the goal is {GOALS[e.ranks]:.0%}"
        for name, rows in found.items()
        for e in rows
        if e.link == LINKS[0].name and e.efficiency < GOALS.get(e.ranks, 0)
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure and write; 1 if a CUDA device misses a goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cuda:0, cpu (default: the best one here)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    full = device.type == "cuda"
    config, pictures = (wan21(), PICTURES) if full else (wan21(dim=8), SMALL)
    found = measure(config, pictures, device, args.repeats)
    words = repeatable(sys.argv[1:] if argv is None else argv)
    command = words.replace("wan-vae bench", "python benchmarks/emulated_scaling.py")
    text = markdown(found, device, command)
    print(text)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "emulated.md").write_text(text, encoding="utf-8")
        data = {
            "versions": versions(),
            "device": device_name(device),
            "rows": [
                {"picture": name, **asdict(e), "efficiency": e.efficiency}
                for name, rows in found.items()
                for e in rows
            ],
        }
        (args.output / "emulated.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    problems = missed(found) if full else []
    for text in problems:
        print(f"emulated scaling: {text}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
