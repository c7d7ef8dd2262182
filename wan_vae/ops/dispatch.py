"""Which function runs each operation: the eager reference first, faster backends in its place.

An `OpSet` is chosen once for a decode and passed to every block, so that nothing depends on
ambient state and the report can say what ran, what did not, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..report import BackendOff
from .attention import attention
from .conv3d import conv2d, conv3d
from .norm import rms_norm, rms_norm_silu
from .upsample import upsample_conv2d


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
    used: dict[str, str] = field(
        default_factory=lambda: dict.fromkeys(
            ("norm", "norm_silu", "conv3d", "conv2d", "upsample_conv2d", "attention"), "eager"
        )
    )
    off: tuple[BackendOff, ...] = ()


def eager_ops() -> OpSet:
    """The reference: plain PyTorch, right on every device; also the one that training uses."""
    return OpSet()
