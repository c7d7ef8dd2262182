"""Single-head attention over the pixels of a frame: eager reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .forms import EagerForms

# Bytes of the scores of a slice in float32, and queries of a slice at most: a product with 1024
# rows keeps any device busy.
_SCORE_BYTES = 256 << 20
_MOST_QUERIES = 1024
_LIBRARY = EagerForms()


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, forms: EagerForms = _LIBRARY
) -> torch.Tensor:
    """softmax(q k^T / sqrt(C)) v, one head. `q` is [N, P, C]; `k` and `v` are [N, K, C].

    N frames, P query positions, K key positions: with shards a rank has its own P and all K.
    `forms`: whether queries are taken in slices.
    """
    if not forms.sliced_attention:
        return _attend(q, k, v)
    # Every call has one frame and the same number of queries, which depends on the size of the
    # picture alone. So the library chooses the same kernels for every chunk and every shard.
    (frames, queries, _), n = q.shape, slice_queries(k.shape[1])
    if queries < n:
        return attention(F.pad(q, (0, 0, 0, n - queries)), k, v, forms=forms)[:, :queries]
    y = torch.empty_like(q)
    for frame in range(frames):
        keys, values = k[frame : frame + 1], v[frame : frame + 1]
        for first in range(0, queries, n):
            first = min(first, queries - n)  # the last slice does some queries again
            y[frame, first : first + n] = _attend(
                q[frame : frame + 1, first : first + n], keys, values
            )[0]
    return y


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)


def slice_queries(keys: int) -> int:
    """Queries of a slice where there are `keys` keys."""
    return max(1, min(keys, _MOST_QUERIES, _SCORE_BYTES // (4 * keys)))


def slice_bytes(keys: int, channels: int, itemsize: int) -> int:
    """Bytes that one slice takes beside queries, keys, values and the whole result.

    PyTorch's plain attention computes in float32: scores and their softmax, and of half-precision
    numbers a copy of queries, keys and values and the slice's result twice.
    """
    n = slice_queries(keys)
    scores = 2 * 4 * n * keys
    if itemsize == 4:
        return scores + 4 * 2 * n * channels  # scaled queries, and the result
    return scores + 4 * channels * (2 * n + 3 * keys) + itemsize * n * channels
