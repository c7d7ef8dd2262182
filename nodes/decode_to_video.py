"""WanVAEDecodeToVideo: LATENT and VAE to a video file, without the frames ever being one IMAGE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_management as model_management
import torch
from comfy_api.latest import InputImpl, io

from ..wan_vae import geometry
from ..wan_vae.io.image import EndFrames
from ..wan_vae.io.sink import with_colours
from ..wan_vae.io.video_encode import CODECS, Codec, VideoSettings
from ..wan_vae.io.video_sink import VideoFileSink
from ..wan_vae.io.video_write import TeeSink
from ..wan_vae.options import MemoryFormat
from . import inputs
from .reports import HIDDEN
from .saved_video import FOLDERS, FORMATS, Folder, SavedVideo, metadata
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
from .session import session


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
                advanced(
                    io.Combo.Input,
                    "format",
                    options=list(FORMATS),
                    default="auto",
                    tooltip="The kind of file, as in Save Video. auto is mp4.",
                ),
                advanced(
                    io.Combo.Input,
                    "codec",
                    options=list(CODECS),
                    default="auto",
                    tooltip="How pictures are stored, as in Save Video. auto is H.264, and AV1 in "
                    "webm.",
                ),
                advanced(
                    io.Float.Input,
                    "crf",
                    default=16.0,
                    min=0.0,
                    max=63.0,
                    step=1.0,
                    tooltip="Quality: lower values look better and make larger files. Save Video "
                    "takes 23 for H.264 (at most 51) and 30 for AV1 (at most 63).",
                ),
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
        format: str = "auto",
        codec: Codec = "auto",
        crf: float = 16.0,
        bit_depth: int = 8,
        save_to: Folder = "output",
        normalized: bool = False,
        audio: Mapping[str, Any] | None = None,
    ) -> io.NodeOutput:
        videos: list[Any] = []
        shown: list[dict[str, str]] = []
        first: list[torch.Tensor] = []
        last: list[torch.Tensor] = []
        with session(cls.hidden, vae, precision, "decode") as run:
            fps = fps or run.wan.config.default_fps
            for place, latent in enumerate(run.one_by_one(inputs.latent_5d(samples))):
                shape = geometry.pixel_shape(tuple(latent.shape), run.wan.config)
                saved = SavedVideo(filename_prefix, save_to, format, shape[4], shape[3])
                run.look_at(latent, normalized)
                plan = run.plan(
                    tuple(latent.shape),
                    memory_format=memory_layout,
                    chunk_frames=chunk_frames,
                    whole_frames=True,
                )
                ends = EndFrames(shape[2], vae.output_device, inputs.output_dtype(vae))
                file = VideoFileSink(
                    next(saved.names),
                    shape[3],
                    shape[4],
                    fps,
                    VideoSettings(
                        codec, crf, bit_depth, metadata(cls.hidden), inputs.sound(audio, place)
                    ),
                    names=saved.names,
                    should_stop=model_management.processing_interrupted,
                )
                sink = with_colours(TeeSink(file, ends), shape[1])
                run.decode_into(sink, latent, plan, normalized=normalized)
                run.warnings += [text for text in file.warnings if text not in run.warnings]
                videos.append(InputImpl.VideoFromFile(str(file.path)))
                shown.append(saved.as_ui(file.path))
                first.append(ends.first)
                last.append(ends.last)
        # `images` with `animated` is how ComfyUI's own Save Video has its file shown on the node.
        ui = {"images": shown, "animated": (True,), **run.ui}
        return io.NodeOutput(videos, first, last, ui=ui)
