"""Decode times of cards that nobody here has, on paper: products and bytes over their rates.

    python benchmarks/card_predictions.py                       # prints the table of docs/cards.md
    python benchmarks/card_predictions.py --efficiency 0.8      # at another fraction of the rates

A prediction, not a measurement. Each layer takes the longer of its products and its bytes; a norm
in front of a convolution is a pass over memory of its own. What a card reaches of its published
rates is one number for products and one for bytes, both from an H100: see `calibrated`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from wan_vae.config import wan21
from wan_vae.network.model import WanVAEModel
from wan_vae.network.sites import decoder_sites
from wan_vae.ops.opset import CallSize
from wan_vae.ops.problem import AttentionProblem, ConvProblem, LayerSite

# 720p, 81 frames.
LATENT_FRAMES, ROWS, COLUMNS = 21, 90, 160
# Winograd F(2, 3) along time: four products where a direct convolution needs six.
_WINOGRAD = 2 / 3
# What our kernels aim at where the tensor cores are slow enough to be the only limit.
_AIM = 0.85


@dataclass(frozen=True)
class Card:
    """Published rates of dense products of float16, in TFLOP/s with sums in float16 and in float32,
    and of memory, in GB/s."""

    name: str
    float16_sums: float
    float32_sums: float
    memory: float
    source: str


_AMPERE = "NVIDIA Ampere GA10x whitepaper"
CARDS = (
    Card("RTX 3060", 51, 25.5, 360, _AMPERE),
    Card("RTX 3090", 142, 71, 936, _AMPERE),
    Card("RTX 4090", 330, 165, 1008, "NVIDIA Ada whitepaper"),
    Card("RTX 5090", 419, 209, 1792, "NVIDIA RTX Blackwell whitepaper"),
    Card("RX 7900 XTX", 123, 123, 960, "AMD's product page"),
)
# Measured: 972 ms in benchmarks/results/2026-11-28-h100-720p.md, copies at 2.97 TB/s in
# benchmarks/results/archive/2026-11-25-h100-kernels.md.
H100 = Card("H100", 989, 989, 3350, "NVIDIA H100 datasheet")
H100_DECODE_MS = 972.0
MEMORY_EFFICIENCY = 2970 / 3350


@dataclass(frozen=True)
class Pass:
    """One kernel's work on the whole clip: products (two operations each) and bytes.

    is_wide: whether it may add up in float16: a 3x3x3 convolution behind a norm.
    """

    flops: float
    moved_bytes: float
    is_wide: bool = False


def passes() -> list[Pass]:
    """Every pass over every layer of the decode."""
    with torch.device("meta"):
        model = WanVAEModel(wan21()).to(torch.bfloat16)
    found: list[Pass] = []
    scale = 1
    for site in decoder_sites(model):
        found += _passes_of(site, scale)
        if site.problem.operation == "upsample_conv2d":
            scale *= 2
    return found


def _passes_of(site: LayerSite, scale: int) -> Iterator[Pass]:
    """scale: the layer's pixels along a side, for each of the latent's."""
    problem, rows, columns = site.problem, ROWS * scale, COLUMNS * scale
    per_latent = getattr(problem, "frames", 1)
    frames = 1 + per_latent * (LATENT_FRAMES - 1)
    if isinstance(problem, ConvProblem) and problem.kernel == (3, 1, 1):
        frames -= 1  # the first frame is not doubled
    size = CallSize(1, frames, rows, columns)
    pixels, flops = frames * rows * columns, problem.flops(size)
    c, o = problem.in_channels, problem.out_channels
    match problem.operation:
        case "norm_conv3d":
            is_winograd = per_latent > 1
            operand = 2 * c * pixels * (2 if is_winograd else 1)
            residual = 2 * o * pixels if site.name.endswith("residual.6") else 0
            yield Pass(0, 2 * c * pixels + operand)
            moved = operand + 2 * o * pixels + residual
            yield Pass(flops * (_WINOGRAD if is_winograd else 1), moved, is_wide=True)
        case "head":
            yield Pass(0, 4 * c * pixels)
            yield Pass(flops, (2 * c + 4 * o) * pixels)
        case "upsample_conv2d":
            yield Pass(flops, (2 * c + 4 * 2 * o) * pixels)
        case "attention":
            assert isinstance(problem, AttentionProblem)
            # Norm, queries to values, attention, projection; what one writes the next reads.
            yield Pass(flops, 2 * 12 * c * pixels)
        case _:
            yield Pass(flops, 2 * (c + o) * pixels)


def decode_ms(
    card: Card, work: Sequence[Pass], efficiency: float, has_float16_sums: bool = False
) -> float:
    """Milliseconds of a decode at that fraction of the published rate of products."""
    total_s = 0.0
    for one in work:
        in_float16 = has_float16_sums and one.is_wide
        rate = card.float16_sums if in_float16 else card.float32_sums
        products_s = one.flops / (rate * 1e12 * efficiency)
        memory_s = one.moved_bytes / (card.memory * 1e9 * MEMORY_EFFICIENCY)
        total_s += max(products_s, memory_s)
    return total_s * 1e3


def calibrated(work: Sequence[Pass]) -> float:
    """The fraction of its rate of products at which an H100 takes what was measured there."""
    low, high = 0.05, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if decode_ms(H100, work, middle) > H100_DECODE_MS:
            low = middle
        else:
            high = middle
    return high


def table(efficiency: float | None = None) -> str:
    """The table as Markdown: at `efficiency`, or between that of the H100 and the aim."""
    work = passes()
    measured = calibrated(work)
    ends = (efficiency,) if efficiency is not None else (_AIM, measured)
    at = " to ".join(f"{end:.0%}" for end in reversed(ends))
    lines = [
        f"| card | TFLOP/s, float16 / float32 sums | GB/s | predicted at {at}, float32 sums "
        "| float16 sums | source of the rates |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for card in CARDS:
        times = [
            " to ".join(f"{decode_ms(card, work, end, half) / 1e3:.1f}" for end in ends) + " s"
            for half in (False, True)
        ]
        rates = f"{card.float16_sums:g} / {card.float32_sums:g}"
        lines.append(
            f"| {card.name} | {rates} | {card.memory:g} | {' | '.join(times)} | {card.source} |"
        )
    return "\n".join(lines)


def counted() -> str:
    """What the table is made from, in a sentence."""
    work = passes()
    tera = sum(one.flops for one in work) / 1e12
    giga = sum(one.moved_bytes for one in work) / 1e9
    return (
        f"A decode of 81 frames of 720p has {tera:.0f} Tflop of products, with Winograd along "
        f"time, and moves {giga:.0f} GB. At {calibrated(work):.0%} of its rate of products and "
        f"{MEMORY_EFFICIENCY:.0%} of its memory's, an H100 takes the {H100_DECODE_MS:.0f} ms that "
        "were measured there."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--efficiency",
        type=float,
        help="fraction of the published rate of products (default: from that of an H100 to "
        f"{_AIM:.0%})",
    )
    efficiency = parser.parse_args(argv).efficiency
    if efficiency is not None and not 0 < efficiency <= 1:
        parser.error(f"--efficiency is {efficiency}: expected a fraction above 0, at most 1")
    print(counted())
    print()
    print(table(efficiency))
    return 0


if __name__ == "__main__":
    sys.exit(main())
