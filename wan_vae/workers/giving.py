"""The input of a run on its way to the workers, through memory that they share with their parent.

`Giving` is the parent's side, `Given` a worker's: they read the first frames of a video while the
parent copies the others.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from math import prod

import torch

from ..errors import ShardingError
from ..io.image import BLOCKS_UNDER_WAY, NOW, HostWriter, copy_threads, on_host
from ..said import said

# Bytes of the frames of which workers are told together: 2 to 5 ms for our threads.
_BLOCK_BYTES = 32 << 20


class Giving:
    """Copies a video into shared memory, frame after frame. Use as a context: it ends its threads.

    source, target: [B, T, ...], of one shape and dtype, on the host. tell: called with n, by the
    caller of `step`, when frames [0, n) have arrived. writer: of which this object is the only
    user.
    """

    def __init__(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        tell: Callable[[int], None],
        *,
        block_bytes: int = _BLOCK_BYTES,
        writer: HostWriter | None = None,
    ):
        self._source, self._target, self._tell = source, target, tell
        self._frames = source.shape[1]
        frame_bytes = prod(source.shape[2:]) * source.shape[0] * source.element_size()
        self._block_frames = max(1, block_bytes // max(1, frame_bytes))
        self._queued = 0
        # The frames at which blocks end that were queued, and of which nobody was told.
        self._stops: deque[int] = deque()
        self._writer = writer or HostWriter(copy_threads(os.cpu_count()), on_host)

    def __enter__(self) -> Giving:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.stop()

    def step(self) -> bool:
        """Copy on, and tell of what has arrived; whether there is more to do. Raises the first
        error of a copy."""
        if self._queued == self._frames:
            self._writer.finish()
            self._stops.clear()
            self._tell(self._frames)
            return False
        # The first pass of an encode takes one frame.
        frames = self._block_frames if self._queued else 1
        start, stop = self._queued, min(self._queued + frames, self._frames)
        block = self._source[:, start:stop]
        # Returns when the blocks before the last one have arrived.
        self._writer.put(NOW, block, self._target[:, start:stop], block[:, :0])
        self._queued = stop
        self._stops.append(stop)
        if len(self._stops) > BLOCKS_UNDER_WAY:
            self._tell(self._stops.popleft())
        return True


def frames_first(order: tuple[int, ...]) -> bool:
    """Whether frames lie one after another, in each of the videos, in a tensor [B, C, T, H, W] of
    this `layout.memory_order`."""
    return order[: order.index(2)] in ((), (0,))


def copy_on_host(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy `source` [A, B, C, ...] to `target` on the host.

    By a few threads: PyTorch would wake one for each core, which takes longer than the copy of a
    latent (10 to 20 ms on a host with two H200, for 1 MB as for 19 MB).
    """
    if source.device.type != "cpu" or source.dtype != target.dtype:
        target.copy_(source)
        return
    writer = HostWriter(copy_threads(os.cpu_count()), on_host)
    try:
        writer.put(NOW, source, target, target[:, :0])
    finally:
        writer.finish()


class Given:
    """How many frames of a run's input are there: told by one thread, awaited by others."""

    def __init__(self, frames: int = 0):
        self._frames = frames
        self._more = threading.Condition()

    def give(self, frames: int) -> None:
        """Frames [0, `frames`) are there."""
        with self._more:
            self._frames = max(self._frames, frames)
            self._more.notify_all()

    def wait_for(self, frames: int, seconds: float) -> None:
        """Return when frames [0, `frames`) are there. Raises ShardingError if for so long none
        came."""
        with self._more:
            while self._frames < frames:
                before = self._frames
                if not self._more.wait(seconds) and self._frames == before:
                    raise ShardingError(
                        said(
                            "worker.not_given",
                            "the program that started this worker gave it {given} of {frames} "
                            "frames and no other for {seconds} s: it is stopped or overloaded",
                            given=before,
                            frames=frames,
                            seconds=f"{seconds:g}",
                        )
                    )
