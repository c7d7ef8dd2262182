"""Triton: the head (norm + SiLU + 3x3x3 convolution to few channels) near memory speed.

Eager twin: `eager.norm.rms_norm_silu`, then `eager.conv3d.conv3d`. With few output channels,
fetching 27 shifted inputs for each pixel is the cost. Instead every pixel is read once and
multiplied with all nine spatial taps (a GEMM of 9 * O columns, summed over the three temporal taps
in registers); a second pass adds the nine shifted partial sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .configs import HeadConfig
from .launch import launch_kernel


@triton.jit(do_not_specialize=["pixels", "frames", "channels"])
def _partials(
    buffer,
    weight,
    partial,
    pixels,
    frames,
    channels,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLS: tl.constexpr,
    USED: tl.constexpr,
    M: tl.constexpr,
    KT: tl.constexpr,
):
    # Grid: (blocks of M pixels, frames, batch). float32 accumulation; float32 partial sums, a plane
    # for each column, so that the second pass reads whole rows.
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    t = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    col = tl.arange(0, COLS)
    acc = tl.zeros((M, COLS), tl.float32)
    plane = tl.cast(pixels, tl.int64) * C
    for kt in tl.static_range(KT):
        # `channels` is C, but not a constant: compilers would unroll the loop and load all of it
        # ahead, for which there is no room.
        for k0 in range(0, channels, BLOCK_C):
            k = k0 + tl.arange(0, BLOCK_C)
            frame = buffer + (b * (frames + KT - 1) + t + kt) * plane
            mask = (row < pixels)[:, None] & (k < C)[None, :]
            v = tl.load(frame + row[:, None] * C + k[None, :], mask=mask, other=0.0)
            taps = weight + (kt * C + k)[:, None] * COLS + col[None, :]
            w = tl.load(taps, mask=(k < C)[:, None], other=0.0)
            acc = tl.dot(v, w, acc)
    to = partial + ((b * frames + t) * USED + col[None, :]) * pixels + row[:, None]
    tl.store(to, acc, mask=(row < pixels)[:, None] & (col < USED)[None, :])


@triton.jit(do_not_specialize=["frames", "height", "width"])
def _gather(
    partial,
    bias,
    out,
    frames,
    height,
    width,
    OUT: tl.constexpr,
    M: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    # Grid: (blocks of M output pixels, frames, batch). `height` and `width` are those of `partial`.
    # Taps are added in a fixed order, float32.
    rows = height + 2 * PAD_Y - 2
    cols = width + 2 * PAD_X - 2
    p = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    t = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    pixels = tl.cast(height, tl.int64) * width
    made = tl.cast(rows, tl.int64) * cols
    y = p // cols - PAD_Y
    x = p % cols - PAD_X
    for o in tl.static_range(OUT):
        base = partial + ((b * frames + t) * OUT + o) * 9 * pixels
        acc = tl.zeros((M,), tl.float32)
        for tap in tl.static_range(9):
            yy = y + tap // 3
            xx = x + tap % 3
            ok = (p < made) & (yy >= 0) & (yy < height) & (xx >= 0) & (xx < width)
            acc += tl.load(base + tap * pixels + yy * width + xx, mask=ok, other=0.0)
        if HAS_BIAS:
            acc += tl.load(bias + o).to(tl.float32)
        tl.store(out + ((b * OUT + o) * frames + t) * made + p, acc, mask=p < made)


def pack_head(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[O, C, kT, 3, 3] -> [kT, C, columns]: nine taps of each output channel, then zeros."""
    o, c, kt = weight.shape[:3]
    columns = max(16, triton.next_power_of_2(9 * o))
    packed = torch.zeros((kt, c, columns), dtype=dtype, device=weight.device)
    packed[..., : 9 * o] = weight.detach().permute(2, 1, 0, 3, 4).reshape(kt, c, 9 * o)
    return packed


class HeadOperands(NamedTuple):
    """buffer [B, C, T + kT - 1, H, W], dense channels_last_3d; packed: from `pack_head`.

    padding: 0 or 1 each. last_slice: as in `conv3d.conv3d`.
    """

    buffer: torch.Tensor
    packed: torch.Tensor
    bias: torch.Tensor | None
    out_channels: int
    padding: tuple[int, int] = (1, 1)
    last_slice: bool = False


def head_conv(operands: HeadOperands, config: HeadConfig) -> torch.Tensor:
    """float32 [B, O, T, H', W'] in NCDHW, O * 9 at most 128; float32 from the first product on."""
    buffer, packed, bias, o, padding, last_slice = operands
    if last_slice:
        packed = packed[-1:]
    kt, c, columns = packed.shape
    nd = buffer.permute(0, 2, 3, 4, 1)
    b, frames, h, w, _ = nd.shape
    t = frames - kt + 1
    partial = torch.empty((b, t, 9 * o, h * w), dtype=torch.float32, device=buffer.device)
    rows, cols_out = h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
    out = torch.empty((b, o, t, rows, cols_out), dtype=torch.float32, device=buffer.device)
    launch_kernel(
        _partials,
        (triton.cdiv(h * w, config.M), t, b),
        nd,
        packed,
        partial,
        h * w,
        t,
        c,
        C=c,
        BLOCK_C=32 if c % 32 == 0 else 16,
        COLS=columns,
        USED=9 * o,
        M=config.M,
        KT=kt,
        num_warps=config.warps,
    )
    launch_kernel(
        _gather,
        (triton.cdiv(rows * cols_out, 1024), t, b),
        partial,
        out if bias is None else bias,
        out,
        t,
        h,
        w,
        OUT=o,
        M=1024,
        PAD_Y=padding[0],
        PAD_X=padding[1],
        HAS_BIAS=bias is not None,
        num_warps=4,
    )
    return out
