"""Marks in time: events of a CUDA device, or the host's clock.

Events do not stop the device: a mark is taken at once and can be read when the device has passed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Mark:
    """A moment of a device's work: a recorded event, or seconds of the host."""

    event: torch.cuda.Event | None
    host_s: float

    @staticmethod
    def now(device: torch.device) -> Mark:
        """The moment when `device` has done all work queued on its current stream."""
        if device.type != "cuda":
            return Mark(None, time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return Mark(event, 0.0)

    def is_past(self) -> bool:
        """Whether the device has passed this mark. Does not wait."""
        return self.event is None or self.event.query()

    def wait(self) -> None:
        """Wait until the device has passed this mark."""
        if self.event is not None:
            self.event.synchronize()

    def ms_until(self, later: Mark) -> float:
        """Milliseconds from this mark to `later`, of the same device; both must be past."""
        if self.event is None or later.event is None:
            return (later.host_s - self.host_s) * 1e3
        return float(self.event.elapsed_time(later.event))


class Spans(Generic[K]):
    """Times between pairs of marks, which are read in order, each pair once.

    ms: of the pairs that were read, the sum for each thing that they belong to. The 240 pairs of a
    rank take 3 ms to read (81 frames of 720p on two H200), so nobody should do that at the end.
    """

    def __init__(self) -> None:
        self.ms: dict[K, float] = {}
        self._unread: deque[tuple[K, Mark, Mark]] = deque()

    def add(self, what: K, start: Mark, stop: Mark) -> None:
        """Add the time from `start` to `stop` to `what`, once it is read."""
        self._unread.append((what, start, stop))

    def read_past(self) -> None:
        """Read up to the first pair that the device has not passed. Does not wait."""
        while self._unread and self._unread[0][2].is_past():
            self._read()

    def read_all(self, but: int = 0) -> None:
        """Read all pairs but the last `but`, and wait for the device before each."""
        while len(self._unread) > but:
            self._unread[0][2].wait()
            self._read()

    def _read(self) -> None:
        what, start, stop = self._unread.popleft()
        self.ms[what] = self.ms.get(what, 0.0) + start.ms_until(stop)
