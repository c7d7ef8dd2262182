"""Triton: implicit-GEMM convolution over an NDHWC buffer, for cards without TMA.

The same tiles, operands and order of the sum as in `conv3d_tma.py`, but loaded through pointers,
which the compiler turns into asynchronous copies on NVIDIA's cards (cp.async). A pixel past the
picture's edge, or a frame past the last one, is masked and reads as zero: that is the spatial
padding. Programs make one or two frames; shared memory of 99 KiB (AMD: 64 KiB) holds no more.

The sum of an output pixel always runs over (kh, kw, blocks of BK input channels, kt)
in this order. Its bits depend on nothing but its inputs: not on its place in the picture, the
length of the chunk or the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .configs import ConvConfig
from .conv3d import ConvCall, store_frame
from .launch import launch_kernel

# Compiled once for all sizes: a picture's own would cost a user seconds at each new size.
_SIZES = ["frames_in", "frames_out", "rows_in", "cols_in", "height", "width", "col_tiles", "groups"]
_SIZES += ["steps"]


@triton.jit(do_not_specialize=_SIZES)
def _conv(
    x,
    weight,
    bias,
    residual,
    out,
    frames_in,
    frames_out,
    rows_in,
    cols_in,
    height,
    width,
    cout,
    col_tiles,
    groups,
    steps,
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
    TAPS: tl.constexpr,
    UP: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    # Grid: (column blocks * row tiles * col tiles, frame groups * batch, 4 parities or 1).
    # `rows_in` and `cols_in` are the buffer's, `height` and `width` the output's (of one parity).
    # TAPS: taps in a row of the weight. PRECISION is for float32 operands. `steps` of the sum is no
    # constant, because compilers unroll a short loop and load all of it ahead (gfx1100).
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
    m = tl.arange(0, M)
    oy = y0 + m // PW
    ox = x0 + m % PW
    # The input pixel of the first tap, which may lie outside.
    iy = oy - PAD_Y + py
    ix = ox - PAD_X + px
    k = tl.arange(0, BK)
    plane_in = tl.cast(rows_in, tl.int64) * cols_in * CIN
    first = tl.cast(batch * frames_in + t0, tl.int64) * plane_in
    source = x + first + (iy.to(tl.int64) * cols_in + ix)[:, None] * CIN + k[None, :]
    n0 = n_start + tl.arange(0, N0)
    row0 = (parity * cout + n0).to(tl.int64) * (TAPS * CIN)
    taps0 = weight + row0[None, :] + (TAP0 * CIN + k)[:, None]
    real0 = (n0 < cout)[None, :]
    a0 = tl.zeros((M, N0), tl.float32)
    a1 = tl.zeros((M, N0), tl.float32)
    if N1 > 0:
        n1 = n_start + N0 + tl.arange(0, N1)
        row1 = (parity * cout + n1).to(tl.int64) * (TAPS * CIN)
        taps1 = weight + row1[None, :] + (TAP0 * CIN + k)[:, None]
        real1 = (n1 < cout)[None, :]
        b0 = tl.zeros((M, N1), tl.float32)
        b1 = tl.zeros((M, N1), tl.float32)
    k_blocks: tl.constexpr = CIN // BK
    for step in range(steps):
        tap = step // k_blocks
        ky = tap // KW
        kx = tap % KW
        yy = iy + ky
        xx = ix + kx
        ok = ((yy >= 0) & (yy < rows_in) & (xx >= 0) & (xx < cols_in))[:, None]
        at = source + ((ky * cols_in + kx) * CIN + (step % k_blocks) * BK)
        i0 = tl.load(at, mask=ok, other=0.0)
        if F + KT > 2:
            i1 = tl.load(at + plane_in, mask=ok & (t0 + 1 < frames_in), other=0.0)
        if F + KT > 3:
            i2 = tl.load(at + 2 * plane_in, mask=ok & (t0 + 2 < frames_in), other=0.0)
        if F + KT > 4:
            i3 = tl.load(at + 3 * plane_in, mask=ok & (t0 + 3 < frames_in), other=0.0)
        # Weights lie as the sum runs, but for kt, which comes first: taps, then channels.
        w = tl.load(taps0 + step * BK, mask=real0, other=0.0)
        a0 = tl.dot(i0, w, a0, input_precision=PRECISION)
        if F > 1:
            a1 = tl.dot(i1, w, a1, input_precision=PRECISION)
        if N1 > 0:
            v = tl.load(taps1 + step * BK, mask=real1, other=0.0)
            b0 = tl.dot(i0, v, b0, input_precision=PRECISION)
            if F > 1:
                b1 = tl.dot(i1, v, b1, input_precision=PRECISION)
        if KT == 3:
            w = tl.load(taps0 + (KH * KW * CIN + step * BK), mask=real0, other=0.0)
            a0 = tl.dot(i1, w, a0, input_precision=PRECISION)
            if F > 1:
                a1 = tl.dot(i2, w, a1, input_precision=PRECISION)
            if N1 > 0:
                v = tl.load(taps1 + (KH * KW * CIN + step * BK), mask=real1, other=0.0)
                b0 = tl.dot(i1, v, b0, input_precision=PRECISION)
                if F > 1:
                    b1 = tl.dot(i2, v, b1, input_precision=PRECISION)
            w = tl.load(taps0 + (2 * KH * KW * CIN + step * BK), mask=real0, other=0.0)
            a0 = tl.dot(i2, w, a0, input_precision=PRECISION)
            if F > 1:
                a1 = tl.dot(i3, w, a1, input_precision=PRECISION)
            if N1 > 0:
                v = tl.load(taps1 + (2 * KH * KW * CIN + step * BK), mask=real1, other=0.0)
                b0 = tl.dot(i2, v, b0, input_precision=PRECISION)
                if F > 1:
                    b1 = tl.dot(i3, v, b1, input_precision=PRECISION)
    inside = (oy < height) & (ox < width)
    scale: tl.constexpr = 2 if UP else 1
    pixel = (oy * scale + py).to(tl.int64) * (width * scale) + (ox * scale + px)
    plane = tl.cast(height, tl.int64) * width * (scale * scale)
    frame = tl.cast(batch, tl.int64) * frames_out + t0
    later = inside & (t0 + 1 < frames_out)
    store_frame(
        a0, out, residual, bias, frame, plane, pixel, inside, n0, cout, HAS_BIAS, HAS_RESIDUAL
    )
    if F > 1:
        store_frame(
            a1,
            out,
            residual,
            bias,
            frame + 1,
            plane,
            pixel,
            later,
            n0,
            cout,
            HAS_BIAS,
            HAS_RESIDUAL,
        )
    if N1 > 0:
        store_frame(
            b0, out, residual, bias, frame, plane, pixel, inside, n1, cout, HAS_BIAS, HAS_RESIDUAL
        )
        if F > 1:
            store_frame(
                b1,
                out,
                residual,
                bias,
                frame + 1,
                plane,
                pixel,
                later,
                n1,
                cout,
                HAS_BIAS,
                HAS_RESIDUAL,
            )


def launch(call: ConvCall, config: ConvConfig) -> None:
    """Run `_conv`. The configuration makes one or two frames a program."""
    b, frames_in, rows, cols, cin = call.buffer.shape
    cout, up, frames = call.out.shape[-1], call.up, call.frames
    height, width = (n // 2 for n in call.out.shape[1:3]) if up else call.out.shape[2:4]
    row_tiles, col_tiles = triton.cdiv(height, config.PH), triton.cdiv(width, config.PW)
    groups = triton.cdiv(frames, config.F)
    n_blocks = triton.cdiv(cout, config.N0 + config.N1)
    has_bias, has_residual = call.bias is not None, call.residual is not None
    launch_kernel(
        _conv,
        (n_blocks * row_tiles * col_tiles, groups * b, 4 if up else 1),
        call.buffer,
        call.weight,
        call.bias if has_bias else call.out,
        call.residual if has_residual else call.out,
        call.out,
        frames_in,
        frames,
        rows,
        cols,
        height,
        width,
        cout,
        col_tiles,
        groups,
        call.kernel[1] * call.kernel[2] * (cin // config.BK),
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
        TAPS=call.weight.shape[1] // cin,
        UP=up,
        PRECISION=call.precision,
        HAS_BIAS=has_bias,
        HAS_RESIDUAL=has_residual,
        num_warps=config.warps,
        num_stages=config.stages,
    )
