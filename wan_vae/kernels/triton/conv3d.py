"""Convolution in Triton, from the host's side: operands, memory for the result, one launch.

Eager twins: `eager.conv3d.conv3d`, and `eager.upsample.upsample_conv2d` for `folded_upsample`. The
kernels themselves are in `conv3d_tma.py` and `conv3d_pointer.py`, which differ in how they load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..device import Device
from .configs import ConvConfig


def precision_of(operand: torch.dtype, device: Device) -> str | None:
    """How a kernel multiplies operands: None where there is no choice, as of float16.

    float32 operands, which no norm bounds, are in small layers: as three TF32 products, or on AMD's
    cards, whose compiler has none, one by one.
    """
    if operand != torch.float32:
        return None
    return "ieee" if device.vendor == "amd" else "tf32x3"


class ConvOperands(NamedTuple):
    """What a convolution reads, and which part of it is wanted; see `conv3d`."""

    buffer: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    padding: tuple[int, int] = (1, 1)
    last_slice: bool = False
    out_dtype: torch.dtype | None = None
    precision: str | None = None


class ConvCall(NamedTuple):
    """One launch: buffer [B, T', H, W, C]; out [B, T, H', W', O], with `up` [T, 2H', 2W', O].

    weight: [O, taps * C], of which the taps from `first_tap` on are used; with `up` [4 * O, taps *
    C]. kernel: (kT, kH, kW). padding: zero rows above and columns on the left. frames: T.
    precision: from `precision_of`.
    """

    buffer: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    out: torch.Tensor
    kernel: tuple[int, int, int]
    first_tap: int
    up: bool
    padding: tuple[int, int]
    frames: int
    precision: str | None = None


Launch = Callable[[ConvCall, ConvConfig], None]


@triton.jit
def store_frame(
    acc,
    out,
    residual,
    bias,
    frame,
    plane,
    pixel,
    rows,
    n,
    cout,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    # Bias and residual are added in float32; one rounding, at the store.
    at = (frame * plane + pixel)[:, None] * cout + n[None, :]
    mask = rows[:, None] & (n < cout)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < cout, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


def conv3d(operands: ConvOperands, config: ConvConfig, launch: Launch) -> torch.Tensor:
    """Convolution of a buffer [B, C, T + kT - 1, H, W] with history in front, plus a residual.

    All tensors dense channels_last_3d; buffer and weight of one dtype (`precision` says how float32
    is multiplied, from `precision_of`); weight [O, C, kT, kH, kW] with kT 1 or 3 and odd kH, kW.
    `padding`: zero rows and columns on each side; 0 where halo rows are in the buffer. Residual
    [B, O, T, H', W'] or None. `last_slice`: all history is zero and absent from the buffer
    (one-frame video), use the last temporal slice of the kernel.
    Returns [B, O, T, H', W'], H' = H + 2 * padding - kH + 1, channels_last_3d, of `out_dtype` (the
    buffer's if None).
    """
    buffer, weight, bias, residual, padding, last_slice, out_dtype, precision = operands
    o, _, kt, kh, kw = weight.shape
    nd = buffer.permute(0, 2, 3, 4, 1)
    weight2d = weight.permute(0, 2, 3, 4, 1).reshape(o, -1)
    first_tap = (kt - 1) * kh * kw if last_slice else 0
    kt = 1 if last_slice else kt
    b, frames, h, w, _ = nd.shape
    t = frames - kt + 1
    h, w = h + 2 * padding[0] - kh + 1, w + 2 * padding[1] - kw + 1
    out_dtype = buffer.dtype if out_dtype is None else out_dtype
    out = torch.empty((b, t, h, w, o), dtype=out_dtype, device=buffer.device)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last_3d)
    kernel = (kt, kh, kw)
    call = ConvCall(
        nd, weight2d, bias, residual, out, kernel, first_tap, False, padding, t, precision
    )
    launch(call, config)
    return out.permute(0, 4, 1, 2, 3)


class UpsampleOperands(NamedTuple):
    """x [N, C, H, W] in channels_last; weight [4 * O, 4 * C] from `weights.fold_upsample`."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    padding: tuple[int, int] = (1, 1)


def folded_upsample(operands: UpsampleOperands, config: ConvConfig, launch: Launch) -> torch.Tensor:
    """Nearest 2x, then the 3x3 convolution behind the folded weight: [N, O, 2H, 2W].

    `padding` 0 on an axis: see `eager.upsample.upsample_conv2d`.
    """
    x, weight, bias, padding = operands
    nd = x.permute(0, 2, 3, 1).contiguous().unsqueeze(0)
    _, n, h, w, _ = nd.shape
    h, w = h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
    o = weight.shape[0] // 4
    out = torch.empty((n, 2 * h, 2 * w, o), dtype=x.dtype, device=x.device)
    launch(ConvCall(nd, weight, bias, None, out, (1, 2, 2), 0, True, padding, n), config)
    return out.permute(0, 3, 1, 2)
