"""Pixels to files and back: mp4 through PyAV, folders of PNG frames, contact sheets, safetensors.

File sinks stream: one chunk of frames is in memory, never the clip. Results appear under their
name only when they are whole; a failed or cancelled decode leaves nothing behind.
"""

from __future__ import annotations

import importlib
import re
import struct
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors import SafetensorError

from ..errors import LatentError, OutputError, WanVAEError, first_line
from .files import Partial, check_output, save_tensors, why_unreadable, writing
from .sink import sink_bytes

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Encoders of H.264 in order of preference; which ones exist depends on how FFmpeg was built.
_ENCODERS = ("libx264", "libopenh264", "h264", "mpeg4")
_FRAME_NAME = re.compile(r"frame_\d{6,}\.png")


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """[3, t, H, W] float in [-1, 1] -> [t, H, W, 3] uint8 on the host, rounded to nearest."""
    scaled = (pixels.float() + 1) * 127.5
    return scaled.round().clamp(0, 255).byte().permute(1, 2, 3, 0).contiguous().cpu().numpy()


def _imported(module: str, package: str, path: Path, error: type[WanVAEError]) -> ModuleType:
    """`module` of the installable `package`, or `error` about the `path` that needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as trouble:
        raise error(
            f"{path}: needs {package}, which cannot be imported ({first_line(trouble)}): "
            f"pip install {package}"
        ) from trouble


def check_sink(path: Path) -> None:
    """Raise OutputError unless `open_sink` has a sink for this name, whatever the pixels are."""
    suffix = path.suffix.lower()
    # A name without a file's name before the suffix ("out.", ".mp4") is for check_output to refuse.
    check_output(path, is_folder=suffix == "")
    if suffix not in (*VIDEO_SUFFIXES, ".png", ".safetensors", ""):
        raise OutputError(
            f"{path}: unknown kind of output {path.suffix!r}: expected .mp4, .mkv, .mov, .png, "
            ".safetensors, or a folder"
        )
    if suffix == "":
        _old_frames(path)
    if suffix in VIDEO_SUFFIXES:
        _imported("av", "av", path, OutputError)
    elif suffix != ".safetensors":
        _imported("PIL.Image", "Pillow", path, OutputError)


def open_sink(path: Path, shape: tuple[int, ...], fps: float):
    """The sink that `path`'s name asks for. `shape` is the pixels' [B, 3, T, H, W].

    .mp4 / .mkv / .mov: a video. .png: one image (one frame only). .safetensors: the float pixels.
    No suffix: a folder of PNG frames. Raises OutputError for anything else, and for batches
    where a file holds one sample.
    """
    check_sink(path)
    suffix = path.suffix.lower()
    if shape[0] != 1 and suffix != ".safetensors":
        raise OutputError(
            f"{path}: the latent is a batch of {shape[0]}: write it to a .safetensors file, or "
            "split it"
        )
    if suffix in VIDEO_SUFFIXES:
        return VideoFileSink(path, shape[3], shape[4], fps)
    if suffix == ".png":
        if shape[2] != 1:
            raise OutputError(
                f"{path}: {shape[2]} frames do not fit one .png: write .mp4, or a folder of frames"
            )
        return ImageFileSink(path)
    if suffix == ".safetensors":
        return PixelFileSink(path, shape)
    return FrameFolderSink(path)


class _FileSink:
    """What sinks of one file or folder share: written beside its name, renamed when whole."""

    needs_whole_frames = True

    def __init__(self, path: Path, *, is_folder: bool = False):
        self.path = Path(path)
        self._partial = Partial(self.path, is_folder=is_folder)
        self._is_finished = False

    def finish(self) -> None:
        """Write all that is still held. What can fail for a full disk fails here, not in close."""
        if not self._is_finished:
            self._finish()
            self._is_finished = True

    def close(self) -> None:
        """Finish, and give the result its name."""
        self.finish()
        self._partial.publish()

    def abort(self) -> None:
        """Remove what was written; harmless after another abort, or after close."""
        self._partial.discard()

    def _finish(self) -> None:
        """Nothing is held."""


class VideoFileSink(_FileSink):
    """H.264 video, yuv420p, BT.709, streamed. Odd sizes gain one repeated row or column."""

    def __init__(self, path: Path, height: int, width: int, fps: float):
        self._av = av = _imported("av", "av", path, OutputError)
        rate = _frame_rate(path, fps)
        self.warnings: list[str] = []
        self._pad = (height % 2, width % 2)
        if any(self._pad):
            self.warnings.append(f"{width}x{height} is odd: the last row or column is repeated")
        name = next((n for n in _ENCODERS if n in av.codecs_available), None)
        if name is None:
            raise OutputError(f"{path}: this PyAV has no H.264 encoder: write a folder of frames")
        if name == "mpeg4":
            self.warnings.append("this PyAV has no H.264 encoder: wrote MPEG-4 part 2")
        super().__init__(path)
        try:
            with writing(self.path, av.FFmpegError):
                self._file = av.open(_for_ffmpeg(self._partial.path), mode="w")
        except OutputError:
            self._partial.discard()
            raise
        options = {"crf": "16", "preset": "medium"} if name == "libx264" else {}
        self._stream = self._file.add_stream(name, rate=rate, options=options)
        self._stream.height, self._stream.width = height + self._pad[0], width + self._pad[1]
        self._stream.pix_fmt = "yuv420p"
        # BT.709 in FFmpeg's numbering: matrix 1, limited range 1.
        self._stream.codec_context.colorspace = 1
        self._stream.codec_context.color_primaries = 1
        self._stream.codec_context.color_trc = 1
        self._stream.codec_context.color_range = 1

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        for picture in to_uint8(pixels[0]):
            if any(self._pad):
                picture = np.pad(picture, ((0, self._pad[0]), (0, self._pad[1]), (0, 0)), "edge")
            frame = self._av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            self._put(frame)

    def _finish(self) -> None:
        self._put(None)
        with writing(self.path, self._av.FFmpegError):
            self._file.close()

    def _put(self, frame) -> None:
        """Encode one frame, or what the encoder still holds (None), and write the packets."""
        with writing(self.path, self._av.FFmpegError):
            for packet in self._stream.encode(frame):
                self._file.mux(packet)

    def abort(self) -> None:
        # The trailer of an incomplete file may fail to be written; the file goes away anyway.
        with suppress(OSError, self._av.FFmpegError):
            self._file.close()
        super().abort()


def _frame_rate(path: Path, fps: float) -> Fraction:
    """`fps` of any library as a fraction of small numbers. Raises OutputError."""
    try:
        value = None if isinstance(fps, (str, bytes)) else float(fps)
    except (TypeError, ValueError):
        value = None
    # Containers count frames in 32-bit ticks; nobody watches faster, or slower, than this.
    if value is None or not 0.01 <= value <= 1000:
        raise OutputError(f"{path}: {fps!r} frames a second: expected a number, 0.01 to 1000")
    return Fraction(value).limit_denominator(1001)


def _for_ffmpeg(path: Path) -> str:
    """`path` as FFmpeg must be told it: in a relative one, `10:30.mp4`, it reads a protocol."""
    return str(path.absolute())


def _old_frames(folder: Path) -> list[Path]:
    """The frames in `folder`. Raises OutputError if it is a file, or holds anything else."""
    with writing(folder):
        if not folder.exists():
            return []
        frames = list(folder.iterdir()) if folder.is_dir() else None
        if frames is None or not all(
            _FRAME_NAME.fullmatch(f.name) and f.is_file() and not f.is_symlink() for f in frames
        ):
            raise OutputError(f"{folder}: exists and is not a folder of frames: name another one")
    return frames


class FrameFolderSink(_FileSink):
    """A folder of frame_000000.png, ...; a folder that exists must be empty or hold such frames.

    Nothing but such frames is ever removed from it. A link to a folder stands for that folder.
    """

    def __init__(self, path: Path):
        path = Path(path)
        with writing(path, RuntimeError):  # RuntimeError: a link that leads to itself
            path = path.resolve() if path.is_symlink() else path
        _old_frames(path)
        super().__init__(path, is_folder=True)

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        for i, picture in enumerate(to_uint8(pixels[0])):
            save_png(picture, self._partial.path / f"frame_{start_frame + i:06d}.png")

    def close(self) -> None:
        with writing(self.path):
            for frame in _old_frames(self.path):
                frame.unlink()
            if self.path.exists():
                self.path.rmdir()  # refuses if something else came to lie in it meanwhile
        super().close()


class ImageFileSink(_FileSink):
    """One frame as one PNG."""

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        save_png(to_uint8(pixels[0])[0], self._partial.path)


class PixelFileSink(_FileSink):
    """The float32 pixels [B, 3, T, H, W] as tensor `pixels`; holds the clip on the host."""

    needs_whole_frames = False

    def __init__(self, path: Path, shape: tuple[int, ...]):
        # Said, because a caller may have set other defaults.
        self.pixels = torch.empty(shape, dtype=torch.float32, device="cpu")
        self.output_bytes = self.pixels.numel() * 4
        super().__init__(path)

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        t, rows = pixels.shape[2], pixels.shape[3]
        self.pixels[:, :, start_frame : start_frame + t, first_row : first_row + rows] = pixels

    def _finish(self) -> None:
        with writing(self.path, SafetensorError):
            save_tensors({"pixels": self.pixels}, self._partial.path)


class TeeSink:
    """Hands every piece to several sinks, which appear together or not at all.

    Closing has two phases: all finish (a sink of a caller need not have `finish`), then all get
    their names. A full disk fails in the first, and nothing has appeared; only a rename that
    fails at the very end can leave earlier results, each of them whole.
    """

    def __init__(self, *sinks):
        self.sinks = sinks
        self.needs_whole_frames = any(s.needs_whole_frames for s in sinks)
        self.output_bytes = sum(sink_bytes(s) for s in sinks)

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        for sink in self.sinks:
            sink.write(pixels, start_frame, first_row)

    def close(self) -> None:
        for sink in self.sinks:
            if hasattr(sink, "finish"):
                sink.finish()
        for sink in self.sinks:
            sink.close()

    def abort(self) -> None:
        with ExitStack() as stack:  # one that fails does not keep the others from it
            for sink in self.sinks:
                stack.callback(sink.abort)


class ContactSheetSink(_FileSink):
    """Keeps `count` evenly spaced frames as uint8 and writes them side by side as one PNG."""

    def __init__(self, path: Path, total_frames: int, count: int = 6):
        super().__init__(path)
        count = min(count, total_frames)
        last = total_frames - 1
        self._wanted = {round(i * last / max(1, count - 1)) for i in range(count)}
        self._kept: list[np.ndarray] = []

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        for i in range(pixels.shape[2]):
            if start_frame + i in self._wanted:
                self._kept.append(to_uint8(pixels[0, :, i : i + 1])[0])

    def _finish(self) -> None:
        save_png(np.concatenate(self._kept, axis=1), self._partial.path)


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write [H, W, 3] uint8 as PNG. Raises OutputError."""
    image = _imported("PIL.Image", "Pillow", path, OutputError)
    with writing(path):
        image.fromarray(picture).save(path, format="PNG")


