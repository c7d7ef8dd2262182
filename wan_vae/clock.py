"""Marks in time: events of a CUDA device, or the host's clock.

Events do not stop the device: a mark is taken at once and can be read when the device has passed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


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
