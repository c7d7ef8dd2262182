"""Shard: the part of a run on one rank. It exchanges boundary rows with the neighbours.

Before each convolution, the row that it needs on each side comes from the rank that has it. So
nothing is computed twice, and the history frames of a causal convolution include their halo rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import layout
from ..errors import ShardingError
from ..ops.opset import HaloRows
from ..said import said
from .context import ShardContext
from .plan import ShardPlan
from .transport import Incoming, Outgoing, Wire


class Shard:
    """Gives blocks the rows of the neighbours and, for attention, the rows of all ranks."""

    def __init__(self, context: ShardContext, plan: ShardPlan, wire: Wire):
        self.context, self.plan, self.wire = context, plan, wire
        self.halo_rows = 0
        self.halo_bytes = 0

    @property
    def has_rows(self) -> bool:
        """False on an idle rank, which runs no layer and sends no rows."""
        return self.context.rank < self.plan.active

    def surround(self, x: torch.Tensor, site: str, before: int = 1, after: int = 1) -> torch.Tensor:
        """Add the neighbours' rows to `x` [..., H, W]: `before` rows above and `after` rows below.

        At the edges of the picture the rows are zero. They replace the padding of the convolution,
        which must not pad this axis again. The result is dense in the memory format of `x`. Every
        rank with rows must call it at the same `site`.
        """
        dim, rank = self.plan.dim, self.context.rank
        above = rank - 1 if before and rank > 0 else None
        below = rank + 1 if after and rank < self.plan.active - 1 else None
        rows = x.shape[dim]
        out, into = [], []
        # The rank above needs our first rows `after` its own; the rank below our last ones.
        if after and rank > 0:
            out.append(Outgoing(rank - 1, x.narrow(dim, 0, after)))
        if before and rank < self.plan.active - 1:
            out.append(Outgoing(rank + 1, x.narrow(dim, rows - before, before)))
        if above is not None:
            into.append(Incoming(above, _with_rows(x, dim, before)))
        if below is not None:
            into.append(Incoming(below, _with_rows(x, dim, after)))
        received = self.wire.exchange(site, x.dtype, out, into)
        self._count(received, dim)
        whole = layout.empty_like_format(x, _with_rows(x, dim, before + rows + after))
        whole.narrow(dim, before, rows).copy_(x)
        if before:
            edge = whole.narrow(dim, 0, before)
            edge.zero_() if above is None else edge.copy_(received[0])
        if after:
            edge = whole.narrow(dim, before + rows, after)
            edge.zero_() if below is None else edge.copy_(received[-1])
        return whole

    def halo_rows_of(self, x: torch.Tensor, site: str) -> HaloRows:
        """Get the neighbours' rows next to `x` [B, C, T, H, W]; the kernel joins them itself.

        Those of several frames travel while the kernel reads `x`, which must stay until they have
        arrived.
        The rows are in NDHWC, which kernels read: a contiguous [B, T, 1, W, C] or [B, T, H, 1, C].
        Every rank with rows must call it at the same `site`.
        """
        frames = x.permute(0, 2, 3, 4, 1)
        dim, rank, rows = self.plan.dim - 1, self.context.rank, x.shape[self.plan.dim]
        peers = [rank - 1] * (rank > 0) + [rank + 1] * (rank < self.plan.active - 1)
        shape = _with_rows(frames, dim, 1)
        out = [Outgoing(p, frames.narrow(dim, 0 if p < rank else rows - 1, 1)) for p in peers]
        into = [Incoming(p, shape) for p in peers]
        arrive: Callable[[], None] | None = None
        if x.shape[2] > 1:
            received, arrive = self.wire.begin_exchange(site, x.dtype, out, into)
        else:
            # The device waits for the launches of one image, which another stream makes more.
            received = self.wire.exchange(site, x.dtype, out, into)
        self._count(received, dim)
        parts = dict(zip(peers, received, strict=True))
        return HaloRows(self.plan.axis, parts.get(rank - 1), parts.get(rank + 1), arrive)

    def _count(self, received: list[torch.Tensor], dim: int) -> None:
        """Count rows along `dim` for the report."""
        for part in received:
            self.halo_rows += part.shape[dim]
            self.halo_bytes += part.numel() * part.element_size()

    def padding(self, padding: tuple[int, int]) -> tuple[int, int]:
        """`padding` (rows, columns) with 0 for the axis that `surround` has padded."""
        return (0, padding[1]) if self.plan.dim == -2 else (padding[0], 0)

    def own_rows(self, x: torch.Tensor) -> torch.Tensor:
        """View of this rank's part of `x` [..., H, W], a whole picture at latent resolution."""
        rows, columns = self.plan.place(self.context.rank)
        return x[..., rows, columns]

    def gather_rows(self, x: torch.Tensor, site: str) -> torch.Tensor:
        """Join the part `x` [..., H, W] of every rank into the whole picture, at latent resolution.

        For attention. Sends one message to each other rank with rows; all of them must call it.
        """
        dim, rank = self.plan.dim, self.context.rank
        others = [r for r in range(self.plan.active) if r != rank]
        start, stop = self.plan.rows_of(rank)
        if x.shape[dim] != stop - start:
            raise ShardingError(
                said(
                    "shard.rows",
                    "rank {rank} holds {rows} rows at {site}, its plan says {planned}",
                    rank=rank,
                    rows=x.shape[dim],
                    site=site,
                    planned=stop - start,
                ),
                rank=rank,
            )
        into = [
            Incoming(r, _with_rows(x, dim, self.plan.bounds[r][1] - self.plan.bounds[r][0]))
            for r in others
        ]
        received = self.wire.exchange(site, x.dtype, [Outgoing(r, x) for r in others], into)
        parts = dict(zip(others, received, strict=True))
        parts[rank] = x
        return torch.cat([parts[r] for r in range(self.plan.active)], dim=dim)


def _with_rows(x: torch.Tensor, dim: int, rows: int) -> tuple[int, ...]:
    shape = list(x.shape)
    shape[dim] = rows
    return tuple(shape)
