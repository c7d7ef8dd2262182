"""Videos and pictures to encode: read from a file frame by frame, turned upright.

`open_clip` says what a file holds; the clip that it gives is read as often as needed and keeps no
frame, so that a long video never lies in memory.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import LatentError, first_line
from .files import ffmpeg_name, import_package, unreadable_reason
from .kinds import kind_of, what_is_it

if TYPE_CHECKING:
    from av import VideoFrame

# One frame: [H, W, 3], or [H, W, 4] with alpha.
Frame = npt.NDArray[Any]
# Formats of which Pillow knows several pictures that are the frames of one clip. In others (layers
# of a Photoshop file, the two of a stereo JPEG) the first one is the picture.
_ANIMATED = ("WEBP", "PNG", "GIF", "AVIF", "TIFF", "HEIF", "JXL", "FLI")
# FFmpeg's numbers of matrices, and its scale filter's names. BT.601 has two numbers.
_MATRICES = {
    1: "bt709",
    4: "fcc",
    5: "bt601",
    6: "bt601",
    7: "smpte240m",
    9: "bt2020",
    10: "bt2020",
}
_UNTAGGED, _FULL_RANGE = 2, 2
# FFmpeg's numbers of the transfer functions of high dynamic range: PQ and HLG.
_HDR = (16, 18)
# FFmpeg's flag of a stream that is the cover of a song, and the decoders of codecs whose alpha its
# own decoders leave out.
_ATTACHED_PICTURE = 0x400
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Untagged pictures of this size are taken as BT.709, smaller ones as BT.601, as players do it.
_HD_ROWS, _HD_COLUMNS = 720, 1280


class Clip(ABC):
    """Frames of a file: shape [1, 3 or 4, T, H, W], read in order, from the start again if asked.

    has_alpha: whether the file holds alpha that is not opaque everywhere. `colours` says how many
    channels are given: 4 keeps alpha (opaque where there is none), 3 flattens it on white.
    white: of the deepest frame; the frames of a file may have 8 and 16 bits.
    warnings: sentences for the user.
    """

    def __init__(self, path: Path):
        self.path = path
        self.colours, self.has_alpha = 3, False
        self.warnings: list[str] = []
        self.white = 255
        self.frames, self.height, self.width = 0, 0, 0
        self._position = 0
        self._pending: Iterator[Frame] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[1, C, T, H, W]."""
        return (1, self.colours, self.frames, self.height, self.width)

    def with_colours(self, colours: int) -> Clip:
        """Give pictures with (4) or without (3) alpha from now on; warns where that loses any."""
        self.colours = colours
        if colours == 3 and self.has_alpha:
            self.warnings.append("transparent pixels are flattened on white: the VAE has no alpha")
        return self

    def read(self, first: int, last: int) -> torch.Tensor:
        """Frames [first, last) as [1, C, t, H, W], from 0 to `white`; uint8, or float32 of 16 bits.

        Raises LatentError.
        """
        if self._pending is None or first < self._position:
            self.close()
            self._pending, self._position = self._read_all(), 0
        while self._position < first:
            self._next()
        taken = np.stack([self._next() for _ in range(first, last)])
        frames = torch.from_numpy(taken if self.white == 255 else taken.astype(np.float32))
        return frames.permute(3, 0, 1, 2).unsqueeze(0)

    def close(self) -> None:
        """Close the file; `read` opens it again."""
        if self._pending is not None:
            closing = getattr(self._pending, "close", None)
            if closing is not None:
                closing()
            self._pending = None

    def _next(self) -> Frame:
        assert self._pending is not None
        frame = next(self._pending, None)
        if frame is None:
            raise LatentError(
                f"{self.path}: ended after {self._position} of {self.frames} frames: it changed"
            )
        self._position += 1
        if _white_of(frame) < self.white:  # another frame is deeper
            frame = frame.astype(np.uint16) * (self.white // _white_of(frame))
        return _colours(frame, self.colours, self.white)

    @abstractmethod
    def _read_all(self) -> Iterator[Frame]:
        """All frames, from the first one on, upright."""

    def _measure(self) -> None:
        """Go through all frames once: how many, of one size. Raises LatentError."""
        sizes: dict[tuple[int, int], None] = {}
        for frame in self._read_all():
            self.frames += 1
            sizes[frame.shape[:2]] = None
            self.white = max(self.white, _white_of(frame))
            if not self.has_alpha and frame.shape[2] == 4:
                self.has_alpha = bool((frame[..., 3] != _white_of(frame)).any())
        if not sizes:
            raise LatentError(f"{self.path}: the video has no frames")
        if len(sizes) > 1:
            listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
            raise LatentError(
                f"{self.path}: frames of {len(sizes)} sizes ({listed}): expected one size"
            )
        ((self.height, self.width),) = sizes


def open_clip(path: Path) -> Clip:
    """Open a video, an animation or a picture, by its content. Raises LatentError.

    Upright: rotated and mirrored as the EXIF orientation or the display matrix of the file says,
    which is how viewers show it.
    """
    if reason := unreadable_reason(path):
        raise LatentError(f"{path}: {reason}")
    try:
        kind = kind_of(path)
        with path.open("rb") as file:
            start = file.read(25)
    except OSError as error:
        raise LatentError(f"{path}: cannot be read: {error.strerror or error}") from error
    if kind is not None and kind.group not in ("picture", "video"):
        raise LatentError(f"{path}: {kind.instead_of('video')}")
    # Pillow halves the bits of a PNG of 16-bit colours.
    deep_png = start[:8] == b"\x89PNG\r\n\x1a\n" and start[24:25] == b"\x10" and _has_colours(path)
    if deep_png or (kind is not None and kind.group == "video"):
        clip: Clip = VideoClip(path)
    else:
        clip = PictureClip(path) if _pillow_reads(path) else VideoClip(path, may_be_picture=True)
    clip._measure()
    return clip


def read_pixels(path: Path, colours: int = 3) -> torch.Tensor:
    """Read a whole file as float32 pixels [1, colours, T, H, W] in [-1, 1]; see `open_clip`."""
    clip = open_clip(path).with_colours(colours)
    try:
        return clip.read(0, clip.frames).float() / (clip.white / 2) - 1
    finally:
        clip.close()


def _white_of(frame: Frame) -> int:
    """The value of white in `frame`, of 8 or 16 bits."""
    return 255 if frame.dtype == np.uint8 else 65535


def _colours(frame: Frame, colours: int, white: int) -> Frame:
    """A frame with `colours` channels: alpha is added, or flattened on white."""
    if frame.shape[2] == colours:
        return frame
    if colours == 4:
        opaque = np.full((*frame.shape[:2], 1), white, frame.dtype)
        return np.concatenate((frame, opaque), axis=2)
    opacity = frame[..., 3:].astype(np.float32) / white
    flat = frame[..., :3] * opacity + white * (1 - opacity)
    return np.round(flat).astype(frame.dtype)


# -- pictures, through Pillow ----------------------------------------------------------------------


def _pillow_reads(path: Path) -> bool:
    """Whether Pillow knows the format of `path`. Raises LatentError without Pillow."""
    import_package("PIL.Image", "Pillow", path, LatentError)
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path):
            return True
    except UnidentifiedImageError:
        return False
    except _pillow_errors():
        return True  # reading it says what is wrong


