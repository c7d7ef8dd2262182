"""Strips that leave what they do not need now in host memory: rows of frames, features and history.

A video file wants whole frames, so that strips of rows must be put together. On a small card
neither the frames of a long video nor the history of all strips fit beside the strip at work. So
each strip goes through all chunks of a part of the video before the next one starts, and its pixels
are copied to `HostFrames` while it goes on. Those of the last strip stay where they are: while it
is computed, the rows of the others come back, and `WholeFrames` hands out frame after frame. What
the trunk has made of the part stays on the device or waits in `HostFeatures`. Where another part
follows, `StripHistories` moves the history of the strip out and that of the next one in. One part
needs none of that, and is what a plan takes if the host has room for its rows of all frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch

from .. import layout
from ..device import host_empty
from ..io.image import HostCopier
from ..io.pages import LockedPages
from ..io.staging import ToDevice
from ..network.cache import FeatureCache


class _WayBack:
    """Brings what waits in host memory to a device. Close it in every case."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads: ToDevice | None = None

    def begin(self, part: torch.Tensor, target: torch.Tensor) -> None:
        """Begin to bring `part` to `target`; see `ToDevice.begin`."""
        if self._device.type != "cuda":
            target.copy_(part)
            return
        if self._threads is None:
            self._threads = ToDevice(self._device)
        self._threads.begin(part, target)

    def end(self) -> None:
        """What was begun is there for what follows. Raises the first error of a copy."""
        if self._threads is not None:
            self._threads.end()

    def bring(self, part: torch.Tensor) -> torch.Tensor:
        """A dense copy of `part` on the device, also where that is the CPU."""
        values = torch.empty(part.shape, dtype=part.dtype, device=self._device)
        self.begin(part, values)
        self.end()
        return values

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            threads, self._threads = self._threads, None
            threads.close()


