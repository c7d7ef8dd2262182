"""Triton: RMS norm + SiLU that writes straight into the convolution's input buffer.

Eager twin: `norm.rms_norm_silu` followed by `layout.join_frames`. One launch copies the history
frames, normalises the new ones behind them and keeps the last two frames for the next chunk, so
there is no pad, no cat and no clone. `norm_silu_pairs` writes Winograd-transformed frames instead.

On a shard the neighbours' rows are written, normalised, around the rank's own, by launches of the
same kernel: the norm looks at one pixel at a time, so a rank gets its neighbour's bits. (One launch
with a choice of source for each pixel takes a fifth longer.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...ops.opset import HaloRows
from ..kernel import FusedNorm, NormCall, NormResult
from .launch import launch_kernel

# Compiled once for all sizes.
_SIZES = ["pixels", "width", "plane", "plane_width", "first", "frames"]


@triton.jit
def _place(pixel, width, plane_width, first, PLACED: tl.constexpr):
    # Where in a plane of the result a pixel of x lies: x is all of it, or (PLACED) a part of it
    # `width` wide, from pixel `first` on.
    if not PLACED:
        return pixel
    near = pixel.to(tl.int32)
    return (first + near // width * plane_width + near % width).to(tl.int64)


@triton.jit(do_not_specialize=_SIZES)
def _norm_silu_join(
    x,
    scale,
    history,
    buffer,
    kept,
    pixels,
    width,
    plane,
    plane_width,
    first,
    frames,
    has_x,
    has_history,
    keep,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    PAST_FRAMES: tl.constexpr,
    SILU: tl.constexpr,
    PLACED: tl.constexpr,
):
    # Grid: (blocks of ROWS pixels of x, frames + PAST_FRAMES, batch). Everything is [.., pixel, C];
    # x has `pixels` in a frame, the others `plane`. Rounding: sums, norm and SiLU in float32; one
    # rounding, at the store.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    frame = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    col = tl.arange(0, BLOCK_C)
    mask = (row < pixels)[:, None] & (col < C)[None, :]
    inside = _place(row, width, plane_width, first, PLACED)[:, None] * C + col[None, :]
    step = tl.cast(plane, tl.int64) * C
    if frame < PAST_FRAMES:
        past = history + (batch * PAST_FRAMES + frame) * step
        y = tl.load(past + inside, mask=mask & (has_history != 0), other=0.0).to(tl.float32)
    else:
        new = x + (batch * frames + frame - PAST_FRAMES) * pixels * C
        at = row[:, None] * C + col[None, :]
        v = tl.load(new + at, mask=mask & (has_x != 0), other=0.0).to(tl.float32)
        norm = tl.maximum(tl.sqrt(tl.sum(v * v, axis=1)), 1e-12)
        g = tl.load(scale + col, mask=col < C, other=0.0)
        v = v * (1.0 / norm)[:, None] * g[None, :]
        y = v * tl.sigmoid(v) if SILU else v
    y = y.to(buffer.dtype.element_ty)
    out = buffer + (batch * (frames + PAST_FRAMES) + frame) * step
    tl.store(out + inside, y, mask=mask)
    if (keep != 0) & (frame >= frames):
        out = kept + (batch * PAST_FRAMES + frame - frames) * step
        tl.store(out + inside, y, mask=mask)


def join_rows(channels: int) -> int:
    """Pixels of one program of `_norm_silu_join`, which holds all their channels in registers."""
    return 32 if channels <= 512 else 16


def join_warps(channels: int) -> int:
    """Warps of one program of `_norm_silu_join`."""
    return 8 if channels > 256 else 4


def norm_silu_join(call: NormCall) -> NormResult:
    """silu(rms_norm(x)) behind `past` history frames, and the last `past` frames of the result.

    See `NormCall`; features are dense channels_last_3d. Returns the buffer [B, C, past + T, H', W']
    (channels_last_3d) and, if `keep`, the new history in memory of its own (with `overwrite`, in
    that of `history`). float32 inside, one rounding.
    """
    x, scale, history, past, keep, dtype, silu, overwrite, halo, _ = call
    b, c, t, _, _ = x.shape
    _check_channels(call)
    parts, (h, w) = _parts(x, halo)
    dtype = x.dtype if dtype is None else dtype
    buffer = torch.empty((b, past + t, h, w, c), dtype=dtype, device=x.device)
    if history is not None:
        history = history.contiguous(memory_format=torch.channels_last_3d)
    keep = keep and past > 0
    over = history if overwrite and keep else None
    # Not over the old history: other programs of the same launch read what would be written over.
    keep = keep and over is None
    kept = torch.empty((b, past, h, w, c), dtype=dtype, device=x.device) if keep else buffer
    rows = join_rows(c)
    for part in parts:
        launch_kernel(
            _norm_silu_join,
            (triton.cdiv(part.pixels, rows), past + t, b),
            part.x,
            scale,
            buffer if history is None else history,
            buffer,
            kept,
            part.pixels,
            part.width,
            h * w,
            w,
            part.first,
            t,
            _flag(part.has_x),
            _flag(history is not None),
            _flag(keep),
            C=c,
            BLOCK_C=triton.next_power_of_2(c),
            ROWS=rows,
            PAST_FRAMES=past,
            SILU=silu,
            PLACED=halo is not None,
            num_warps=join_warps(c),
        )
    result = buffer.permute(0, 4, 1, 2, 3)
    if over is not None:
        return result, over.copy_(result[:, :, -past:])
    return result, kept.permute(0, 4, 1, 2, 3) if keep else None


def _check_channels(call: NormCall) -> None:
    """Raises ValueError if the result should have more channels than `x`."""
    if call.channels not in (None, call.x.shape[1]):
        raise ValueError(f"{call.channels} channels for {call.x.shape[1]}: the kernel fills none")


@dataclass(frozen=True)
class _Part:
    """Features of `pixels` in rows of `width`; in a plane of the result they lie from pixel `first`
    on. Zeros stand there if not `has_x` (`x` is then any tensor, which is not read)."""

    x: torch.Tensor
    pixels: int
    width: int
    first: int
    has_x: bool = True


def _parts(x: torch.Tensor, halo: HaloRows | None) -> tuple[tuple[_Part, ...], tuple[int, int]]:
    """What the result is made of, one launch each, and its size (H', W')."""
    x = x.contiguous(memory_format=torch.channels_last_3d)
    h, w = x.shape[3], x.shape[4]
    if halo is None:
        return (_Part(x, h * w, w, 0),), (h, w)
    across, start, end = (w, w, (h + 1) * w) if halo.axis == "height" else (h, 1, w + 1)
    size = (h + 2, w) if halo.axis == "height" else (h, w + 2)
    edge = w if halo.axis == "height" else 1
    parts = [_Part(x, h * w, w, start)]
    for rows, first in ((halo.before, 0), (halo.after, end)):
        has_rows = rows is not None
        parts.append(_Part(x if rows is None else rows.contiguous(), across, edge, first, has_rows))
    return tuple(parts), size


def _flag(value: bool) -> float:
    """A kernel's argument. Not an integer: Triton compiles again for an integer that is 1."""
    return float(value)


