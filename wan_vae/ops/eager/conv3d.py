"""Causal 3-D convolution: eager reference.

Temporal padding is never part of the convolution: the caller passes history frames. Spatial
padding is zero, `k // 2`, unless halo rows were put around the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import layout
from ...layout import LayoutCounter
from . import unfolded
from .forms import EagerForms

_LIBRARY = EagerForms()


def conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    counter: LayoutCounter,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int] = (0, 0),
    last_slice: bool = False,
    forms: EagerForms = _LIBRARY,
) -> torch.Tensor:
    """Convolution of `x` [B, C, T, H, W] with history frames already in front.

    `weight` is [O, C, kT, kH, kW]; the result has T - kT + 1 frames (over `stride`). The input is
    matched to the weight's memory format here, once. `last_slice`: all history is zero and absent
    from `x`, so only the last temporal slice of the weight is used, and no frame is lost. `forms`:
    how it is computed, unless a gradient is needed.
    """
    if last_slice:
        # A new view: its format is checked again, and its strides made those of the format.
        fmt = layout.detect(weight)
        weight = layout.to_format(weight[:, :, -1:], "contiguous" if fmt == "either" else fmt)
    form = "library" if _needs_gradient(x, weight, bias) else forms.conv3d
    rows, cols = padding
    if form in ("columns", "taps"):
        # They copy rows of the input in any case, and with that change its format.
        return unfolded.conv(form, x, weight, bias, stride=stride, around=(rows, rows, cols, cols))
    x = layout.match_input(x, weight, counter)
    layout.record_call(x, weight, counter)
    if form == "planes":
        return unfolded.conv(form, x, weight, bias, stride=stride, around=(rows, rows, cols, cols))
    if form == "cudnn" and weight.shape[2:] != (1, 1, 1):
        return _by_cudnn(x, weight, bias, stride, padding, forms.deterministic)
    return F.conv3d(x, weight, bias, stride=stride, padding=(0, *padding))


def _by_cudnn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int, int],
    padding: tuple[int, int],
    deterministic: bool,
) -> torch.Tensor:
    """What PyTorch does where it does not skip cuDNN: its convolution, then the bias in place."""
    y: torch.Tensor = torch.cudnn_convolution(
        x,
        weight,
        (0, *padding),
        stride,
        (1, 1, 1),
        1,
        False,  # no search for the fastest algorithm
        deterministic,
        True,  # TF32, of which half precision makes no use
    )
    return y if bias is None else y.add_(bias.view(1, -1, 1, 1, 1))


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    counter: LayoutCounter,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    pad_after: tuple[int, int] = (0, 0),
    forms: EagerForms = _LIBRARY,
) -> torch.Tensor:
    """Convolution of each frame of `x` [N, C, H, W] with `weight` [O, C, kH, kW].

    `padding`: zero rows and columns on each side; `pad_after`: zero rows below and columns on the
    right. `forms`: as in `conv3d`.
    """
    form = forms.conv2d
    if form in ("columns", "taps") and not _needs_gradient(x, weight, bias):
        (rows, cols), (below, right) = padding, pad_after
        y = unfolded.conv(
            form,
            x.unsqueeze(2),
            weight.unsqueeze(2),
            bias,
            stride=(1, stride, stride),
            around=(rows, rows + below, cols, cols + right),
        )
        return y.squeeze(2)
    if any(pad_after):
        x = F.pad(x, (0, pad_after[1], 0, pad_after[0]))
    x = layout.match_input(x, weight, counter)
    layout.record_call(x, weight, counter)
    return F.conv2d(x, weight, bias, stride=stride, padding=padding)


def _needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
