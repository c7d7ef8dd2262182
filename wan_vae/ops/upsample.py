"""Nearest 2x up-sampling followed by a 3x3 convolution: eager reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..layout import LayoutCounter
from .conv3d import conv2d


def upsample_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    counter: LayoutCounter,
    *,
    padding: tuple[int, int] = (1, 1),
) -> torch.Tensor:
    """[N, C, H, W] -> [N, O, 2H, 2W]: every pixel doubled, then a 3x3 convolution."""
    return conv2d(
        F.interpolate(x, scale_factor=2.0, mode="nearest-exact"),
        weight,
        bias,
        counter,
        padding=padding,
    )
