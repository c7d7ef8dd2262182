"""Causal 3-D convolution: eager reference.

Temporal padding is never part of the convolution: the caller passes history frames. Spatial
padding is zero, `k // 2`, unless halo rows were put around the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import layout
from ...layout import LayoutCounter


def conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    counter: LayoutCounter,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int] = (0, 0),
    last_slice: bool = False,
) -> torch.Tensor:
    """Convolution of `x` [B, C, T, H, W] with history frames already in front.

    `weight` is [O, C, kT, kH, kW]; the result has T - kT + 1 frames (over `stride`). The input is
    matched to the weight's memory format here, once. `last_slice`: all history is zero and absent
    from `x`, so only the last temporal slice of the weight is used, and no frame is lost.
    """
    if last_slice:
        # A new view: its format is checked again, and its strides made those of the format.
        fmt = layout.detect(weight)
        weight = layout.to_format(weight[:, :, -1:], "contiguous" if fmt == "either" else fmt)
    x = layout.match_input(x, weight, counter)
    layout.record_call(x, weight, counter)
    return F.conv3d(x, weight, bias, stride=stride, padding=(0, *padding))


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    counter: LayoutCounter,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    pad_after: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """Convolution of each frame of `x` [N, C, H, W] with `weight` [O, C, kH, kW].

    `padding`: zero rows and columns on each side; `pad_after`: zero rows below and columns on the
    right.
    """
    if any(pad_after):
        x = F.pad(x, (0, pad_after[1], 0, pad_after[0]))
    x = layout.match_input(x, weight, counter)
    layout.record_call(x, weight, counter)
    return F.conv2d(x, weight, bias, stride=stride, padding=padding)
