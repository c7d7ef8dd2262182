"""Pixels of all ranks to where they are wanted. Contiguous by construction: see `wire`."""

from __future__ import annotations

import torch

from ..errors import ShardingError
from ..options import GATHERS, Gather
from .halo import Shard
from .transport import Incoming, Outgoing


def check_gather(gather: str) -> None:
    """Raise ShardingError for an unknown mode."""
    if gather not in GATHERS:
        raise ShardingError(f"gather is {gather!r}: expected 'all', 'rank0' or 'own'")


def gather_picture(
    shard: Shard, part: torch.Tensor, gather: Gather, factor: int, site: str
) -> torch.Tensor | None:
    """Every rank's `part` [B, C, T, rows, W'] (or columns) of a picture as one tensor.

    all: every rank gets the whole, idle ranks too. rank0: rank 0 gets it, the others None. own:
    each rank keeps its part. `factor` is the size of `part` over the latent's. all is a collective
    of the group; rank0 takes one message from each rank with rows.
    """
    plan, rank = shard.plan, shard.context.rank
    if gather == "own" or (plan.active == 1 and gather == "rank0"):
        return part if gather == "own" or rank == 0 else None
    whole_shape = list(part.shape)
    whole_shape[plan.dim] = plan.rows * factor
    if gather == "rank0":
        if rank != 0:
            if shard.has_rows:
                shard.wire.exchange(site, part.dtype, [Outgoing(0, part)], [])
            return None
        into = [
            Incoming(r, plan.pixel_shape_of(r, tuple(whole_shape), factor))
            for r in range(1, plan.active)
        ]
        parts = [part, *shard.wire.exchange(site, part.dtype, [], into)]
    else:
        # A gather wants the same shape of every rank: parts are padded to the tallest, the first.
        tallest = plan.pixel_shape_of(0, tuple(whole_shape), factor)
        padded = part
        if tuple(part.shape) != tallest:
            padded = part.new_zeros(tallest)
            padded.narrow(plan.dim, 0, part.shape[plan.dim]).copy_(part)
        gathered = shard.wire.all_gather(padded)[: plan.active]
        parts = [
            g.narrow(plan.dim, 0, (stop - start) * factor)
            for g, (start, stop) in zip(gathered, plan.bounds, strict=True)
        ]
    return torch.cat(parts, dim=plan.dim)
