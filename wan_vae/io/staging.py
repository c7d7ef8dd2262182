"""Host memory on its way to a device, brought by threads while the device computes.

`Staging` is what `pixels.PixelSource` needs of a device, `CudaStaging` that of NVIDIA and AMD.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from .image import LockedMemory, bits, copy_threads, pieces_of


class PieceThreads:
    """Threads that bring a tensor in host memory to another place, piece by piece.

    Each piece goes through `move(source, target)`. CUDA's own copy of pageable memory takes one
    thread, and of the columns of a shard it wants a dense copy first, in memory that is new.
    """

    def __init__(self, threads: int, move: Callable[[torch.Tensor, torch.Tensor], None]):
        self._move = move
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="wan_vae_fetch")

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Move all pieces of `source` [A, B, C, ...] to dense `target`. Raises the first error."""
        _await_all(self.begin(source, target))

    def begin(self, source: torch.Tensor, target: torch.Tensor) -> list[Future[None]]:
        """Begin to move all pieces of `source` [A, B, C, ...] to `target`, each of whose pieces is
        dense. For `_await_all`."""
        return [
            self._pool.submit(self._piece, source[place], target[place])
            for _, place in pieces_of(target)
        ]

    def _piece(self, source: torch.Tensor, target: torch.Tensor) -> None:
        # Each thread has its own inference mode; see `image.HostWriter`.
        with torch.inference_mode():
            self._move(source, target)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def _await_all(jobs: list[Future[None]]) -> None:
    """Wait until all `jobs` have ended. Raises the first error."""
    wait(jobs)
    for job in jobs:
        job.result()


class Buffer(Protocol):
    """Memory of a device for numbers of one dtype."""

    @property
    def memory(self) -> torch.Tensor:
        """The numbers, [n]."""
        ...


class Staging(Protocol):
    """Buffers of a device that the host fills while the device computes something else.

    `fill` is for any one thread at a time, all else for the thread that launches.
    """

    def allocate(self, count: int, dtype: torch.dtype) -> Buffer:
        """A buffer of `count` numbers."""
        ...

    def enter(self) -> None:
        """Begin a thread that will call `fill`."""
        ...

    def fill(self, buffer: Buffer, source: torch.Tensor) -> None:
        """Copy `source` [A, B, C, ...] to the start of `buffer`, densely, once the device is done
        with what was there. Returns when `source` was read."""
        ...

    def begin_reading(self, buffer: Buffer) -> None:
        """What is launched from here on finds what `fill`, which has returned, has copied."""
        ...

    def end_reading(self, buffer: Buffer) -> None:
        """What was launched is the last that reads the contents of `buffer`."""
        ...

    def close(self) -> None:
        """Buffers may be freed afterwards. No thread is in `fill` any more."""
        ...


@dataclass
class _CudaBuffer:
    """A buffer, when the device has read it, and when it is filled."""

    memory: torch.Tensor
    is_read: torch.cuda.Event
    is_filled: torch.cuda.Event


