"""Triton: implicit-GEMM convolution over an NDHWC buffer, for Hopper and later (TMA).

See `conv3d.py` for its operands. Tiles are loaded by tensor descriptors whose out-of-bounds reads
are zero: that is the spatial padding. Output frames of a program share their input frames: F
outputs need F + KT - 1 inputs, which is what pays, because the kernel is bound by L2-to-shared
traffic and not by the tensor cores.

The sum of an output pixel always runs over (kh, kw, blocks of BK input channels, kt)
in this order. Its bits depend on nothing but its inputs: not on its place in the picture, the
length of the chunk or the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import ConvConfig
from .conv3d import ConvCall, store_frame
from .launch import launch_kernel

# Compiled once for all sizes: a picture's own would cost a user seconds at each new size.
_SIZES = ["frames_in", "frames_out", "height", "width", "col_tiles", "groups"]


@triton.jit(do_not_specialize=_SIZES)
def _conv(
    x,
    w0,
    w1,
    bias,
    residual,
    out,
    frames_in,
    frames_out,
    height,
    width,
    cout,
    col_tiles,
    groups,
    CIN: tl.constexpr,
    F: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    BK: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    TAP0: tl.constexpr,
    UP: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
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
    ok = inside & (t0 < frames_out)
    store_frame(a0, out, residual, bias, frame, plane, pixel, ok, n, cout, HAS_BIAS, HAS_RESIDUAL)
    if F > 1:
        ok = inside & (t0 + 1 < frames_out)
        store_frame(
            a1, out, residual, bias, frame + 1, plane, pixel, ok, n, cout, HAS_BIAS, HAS_RESIDUAL
        )
    if F > 2:
        ok = inside & (t0 + 2 < frames_out)
        store_frame(
            a2, out, residual, bias, frame + 2, plane, pixel, ok, n, cout, HAS_BIAS, HAS_RESIDUAL
        )
        ok = inside & (t0 + 3 < frames_out)
        store_frame(
            a3, out, residual, bias, frame + 3, plane, pixel, ok, n, cout, HAS_BIAS, HAS_RESIDUAL
        )
    if N1 > 0:
        n = n_start + N0 + tl.arange(0, N1)
        ok = inside & (t0 < frames_out)
        store_frame(
            b0, out, residual, bias, frame, plane, pixel, ok, n, cout, HAS_BIAS, HAS_RESIDUAL
        )
        if F > 1:
            ok = inside & (t0 + 1 < frames_out)
            store_frame(
                b1,
                out,
                residual,
                bias,
                frame + 1,
                plane,
                pixel,
                ok,
                n,
                cout,
                HAS_BIAS,
                HAS_RESIDUAL,
            )
        if F > 2:
            ok = inside & (t0 + 2 < frames_out)
            store_frame(
                b2,
                out,
                residual,
                bias,
                frame + 2,
                plane,
                pixel,
                ok,
                n,
                cout,
                HAS_BIAS,
                HAS_RESIDUAL,
            )
            ok = inside & (t0 + 3 < frames_out)
            store_frame(
                b3,
                out,
                residual,
                bias,
                frame + 3,
                plane,
                pixel,
                ok,
                n,
                cout,
                HAS_BIAS,
                HAS_RESIDUAL,
            )


def launch(call: ConvCall, config: ConvConfig) -> None:
    """Run `_conv`."""
    b, frames_in, h, w, cin = call.buffer.shape
    cout, up, frames = call.out.shape[-1], call.up, call.frames
    height, width = (n // 2 for n in call.out.shape[1:3]) if up else call.out.shape[2:4]
    x = TensorDescriptor.from_tensor(
        call.buffer.view(b * frames_in, h, w, cin), [1, config.PH, config.PW, config.BK]
    )
    w0 = TensorDescriptor.from_tensor(call.weight, [config.N0, config.BK])
    w1 = TensorDescriptor.from_tensor(call.weight, [config.N1 or config.N0, config.BK])
    rows, cols = triton.cdiv(height, config.PH), triton.cdiv(width, config.PW)
    groups = triton.cdiv(frames, config.F)
    n_blocks = triton.cdiv(cout, config.N0 + config.N1)
    has_bias, has_residual = call.bias is not None, call.residual is not None
    launch_kernel(
        _conv,
        (n_blocks * rows * cols, groups * b, 4 if up else 1),
        x,
        w0,
        w1,
        call.bias if has_bias else call.out,
        call.residual if has_residual else call.out,
        call.out,
        frames_in,
        frames,
        height,
        width,
        cout,
        cols,
        groups,
        CIN=cin,
        F=config.F,
        PH=config.PH,
        PW=config.PW,
        N0=config.N0,
        N1=config.N1,
        BK=config.BK,
        KT=call.kernel[0],
        KH=call.kernel[1],
        KW=call.kernel[2],
        PAD_Y=call.padding[0],
        PAD_X=call.padding[1],
        TAP0=call.first_tap,
        UP=up,
        PRECISION=call.precision,
        HAS_BIAS=has_bias,
        HAS_RESIDUAL=has_residual,
        num_warps=config.warps,
        num_stages=config.stages,
    )
