"""WanVAEDecodeSharded: one decode over several devices, each rank writing its rows of the IMAGE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_management as model_management
from comfy_api.latest import io

from ..wan_vae.io.image import as_rgb
from ..wan_vae.options import AXES, COLLECTS, AxisRequest, Collect, MemoryFormat
from . import hand_over, inputs
from .reports import HIDDEN
from .schema import (
    advanced,
    chunk_input,
    latent_input,
    layout_input,
    normalized_input,
    precision_input,
    schema,
    vae_input,
)
from .session import session
from .shards import POOLS, Sharding, decode


class WanVAEDecodeSharded(io.ComfyNode):
    """Decodes over worker processes, one a device, or falls back to one device and says why."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WanVAEDecodeSharded",
            display_name="Wan VAE Decode (Sharded)",
            description="Decodes one Wan latent on several GPUs. Each GPU decodes its part of "
            "every frame. The picture is that of Wan VAE Decode.",
            search_aliases=[
                "multi gpu vae",
                "parallel vae decode",
                "sharded decode",
                "two gpus",
                "out of memory",
            ],
            inputs=[
                latent_input(),
                vae_input(),
                io.String.Input(
                    "devices",
                    default="all",
                    tooltip="all, or a list of GPUs such as 0,1,3. With cpu,cpu you can try it "
                    "without a GPU.",
                ),
                advanced(
                    io.Combo.Input,
                    "axis",
                    options=list(AXES),
                    default="auto",
                    tooltip="The side along which the picture is divided. auto takes the one with "
                    "less exchange between the devices.",
                ),
                advanced(
                    io.Combo.Input,
                    "gather",
                    options=list(COLLECTS),
                    default="shared",
                    tooltip="How the parts become one image. shared: every device writes its own "
                    "part. rank0 and all: the devices exchange pixels first, which is only for "
                    "comparison.",
                ),
                advanced(
                    io.Boolean.Input,
                    "allow_fallback",
                    default=True,
                    tooltip="If a device fails, decode on one device and say so in the report, "
                    "instead of stopping with an error.",
                ),
                advanced(
                    io.Float.Input,
                    "timeout_s",
                    default=30.0,
                    min=1.0,
                    max=3600.0,
                    tooltip="How many seconds a device waits for another one before the decode "
                    "fails.",
                ),
                layout_input(),
                precision_input(),
                chunk_input(),
                normalized_input(),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The frames, in order.")],
            hidden=list(HIDDEN),
        )

    @classmethod
    def validate_inputs(cls, devices: Any = None) -> bool:
        """Start processes for the workers while the nodes before this one run; refuses nothing."""
        if isinstance(devices, str):  # not what another node makes
            POOLS.start_ahead(devices, model_management.vae_device())
        return True

    @classmethod
    def execute(
        cls,
        samples: Mapping[str, Any],
        vae: Any,
        devices: str = "all",
        axis: AxisRequest = "auto",
        gather: Collect = "shared",
        allow_fallback: bool = True,
        timeout_s: float = 30.0,
        memory_layout: MemoryFormat = "auto",
        precision: str = "auto",
        chunk_frames: int = 0,
        normalized: bool = False,
    ) -> io.NodeOutput:
        sharding = Sharding(devices, axis, gather, allow_fallback, timeout_s)
        with session(cls.hidden, vae, precision, "decode", is_shared=True) as run:
            image = hand_over.decode(run, samples, normalized)
            if image is None:
                latent = inputs.latent_5d(samples)
                run.look_at(latent, normalized)
                frames = decode(
                    run,
                    latent,
                    sharding,
                    memory_format=memory_layout,
                    chunk_frames=chunk_frames,
                    normalized=normalized,
                )
                image = as_rgb(frames.flatten(0, 1))
        return io.NodeOutput(image, ui=run.ui)
