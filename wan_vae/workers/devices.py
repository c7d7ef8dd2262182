"""The devices of a pool, and the transport between its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ..device import pick_device
from ..errors import BackendError, ShardingError

Transport = Literal["nccl", "gloo"]

_KINDS = ("cpu", "cuda", "mps", "xpu")


def parse_devices(
    text: str | Sequence[str | torch.device], own: torch.device | None = None
) -> list[torch.device]:
    """Devices from "all", "0,1,3", "cuda:0,cuda:1", "cpu,cpu", or a sequence of them.

    "all" is every CUDA device, or every Intel card, or the GPU of a Mac, or else one CPU. own: the
    device that decodes without workers. Raises ShardingError that names the entry that is missing
    on this machine, and for "all" where no worker can use a device like `own` (DirectML).
    """
    if isinstance(text, str):
        if text.strip() == "all":
            if own is not None and own.type not in _KINDS:
                raise ShardingError(
                    f"'all' names CUDA, Intel and Apple devices: workers cannot use {own}"
                )
            return all_devices(
                torch.cuda.device_count(),
                torch.xpu.device_count() if torch.xpu.is_available() else 0,
                torch.backends.mps.is_available(),
            )
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


def all_devices(cuda: int, xpu: int, has_mps: bool) -> list[torch.device]:
    """What "all" is on a machine with so many devices: those of the first kind that it has."""
    for kind, count in (("cuda", cuda), ("xpu", xpu)):
        if count:
            return [torch.device(kind, i) for i in range(count)]
    return [torch.device("mps" if has_mps else "cpu")]


def make_current(device: torch.device) -> None:
    """Make `device` that of this thread, where its kind has several and knows such a thing."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).set_device(device)


def pick_transport(devices: Sequence[torch.device]) -> Transport:
    """NCCL for different CUDA devices where this PyTorch has it, else Gloo (staged by the host)."""
    different = len(set(devices)) == len(devices)
    if different and all(d.type == "cuda" for d in devices):
        import torch.distributed as dist

        if dist.is_nccl_available():
            return "nccl"
    return "gloo"
