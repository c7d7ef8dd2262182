"""Device memory: what is free, what a schedule will take, how much it took."""

from __future__ import annotations

from math import prod

import torch

from .config import WanVAEConfig

# Tensors of one chunk alive at once at the widest point of the eager path, in units of
# [C, 4 frames, H', W'] of the last stage: the shortcut, the norm's temporaries, the
# convolution's input with history, and its output.
_LIVE_TENSORS = 6


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a decode may still allocate on `device`; None where nobody can say (the CPU).

    On CUDA: what the driver reports, plus what PyTorch's allocator holds and does not use.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + idle


def last_stage_bytes(config: WanVAEConfig, latent_shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of one feature tensor of the last stage for one latent frame (4 pixel frames)."""
    b, _, _, h, w = latent_shape
    grow = config.spatial_factor // config.patch_size
    return prod((b, config.decoder_dim, config.temporal_factor, h * grow, w * grow)) * itemsize


def history_bytes(config: WanVAEConfig, latent_shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of the full feature cache: two frames for each 3x3x3 convolution of the decoder."""
    b, z, _, h, w = latent_shape
    base, mult = config.decoder_dim, config.dim_mult
    widths = [base * m for m in (mult[-1], *reversed(mult))]
    convs = 2 * (config.num_res_blocks + 1)
    # decoder.conv1 and the middle's four, then each stage on its own grid, then the head.
    total = (z + 4 * widths[0]) * h * w
    for i, out in enumerate(widths[1:]):
        total += convs * out * (h << i) * (w << i)
        if i < 2:
            total += out * (h << i) * (w << i)
    scale = len(widths) - 2
    total += widths[-1] * (h << scale) * (w << scale)
    return 2 * b * total * itemsize


def planned_bytes(
    config: WanVAEConfig, latent_shape: tuple[int, ...], itemsize: int, chunk_frames: int
) -> int:
    """Predicted peak of device memory above weights and output for chunks of `chunk_frames`."""
    per_frame = last_stage_bytes(config, latent_shape, itemsize)
    return history_bytes(config, latent_shape, itemsize) + _LIVE_TENSORS * per_frame * chunk_frames


# A chunk of about one 720p latent frame keeps an H200 busy; smaller pictures take more frames a
# chunk so that launches do not dominate.
_FULL_CHUNK_PIXELS = 4 * 720 * 1280


def plan_chunk_frames(
    config: WanVAEConfig, latent_shape: tuple[int, ...], itemsize: int, free: int | None
) -> int:
    """Latent frames a chunk: enough to fill the device, few enough to fit in `free` bytes."""
    b, _, t, h, w = latent_shape
    pixels = b * config.temporal_factor * h * w * config.spatial_factor**2
    frames = max(1, min(t, _FULL_CHUNK_PIXELS // pixels))
    if free is not None:
        while frames > 1 and planned_bytes(config, latent_shape, itemsize, frames) > 0.8 * free:
            frames -= 1
    return frames
