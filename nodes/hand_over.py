"""A VAE that is no Wan VAE: ComfyUI's own code decodes and encodes with it, and the report says so.

So one workflow with a switch between models needs no second set of nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..wan_vae.device import dtype_name
from ..wan_vae.report import SCHEMA
from ..wan_vae.said import said, worded
from . import inputs
from .session import Session


def decode(run: Session, samples: Mapping[str, Any]) -> torch.Tensor | None:
    """The IMAGE [N, H, W, C] of `samples` by ComfyUI's VAE; None for a Wan VAE, which is ours."""
    reason = run.not_a_wan_vae()
    if reason is None:
        return None
    latent = inputs.latent(samples)
    image: torch.Tensor = run.vae.decode(latent)
    image = image.flatten(0, -4) if image.ndim > 4 else image
    _report(run, reason, frames=image.shape[0], height=image.shape[1], width=image.shape[2])
    return image


def encode(run: Session, pixels: torch.Tensor) -> torch.Tensor | None:
    """The latent of `pixels` [N, H, W, C] by ComfyUI's VAE; None for a Wan VAE, which is ours."""
    reason = run.not_a_wan_vae()
    if reason is None:
        return None
    image = inputs.frames(pixels)
    channels = getattr(run.vae, "image_channels", 3)
    latent: torch.Tensor = run.vae.encode(image[..., :channels])
    _report(run, reason, frames=image.shape[0], height=image.shape[1], width=image.shape[2])
    return latent


def _report(run: Session, reason: str, *, frames: int, height: int, width: int) -> None:
    note = said("vae.not_wan", "ComfyUI's own VAE code did it: {reason}", reason=reason)
    run.report = {
        "schema": SCHEMA,
        "operation": run.operation,
        "status": "done",
        "device": str(run.vae.device),
        "dtype": dtype_name(run.vae.vae_dtype),
        "pixel_shape": [1, 3, frames, height, width],
        "done_frames": frames,
        "total_frames": frames,
        **run.speed(frames),
        "fallbacks": [str.__str__(note)],
        "worded": worded([note]),
    }
