"""WanVAEDecode: LATENT and VAE to IMAGE, in place of VAE Decode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..wan_vae.io.image import as_rgb
from ..wan_vae.options import MemoryFormat
from . import hand_over, inputs
from .reports import HIDDEN
from .schema import (
    chunk_input,
    latent_input,
    layout_input,
    normalized_input,
    precision_input,
    schema,
    vae_input,
)
from .session import session


class WanVAEDecode(io.ComfyNode):
    """Decodes Wan latents chunk by chunk, into an IMAGE that is allocated once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WanVAEDecode",
            display_name="Wan VAE Decode",
            description="Decodes a Wan 2.1, Wan 2.2 or Qwen-Image latent to images. The picture "
            "is that of VAE Decode. Memory is planned in advance, there are no tiles, and a "
            "report says what happened.",
            search_aliases=[
                "vae decode",
                "decode latent",
                "wan decode",
                "latent to image",
                "latent to video",
                "vae decode tiled",
                "tiled",
                "seamless",
                "qwen vae",
                "out of memory",
            ],
            inputs=[
                latent_input(),
                vae_input(),
                layout_input(),
                precision_input(),
                chunk_input(),
                normalized_input(),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The frames, in order.")],
            hidden=list(HIDDEN),
        )

    @classmethod
    def execute(
        cls,
        samples: Mapping[str, Any],
        vae: Any,
        memory_layout: MemoryFormat = "auto",
        precision: str = "auto",
        chunk_frames: int = 0,
        normalized: bool = False,
    ) -> io.NodeOutput:
        with session(cls.hidden, vae, precision, "decode") as run:
            image = hand_over.decode(run, samples, normalized)
            if image is None:
                latent = inputs.latent_5d(samples)
                run.look_at(latent, normalized)
                plan = run.plan(
                    tuple(latent.shape), memory_format=memory_layout, chunk_frames=chunk_frames
                )
                image = as_rgb(run.decode(latent, plan, normalized=normalized).flatten(0, 1))
        return io.NodeOutput(image, ui=run.ui)
