"""What several devices would take, from one: each shard's real decode in turn, on a slow link.

Emulated, not measured: decode, halo code, kernels and their shapes are the real ones, the transport
is not. Rows that a neighbour would send are zeros that lie ready, the picture is not gathered. The
stream on which they would travel waits as long as `scaling` says that the link takes, while the
device does what does not need them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import inf, prod

import torch

from benchmarks.suite.scaling import Link, cross_size, exchanged, planned
from wan_vae.chunking import Chunk
from wan_vae.errors import DecodeMemoryError
from wan_vae.io.sink import NullSink
from wan_vae.layout import LayoutCounter, contiguous_for_collective
from wan_vae.ops.opset import HaloExchange
from wan_vae.options import RunOptions
from wan_vae.pipeline import WanVAE
from wan_vae.planning.plan import Pace, Plan
from wan_vae.report import ReportBuilder
from wan_vae.runs.decode import DecodeRequest, DecodeRun, shards_of
from wan_vae.runs.shard_ranks import own_part
from wan_vae.sharding.context import SINGLE, ShardContext
from wan_vae.sharding.halo import Shard
from wan_vae.sharding.plan import ShardPlan, plan_shards
from wan_vae.sharding.transport import Incoming, Outgoing, Wire

# Chunks before the first that is timed: the first of a video is shorter, the second the first of
# its size.
_WARM_UP = 2


class EmulatedWire(Wire):
    """Packs what would be sent, and gives zeros of the right shapes once `link` would have brought
    them; None: at once. Joins no process group."""

    def __init__(self, context: ShardContext, device: torch.device, link: Link | None = None):
        # Not Wire's, which asks the process group who is there.
        self.context, self.device, self._link = context, device, link
        self.host_staged = device.type != "cuda"
        self._stream: torch.cuda.Stream | None = None
        self._ready: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def exchange(
        self, site: str, dtype: torch.dtype, out: Sequence[Outgoing], into: Sequence[Incoming]
    ) -> list[torch.Tensor]:
        """The tensors that would be received, all zeros; nothing is sent, `out` is only packed."""
        for o in out:
            contiguous_for_collective(o.tensor)
        if self._link is not None and (out or into):
            size = sum(prod(i.shape) for i in into) * dtype.itemsize
            wait(self.device, self._link.exchange_us / 1e3 + size / self._link.bytes_per_ms)
        return [self._zeros(i.shape, dtype) for i in into]

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if (shape, dtype) not in self._ready:
            self._ready[shape, dtype] = torch.zeros(shape, dtype=dtype, device=self.device)
        return self._ready[shape, dtype]


def wait(device: torch.device, ms: float) -> None:
    """Have the current stream of `device` do nothing for so long; without one, this thread."""
    if device.type == "cuda":
        torch.cuda._sleep(round(ms * _cycles_per_ms(device)))
        return
    until = time.perf_counter() + ms / 1e3
    while time.perf_counter() < until:
        pass


@cache
def _cycles_per_ms(device: torch.device) -> float:
    """Cycles that `torch.cuda._sleep` waits in a millisecond, by the clock of a busy device."""
    cycles = 10_000_000
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    for event in events:
        event.record()
        torch.cuda._sleep(cycles)
    events[-1].synchronize()
    return cycles / events[1].elapsed_time(events[2])


class EmulatedRanks:
    """`wan_vae.runs.ranks.Ranks` of one rank whose neighbours are not there."""

    has_rows = True
    receives = True

    def __init__(
        self, context: ShardContext, shards: ShardPlan, device: torch.device, link: Link | None
    ):
        self._rank, self._shards = context.rank, shards
        wire = EmulatedWire(context, device, link)
        self.exchange: HaloExchange | None = Shard(context, shards, wire)

    def own_part(self, x: torch.Tensor, factor: int = 1) -> torch.Tensor:
        return own_part(x, self._shards, self._rank, factor)

    def part_shape(self, shape: tuple[int, ...], factor: int = 1) -> tuple[int, ...]:
        return self._shards.pixel_shape_of(self._rank, shape, factor)

    def result_shape(self, shape: tuple[int, ...], factor: int = 1) -> tuple[int, ...]:
        return self.part_shape(shape, factor)

    def agree_on(self, plan: Plan) -> Pace:
        return plan.pace

    def agree_to_stop(self, chunk: Chunk, stop: bool) -> bool:
        return stop

    def gather(self, part: torch.Tensor, factor: int, site: str) -> torch.Tensor | None:
        return part

    def read_waits(self, wait: bool) -> None:
        """Nothing: there are no exchanges."""

    def complete(self, builder: ReportBuilder, counter: LayoutCounter, finite: bool) -> bool:
        return finite

    def out_of_memory(self, reason: str) -> DecodeMemoryError | None:
        return None


@dataclass(frozen=True)
class SteadyClip:
    """A video of `chunks` equal chunks of `frames` latent frames, whatever memory is free."""

    height: int
    width: int
    frames: int
    chunks: int

    def run(
        self, vae: WanVAE, context: ShardContext = SINGLE, link: Link | None = None
    ) -> DecodeRun:
        """A decode of it, of the whole picture or of the emulated rank of `context`."""
        size = (1, vae.config.z_dim, self.frames * self.chunks, self.height, self.width)
        request = DecodeRequest(
            torch.randn(size, device=vae.device),
            options=RunOptions(chunk_frames=self.frames, free_bytes=inf),
            sink=NullSink(),
            context=context,
        )
        shards = shards_of(context, size)
        if shards is None:
            return DecodeRun(vae.engine, request)
        return DecodeRun(vae.engine, request, EmulatedRanks(context, shards, vae.device, link))


def steady_ms(
    vae: WanVAE,
    size: tuple[int, int],
    frames: int,
    repeats: int,
    context: ShardContext = SINGLE,
    link: Link | None = None,
) -> float:
    """Milliseconds of a chunk of `frames` latent frames in the middle of a decode: the median of
    `repeats`. size: latent rows and columns of the whole picture."""
    # The last chunk keeps no history.
    run = SteadyClip(*size, frames, _WARM_UP + repeats + 1).run(vae, context, link)
    run.decode()
    if run.report is None or run.report.status != "done":
        raise RuntimeError("the decode has no report")
    return statistics.median(c.duration_ms for c in run.report.chunks[_WARM_UP:-1])


@dataclass(frozen=True)
class Emulated:
    """A steady chunk of `frames` latent frames on `ranks` devices. Milliseconds, measured:
    `shard_ms` (by rank), `bare_ms` (the same without the link) and `one_ms` (the whole picture on
    one device, as many frames, in chunks as one device takes them). `link_ms`: what the link of the
    busiest rank takes."""

    ranks: int
    frames: int
    axis: str
    link: str
    one_ms: float
    shard_ms: tuple[float, ...]
    bare_ms: tuple[float, ...]
    link_ms: float

    @property
    def chunk_ms(self) -> float:
        """The slowest shard."""
        return max(self.shard_ms)

    @property
    def hidden(self) -> float:
        """The share of the link's time in which the slowest shard computes."""
        return 1 - (self.chunk_ms - max(self.bare_ms)) / self.link_ms

    @property
    def efficiency(self) -> float:
        """Speed-up over the number of ranks."""
        return self.one_ms / (self.ranks * self.chunk_ms)