class CudaStaging:
    """A `Staging` of CUDA: copies go on a stream of their own, out of page-locked memory."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._threads: PieceThreads | None = None

    def allocate(self, count: int, dtype: torch.dtype) -> Buffer:
        memory = torch.empty(count, dtype=dtype, device=self._device)
        buffer = _CudaBuffer(memory, torch.cuda.Event(), torch.cuda.Event())
        # What had this memory before may not be done with it.
        buffer.is_read.record(self._current)
        return buffer

    def enter(self) -> None:
        # A thread begins with device 0, where leaving a stream of another would make a context.
        torch.cuda.set_device(self._stream.device)

    def fill(self, buffer: Buffer, source: torch.Tensor) -> None:
        assert isinstance(buffer, _CudaBuffer)
        if self._threads is None:
            move = _ToDevice(self._stream)
            self._threads = PieceThreads(copy_threads(os.cpu_count()), move)
        self._stream.wait_event(buffer.is_read)
        try:
            # Dense memory and one dtype: the copy moves bytes, all else happens on the device.
            self._threads.copy(source, buffer.memory[: source.numel()].view(source.shape))
        finally:
            buffer.is_filled.record(self._stream)

    def begin_reading(self, buffer: Buffer) -> None:
        assert isinstance(buffer, _CudaBuffer)
        self._current.wait_event(buffer.is_filled)

    def end_reading(self, buffer: Buffer) -> None:
        assert isinstance(buffer, _CudaBuffer)
        buffer.is_read.record(self._current)

    def close(self) -> None:
        if self._threads is None:
            return
        self._threads.close()
        self._threads = None
        # Copies that nobody will read may be under way into memory that is freed next. A broken
        # device, whose error has ended the run, copies nothing, and would answer with that error.
        with suppress(RuntimeError):
            self._current.wait_stream(self._stream)

    @property
    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)


class CudaUpload:
    """Copies tensors from the host to a CUDA device by threads. Use as a context: it ends them.

    CUDA's own copy of pageable memory takes one thread, in which a file that is mapped into memory
    is read too: 1.5 GB/s on a host with an H200.
    """

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        threads = min(_UPLOAD_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="wan_vae_upload")
        self._move = _ToDevice(self._stream)

    def __enter__(self) -> CudaUpload:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def __call__(
        self, groups: Iterable[Mapping[str, torch.Tensor]]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Contiguous copies of each of `groups` of tensors, which lie on the host, for the current
        stream; see `network.weights.Upload`. Raises the first error of a thread."""
        current = torch.cuda.current_stream(self._device)
        under_way: deque[_UnderWay] = deque()
        try:
            for group in groups:
                # Before its reader does anything with the last one: the threads go on meanwhile.
                under_way.append(self._start(group, current))
                if len(under_way) == _GROUPS_UNDER_WAY:
                    yield self._finish(under_way, current)
            while under_way:
                yield self._finish(under_way, current)
        finally:
            for started in under_way:  # after an error: written to memory that is freed next
                wait(started.jobs)
                # A broken device, whose error it is, copies nothing, and would answer with it.
                with suppress(RuntimeError):
                    current.wait_stream(self._stream)

    def _start(self, sources: Mapping[str, torch.Tensor], current: torch.cuda.Stream) -> _UnderWay:
        """Have the threads copy `sources`."""
        targets = {
            name: torch.empty(source.shape, dtype=source.dtype, device=self._device)
            for name, source in sources.items()
        }
        self._stream.wait_stream(current)  # what had this memory before may not be done with it
        parts = [
            (part, place)
            for name, source in sources.items()
            for part, place in zip(
                _flat(source).split(_UPLOADED), targets[name].view(-1).split(_UPLOADED), strict=True
            )
        ]
        return _UnderWay(targets, [self._threads.submit(self._one, *part) for part in parts])

    def _finish(
        self, under_way: deque[_UnderWay], current: torch.cuda.Stream
    ) -> dict[str, torch.Tensor]:
        """What the first group `under_way` has become, for what `current` is given next."""
        wait(under_way[0].jobs)
        for job in under_way[0].jobs:
            job.result()
        current.wait_stream(self._stream)
        return under_way.popleft().targets

    def _one(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if not source.numel():
            return
        with torch.no_grad():  # a mode of each thread; a source may be a parameter
            self._move(source, target)


@dataclass(frozen=True)
class _UnderWay:
    """A group of tensors on its way to `targets`, by `jobs` of threads."""

    targets: dict[str, torch.Tensor]
    jobs: list[Future[None]]


# One is read while the threads copy the other.
_GROUPS_UNDER_WAY = 2
# Numbers that are copied at a time, 2 MiB of float32. To lock pages takes 0.3 ms a MiB (H200), so
# 10 ms for the two pieces of each thread. Pieces twice as large would take each process 10 ms more,
# and save it half of the calls for the 250 of Wan 2.1, which is less.
_UPLOADED = 1 << 19
# More than copy beside a run: nothing else is done meanwhile.
_UPLOAD_THREADS = 8


def _flat(source: torch.Tensor) -> torch.Tensor:
    return source.detach().resolve_neg().reshape(-1)


class ToDevice:
    """Copies from ordinary host memory to a CUDA device, in threads, on a stream of their own.

    `begin` and `end` are for the thread that launches, which may launch between them. Close it in
    every case.
    """

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._threads = PieceThreads(copy_threads(os.cpu_count()), _ToDevice(self._stream))
        # What is under way. Its memory may not be freed, whatever becomes of the run.
        self._begun: list[tuple[torch.Tensor, list[Future[None]]]] = []

    def begin(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Begin to copy `source` [A, B, C, ...] to `target`, each of whose pieces (`pieces_of`) is
        dense. Neither may change, nor `target` be read, before `end`."""
        # What had this memory before may not be done with it. What is launched later is not waited
        # for: the copy runs beside it.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._begun.append((target, self._threads.begin(source, target)))

    def end(self) -> None:
        """What is launched from here on finds what was begun. Returns when the sources were read.
        Raises the first error of a thread."""
        jobs = [job for _, some in self._begun for job in some]
        try:
            _await_all(jobs)
        finally:
            # Nor may anybody have this memory afterwards before the copies are done.
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._begun.clear()

    def close(self) -> None:
        """End the threads. What was begun may be freed afterwards."""
        self._threads.close()
        with suppress(RuntimeError):  # see `CudaStaging.close`
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._begun.clear()


@dataclass
class _Locked:
    """Page-locked memory for a piece, and when the device has read it."""

    memory: LockedMemory = field(default_factory=LockedMemory)
    is_read: torch.cuda.Event = field(default_factory=lambda: torch.cuda.Event(blocking=True))


class _ToDevice:
    """Moves pieces to CUDA memory, on `stream`: each thread fills one page-locked buffer while the
    device reads the other.

    That becomes the current stream of each thread that calls, for good: these are threads that do
    nothing else. To enter it and to make an event for each piece took 0.1 ms (H200), longer than
    2 MiB are on their way.
    """

    def __init__(self, stream: torch.cuda.Stream):
        self._stream = stream
        self._own = threading.local()

    def __call__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if not hasattr(self._own, "buffers"):
            # See `CudaStaging.enter`.
            torch.cuda.set_device(self._stream.device)
            torch.cuda.set_stream(self._stream)
            self._own.buffers = _Locked(), _Locked()
        locked, other = self._own.buffers
        self._own.buffers = other, locked
        locked.is_read.synchronize()  # of no copy at first, which is done
        staged = locked.memory.like(target)
        np.copyto(bits(staged), bits(source))
        target.copy_(staged, non_blocking=True)
        locked.is_read.record(self._stream)
