"""Wan 2.1 / 2.2 video latents to pixels, right in every memory format.

    import wan_vae
    vae = wan_vae.load("wan_2.1_vae.safetensors")
    latent = wan_vae.load_latent("my.latent")
    pixels = vae.decode(latent)            # [B, 3, 4T-3, 8H, 8W] float32 in [-1, 1]
    print(vae.last_report.as_dict())

The names in `__all__`, their public attributes and their keyword arguments are the public
interface: semantic versioning covers them, the wire format of a report, and the command line.
Modules below this one are not covered; neither are the exact texts of errors and reports.

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
    from .hooks import OnProgress, ShouldStop
    from .io.image import ImageSink
    from .io.latents import load_latent, save_latent
    from .io.sink import CallbackSink, NullSink, Sink, TensorSink
    from .options import Backend, Gather, MemoryFormat, Precision
    from .pipeline import WanVAE, load
    from .planning.plan import Plan
    from .report import DecodeReport
    from .sharding.context import ShardContext
    from .workers.pool import WorkerPool
    from .workers.sharded import decode_sharded

__all__ = [
    "Backend",
    "BackendError",
    "CallbackSink",
    "CheckpointError",
    "DecodeCancelled",
    "DecodeMemoryError",
    "DecodeReport",
    "Gather",
    "GeometryError",
    "ImageSink",
    "LatentError",
    "LayoutError",
    "MemoryFormat",
    "NotAWanVAEError",
    "NullSink",
    "OnProgress",
    "OutputError",
    "Plan",
    "Precision",
    "ShardContext",
    "ShardingError",
    "ShouldStop",
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

# Imported when first asked for: `python -m wan_vae` comes through here, and importing torch takes
# seconds in which Ctrl-C, --help and wrong usage are to be answered by the command line.
_HOMES = {
    "Backend": "options",
    "CallbackSink": "io.sink",
    "DecodeReport": "report",
    "Gather": "options",
    "ImageSink": "io.image",
    "MemoryFormat": "options",
    "NullSink": "io.sink",
    "OnProgress": "hooks",
    "Plan": "planning.plan",
    "Precision": "options",
    "ShardContext": "sharding.context",
    "ShouldStop": "hooks",
    "Sink": "io.sink",
    "TensorSink": "io.sink",
    "WanVAE": "pipeline",
    "WanVAEConfig": "config",
    "WorkerPool": "workers.pool",
    "decode_sharded": "workers.sharded",
    "detect_config": "config",
    "load": "pipeline",
    "load_latent": "io.latents",
    "save_latent": "io.latents",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
