"""How the ranks of a pool meet: each worker joins the others, in a thread of its own."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch

from ..errors import ShardingError, WanVAEError
from ..said import said
from ..sharding.context import ShardContext
from ..sharding.transport import HOST_AND_DEVICE, Wire
from .devices import make_current


@dataclass(frozen=True)
class WorkerSettings:
    """How one worker starts; plain values only. rendezvous: the path of the file where ranks meet.

    start_s: for all ranks to arrive. wait_s: for one NCCL message (Gloo's limit comes with each
    decode). has_nvidia_driver: whether it is NVIDIA's driver that PyTorch asks for "cuda".
    """

    rank: int
    world_size: int
    device: str
    transport: str
    rendezvous: str
    start_s: float
    wait_s: float
    threads: int
    has_nvidia_driver: bool = False


@dataclass(frozen=True)
class Joined:
    """That this rank has tried to join the others, and the error with which that ended, if any."""

    error: RuntimeError | WanVAEError | None = None


def join(settings: WorkerSettings) -> Joined:
    """Join the other ranks: through a file, over the loopback interface.

    They send each other a first message, for which NCCL connects every two of them and loads its
    kernels. Else they would in the first run.
    """
    try:
        make_current(torch.device(settings.device))  # of this thread
        if settings.world_size > 1:
            _meet(settings)
    except (RuntimeError, WanVAEError) as error:
        return Joined(error)
    return Joined()


def _meet(settings: WorkerSettings) -> None:
    import torch.distributed as dist

    if not dist.is_available():
        raise ShardingError(
            said(
                "worker.no_distributed",
                "this PyTorch was built without torch.distributed: name one device",
            ),
            settings.rank,
        )
    from torch._C._distributed_c10d import FileStore, PrefixStore

    device, nccl = torch.device(settings.device), settings.transport == "nccl"
    start = timedelta(seconds=settings.start_s)
    # A store of our own, so that ranks may take longer to arrive than one message may. By its
    # path: of a URI with a space in it PyTorch would make another file on each side.
    store = FileStore(settings.rendezvous, settings.world_size)
    store.set_timeout(start)
    dist.init_process_group(
        HOST_AND_DEVICE if nccl else settings.transport,
        store=PrefixStore("wan_vae", store),
        rank=settings.rank,
        world_size=settings.world_size,
        # NCCL knows no time-out for one message, only this one.
        timeout=timedelta(seconds=settings.wait_s) if nccl else start,
        # Connects now, where the parent waits for it, and not within the first decode.
        device_id=device if nccl else None,
    )
    context = ShardContext(settings.rank, settings.world_size, timeout_s=settings.start_s)
    # Beside the weights, which another thread copies: neither is to wait for the other.
    stream = torch.cuda.Stream(device) if nccl else None
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        Wire(context, device).greet()
    if stream is not None:
        stream.synchronize()
