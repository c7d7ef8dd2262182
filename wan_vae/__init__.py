"""Decodes Wan 2.1 and 2.2 latents to pixels, and encodes pixels to latents.

    import wan_vae
    vae = wan_vae.load("wan_2.1_vae.safetensors")
    latent = wan_vae.load_latent("my.latent")
    pixels = vae.decode(latent)            # [B, 3, 4T-3, 8H, 8W] float32 in [-1, 1]
    print(vae.last_report.as_dict())

It knows nothing of ComfyUI and needs torch, numpy and safetensors. The command line and video and
image files also need av, Pillow and tqdm.

The names in `__all__` are the public interface, which semantic versioning covers; docs/python.md
describes them. Everything else may change in any version.
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
    from .io.latents import load_latent, save_latent
    from .io.sink import CallbackSink, Sink, TensorSink
    from .pipeline import WanVAE, load
    from .report import DecodeReport
    from .sharding.context import ShardContext
    from .workers.pool import WorkerPool, decode_sharded

__all__ = [
    "BackendError",
    "CallbackSink",
    "CheckpointError",
    "DecodeCancelled",
    "DecodeMemoryError",
    "DecodeReport",
    "GeometryError",
    "LatentError",
    "LayoutError",
    "NotAWanVAEError",
    "OutputError",
    "ShardContext",
    "ShardingError",
    "Sink",
    "TensorSink",
    "WanVAE",
    "WanVAEConfig",
    "WanVAEError",
    "WorkerPool",
    "__version__",
    "decode_sharded",
    "detect_config",
    "load",
    "load_latent",
    "save_latent",
]

# A name is imported on its first use. `python -m wan_vae` imports this module too, and torch takes
# seconds to import; meanwhile the command line must answer --help, wrong usage and Ctrl-C.
_HOMES = {
    "CallbackSink": "io.sink",
    "DecodeReport": "report",
    "ShardContext": "sharding.context",
    "Sink": "io.sink",
    "TensorSink": "io.sink",
    "WanVAE": "pipeline",
    "WanVAEConfig": "config",
    "WorkerPool": "workers.pool",
    "decode_sharded": "workers.pool",
    "detect_config": "config",
    "load": "pipeline",
    "load_latent": "io.latents",
    "save_latent": "io.latents",
}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
