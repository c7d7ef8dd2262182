"""Nearest 2x up-sampling followed by a 3x3 convolution: eager reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import layout
from ...layout import LayoutCounter
from .conv3d import conv2d


def upsample_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    counter: LayoutCounter,
    *,
    padding: tuple[int, int] = (1, 1),
) -> torch.Tensor:
    """[N, C, H, W] -> [N, O, 2H, 2W]: every pixel doubled, then a 3x3 convolution.

    `padding`: 1 for zeros around the picture; 0 on an axis (rows, columns) along which `x` has one
    halo row on each side, for which no result is made.
    """
    # Matched before it is four times as large. Also where it matches already: a single frame can
    # have a stray stride, for which the interpolation would come back in the other format.
    x = layout.match_input(x, weight, counter)
    x = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
    y = conv2d(x, weight, bias, counter, padding=padding)
    if padding == (1, 1):
        return y
    # A halo row became two; the outer one has met no padding and its result is not whole.
    fmt = "channels_last_3d" if layout.detect(y) == "channels_last_3d" else "contiguous"
    rows, columns = (slice(1 - p, n - 1 + p) for p, n in zip(padding, y.shape[2:], strict=True))
    return layout.to_format(y[..., rows, columns], fmt)
