"""One picture over several devices from one program: worker processes, one a device."""

from .pool import WorkerPool
from .sharded import decode_sharded

__all__ = ["WorkerPool", "decode_sharded"]
