"""What nodes are given, checked: latents, images, and the dtype that they give back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..wan_vae import LatentError
from ..wan_vae.io.image import frames_view
from ..wan_vae.io.tensors import missing_data
from ..wan_vae.io.video_encode import Sound
from ..wan_vae.said import said


def latent(samples: Mapping[str, Any]) -> torch.Tensor:
    """The tensor of a LATENT; of a nested one (video with audio) the first, which is the video's.

    Raises LatentError for what is no latent.
    """
    if not isinstance(samples, Mapping) or "samples" not in samples:
        keys = f"keys {sorted(map(str, samples))}" if isinstance(samples, Mapping) else None
        raise LatentError(
            said(
                "latent.none",
                "the latent is no LATENT ({what}): expected a dictionary with a tensor 'samples', "
                "as samplers and Load Latent give",
                what=keys or type(samples).__name__,
            )
        )
    tensor = samples["samples"]
    if getattr(tensor, "is_nested", False):
        tensor = next(iter(tensor.unbind()), None)
    if not isinstance(tensor, torch.Tensor):
        raise LatentError(
            said(
                "latent.no_tensor",
                "the latent's 'samples' is a {what}: expected a tensor",
                what=type(tensor).__name__,
            )
        )
    if kind := missing_data(tensor):
        raise LatentError(
            said(
                "latent.no_data",
                "the latent is a {kind} tensor: expected a dense one, with data",
                kind=kind,
            )
        )
    return tensor


def latent_5d(samples: Mapping[str, Any]) -> torch.Tensor:
    """`latent` as [B, C, T, H, W]: that of an image gets T = 1. Raises LatentError, also for an
    empty one."""
    tensor = latent(samples)
    shape = tuple(tensor.shape)
    if tensor.ndim == 4:
        tensor = tensor.unsqueeze(2)
    if tensor.ndim != 5:
        raise LatentError(
            said(
                "latent.shape",
                "the latent has shape {shape}: expected [B, C, T, H, W] of a video or [B, C, H, W] "
                "of an image",
                shape=shape,
            )
        )
    if 0 in shape:
        raise LatentError(
            said(
                "latent.empty",
                "the latent is empty, its shape is {shape}: expected every size to be above 0",
                shape=shape,
            )
        )
    return tensor


def frames(image: torch.Tensor) -> torch.Tensor:
    """An IMAGE [T, H, W, C >= 3]. Raises LatentError for what is none, or an empty one."""
    kind = missing_data(image) if isinstance(image, torch.Tensor) else type(image).__name__
    shape = None if kind else tuple(image.shape)
    if shape is None or len(shape) != 4 or 0 in shape or shape[3] < 3:
        what = f"{kind}, and no dense tensor" if shape is None else f"of shape {shape}"
        raise LatentError(
            said(
                "encode.no_image",
                "the image is {what}: expected frames [T, H, W, 3 or more]",
                what=what,
            )
        )
    return image


def videos(image: torch.Tensor, are_images: bool, colours: int = 3) -> torch.Tensor:
    """Pixels [B, colours, T, H, W] in [0, 1] of what nodes give a VAE to encode.

    One video that has the colours is a view.

    image: the frames of one video [T, H, W, C >= 3], or as many images if `are_images`; or a batch
    of videos [B, T, H, W, C]. Raises LatentError for anything else.
    """
    if isinstance(image, torch.Tensor) and image.ndim == 5:
        clips = list(image)
    elif are_images:
        clips = [frame.unsqueeze(0) for frame in frames(image)]
    else:
        clips = [image]
    pixels = [frames_view(frames(clip), colours) for clip in clips]
    if not pixels:
        raise LatentError(
            said("encode.no_video", "the batch of videos to encode is empty: expected one or more")
        )
    return pixels[0] if len(pixels) == 1 else torch.cat(pixels)


def sound(audio: Mapping[str, Any] | None, place: int = 0) -> Sound | None:
    """The sound of the video at `place` of a batch: its own, or the only one; None without audio.

    Raises LatentError for what is no AUDIO.
    """
    if audio is None:
        return None
    has_both = isinstance(audio, Mapping) and {"waveform", "sample_rate"} <= set(audio)
    if not has_both:
        raise LatentError(
            said(
                "video.not_audio",
                "the audio is a {what}: expected a dictionary with 'waveform' and 'sample_rate', "
                "as Load Audio gives",
                what=type(audio).__name__,
            )
        )
    waveform, rate = audio["waveform"], audio["sample_rate"]
    if not isinstance(waveform, torch.Tensor) or waveform.ndim != 3 or 0 in waveform.shape:
        is_tensor = isinstance(waveform, torch.Tensor)
        raise LatentError(
            said(
                "video.no_audio",
                "the audio's waveform is {what}: expected [batch, channels, samples]",
                what=tuple(waveform.shape) if is_tensor else type(waveform).__name__,
            )
        )
    try:  # a number of any library
        samples_a_second = None if isinstance(rate, (str, bytes)) else int(rate)
    except (TypeError, ValueError, OverflowError):
        samples_a_second = None
    if samples_a_second is None:
        raise LatentError(
            said(
                "video.no_rate",
                "the audio's sample_rate is {what}: expected a number",
                what=repr(rate),
            )
        )
    sound = Sound(waveform[min(place, len(waveform) - 1)], samples_a_second)
    if wrong := sound.is_wrong():
        raise LatentError(wrong)
    return sound


def output_dtype(vae: Any) -> torch.dtype:
    """Dtype of IMAGE and LATENT tensors: ComfyUI's choice where it has one, else float32."""
    choose = getattr(vae, "vae_output_dtype", None)
    return torch.float32 if choose is None else choose()
