"""Sinks of videos: pixels become YUV on their device, and the encoder runs beside the decode.

    decode -> YUV 4:2:0 on the device -> frames in flight (host memory, bounded) -> encoder's thread

Whoever is faster waits for the other: the decode for a free frame, the encoder for a full one. An
error or a cancel on one side ends the other at once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt
import torch

from ..errors import DecodeCancelled, WanVAEError
from ..hooks import ShouldStop
from ..report import VideoRecord
from ..said import said
from .file_sink import FileSink
from .video_encode import Container, VideoEncoder, VideoSettings
from .yuv import even, frame_rows, to_yuv420

# Host memory for frames on their way to the encoder: at least two, so that one can be filled while
# the other is read, and no more than a chunk of a usual size has.
FLIGHT_BYTES, _FEWEST, _MOST = 128 << 20, 2, 32
# How long a wait lasts before the decode asks whether it is to stop, seconds.
_ASK_S = 0.1


def frames_in_flight(frame_bytes: int) -> int:
    """How many frames of `frame_bytes` wait for the encoder at most."""
    return max(_FEWEST, min(_MOST, FLIGHT_BYTES // frame_bytes))


@dataclass(frozen=True)
class _Buffer:
    """Host memory of one frame, as a tensor (pinned for CUDA) and as an array."""

    tensor: torch.Tensor
    array: npt.NDArray[np.generic]


@dataclass(frozen=True)
class _Filled:
    """A frame in `buffer`, complete on `arrived` if that is not None."""

    buffer: _Buffer
    arrived: torch.cuda.Event | None


class EncodingThread:
    """Frames of one size on their way from the decode's thread to `encoder` in a thread of its own.

    should_stop: asked while the decode waits for the encoder; true raises DecodeCancelled.
    """

    def __init__(
        self, encoder: VideoEncoder, height: int, width: int, should_stop: ShouldStop | None
    ):
        self._encoder, self._should_stop = encoder, should_stop
        self._shape = (frame_rows(height), width)
        self._dtype = torch.uint8 if encoder.bit_depth == 8 else torch.int16
        frame_bytes = self._shape[0] * width * self._dtype.itemsize
        self._limit = frames_in_flight(frame_bytes)
        self.flight_bytes = self._limit * frame_bytes
        self._made = 0
        self._decode_waited_s = self._encoder_waited_s = 0.0
        self._frames = 0
        self._free: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[_Filled | None] = queue.SimpleQueue()
        # Set when the thread is to end without another frame, and when it has ended.
        self._stop, self._ended = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self._is_complete = False
        self._thread = threading.Thread(target=self._work, name="wan_vae_encode", daemon=True)
        self._thread.start()

    @property
    def record(self) -> VideoRecord:
        """What ran, and who waited for whom until now."""
        return VideoRecord(
            encoder=self._encoder.encoder,
            frames=self._frames,
            waited_for_encoder_ms=self._decode_waited_s * 1e3,
            waited_for_decoder_ms=self._encoder_waited_s * 1e3,
            flight_bytes=self.flight_bytes,
            fps=self._encoder.fps,
        )

    # -- the decode's thread -----------------------------------------------------------------------

    def put(self, planes: torch.Tensor) -> None:
        """Send a frame as `yuv.to_yuv420` makes it, on any device. Waits for a free buffer.

        Raises what the encoder's thread raised, or DecodeCancelled.
        """
        buffer = self._take_buffer(planes.is_cuda)
        buffer.tensor.copy_(planes, non_blocking=planes.is_cuda)
        arrived = None
        if planes.is_cuda:
            # Else the thread that waits for it would keep a core busy, which x264 could use.
            arrived = torch.cuda.Event(blocking=True)
            arrived.record(torch.cuda.current_stream(planes.device))
        self._filled.put(_Filled(buffer, arrived))

    def finish(self) -> None:
        """Wait until the encoder has written everything. Raises as `put` does."""
        self._filled.put(None)
        started = time.perf_counter()
        while not self._ended.wait(_ASK_S):
            self._ask()
        self._decode_waited_s += time.perf_counter() - started
        if not self._is_complete:
            self._raise_failure()
        self._thread.join()

    def stop(self) -> None:
        """End the thread without another frame; raises nothing. Also after `finish`."""
        self._stop.set()
        self._filled.put(None)
        self._thread.join()

    def _take_buffer(self, pinned: bool) -> _Buffer:
        if self._ended.is_set():
            self._raise_failure()
        if self._made < self._limit and self._free.empty():
            self._made += 1
            tensor = torch.empty(self._shape, dtype=self._dtype, device="cpu", pin_memory=pinned)
            return _Buffer(tensor, tensor.numpy())
        started = time.perf_counter()
        while True:
            try:
                buffer = self._free.get(timeout=_ASK_S)
                break
            except queue.Empty:
                self._ask()
        self._decode_waited_s += time.perf_counter() - started
        if buffer is None:
            self._raise_failure()
        return cast("_Buffer", buffer)

    def _ask(self) -> None:
        if self._should_stop is not None and self._should_stop():
            raise DecodeCancelled(
                said("video.cancelled", "cancelled while the decode waited for the video's encoder")
            )

    def _raise_failure(self) -> None:
        """Raise what ended the thread before its time."""
        raise self._failure or RuntimeError("the thread that encodes the video has ended")

    # -- the encoder's thread ----------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._encode_all()
        except (WanVAEError, RuntimeError, ValueError, OSError, MemoryError) as error:
            self._failure = error  # raised in the decode's thread
        finally:
            self._ended.set()
            self._free.put(None)  # wakes a decode that waits

    def _encode_all(self) -> None:
        while (filled := self._next()) is not None:
            self._encoder.put(filled.buffer.array)
            self._frames += 1
            self._free.put(filled.buffer)
        if not self._stop.is_set():
            self._encoder.finish()
            self._is_complete = True

    def _next(self) -> _Filled | None:
        """The next frame, complete in host memory; None at the end, or when it is time to stop."""
        started = time.perf_counter()
        filled = self._filled.get()
        if filled is not None and filled.arrived is not None:
            filled.arrived.synchronize()
        self._encoder_waited_s += time.perf_counter() - started
        return None if self._stop.is_set() else filled


class _Frames:
    """Pixels [1, 3, t, H, W] cut into YUV frames for the thread of `encoder`."""

    def __init__(
        self, encoder: VideoEncoder, height: int, width: int, should_stop: ShouldStop | None
    ):
        self.encoder = encoder
        self.thread = EncodingThread(encoder, height, width, should_stop)

    def write(self, pixels: torch.Tensor) -> None:
        # One after another: the conversion then takes the memory of one frame, however long a chunk
        # is.
        for frame in pixels[0].unbind(1):
            self.thread.put(to_yuv420(frame, self.encoder.bit_depth))

    def abort(self) -> None:
        self.thread.stop()
        self.encoder.abort()


class _VideoSink:
    """What a video in a file and one in a stream do alike: frames go to the encoder's thread."""

    _frames: _Frames

    @property
    def video(self) -> VideoRecord:
        return self._frames.thread.record

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        self._frames.write(pixels)


