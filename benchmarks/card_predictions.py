"""Predicted times of decodes on cards that we do not have: the tables of docs/cards.md.

    wan-vae bench predictions                 # prints them
    wan-vae bench predictions --write         # puts them into the page
    python benchmarks/card_predictions.py     # the same as the first

A model, not a measurement: `benchmarks/suite/predictions.py` says what is counted.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.suite.cases import CASES, Case
from benchmarks.suite.predictions import Card, Model, Share, Way, decode_work

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cards.md"

PICTURES = {
    "Wan 2.1, 81 frames of 720p": CASES["wan2.1-720p-81"],
    "Wan 2.1, 81 frames of 480p": CASES["wan2.1-480p-81"],
    "Wan 2.2, 121 frames of 720p": CASES["wan2.2-720p-121"],
}

FLOAT_SUMS = Way("float32 sums")
HALF_SUMS = Way("float16 sums", half_sums=True)
TWO_DIMENSIONAL = Way("2D", two_dimensional=True)
WAYS = (FLOAT_SUMS, HALF_SUMS, TWO_DIMENSIONAL)
# Of before 2026-11-29: what was measured then.
PAIRS_ONLY = Way("float32 sums, F(2,3)", quads=False)
PAIRS_ONLY_2D = Way("2D, F(2,3)", two_dimensional=True, quads=False)

_GA102 = "NVIDIA, Ampere GA102 GPU architecture"
_ADA = "NVIDIA, Ada GPU architecture"
_BLACKWELL = "NVIDIA, RTX Blackwell GPU architecture"
CARDS = (
    Card("RTX 3060 (12 GB)", 28, 1.777, 51, 25.6, 360, "NVIDIA's page of the card"),
    Card("RTX 3080 (10 GB)", 68, 1.710, 119, 59.5, 760, _GA102),
    Card("RTX 3090", 82, 1.695, 142, 71, 936, _GA102),
    Card("RTX 4060", 24, 2.460, 60, 30, 272, "NVIDIA's page of the card"),
    Card("RTX 4090", 128, 2.520, 330, 165, 1008, _ADA),
    Card("RTX 5060 Ti", 36, 2.572, 95, 47.5, 448, "NVIDIA's page of the card"),
    Card("RTX 5090", 170, 2.407, 419, 209.5, 1792, _BLACKWELL),
    Card("A100 (40 GB)", 108, 1.410, 312, 312, 1555, "NVIDIA, A100 Tensor Core GPU architecture"),
    Card("L40S", 142, 2.520, 362, 362, 864, "NVIDIA's data sheet of the card"),
    Card("RX 7900 XTX", 96, 2.500, 123, 123, 960, "AMD's page of the card", False),
)

# Products a cycle of a multiprocessor of an H100. By mma.sync the tensor cores do 641 TFLOP/s at
# 1.78 GHz (benchmarks/mma_ceiling.cu). Slower ones are imitated: each product is issued three or
# five times (`conv3x3_mma.Variant.repeat`), all else once.
_WGMMA, _FULL, _THIRD, _FIFTH = 1702, 1364, 1364 / 3, 1364 / 5
_OURS = "our kernels on an H200, 2026-11-28"
_EARLIER = "an earlier version of our kernels on an H100, 2026-11-28"
_HOPPER = "Hopper's kernels: 690 of cuBLAS's 800 TFLOP/s, docs/performance.md"
_ATTENTION = "Triton's kernel: 180 TFLOP/s on an H100, docs/performance.md"
_CARRIED = "the same kernel, if its time beside the products is what it was there"


def _carried(share: float, times: int) -> float:
    """A share at the full rate, where products take `times` as long and nothing overlaps."""
    return times / (times + 1 / share - 1)


_ATTENTION_SHARE = 180 / 641
# F(4,3) on an H200: layers of 96 and of 192 channels do 305 and 344 of 641 TFLOP/s by mma.sync, and
# 591 and 656 of cuBLAS's 800 by wgmma.
_QUADS_SHARE = 0.51
_QUADS = "F(4,3) on an H200, 2026-11-29, docs/performance.md"
MODEL = Model(
    shares=(
        Share("direct", False, _FIFTH, 0.88, _OURS),
        Share("direct", False, _THIRD, 0.82, _OURS),
        Share("direct", False, _FULL, 0.63, _EARLIER),
        Share("direct", False, _WGMMA, 0.86, _HOPPER),
        Share("direct", True, _THIRD, 0.83, _OURS),
        Share("quads", False, _FIFTH, _carried(_QUADS_SHARE, 5), _CARRIED),
        Share("quads", False, _THIRD, _carried(_QUADS_SHARE, 3), _CARRIED),
        Share("quads", False, _FULL, _QUADS_SHARE, _QUADS),
        Share("quads", False, _WGMMA, 0.78, _QUADS),
        Share("quads", True, _THIRD, _carried(_QUADS_SHARE, 3), _CARRIED),
        Share("2d", False, _FIFTH, 0.78, _OURS),
        Share("2d", False, _THIRD, 0.66, _EARLIER),
        Share("2d", False, _FULL, 0.33, _EARLIER),
        Share("attention", False, _FULL, _ATTENTION_SHARE, _ATTENTION),
        Share("attention", False, _WGMMA, 180 / 800, _ATTENTION),
        Share("attention", False, _THIRD, _carried(_ATTENTION_SHARE, 3), _CARRIED),
        Share("attention", False, _FIFTH, _carried(_ATTENTION_SHARE, 5), _CARRIED),
    ),
    # On an H100 and an H200 a copy reaches 0.87 to 0.89 of it, and the norm 0.81.
    memory_share=0.85,
)


@dataclass(frozen=True)
class Check:
    """A decode that was measured. `source`: a results file and the words that find its row there
    (as in benchmarks/README.md), or what else is known of the number."""

    kernels: str
    card: Card
    way: Way
    picture: str
    measured_ms: float
    source: str


_HOPPER_SOURCE = "NVIDIA's data sheet of the card, and cuBLAS"
_H100 = Card("H100", 132, 1.78, 800, 800, 3350, _HOPPER_SOURCE)
_H200 = Card("H200", 132, 1.78, 800, 800, 4800, f"{_HOPPER_SOURCE} on an H100")
_H200_BY_MMA = Card("H200 by mma.sync", 132, 1.78, 641, 641, 4800, "benchmarks/mma_ceiling.cu")
_W720, _W480, _W22 = PICTURES
_AUTO = "wan_vae (auto), device, median_ms"
CHECKS = (
    Check(
        "H200 that imitates compute capability 8.9, 2D",
        _H200_BY_MMA,
        PAIRS_ONLY_2D,
        _W720,
        1521.0,
        "noted on 2026-11-28; the run printed it and kept no file",
    ),
    Check(
        "H100, Hopper's kernels, F(2,3)",
        _H100,
        PAIRS_ONLY,
        _W720,
        972.0,
        f"2026-11-28-h100-720p.json: wan2.1-720p-81, {_AUTO}",
    ),
    Check(
        "H100, Hopper's kernels, F(2,3)",
        _H100,
        PAIRS_ONLY,
        _W480,
        395.0,
        f"2026-11-28-h100-480p.json: wan2.1-480p-81, {_AUTO}",
    ),
    Check(
        "H100, Hopper's kernels, F(2,3)",
        _H100,
        PAIRS_ONLY,
        _W22,
        2614.0,
        f"2026-11-28-h100-wan22.json: wan2.2-720p-121, {_AUTO}",
    ),
    Check(
        "H200, Hopper's kernels, F(4,3)",
        _H200,
        FLOAT_SUMS,
        _W720,
        796.0,
        f"2026-11-29-h200-720p.json: wan2.1-720p-81, {_AUTO}",
    ),
    Check(
        "H200, Hopper's kernels, F(4,3)",
        _H200,
        FLOAT_SUMS,
        _W22,
        2105.9,
        f"2026-11-29-h200-wan22.json: wan2.2-720p-121, {_AUTO}",
    ),
)


def predictions() -> str:
    """Predicted seconds by card and picture, each way behind the other, as Markdown."""
    ways = " / ".join(way.name for way in WAYS)
    lines = [
        f"| PREDICTED seconds: {ways} | {' | '.join(PICTURES)} |",
        f"|---|{'---:|' * len(PICTURES)}",
    ]
    for card in CARDS:
        name = card.name if card.runs_our_kernels else f"{card.name} (Triton, never run there)"
        cells = [
            " / ".join(_seconds(card, case, way) for way in WAYS) for case in PICTURES.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(card: Card, case: Case, way: Way) -> str:
    """A dash where sums of float16 gain nothing: those of float32 run there."""
    if way.half_sums and not card.gains_by_half_sums:
        return "-"
    return f"{MODEL.decode_ms(case, way, card) / 1e3:.1f}"


def checks() -> str:
    """The model beside what was measured, as Markdown."""
    lines = [
        "| measured | picture | predicted, ms | measured, ms | measured / predicted |",
        "|---|---|---:|---:|---:|",
    ]
    for check in CHECKS:
        found = MODEL.decode_ms(PICTURES[check.picture], check.way, check.card)
        lines.append(
            f"| {check.kernels} | {check.picture} | {found:.0f} | {check.measured_ms:.0f} | "
            f"{check.measured_ms / found:.2f} |"
        )
    return "\n".join(lines)


def counted() -> str:
    """What a decode does, as Markdown."""
    lines = [
        "| counted | products by float32 or float16 sums, TFLOP | in 2D | moved, GB |",
        "|---|---:|---:|---:|",
    ]
    for name, case in PICTURES.items():
        along_time, in_2d = (decode_work(case, way) for way in (FLOAT_SUMS, TWO_DIMENSIONAL))
        lines.append(
            f"| {name} | {sum(w.flops for w in along_time) / 1e12:.0f} | "
            f"{sum(w.flops for w in in_2d) / 1e12:.0f} | "
            f"{sum(w.moved_bytes for w in along_time) / 1e9:.0f} |"
        )
    return "\n".join(lines)


def rates() -> str:
    """The cards' rates, as Markdown."""
    lines = [
        "| card | TFLOP/s, float16 sums | float32 sums | memory, GB/s | source |",
        "|---|---:|---:|---:|---|",
    ]
    for card in CARDS:
        lines.append(
            f"| {card.name} | {card.half_sums_tflops:g} | {card.float_sums_tflops:g} | "
            f"{card.gigabytes_per_s:g} | {card.source} |"
        )
    return "\n".join(lines)


def shares() -> str:
    """The shares of these rates that kernels reach, as Markdown."""
    names = {
        "direct": "direct, or F(2,3) along time",
        "quads": "F(4,3) along time",
        "2d": "2D",
        "attention": "attention",
    }
    lines = ["| form | sums | products a cycle | share | source |", "|---|---|---:|---:|---|"]
    for share in MODEL.shares:
        sums = "float16" if share.half_sums else "float32"
        lines.append(
            f"| {names[share.form]} | {sums} | {share.products_a_cycle:.0f} | {share.share:.2f} | "
            f"{share.source} |"
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "predictions": predictions,
    "checks": checks,
    "counted": counted,
    "rates": rates,
    "shares": shares,
}


def with_tables(page: str) -> str:
    """The text `page` with the table of today behind each comment that names one."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(?=<!-- end of table -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n",
        page,
        flags=re.DOTALL,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print all tables, or put them into the page."""
    parser = argparse.ArgumentParser(
        prog="wan-vae bench predictions",
        description="Predicted times of decodes on cards that nobody measured (docs/cards.md).",
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/cards.md")
    args = parser.parse_args(argv)
    if args.write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    print("PREDICTION, NOT MEASURED\n")
    print("\n\n".join(table() for table in TABLES.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