class HostFrames:
    """Rows of the frames of one part, [B, C, t, rows, W] float32, in host memory: those of all
    strips but the last.

    Copies from CUDA run beside the computation of the next pass. Close it in every case.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        """shape: of the longest part."""
        self.device = device
        # Frames first, so that rows of a frame are one piece of memory (`pages.stretches`).
        b, c, t, rows, w = shape
        with torch.inference_mode(False):  # see `_bytes_on`
            self._memory = host_empty((t, b, c, rows, w), torch.float32)
        self._copier: HostCopier | None = None
        self._way_back = _WayBack(device)
        self._is_new = True

    def write(self, pixels: torch.Tensor, start: int, first_row: int) -> None:
        """Take pixels [B, C, t, rows, W]: of frames from `start` on, rows from `first_row` on."""
        count, rows = pixels.shape[2], slice(first_row, first_row + pixels.shape[3])
        stop = start + count
        frames = self._memory.flatten(1, 2)[:, :, rows]
        block = pixels.permute(2, 0, 1, 3, 4).flatten(1, 2)
        if not pixels.is_cuda:
            frames[start:stop].copy_(block)
            return
        if self._copier is None:
            self._copier = HostCopier(pixels.device, None, self._is_new)
        self._copier.copy(block.contiguous(), frames[start:stop], frames[stop : stop + count])

    def begin_reading(self, start: int, frames: torch.Tensor) -> None:
        """Begin to bring the rows of frames from `start` on to the first rows of dense `frames`
        [t, B, C, H, W] on the device. Raises the first error of a copy to the host."""
        if self._copier is not None:  # only what was copied last is still under way
            copier, self._copier = self._copier, None
            copier.finish()
        self._is_new = False
        rows = self._memory.shape[3]
        part = self._memory[start : start + len(frames)]
        # Picture by picture: pieces of the first rows of one are dense, those of several are not.
        pictures = frames.flatten(0, 2).unsqueeze(1)
        self._way_back.begin(part.flatten(0, 2).unsqueeze(1), pictures[:, :, :rows])

    def end_reading(self) -> None:
        """What follows on the device finds the rows there, and the part of before may be written
        over. Raises the first error of a copy."""
        self._way_back.end()

    def close(self) -> None:
        """Stop the copies and let go of the memory."""
        if self._copier is not None:
            copier, self._copier = self._copier, None
            copier.stop()
        self._way_back.close()
        self._memory = torch.empty(0)


@dataclass(frozen=True)
class _Frames:
    """Frames [start, stop) of a part that are being put together, [t, B, C, H, W]."""

    start: int
    stop: int
    memory: torch.Tensor


class WholeFrames:
    """Whole frames of one part on the device, a few at a time, put together of the rows that wait
    in `HostFrames` and of those of the last strip.

    The rows of the next few come back while those before are used and the last strip goes on. So
    the device holds two such blocks while it computes: one belongs to whoever got it.
    """

    def __init__(
        self,
        host: HostFrames,
        shape: tuple[int, ...],
        first_row: int,
        start: int,
        stops: Sequence[int],
    ) -> None:
        """shape: of frames, [B, C, H, W]. first_row: of the last strip. start: the first frame of
        the part that is wanted. stops: where blocks end, in order, from behind `start` on."""
        self._host, self._shape, self._first_row = host, shape, first_row
        self._start, self._stops = start, list(stops)
        self._open: _Frames | None = None

    def with_rows(self, pixels: torch.Tensor, start: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Take pixels [B, C, t, rows, W] of the last strip, of frames from `start` on, in order.
        Yields what they complete: a frame's number, and frames [B, C, t, H, W] from it on."""
        stop = start + pixels.shape[2]
        if self._open is None:
            self._begin_next()
        while self._open is not None and self._open.start < stop:
            self._put(self._open, pixels, start)
            if stop < self._open.stop:
                return
            self._host.end_reading()
            yield self._taken()

    def _put(self, frames: _Frames, pixels: torch.Tensor, start: int) -> None:
        """Put those of `pixels`, of frames from `start` on, in their place that are of `frames`."""
        first = max(start, frames.start)
        stop = min(start + pixels.shape[2], frames.stop)
        rows = frames.memory[first - frames.start : stop - frames.start, :, :, self._first_row :]
        rows.copy_(pixels[:, :, first - start : stop - start].permute(2, 0, 1, 3, 4))

    def _taken(self) -> tuple[int, torch.Tensor]:
        """The frames that are complete. Nothing here holds them any more."""
        assert self._open is not None
        done = self._open
        self._begin_next()
        return done.start, done.memory.permute(1, 2, 0, 3, 4)

    def _begin_next(self) -> None:
        """Begin with the frames that are wanted next, if there are any."""
        self._open = None
        if not self._stops:
            return
        start, stop = self._start, self._stops.pop(0)
        size, device = (stop - start, *self._shape), self._host.device
        with torch.inference_mode(False):  # see `_bytes_on`
            memory = torch.empty(size, dtype=torch.float32, device=device)
        self._open, self._start = _Frames(start, stop, memory), stop
        self._host.begin_reading(start, memory)


