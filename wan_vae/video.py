"""Pixels to files and back: mp4 through PyAV, folders of PNG frames, contact sheets, safetensors.

File sinks stream: one chunk of frames is in memory, never the clip. Results appear under their
name only when they are whole; a failed or cancelled decode leaves nothing behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .errors import LatentError, OutputError
from .sink import sink_bytes

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov")
# Encoders of H.264 in order of preference; which ones exist depends on how FFmpeg was built.
_ENCODERS = ("libx264", "libopenh264", "h264", "mpeg4")


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """[3, t, H, W] float in [-1, 1] -> [t, H, W, 3] uint8 on the host, rounded to nearest."""
    scaled = (pixels.float() + 1) * 127.5
    return scaled.round().clamp(0, 255).byte().permute(1, 2, 3, 0).contiguous().cpu().numpy()


def open_sink(path: Path, shape: tuple[int, ...], fps: float):
    """The sink that `path`'s name asks for. `shape` is the pixels' [B, 3, T, H, W].

    .mp4 / .mkv / .mov: a video. .png: one image (one frame only). .safetensors: the float pixels.
    No suffix: a folder of PNG frames. Raises OutputError for anything else, and for batches
    where a file holds one sample.
    """
    if shape[0] != 1 and path.suffix != ".safetensors":
        raise OutputError(
            f"{path}: the latent is a batch of {shape[0]}: write it to a .safetensors file, or "
            "split it"
        )
    if path.suffix in VIDEO_SUFFIXES:
        return VideoFileSink(path, shape[3], shape[4], fps)
    if path.suffix == ".png":
        if shape[2] != 1:
            raise OutputError(
                f"{path}: {shape[2]} frames do not fit one .png: write .mp4, or a folder of frames"
            )
        return ImageFileSink(path)
    if path.suffix == ".safetensors":
        return PixelFileSink(path, shape)
    if path.suffix == "":
        return FrameFolderSink(path)
    raise OutputError(
        f"{path}: unknown kind of output {path.suffix!r}: expected .mp4, .mkv, .mov, .png, "
        ".safetensors, or a folder"
    )


@contextmanager
def _writing(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Turn what a full disk, a missing right or an impossible name raises into OutputError."""
    try:
        yield
    except (OSError, SafetensorError, *more) as error:
        reason = getattr(error, "strerror", None) or _line(error)
        raise OutputError(f"{path}: cannot be written: {reason}") from error


def partial_path(path: Path, *, is_folder: bool = False) -> Path:
    """Where `path` is written until it is whole; beside it, so that the rename is atomic."""
    with _writing(path):
        if not is_folder and path.is_dir():
            raise OutputError(f"{path}: is a folder: name a file in it")
        if path.parent.exists() and not path.parent.is_dir():
            raise OutputError(f"{path}: {path.parent.name} is a file, not a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.stem}.partial{path.suffix}")


class VideoFileSink:
    """H.264 video, yuv420p, BT.709, streamed. Odd sizes gain one repeated row or column."""

    needs_whole_frames = True

    def __init__(self, path: Path, height: int, width: int, fps: float):
        import av

        self.path, self.partial = Path(path), partial_path(Path(path))
        # Containers count frames in 32-bit ticks; nobody watches faster, or slower, than this.
        if not 0.01 <= fps <= 1000:
            raise OutputError(f"{path}: {fps} frames a second: expected 0.01 to 1000")
        rate = Fraction(fps).limit_denominator(1001)
        self.warnings: list[str] = []
        self._pad = (height % 2, width % 2)
        if any(self._pad):
            self.warnings.append(f"{width}x{height} is odd: the last row or column is repeated")
        name = next((n for n in _ENCODERS if n in av.codecs_available), None)
        if name is None:
            raise OutputError(f"{path}: this PyAV has no H.264 encoder: write a folder of frames")
        if name == "mpeg4":
            self.warnings.append("this PyAV has no H.264 encoder: wrote MPEG-4 part 2")
        with _writing(self.path, av.FFmpegError):
            self._file = av.open(str(self.partial), mode="w")
        options = {"crf": "16", "preset": "medium"} if name == "libx264" else {}
        self._stream = self._file.add_stream(name, rate=rate, options=options)
        self._stream.height, self._stream.width = height + self._pad[0], width + self._pad[1]
        self._stream.pix_fmt = "yuv420p"
        # BT.709 in FFmpeg's numbering: matrix 1, limited range 1.
        self._stream.codec_context.colorspace = 1
        self._stream.codec_context.color_primaries = 1
        self._stream.codec_context.color_trc = 1
        self._stream.codec_context.color_range = 1
        self._av = av

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        for picture in to_uint8(pixels[0]):
            if any(self._pad):
                picture = np.pad(picture, ((0, self._pad[0]), (0, self._pad[1]), (0, 0)), "edge")
            frame = self._av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            self._put(frame)

    def close(self) -> None:
        self._put(None)
        with _writing(self.path, self._av.FFmpegError):
            self._file.close()
            self.partial.replace(self.path)

    def _put(self, frame) -> None:
        """Encode one frame, or what the encoder still holds (None), and write the packets."""
        with _writing(self.path, self._av.FFmpegError):
            for packet in self._stream.encode(frame):
                self._file.mux(packet)

    def abort(self) -> None:
        # The trailer of an incomplete file may fail to be written; the file goes away anyway.
        with suppress(OSError, self._av.FFmpegError):
            self._file.close()
        self.partial.unlink(missing_ok=True)


