"""Pixels on their way to the device: pass by pass, never the whole clip.

A clip that lies in host memory stays there. Each pass fetches its frames, of a strip only its rows,
as they lie in memory; scaling and rounding happen on the device, where they take no time. On CUDA
the frames of the next passes come while the host launches a pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from .. import layout
from ..geometry import Window
from .staging import Buffer, CudaStaging, Staging
from .tensors import Extremes

# Device memory for so many passes of pixels: one is filled while the other is read.
STAGING_BUFFERS = 2
# Passes of a file that are read before they are asked for: host memory for one more is enough, as
# one thread reads.
_READ_AHEAD = 1
# First frame, last frame and rows of what is fetched at a time.
Part = tuple[int, int, slice]
# Called with n before frames [0, n) are read; returns when they are there.
WaitForFrames = Callable[[int], None]


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
        from the start again where the run starts over. By one thread at a time, which need not be
        the caller's; by none after the run."""
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
class _Coming:
    """Pixels that a thread brings. job: returns them as they lie on the host, when they are in
    `buffer` on the device; None is for those of a file, of whose numbers nothing is known yet."""

    part: Part
    buffer: Buffer | None
    job: Future[torch.Tensor]


class PixelSource:
    """The pixels of a clip, frames at a time, on `device` in `dtype` and in [-1, 1].

    pixels: [B, 3, T, H, W] in [-1, 1], or with `unit_range` in [0, 1], on any device, with any
    strides; or a video that is read. await_frames: for a tensor that others still write. staging:
    how pixels go to a device while it computes; the default is that of `device`, if it has one.

    From host memory to CUDA, threads bring what `expect` was told of before it is asked for: a
    tensor's frames to `STAGING_BUFFERS` buffers on the device, and those of a file to the host.
    """

    def __init__(
        self,
        pixels: torch.Tensor | ReadWindow,
        device: torch.device,
        dtype: torch.dtype,
        *,
        unit_range: bool = False,
        await_frames: WaitForFrames | None = None,
        staging: Staging | None = None,
    ):
        self._pixels = pixels
        if isinstance(pixels, torch.Tensor):
            self._pixels = pixels.detach().resolve_neg()  # bytes are copied, not numbers
        self.device, self.dtype = device, dtype
        self.unit_range = unit_range
        self._await_frames = await_frames
        self._extremes = Extremes()
        if staging is None and device.type == "cuda" and pixels.device.type == "cpu":
            staging = CudaStaging(device)
        self._staging = staging
        self._expected: Iterator[Part] | None = None
        # What threads bring, in the order in which it was expected; and what nobody reads.
        self._coming: deque[_Coming] = deque()
        self._ahead: ThreadPoolExecutor | None = None
        self._buffers: list[Buffer] = []
        self._free: list[Buffer] = []

    def expect(self, parts: Iterable[Part]) -> None:
        """Say all that `fetch` will be called for, in its order, until `release`."""
        self._expected = iter(parts)

    def fetch(self, first: int, last: int, rows: slice = slice(None)) -> torch.Tensor:
        """Frames [first, last) and `rows` of every video, [B, 3, t, h, W].

        Raises what reading raises, and RuntimeError for a part that is not the expected one.
        """
        wanted, staging = (first, last, rows), self._staging
        buffer: Buffer | None = None
        if staging is not None:
            buffer, x = self._staged(staging, wanted)
        else:
            if self._expected is not None:
                _compare(next(self._expected, None), wanted)
            part = self._part(wanted)
            if part.dtype == torch.float64:
                part = part.float()  # where they are: MPS has no float64
            x = part.to(self.device)
        self._extremes.see(x)
        white = self._white
        if white is not None:
            x = x.float().div(white / 2).sub_(1.0)
        elif self.unit_range:
            # As ComfyUI does it: in float32, doubled and then moved, both exact but for the end.
            x = x.float().mul(2.0).sub_(1.0)
        x = x.to(self.dtype, copy=buffer is not None and white is None and not self.unit_range)
        if staging is not None and buffer is not None:
            staging.end_reading(buffer)
            self._free.append(buffer)
            buffer = None  # which the next pass may find too small, and free
            self._start_ahead(staging)
        return x

    @property
    def rows(self) -> int:
        """Rows of the pixels."""
        return self._pixels.shape[3]

    @property
    def _white(self) -> int | None:
        return None if isinstance(self._pixels, torch.Tensor) else self._pixels.white

    def release(self) -> None:
        """End the threads, forget what was expected, and give back the device memory: after the
        last `fetch`, or before the first one of another attempt."""
        self._expected = None
        if self._ahead is not None:
            self._ahead.shutdown(wait=True, cancel_futures=True)
            self._ahead = None
        if self._staging is not None:
            self._staging.close()
        self._coming.clear()
        self._free.clear()
        self._buffers.clear()

    def extremes(self) -> tuple[float, float] | None:
        """The smallest and the largest value that was fetched, NaN if there was one, in [-1, 1]
        where they are as expected; None before the first `fetch`. Waits for the device."""
        found = self._extremes.read()
        if found is None:
            return None
        lowest, highest = found
        white = self._white
        if white is not None:
            return (lowest / (white / 2) - 1, highest / (white / 2) - 1)
        return (2 * lowest - 1, 2 * highest - 1) if self.unit_range else (lowest, highest)

    def _part(self, part: Part) -> torch.Tensor:
        """`part` on the host, read from a file or once it is there."""
        first, last, rows = part
        if not isinstance(self._pixels, torch.Tensor):
            return self._pixels.part(first, last, rows)
        if self._await_frames is not None:
            self._await_frames(last)
        return self._pixels[:, :, first:last, rows]

    # -- to the device while it computes -------------------------------------------------------

    def _staged(self, staging: Staging, wanted: Part) -> tuple[Buffer, torch.Tensor]:
        """`wanted` in a buffer on the device, and the view of it that has its shape."""
        if not self._coming:
            expected = wanted if self._expected is None else next(self._expected, None)
            _compare(expected, wanted)
            self._start(staging, wanted)
        coming = self._coming.popleft()
        _compare(coming.part, wanted)
        self._start_ahead(staging)
        host, buffer = coming.job.result(), coming.buffer
        order = layout.memory_order(host)
        if buffer is None:
            buffer = self._buffer_for(staging, host)
            staging.fill(buffer, host.permute(order))
        staging.begin_reading(buffer)
        lies = [host.shape[dim] for dim in order]
        back = sorted(range(len(order)), key=order.__getitem__)
        return buffer, buffer.memory[: host.numel()].view(lies).permute(back)

    def _start_ahead(self, staging: Staging) -> None:
        """Let threads bring what comes next, as far as there is room for it."""
        is_read = not isinstance(self._pixels, torch.Tensor)
        while self._expected is not None:
            has_room = self._free or len(self._buffers) < STAGING_BUFFERS
            if len(self._coming) >= _READ_AHEAD if is_read else not has_room:
                return
            part = next(self._expected, None)
            if part is None:
                return
            self._start(staging, part)

    def _start(self, staging: Staging, part: Part) -> None:
        """Let a thread bring `part`. One thread for all, so that they come in order."""
        if self._ahead is None:
            self._ahead = ThreadPoolExecutor(1, "wan_vae_ahead", staging.enter)
        buffer: Buffer | None = None
        if isinstance(self._pixels, torch.Tensor):
            first, last, rows = part
            buffer = self._buffer_for(staging, self._pixels[:, :, first:last, rows])
        job = self._ahead.submit(self._bring, staging, part, buffer)
        self._coming.append(_Coming(part, buffer, job))

    def _bring(self, staging: Staging, part: Part, buffer: Buffer | None) -> torch.Tensor:
        """Read `part`, and copy it to `buffer` if that is known; in the thread."""
        host = self._part(part)
        if buffer is not None:
            staging.fill(buffer, host.permute(layout.memory_order(host)))
        return host

    def _buffer_for(self, staging: Staging, host: torch.Tensor) -> Buffer:
        """The buffer that was read longest ago, or a new one that is large enough."""
        buffer: Buffer | None = None
        if len(self._buffers) == STAGING_BUFFERS:
            buffer = self._free.pop(0)
            self._buffers.remove(buffer)
        if (
            buffer is None
            or buffer.memory.dtype != host.dtype
            or buffer.memory.numel() < host.numel()
        ):
            del buffer  # freed before the larger one is made
            buffer = staging.allocate(host.numel(), host.dtype)
        self._buffers.append(buffer)
        return buffer


def _compare(expected: Part | None, wanted: Part) -> None:
    """Raise RuntimeError unless `wanted` is what was expected: its pixels would be others."""
    if expected != wanted:
        raise RuntimeError(f"pixels {wanted} are fetched where {expected} were expected")
