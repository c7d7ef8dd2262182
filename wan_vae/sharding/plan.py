"""Which rank decodes which rows. Pure arithmetic: the same answer on every rank, no message needed.

Rows are latent rows (columns, where the width is cut); pixel rows follow by the spatial factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..chunking import Chunk
from ..config import WanVAEConfig
from ..errors import GeometryError
from ..options import Axis, AxisRequest


@dataclass(frozen=True)
class ShardPlan:
    """Latent rows [start, stop) of each rank that has work, in rank order.

    Ranks from `len(bounds)` up to `world_size` are idle: there were more ranks than rows.
    """

    axis: Axis
    bounds: tuple[tuple[int, int], ...]
    world_size: int

    @property
    def dim(self) -> int:
        """The cut dimension of [..., H, W], counted from the end: -2 or -1."""
        return -2 if self.axis == "height" else -1

    @property
    def active(self) -> int:
        """Ranks that have rows."""
        return len(self.bounds)

    @property
    def idle(self) -> tuple[int, ...]:
        """Ranks without rows."""
        return tuple(range(self.active, self.world_size))

    @property
    def rows(self) -> int:
        """Latent rows of the whole picture along the cut axis."""
        return self.bounds[-1][1]

    def rows_of(self, rank: int) -> tuple[int, int]:
        """Latent rows [start, stop) of `rank`; empty for an idle one."""
        return self.bounds[rank] if rank < self.active else (self.rows, self.rows)

    def pixel_shape_of(self, rank: int, shape: tuple[int, ...], factor: int) -> tuple[int, ...]:
        """`shape` [..., H, W] of the whole picture -> what `rank` holds, at `factor` x latent."""
        start, stop = self.rows_of(rank)
        own = list(shape)
        own[self.dim] = (stop - start) * factor
        return tuple(own)

    def place(self, rank: int, factor: int = 1) -> tuple[slice, slice]:
        """Index of the last two dimensions that selects the part of `rank`."""
        start, stop = self.rows_of(rank)
        own = slice(start * factor, stop * factor)
        return (own, slice(None)) if self.axis == "height" else (slice(None), own)


def plan_shards(height: int, width: int, ranks: int, axis: AxisRequest = "auto") -> ShardPlan:
    """Cut a latent picture of `height` x `width` over `ranks`, as even as possible, taller first.

    "auto" takes the axis that gives more ranks work, then the one whose cuts are shorter (every
    row exchanged is as long as the other axis), then height. Raises GeometryError.
    """
    if ranks < 1 or height < 1 or width < 1:
        raise GeometryError(
            f"cannot cut a latent of {height}x{width} over {ranks} ranks: each must be at least 1"
        )
    if axis not in ("auto", "height", "width"):
        raise GeometryError(f"axis is {axis!r}: expected 'auto', 'height' or 'width'")
    if axis == "auto":
        # Height is cut across rows of `width` pixels, width across columns of `height`.
        cost = {
            "height": (-min(ranks, height), width),
            "width": (-min(ranks, width), height),
        }
        axis = min(cost, key=cost.__getitem__)
    rows = height if axis == "height" else width
    base, extra = divmod(rows, min(ranks, rows))
    bounds, start = [], 0
    for i in range(min(ranks, rows)):
        stop = start + base + (i < extra)
        bounds.append((start, stop))
        start = stop
    return ShardPlan(axis, tuple(bounds), ranks)


@dataclass(frozen=True)
class Exchange:
    """One exchange of boundary rows before a convolution, as its native name.

    `channels` and `scale` (rows and columns for each latent row) are those of its input;
    `frames(chunk)` says how many frames of it a chunk has. A rank needs `before` rows of the rank
    above and `after` rows of the rank below.
    """

    name: str
    channels: int
    scale: int
    time_scale: int
    before: int
    after: int

    def frames(self, chunk: Chunk) -> int:
        """Frames of this layer's input for `chunk`; the video's first frame is never doubled."""
        n = chunk.frames * self.time_scale
        return n - (self.time_scale - 1) if chunk.is_first else n


def decoder_exchanges(config: WanVAEConfig) -> Iterator[Exchange]:
    """Every exchange of one chunk's pass through the decoder, in order."""
    base, mult = config.decoder_dim, config.dim_mult
    widths = [base * m for m in (mult[-1], *reversed(mult))]
    temporal_up = (*reversed(config.temporal_downsample), False)
    yield Exchange("decoder.conv1", config.z_dim, 1, 1, 1, 1)
    for block in (0, 2):
        for conv in (2, 6):
            yield Exchange(f"decoder.middle.{block}.residual.{conv}", widths[0], 1, 1, 1, 1)
    scale, time, layer = 1, 1, 0
    for i, out in enumerate(widths[1:]):
        width = widths[i] if config.residual_shortcuts or i == 0 else widths[i] // 2
        up = i < len(mult) - 1
        prefix = f"decoder.upsamples.{i}.upsamples" if config.residual_shortcuts else None
        if prefix:
            layer = 0
        for _ in range(config.num_res_blocks + 1):
            name = f"{prefix or 'decoder.upsamples'}.{layer}"
            yield Exchange(f"{name}.residual.2", width, scale, time, 1, 1)
            yield Exchange(f"{name}.residual.6", out, scale, time, 1, 1)
            width, layer = out, layer + 1
        if up:
            time *= 2 if temporal_up[i] else 1
            name = f"{prefix or 'decoder.upsamples'}.{layer}"
            yield Exchange(f"{name}.resample.1", out, scale, time, 1, 1)
            scale, layer = scale * 2, layer + 1
    yield Exchange("decoder.head.2", widths[-1], scale, time, 1, 1)


def halo_bytes(
    config: WanVAEConfig, plan: ShardPlan, rank: int, chunk: Chunk, cross: int, itemsize: int
) -> int:
    """Bytes that `rank` receives from its neighbours while it decodes `chunk` of one video.

    `cross` is the latent size of the axis that is not cut. Attention's keys and values not counted.
    """
    if rank >= plan.active:
        return 0
    total = 0
    for site in decoder_exchanges(config):
        rows = site.before * (rank > 0) + site.after * (rank < plan.active - 1)
        total += site.channels * site.frames(chunk) * cross * site.scale * rows * itemsize
    return total
