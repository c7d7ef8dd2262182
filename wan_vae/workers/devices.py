"""The devices of a pool, and the transport between its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ..device import pick_device
from ..errors import BackendError, ShardingError
from ..said import said

Transport = Literal["nccl", "gloo"]

# A single image of 1536 x 2048 is smaller. One of 2048 x 2048 takes two H200 49.6 ms, and a single
# H200 71.8.
_SHARED_PIXELS = 3_200_000

_KINDS = ("cpu", "cuda", "mps", "xpu")


def parse_devices(
    text: str | Sequence[str | torch.device], own: torch.device | None = None
) -> list[torch.device]:
    """Devices from "all", "0,1,3", "cuda:0,cuda:1", "cpu,cpu", or a sequence of them.

    "all" is every CUDA device, or every Intel card, or the GPU of a Mac, or else one CPU. own: the
    device that decodes without workers: "all" is then every device of its kind, and itself where
    there is no other (a CPU, a Mac's GPU, DirectML). Raises ShardingError that names the entry that
    is missing on this machine.
    """
    if isinstance(text, str):
        if text.strip() == "all":
            cuda = torch.cuda.device_count()
            xpu = torch.xpu.device_count() if torch.xpu.is_available() else 0
            if own is None:
                return all_devices(cuda, xpu, torch.backends.mps.is_available())
            count = {"cuda": cuda, "xpu": xpu}.get(own.type, 0)
            return [torch.device(own.type, i) for i in range(count)] if count > 1 else [own]
        text = [part.strip() for part in text.split(",") if part.strip()]
    if not text:
        raise ShardingError(
            said("run.no_device", "no device was named: expected 'all', '0,1' or 'cpu,cpu'")
        )
    devices = []
    for rank, part in enumerate(text):
        name = f"cuda:{part}" if isinstance(part, str) and part.isdigit() else part
        if isinstance(name, str) and not name.startswith(_KINDS):
            raise ShardingError(
                said(
                    "run.unknown_device",
                    "rank {rank} cannot start: device {name} is unknown: expected 'all', '0,1' or "
                    "'cpu,cpu'",
                    rank=rank,
                    name=repr(part),
                ),
                rank=rank,
            )
        try:
            devices.append(pick_device(name))
        except BackendError as error:
            text = said(
                "run.cannot_start", "rank {rank} cannot start: {error}", rank=rank, error=error
            )
            raise ShardingError(text, rank=rank) from None
    return devices


def all_devices(cuda: int, xpu: int, has_mps: bool) -> list[torch.device]:
    """What "all" is on a machine with so many devices: those of the first kind that it has."""
    for kind, count in (("cuda", cuda), ("xpu", xpu)):
        if count:
            return [torch.device(kind, i) for i in range(count)]
    return [torch.device("mps" if has_mps else "cpu")]


def worth_sharing(pixel_shape: Sequence[int]) -> bool:
    """Whether several devices are faster than one with a video [B, 3, T, H, W].

    Workers add some 20 ms for their messages, in which an NVIDIA H100 decodes 1.6 million pixels
    (`wan-vae bench nodes --sharded`); half of the work must be more than that.
    """
    batch, _, frames, height, width = pixel_shape
    return batch * frames * height * width >= _SHARED_PIXELS


def make_current(device: torch.device) -> None:
    """Make `device` that of this thread, where its kind has several and knows such a thing."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).set_device(device)


def pick_transport(devices: Sequence[torch.device]) -> Transport:
    """NCCL for different CUDA devices where this PyTorch has it, else Gloo (staged by the host)."""
    different = len(set(devices)) == len(devices)
    if different and all(d.type == "cuda" for d in devices):
        import torch.distributed as dist

        # A torch that was built without it has the module, and nothing else in it.
        if dist.is_available() and dist.is_nccl_available():
            return "nccl"
    return "gloo"