def read_pixels(path: Path) -> torch.Tensor:
    """A video or image file as float32 pixels [1, 3, T, H, W] in [-1, 1], upright.

    Upright: turned and mirrored as the file's EXIF orientation or display matrix says, which is
    how every viewer shows it. Raises LatentError.
    """
    if reason := why_unreadable(path):
        raise LatentError(f"{path}: {reason}")
    is_image = path.suffix.lower() in IMAGE_SUFFIXES
    frames, white = _read_image(path) if is_image else (_read_video(path), 255)
    if not frames:
        raise LatentError(f"{path}: the video has no frames")
    sizes = sorted({f.shape for f in frames})
    if len(sizes) > 1:
        named = ", ".join(f"{w}x{h}" for h, w, _ in sizes)
        raise LatentError(f"{path}: frames of {len(sizes)} sizes ({named}): expected one size")
    stacked = torch.from_numpy(np.stack(frames))
    return (stacked.float() / (white / 2) - 1).permute(3, 0, 1, 2).unsqueeze(0)


def _read_image(path: Path) -> tuple[list[np.ndarray], int]:
    """One picture [H, W, 3], and the number that stands for white in it."""
    _imported("PIL.Image", "Pillow", path, LatentError)
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            mode = image.mode
            if mode != "F" and not mode.startswith("I"):
                return [np.asarray(image.convert("RGB"))], 255
            grey = np.asarray(image)
    except (
        UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError,
        EOFError, struct.error,
    ) as error:  # fmt: skip
        raise LatentError(f"{path}: not a readable image: {first_line(error)}") from error
    # Pillow's "I" holds 16-bit greyscale too, and its own way to RGB cuts both off at 255.
    if mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise LatentError(
            f"{path}: an image of mode {mode}, whose white is unknown: save it with 8 or 16 bits"
        )
    return [np.repeat(grey.astype(np.float32)[..., None], 3, axis=2)], 65535


def _read_video(path: Path) -> list[np.ndarray]:
    """The frames [H, W, 3] uint8 of the first video stream."""
    av = _imported("av", "av", path, LatentError)
    try:
        with av.open(_for_ffmpeg(path)) as file:
            return [_upright(f, path) for f in file.decode(video=0)]
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise LatentError(f"{path}: not a readable video: {first_line(error)}") from error


def _upright(frame, path: Path) -> np.ndarray:
    """The pixels of a frame, turned and mirrored as its display matrix says."""
    from av.sidedata.sidedata import Type

    picture = frame.to_ndarray(format="rgb24")
    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return picture
    # Column x and row y are shown at column a x + c y and row b x + d y, in 16.16 fixed point.
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    if (a or d) and (b or c):
        raise LatentError(
            f"{path}: its frames are turned by {frame.rotation} degrees: expected a multiple of 90"
        )
    if b or c:
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
