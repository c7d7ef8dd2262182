"""Gathers the pixels of all ranks. Every message goes through `transport`."""

from __future__ import annotations

import torch

from ..errors import ShardingError
from ..options import GATHERS, Gather
from ..said import expected_one_of
from .halo import Shard
from .transport import Incoming, Outgoing


def check_gather(gather: str) -> None:
    """Raise ShardingError for an unknown mode."""
    if gather not in GATHERS:
        raise ShardingError(expected_one_of("gather", gather, GATHERS))


def gather_picture(
    shard: Shard, part: torch.Tensor, gather: Gather, factor: int, site: str
) -> torch.Tensor | None:
    """Join the `part` [B, C, T, rows, W'] (or columns) of every rank into one picture.

    all: every rank gets the whole picture, also idle ranks. rank0: rank 0 gets it, the others get
    None. own: each rank keeps its part. `factor`: rows of `part` for each latent row. "all" is a
    collective of the group; "rank0" takes one message from each rank that has rows.
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
        # A gather needs the same shape on every rank, so parts are padded to the tallest (rank 0).
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
