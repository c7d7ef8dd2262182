"""Triton: RMS norm + SiLU that writes straight into the convolution's input buffer.

Eager twin: `norm.rms_norm_silu` followed by `layout.join_frames`. One launch copies the history
frames, normalises the new ones behind them and keeps the last two frames for the next chunk, so
there is no pad, no cat and no clone. `norm_silu_pairs` writes Winograd-transformed frames instead.

On a shard both read the neighbours' rows from where they were received and write them, normalised,
around the rank's own: the norm looks at one pixel at a time, so a rank gets its neighbour's bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dispatch import HaloRows

PAST = 2  # history frames of a convolution of three
_ROWS = 32


# HALO below: 0 the whole picture, 1 a halo row above and below, 2 a halo column left and right.


@triton.jit
def _place(pixel, height, width, HALO: tl.constexpr):
    # Where a pixel of the result, `height` x `width` with its halo, is read: its pixel among the
    # rank's own rows and among the halo's, and whether it lies in the halo before or after them.
    pixel = pixel.to(tl.int32)
    if HALO == 1:
        at = pixel // width
        edge = pixel % width
        own = pixel - width
        length = height
    else:
        at = pixel % width
        edge = pixel // width
        own = edge * (width - 2) + at - 1
        length = width
    return own, edge, at == 0, at == length - 1


@triton.jit
def _load(
    x, before, after, frame, pixel, col, mask, height, width, has_before, has_after,
    C: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    # Pixels of one frame as float32 [pixel, col]; zeros beyond the edge of the picture.
    if HALO == 0:
        at = frame * height * width + pixel
        v = tl.load(x + at[:, None] * C + col[None, :], mask=mask, other=0.0)
    else:
        own, edge, first, last = _place(pixel, height, width, HALO)
        across = width if HALO == 1 else height
        length = height if HALO == 1 else width
        inside = mask & (~first & ~last)[:, None]
        at = frame * (length - 2) * across + own
        v = tl.load(x + at[:, None] * C + col[None, :], mask=inside, other=0.0)
        at = (frame * across + edge)[:, None] * C + col[None, :]
        u = tl.load(before + at, mask=mask & first[:, None] & (has_before != 0), other=0.0)
        v = tl.where(first[:, None], u, v)
        u = tl.load(after + at, mask=mask & last[:, None] & (has_after != 0), other=0.0)
        v = tl.where(last[:, None], u, v)
    return v.to(tl.float32)


_SIZES = ["height", "width", "frames"]


@triton.jit(do_not_specialize=_SIZES)
def _norm_silu_join(
    x, before, after, scale, history, buffer, kept, height, width, frames,
    has_before, has_after, has_history, keep,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    PAST_FRAMES: tl.constexpr, SILU: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    # Grid: (blocks of ROWS pixels, frames + PAST_FRAMES, batch). Everything is [.., pixel, C];
    # `height` and `width` are the result's. Rounding: sums, norm and SiLU in float32; one rounding,
    # at the store.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    frame = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    col = tl.arange(0, BLOCK_C)
    pixels = tl.cast(height, tl.int64) * width
    mask = (row < pixels)[:, None] & (col < C)[None, :]
    inside = row[:, None] * C + col[None, :]
    plane = pixels * C
    if frame < PAST_FRAMES:
        past = history + (batch * PAST_FRAMES + frame) * plane
        y = tl.load(past + inside, mask=mask & (has_history != 0), other=0.0).to(tl.float32)
    else:
        v = _load(
            x, before, after, batch * frames + frame - PAST_FRAMES, row, col, mask, height, width,
            has_before, has_after, C, HALO,
        )  # fmt: skip
        norm = tl.maximum(tl.sqrt(tl.sum(v * v, axis=1)), 1e-12)
        g = tl.load(scale + col, mask=col < C, other=0.0)
        v = v * (1.0 / norm)[:, None] * g[None, :]
        y = v * tl.sigmoid(v) if SILU else v
    y = y.to(buffer.dtype.element_ty)
    out = buffer + (batch * (frames + PAST_FRAMES) + frame) * plane
    tl.store(out + inside, y, mask=mask)
    if (keep != 0) & (frame >= frames):
        out = kept + (batch * PAST_FRAMES + frame - frames) * plane
        tl.store(out + inside, y, mask=mask)


def norm_scale(gamma: torch.Tensor) -> torch.Tensor:
    """The norm's gain [C] as its kernels read it: float32, with the root of the channel count."""
    return gamma.detach().reshape(-1).float() * gamma.numel() ** 0.5