def _pillow_errors() -> tuple[type[Exception], ...]:
    from PIL import Image, UnidentifiedImageError

    return (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        MemoryError,
        struct.error,
    )


class PictureClip(Clip):
    """A picture, or an animation of several, that Pillow reads."""

    def _read_all(self) -> Iterator[Frame]:
        from PIL import Image

        try:
            with Image.open(self.path) as file:
                for index in self._indices(file):
                    file.seek(index)
                    yield self._frame(file)
        except _pillow_errors() as error:
            raise LatentError(f"{self.path}: not a readable image: {first_line(error)}") from error

    def _indices(self, file: Any) -> range:
        count = getattr(file, "n_frames", 1)
        if count > 1 and file.format not in _ANIMATED:
            note = f"the first of {count} pictures in the {file.format} file is taken"
            if note not in self.warnings:
                self.warnings.append(note)
            return range(1)
        # The first picture of an APNG may be there for viewers that do not animate.
        return range(1 if count > 1 and getattr(file, "default_image", False) else 0, count)

    def _frame(self, file: Any) -> Frame:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(file)
        mode = image.mode
        if mode == "F" or mode.startswith("I"):
            return self._deep_grey(np.asarray(image), mode)
        transparent = "A" in image.getbands() or "transparency" in image.info or mode == "PA"
        return np.asarray(image.convert("RGBA" if transparent else "RGB"))

    def _deep_grey(self, grey: Frame, mode: str) -> Frame:
        # Modes "I" and "I;16" hold 16-bit greyscale; Pillow's conversion to RGB would clip it at
        # 255.
        if mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise LatentError(
                f"{self.path}: an image of mode {mode}, whose value of white is unknown: save it "
                "with 8 or 16 bits"
            )
        return np.repeat(grey.astype(np.uint16)[..., None], 3, axis=2)


