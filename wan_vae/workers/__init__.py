"""One picture over several devices from one program: worker processes, one a device."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pool import WorkerPool
    from .sharded import decode_sharded

__all__ = ["WorkerPool", "decode_sharded"]

# Imported on first use: a worker's process imports this package too, and needs neither; and it has
# to read its pipe before PyTorch is imported.
_HOMES = {"WorkerPool": "pool", "decode_sharded": "sharded"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
