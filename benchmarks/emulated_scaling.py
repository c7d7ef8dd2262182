"""What a sharded decode would take on 2, 4 and 8 GPUs, emulated on one.

    wan-vae bench scaling [--output FOLDER] [--device cuda:0] [--repeats 5]
    python benchmarks/emulated_scaling.py     # the same

Each shard's real shapes, halos and kernels are timed in turn, while the stream of its messages
waits as long as a link would take; the slowest shard gives a chunk's time. Prints Markdown; a
folder gets emulated.md and emulated.json. On the CPU it runs a narrow model on small pictures,
which says that it works and nothing about scaling.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.scaling_model import table
from benchmarks.suite.emulation import Emulated, emulate
from benchmarks.suite.facts import Facts, repeatable, write_results
from benchmarks.suite.scaling import LINKS
from benchmarks.suite.weights import random_vae
from wan_vae.config import WanVAEConfig, wan21
from wan_vae.device import pick_device

SCHEMA = "wan_vae.bench.scaling/1"
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
    config: WanVAEConfig, pictures: Sequence[Picture], device: torch.device, repeats: int
) -> Iterator[dict[str, list[Emulated]]]:
    """Picture name -> emulations on every link and rank count: all so far, after each picture."""
    vae = random_vae(config, device)
    found: dict[str, list[Emulated]] = {}
    for p in pictures:
        found[p.name] = emulate(vae, p.height, p.width, p.ranks, LINKS, repeats)
        yield found


def scaling_markdown(found: dict[str, list[Emulated]], facts: Facts) -> str:
    """The results as Markdown."""
    lines = [
        "# Emulated scaling",
        "",
        *facts.lines(),
        "- emulated on one device: shards in turn, milliseconds a steady chunk; the link imitated",
        "  by waits of its stream; hidden: its share in which the slowest shard computes",
        "",
        "| picture | ranks | cut | latent frames a chunk | one device | slowest shard | link "
        "| link ms | hidden | efficiency |",
        "|---|---:|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for name, rows in found.items():
        lines += [
            f"| {name} | {e.ranks} | {e.axis} | {e.frames} | {e.one_ms:.2f} "
            f"| {e.chunk_ms:.2f} | {e.link} | {e.link_ms:.2f} | {e.hidden:.0%} "
            f"| {e.efficiency:.0%} |"
            for e in rows
        ]
    return "\n".join(lines) + "\n"


def as_dict(found: dict[str, list[Emulated]], facts: Facts) -> dict[str, object]:
    """The results for a JSON file."""
    rows = [
        {"picture": name, **asdict(e), "hidden": e.hidden, "efficiency": e.efficiency}
        for name, emulated in found.items()
        for e in emulated
    ]
    return {**facts.as_dict(), "rows": rows}


def missed(found: dict[str, list[Emulated]]) -> list[str]:
    """Emulations on NVLink below the goal, in words."""
    return [
        f"{name} on {e.ranks}: {e.efficiency:.0%}, the goal is {GOALS[e.ranks]:.0%}"
        for name, rows in found.items()
        for e in rows
        if e.link == LINKS[0].name and e.efficiency < GOALS.get(e.ranks, 0)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; 1 if a CUDA device misses a goal."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="wan-vae bench scaling",
        description="What a sharded decode would take on 2, 4 and 8 GPUs, emulated on one.",
    )
    parser.add_argument("--device", help="cuda:0, cpu (default: the best one here)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder for emulated.md and emulated.json")
    parser.add_argument(
        "--model",
        action="store_true",
        help="only print the table of docs/performance.md, which is calculated",
    )
    args = parser.parse_args(argv)
    if args.model:
        print(table())
        return 0
    device = pick_device(args.device)
    full = device.type == "cuda"
    config, pictures = (wan21(), PICTURES) if full else (wan21(dim=8), SMALL)
    facts = Facts.begin(SCHEMA, repeatable(["scaling", *argv]), device)
    found: dict[str, list[Emulated]] = {}
    for found in measure(config, pictures, device, args.repeats):
        if args.output is not None:  # after each picture, for who ends this before the last one
            text, data = scaling_markdown(found, facts), as_dict(found, facts)
            write_results(args.output, "emulated", text, data)
    print(scaling_markdown(found, facts))
    problems = missed(found) if full else []
    for problem in problems:
        print(f"emulated scaling: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
