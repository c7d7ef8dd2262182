"""Single-head attention over the pixels of a frame: eager reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(C)) v, one head. `q` is [N, P, C]; `k` and `v` are [N, K, C].

    N frames, P query positions, K key positions: with shards a rank has its own P and all K.
    """
    return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
