"""Sinks that write files: videos (`video_sink`), PNG images and folders of them, safetensors.

The sinks of videos and images stream: they hold one chunk of frames, never the whole clip. A result
gets its name when it is complete; a failed or cancelled decode leaves nothing behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError

from ..errors import OutputError
from ..report import VideoRecord
from .file_sink import FileSink
from .files import check_output, import_package, writing
from .sink import Sink, room_for, sink_bytes, sink_video
from .tensors import save_tensors
from .video_sink import VideoFileSink

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov")
_FRAME_NAME = re.compile(r"frame_\d{6,}\.png")


def to_uint8(pixels: torch.Tensor) -> npt.NDArray[np.uint8]:
    """[3, t, H, W] float in [-1, 1] -> [t, H, W, 3] uint8 on the host, rounded to nearest."""
    scaled = (pixels.float() + 1) * 127.5
    levels = scaled.round().clamp(0, 255).byte().permute(1, 2, 3, 0).contiguous()
    picture: npt.NDArray[np.uint8] = levels.cpu().numpy()
    return picture


def check_sink(path: Path) -> None:
    """Raise OutputError if `open_sink` has no sink for this name, for pixels of any shape."""
    suffix = path.suffix.lower()
    # check_output also refuses incomplete names ("out.", ".mp4").
    check_output(path, is_folder=suffix == "")
    if suffix not in (*VIDEO_SUFFIXES, ".png", ".safetensors", ""):
        raise OutputError(
            f"{path}: unknown kind of output {path.suffix!r}: expected .mp4, .mkv, .mov, .png, "
            ".safetensors, or a folder"
        )
    if suffix == "":
        _old_frames(path)
    if suffix in VIDEO_SUFFIXES:
        import_package("av", "av", path, OutputError)
    elif suffix != ".safetensors":
        import_package("PIL.Image", "Pillow", path, OutputError)


def open_sink(path: Path, shape: tuple[int, ...], fps: float) -> FileSink:
    """Make the sink that the name of `path` asks for. shape: [B, 3, T, H, W] of the pixels.

    .mp4 / .mkv / .mov: a video. .png: one image (one frame only). .safetensors: the float pixels.
    No suffix: a folder of PNG frames. Raises OutputError for anything else, and for a batch if the
    file holds one sample.
    """
    check_sink(path)
    suffix = path.suffix.lower()
    if shape[0] != 1 and suffix != ".safetensors":
        raise OutputError(
            f"{path}: the latent is a batch of {shape[0]}: write to a .safetensors file, or split "
            "the batch"
        )
    if suffix in VIDEO_SUFFIXES:
        return VideoFileSink(path, shape[3], shape[4], fps)
    if suffix == ".png":
        if shape[2] != 1:
            raise OutputError(
                f"{path}: {shape[2]} frames do not fit one .png: write to .mp4, or to a folder of "
                "frames"
            )
        return ImageFileSink(path)
    if suffix == ".safetensors":
        return PixelFileSink(path, shape)
    return FrameFolderSink(path)


def _old_frames(folder: Path) -> list[Path]:
    """The frames in `folder`. Raises OutputError if it is a file, or contains anything else."""
    with writing(folder):
        if not folder.exists():
            return []
        frames = list(folder.iterdir()) if folder.is_dir() else None
        if frames is None or not all(
            _FRAME_NAME.fullmatch(f.name) and f.is_file() and not f.is_symlink() for f in frames
        ):
            raise OutputError(
                f"{folder}: exists and is not a folder of frames: choose another name"
            )
    return frames


class FrameFolderSink(FileSink):
    """A folder of frame_000000.png, ...; an existing one must be empty or contain only such frames.

    No other file is ever removed from it. A symbolic link to a folder means that folder.
    """

    def __init__(self, path: Path):
        path = Path(path)
        with writing(path, RuntimeError):  # RuntimeError: a link to itself, before Python 3.13
            path = path.resolve() if path.is_symlink() else path
        if path.is_symlink():
            raise OutputError(f"{path}: cannot be written: a link to itself")
        _old_frames(path)
        super().__init__(path, is_folder=True)

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        for i, picture in enumerate(to_uint8(pixels[0])):
            save_png(picture, self._partial.path / f"frame_{start_frame + i:06d}.png")

    def _finish(self) -> None:
        """Each frame has been written."""

    def close(self) -> None:
        with writing(self.path):
            for frame in _old_frames(self.path):
                frame.unlink()
            if self.path.exists():
                self.path.rmdir()  # fails if somebody has put another file in it meanwhile
        super().close()


class ImageFileSink(FileSink):
    """One frame as one PNG."""

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        save_png(to_uint8(pixels[0])[0], self._partial.path)

    def _finish(self) -> None:
        """The frame has been written."""


class PixelFileSink(FileSink):
    """The float32 pixels [B, 3, T, H, W] as tensor `pixels`; holds the clip in host memory."""

    needs_whole_frames = False

    def __init__(self, path: Path, shape: tuple[int, ...]):
        # Explicit: the caller may have changed torch's default dtype or device.
        make = partial(torch.empty, shape, dtype=torch.float32, device="cpu")
        self.pixels = room_for(shape, torch.float32, make)
        super().__init__(path)
        self.output_bytes = self.pixels.numel() * 4

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        t, rows = pixels.shape[2], pixels.shape[3]
        self.pixels[:, :, start_frame : start_frame + t, first_row : first_row + rows] = pixels

    def _finish(self) -> None:
        with writing(self.path, SafetensorError):
            save_tensors({"pixels": self.pixels}, self._partial.path)


class TeeSink:
    """Passes each block of pixels to several sinks, whose results appear together or not at all.

    Closing has two phases: all sinks finish (a sink of a caller need not have `finish`), then all
    results get their names. A full disk fails in the first phase, before a result has appeared.
    Only a rename that fails in the second one can leave earlier results, each of them complete.
    """

    def __init__(self, *sinks: Sink):
        self.sinks = sinks
        self.needs_whole_frames = any(s.needs_whole_frames for s in sinks)
        self.output_bytes = sum(sink_bytes(s) for s in sinks)

    @property
    def video(self) -> VideoRecord | None:
        """Of the first sink that writes a video."""
        return next((video for s in self.sinks if (video := sink_video(s))), None)

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        for sink in self.sinks:
            sink.write(pixels, start_frame, first_row)

    def close(self) -> None:
        for sink in self.sinks:
            finish: Callable[[], None] | None = getattr(sink, "finish", None)
            if finish is not None:
                finish()
        for sink in self.sinks:
            sink.close()

    def abort(self) -> None:
        with ExitStack() as stack:  # aborts all sinks, also if one of them fails
            for sink in self.sinks:
                stack.callback(sink.abort)


class ContactSheetSink(FileSink):
    """Writes `count` evenly spaced frames side by side as one PNG; holds these frames as uint8."""

    def __init__(self, path: Path, total_frames: int, count: int = 6):
        super().__init__(path)
        count = min(count, total_frames)
        last = total_frames - 1
        self._wanted = {round(i * last / max(1, count - 1)) for i in range(count)}
        self._frames: list[npt.NDArray[np.uint8]] = []

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        for i in range(pixels.shape[2]):
            if start_frame + i in self._wanted:
                self._frames.append(to_uint8(pixels[0, :, i : i + 1])[0])

    def _finish(self) -> None:
        save_png(np.concatenate(self._frames, axis=1), self._partial.path)


def save_png(picture: npt.NDArray[np.uint8], path: Path) -> None:
    """Write [H, W, 3] uint8 as PNG. Raises OutputError."""
    image = import_package("PIL.Image", "Pillow", path, OutputError)
    with writing(path):
        image.fromarray(picture).save(path, format="PNG")
