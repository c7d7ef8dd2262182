"""WanVAEDecodeToVideo: LATENT and VAE to a video file, without the frames ever being one IMAGE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.model_management as model_management
import torch
from comfy_api.latest import InputImpl, io

from ..wan_vae import geometry
from ..wan_vae.io.image import EndFrames
from ..wan_vae.io.sink import Sink, with_colours
from ..wan_vae.io.video_encode import Codec, VideoSettings
from ..wan_vae.io.video_sink import VideoFileSink
from ..wan_vae.io.video_write import TeeSink
from ..wan_vae.options import MemoryFormat
from . import hand_over, inputs
from .file_options import CRF, file_inputs, file_options
from .reports import HIDDEN
from .saved_video import FOLDERS, Folder, SavedVideo, metadata
from .schema import (
    advanced,
    audio_input,
    bit_depth_input,
    chunk_input,
    fps_input,
    latent_input,
    layout_input,
    normalized_input,
    precision_input,
    schema,
    vae_input,
)
from .session import Session, session


class WanVAEDecodeToVideo(io.ComfyNode):
    """Streams each chunk of frames into the encoder of a file in one of ComfyUI's folders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WanVAEDecodeToVideo",
            display_name="Wan VAE Decode to Video",
            description="Decodes a Wan latent straight into a video file in the output folder. "
            "Frames are written as they are decoded, so a long clip needs no more memory than a "
            "short one.",
            search_aliases=[
                "save video",
                "vae decode video",
                "wan video",
                "long video",
                "mp4",
                "latent to video",
                "video combine",
                "vhs",
                "out of memory",
            ],
            inputs=[
                latent_input(),
                vae_input(),
                fps_input(),
                io.String.Input(
                    "filename_prefix",
                    default="video/WanVAE",
                    tooltip="Folder and name in the output folder, as in Save Video. It may hold "
                    "%date:yyyy-MM-dd%, %width%, %height% or %Node.widget%.",
                ),
                layout_input(),
                precision_input(),
                chunk_input(),
                # New inputs come after those of version 0.1: saved workflows count them.
                *file_inputs(),
                bit_depth_input(),
                advanced(
                    io.Combo.Input,
                    "save_to",
                    options=list(FOLDERS),
                    default="output",
                    tooltip="The output folder, or the temporary one, which ComfyUI empties when "
                    "it starts.",
                ),
                normalized_input(),
                audio_input(),
            ],
            outputs=[
                io.Video.Output(
                    display_name="VIDEO",
                    is_output_list=True,
                    tooltip="The video file. A batch gives one file for each latent.",
                ),
                io.Image.Output(
                    display_name="first_frame",
                    is_output_list=True,
                    tooltip="The first frame of the video, before it was compressed.",
                ),
                io.Image.Output(
                    display_name="last_frame",
                    is_output_list=True,
                    tooltip="The last frame, before it was compressed: the start image of the "
                    "next clip.",
                ),
            ],
            hidden=[*HIDDEN, io.Hidden.prompt],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        samples: Mapping[str, Any],
        vae: Any,
        fps: float,
        filename_prefix: str,
        memory_layout: MemoryFormat = "auto",
        precision: str = "auto",
        chunk_frames: int = 0,
        format: Any = "auto",
        codec: Codec = "auto",
        crf: float = CRF,
        bit_depth: int = 8,
        save_to: Folder = "output",
        normalized: bool = False,
        audio: Mapping[str, Any] | None = None,
        # Nested options that are linked come under their whole names; `file_options` refuses them.
        **_linked: object,
    ) -> io.NodeOutput:
        tags = metadata(cls.hidden)
        with session(cls.hidden, vae, precision, "decode") as run:
            options = file_options(cls.hidden, format, codec, crf)
            out = _Clips(run, filename_prefix, save_to, options.format)

            def settings(place: int) -> VideoSettings:
                sound = inputs.sound(audio, place)
                return VideoSettings(options.codec, options.crf, bit_depth, tags, sound)

            clips = hand_over.clips(run, samples, normalized)
            if clips is not None:
                for place, clip in enumerate(clips):
                    shape = (1, 3, *clip.shape[:3])
                    saved = out.name(shape)
                    with out.open(saved, shape, fps or hand_over.FPS, settings(place)) as sink:
                        hand_over.write(sink, clip)
            else:
                fps = fps or run.wan.config.default_fps
                for place, latent in enumerate(run.one_by_one(inputs.latent_5d(samples))):
                    shape = geometry.pixel_shape(tuple(latent.shape), run.wan.config)
                    saved = out.name(shape)
                    run.look_at(latent, normalized)
                    plan = run.plan(
                        tuple(latent.shape),
                        memory_format=memory_layout,
                        chunk_frames=chunk_frames,
                        whole_frames=True,
                    )
                    with out.open(saved, shape, fps, settings(place)) as sink:
                        run.decode_into(sink, latent, plan, normalized=normalized)
        # `images` with `animated` is how ComfyUI's own Save Video has its file shown on the node.
        ui = {"images": out.shown, "animated": (True,), **run.ui}
        return io.NodeOutput(out.videos, out.first, out.last, ui=ui)


class _Clips:
    """The files of one run, and what the node gives of those that are complete."""

    def __init__(self, run: Session, prefix: str, folder: Folder, container: str):
        self._run, self._prefix, self._folder, self._container = run, prefix, folder, container
        self.videos: list[Any] = []
        self.shown: list[dict[str, str]] = []
        self.first: list[torch.Tensor] = []
        self.last: list[torch.Tensor] = []

    def name(self, shape: tuple[int, ...]) -> SavedVideo:
        """Names for a video of `shape` [1, C, T, H, W]. Raises OutputError."""
        return SavedVideo(self._prefix, self._folder, self._container, shape[4], shape[3])

    @contextmanager
    def open(
        self, saved: SavedVideo, shape: tuple[int, ...], fps: float, settings: VideoSettings
    ) -> Iterator[Sink]:
        """A sink for the pixels of a video; whoever writes them closes it, or aborts it."""
        vae = self._run.vae
        ends = EndFrames(shape[2], vae.output_device, inputs.output_dtype(vae))
        file = VideoFileSink(
            next(saved.names),
            shape[3],
            shape[4],
            fps,
            settings,
            names=saved.names,
            should_stop=model_management.processing_interrupted,
        )
        yield with_colours(TeeSink(file, ends), shape[1])
        warnings = self._run.warnings
        warnings += [text for text in file.warnings if text not in warnings]
        self.videos.append(InputImpl.VideoFromFile(str(file.path)))
        self.shown.append(saved.as_ui(file.path))
        self.first.append(ends.first)
        self.last.append(ends.last)
