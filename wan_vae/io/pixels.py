"""Pixels on their way to the device: pass by pass, never the whole clip.

A clip that lies in host memory stays there. Each pass fetches its frames, of a strip only its rows,
as they lie in memory; scaling and rounding happen on the device, where they take no time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from .. import layout
from ..geometry import Window
from .image import LockedMemory, bits, copy_threads, pieces_of

# Device memory for so many passes of pixels: one is filled while the other is read.
STAGING_BUFFERS = 2


@runtime_checkable
class FrameReader(Protocol):
    """A video that is read piece by piece, such as a `video_read.Clip`, and never held whole.

    shape: [1, C, T, H, W]. white: the value of white; black is 0.
    """

    white: int

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, first: int, last: int) -> torch.Tensor:
        """Frames [first, last) as [1, C, t, H, W], on the CPU. Pieces are asked for in order, and
        from the start again where the run starts over."""
        ...


class ReadWindow:
    """The part of a video that is encoded, cut out of each piece that is read."""

    def __init__(self, reader: FrameReader, window: Window):
        self._reader, self._window = reader, window
        self.white = reader.white
        rows, columns = window.rows, window.columns
        b, c, *_ = reader.shape
        self.shape = (b, c, window.frames, rows.stop - rows.start, columns.stop - columns.start)
        self.device = torch.device("cpu")

    def part(self, first: int, last: int, rows: slice) -> torch.Tensor:
        """Frames [first, last) and `rows` of the window."""
        piece = self._reader.read(first, last)
        return piece[:, :, :, self._window.rows, self._window.columns][:, :, :, rows]


@dataclass
class _Buffer:
    """Device memory for the pixels of one pass, and when the device has read them."""

    memory: torch.Tensor
    is_read: torch.cuda.Event


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
        jobs = [
            self._pool.submit(self._piece, source[place], target[place])
            for _, place in pieces_of(target)
        ]
        wait(jobs)
        for job in jobs:
            job.result()

    def _piece(self, source: torch.Tensor, target: torch.Tensor) -> None:
        # Each thread has its own inference mode; see `image.HostWriter`.
        with torch.inference_mode():
            self._move(source, target)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


@dataclass
class _Locked:
    """Page-locked memory for a piece, and when the device has read it."""

    memory: LockedMemory = field(default_factory=LockedMemory)
    is_read: torch.cuda.Event | None = None


class _ToDevice:
    """Moves pieces from any thread to CUDA memory, on `stream`: each thread fills one page-locked
    buffer while the device reads the other."""

    def __init__(self, stream: torch.cuda.Stream):
        self._stream = stream
        self._own = threading.local()

    def __call__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if not hasattr(self._own, "buffers"):
            # A thread begins with device 0, where leaving a stream of another would make a context.
            torch.cuda.set_device(self._stream.device)
            self._own.buffers = [_Locked(), _Locked()]
        locked: _Locked = self._own.buffers.pop(0)
        self._own.buffers.append(locked)
        if locked.is_read is not None:
            locked.is_read.synchronize()
        staged = locked.memory.like(target)
        np.copyto(bits(staged), bits(source))
        locked.is_read = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._stream):
            target.copy_(staged, non_blocking=True)
            locked.is_read.record(self._stream)


class PixelSource:
    """The pixels of a clip, frames at a time, on `device` in `dtype` and in [-1, 1].

    pixels: [B, 3, T, H, W] in [-1, 1], or with `unit_range` in [0, 1], on any device, with any
    strides; or a video that is read. From host memory to CUDA the copy of a pass runs beside the
    computation of the one before, on a stream of its own, by threads.
    """

    def __init__(
        self,
        pixels: torch.Tensor | ReadWindow,
        device: torch.device,
        dtype: torch.dtype,
        *,
        unit_range: bool = False,
    ):
        self._pixels = pixels.detach() if isinstance(pixels, torch.Tensor) else pixels
        self.device, self.dtype = device, dtype
        self.unit_range = unit_range
        self._lowest: torch.Tensor | None = None
        self._highest: torch.Tensor | None = None
        self._is_staged = device.type == "cuda" and pixels.device.type == "cpu"
        self._stream = torch.cuda.Stream(device) if self._is_staged else None
        self._buffers: list[_Buffer] = []
        self._threads: PieceThreads | None = None

    def fetch(self, first: int, last: int, rows: slice = slice(None)) -> torch.Tensor:
        """Frames [first, last) and `rows` of every video, [B, 3, t, h, W]."""
        if isinstance(self._pixels, torch.Tensor):
            part = self._pixels[:, :, first:last, rows]
        else:
            part = self._pixels.part(first, last, rows)
        if part.dtype == torch.float64 and not self._is_staged:
            part = part.float()  # where they are: MPS has no float64
        buffer: _Buffer | None = None
        if self._is_staged:
            buffer, x = self._stage(part)
        else:
            x = part.to(self.device)
        self._look_at(x)
        white = self._white
        if white is not None:
            x = x.float().div(white / 2).sub_(1.0)
        elif self.unit_range:
            # As ComfyUI does it: in float32, doubled and then moved, both exact but for the end.
            x = x.float().mul(2.0).sub_(1.0)
        x = x.to(self.dtype, copy=buffer is not None and white is None and not self.unit_range)
        if buffer is not None:
            buffer.is_read.record(torch.cuda.current_stream(self.device))
        return x

    @property
    def rows(self) -> int:
        """Rows of the pixels."""
        return self._pixels.shape[3]

    @property
    def _white(self) -> int | None:
        return None if isinstance(self._pixels, torch.Tensor) else self._pixels.white

    def release(self) -> None:
        """Give back the device memory of the buffers, and end the threads: after the last `fetch`,
        or before the first one of another attempt."""
        self._buffers.clear()
        if self._threads is not None:
            self._threads.close()
            self._threads = None

    def extremes(self) -> tuple[float, float] | None:
        """The smallest and the largest value that was fetched, NaN if there was one, in [-1, 1]
        where they are as expected; None before the first `fetch`. Waits for the device."""
        if self._lowest is None or self._highest is None:
            return None
        lowest, highest = torch.stack((self._lowest, self._highest)).tolist()
        white = self._white
        if white is not None:
            return (lowest / (white / 2) - 1, highest / (white / 2) - 1)
        return (2 * lowest - 1, 2 * highest - 1) if self.unit_range else (lowest, highest)

    def _look_at(self, x: torch.Tensor) -> None:
        """Keep the extremes of all values, on the device; NaN stays NaN."""
        low, high = (extreme.float() for extreme in x.aminmax())
        if self._lowest is not None and self._highest is not None:
            low = torch.minimum(low, self._lowest)
            high = torch.maximum(high, self._highest)
        self._lowest, self._highest = low, high

    def _stage(self, part: torch.Tensor) -> tuple[_Buffer, torch.Tensor]:
        """`part` in a buffer on the device, and the view of it that has the shape of `part`."""
        assert self._stream is not None
        if self._threads is None:
            self._threads = PieceThreads(copy_threads(os.cpu_count()), _ToDevice(self._stream))
        order = layout.memory_order(part)
        # Dense memory and one dtype: the copy moves bytes, and all else happens on the device.
        dense = part.permute(order)
        current = torch.cuda.current_stream(self.device)
        buffer = self._free_buffer(part, current)
        memory = buffer.memory[: part.numel()].view(dense.shape)
        self._stream.wait_event(buffer.is_read)
        # The host goes on as soon as it has read `part`: the next one is fetched while the device
        # computes.
        try:
            self._threads.copy(dense, memory)
        finally:  # also before memory of a failed copy is given back
            current.wait_stream(self._stream)
        back = sorted(range(len(order)), key=order.__getitem__)
        return buffer, memory.permute(back)

    def _free_buffer(self, part: torch.Tensor, current: torch.cuda.Stream) -> _Buffer:
        """The buffer that was used longest ago, or a new one that is large enough."""
        assert self._stream is not None
        buffer = self._buffers.pop(0) if len(self._buffers) == STAGING_BUFFERS else None
        if buffer is None or buffer.memory.numel() < part.numel():
            buffer = None  # freed before the larger one is made
            memory = torch.empty(part.numel(), dtype=part.dtype, device=self.device)
            buffer = _Buffer(memory, torch.cuda.Event())
            # What had this memory before may not be done with it.
            buffer.is_read.record(current)
        self._buffers.append(buffer)
        return buffer
