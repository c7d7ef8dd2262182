"""WanVAEEncode: IMAGE and VAE to LATENT, in place of VAE Encode."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..wan_vae import geometry
from ..wan_vae.io.image import frames_view
from ..wan_vae.options import MemoryFormat
from . import hand_over, inputs
from .reports import HIDDEN
from .schema import layout_input, precision_input, schema, vae_input
from .session import session


class WanVAEEncode(io.ComfyNode):
    """Encodes frames as one video; frames past 4n + 1 are dropped, as VAE Encode does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WanVAEEncode",
            display_name="Wan VAE Encode",
            description="Encodes images as the frames of one video, with a Wan 2.1, Wan 2.2 or "
            "Qwen-Image VAE. Only 4n + 1 frames are kept, and sizes are cropped to whole latent "
            "pixels, as in VAE Encode.",
            search_aliases=[
                "vae encode",
                "encode image",
                "wan encode",
                "image to latent",
                "video to latent",
                "vae encode tiled",
                "tiled",
                "qwen vae",
                "out of memory",
            ],
            inputs=[
                io.Image.Input("pixels", tooltip="The frames of one video, or one image."),
                vae_input(),
                layout_input(),
                precision_input(),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The latent of the video.")],
            hidden=list(HIDDEN),
        )

    @classmethod
    def execute(
        cls,
        pixels: torch.Tensor,
        vae: Any,
        memory_layout: MemoryFormat = "auto",
        precision: str = "auto",
    ) -> io.NodeOutput:
        with session(cls.hidden, vae, precision, "encode") as run:
            latent = hand_over.encode(run, pixels)
            if latent is None:
                video = frames_view(inputs.frames(pixels))
                shape = geometry.latent_shape(tuple(video.shape), run.wan.config)
                plan = run.plan(shape, operation="encode", memory_format=memory_layout)
                latent = run.encode(video, plan)
        return io.NodeOutput({"samples": latent}, ui=run.ui)
