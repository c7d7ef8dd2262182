"""Where pixels go: a preallocated tensor, a callback, or (in `video_write`) a file.

A sink gets each block of the picture once, as soon as it is final: whole frames in order or, if the
decode goes in strips to save memory, a strip of rows of all frames at a time. If memory runs out
while whole frames are decoded, a sink that takes strips gets these frames again, in strips; the
values are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Protocol, runtime_checkable

import torch

from ..device import is_out_of_memory
from ..errors import DecodeMemoryError, OutputError
from ..report import VideoRecord
from ..said import said
from .tensors import missing_data

# Reserves memory for a part of an output, before that part is written.
Reserve = Callable[[torch.Tensor], None]


@runtime_checkable
class Sink(Protocol):
    """Receives pixels [B, 3, t, rows, W'] float32 in [-1, 1] on the device that made them.

    A decode ends with `close` or with `abort`. `abort` may be called twice, and after a `close`
    that failed.

    `needs_whole_frames` is true for sinks that cannot take strips of rows (a video file); strips
    are then assembled to frames first.
    """

    needs_whole_frames: bool

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        """Take pixels of frames [start_frame, start_frame + t), rows from `first_row` on."""
        ...

    def close(self) -> None:
        """All pixels were written: flush, wait for copies, give the result its name."""
        ...

    def abort(self) -> None:
        """The decode failed or was cancelled: release resources, remove partial files."""
        ...


def sink_bytes(sink: Sink) -> int:
    """Bytes of the whole output that `sink` holds in memory: its `output_bytes`, or 0.

    A sink of a caller need not have the attribute: a stream that keeps nothing holds 0 bytes.
    """
    size: int = getattr(sink, "output_bytes", 0)
    return size


def sink_video(sink: Sink) -> VideoRecord | None:
    """What `sink` tells of the video that it writes: its `video`, or None."""
    record: VideoRecord | None = getattr(sink, "video", None)
    return record


def is_copying(sink: Sink) -> bool:
    """Whether threads of `sink` copy what was written, for which `close` does nothing but wait: its
    `is_copying`, or False. Who closes it may wait for the device before."""
    copying: bool = getattr(sink, "is_copying", False)
    return copying


class TensorSink:
    """Writes pixels into one preallocated tensor, which may be on another device.

    `reserve` is called with each part of the tensor before it is written. A pinned host tensor is
    filled asynchronously; `close` waits for the copies.
    """

    needs_whole_frames = False

    def __init__(self, out: torch.Tensor, reserve: Reserve | None = None):
        self.out, self._reserve = out, reserve
        self.output_bytes = out.numel() * out.element_size()
        self._devices: set[torch.device] = set()

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        """Copy the pixels to their place."""
        frames, rows = pixels.shape[2], pixels.shape[3]
        part = self.out[:, :, start_frame : start_frame + frames, first_row : first_row + rows]
        if self._reserve is not None:
            self._reserve(part)
        is_asynchronous = pixels.is_cuda and self.out.is_pinned()
        part.copy_(pixels, non_blocking=is_asynchronous)
        if is_asynchronous:
            self._devices.add(pixels.device)

    def close(self) -> None:
        """Wait for the copies."""
        for device in self._devices:
            torch.cuda.synchronize(device)

    abort = close


class CallbackSink:
    """Calls `callback(pixels, start_frame, first_row)` for each block; whole frames by default.

    The memory of the pixels may be used again after the call: copy what must be kept.
    """

    def __init__(
        self,
        callback: Callable[[torch.Tensor, int, int], None],
        needs_whole_frames: bool = True,
    ):
        self._callback = callback
        self.needs_whole_frames = needs_whole_frames

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        """Call the callback."""
        self._callback(pixels, start_frame, first_row)

    def close(self) -> None:
        """Nothing to flush."""

    def abort(self) -> None:
        """Nothing to undo."""


def rgb_of(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 1, 3 or 4, ...] in [-1, 1] as [B, 3, ...]: grey is repeated, alpha is flattened on
    white."""
    if pixels.shape[1] == 1:
        return pixels.expand(-1, 3, *pixels.shape[2:])
    if pixels.shape[1] == 3:
        return pixels
    opacity = (pixels[:, 3:] + 1) / 2
    return (pixels[:, :3] - 1) * opacity + 1


class RgbSink:
    """Gives another sink three colours: grey is repeated, alpha is flattened on white."""

    def __init__(self, sink: Sink):
        self._sink = sink
        self.needs_whole_frames, self.output_bytes = sink.needs_whole_frames, sink_bytes(sink)

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        """Pass pixels [B, 1 or 4, t, rows, W'] on as [B, 3, t, rows, W']."""
        self._sink.write(rgb_of(pixels), start_frame, first_row)

    def finish(self) -> None:
        """Finish the other sink, if it has a first phase of closing."""
        finish: Callable[[], None] | None = getattr(self._sink, "finish", None)
        if finish is not None:
            finish()

    def close(self) -> None:
        """Close the other sink."""
        self._sink.close()

    def abort(self) -> None:
        """Abort the other sink."""
        self._sink.abort()


def with_colours(sink: Sink, channels: int, *, keeps_alpha: bool = False) -> Sink:
    """`sink` for pixels of `channels`: itself, or a sink in front that makes three of them."""
    return sink if channels == 3 or (channels == 4 and keeps_alpha) else RgbSink(sink)


class NullSink:
    """Drops all pixels: for a rank whose copy of the picture is not needed."""

    needs_whole_frames = False

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        """Drop the pixels."""

    def close(self) -> None:
        """Nothing to flush."""

    def abort(self) -> None:
        """Nothing to undo."""


def room_for(
    shape: Sequence[int], dtype: torch.dtype, make: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """`make()`, which allocates all pixels of a result. Raises DecodeMemoryError."""
    try:
        return make()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    raise DecodeMemoryError(
        said(
            "run.no_room_for_pixels",
            "the decoded pixels {shape} take {size} GiB, and that much memory is not free: write "
            "them to a video, of which a few frames are held at a time, or decode fewer frames",
            shape=tuple(shape),
            size=f"{prod(shape) * dtype.itemsize / 2**30:.1f}",
        )
    )


# The dtypes that can hold pixels; float8 keeps only two or three bits of them.
_OUT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_out(out: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise OutputError unless `out` is a dense floating tensor of exactly `shape`.

    16 to 64 bits, any strides and device; no two elements may share memory.
    """
    if not isinstance(out, torch.Tensor):
        raise OutputError(f"out is a {type(out).__name__}: expected a torch.Tensor")
    if kind := missing_data(out):
        raise OutputError(f"out is a {kind} tensor: expected a dense one, with memory")
    if tuple(out.shape) != tuple(shape) or out.dtype not in _OUT_DTYPES:
        raise OutputError(
            f"out is {tuple(out.shape)} of {out.dtype}: expected {tuple(shape)} of 16 to 64 "
            "floating bits"
        )
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise OutputError(
            "out was made in torch.inference_mode, outside of which PyTorch writes nothing into "
            "it: make it outside too, or decode inside"
        )
    reach = 0  # of the dimensions with smaller strides: the next stride must be longer
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise OutputError(
                f"out has strides {out.stride()}: an expanded view, or elements that share memory"
            )
        reach += (size - 1) * stride