@triton.jit
def _normed(frame, gain, mask, OPERAND: tl.constexpr):
    # One frame's block: float32 inside, rounded as the untransformed buffer would be.
    v = tl.load(frame, mask=mask, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(v * v, axis=1)), 1e-12)
    v = v * (1.0 / norm)[:, None] * gain[None, :]
    return (v * tl.sigmoid(v)).to(OPERAND).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def _norm_silu_pairs(
    x,
    scale,
    history,
    out,
    kept,
    pixels,
    width,
    plane,
    plane_width,
    first,
    frames,
    has_x,
    has_history,
    keep,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    PLACED: tl.constexpr,
):
    # Grid: (blocks of ROWS pixels of x, batch). A program goes through all frames of its pixels, so
    # each is read and normalised once. Sizes as in `_norm_silu_join`.
    operand: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    col = tl.arange(0, BLOCK_C)
    mask = (row < pixels)[:, None] & (col < C)[None, :]
    inside = _place(row, width, plane_width, first, PLACED)[:, None] * C + col[None, :]
    step = tl.cast(plane, tl.int64) * C
    gain = tl.load(scale + col, mask=col < C, other=0.0)
    past = history + batch * 2 * step + inside
    old = mask & (has_history != 0)
    h0 = tl.load(past, mask=old, other=0.0).to(tl.float32)
    h1 = tl.load(past + step, mask=old, other=0.0).to(tl.float32)
    source = tl.cast(pixels, tl.int64) * C
    new = x + batch * frames * source + row[:, None] * C + col[None, :]
    mine = mask & (has_x != 0)
    # An odd number of frames: the first pair is the last frame of the past and the first new one.
    lead = frames % 2
    d0 = tl.where(lead == 1, 0.0, h0)
    d1 = tl.where(lead == 1, h0, h1)
    pairs = (frames + 1) // 2
    for pair in range(pairs):
        frame = (2 * pair - lead).to(tl.int64)
        d2 = _normed(new + frame * source, gain, mine & (frame >= 0), operand)
        d2 = tl.where(frame >= 0, d2, h1)
        d3 = _normed(new + (frame + 1) * source, gain, mine, operand)
        to = out + (batch * pairs + pair) * 4 * step + inside
        tl.store(to, (d0 - d2).to(operand), mask=mask)
        tl.store(to + step, (d1 + d2).to(operand), mask=mask)
        tl.store(to + 2 * step, (d2 - d1).to(operand), mask=mask)
        tl.store(to + 3 * step, (d1 - d3).to(operand), mask=mask)
        d0 = d2
        d1 = d3
    if keep != 0:
        last = kept + batch * 2 * step + inside
        tl.store(last, d0.to(operand), mask=mask)
        tl.store(last + step, d1.to(operand), mask=mask)


