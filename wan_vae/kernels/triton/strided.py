"""Triton: the encoder's strided convolutions: 3x3 over every second pixel, 3x1x1 over every second
frame.

Eager twins: `eager.conv3d.conv2d(stride=2)` and `eager.conv3d.conv3d(stride=(2, 1, 1))`. An
implicit GEMM as in `conv3d_tma.py`, but loaded through pointers: with a stride of two a tile of
pixels is not a box that a tensor descriptor could fetch. Reads past the last row or column are
zero, which is the padding on the right and at the bottom that the network was trained with; a shard
that has its neighbour's row there reads that. So nothing is padded in memory, and a shard's sums
are those of the whole picture.

The sum of an output pixel always runs over (taps, blocks of BK input channels)
in this order. Its bits depend on nothing but its inputs: not on its place in the picture, the
length of the chunk or the size of the shard.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .configs import StridedConfig
from .launch import launch_kernel

# Compiled once for all sizes: a picture's own would cost a user seconds at each new size.
_SIZES = ["frames_in", "frames_out", "height", "width", "rows", "cols"]


@triton.jit(do_not_specialize=_SIZES)
def _strided(
    x,
    weight,
    bias,
    out,
    frames_in,
    frames_out,
    height,
    width,
    rows,
    cols,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    M: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    BK: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ST: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    # Grid: (column blocks * blocks of M output pixels, frames_out * batch). `height` and `width`
    # are the input's, `rows` and `cols` the output's. PRECISION is for float32 operands.
    # Rounding: float32 accumulation, bias added in float32, one rounding at the store.
    n_blocks: tl.constexpr = COUT // (N0 + N1)
    k_blocks: tl.constexpr = CIN // BK
    row_of: tl.constexpr = KT * KH * KW * CIN
    n_start = (tl.program_id(0) % n_blocks) * (N0 + N1)
    pixel = (tl.program_id(0) // n_blocks).to(tl.int64) * M + tl.arange(0, M)
    made = tl.cast(rows, tl.int64) * cols
    inside = pixel < made
    y0 = (pixel // cols) * SY
    x0 = (pixel % cols) * SX
    batch = (tl.program_id(1) // frames_out).to(tl.int64)
    t = (tl.program_id(1) % frames_out).to(tl.int64)
    plane = tl.cast(height, tl.int64) * width
    corner = ((batch * frames_in + t * ST) * height + y0) * width + x0
    k = tl.arange(0, BK)
    values = x + corner[:, None] * CIN + k[None, :]
    taps0 = weight + (n_start + tl.arange(0, N0)).to(tl.int64)[None, :] * row_of + k[:, None]
    a0 = tl.zeros((M, N0), tl.float32)
    if N1 > 0:
        taps1 = weight + k[:, None]
        taps1 += (n_start + N0 + tl.arange(0, N1)).to(tl.int64)[None, :] * row_of
        a1 = tl.zeros((M, N1), tl.float32)
    for step in range(KT * KH * KW * k_blocks):
        tap = step // k_blocks
        ky = tap // KW % KH
        kx = tap % KW
        away = tap // (KH * KW) * plane + ky * width + kx
        ok = inside & (y0 + ky < height) & (x0 + kx < width)
        at = values + (away * CIN + (step % k_blocks) * BK)
        v = tl.load(at, mask=ok[:, None], other=0.0)
        # Weights lie as the sum runs: taps, then channels.
        a0 = tl.dot(v, tl.load(taps0 + step * BK), a0, input_precision=PRECISION)
        if N1 > 0:
            a1 = tl.dot(v, tl.load(taps1 + step * BK), a1, input_precision=PRECISION)
    to = out + ((batch * frames_out + t) * made + pixel)[:, None] * COUT
    n = n_start + tl.arange(0, N0)
    if HAS_BIAS:
        a0 += tl.load(bias + n).to(tl.float32)[None, :]
    tl.store(to + n[None, :], a0.to(out.dtype.element_ty), mask=inside[:, None])
    if N1 > 0:
        n = n_start + N0 + tl.arange(0, N1)
        if HAS_BIAS:
            a1 += tl.load(bias + n).to(tl.float32)[None, :]
        tl.store(to + n[None, :], a1.to(out.dtype.element_ty), mask=inside[:, None])


class StridedOperands(NamedTuple):
    """x [B, C, T, H, W], dense channels_last_3d; weight [O, C, kT, kH, kW] of its dtype and format.

    stride: steps in frames, rows and columns. pad_after: zero rows below and columns on the right,
    which are not made in memory. precision: from `conv3d.precision_of`.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, int, int]
    pad_after: tuple[int, int] = (0, 0)
    precision: str | None = None


def strided_conv3d(operands: StridedOperands, config: StridedConfig) -> torch.Tensor:
    """Convolution in steps of `stride`: [B, O, T', H', W'] in the dtype of `x`, channels_last_3d.

    T' = (T - kT) // sT + 1, H' = (H + pad - kH) // sY + 1, W' alike. Channels are multiples of what
    `config` needs.
    """
    x, weight, bias, stride, pad_after, precision = operands
    o, c, *kernel = weight.shape
    nd = x.permute(0, 2, 3, 4, 1)
    b, *sizes, _ = nd.shape
    padded = (sizes[0], sizes[1] + pad_after[0], sizes[2] + pad_after[1])
    t, rows, cols = ((n - k) // s + 1 for n, k, s in zip(padded, kernel, stride, strict=True))
    out = torch.empty((b, t, rows, cols, o), dtype=x.dtype, device=x.device)
    n_blocks = o // (config.N0 + config.N1)
    launch_kernel(
        _strided,
        (n_blocks * triton.cdiv(rows * cols, config.M), t * b),
        nd,
        weight.permute(0, 2, 3, 4, 1),
        out if bias is None else bias,
        out,
        sizes[0],
        t,
        sizes[1],
        sizes[2],
        rows,
        cols,
        CIN=c,
        COUT=o,
        M=config.M,
        N0=config.N0,
        N1=config.N1,
        BK=config.BK,
        KT=kernel[0],
        KH=kernel[1],
        KW=kernel[2],
        ST=stride[0],
        SY=stride[1],
        SX=stride[2],
        PRECISION=precision,
        HAS_BIAS=bias is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out.permute(0, 4, 1, 2, 3)
