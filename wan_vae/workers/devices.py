"""The devices of a pool, and the transport between its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ..device import pick_device
from ..errors import BackendError, ShardingError

Transport = Literal["nccl", "gloo"]

_KINDS = ("cpu", "cuda", "mps", "xpu")


def parse_devices(text: str | Sequence[str | torch.device]) -> list[torch.device]:
    """Devices from "all", "0,1,3", "cuda:0,cuda:1", "cpu,cpu", or a sequence of them.

    "all" is every CUDA device, or one CPU without any. Raises ShardingError that names the entry
    that is missing on this machine.
    """
    if isinstance(text, str):
        if text.strip() == "all":
            count = torch.cuda.device_count()
            return [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
        text = [part.strip() for part in text.split(",") if part.strip()]
    if not text:
        raise ShardingError("no device was named: expected 'all', '0,1' or 'cpu,cpu'")
    devices = []
    for rank, part in enumerate(text):
        name = f"cuda:{part}" if isinstance(part, str) and part.isdigit() else part
        if isinstance(name, str) and not name.startswith(_KINDS):
            raise ShardingError(
                f"rank {rank} cannot start: device {part!r} is unknown: expected 'all', '0,1' or "
                "'cpu,cpu'",
                rank=rank,
            )
        try:
            devices.append(pick_device(name))
        except BackendError as error:
            raise ShardingError(f"rank {rank} cannot start: {error}", rank=rank) from None
    return devices


def pick_transport(devices: Sequence[torch.device]) -> Transport:
    """NCCL for different CUDA devices where this PyTorch has it, else Gloo (staged by the host)."""
    different = len(set(devices)) == len(devices)
    if different and all(d.type == "cuda" for d in devices):
        import torch.distributed as dist

        if dist.is_nccl_available():
            return "nccl"
    return "gloo"
