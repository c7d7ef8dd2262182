"""What the weights of a layer say about the largest numbers in it, before it has run.

A norm bounds the vector of a pixel, so a bound on everything computed from it follows from the
weights alone. Where a kernel's numbers might overflow, its layer is refused.

Each process loads each of PyTorch's CUDA kernels when it is first used, which takes 6 to 40 ms
(H200): bounds are computed by products, sums, copies and `aminmax`, which a run needs anyway, and
what a few numbers are left of on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Literal

import torch
import torch.nn.functional as F

from ..ops.problem import LayerWeights
from ..said import said
from .winograd import pair_phases

LARGEST_FLOAT16 = torch.finfo(torch.float16).max
# How many channels are added up in float16 before the sum goes on in float32.
SUMMED_CHANNELS = 32


@dataclass(frozen=True)
class Bound:
    """What a kernel computes at most: `value` of what `numbers` are on the host.

    numbers: tensors of one number on the device of the weights. It must stay below `limit`; `what`
    is the number, and `of` the kernel that has it, if not all.
    """

    numbers: tuple[torch.Tensor, ...]
    limit: float
    what: Literal["operand", "sums"]
    of: str = ""
    value: Callable[..., float] = float

    def refusal(self, value: float) -> str | None:
        """Why a kernel with this bound must not run, given `value` on the host; None if it may.

        NaN is too large.
        """
        if value < self.limit:
            return None
        number = f"{value:.0e}"
        if self.what == "operand":
            reason = said(
                "kernel.operand_reaches",
                "its operand may reach {value}, too large for float16",
                value=number,
            )
        else:
            reason = said(
                "kernel.sums_reach",
                "its sums in float16 may reach {value}, too large for float16",
                value=number,
            )
        if not self.of:
            return reason
        return said("kernel.of", "{kernel}: {reason}", kernel=self.of, reason=reason)


def operand_bound(weights: LayerWeights, limit: float) -> Bound | None:
    """The largest absolute value that a layer can get from its norm; None if it has no norm.

    After the norm, the length of a pixel's vector has a bound. So has its product with a row of
    the weight in front of attention.
    """
    gamma, weight = weights.gamma, weights.weight
    if gamma is None:
        return None
    numbers = [*gamma.detach().float().aminmax()]
    taps = 0
    if weights.projection is not None:
        rows = weight.detach().float().flatten(1)
        taps = rows.shape[1]
        numbers.append((rows * rows).sum(1).aminmax().max)
    value = partial(_operand, channels=weight.shape[1], taps=taps)
    return Bound(tuple(numbers), limit, "operand", value=value)


def _operand(
    smallest: float, largest: float, square: float = 0.0, *, channels: int, taps: int
) -> float:
    """The largest number of the operand, by the extremes of the norm's gain and the largest sum of
    squares of a row of `taps` weights; NaN if one of them is."""
    peak = max(-smallest, largest) * sqrt(channels)  # of NaN, `aminmax` finds it twice
    # Not less than it is: each step of a sum of floats may have rounded it down by half a unit.
    reach = sqrt(square * (1 + taps * 2.0**-24))
    return peak if reach <= 1 else peak * reach


def winograd_phases(weight: torch.Tensor) -> torch.Tensor:
    """[O, C, 3, kH, kW] -> [4, O, C, kH, kW] float32, transformed for F(2, 3) along time. The
    frames that they meet are sums or differences of two."""
    return torch.stack(pair_phases(*weight.detach().float().unbind(2)))


def float16_sums_bound(
    gamma: torch.Tensor, phases: torch.Tensor, growth: float, channels: int = SUMMED_CHANNELS
) -> Bound:
    """The largest sum over the taps of a phase and `channels` channels, behind a norm of C.

    phases [P, O, C, kH, kW]: the weights that one such sum reads. growth: how many times longer a
    transform makes the operand's vector: 1 for none, 2 for Winograd along time.

    A norm makes vectors of length sqrt(C) at most, before its gain; SiLU makes no number larger. So
    by Cauchy and Schwarz no sum exceeds the length of the operand's part times the sum over the
    taps of the lengths of the weight's rows, whatever the picture. Half of the range of float16
    stays free for what rounding adds to operands, weights and 288 sums.
    """
    c = phases.shape[2]
    missing = -c % channels
    gains = F.pad(gamma.detach().float().flatten(), (0, missing)).view(-1, channels)
    # Of both signs: the largest is the largest absolute value.
    reach = torch.cat((gains, gains * -1.0), 1).aminmax(dim=1).max * (growth * c**0.5)
    rows = F.pad(phases.detach().float(), (0, 0, 0, 0, 0, missing)).unflatten(2, (-1, channels))
    # [P, O, groups]: the lengths of the rows of each group of channels, summed over the taps.
    lengths = (rows * rows).sum(3).sqrt().sum((-2, -1))
    return Bound(((lengths * reach).aminmax().max,), LARGEST_FLOAT16 / 2, "sums")
