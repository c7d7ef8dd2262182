"""Decides which rank decodes which rows. Every rank computes the same answer without a message.

Rows are latent rows, or columns if the width is divided. Pixel rows follow by the spatial factor.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import GeometryError
from ..options import AXES, Axis, AxisRequest
from ..said import expected_one_of, said


@dataclass(frozen=True)
class ShardPlan:
    """Latent rows [start, stop) of each rank that has work, in rank order.

    Ranks from `len(bounds)` to `world_size - 1` are idle, because there are more ranks than rows.
    """

    axis: Axis
    bounds: tuple[tuple[int, int], ...]
    world_size: int

    @property
    def dim(self) -> int:
        """The divided dimension of [..., H, W], counted from the end: -2 or -1."""
        return -2 if self.axis == "height" else -1

    @property
    def active(self) -> int:
        """Number of ranks that have rows."""
        return len(self.bounds)

    @property
    def idle(self) -> tuple[int, ...]:
        """Ranks without rows."""
        return tuple(range(self.active, self.world_size))

    @property
    def rows(self) -> int:
        """Latent rows of the whole picture along the divided axis."""
        return self.bounds[-1][1]

    def rows_of(self, rank: int) -> tuple[int, int]:
        """Latent rows [start, stop) of `rank`; empty for an idle one."""
        return self.bounds[rank] if rank < self.active else (self.rows, self.rows)

    def pixel_shape_of(self, rank: int, shape: tuple[int, ...], factor: int) -> tuple[int, ...]:
        """The part of `shape` [..., H, W] that `rank` holds; `factor`: pixels for a latent row."""
        start, stop = self.rows_of(rank)
        own = list(shape)
        own[self.dim] = (stop - start) * factor
        return tuple(own)

    def place(self, rank: int, factor: int = 1) -> tuple[slice, slice]:
        """Index for the last two dimensions that selects the part of `rank`."""
        start, stop = self.rows_of(rank)
        own = slice(start * factor, stop * factor)
        return (own, slice(None)) if self.axis == "height" else (slice(None), own)


def plan_shards(height: int, width: int, ranks: int, axis: AxisRequest = "auto") -> ShardPlan:
    """Divide a latent of `height` x `width` among `ranks`, evenly, larger parts first.

    "auto" takes the axis that gives work to more ranks, then the one with shorter boundaries (an
    exchanged row is as long as the other axis), then height. Raises GeometryError.
    """
    if ranks < 1 or height < 1 or width < 1:
        raise GeometryError(
            said(
                "shard.sizes",
                "cannot cut a latent of {height}x{width} over {ranks} ranks: each must be"
                " at least 1",
                height=height,
                width=width,
                ranks=ranks,
            )
        )
    if axis not in AXES:
        raise GeometryError(expected_one_of("axis", axis, AXES))
    # Boundary rows have `width` pixels, boundary columns `height`.
    cost: dict[Axis, tuple[int, int]] = {
        "height": (-min(ranks, height), width),
        "width": (-min(ranks, width), height),
    }
    chosen = min(cost, key=cost.__getitem__) if axis == "auto" else axis
    rows = height if chosen == "height" else width
    base, extra = divmod(rows, min(ranks, rows))
    bounds, start = [], 0
    for i in range(min(ranks, rows)):
        stop = start + base + (i < extra)
        bounds.append((start, stop))
        start = stop
    return ShardPlan(chosen, tuple(bounds), ranks)
