"""WanVAECreateVideo: LATENT and VAE to a VIDEO that is decoded when a node reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_api.latest import InputImpl, Types, io

from ..wan_vae import DecodeReport, OutputError, geometry
from ..wan_vae.device import dtype_name
from ..wan_vae.io.image import as_rgb
from ..wan_vae.io.latents import check_latent_shape
from ..wan_vae.io.video_encode import BIT_DEPTHS, frame_rate
from ..wan_vae.options import MemoryFormat
from ..wan_vae.report import SCHEMA
from ..wan_vae.said import expected_one_of
from . import hand_over, inputs
from .lazy_video import Decoding, LazyVideo
from .reports import HIDDEN, NodeId
from .schema import (
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


class WanVAECreateVideo(io.ComfyNode):
    """Makes a VIDEO of a latent, as Create Video makes one of images. Decodes nothing itself."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WanVAECreateVideo",
            display_name="Wan VAE Create Video",
            description="Makes a VIDEO of a Wan latent, for Save Video and every other node that "
            "takes one. It is decoded when that node reads it. Save Video writes frames as they "
            "are decoded, so a long clip needs no more memory than a short one.",
            search_aliases=["create video", "latent to video", "video combine", "long video"],
            inputs=[
                latent_input(),
                vae_input(),
                fps_input(),
                audio_input(),
                bit_depth_input(),
                layout_input(),
                precision_input(),
                chunk_input(),
                normalized_input(),
            ],
            outputs=[
                io.Video.Output(
                    display_name="VIDEO",
                    is_output_list=True,
                    tooltip="The video. A batch gives one for each latent.",
                )
            ],
            hidden=list(HIDDEN),
        )

    @classmethod
    def execute(
        cls,
        samples: Mapping[str, Any],
        vae: Any,
        fps: float,
        audio: Mapping[str, Any] | None = None,
        bit_depth: int = 8,
        memory_layout: MemoryFormat = "auto",
        precision: str = "auto",
        chunk_frames: int = 0,
        normalized: bool = False,
    ) -> io.NodeOutput:
        with session(cls.hidden, vae, precision, "video") as run:
            # What is wrong is said here, and not in the node that reads the video.
            if bit_depth not in BIT_DEPTHS:
                raise OutputError(expected_one_of("bit_depth", bit_depth, BIT_DEPTHS))
            inputs.sound(audio)
            frame_rate(Path("VIDEO"), fps or hand_over.FPS)
            clips = hand_over.clips(run, samples, normalized)
            if clips is None:
                latent, node = inputs.latent_5d(samples), NodeId.of(cls.hidden)
                config = run.wan.config
                check_latent_shape(latent, config)
                read: dict[str | None, dict[int, DecodeReport]] = {}
                videos = [
                    LazyVideo(
                        Decoding(
                            latent=part,
                            vae=vae,
                            config=config,
                            fps=fps or config.default_fps,
                            bit_depth=bit_depth,
                            audio=audio,
                            place=place,
                            memory_layout=memory_layout,
                            precision=precision,
                            chunk_frames=chunk_frames,
                            normalized=normalized,
                            node=None if node is None else node.node,
                            read=read,
                        )
                    )
                    for place, part in enumerate(latent.split(1))
                ]
                run.report = {
                    "schema": SCHEMA,
                    "operation": "video",
                    "status": "done",
                    "dtype": dtype_name(run.wan.dtype),
                    "device": str(vae.device),
                    "pixel_shape": list(geometry.pixel_shape(tuple(latent.shape), config)),
                }
            else:
                rate = frame_rate(Path("VIDEO"), fps or hand_over.FPS)
                videos = [
                    InputImpl.VideoFromComponents(
                        Types.VideoComponents(images=as_rgb(clip), audio=audio, frame_rate=rate)
                    )
                    for clip in clips
                ]
        return io.NodeOutput(videos, ui=run.ui)
