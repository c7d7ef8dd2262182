"""Triton: RMS norm + SiLU that writes straight into the convolution's input buffer.

Eager twin: `norm.rms_norm_silu` followed by `layout.join_frames`. One launch copies the history
frames, normalises the new ones behind them and keeps the last two frames for the next chunk, so
there is no pad, no cat and no clone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PAST = 2  # history frames of a convolution of three
_ROWS = 32


@triton.jit
def _norm_silu_join(
    x, gamma, history, buffer, kept, pixels, frames,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    HAS_HISTORY: tl.constexpr, KEEP: tl.constexpr, PAST_FRAMES: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    # Grid: (blocks of ROWS pixels, frames + PAST_FRAMES, batch). Everything is [.., pixel, C].
    # Rounding: sums, norm and SiLU in float32; one rounding, at the store.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    frame = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    col = tl.arange(0, BLOCK_C)
    mask = (row < pixels)[:, None] & (col < C)[None, :]
    inside = row[:, None] * C + col[None, :]
    plane = tl.cast(pixels, tl.int64) * C
    if frame < PAST_FRAMES:
        y = tl.zeros((ROWS, BLOCK_C), tl.float32)
        if HAS_HISTORY:
            at = history + (batch * PAST_FRAMES + frame) * plane
            y = tl.load(at + inside, mask=mask, other=0.0).to(tl.float32)
    else:
        at = x + (batch * frames + frame - PAST_FRAMES) * plane
        v = tl.load(at + inside, mask=mask, other=0.0).to(tl.float32)
        norm = tl.maximum(tl.sqrt(tl.sum(v * v, axis=1)), 1e-12)
        g = tl.load(gamma + col, mask=col < C, other=0.0).to(tl.float32)
        v = v * (1.0 / norm)[:, None] * g[None, :]
        y = v * tl.sigmoid(v) if SILU else v
    y = y.to(buffer.dtype.element_ty)
    out = buffer + (batch * (frames + PAST_FRAMES) + frame) * plane
    tl.store(out + inside, y, mask=mask)
    if KEEP:  # noqa: SIM102 (compile-time, the inner one is not)
        if frame >= frames:
            out = kept + (batch * PAST_FRAMES + frame - frames) * plane
            tl.store(out + inside, y, mask=mask)


def norm_silu_join(
    x: torch.Tensor,
    gamma: torch.Tensor,
    history: torch.Tensor | None,
    past: int,
    keep: bool,
    dtype: torch.dtype | None = None,
    *,
    silu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """silu(rms_norm(x)) behind `past` history frames, and the last `past` frames of the result.

    x [B, C, T, H, W], history [B, C, past, H, W] or None for zeros; all dense channels_last_3d.
    Returns the buffer [B, C, past + T, H, W] (channels_last_3d) and, if `keep`, the new history in
    memory of its own. float32 inside, one rounding to `dtype` (x's if None). `silu=False`: the
    norm alone.
    """
    b, c, t, h, w = x.shape
    x = x.contiguous(memory_format=torch.channels_last_3d)
    dtype = x.dtype if dtype is None else dtype
    buffer = torch.empty((b, past + t, h, w, c), dtype=dtype, device=x.device)
    keep = keep and past > 0
    kept = torch.empty((b, past, h, w, c), dtype=dtype, device=x.device) if keep else buffer
    if history is not None:
        history = history.contiguous(memory_format=torch.channels_last_3d)
    scale = gamma.reshape(-1).float() * c**0.5
    grid = (triton.cdiv(h * w, _ROWS), past + t, b)
    _norm_silu_join[grid](
        x, scale, buffer if history is None else history, buffer, kept, h * w, t,
        C=c, BLOCK_C=triton.next_power_of_2(c), ROWS=_ROWS,
        HAS_HISTORY=history is not None, KEEP=keep, PAST_FRAMES=past, SILU=silu,
        num_warps=8 if c > 256 else 4,
    )  # fmt: skip
    return buffer.permute(0, 4, 1, 2, 3), kept.permute(0, 4, 1, 2, 3) if keep else None
