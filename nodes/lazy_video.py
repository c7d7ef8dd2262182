"""LazyVideo: ComfyUI's VIDEO of a latent, which is decoded when a node reads it.

Core's Save Video calls `save_to`: frames go to the encoder as they are decoded, and are never
together. A node that wants an IMAGE calls `get_components`. Sizes and times come from the latent's
shape. Each reading decodes anew, and nothing is kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import comfy.model_management as model_management
import torch
from comfy_api.latest import Input, InputImpl, Types

from ..wan_vae import DecodeReport, OutputError, geometry
from ..wan_vae.config import WanVAEConfig
from ..wan_vae.io.files import reserved
from ..wan_vae.io.image import as_rgb, on_white
from ..wan_vae.io.sink import with_colours
from ..wan_vae.io.video_encode import Codec, Container, VideoSettings, frame_rate
from ..wan_vae.io.video_sink import VideoFileSink, VideoStreamSink
from ..wan_vae.options import MemoryFormat
from ..wan_vae.said import said
from . import inputs
from .executing import executing_node
from .reports import NodeId
from .session import Session, session

# What FFmpeg, and so other VIDEOs, call the container that `get_stream_source` writes.
_CONTAINER_NAME = "mov,mp4,m4a,3gp,3g2,mj2"


@dataclass(frozen=True)
class Decoding:
    """What is to be decoded and how: the inputs of WanVAECreateVideo, for one latent [1, ...].

    config: of the VAE. node: the id of the node, for the panel. place: in the batch. read: the
    reports of the batch's videos so far, by the node that read them and their place.
    """

    latent: torch.Tensor
    vae: Any
    config: WanVAEConfig
    fps: float
    bit_depth: int = 8
    audio: Mapping[str, Any] | None = None
    place: int = 0
    memory_layout: MemoryFormat = "auto"
    precision: str = "auto"
    chunk_frames: int = 0
    normalized: bool = False
    node: str | None = None
    read: dict[str | None, dict[int, DecodeReport]] = field(default_factory=dict)

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        return geometry.pixel_shape(tuple(self.latent.shape), self.config)


class LazyVideo(Input.Video):
    """A VIDEO that decodes while it is read; see the module."""

    def __init__(self, decoding: Decoding):
        self._decoding = decoding

    # -- what needs no decode ----------------------------------------------------------------------

    def get_dimensions(self) -> tuple[int, int]:
        """Width and height of a frame."""
        height, width = self._decoding.pixel_shape[3:]
        return width, height

    def get_frame_count(self) -> int:
        return self._decoding.pixel_shape[2]

    def get_frame_rate(self) -> Fraction:
        return frame_rate(Path("VIDEO"), self._decoding.fps)

    def get_duration(self) -> float:
        """Seconds."""
        return float(self.get_frame_count() / self.get_frame_rate())

    def get_bit_depth(self) -> int:
        return self._decoding.bit_depth

    def get_color_space(self) -> str:
        return "sRGB"

    def get_container_format(self) -> str:
        return _CONTAINER_NAME

    # -- what decodes ------------------------------------------------------------------------------

    def get_components(self) -> Any:
        """All frames as one IMAGE, with the audio and the frame rate."""
        decoding = self._decoding
        with self._session() as run:
            run.look_at(decoding.latent, decoding.normalized)
            plan = run.plan(
                tuple(decoding.latent.shape),
                memory_format=decoding.memory_layout,
                chunk_frames=decoding.chunk_frames,
            )
            image = run.decode(decoding.latent, plan, normalized=decoding.normalized)
        frames, alpha = as_rgb(image.flatten(0, 1)), {}
        # What takes the components of a VIDEO takes three colours, and newer ComfyUI alpha beside.
        if frames.shape[-1] == 4 and "alpha" in Types.VideoComponents.__dataclass_fields__:
            frames, alpha = frames[..., :3], {"alpha": frames[..., 3:]}
        elif frames.shape[-1] == 4:
            frames = on_white(frames)
        return Types.VideoComponents(
            **alpha,
            images=frames,
            audio=cast("Any", decoding.audio),
            frame_rate=self.get_frame_rate(),
        )

    def save_to(
        self,
        path: str | os.PathLike[str] | BytesIO,
        format: str = "auto",
        codec: str = "auto",
        metadata: dict[str, Any] | None = None,
        bit_depth: int | None = None,
        crf: float | None = None,
        color_space: str | None = None,
    ) -> None:
        """Write the video to a file of this name, or to an open file, while it is decoded.

        format, codec: words of core's, or its enumerations. crf: None takes the encoder's default.
        bit_depth: None takes the one that the video was created with. Raises OutputError.
        """
        if color_space not in (None, "auto", "sRGB"):
            raise OutputError(
                said(
                    "video.colours",
                    "a decoded video has the colours sRGB: it cannot be {wanted}",
                    wanted=color_space,
                )
            )
        # Core has counted files to find the name, and another server may count meanwhile: so first.
        # An empty file that is there already may be the caller's own temporary one.
        name: AbstractContextManager[None] = nullcontext()
        if isinstance(path, (str, os.PathLike)):
            name = reserved(Path(path))
        with name:
            self._save(path, _word(format), self._settings(_word(codec), metadata, bit_depth, crf))

    def _settings(
        self, codec: str, metadata: dict[str, Any] | None, bit_depth: int | None, crf: float | None
    ) -> VideoSettings:
        return VideoSettings(
            codec=cast("Codec", codec),
            crf=crf,
            bit_depth=self._decoding.bit_depth if bit_depth is None else bit_depth,
            metadata={str(key): json.dumps(value) for key, value in (metadata or {}).items()},
            sound=inputs.sound(self._decoding.audio, self._decoding.place),
        )

    def _save(
        self, path: str | os.PathLike[str] | BytesIO, container: str, settings: VideoSettings
    ) -> None:
        decoding, shape = self._decoding, self._decoding.pixel_shape
        with self._session() as run:
            run.look_at(decoding.latent, decoding.normalized)
            plan = run.plan(
                tuple(decoding.latent.shape),
                memory_format=decoding.memory_layout,
                chunk_frames=decoding.chunk_frames,
                whole_frames=True,
            )
            sink = _sink(path, container, shape, decoding.fps, settings)
            target = with_colours(sink, shape[1])
            run.decode_into(target, decoding.latent, plan, normalized=decoding.normalized)
            run.warnings += sink.warnings

    def as_trimmed(
        self,
        start_time: float | None = None,
        duration: float | None = None,
        strict_duration: bool = False,
    ) -> Any:
        """The part of the video from `start_time` on, `duration` seconds long (0: to the end), as
        a compressed video in memory; None if there is not that much."""
        start, wanted = start_time or 0.0, duration or 0.0
        left = self.get_duration() - start if start >= 0 else min(-start, self.get_duration())
        if left <= 0 or (strict_duration and left < wanted):
            return None
        return InputImpl.VideoFromFile(
            self.get_stream_source(), start_time=start, duration=min(wanted, left)
        )

    @contextmanager
    def _session(self) -> Iterator[Session]:
        """A run for the node that reads the video, whose report counts the batch's earlier ones."""
        decoding, reader = self._decoding, executing_node()
        node = NodeId.of(reader)
        read = decoding.read.setdefault(None if node is None else node.node, {})
        if decoding.place in read:
            read.clear()  # it begins anew
        with session(reader, decoding.vae, decoding.precision, "decode", decoding.node) as run:
            run.continues(list(read.values()))
            yield run
            report = run.wan.last_report
            assert report is not None  # of the decode that the caller made
            read[decoding.place] = report


def _word(value: Any) -> str:
    """What core passes as a string or as a member of an enumeration of strings."""
    return str(getattr(value, "value", value))


def _sink(
    path: str | os.PathLike[str] | BytesIO,
    container: str,
    shape: tuple[int, ...],
    fps: float,
    settings: VideoSettings,
) -> VideoFileSink | VideoStreamSink:
    height, width = shape[3:]
    stop = model_management.processing_interrupted
    wanted = None if container == "auto" else cast("Container", container)
    if not isinstance(path, (str, os.PathLike)):
        return VideoStreamSink(
            path, wanted or "mp4", height, width, fps, settings, should_stop=stop
        )
    return VideoFileSink(
        Path(path), height, width, fps, settings, container=wanted, should_stop=stop
    )
