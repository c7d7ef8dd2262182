"""What several devices would take, from one: each shard's real shapes in turn, the link modelled.

Emulated, not measured: the halo code, the kernels and their shapes are the real ones, the
transport is not. Rows that a peer would send are zeros that lie ready; the time of the link comes
from `scaling`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.suite.scaling import Link, cross_size, exchanged, planned_frames
from wan_vae.arithmetic import own_arithmetic
from wan_vae.chunking import Chunk
from wan_vae.layout import contiguous_for_collective
from wan_vae.network.blocks import Step
from wan_vae.network.cache import FeatureCache
from wan_vae.options import Axis
from wan_vae.planning import memory
from wan_vae.runs.shard_ranks import own_part
from wan_vae.sharding.context import ShardContext
from wan_vae.sharding.halo import Shard
from wan_vae.sharding.plan import plan_shards
from wan_vae.sharding.transport import Incoming, Outgoing


class EmulatedWire:
    """Takes the place of `Wire`: packs what would be sent, and gives zeros of the right shapes."""

    def __init__(self, device: torch.device):
        self._device = device
        self._ready: dict[tuple, torch.Tensor] = {}

    def exchange(
        self, site: str, dtype: torch.dtype, out: Sequence[Outgoing], into: Sequence[Incoming]
    ) -> list[torch.Tensor]:
        """The tensors that would be received, all zeros; nothing is sent, `out` is only packed."""
        for o in out:
            contiguous_for_collective(o.tensor)
        return [self._zeros(i.shape, dtype) for i in into]

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if (shape, dtype) not in self._ready:
            self._ready[shape, dtype] = torch.zeros(shape, dtype=dtype, device=self._device)
        return self._ready[shape, dtype]


@dataclass(frozen=True)
class Emulated:
    """A steady chunk of `frames` latent frames on `ranks` devices. Milliseconds; `link_ms` is
    modelled, `shard_ms` (by rank) and `one_ms` (the whole picture on one device, as many frames,
    in chunks as one device takes them) are measured."""

    ranks: int
    frames: int
    axis: str
    link: str
    one_ms: float
    shard_ms: tuple[float, ...]
    link_ms: float

    @property
    def chunk_ms(self) -> float:
        """The slowest shard and the exchange."""
        return max(self.shard_ms) + self.link_ms

    @property
    def efficiency(self) -> float:
        """Speed-up over the number of ranks."""
        return self.one_ms / (self.ranks * self.chunk_ms)


def emulate(
    vae,
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
    config, device = vae.config, vae.device
    clip = (1, config.z_dim, clip_frames, height, width)
    z = torch.randn((*clip[:2], 1, height, width), device=device)

    def start(axis: Axis | None):
        # As a video, which one frame is not.
        z2 = z.expand(-1, -1, 2, -1, -1)
        return vae._start_decode(z2, False, 1, "auto", "auto", None, None, "auto", axis)

    def steady_ms(run, part: torch.Tensor, shard, frames: int) -> float:
        """Of `frames` latent frames."""
        cache, times = FeatureCache(), []
        part = part[:, :, :1].expand(-1, -1, frames, -1, -1)
        with own_arithmetic(device):
            for i in range(repeats + 2):
                chunk = Chunk(i * frames, (i + 1) * frames, is_first=i == 0, is_last=False)
                step = Step(cache, chunk, shard, run.ops, run.counter)
                times.append(_timed(device, lambda s=step: run.model.decode_chunk(part, s)))
        return statistics.median(times[2:])

    whole = start("whole")
    alone = memory.plan_decode(config, clip, vae.dtype, "channels_last_3d", None).chunk_frames
    one_ms, found = steady_ms(whole, whole.z, None, alone) / alone, []
    for count in ranks:
        plan = plan_shards(height, width, count)
        run, frames = start(plan.axis), planned_frames(config, clip, plan)
        wire = EmulatedWire(device)
        shard_ms = tuple(
            steady_ms(
                run,
                own_part(run.z, plan, rank).contiguous(),
                Shard(ShardContext(rank, count), plan, wire),
                frames,
            )
            for rank in range(plan.active)
        )
        cross = cross_size(plan, height, width)
        for link in links:
            size = run.z.element_size()
            link_ms = exchanged(config, plan, cross, link, size, frames).link_ms
            one = one_ms * frames
            found.append(Emulated(count, frames, plan.axis, link.name, one, shard_ms, link_ms))
    return found


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    """Milliseconds of `work` on the device, host time included where the device waits for it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3
