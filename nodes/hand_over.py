"""A VAE that is no Wan VAE: ComfyUI's own code decodes and encodes with it, and the report says so.

So one workflow with a switch between models needs no second set of nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import comfy.model_management as model_management
import torch

from ..wan_vae import LatentError
from ..wan_vae.device import dtype_name
from ..wan_vae.io.image import as_rgb, frames_to_pixels, on_white
from ..wan_vae.io.sink import Sink
from ..wan_vae.report import SCHEMA
from ..wan_vae.said import said
from . import inputs
from .session import Session

# Frames a second of a video whose model we do not know.
FPS = 24.0
# Frames that go to an encoder at a time, as float pixels.
_AT_A_TIME = 8


def decode(run: Session, samples: Mapping[str, Any], normalized: bool) -> torch.Tensor | None:
    """The IMAGE [N, H, W, C] of `samples` by ComfyUI's VAE; None for a Wan VAE, which is ours.

    normalized: what the user said of the latent. It is not followed, and the report says so.
    """
    image = _decoded(run, samples, normalized)
    if image is None:
        return None
    image = image.flatten(0, -4) if image.ndim > 4 else image
    _report(run, (1, 3, *image.shape[:3]))
    return image


def clips(run: Session, samples: Mapping[str, Any], normalized: bool) -> list[torch.Tensor] | None:
    """The videos [T, H, W, 1 or 3] of `samples` by ComfyUI's VAE, and images as frames of one
    video; None for a Wan VAE, which is ours. Alpha is flattened on white. normalized: see
    `decode`."""
    image = _decoded(run, samples, normalized)
    if image is None:
        return None
    if image.shape[-1] == 4:  # videos have no alpha
        image = on_white(image)
    made = list(image) if image.ndim == 5 else [image]
    _report(run, (len(made), 3, *made[0].shape[:3]))
    return made


def encode(run: Session, pixels: torch.Tensor, normalized: bool) -> torch.Tensor | None:
    """The latent of `pixels` [N, H, W, C] by ComfyUI's VAE; None for a Wan VAE, which is ours.

    normalized: see `decode`.
    """
    if not _is_another(run, normalized):
        return None
    image = inputs.frames(pixels)
    if not hasattr(run.vae, "pad_channel_value"):
        # Newer ComfyUI's VAE takes the channels that it needs, alpha too; VAE Encode of the older
        # ones gave it three.
        image = image[..., :3]
    latent: torch.Tensor = run.vae.encode(image)
    _report(run, (1, 3, *image.shape[:3]))
    return latent


def unchanged(run: Session) -> bool:
    """Whether the VAE stays as it is, because it is no Wan VAE."""
    reason = run.not_a_wan_vae()
    if reason is not None:
        run.fallbacks.append(
            said("vae.unchanged", "the VAE goes on as it came: {reason}", reason=reason)
        )
        _report(run)
    return reason is not None


def write(sink: Sink, clip: torch.Tensor) -> None:
    """Write the frames [T, H, W, C] in [0, 1] of a video to `sink`, which is closed, or aborted
    after an error or a cancel."""
    with ExitStack() as failed:
        failed.callback(sink.abort)
        for start in range(0, len(clip), _AT_A_TIME):
            model_management.throw_exception_if_processing_interrupted()
            part = as_rgb(clip[start : start + _AT_A_TIME])
            sink.write(frames_to_pixels(part), start, 0)
        sink.close()
        failed.pop_all()


def _is_another(run: Session, normalized: bool) -> bool:
    """Whether ComfyUI's own code does it; if so, the report says why."""
    reason = run.not_a_wan_vae()
    if reason is not None:
        run.fallbacks.append(
            said("vae.not_wan", "ComfyUI's own VAE code did it: {reason}", reason=reason)
        )
        if normalized:
            run.warnings.append(
                said("vae.not_normalised", "`normalized` is ignored: it is for latents of Wan VAEs")
            )
        run.enter("comfyui")
    return reason is not None


def _decoded(run: Session, samples: Mapping[str, Any], normalized: bool) -> torch.Tensor | None:
    """Images [N, H, W, C] or videos [B, T, H, W, C] of another VAE; None for a Wan VAE."""
    if not _is_another(run, normalized):
        return None
    latent = inputs.latent(samples)
    try:
        image: Any = run.vae.decode(latent)
    except model_management.OOM_EXCEPTION:
        raise
    except RuntimeError as error:
        # PyTorch names the sizes of a weight, and neither VAE nor latent.
        expected = getattr(run.vae, "latent_channels", None)
        if latent.ndim < 2 or expected in (None, latent.shape[1]):
            raise
        raise LatentError(
            said(
                "vae.other_latent",
                "the latent has {channels} channels: this VAE decodes {expected}; {reason}; use "
                "the VAE of the model that made the latent",
                channels=latent.shape[1],
                expected=expected,
                reason=run.not_a_wan_vae(),
            )
        ) from error
    shape = tuple(image.shape) if isinstance(image, torch.Tensor) else ()
    if len(shape) not in (4, 5) or shape[-1] not in (1, 3, 4):
        raise LatentError(
            said(
                "vae.no_pictures",
                "this VAE decodes to {what}, and not to pictures [N, H, W, 3]: use the nodes that "
                "are made for it (VAE Decode Audio for sound)",
                what=shape or type(image).__name__,
            )
        )
    pictures: torch.Tensor = image
    return pictures


def _report(run: Session, shape: tuple[int, ...] | None = None) -> None:
    """shape: [B, 3, T, H, W] of pixels; None if none were decoded or encoded."""
    run.report = {
        "schema": SCHEMA,
        "operation": run.operation,
        "status": "done",
        "device": str(run.vae.device),
        "dtype": dtype_name(run.vae.vae_dtype),
    }
    if shape is not None:
        frames = shape[0] * shape[2]
        run.report |= {
            "pixel_shape": list(shape),
            "done_frames": frames,
            "total_frames": frames,
            **run.speed(frames),
        }
