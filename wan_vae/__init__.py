"""Wan 2.1 / 2.2 video latents to pixels, right in every memory format.

    import wan_vae
    vae = wan_vae.load("wan_2.1_vae.safetensors")
    latent = wan_vae.load_latent("my.latent")
    pixels = vae.decode(latent)            # [B, 3, 4T-3, 8H, 8W] float32 in [-1, 1]
    print(vae.last_report.as_dict())

Knows nothing of ComfyUI; needs torch, numpy and safetensors. The command line, video and image
files need av, Pillow and tqdm too.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
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
    from .io.latents import load_latent
    from .pipeline import WanVAE, load
    from .report import DecodeReport

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
    "load_latent",
]

# Imported when first asked for: `python -m wan_vae` comes through here, and importing torch takes
# seconds in which Ctrl-C, --help and wrong usage are to be answered by the command line.
_HOMES = {
    "DecodeReport": "report",
    "WanVAE": "pipeline",
    "WanVAEConfig": "config",
    "detect_config": "config",
    "load": "pipeline",
    "load_latent": "io.latents",
}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