def _has_colours(path: Path) -> bool:
    """Whether a PNG has colours: of greyscale, Pillow keeps 16 bits."""
    with path.open("rb") as file:
        return file.read(26)[25:26] in (b"\x02", b"\x06")


# -- videos, through FFmpeg ------------------------------------------------------------------------


@dataclass
class _Conversion:
    """FFmpeg's filters from the frames of one format to RGB, and where they begin and end."""

    graph: Any
    key: tuple[object, ...]
    is_deep: bool
    # What white and opaque are among the 16 bits that come out; FFmpeg only shifts.
    white: int
    opaque: int


class VideoClip(Clip):
    """The first video stream of a file that FFmpeg reads."""

    def __init__(self, path: Path, *, may_be_picture: bool = False):
        super().__init__(path)
        self._av = import_package("av", "av", path, LatentError)
        self._what = "image" if may_be_picture and kind_group(path) == "picture" else "video"

    def _read_all(self) -> Iterator[Frame]:
        av, count, damaged = self._av, 0, list[int]()
        try:
            with av.open(ffmpeg_name(self.path)) as file:
                stream = self._stream(file)
                conversion: _Conversion | None = None
                end_s: float | None = None
                for frame in self._decoded(file, stream):
                    if frame.is_corrupt:
                        damaged.append(count)
                    conversion = self._conversion(stream, frame, conversion)
                    yield _upright(self._rgb(frame, conversion), frame, self.path)
                    count, end_s = count + 1, frame.time
                self._look_for_an_end(file, stream, count, end_s)
                if damaged:
                    self._warn(
                        f"{len(damaged)} of {count} frames are damaged, the first is number "
                        f"{damaged[0] + 1}: FFmpeg filled in what is missing, and frames after "
                        "them may show it"
                    )
        except (av.FFmpegError, OSError, ValueError, IndexError, MemoryError) as error:
            said = what_is_it(self.path, "video") if kind_group(self.path) is None else None
            words = getattr(error, "strerror", None) or first_line(error)
            after = f" after {count} frames: damaged or cut short" if count else ""
            raise LatentError(
                f"{self.path}: not a readable {self._what}: {said or words + after}"
            ) from error

    def _stream(self, file: Any) -> Any:
        """The stream of pictures. Raises LatentError if there is none."""
        streams = [s for s in file.streams.video if not _disposition(s) & _ATTACHED_PICTURE]
        if not streams and file.streams.audio:
            cover = ", only a cover" if file.streams.video else ""
            raise LatentError(f"{self.path}: has sound and no pictures{cover}: pass a video")
        if not streams:
            raise LatentError(f"{self.path}: not a readable {self._what}: no pictures are in it")
        # An animated AVIF has its first picture beside the animation, for other viewers.
        stream = next((s for s in streams if s.frames > 1), streams[0])
        pictures = [s for s in streams if s.metadata.get("title") != "Alpha"]
        if len(pictures) < len(streams):
            self._warn("its transparency is not read: a newer Pillow reads it")
        # A photo of a telephone is a grid of tiles, of which FFmpeg gives one after another.
        if self._what == "image" and stream.frames <= 1 < len(pictures):
            raise LatentError(
                f"{self.path}: a picture of {len(pictures)} parts, which PyAV does not put "
                "together: save it as PNG or JPEG"
            )
        ratio = stream.sample_aspect_ratio
        if ratio and ratio != 1:
            self._warn(f"its pixels are not square ({ratio}): they are taken as if they were")
        return stream

    def _decoded(self, file: Any, stream: Any) -> Iterator[VideoFrame]:
        """The frames of `stream`, with alpha where the file has it."""
        tags = {key.lower(): value for key, value in stream.metadata.items()}
        decoder = _WITH_ALPHA.get(stream.codec_context.name)
        if decoder is None or tags.get("alpha_mode") != "1":
            yield from file.decode(stream)
            return
        try:
            context = self._av.CodecContext.create(decoder, "r")
        except ValueError:  # PyAV's error for a codec that this FFmpeg lacks is one
            self._warn(f"its transparency is not read: this PyAV has no {decoder}")
            yield from file.decode(stream)
            return
        for packet in file.demux(stream):
            yield from context.decode(packet if packet.size else None)

    def _look_for_an_end(self, file: Any, stream: Any, count: int, last_s: float | None) -> None:
        """Warn if a file that was read to its end says that there is more: it is cut short.

        Only of formats that are read to where they are cut; an MP4 gives an error.
        """
        rate, stated = stream.average_rate, None
        if "avi" in file.format.name and stream.frames > count:
            stated = f"{stream.frames} frames"
        if "matroska" in file.format.name and rate and last_s is not None:
            end_s, own_s = last_s + 1 / float(rate), _seconds(stream.metadata.get("DURATION"))
            # The length of the file is that of its longest stream.
            if own_s is None and len(file.streams) == 1 and file.duration:
                own_s = file.duration / 1e6
            if own_s is not None and own_s > end_s + 1.5 / float(rate):
                stated = f"{own_s:.2f} s, of which {end_s:.2f} s are there"
        if stated:
            self._warn(f"{count} frames could be read, and the file says {stated}: it is cut short")

    def _conversion(self, stream: Any, frame: VideoFrame, last: _Conversion | None) -> _Conversion:
        """The filters for `frame`: the last ones, while nothing about the frames changes.

        PyAV before 17 converts with the wrong matrix, and later ones guess. FFmpeg's own filter
        takes matrix and range as they are written here, in every version.
        """
        bits = max(component.bits for component in frame.format.components)
        has_alpha = len(frame.format.components) in (2, 4)
        matrix, full = self._matrix(stream, frame)
        key = (frame.format.name, frame.width, frame.height, matrix, full)
        if last is not None and last.key == key:
            return last
        # Planes for 16 bits: to rgb48 and rgba64, FFmpeg 8 gets every row but the first one wrong
        # with these flags.
        target = (
            ("rgba" if has_alpha else "rgb24")
            if bits <= 8
            else ("gbrap16le" if has_alpha else "gbrp16le")
        )
        graph = self._av.filter.Graph()
        source = graph.add_buffer(
            width=frame.width,
            height=frame.height,
            format=frame.format,
            time_base=stream.time_base or frame.time_base,
        )
        options = f"out_range=full:flags={_FLAGS}"
        if matrix is not None:
            options += f":in_color_matrix={matrix}:in_range={'full' if full else 'limited'}"
        filters = [graph.add("scale", options), graph.add("format", target)]
        sink = graph.add("buffersink")
        for before, after in zip((source, *filters), (*filters, sink), strict=True):
            before.link_to(after)
        graph.configure()
        opaque = ((1 << bits) - 1) << (16 - bits) if bits <= 16 else 65535
        is_rgb = matrix is None
        is_limited = len(frame.format.components) > 2 and not full
        white = 65535 if is_rgb else 0xFF00 if is_limited else opaque
        return _Conversion(graph, key, bits > 8, white, opaque)

    def _matrix(self, stream: Any, frame: VideoFrame) -> tuple[str | None, bool]:
        """The matrix of `frame` as FFmpeg names it (None for RGB and grey), and its range."""
        name = frame.format.name
        full = int(frame.color_range) == _FULL_RANGE or name.startswith("yuvj")
        transfer = getattr(stream.codec_context, "color_trc", None)
        if transfer is not None and int(transfer) in _HDR:
            self._warn("high dynamic range: its values are taken as they are, without tone mapping")
        if "f32" in name or "f16" in name:
            self._warn("numbers of linear light: they are taken as they are, and above 1 is white")
        if frame.interlaced_frame:
            self._warn("interlaced: both fields of a frame are encoded as one picture")
        if frame.format.is_rgb or "pal8" in name or len(frame.format.components) < 3:
            return (None if frame.format.is_rgb or "pal8" in name else "bt601"), full
        number = int(frame.colorspace)
        if number in _MATRICES:
            return _MATRICES[number], full
        if number not in (0, _UNTAGGED):
            raise LatentError(
                f"{self.path}: its colours have matrix {number} of FFmpeg's list, which is not "
                "known here: convert it to BT.709"
            )
        is_still = stream.codec_context.name in ("mjpeg", "webp")
        if not is_still and (frame.height >= _HD_ROWS or frame.width >= _HD_COLUMNS):
            self._warn("the video does not say its colour matrix: BT.709 is taken, as it is HD")
            return "bt709", full
        return "bt601", full

    def _rgb(self, frame: VideoFrame, conversion: _Conversion) -> Frame:
        conversion.graph.push(frame)
        made = conversion.graph.pull()
        channels = len(made.format.components)
        if not conversion.is_deep:
            rows = _rows(made.planes[0], np.uint8, made)[:, : made.width * channels]
            # A copy: the memory of `made` is used again.
            picture: Frame = rows.reshape(made.height, made.width, channels).copy()
            return picture
        planes = [_rows(plane, np.dtype("<u2"), made)[:, : made.width] for plane in made.planes]
        green, blue, red, *alpha = planes
        picture = np.stack((red, green, blue, *alpha), axis=-1)
        white = np.full(channels, conversion.white, np.float32)
        white[3:] = conversion.opaque
        scaled: Frame = picture.astype(np.float32) * (65535 / white)
        return np.minimum(np.round(scaled), 65535).astype(np.uint16)

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def _rows(plane: Any, dtype: npt.DTypeLike, frame: VideoFrame) -> Frame:
    """The rows of a plane, with what FFmpeg has behind each of them."""
    return np.frombuffer(memoryview(plane), dtype).reshape(frame.height, -1)


