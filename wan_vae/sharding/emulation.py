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

from ..arithmetic import own_arithmetic
from ..blocks import Step
from ..cache import FeatureCache
from ..chunking import schedule
from ..layout import contiguous_for_collective
from ..ops.dispatch import Cut
from .context import SINGLE, ShardContext
from .halo import Shard
from .plan import plan_shards
from .run import own_part
from .scaling import Link, cross_size, exchanged
from .wire import Incoming, Outgoing


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
    """A steady chunk (one latent frame) on `ranks` devices. Milliseconds; `link_ms` is modelled,
    `shard_ms` (by rank) and `one_ms` (the whole picture on one device) are measured."""

    ranks: int
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
) -> list[Emulated]:
    """Time a latent of `height` x `width` whole and as each shard of each count of `ranks`.

    Each time is the median of `repeats` steady chunks, after a first and another one.
    """
    config, device = vae.config, vae.device
    z = torch.randn((1, config.z_dim, repeats + 3, height, width), device=device)

    def start(cut: Cut):
        return vae._start_decode(z, False, 1, "auto", "auto", None, None, "auto", cut)

    def steady_ms(run, part: torch.Tensor, shard) -> float:
        cache, times = FeatureCache(), []
        with own_arithmetic(device):
            for chunk in schedule(repeats + 3, 1)[:-1]:  # the last keeps no history
                step = Step(cache, chunk, shard, run.ops, run.counter)
                frame = part[:, :, chunk.start : chunk.stop]
                times.append(_timed(device, lambda f=frame, s=step: run.model.decode_chunk(f, s)))
        return statistics.median(times[2:])

    whole = start("whole")
    one_ms, found = steady_ms(whole, whole.z, SINGLE), []
    for count in ranks:
        plan = plan_shards(height, width, count)
        run = start(plan.axis)
        wire = EmulatedWire(device)
        shard_ms = tuple(
            steady_ms(
                run,
                own_part(run.z, plan, rank).contiguous(),
                Shard(ShardContext(rank, count), plan, wire),
            )
            for rank in range(plan.active)
        )
        cross = cross_size(plan, height, width)
        for link in links:
            link_ms = exchanged(config, plan, cross, link, run.z.element_size()).link_ms
            found.append(Emulated(count, plan.axis, link.name, one_ms, shard_ms, link_ms))
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