def emulate(
    vae: WanVAE,
    height: int,
    width: int,
    ranks: Sequence[int],
    links: Sequence[Link],
    repeats: int = 5,
    clip_frames: int = 21,
) -> list[Emulated]:
    """Time a latent of `height` x `width` whole and as each shard of each count of `ranks`.

    In chunks as they are planned for a clip of `clip_frames` latent frames where memory is no
    limit. Each time is the median of `repeats` steady chunks, after a first and another one.
    """
    size, clip = (height, width), (1, vae.config.z_dim, clip_frames, height, width)
    alone = vae.plan(clip, free_bytes=inf).chunk_frames
    one_ms = steady_ms(vae, size, alone, repeats) / alone
    found = []
    for count in ranks:
        plan = plan_shards(height, width, count)
        frames = vae.plan(clip, free_bytes=inf, ranks=count).chunk_frames
        contexts = [ShardContext(rank, count) for rank in range(plan.active)]
        bare_ms = tuple(steady_ms(vae, size, frames, repeats, rank) for rank in contexts)
        cross, itemsize = cross_size(plan, height, width), vae.dtype.itemsize
        chunk, (_, passes) = Chunk(1, 1 + frames, False, False), planned(vae.config, clip, plan)
        for link in links:
            found.append(
                Emulated(
                    ranks=count,
                    frames=frames,
                    axis=plan.axis,
                    link=link.name,
                    one_ms=one_ms * frames,
                    shard_ms=tuple(
                        steady_ms(vae, size, frames, repeats, rank, link) for rank in contexts
                    ),
                    bare_ms=bare_ms,
                    link_ms=exchanged(
                        vae.config, plan, cross, link, itemsize, chunk, passes
                    ).link_ms,
                )
            )
    return found
