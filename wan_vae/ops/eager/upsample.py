"""Nearest 2x up-sampling followed by a 3x3 convolution: eager reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import layout
from ...layout import LayoutCounter
from .conv3d import conv2d
from .forms import EagerForms

_LIBRARY = EagerForms()


def upsample_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    counter: LayoutCounter,
    *,
    padding: tuple[int, int] = (1, 1),
    forms: EagerForms = _LIBRARY,
) -> torch.Tensor:
    """[N, C, H, W] -> [N, O, 2H, 2W]: every pixel doubled, then a 3x3 convolution.

    `padding`: 1 for zeros around the picture; 0 on an axis (rows, columns) along which `x` has one
    halo row on each side, for which no result is made. `forms`: see `conv3d.conv2d`.
    """
    # Matched before it is four times as large. Also where it matches already: a single frame can
    # have a stray stride, for which the interpolation would come back in the other format.
    x = layout.match_input(x, weight, counter)
    x = doubled(x)
    y = conv2d(x, weight, bias, counter, padding=padding, forms=forms)
    if padding == (1, 1):
        return y
    # A halo row became two; the outer one has met no padding and its result is not whole.
    fmt = "channels_last_3d" if layout.detect(y) == "channels_last_3d" else "contiguous"
    rows, columns = (slice(1 - p, n - 1 + p) for p, n in zip(padding, y.shape[2:], strict=True))
    return layout.to_format(y[..., rows, columns], fmt)


def doubled(x: torch.Tensor) -> torch.Tensor:
    """Every pixel of `x` [N, C, H, W] doubled in height and width, in the memory format of `x`."""
    is_ndhwc = layout.detect(x) == "channels_last_3d"
    if not x.is_cuda or not is_ndhwc or x.requires_grad:
        return F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
    return doubled_pixels(x)


def doubled_pixels(x: torch.Tensor) -> torch.Tensor:
    """`doubled` for NDHWC, as one copy of whole pixels.

    The interpolation of 192 channels to 4x720x1280 takes 4.2 ms on an H200, for 1.8 GB that are
    read and written. Words of eight bytes: see `blocks._interleave`.
    """
    n, c, h, w = x.shape
    pixels = layout.to_format(x, "channels_last_3d").permute(0, 2, 3, 1)
    words = c * x.itemsize % 8 == 0
    moved = pixels.view(torch.int64) if words else pixels
    moved = moved[:, :, None, :, None].expand(n, h, 2, w, 2, moved.shape[3])
    moved = moved.reshape(n, 2 * h, 2 * w, -1).contiguous()  # one pixel would stay a view
    return (moved.view(x.dtype) if words else moved).permute(0, 3, 1, 2)