def norm_silu_join(
    x: torch.Tensor,
    scale: torch.Tensor,
    history: torch.Tensor | None,
    past: int,
    keep: bool,
    dtype: torch.dtype | None = None,
    *,
    silu: bool = True,
    halo: HaloRows | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """silu(rms_norm(x)) behind `past` history frames, and the last `past` frames of the result.

    x [B, C, T, H, W], history [B, C, past, H', W'] or None for zeros; all dense channels_last_3d.
    `scale`: from `norm_scale`. `halo`: the neighbours' rows, which make H' (or W') larger than H
    (W) by two; None for the whole picture. Returns the buffer [B, C, past + T, H', W']
    (channels_last_3d) and, if `keep`, the new history in memory of its own. float32 inside, one
    rounding to `dtype` (x's if None). `silu=False`: the norm alone.
    """
    b, c, t, _, _ = x.shape
    x, sources, (h, w) = _sources(x, halo)
    dtype = x.dtype if dtype is None else dtype
    buffer = torch.empty((b, past + t, h, w, c), dtype=dtype, device=x.device)
    keep = keep and past > 0
    kept = torch.empty((b, past, h, w, c), dtype=dtype, device=x.device) if keep else buffer
    if history is not None:
        history = history.contiguous(memory_format=torch.channels_last_3d)
    grid = (triton.cdiv(h * w, _ROWS), past + t, b)
    _norm_silu_join[grid](
        x, *sources, scale, buffer if history is None else history, buffer, kept, h, w, t,
        *_flags(halo), _flag(history is not None), _flag(keep),
        C=c, BLOCK_C=triton.next_power_of_2(c), ROWS=_ROWS, PAST_FRAMES=past, SILU=silu,
        HALO=_cut(halo), num_warps=8 if c > 256 else 4,
    )  # fmt: skip
    return buffer.permute(0, 4, 1, 2, 3), kept.permute(0, 4, 1, 2, 3) if keep else None


def _sources(
    x: torch.Tensor, halo: HaloRows | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], tuple[int, int]]:
    """`x` in NDHWC, the rows before and after it (`x` for none), and the size they make."""
    x = x.contiguous(memory_format=torch.channels_last_3d)
    h, w = x.shape[3:]
    if halo is None:
        return x, (x, x), (h, w)
    rows = tuple(x if part is None else part.contiguous() for part in (halo.before, halo.after))
    return x, rows, (h + 2, w) if halo.axis == "height" else (h, w + 2)


def _cut(halo: HaloRows | None) -> int:
    return 0 if halo is None else 1 if halo.axis == "height" else 2


def _flags(halo: HaloRows | None) -> tuple[float, float]:
    if halo is None:
        return 0.0, 0.0
    return _flag(halo.before is not None), _flag(halo.after is not None)


def _flag(value: bool) -> float:
    """A kernel's argument. Not an integer: Triton compiles anew for an integer that is 1."""
    return float(value)


