"""Triton: attention of one wide head (384, 1024 channels), which library kernels stop short of.

Eager twin: `eager.attention.attention`. Keys and values pass once in blocks, in a fixed order, with
a running maximum and sum; scores, softmax and result are float32, probabilities float16. A query's
bits depend on its own row and all keys, never on which other queries its program holds: shards
that decode some rows get the bits of one device. Source: Milakov and Gimelshein, Online normalizer
calculation for softmax (2018); Dao et al., FlashAttention (2022).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import AttentionConfig
from .launch import launch_kernel

_LOG2_E = 1.4426950408889634


@triton.jit
def _rows_from(x, frame, row, rows, d, frame_step, row_step, ROWS: tl.constexpr, DC: tl.constexpr):
    # [ROWS, DC] of x [frames, rows, channels]: by its tensor descriptor, or (`frame_step` numbers a
    # frame) through pointers. Rows past the last one are zero.
    if frame_step is None:
        tile = x.load([frame, row, d]).reshape(ROWS, DC)
    else:  # not a second `return`: Triton compiles what is behind the first one too
        at = tl.arange(0, ROWS)
        first = x + frame.to(tl.int64) * frame_step + tl.cast(row, tl.int64) * row_step + d
        # Within a tile 32 bits are enough, and take half the registers.
        within = at[:, None] * row_step + tl.arange(0, DC)[None, :]
        tile = tl.load(first + within, mask=(row + at < rows)[:, None], other=0.0)
    return tile


@triton.jit(do_not_specialize=["queries", "keys", "channels"])
def _attention(
    q,
    k,
    v,
    out,
    queries,
    keys,
    q_frame,
    q_row,
    k_frame,
    k_row,
    v_frame,
    v_row,
    channels,
    scale,
    D: tl.constexpr,
    DC: tl.constexpr,
    NC: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
):
    # Grid: (blocks of M queries, frames, D / (DC * NC)). `scale` has log2(e) in it. q_frame to
    # v_row: numbers from one frame or row to the next; None with tensor descriptors. `channels` is
    # D, but not a constant: compilers unroll a short loop and load all of it ahead (gfx1100).
    q0 = tl.program_id(0) * M
    n = tl.program_id(1)
    d0 = tl.program_id(2) * (DC * NC)
    peak = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    o0 = tl.zeros((M, DC), tl.float32)
    o1 = tl.zeros((M, DC), tl.float32)
    o2 = tl.zeros((M, DC), tl.float32)
    depth = D if q_frame is None else channels
    for k0 in range(0, keys, BN):
        s = tl.zeros((M, BN), tl.float32)
        for d in range(0, depth, DC):
            a = _rows_from(q, n, q0, queries, d, q_frame, q_row, M, DC)
            b = _rows_from(k, n, k0, keys, d, k_frame, k_row, BN, DC)
            s = tl.dot(a, b.T, s)
        s = s * scale
        s = tl.where((k0 + tl.arange(0, BN) < keys)[None, :], s, -float("inf"))
        high = tl.maximum(peak, tl.max(s, axis=1))
        p = tl.exp2(s - high[:, None])
        shrink = tl.exp2(peak - high)
        total = total * shrink + tl.sum(p, axis=1)
        peak = high
        p = p.to(tl.float16)
        c = _rows_from(v, n, k0, keys, d0, v_frame, v_row, BN, DC)
        o0 = tl.dot(p, c, o0 * shrink[:, None])
        if NC > 1:
            c = _rows_from(v, n, k0, keys, d0 + DC, v_frame, v_row, BN, DC)
            o1 = tl.dot(p, c, o1 * shrink[:, None])
        if NC > 2:
            c = _rows_from(v, n, k0, keys, d0 + 2 * DC, v_frame, v_row, BN, DC)
            o2 = tl.dot(p, c, o2 * shrink[:, None])
    row = q0 + tl.arange(0, M)
    at = (tl.cast(n, tl.int64) * queries + row)[:, None] * D + d0 + tl.arange(0, DC)[None, :]
    mask = (row < queries)[:, None]
    share = (1.0 / total)[:, None]
    tl.store(out + at, (o0 * share).to(out.dtype.element_ty), mask=mask)
    if NC > 1:
        tl.store(out + at + DC, (o1 * share).to(out.dtype.element_ty), mask=mask)
    if NC > 2:
        tl.store(out + at + 2 * DC, (o2 * share).to(out.dtype.element_ty), mask=mask)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: AttentionConfig,
    with_descriptors: bool = True,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(C)) v, one head: q [N, P, C], k and v [N, K, C], float16 -> [N, P, C].

    Channels must lie together (views of one qkv tensor do). C must be a multiple of the
    config's DC * NC. with_descriptors: tiles are loaded by tensor descriptors (TMA), not through
    pointers.
    """
    n, p, c = q.shape
    keys = k.shape[1]
    out = torch.empty((n, p, c), dtype=q.dtype, device=q.device)
    blocks = ((_rows(q), config.M), (_rows(k), config.BN), (_rows(v), config.BN))
    sources: list[torch.Tensor | TensorDescriptor]
    steps: list[int | None]
    if with_descriptors:
        sources = [TensorDescriptor.from_tensor(x, [1, rows, config.DC]) for x, rows in blocks]
        steps = [None] * 6
    else:
        sources = [x for x, _ in blocks]
        steps = [step for x, _ in blocks for step in x.stride()[:2]]
    launch_kernel(
        _attention,
        (triton.cdiv(p, config.M), n, c // (config.DC * config.NC)),
        *sources,
        out,
        p,
        keys,
        *steps,
        c,
        _LOG2_E / c**0.5,
        D=c,
        DC=config.DC,
        NC=config.NC,
        M=config.M,
        BN=config.BN,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with its last dimension dense and 16-byte aligned rows, as a tensor descriptor needs."""
    aligned = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    dense = x.stride(-1) == 1 and aligned and x.data_ptr() % 16 == 0
    return x if dense else x.contiguous()
