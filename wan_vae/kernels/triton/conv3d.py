"""Triton: implicit-GEMM convolution over an NDHWC buffer, for Hopper and later (TMA).

Eager twin: `conv3d.conv3d` (and `upsample.upsample_conv2d` for `folded_upsample`). Tiles are
loaded by tensor descriptors whose out-of-bounds reads are zero: that is the spatial padding.
Output frames of a program share their input frames: F outputs need F + KT - 1 inputs, which is
what pays, because the kernel is bound by L2-to-shared traffic and not by the tensor cores.

The sum of an output pixel runs over (kh, kw, blocks of BK input channels, kt) in this order,
whatever its place in the picture, the length of the chunk or the tile: its bits depend on nothing
but its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# How float32 operands are multiplied: the operands that a norm does not bound, in small layers.
FLOAT32_PRECISION = "tf32x3"


@dataclass(frozen=True)
class Config:
    """Tile of one program: F frames, PH x PW pixels, N0 + N1 output channels, BK of the sum."""

    F: int
    PH: int
    PW: int
    N0: int
    N1: int
    BK: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return (
            f"f{self.F}_p{self.PH}x{self.PW}_n{self.N0}+{self.N1}_k{self.BK}"
            f"_w{self.warps}_s{self.stages}"
        )


# Compiled once for all sizes: a picture's own would cost a user seconds at each new size.
_SIZES = ["frames_in", "frames_out", "height", "width", "row_tiles", "col_tiles", "groups"]


@triton.jit(do_not_specialize=_SIZES)
def _conv(
    x, w0, w1, bias, residual, out, frames_in, frames_out, height, width, cout,
    row_tiles, col_tiles, groups,
    CIN: tl.constexpr, F: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr,
    BK: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
    TAP0: tl.constexpr, UP: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    # Grid: (column blocks * row tiles * col tiles, frame groups * batch, 4 parities or 1).
    # `height` and `width` are the output's (of one parity). PRECISION is for float32 operands.
    # Rounding: float32 accumulation, bias and residual added in float32, one rounding at the store.
    M: tl.constexpr = PH * PW
    n_blocks = tl.cdiv(cout, N0 + N1)
    pid = tl.program_id(0)
    n_start = (pid % n_blocks) * (N0 + N1)
    tile = pid // n_blocks
    y0 = (tile // col_tiles) * PH
    x0 = (tile % col_tiles) * PW
    batch = tl.program_id(1) // groups
    t0 = (tl.program_id(1) % groups) * F
    parity = tl.program_id(2)
    py = parity // 2
    px = parity % 2
    frame0 = batch * frames_in + t0
    wrow = parity * cout + n_start
    a0 = tl.zeros((M, N0), tl.float32)
    a1 = tl.zeros((M, N0), tl.float32)
    a2 = tl.zeros((M, N0), tl.float32)
    a3 = tl.zeros((M, N0), tl.float32)
    if N1 > 0:
        b0 = tl.zeros((M, N1), tl.float32)
        b1 = tl.zeros((M, N1), tl.float32)
        b2 = tl.zeros((M, N1), tl.float32)
        b3 = tl.zeros((M, N1), tl.float32)
    k_blocks: tl.constexpr = CIN // BK
    for step in range(KH * KW * k_blocks):
        tap = step // k_blocks
        k = (step % k_blocks) * BK
        yy = y0 + tap // KW - PAD_Y + py
        xx = x0 + tap % KW - PAD_X + px
        i0 = x.load([frame0, yy, xx, k]).reshape(M, BK)
        if F + KT > 2:
            i1 = x.load([frame0 + 1, yy, xx, k]).reshape(M, BK)
        if F + KT > 3:
            i2 = x.load([frame0 + 2, yy, xx, k]).reshape(M, BK)
        if F + KT > 4:
            i3 = x.load([frame0 + 3, yy, xx, k]).reshape(M, BK)
        if F + KT > 6:
            i4 = x.load([frame0 + 4, yy, xx, k]).reshape(M, BK)
            i5 = x.load([frame0 + 5, yy, xx, k]).reshape(M, BK)
        kw = (TAP0 + tap) * CIN + k
        w = w0.load([wrow, kw]).T
        a0 = tl.dot(i0, w, a0, input_precision=PRECISION)
        if F > 1:
            a1 = tl.dot(i1, w, a1, input_precision=PRECISION)
        if F > 2:
            a2 = tl.dot(i2, w, a2, input_precision=PRECISION)
            a3 = tl.dot(i3, w, a3, input_precision=PRECISION)
        if N1 > 0:
            v = w1.load([wrow + N0, kw]).T
            b0 = tl.dot(i0, v, b0, input_precision=PRECISION)
            if F > 1:
                b1 = tl.dot(i1, v, b1, input_precision=PRECISION)
            if F > 2:
                b2 = tl.dot(i2, v, b2, input_precision=PRECISION)
                b3 = tl.dot(i3, v, b3, input_precision=PRECISION)
        if KT == 3:
            kw = (TAP0 + KH * KW + tap) * CIN + k
            w = w0.load([wrow, kw]).T
            a0 = tl.dot(i1, w, a0, input_precision=PRECISION)
            if F > 1:
                a1 = tl.dot(i2, w, a1, input_precision=PRECISION)
            if F > 2:
                a2 = tl.dot(i3, w, a2, input_precision=PRECISION)
                a3 = tl.dot(i4, w, a3, input_precision=PRECISION)
            if N1 > 0:
                v = w1.load([wrow + N0, kw]).T
                b0 = tl.dot(i1, v, b0, input_precision=PRECISION)
                if F > 1:
                    b1 = tl.dot(i2, v, b1, input_precision=PRECISION)
                if F > 2:
                    b2 = tl.dot(i3, v, b2, input_precision=PRECISION)
                    b3 = tl.dot(i4, v, b3, input_precision=PRECISION)
            kw = (TAP0 + 2 * KH * KW + tap) * CIN + k
            w = w0.load([wrow, kw]).T
            a0 = tl.dot(i2, w, a0, input_precision=PRECISION)
            if F > 1:
                a1 = tl.dot(i3, w, a1, input_precision=PRECISION)
            if F > 2:
                a2 = tl.dot(i4, w, a2, input_precision=PRECISION)
                a3 = tl.dot(i5, w, a3, input_precision=PRECISION)
            if N1 > 0:
                v = w1.load([wrow + N0, kw]).T
                b0 = tl.dot(i2, v, b0, input_precision=PRECISION)
                if F > 1:
                    b1 = tl.dot(i3, v, b1, input_precision=PRECISION)
                if F > 2:
                    b2 = tl.dot(i4, v, b2, input_precision=PRECISION)
                    b3 = tl.dot(i5, v, b3, input_precision=PRECISION)
    m = tl.arange(0, M)
    oy = y0 + m // PW
    ox = x0 + m % PW
    inside = (oy < height) & (ox < width)
    scale: tl.constexpr = 2 if UP else 1
    pixel = (oy * scale + py).to(tl.int64) * (width * scale) + (ox * scale + px)
    plane = tl.cast(height, tl.int64) * width * (scale * scale)
    frame = tl.cast(batch, tl.int64) * frames_out + t0
    n = n_start + tl.arange(0, N0)
    _store(a0, out, residual, bias, frame, plane, pixel, inside & (t0 < frames_out), n, cout,
           HAS_BIAS, HAS_RESIDUAL)  # fmt: skip
    if F > 1:
        _store(a1, out, residual, bias, frame + 1, plane, pixel, inside & (t0 + 1 < frames_out), n,
               cout, HAS_BIAS, HAS_RESIDUAL)  # fmt: skip
    if F > 2:
        _store(a2, out, residual, bias, frame + 2, plane, pixel, inside & (t0 + 2 < frames_out), n,
               cout, HAS_BIAS, HAS_RESIDUAL)  # fmt: skip
        _store(a3, out, residual, bias, frame + 3, plane, pixel, inside & (t0 + 3 < frames_out), n,
               cout, HAS_BIAS, HAS_RESIDUAL)  # fmt: skip
    if N1 > 0:
        n = n_start + N0 + tl.arange(0, N1)
        _store(b0, out, residual, bias, frame, plane, pixel, inside & (t0 < frames_out), n, cout,
               HAS_BIAS, HAS_RESIDUAL)  # fmt: skip
        if F > 1:
            _store(b1, out, residual, bias, frame + 1, plane, pixel,
                   inside & (t0 + 1 < frames_out), n, cout, HAS_BIAS, HAS_RESIDUAL)  # fmt: skip
        if F > 2:
            _store(b2, out, residual, bias, frame + 2, plane, pixel,
                   inside & (t0 + 2 < frames_out), n, cout, HAS_BIAS, HAS_RESIDUAL)  # fmt: skip
            _store(b3, out, residual, bias, frame + 3, plane, pixel,
                   inside & (t0 + 3 < frames_out), n, cout, HAS_BIAS, HAS_RESIDUAL)  # fmt: skip


@triton.jit
def _store(
    acc, out, residual, bias, frame, plane, pixel, rows, n, cout,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    at = (frame * plane + pixel)[:, None] * cout + n[None, :]
    mask = rows[:, None] & (n < cout)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < cout, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


def _launch(
    buffer, weight2d, bias, residual, out, config, kernel, tap0, up, padding, frames_out
) -> None:
    """Run `_conv`: buffer [B, T', H, W, C]; out [B, T, H', W', O], with `up` [T, 2H, 2W, O].

    `kernel` is (kT, kH, kW), `padding` zero rows above and columns on the left.
    """
    b, frames_in, h, w, cin = buffer.shape
    cout = out.shape[-1]
    height, width = (n // 2 for n in out.shape[1:3]) if up else out.shape[2:4]
    x = TensorDescriptor.from_tensor(
        buffer.view(b * frames_in, h, w, cin), [1, config.PH, config.PW, config.BK]
    )
    w0 = TensorDescriptor.from_tensor(weight2d, [config.N0, config.BK])
    w1 = TensorDescriptor.from_tensor(weight2d, [config.N1 or config.N0, config.BK])
    rows, cols = triton.cdiv(height, config.PH), triton.cdiv(width, config.PW)
    groups = triton.cdiv(frames_out, config.F)
    n_blocks = triton.cdiv(cout, config.N0 + config.N1)
    _conv[(n_blocks * rows * cols, groups * b, 4 if up else 1)](
        x, w0, w1, out if bias is None else bias, out if residual is None else residual, out,
        frames_in, frames_out, height, width, cout, rows, cols, groups, CIN=cin,
        F=config.F, PH=config.PH, PW=config.PW, N0=config.N0, N1=config.N1, BK=config.BK,
        KT=kernel[0], KH=kernel[1], KW=kernel[2], PAD_Y=padding[0], PAD_X=padding[1],
        TAP0=tap0, UP=up, PRECISION=FLOAT32_PRECISION,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def conv3d(
    buffer: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    config: Config,
    *,
    padding: tuple[int, int] = (1, 1),
    last_slice: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Convolution of `buffer` [B, C, T + kT - 1, H, W] with history in front, plus `residual`.

    All tensors dense channels_last_3d; buffer and weight of one dtype (float32 is multiplied as
    three TF32 products: near float32); weight [O, C, kT, kH, kW] with kT 1 or 3 and odd kH, kW.
    `padding`: zero rows and columns on each side; 0 where halo rows are in the buffer. Residual
    [B, O, T, H', W'] or None. `last_slice`: all history is zero and absent from the buffer
    (one-frame video), use the last temporal slice of the kernel.
    Returns [B, O, T, H', W'], H' = H + 2 * padding - kH + 1, channels_last_3d, of `out_dtype` (the
    buffer's if None).
    """
    o, _, kt, kh, kw = weight.shape
    nd = buffer.permute(0, 2, 3, 4, 1)
    weight2d = weight.permute(0, 2, 3, 4, 1).reshape(o, -1)
    tap0 = (kt - 1) * kh * kw if last_slice else 0
    kt = 1 if last_slice else kt
    b, frames, h, w, _ = nd.shape
    t = frames - kt + 1
    h, w = h + 2 * padding[0] - kh + 1, w + 2 * padding[1] - kw + 1
    out_dtype = buffer.dtype if out_dtype is None else out_dtype
    out = torch.empty((b, t, h, w, o), dtype=out_dtype, device=buffer.device)
    res = None
    if residual is not None:
        res = residual.contiguous(memory_format=torch.channels_last_3d)
    _launch(nd, weight2d, bias, res, out, config, (kt, kh, kw), tap0, False, padding, t)
    return out.permute(0, 4, 1, 2, 3)


def fold_upsample(weight: torch.Tensor) -> torch.Tensor:
    """3x3 weight [O, C, 3, 3] -> [4 * O, 4 * C]: four 2x2 kernels, one for each output parity.

    After nearest doubling, an even output row sees input rows (-1, 0) through taps (0, 1 + 2), an
    odd one rows (0, 1) through (0 + 1, 2); columns alike. Exact up to the rounding of summed taps,
    which are summed in float32 and rounded once to the weight's dtype.
    """
    w = weight.float()

    def pair(v: torch.Tensor, dim: int, parity: int) -> torch.Tensor:
        a, b, c = v.unbind(dim)
        return torch.stack((a, b + c) if parity == 0 else (a + b, c), dim)

    kernels = [pair(pair(w, 2, py), 3, px) for py in (0, 1) for px in (0, 1)]
    folded = torch.cat([k.permute(0, 2, 3, 1).reshape(w.shape[0], -1) for k in kernels])
    return folded.to(weight.dtype).contiguous()


def folded_upsample(
    x: torch.Tensor,
    folded: torch.Tensor,
    bias: torch.Tensor | None,
    config: Config,
    padding: tuple[int, int] = (1, 1),
) -> torch.Tensor:
    """[N, C, H, W] channels_last -> [N, O, 2H, 2W]: nearest 2x, then the 3x3 behind `folded`.

    `padding` 0 on an axis: see `upsample.upsample_conv2d`.
    """
    nd = x.permute(0, 2, 3, 1).contiguous().unsqueeze(0)
    _, n, h, w, _ = nd.shape
    h, w = h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
    o = folded.shape[0] // 4
    out = torch.empty((n, 2 * h, 2 * w, o), dtype=x.dtype, device=x.device)
    _launch(nd, folded, bias, None, out, config, (1, 2, 2), 0, True, padding, n)
    return out.permute(0, 3, 1, 2)