@triton.jit
def _normed(v, scale, OPERAND: tl.constexpr):
    # One frame's block: float32 inside, rounded as the untransformed buffer would be.
    norm = tl.maximum(tl.sqrt(tl.sum(v * v, axis=1)), 1e-12)
    v = v * (1.0 / norm)[:, None] * scale[None, :]
    return (v * tl.sigmoid(v)).to(OPERAND).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def _norm_silu_pairs(
    x, before, after, scale, history, out, kept, height, width, frames,
    has_before, has_after, has_history, keep,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    # Grid: (blocks of ROWS pixels, batch). A program goes through all frames of its pixels, so
    # each is read and normalised once. `height` and `width` are the result's.
    operand: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    col = tl.arange(0, BLOCK_C)
    pixels = tl.cast(height, tl.int64) * width
    mask = (row < pixels)[:, None] & (col < C)[None, :]
    inside = row[:, None] * C + col[None, :]
    plane = pixels * C
    gain = tl.load(scale + col, mask=col < C, other=0.0)
    past = history + batch * 2 * plane + inside
    old = mask & (has_history != 0)
    h0 = tl.load(past, mask=old, other=0.0).to(tl.float32)
    h1 = tl.load(past + plane, mask=old, other=0.0).to(tl.float32)
    # An odd number of frames: the first pair is the last frame of the past and the first new one.
    lead = frames % 2
    d0 = tl.where(lead == 1, 0.0, h0)
    d1 = tl.where(lead == 1, h0, h1)
    pairs = (frames + 1) // 2
    for pair in range(pairs):
        frame = 2 * pair - lead
        at = batch * frames + frame
        v = _load(x, before, after, at, row, col, mask & (frame >= 0), height, width,
                  has_before, has_after, C, HALO)  # fmt: skip
        d2 = tl.where(frame >= 0, _normed(v, gain, operand), h1)
        v = _load(x, before, after, at + 1, row, col, mask, height, width,
                  has_before, has_after, C, HALO)  # fmt: skip
        d3 = _normed(v, gain, operand)
        to = out + (batch * pairs + pair) * 4 * plane + inside
        tl.store(to, (d0 - d2).to(operand), mask=mask)
        tl.store(to + plane, (d1 + d2).to(operand), mask=mask)
        tl.store(to + 2 * plane, (d2 - d1).to(operand), mask=mask)
        tl.store(to + 3 * plane, (d1 - d3).to(operand), mask=mask)
        d0 = d2
        d1 = d3
    if keep != 0:
        last = kept + batch * 2 * plane + inside
        tl.store(last, d0.to(operand), mask=mask)
        tl.store(last + plane, d1.to(operand), mask=mask)


def pair_rows(channels: int) -> int:
    """Pixels of one program of `_norm_silu_pairs`: four frames of them are held in registers."""
    return 16 if channels <= 128 else 8 if channels <= 256 else 4


def norm_silu_pairs(
    x: torch.Tensor,
    scale: torch.Tensor,
    history: torch.Tensor | None,
    keep: bool,
    dtype: torch.dtype,
    *,
    halo: HaloRows | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `norm_silu_join` with two past frames, but transformed for Winograd F(2,3) along time.

    x [B, C, T, H, W]. Returns [B, C, 4 * ceil(T / 2), H', W']: for each two frames d2, d3 behind
    d0, d1 the four frames d0 - d2, d1 + d2, d2 - d1, d1 - d3; and, if `keep`, the new history
    [B, C, 2, H', W'], untransformed and rounded as it was used. Pairs end with the last frame: if T
    is odd (a chunk with the video's first frame, which stands alone), the first pair's d2 is of
    the past. So which frames are a pair does not depend on the chunk schedule.
    """
    b, c, t, _, _ = x.shape
    x, sources, (h, w) = _sources(x, halo)
    out = torch.empty((b, (t + 1) // 2 * 4, h, w, c), dtype=dtype, device=x.device)
    kept = torch.empty((b, PAST, h, w, c), dtype=dtype, device=x.device) if keep else out
    if history is not None:
        history = history.contiguous(memory_format=torch.channels_last_3d)
    rows = pair_rows(c)
    _norm_silu_pairs[(triton.cdiv(h * w, rows), b)](
        x, *sources, scale, out if history is None else history, out, kept, h, w, t,
        *_flags(halo), _flag(history is not None), _flag(keep),
        C=c, BLOCK_C=triton.next_power_of_2(c), ROWS=rows, HALO=_cut(halo), num_warps=4,
    )  # fmt: skip
    return out.permute(0, 4, 1, 2, 3), kept.permute(0, 4, 1, 2, 3) if keep else None
