"""Which function runs each operation: the eager reference first, faster backends in its place.

An `OpSet` is chosen once for a decode and passed to every block, so that nothing depends on
ambient state and the report can say what ran, what did not, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from ..report import BackendOff
from .eager.attention import attention
from .eager.conv3d import conv2d, conv3d
from .eager.norm import rms_norm, rms_norm_silu
from .eager.upsample import upsample_conv2d

# Along which axis a picture is cut into shards.
Cut = Literal["whole", "height", "width"]


@dataclass(frozen=True)
class HaloRows:
    """What lies around a shard's features: a row above and below, or a column left and right.

    [B, T, 1, W, C] (axis "height") or [B, T, H, 1, C] ("width"), dense; None beyond the edge of
    the picture, where there are zeros.
    """

    axis: Literal["height", "width"]
    before: torch.Tensor | None
    after: torch.Tensor | None


class FusedConv(Protocol):
    """SiLU(rms_norm(x)), joined with its history, through one causal convolution: two kernels.

    Holds gain, weight and bias. Two calls, so that a caller can let go of `x` and of the old
    history between them. `only_frame`: all history is zero and only the last temporal slice of the
    weight is used.
    """

    def operand(
        self,
        x: torch.Tensor,
        history: torch.Tensor | None,
        *,
        only_frame: bool,
        keep: bool,
        overwrite: bool = False,
        halo: HaloRows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `convolve` reads, and if `keep` the history for the next chunk, in its own memory
        or, with `overwrite`, in that of `history`.

        `x` [B, C, T, H, W]; `history` [B, C, kT - 1, H', W'] of an earlier call of the same kernel,
        or None for zeros. With a `halo` the result is of H' = H + 2 rows (or W' = W + 2 columns).
        """
        ...

    def convolve(
        self,
        operand: torch.Tensor,
        frames: int,
        residual: torch.Tensor | None,
        *,
        padding: tuple[int, int],
        only_frame: bool,
    ) -> torch.Tensor:
        """[B, O, frames, H', W'], with `residual` of the same shape added.

        `padding`: zero rows and columns on each side, 0 where `x` had halo rows.
        """
        ...


def no_fused_conv(weight: torch.Tensor) -> FusedConv | None:
    """The eager reference fuses nothing."""
    return None


@dataclass(frozen=True)
class OpSet:
    """One callable for each operation; `used` names the backend of each for the report.

    Signatures are those of the eager functions in the sibling modules.
    """

    norm: Callable[..., torch.Tensor] = rms_norm
    norm_silu: Callable[..., torch.Tensor] = rms_norm_silu
    conv3d: Callable[..., torch.Tensor] = conv3d
    conv2d: Callable[..., torch.Tensor] = conv2d
    upsample_conv2d: Callable[..., torch.Tensor] = upsample_conv2d
    attention: Callable[..., torch.Tensor] = attention
    # The kernel that runs norm, SiLU and the convolution of this weight in one, if there is one.
    fused_conv: Callable[[torch.Tensor], FusedConv | None] = no_fused_conv
    # The dtype in which an encode takes its pixels; None is that of the weights.
    pixels: torch.dtype | None = None
    # The backend that runs the layer of this weight, for the report.
    backend_of: Callable[[torch.Tensor], str] = lambda weight: "eager"
    used: dict[str, str] = field(
        default_factory=lambda: dict.fromkeys(
            ("norm", "norm_silu", "conv3d", "conv2d", "upsample_conv2d", "attention"), "eager"
        )
    )
    off: tuple[BackendOff, ...] = ()


def eager_ops() -> OpSet:
    """The reference: plain PyTorch, right on every device; also the one that training uses."""
    return OpSet()
