"""WanVAEEncode: IMAGE and VAE to LATENT, in place of VAE Encode."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..wan_vae import geometry
from ..wan_vae.io.latents import encode_notices
from ..wan_vae.options import MemoryFormat
from . import hand_over, inputs
from .reports import HIDDEN
from .schema import (
    advanced,
    layout_input,
    normalized_input,
    precision_input,
    schema,
    vae_input,
)
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
            "pixels, as in VAE Encode; the report says how much.",
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
                io.Image.Input("pixels", tooltip="The frames of one video, one image, or a batch."),
                vae_input(),
                layout_input(),
                precision_input(),
                advanced(
                    io.Boolean.Input,
                    "batch",
                    default=False,
                    tooltip="The images are a batch: each is encoded on its own, as for image "
                    "models. Off: they are the frames of one video.",
                ),
                normalized_input(
                    "Makes a normalised latent, as diffusers and WanVideoWrapper hold latents. Off "
                    "for ComfyUI's own samplers."
                ),
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
        batch: bool = False,
        normalized: bool = False,
    ) -> io.NodeOutput:
        with session(cls.hidden, vae, precision, "encode") as run:
            latent = hand_over.encode(run, pixels, normalized)
            if latent is None:
                config = run.wan.config
                images = batch or config.image_only
                video = inputs.videos(pixels, are_images=images, colours=config.colours)
                shape = geometry.latent_shape(tuple(video.shape), config)
                run.warnings += encode_notices(tuple(video.shape), pixels.shape[-1], config)
                plan = run.plan(shape, operation="encode", memory_format=memory_layout)
                latent = run.encode(video, plan, normalized=normalized)
        return io.NodeOutput({"samples": latent}, ui=run.ui)
