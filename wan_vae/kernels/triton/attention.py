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

_LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["queries", "keys"])
def _attention(
    q,
    k,
    v,
    out,
    queries,
    keys,
    scale,
    D: tl.constexpr,
    DC: tl.constexpr,
    NC: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
):
    # Grid: (blocks of M queries, frames, D / (DC * NC)). `scale` has log2(e) in it.
    q0 = tl.program_id(0) * M
    n = tl.program_id(1)
    d0 = tl.program_id(2) * (DC * NC)
    peak = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    o0 = tl.zeros((M, DC), tl.float32)
    o1 = tl.zeros((M, DC), tl.float32)
    o2 = tl.zeros((M, DC), tl.float32)
    for k0 in range(0, keys, BN):
        s = tl.zeros((M, BN), tl.float32)
        for d in range(0, D, DC):
            a = q.load([n, q0, d]).reshape(M, DC)
            b = k.load([n, k0, d]).reshape(BN, DC)
            s = tl.dot(a, b.T, s)
        s = s * scale
        s = tl.where((k0 + tl.arange(0, BN) < keys)[None, :], s, -float("inf"))
        high = tl.maximum(peak, tl.max(s, axis=1))
        p = tl.exp2(s - high[:, None])
        shrink = tl.exp2(peak - high)
        total = total * shrink + tl.sum(p, axis=1)
        peak = high
        p = p.to(tl.float16)
        o0 = tl.dot(p, v.load([n, k0, d0]).reshape(BN, DC), o0 * shrink[:, None])
        if NC > 1:
            o1 = tl.dot(p, v.load([n, k0, d0 + DC]).reshape(BN, DC), o1 * shrink[:, None])
        if NC > 2:
            o2 = tl.dot(p, v.load([n, k0, d0 + 2 * DC]).reshape(BN, DC), o2 * shrink[:, None])
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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: AttentionConfig
) -> torch.Tensor:
    """softmax(q k^T / sqrt(C)) v, one head: q [N, P, C], k and v [N, K, C], float16 -> [N, P, C].

    Channels must lie together (views of one qkv tensor do). C must be a multiple of the
    config's DC * NC.
    """
    n, p, c = q.shape
    keys = k.shape[1]
    out = torch.empty((n, p, c), dtype=q.dtype, device=q.device)
    descriptors = [
        TensorDescriptor.from_tensor(_rows(x), [1, block, config.DC])
        for x, block in ((q, config.M), (k, config.BN), (v, config.BN))
    ]
    _attention[(triton.cdiv(p, config.M), n, c // (config.DC * config.NC))](
        *descriptors,
        out,
        p,
        keys,
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