class VideoFileSink(_VideoSink, FileSink):
    """A video file, BT.709 in limited range, streamed. Odd sizes gain one repeated row or column.

    H.264 unless `settings` say otherwise. container: None takes that of the suffix. should_stop:
    asked while the decode waits for the encoder. names: see `FileSink`. `video` tells what ran, and
    who waited for whom.
    """

    def __init__(
        self,
        path: Path,
        height: int,
        width: int,
        fps: float,
        settings: VideoSettings | None = None,
        *,
        container: Container | None = None,
        names: Iterable[Path] = (),
        should_stop: ShouldStop | None = None,
    ):
        if container is None:
            container = cast("Container", path.suffix.lower().removeprefix("."))
        size = even(height), even(width)
        super().__init__(path, names=names)
        with ExitStack() as failed:
            failed.callback(self._partial.discard)
            encoder = VideoEncoder(
                self._partial.path,
                container,
                size,
                fps,
                settings or VideoSettings(),
                self.path,
            )
            failed.pop_all()
        if size != (height, width):
            self.warnings.append(
                said(
                    "video.odd",
                    "{size} is odd: the last row or column is repeated",
                    size=f"{width}x{height}",
                )
            )
        self.warnings += encoder.warnings
        self._frames = _Frames(encoder, *size, should_stop)

    def _finish(self) -> None:
        self._frames.thread.finish()

    def abort(self) -> None:
        self._frames.abort()
        super().abort()


class VideoStreamSink(_VideoSink):
    """A video into an open file, which need not have a name; see `VideoFileSink`."""

    needs_whole_frames = True

    def __init__(
        self,
        target: BinaryIO,
        container: Container,
        height: int,
        width: int,
        fps: float,
        settings: VideoSettings,
        *,
        should_stop: ShouldStop | None = None,
    ):
        size = even(height), even(width)
        encoder = VideoEncoder(target, container, size, fps, settings)
        self.warnings = encoder.warnings
        self._frames = _Frames(encoder, *size, should_stop)

    def close(self) -> None:
        self._frames.thread.finish()

    def abort(self) -> None:
        self._frames.abort()
