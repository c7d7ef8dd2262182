"""WanVAECreateVideo: LATENT and VAE to a VIDEO that is decoded when a node reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..wan_vae.io.latents import check_latent_shape
from ..wan_vae.options import MemoryFormat
from . import inputs
from .lazy_video import Decoding, LazyVideo
from .packed import COPIES
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
        latent = inputs.latent_5d(samples)
        config = COPIES.get(vae, precision).wan.config
        check_latent_shape(latent, config)  # here, and not in the node that reads the video
        node = NodeId.of(cls.hidden)
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
                )
            )
            for place, part in enumerate(latent.split(1))
        ]
        return io.NodeOutput(videos)
