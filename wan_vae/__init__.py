"""Wan 2.1 / 2.2 video latents to pixels, right in every memory format.

    import wan_vae
    vae = wan_vae.load("wan_2.1_vae.safetensors")
    pixels = vae.decode(latent)            # [B, 3, 4T-3, 8H, 8W] float32 in [-1, 1]
    print(vae.last_report.as_dict())

Knows nothing of ComfyUI; needs torch, numpy and safetensors.
"""

from .config import WanVAEConfig, detect_config
from .errors import (
    BackendError,
    CheckpointError,
    DecodeCancelled,
    DecodeMemoryError,
    GeometryError,
    LatentError,
    LayoutError,
    NotAWanVAEError,
    OutputError,
    ShardingError,
    WanVAEError,
)
from .pipeline import WanVAE, load
from .report import DecodeReport
from .version import __version__

__all__ = [
    "BackendError",
    "CheckpointError",
    "DecodeCancelled",
    "DecodeMemoryError",
    "DecodeReport",
    "GeometryError",
    "LatentError",
    "LayoutError",
    "NotAWanVAEError",
    "OutputError",
    "ShardingError",
    "WanVAE",
    "WanVAEConfig",
    "WanVAEError",
    "__version__",
    "detect_config",
    "load",
]
