"""What the nodes' schemas share, and what older ComfyUI versions do not know of."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ..wan_vae.options import MEMORY_FORMATS, PRECISIONS

CATEGORY = "Wan VAE"


def schema(**fields: Any) -> io.Schema:
    """An `io.Schema` of `fields`, less those that this ComfyUI does not have (search aliases)."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    fields = {"category": CATEGORY, **fields}
    return io.Schema(**{name: value for name, value in fields.items() if name in known})


def advanced(input_type: Callable[..., io.Input], name: str, **options: Any) -> io.Input:
    """An optional input, folded away as advanced where the frontend can do that."""
    if "advanced" in inspect.signature(input_type).parameters:
        return input_type(name, optional=True, advanced=True, **options)
    # ComfyUI up to 0.8: the frontend knows the option, the class does not.
    made = input_type(name, optional=True, **options)
    made.extra_dict = {**made.extra_dict, "advanced": True}
    return made


def vae_input() -> io.Input:
    return io.Vae.Input(
        "vae", tooltip="A Wan 2.1 or Wan 2.2 VAE (also Qwen-Image's), from ComfyUI's own Load VAE."
    )


def latent_input() -> io.Input:
    return io.Latent.Input("samples", tooltip="The video or image latent to decode.")


def layout_input() -> io.Input:
    return advanced(
        io.Combo.Input,
        "memory_layout",
        options=list(MEMORY_FORMATS),
        default="auto",
        tooltip="In which order the numbers lie in memory. auto takes the fastest order that is "
        "right on this device. Every choice gives the same picture.",
    )


def precision_input() -> io.Input:
    return advanced(
        io.Combo.Input,
        "precision",
        options=list(PRECISIONS),
        default="auto",
        tooltip="Number format of the computation. auto takes the one that ComfyUI chose for this "
        "VAE, so flags such as --fp32-vae are respected.",
    )


def chunk_input() -> io.Input:
    return advanced(
        io.Int.Input,
        "chunk_frames",
        default=0,
        min=0,
        max=1024,
        tooltip="How many latent frames are decoded at a time. 0: planned from the free memory. "
        "Every value gives the same picture. Smaller values need less GPU memory and take longer.",
    )


_IS_NORMALIZED = (
    "The latent is normalised, as diffusers and WanVideoWrapper hold latents. Off for latents of "
    "ComfyUI's own samplers."
)


def normalized_input(tooltip: str = _IS_NORMALIZED) -> io.Input:
    return advanced(io.Boolean.Input, "normalized", default=False, tooltip=tooltip)


def fps_input() -> io.Input:
    return io.Float.Input(
        "fps",
        default=0.0,
        min=0.0,
        max=1000.0,
        step=0.01,
        tooltip="Frames per second. 0 takes the model's own: 24 for Wan 2.2 5B, 16 for the others.",
    )


def audio_input() -> io.Input:
    return io.Audio.Input(
        "audio", optional=True, tooltip="Sound for the video. It is cut where the pictures end."
    )


def bit_depth_input() -> io.Input:
    return advanced(
        io.Int.Input,
        "bit_depth",
        default=8,
        min=8,
        max=10,
        step=2,
        tooltip="10 bits keep smooth gradients without bands, but some players cannot play them.",
    )
