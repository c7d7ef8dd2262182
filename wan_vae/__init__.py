"""Wan 2.1 / 2.2 video latents to pixels, right in every memory format.

    import wan_vae
    vae = wan_vae.load("wan_2.1_vae.safetensors")
    latent = wan_vae.load_latent("my.latent")
    pixels = vae.decode(latent)            # [B, 3, 4T-3, 8H, 8W] float32 in [-1, 1]
    print(vae.last_report.as_dict())

It knows nothing of ComfyUI and needs torch, numpy and safetensors. The command line and video and
image files also need av, Pillow and tqdm.

The names in `__all__` are the public interface, which semantic versioning covers, with the wire
format of a report and the command line; docs/python.md describes them. Everything else, also the
exact text of errors and reports, may change in any version.
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
    from .hooks import DeviceMemory, OnProgress, ShouldStop
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
    "DeviceMemory",
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

# A name is imported on its first use. `python -m wan_vae` imports this module too, and torch takes
# seconds to import; meanwhile the command line must answer --help, wrong usage and Ctrl-C.
_HOMES = {
    "Backend": "options",
    "CallbackSink": "io.sink",
    "DecodeReport": "report",
    "DeviceMemory": "hooks",
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
