"""What the weights of a layer say about the largest numbers in it, before it has run.

A norm bounds the vector of a pixel, so a bound on everything computed from it follows from the
weights alone. Where a kernel's numbers might overflow, its layer is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from ..ops.problem import LayerWeights
from ..said import said

LARGEST_FLOAT16 = torch.finfo(torch.float16).max
# How many channels are added up in float16 before the sum goes on in float32.
SUMMED_CHANNELS = 32


@dataclass(frozen=True)
class Bound:
    """`value`, a number that a kernel computes at most: a scalar on the device of the weights. It
    must stay below `limit`; `what` is the number, and `of` the kernel that has it, if not all."""

    value: torch.Tensor
    limit: float
    what: Literal["operand", "sums"]
    of: str = ""

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
    peak = gamma.detach().abs().max().float() * weight.shape[1] ** 0.5
    if weights.projection is not None:
        reach = weight.detach().float().flatten(1).norm(dim=1).max()
        peak = torch.maximum(peak, peak * reach)
    return Bound(peak, limit, "operand")


def winograd_phases(weight: torch.Tensor) -> torch.Tensor:
    """[O, C, 3, kH, kW] -> [4, O, C, kH, kW] float32, transformed for F(2, 3) along time; signs
    aside. The frames that they meet are sums or differences of two."""
    g0, g1, g2 = weight.detach().float().unbind(2)
    return torch.stack([(g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g0, g2])


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
    gains = F.pad(gamma.detach().float().flatten().abs(), (0, missing)).view(-1, channels)
    reach = gains.amax(1) * (growth * c**0.5)
    rows = F.pad(phases.detach().float(), (0, 0, 0, 0, 0, missing))
    # [P, O, groups]: the lengths of the rows of each group of channels, summed over the taps.
    lengths = rows.unflatten(2, (-1, channels)).norm(dim=3).sum((-2, -1))
    return Bound((lengths * reach).max(), LARGEST_FLOAT16 / 2, "sums")