class Features(Protocol):
    """What the trunk has made of the chunks of a part. Close it in every case."""

    def put(self, features: torch.Tensor) -> None:
        """Take the features [B, C, T, H, W] of the next chunk."""
        ...

    def rows(self, chunk: int, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a chunk of the part, on the device. Nothing is put afterwards."""
        ...

    def close(self) -> None:
        """Let go of the memory."""
        ...


class DeviceFeatures:
    """Features that stay on the device."""

    def __init__(self) -> None:
        self._chunks: list[torch.Tensor] = []

    def put(self, features: torch.Tensor) -> None:
        """See `Features`."""
        self._chunks.append(features)

    def rows(self, chunk: int, start: int, stop: int) -> torch.Tensor:
        """See `Features`."""
        return self._chunks[chunk][:, :, :, start:stop]

    def close(self) -> None:
        """See `Features`."""
        self._chunks.clear()


# The dimensions of features as they lie in memory, by format.
_NDHWC, _NCDHW = (0, 2, 3, 4, 1), (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class _HostChunk:
    """Features of a chunk on the host, dense, in the order of `dimensions`."""

    memory: torch.Tensor
    dimensions: tuple[int, ...]


class HostFeatures:
    """Features that wait on the host, of which the device gets the rows of a strip at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._chunks: list[_HostChunk] = []
        self._copier: HostCopier | None = None
        self._way_back = _WayBack(device)

    def put(self, features: torch.Tensor) -> None:
        """See `Features`."""
        is_ndhwc = layout.detect(features) == "channels_last_3d"
        dimensions = _NDHWC if is_ndhwc else _NCDHW
        source = features.permute(dimensions).contiguous()
        with torch.inference_mode(False):  # see `_bytes_on`
            memory = host_empty(tuple(source.shape), source.dtype)
        self._chunks.append(_HostChunk(memory, dimensions))
        if not source.is_cuda:
            memory.copy_(source)
            return
        if self._copier is None:
            self._copier = HostCopier(source.device, None, is_new=True)
        self._copier.copy(source, memory, memory[:, :0])

    def rows(self, chunk: int, start: int, stop: int) -> torch.Tensor:
        """See `Features`. Raises the first error of a copy."""
        if self._copier is not None:
            copier, self._copier = self._copier, None
            copier.finish()
        kept = self._chunks[chunk]
        at = kept.dimensions.index(3)
        values = self._way_back.bring(kept.memory.narrow(at, start, stop - start))
        return values.permute([kept.dimensions.index(i) for i in range(5)])

    def close(self) -> None:
        """Stop the copies and let go of the memory."""
        if self._copier is not None:
            copier, self._copier = self._copier, None
            copier.stop()
        self._way_back.close()
        self._chunks.clear()


# Where the bytes of a history may begin on the host, so that they are numbers of any dtype.
_ALIGNED = 256


class HostMemory:
    """`size` bytes of host memory, page-locked where that is possible, so that CUDA copies to and
    from it while it computes.

    PyTorch's own page-locked memory comes in powers of two, and is never given back: it is not used
    for gigabytes.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # see `_bytes_on`
            self.bytes = host_empty((size,), torch.uint8)
        self._pages = LockedPages(self.bytes, device)

    @property
    def is_locked(self) -> bool:
        return self._pages.is_locked

    def close(self) -> None:
        """Give the memory back. No copy may be under way."""
        self._pages.close()
        self.bytes = torch.empty(0, dtype=torch.uint8)


@dataclass
class _Place:
    """Device memory for one layer's history of any strip, and when it may be used.

    moved: the copies out and in that were queued last; None before the first.
    """

    memory: torch.Tensor
    moved: torch.cuda.Event | None = None


@dataclass(frozen=True)
class _Parked:
    """One layer's history of one strip: its form, and its bytes on the host from `start` on."""

    form: layout.DenseForm
    memory: HostMemory
    start: int

    @property
    def bytes(self) -> torch.Tensor:
        return self.memory.bytes[self.start : self.start + self.form.nbytes]


@dataclass
class _Strip:
    """What is kept of one strip between parts: its layers in the order of their use."""

    slots: dict[str, _Parked] = field(default_factory=dict)
    memories: list[HostMemory] = field(default_factory=list)


class StripHistories:
    """The histories of all strips: that of the strip at work on the device, the others on the host.

    The device holds one place a layer. When a strip is done with a part, the history of each layer
    goes out and that of the next strip comes into the same place, layer after layer, on streams of
    their own: the next strip starts as soon as its first layers are there. Close it in every case.
    """

    def __init__(self, strips: int, device: torch.device) -> None:
        self._device = device
        self._strips = [_Strip() for _ in range(strips)]
        self._places: dict[str, _Place] = {}
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if device.type == "cuda":
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)

    @property
    def is_locked(self) -> bool:
        """Whether all host memory that was taken so far is page-locked."""
        return all(memory.is_locked for strip in self._strips for memory in strip.memories)

    def first(self) -> FeatureCache:
        """The cache of the first strip, for the first part."""
        return _PlacedCache(self, {})

    def after(self, done: int, cache: FeatureCache) -> FeatureCache:
        """Strip `done` has gone through a part with `cache`: the cache of the strip after it, or of
        the first strip for the next part."""
        strip = self._strips[done]
        following = self._strips[(done + 1) % len(self._strips)]
        # In the last chunk layers leave no history: nothing goes out of a strip of the last part.
        left = [name for name, _ in cache.items()]
        self._learn(strip, cache)
        if self._streams is not None:
            # The device gets here when the strip no longer reads its history.
            self._streams[0].wait_stream(torch.cuda.current_stream(self._device))
        slots: dict[str, torch.Tensor] = {}
        for name, place in self._places.items():
            kept = following.slots.get(name)
            self._move(place, strip.slots[name] if name in left else None, kept)
            if kept is not None:
                slots[name] = kept.form.view(place.memory)
        return _PlacedCache(self, slots)

    def put(self, slot: str, history: torch.Tensor) -> torch.Tensor:
        """`history`, which a layer has stored, in its place on the device; copied if need be."""
        self.wait(slot)
        place = self._places.get(slot)
        if place is not None and history.data_ptr() == place.memory.data_ptr():
            return history
        if place is None or place.memory.numel() < history.nbytes:
            self._places[slot] = _Place(torch.empty(0))  # the smaller one is freed first
            place = self._places[slot] = _Place(_bytes_on(self._device, history.nbytes))
        return layout.DenseForm.of(history).view(place.memory).copy_(history)

    def wait(self, slot: str) -> None:
        """What follows on the device comes after the copies out of and into the place of `slot`."""
        place = self._places.get(slot)
        if place is not None and place.moved is not None:
            torch.cuda.current_stream(self._device).wait_event(place.moved)

    def close(self) -> None:
        """Give device and host memory back, after all copies."""
        for stream in self._streams or ():
            stream.synchronize()
        for strip in self._strips:
            for memory in strip.memories:
                memory.close()
            strip.memories.clear()
            strip.slots.clear()
        self._places.clear()

    def _learn(self, strip: _Strip, cache: FeatureCache) -> None:
        """Take host memory for what `strip` leaves for the first time.

        That is in the first part, and in the second for layers that skip the video's first frame if
        the first part is no longer.
        """
        new = {n: layout.DenseForm.of(x) for n, x in cache.items() if n not in strip.slots}
        if not new:
            return
        sizes = [-(-form.nbytes // _ALIGNED) * _ALIGNED for form in new.values()]
        memory = HostMemory(sum(sizes), self._device)
        strip.memories.append(memory)
        starts = accumulate(sizes, initial=0)
        for (name, form), start in zip(new.items(), starts, strict=False):
            strip.slots[name] = _Parked(form, memory, start)

    def _move(self, place: _Place, out: _Parked | None, into: _Parked | None) -> None:
        """Queue the copies of one layer: out of `place` to a host's side, and then into it."""
        if self._streams is None:
            _copy(place, out, is_out=True)
            _copy(place, into, is_out=False)
            return
        leaving, coming = self._streams
        with torch.cuda.stream(leaving):
            _copy(place, out, is_out=True)
        coming.wait_event(leaving.record_event())
        with torch.cuda.stream(coming):
            _copy(place, into, is_out=False)
            place.moved = coming.record_event()


def _bytes_on(device: torch.device, size: int) -> torch.Tensor:
    # Also within inference mode an ordinary tensor: a caller may leave that mode between frames.
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, device=device)


def _copy(place: _Place, kept: _Parked | None, *, is_out: bool) -> None:
    """Copy between `place` and the host, beside the computation where the memory allows that."""
    if kept is None:
        return
    ends = kept.bytes, place.memory[: kept.form.nbytes]
    target, source = ends if is_out else reversed(ends)
    target.copy_(source, non_blocking=kept.memory.is_locked)


class _PlacedCache(FeatureCache):
    """The history of the strip at work, in the places of a `StripHistories`."""

    def __init__(self, histories: StripHistories, slots: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._histories = histories
        self._slots = slots

    def take(self, slot: str, x: torch.Tensor, frames: int) -> torch.Tensor:
        self._histories.wait(slot)
        return super().take(slot, x, frames)

    def peek(self, slot: str) -> torch.Tensor | None:
        self._histories.wait(slot)
        return super().peek(slot)

    def pop(self, slot: str) -> torch.Tensor | None:
        self._histories.wait(slot)
        return super().pop(slot)

    def store(self, slot: str, history: torch.Tensor) -> None:
        super().store(slot, self._histories.put(slot, history))