def pair_rows(channels: int) -> int:
    """Pixels of one program of `_norm_silu_pairs`: four frames of them are held in registers."""
    return 16 if channels <= 128 else 8 if channels <= 256 else 4


def norm_silu_pairs(call: NormCall) -> NormResult:
    """As `norm_silu_join` with two past frames, but transformed for Winograd F(2,3) along time.

    x [B, C, T, H, W]. Returns [B, C, 4 * ceil(T / 2), H', W']: for each two frames d2, d3 behind
    d0, d1 the four frames d0 - d2, d1 + d2, d2 - d1, d1 - d3; and, if `keep`, the new history
    [B, C, 2, H', W'], untransformed and rounded as it was used (with `overwrite`, in the memory of
    `history`: a program reads its pixels before it writes them). Pairs end with the last frame: if
    T is odd (a chunk with the video's first frame, which stands alone), the first pair's d2 is of
    the past. So which frames are a pair does not depend on the chunk schedule.
    """
    x, scale, history, past, keep, dtype, _, overwrite, halo, _ = call
    b, c, t, _, _ = x.shape
    _check_channels(call)
    parts, (h, w) = _parts(x, halo)
    dtype = x.dtype if dtype is None else dtype
    out = torch.empty((b, (t + 1) // 2 * 4, h, w, c), dtype=dtype, device=x.device)
    if history is not None:
        history = history.contiguous(memory_format=torch.channels_last_3d)
    kept: torch.Tensor | None = None
    if keep and overwrite and history is not None:
        kept = history
    elif keep:
        kept = torch.empty((b, past, h, w, c), dtype=dtype, device=x.device).permute(0, 4, 1, 2, 3)
    rows = pair_rows(c)
    for part in parts:
        launch_kernel(
            _norm_silu_pairs,
            (triton.cdiv(part.pixels, rows), b),
            part.x,
            scale,
            out if history is None else history,
            out,
            out if kept is None else kept,
            part.pixels,
            part.width,
            h * w,
            w,
            part.first,
            t,
            _flag(part.has_x),
            _flag(history is not None),
            _flag(keep),
            C=c,
            BLOCK_C=triton.next_power_of_2(c),
            ROWS=rows,
            PLACED=halo is not None,
            num_warps=4,
        )
    return out.permute(0, 4, 1, 2, 3), kept


NORM = FusedNorm("triton", norm_silu_join, norm_silu_pairs)
