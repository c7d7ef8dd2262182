"""Where pixels go: a preallocated tensor, a callback, or (in `video`) a file.

A sink gets each piece of the picture once, as soon as it is final: whole frames in order, or, when
memory forced strips, a band of rows of every frame at a time. Where memory runs out on the way to
whole frames, a sink that takes bands gets those frames again, the same, in bands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch

from ..errors import OutputError
from .checkpoint import without_data

# Makes room for a part of an output before it is written.
Claim = Callable[[torch.Tensor], None]


@runtime_checkable
class Sink(Protocol):
    """Receives pixels [B, 3, t, rows, W'] float32 in [-1, 1] on the device that made them.

    A decode ends in `close`, or in `abort`, which may come twice and after a failed `close`.

    `needs_whole_frames` is true for sinks that cannot take bands of rows (a video file); strips
    are then assembled to frames first.
    """

    needs_whole_frames: bool

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        """Take pixels of frames [start_frame, start_frame + t), rows from `first_row` on."""
        ...

    def close(self) -> None:
        """All was written: flush, wait for copies, move the result into place."""
        ...

    def abort(self) -> None:
        """The decode failed or was cancelled: release resources, remove partial files."""
        ...


def sink_bytes(sink: Sink) -> int:
    """Bytes of the whole output that `sink` holds in memory: its `output_bytes`, or 0.

    Sinks of callers need not have the attribute: a stream that keeps nothing holds 0.
    """
    return getattr(sink, "output_bytes", 0)


class TensorSink:
    """Writes into one preallocated tensor, which may live on another device.

    `claim` is called with each part of it before it is written. A pinned host tensor is filled
    asynchronously; `close` waits for the copies.
    """

    needs_whole_frames = False

    def __init__(self, out: torch.Tensor, claim: Claim | None = None):
        self.out, self._claim = out, claim
        self.output_bytes = out.numel() * out.element_size()
        self._devices: set[torch.device] = set()

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        frames, rows = pixels.shape[2], pixels.shape[3]
        place = self.out[:, :, start_frame : start_frame + frames, first_row : first_row + rows]
        if self._claim is not None:
            self._claim(place)
        asynchronous = pixels.is_cuda and self.out.is_pinned()
        place.copy_(pixels, non_blocking=asynchronous)
        if asynchronous:
            self._devices.add(pixels.device)

    def close(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device)

    abort = close


class CallbackSink:
    """Hands each piece to `callback(pixels, start_frame, first_row)`; whole frames by default."""

    def __init__(
        self,
        callback: Callable[[torch.Tensor, int, int], None],
        needs_whole_frames: bool = True,
    ):
        self.write = callback
        self.needs_whole_frames = needs_whole_frames

    def close(self) -> None:
        """Nothing to flush."""

    def abort(self) -> None:
        """Nothing to undo."""


class NullSink:
    """Drops the pixels: the sink of a rank that gets no picture."""

    needs_whole_frames = False

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        """Drop them."""

    def close(self) -> None:
        """Nothing to flush."""

    def abort(self) -> None:
        """Nothing to undo."""


# What pixels are worth storing in; float8 keeps two or three bits of them.
_OUT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_out(out: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise OutputError unless `out` is a tensor of exactly `shape`, each element in memory once.

    Of 16 to 64 floating bits, of any strides and device.
    """
    if not isinstance(out, torch.Tensor):
        raise OutputError(f"out is a {type(out).__name__}: expected a torch.Tensor")
    if kind := without_data(out):
        raise OutputError(f"out is a {kind} tensor: expected a dense one, with memory")
    if tuple(out.shape) != tuple(shape) or out.dtype not in _OUT_DTYPES:
        raise OutputError(
            f"out is {tuple(out.shape)} of {out.dtype}: expected {tuple(shape)} of 16 to 64 "
            "floating bits"
        )
    reach = 0  # of the dimensions of smaller strides: what a step must be longer than
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise OutputError(
                f"out has strides {out.stride()}: an expanded view, or elements that share memory"
            )
        reach += (size - 1) * stride