def _disposition(stream: Any) -> int:
    """What FFmpeg says a stream is for: a number, or a flag around it in older PyAV."""
    value = getattr(stream, "disposition", 0)
    return int(getattr(value, "value", value))


def _seconds(tag: str | None) -> float | None:
    """Seconds of Matroska's tag "00:00:02.063000000"; None if it is something else."""
    try:
        hours, minutes, seconds = (tag or "").split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None


# Exact rounding, and chroma between its samples for every pixel.
_FLAGS = "bilinear+accurate_rnd+full_chroma_int+full_chroma_inp"


def kind_group(path: Path) -> str | None:
    """ "picture", "video" or "other" for a file that is known by its content."""
    with suppress(OSError):
        kind = kind_of(path)
        return None if kind is None else kind.group
    return None


def _upright(picture: Frame, frame: VideoFrame, path: Path) -> Frame:
    """The pixels of a frame, rotated and mirrored as its display matrix says."""
    from av.sidedata.sidedata import SideData

    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # it has a kind of side data that PyAV does not know (#2392)
        return _turned(picture, getattr(frame, "rotation", 0), path)
    if not isinstance(matrix, SideData):
        return picture
    # Column x and row y are shown at column a x + c y and row b x + d y, in 16.16 fixed point.
    a, b, _, c, d = np.frombuffer(memoryview(matrix), np.int32)[:5].tolist()
    if (a or d) and (b or c):
        raise LatentError(
            f"{path}: its frames are rotated by {frame.rotation} degrees: expected a multiple of 90"
        )
    if b or c:
        picture, a, d = picture.swapaxes(0, 1), c, b
    upright: Frame = picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return upright


def _turned(picture: Frame, degrees: int, path: Path) -> Frame:
    if degrees % 90:
        raise LatentError(
            f"{path}: its frames are rotated by {degrees} degrees: expected a multiple of 90"
        )
    return np.rot90(picture, degrees // 90)
