"""The time of each chunk of a run, and its peak of device memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..chunking import Chunk
from ..clock import Mark, Spans
from ..device import allocated_bytes, peak_bytes
from ..report import ChunkRecord


class RunClock:
    """Times chunks by marks on the device, which do not stop it, and watches the peak of memory.

    The peak is counted above what was allocated when the clock was made.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._spans: Spans[Chunk] = Spans()
        self._frames: dict[Chunk, int] = {}
        self._base_bytes = 0
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(device)
            self._base_bytes = allocated_bytes(device)

    @contextmanager
    def measure(self, chunk: Chunk, frames: int) -> Iterator[None]:
        """Add the time of what runs inside to `chunk`, which makes `frames` pixel frames in all."""
        start = Mark.now(self.device)
        yield
        self._frames[chunk] = frames
        self._spans.add(chunk, start, Mark.now(self.device))

    def restart(self) -> None:
        """Forget the times: the chunks are done again. The peak stays."""
        self._spans = Spans()

    def settle(self) -> None:
        """Read all times but that of the last pass, as the device comes to their ends; waits."""
        self._spans.read_all(but=1)

    def records(self, wait: bool) -> list[ChunkRecord]:
        """One record a chunk, of all its passes (and strips) that the device has done so far."""
        if wait and self._is_cuda:
            torch.cuda.synchronize(self.device)
        self._spans.read_past()
        return [
            ChunkRecord(chunk.start, chunk.stop, chunk.is_first, self._frames[chunk], ms)
            for chunk, ms in self._spans.ms.items()
        ]

    def peak_bytes(self) -> int | None:
        """Peak of allocated device memory above the start; None where the device does not count."""
        if not self._is_cuda:
            return None
        return peak_bytes(self.device) - self._base_bytes