class FrameFolderSink:
    """A folder of frame_000000.png, ...; a folder that exists must be empty or hold such frames."""

    needs_whole_frames = True

    def __init__(self, path: Path):
        self.path = Path(path)
        self.partial = partial_path(self.path, is_folder=True)
        with _writing(self.path):
            if self.path.exists() and (
                not self.path.is_dir()
                or any(not f.name.startswith("frame_") for f in self.path.iterdir())
            ):
                raise OutputError(f"{path}: exists and is not a folder of frames: name another one")
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir()

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        for i, picture in enumerate(to_uint8(pixels[0])):
            save_png(picture, self.partial / f"frame_{start_frame + i:06d}.png")

    def close(self) -> None:
        with _writing(self.path):
            if self.path.exists():
                shutil.rmtree(self.path)
            self.partial.replace(self.path)

    def abort(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


class ImageFileSink:
    """One frame as one PNG."""

    needs_whole_frames = True

    def __init__(self, path: Path):
        self.path, self.partial = Path(path), partial_path(Path(path))

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        save_png(to_uint8(pixels[0])[0], self.partial)

    def close(self) -> None:
        with _writing(self.path):
            self.partial.replace(self.path)

    def abort(self) -> None:
        self.partial.unlink(missing_ok=True)


class PixelFileSink:
    """The float32 pixels [B, 3, T, H, W] as tensor `pixels`; holds the clip on the host."""

    needs_whole_frames = False

    def __init__(self, path: Path, shape: tuple[int, ...]):
        self.path, self.partial = Path(path), partial_path(Path(path))
        self.pixels = torch.empty(shape)
        self.output_bytes = self.pixels.numel() * 4

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        t, rows = pixels.shape[2], pixels.shape[3]
        self.pixels[:, :, start_frame : start_frame + t, first_row : first_row + rows] = pixels

    def close(self) -> None:
        with _writing(self.path):
            save_file({"pixels": self.pixels}, str(self.partial))
            self.partial.replace(self.path)

    def abort(self) -> None:
        self.partial.unlink(missing_ok=True)


class TeeSink:
    """Hands every piece to several sinks."""

    def __init__(self, *sinks):
        self.sinks = sinks
        self.needs_whole_frames = any(s.needs_whole_frames for s in sinks)
        self.output_bytes = sum(sink_bytes(s) for s in sinks)

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        for sink in self.sinks:
            sink.write(pixels, start_frame, first_row)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()

    def abort(self) -> None:
        for sink in self.sinks:
            sink.abort()


class ContactSheetSink:
    """Keeps `count` evenly spaced frames as uint8 and writes them side by side as one PNG."""

    needs_whole_frames = True

    def __init__(self, path: Path, total_frames: int, count: int = 6):
        self.path = Path(path)
        count = min(count, total_frames)
        last = total_frames - 1
        self._wanted = {round(i * last / max(1, count - 1)) for i in range(count)}
        self._kept: list[np.ndarray] = []

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        for i in range(pixels.shape[2]):
            if start_frame + i in self._wanted:
                self._kept.append(to_uint8(pixels[0, :, i : i + 1])[0])

    def close(self) -> None:
        partial = partial_path(self.path)
        save_png(np.concatenate(self._kept, axis=1), partial)
        partial.replace(self.path)

    def abort(self) -> None:
        """Nothing was written yet."""


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write [H, W, 3] uint8 as PNG. Raises OutputError."""
    from PIL import Image

    with _writing(path):
        Image.fromarray(picture).save(path, format="PNG")


def read_pixels(path: Path) -> torch.Tensor:
    """A video or image file as float32 pixels [1, 3, T, H, W] in [-1, 1]. Raises LatentError."""
    if not path.is_file():
        raise LatentError(f"{path}: no such file")
    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
        from PIL import Image, UnidentifiedImageError

        try:
            frames = [np.asarray(Image.open(path).convert("RGB"))]
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise LatentError(f"{path}: not a readable image: {_line(error)}") from error
    else:
        import av

        try:
            with av.open(str(path)) as file:
                frames = [f.to_ndarray(format="rgb24") for f in file.decode(video=0)]
        except (av.FFmpegError, OSError, ValueError, IndexError) as error:
            raise LatentError(f"{path}: not a readable video: {_line(error)}") from error
    if not frames:
        raise LatentError(f"{path}: the video has no frames")
    stacked = torch.from_numpy(np.stack(frames))
    return (stacked.float() / 127.5 - 1).permute(3, 0, 1, 2).unsqueeze(0)


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
