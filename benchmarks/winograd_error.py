"""What float16 operands cost Winograd F(4,3) along time, by its points: no GPU.

    wan-vae bench winograd      # or python benchmarks/winograd_error.py

Relative errors of one convolution from float64, with frames as a norm rounds them to float16: those
of weights and transformed frames in float16, and of sums and transforms in float32.
"random": 96 channels of SiLU'd noise. "still": the same with six equal frames. The other columns
are the layers of the miniature VAE (whose weights are float16) that make four frames of a latent
frame, on their own features of a sample. `wan_vae/kernels/winograd.py` says what the points are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

import wan_vae
from wan_vae.kernels.winograd import POINTS, Points
from wan_vae.network.blocks import Step
from wan_vae.network.sites import decoder_sites
from wan_vae.ops.opset import eager_ops
from wan_vae.ops.problem import NormConvProblem

TRIED = (
    Points(1, 2),
    Points(1 / 2, 1),
    Points(1 / 2, 3 / 2),
    Points(5 / 8, 5 / 4),
    Points(2 / 3, 4 / 3),
    Points(3 / 4, 3 / 2),
    POINTS,
)
_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
_CROP = 16
# The decode of the sample is short: the third latent frame has a past of its own.
_LATENT_FRAMES, _ROWS = 3, 12


@dataclass(frozen=True)
class Case:
    """Six frames [C, 6, H, W] of float16 numbers, and a weight [O, C, 3, 3, 3]; both float64."""

    frames: torch.Tensor
    weight: torch.Tensor

    @property
    def exact(self) -> torch.Tensor:
        """[O, 4, H - 2, W - 2]."""
        return F.conv3d(self.frames[None], self.weight)[0]

    def error(self, made: torch.Tensor) -> float:
        return float((made.double() - self.exact).norm() / self.exact.norm())


def half(x: torch.Tensor) -> torch.Tensor:
    """Rounded to float16, as float64, in which products and sums are exact enough."""
    return x.to(torch.float16).double()


def direct(case: Case) -> torch.Tensor:
    return F.conv3d(case.frames[None], half(case.weight))[0].float()


def products(frames: Sequence[torch.Tensor], taps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of transformed frames [C, H, W] and taps [O, C, 3, 3], both rounded; sums in float32."""
    pairs = zip(frames, taps, strict=True)
    return [F.conv2d(half(frame)[None], half(tap))[0].float() for frame, tap in pairs]


def by_pairs(case: Case) -> torch.Tensor:
    """F(2,3), as our kernels do it."""
    g0, g1, g2 = case.weight.unbind(2)
    taps = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)
    made = []
    for first in (0, 2):
        d0, d1, d2, d3 = case.frames[:, first : first + 4].unbind(1)
        m0, m1, m2, m3 = products((d0 - d2, d1 + d2, d2 - d1, d1 - d3), taps)
        made += [m1 + m2 + m0, m1 - m2 - m3]
    return torch.stack(made, 1)


def by_quads(case: Case, points: Points) -> torch.Tensor:
    """F(4,3) with `points`."""
    frames = torch.einsum("pf,cfhw->pchw", points.into, case.frames)
    taps = torch.einsum("pt,octhw->pochw", points.weights, case.weight)
    made = torch.stack(products(frames.unbind(), taps.unbind()))
    return torch.einsum("fp,pohw->ofhw", points.out.float(), made)


def random_case(still: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn((96, 6, _CROP + 2, _CROP + 2), generator=generator)
    if still:
        frames = frames[:, :1].expand_as(frames)
    weight = torch.randn((96, 96, 3, 3, 3), generator=generator) / (27 * 96) ** 0.5
    return Case(half(F.silu(frames)), weight.double())


def layer_cases() -> dict[str, Case]:
    """By layer: the miniature's weights, and what a decode of a sample gives them."""
    vae = wan_vae.load(_EXAMPLES / "wan_vae_mini.safetensors", device="cpu", dtype="fp32")
    sites = decoder_sites(vae.model)
    wanted = {
        id(site.weights.weight): site.name
        for site in sites
        if isinstance(site.problem, NormConvProblem) and site.problem.frames == 4
    }
    ops, found = eager_ops(), dict[str, Case]()

    def conv3d(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        name = wanted.get(id(weight))
        if name is not None:
            found[name] = Case(half(_crop(x)), weight.detach().double())
        return ops.conv3d(x, weight, *rest, **options)

    latent = wan_vae.load_latent(_EXAMPLES / "latents" / "cat_416x240_17f.latent")
    latent = latent[:, :, :_LATENT_FRAMES, -_ROWS:, :_ROWS]
    step = replace(Step.whole_clip(latent.shape[2]), ops=replace(ops, conv3d=conv3d))
    with torch.inference_mode():
        vae.model.decode_chunk(latent, step)
    return found


def _crop(x: torch.Tensor) -> torch.Tensor:
    """The last six frames of an operand, in the middle."""
    top, left = (max(0, (size - _CROP - 2) // 2) for size in x.shape[3:])
    return x[0, :, -6:, top : top + _CROP + 2, left : left + _CROP + 2]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if the chosen points add more than the rounding to bfloat16."""
    argparse.ArgumentParser(
        prog="wan-vae bench winograd",
        description="Errors of Winograd F(4,3) in float16, by its points (no GPU).",
    ).parse_args(argv)
    cases = (random_case(still=False), random_case(still=True))
    layers = layer_cases()
    print(f"PyTorch {torch.__version__}, CPU; layers: {len(layers)}\n")
    print("| form | random | still | layers, median | layers, largest | growth |")
    print("|---|---:|---:|---:|---:|---:|")

    def row(name: str, make: Callable[[Case], torch.Tensor], growth: float) -> float:
        known = [case.error(make(case)) for case in cases]
        own = [case.error(make(case)) for case in layers.values()]
        cells = (*(f"{e:.2e}" for e in (*known, median(own), max(own))), f"{growth:.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        return max(*known, *own)

    row("direct", direct, 1)
    row("F(2,3)", by_pairs, 2)
    for points in TRIED:
        name = f"F(4,3), 0, {points.p:.4g}, {points.q:.4g}{', scaled' if points == POINTS else ''}"
        ours = row(name, partial(by_quads, points=points), float(points.growth.max()))
    bf16 = row("result in bfloat16", lambda case: case.exact.to(torch.bfloat16), 1)
    return int(not ours < bf16)


if __name__ == "__main__":
    raise SystemExit(main())
