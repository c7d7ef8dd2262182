"""Weights as kernels of any family read them: plain PyTorch, no kernels."""

from __future__ import annotations

import torch

from ..ops.problem import LayerWeights

# A tensor descriptor's rows are multiples of 16 bytes, a product's blocks at least 16 channels.
CHANNELS = 16


def filled_channels(channels: int) -> int:
    """The next multiple of 16."""
    return channels + -channels % CHANNELS


def fit_channels(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`x` [N, C, ...] with zero channels up to a multiple of 16, channels lying together.

    For weights and features alike: products with zeros are added to nothing, which is exact. A
    copy in `dtype` (that of `x` if None) only if channels are missing.
    """
    n, c, *size = x.shape
    if c % CHANNELS == 0:
        return x if dtype is None else x.to(dtype)
    whole = x.new_zeros((n, *size, filled_channels(c)), dtype=dtype)
    whole[..., :c] = x.movedim(1, -1)
    return whole.movedim(-1, 1)


def norm_scale(gamma: torch.Tensor) -> torch.Tensor:
    """The norm's gain [C] as its kernels read it: float32, with the root of the channel count."""
    root: float = gamma.numel() ** 0.5
    return gamma.detach().reshape(-1).float() * root


def behind_norm(weights: LayerWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm's scale and the bias as the kernels read them."""
    if weights.gamma is None or weights.bias is None:
        raise ValueError("a layer behind a norm needs the gain of the norm, and a bias")
    return norm_scale(weights.gamma), weights.bias.detach().float()


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


def in_tiles(x: torch.Tensor, dim: int) -> torch.Tensor:
    """[..., n * 8, ...] -> [..., n, 8, ...]: a warp's channels as the columns of its n tiles; a
    copy. dim: where they are, not from the end.

    A lane holds columns 2 * q and 2 * q + 1 of each tile. In this order they are eight channels in
    a row of each four tiles, so that it stores 16 bytes at a time; four of two tiles that are left
    over, and two of a last one. By copies, and not by an index: a process loads each of PyTorch's
    CUDA kernels when it is first used (that one: 16 ms, H200).
    """
    n = x.shape[dim] // 8
    tiled = x.new_empty((*x.shape[:dim], n, 8, *x.shape[dim + 1 :]))
    first = 0
    for together in (4, 2, 1):
        groups = (n - first) // together
        if not groups:
            continue
        # [..., group, q, tile, column of the two, ...]
        read = x.narrow(dim, first * 8, groups * together * 8)
        read = read.unflatten(dim, (groups, 4, together, 2))
        written = tiled.narrow(dim, first, groups * together)
        written = written.unflatten(dim + 1, (4, 2)).unflatten(dim, (groups, together))
        written.copy_(read.transpose(dim + 1, dim + 2))
        first += groups * together
    return tiled
