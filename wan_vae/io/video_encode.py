"""VideoEncoder: YUV 4:2:0 frames and sound to one video, through PyAV. Knows no device.

`video_sink` makes the frames of pixels, and runs the encoder beside the decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch

from ..errors import OutputError
from ..said import said
from .files import ffmpeg_name, import_package, writing
from .tensors import missing_data, seen_finite

Container = Literal["mp4", "mov", "mkv", "webm"]
Codec = Literal["auto", "h264", "av1"]
CODECS: tuple[Codec, ...] = ("auto", "h264", "av1")
BIT_DEPTHS = (8, 10)

# FFmpeg's names of the containers, and its encoders in order of preference; which of them exist
# depends on how FFmpeg was built.
_MUXERS: dict[Container, str] = {"mp4": "mp4", "mov": "mov", "mkv": "matroska", "webm": "webm"}
_ENCODERS: dict[Codec, tuple[str, ...]] = {
    "h264": ("libx264", "libopenh264", "h264", "mpeg4"),
    "av1": ("libsvtav1", "libaom-av1"),
}
# Those that take a constant rate factor, and 10 bits.
_WITH_CRF = ("libx264", "libsvtav1", "libaom-av1")
# Frames that x264 looks ahead; its own default is 40. It encodes none before it was given five more
# than that, and until then its other threads wait. An NVIDIA H200 decodes 81 frames of 720p in 870
# ms: counted from that, 45 frames keep them waiting for 0.5 s and 25 for 0.3, of some 3 s that x264
# takes. At 16 frames a second 20 frames are more than a second.
_LOOKAHEAD = 20
_PIXEL_FORMATS = {8: "yuv420p", 10: "yuv420p10le"}
_CHANNELS = {1: "mono", 2: "stereo", 6: "5.1"}
# What Opus works at, and AAC can where it does not know the rate of the sound.
_SOUND_RATE = 48000
# More samples a second than any sound has; FFmpeg's resampler runs out of memory far above.
_HIGHEST_RATE = 10_000_000


@dataclass(frozen=True)
class Sound:
    """The sound of a video: float samples [channels, n] in [-1, 1], `rate` of them a second."""

    samples: torch.Tensor
    rate: int

    def is_wrong(self) -> str | None:
        """Why no encoder takes it, in a sentence; None if one does. Looks at every sample."""
        kind = missing_data(self.samples)
        if kind is None and not self.samples.is_floating_point():
            kind = str(self.samples.dtype)
        if kind is not None:
            return said(
                "sound.kind",
                "the sound's samples are {kind}: expected floating numbers in [-1, 1]",
                kind=kind,
            )
        if not 1 <= self.rate <= _HIGHEST_RATE:
            return said(
                "sound.rate",
                "the sound has {rate} samples a second: expected 1 to {most}",
                rate=self.rate,
                most=_HIGHEST_RATE,
            )
        bad = 0
        if not seen_finite(self.samples):
            bad = int((~torch.isfinite(self.samples)).sum())
        if bad:
            return said(
                "sound.not_finite",
                "{count} of the sound's {all} samples are NaN or inf: what made it failed",
                count=bad,
                all=self.samples.numel(),
            )
        return None


@dataclass(frozen=True)
class VideoSettings:
    """What a video is encoded to.

    codec: "auto" is AV1 in webm, else H.264. crf: constant rate factor, the smaller the better;
    None takes the encoder's own default. metadata: tags of the file. sound: cut where the pictures
    end.
    """

    codec: Codec = "auto"
    crf: float | None = 16.0
    bit_depth: int = 8
    metadata: Mapping[str, str] = field(default_factory=dict)
    sound: Sound | None = None


class VideoEncoder:
    """One video while it is written. One thread at a time may use it.

    `encoder` is FFmpeg's name of the encoder that runs. `warnings` are sentences for the user.
    """

    def __init__(
        self,
        target: Path | BinaryIO,
        container: Container,
        size: tuple[int, int],
        fps: float,
        settings: VideoSettings,
        name: Path | None = None,
    ):
        """Open `target` for frames of `size` (height, width), even numbers.

        container: mp4, mov, mkv or webm. name: the file that errors name, if not `target`. A path
        gets its index in front, so that it plays while it loads; an open file cannot.
        Raises OutputError.
        """
        self._name = name or (target if isinstance(target, Path) else Path(f"video.{container}"))
        self._av = av = import_package("av", "av", self._name, OutputError)
        self.warnings: list[str] = []
        rate = frame_rate(self._name, fps)
        self.fps = float(rate)
        self._height, self._width = size
        if container not in _MUXERS:
            raise OutputError(
                said(
                    "video.container",
                    "{file}: {container} is no container for a video",
                    file=self._name,
                    container=container,
                )
            )
        codec = settings.codec if settings.codec != "auto" else _codec_of(container)
        self._check(settings, container, codec)
        self.bit_depth = settings.bit_depth
        self._format = _PIXEL_FORMATS[self.bit_depth]
        self.encoder = self._choose(codec, settings)
        flags = "use_metadata_tags" + ("+faststart" if isinstance(target, Path) else "")
        with writing(self._name, av.FFmpegError):
            self._file = av.open(
                ffmpeg_name(target) if isinstance(target, Path) else target,
                mode="w",
                format=_MUXERS[container],
                options={"movflags": flags} if container in ("mp4", "mov") else {},
            )
        with ExitStack() as failed:
            failed.callback(self.abort)
            self._file.metadata.update(_writable(settings.metadata))
            self._stream = self._add_pictures(rate, settings)
            self._seconds = 1 / rate
            self._frames = 0
            sound = settings.sound
            self._sound = None if sound is None else self._add_sound(container, sound)
            failed.pop_all()

    def _check(self, settings: VideoSettings, container: Container, codec: Codec) -> None:
        if settings.codec not in CODECS:  # first: what it is may not be a word
            raise OutputError(
                said(
                    "video.codec",
                    "{file}: codec is {codec}: expected {codecs}",
                    file=self._name,
                    codec=repr(settings.codec),
                    codecs=CODECS,
                )
            )
        if container == "webm" and codec != "av1":
            raise OutputError(
                said(
                    "video.webm",
                    "{file}: webm cannot hold H.264: choose av1, or mp4 or mkv",
                    file=self._name,
                )
            )
        if settings.bit_depth not in BIT_DEPTHS:
            raise OutputError(
                said(
                    "video.bit_depth",
                    "{file}: bit_depth is {bits}: expected 8 or 10",
                    file=self._name,
                    bits=settings.bit_depth,
                )
            )
        highest, crf = (51 if codec == "h264" else 63), settings.crf
        is_number = isinstance(crf, (int, float, np.number))
        if crf is not None and not (is_number and 0 <= crf <= highest):
            raise OutputError(
                said(
                    "video.crf",
                    "{file}: crf is {crf}: expected 0 to {most} for {codec}",
                    file=self._name,
                    crf=f"{crf:g}" if is_number else repr(crf),
                    most=highest,
                    codec=codec,
                )
            )

    def _choose(self, codec: Codec, settings: VideoSettings) -> str:
        """The first encoder of `codec` that this PyAV has. Raises OutputError."""
        wanted = _ENCODERS[codec]
        found = next((name for name in wanted if self._is_there(name)), None)
        if found is None:
            raise OutputError(
                said(
                    "video.no_encoder",
                    "{file}: this PyAV has no encoder for {codec} (none of {names}): write a "
                    "folder of frames, or choose another codec",
                    file=self._name,
                    codec=codec,
                    names=", ".join(wanted),
                )
            )
        if settings.bit_depth != 8 and found not in _WITH_CRF:
            raise OutputError(
                said(
                    "video.no_ten_bits",
                    "{file}: {found} cannot encode 10 bits, and this PyAV has no {wanted}: choose "
                    "8 bits",
                    file=self._name,
                    found=found,
                    wanted=wanted[0],
                )
            )
        if found == "mpeg4":
            self.warnings.append(
                said(
                    "video.mpeg4",
                    "this PyAV has no H.264 encoder: wrote MPEG-4 part 2, which browsers do not "
                    "play",
                )
            )
        elif found != wanted[0]:
            self.warnings.append(
                said(
                    "video.other_encoder",
                    "this PyAV has no {wanted}: {found} encoded the video",
                    wanted=wanted[0],
                    found=found,
                )
            )
        if found not in _WITH_CRF and settings.crf is not None:
            self.warnings.append(
                said(
                    "video.no_crf",
                    "{found} knows no crf: the quality is its own default",
                    found=found,
                )
            )
        return found

    def _is_there(self, name: str) -> bool:
        try:
            self._av.Codec(name, "w")
        except ValueError:  # PyAV's UnknownCodecError
            return False
        return True

    def _add_pictures(self, rate: Fraction, settings: VideoSettings) -> Any:
        options = {}
        if self.encoder in _WITH_CRF and settings.crf is not None:
            options["crf"] = f"{settings.crf:g}"
        if self.encoder == "libx264":
            options |= {"preset": "medium", "rc-lookahead": str(_LOOKAHEAD)}
        stream = self._file.add_stream(self.encoder, rate=rate, options=options)
        stream.height, stream.width = self._height, self._width
        stream.pix_fmt = self._format
        context = stream.codec_context
        # BT.709 in FFmpeg's numbering: matrix 1, limited range 1.
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        if self.encoder == "libx264":
            # Frames beside each other, x264's own default; PyAV's is slices of one frame, which
            # compress less and keep fewer cores busy.
            context.thread_type = "FRAME"
        # The encoder that FFmpeg took for a name such as "h264".
        self.encoder = str(context.codec.name)
        return stream

    def _add_sound(self, container: Container, sound: Sound) -> _SoundTrack:
        channels = sound.samples.shape[0] if sound.samples.ndim == 2 else 0
        if channels not in _CHANNELS:
            raise OutputError(
                said(
                    "sound.shape",
                    "{file}: the sound is {shape} at {rate} a second: expected samples "
                    "[channels, n] with 1, 2 or 6 channels",
                    file=self._name,
                    shape=tuple(sound.samples.shape),
                    rate=sound.rate,
                )
            )
        if wrong := sound.is_wrong():
            raise OutputError(
                said("video.sound", "{file}: {reason}", file=self._name, reason=wrong)
            )
        codec = "libopus" if container == "webm" else "aac"
        known = self._av.Codec(codec, "w").audio_rates
        rate = sound.rate if known is None or sound.rate in known else _SOUND_RATE
        stream = self._file.add_stream(codec, rate=rate, layout=_CHANNELS[channels])
        return _SoundTrack(self._av, stream, sound)

    def put(self, planes: npt.NDArray[np.generic]) -> None:
        """Encode one frame, whose planes are laid out as `yuv.to_yuv420` makes them.

        `planes` is copied. Raises OutputError.
        """
        frame = self._av.VideoFrame(self._width, self._height, self._format)
        for plane, values in zip(frame.planes, self._planes(planes), strict=True):
            rows = np.frombuffer(plane, values.dtype).reshape(values.shape[0], -1)
            np.copyto(rows[:, : values.shape[1]], values)
        frame.pts, frame.time_base = self._frames, self._seconds
        self._frames += 1
        self._mux(self._stream, frame)
        if self._sound is not None:
            # With the pictures, so that the container need not keep these until the sound comes.
            for part in self._sound.until(self._frames * self._seconds):
                self._mux(self._sound.stream, part)

    def _planes(self, planes: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        chroma = planes[self._height :].reshape(2, self._height // 2, self._width // 2)
        return [planes[: self._height], chroma[0], chroma[1]]

    def finish(self) -> None:
        """Write what the encoder still holds, and the end of the file. Raises OutputError."""
        self._mux(self._stream, None)
        if self._sound is not None:
            self._mux(self._sound.stream, None)
        with writing(self._name, self._av.FFmpegError):
            self._file.close()

    def _mux(self, stream: Any, frame: Any) -> None:
        """Encode one frame, or flush the encoder (None), and write the packets."""
        with writing(self._name, self._av.FFmpegError):
            for packet in stream.encode(frame):
                self._file.mux(packet)

    def abort(self) -> None:
        """Close the file, whatever is in it."""
        # Writing the end of an incomplete file may fail; nobody wants that file.
        with suppress(OSError, ValueError, self._av.FFmpegError):
            self._file.close()


class _SoundTrack:
    """The sound, given out as far as the pictures have come."""

    def __init__(self, av: Any, stream: Any, sound: Sound):
        self.stream, self._av = stream, av
        self._rate, self._layout = sound.rate, _CHANNELS[sound.samples.shape[0]]
        self._samples: npt.NDArray[np.float32] = sound.samples.detach().cpu().float().numpy()
        self._done = 0

    def until(self, seconds: Fraction) -> list[Any]:
        """The frame with the samples up to `seconds` that were not given out yet, if there are."""
        end = min(ceil(seconds * self._rate), self._samples.shape[1])
        if end <= self._done:
            return []
        part = np.ascontiguousarray(self._samples[:, self._done : end])
        frame = self._av.AudioFrame.from_ndarray(part, format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts = self._rate, self._done
        frame.time_base = Fraction(1, self._rate)
        self._done = end
        return [frame]


def _writable(tags: Mapping[str, str]) -> dict[str, str]:
    """`tags` as UTF-8 can hold them: half a surrogate pair, which JSON allows, becomes "?"."""

    def text(value: str) -> str:
        return value.encode("utf-8", "replace").decode("utf-8")

    return {text(key): text(value) for key, value in tags.items()}


def _codec_of(container: Container) -> Codec:
    return "av1" if container == "webm" else "h264"


def frame_rate(path: Path, fps: float) -> Fraction:
    """`fps`, a number of any library, as a fraction with a small denominator.

    Raises OutputError, which names `path`.
    """
    try:
        value = None if isinstance(fps, (str, bytes)) else float(fps)
    except (TypeError, ValueError):
        value = None
    # Containers count time in 32-bit ticks, which bounds the rates that they can store.
    if value is None or not 0.01 <= value <= 1000:
        raise OutputError(
            said(
                "video.fps",
                "{file}: {fps} frames a second: expected a number, 0.01 to 1000",
                file=path,
                fps=repr(fps),
            )
        )
    return Fraction(value).limit_denominator(1001)
