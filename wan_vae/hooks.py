"""What a run calls while it is under way, and whom it asks for device memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from .device import empty_cache
from .device import free_bytes as device_free_bytes
from .report import DecodeReport

# Frames done, frames in all, and the report of this moment.
OnProgress = Callable[[int, int, DecodeReport], None]
# Asked before each pass; true ends the run with DecodeCancelled. A pass that a device was given is
# computed to its end.
ShouldStop = Callable[[], bool]


class DeviceMemory(Protocol):
    """Who manages the memory of the device of a run: the process itself, or a program around it."""

    def free_bytes(self) -> int | None:
        """Bytes that a run may still allocate; None where nobody can say."""
        ...

    def give_back(self, wanted_bytes: int) -> None:
        """Free what nobody uses, and then what can be moved away, until `wanted_bytes` are free or
        nothing is left. The weights of the run stay."""
        ...

    def held(self) -> Mapping[str, int]:
        """Bytes on the device of what `give_back` manages beside the run, by a name for people."""
        ...


class OwnMemory:
    """The default: a process whose device memory nobody manages but PyTorch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_bytes(self) -> int | None:
        """See `device.free_bytes`."""
        return device_free_bytes(self._device)

    def give_back(self, wanted_bytes: int) -> None:
        """Collect garbage: tensors in a cycle, such as an exception and the frame that keeps it.
        Then empty the allocator's cache."""
        gc.collect()
        empty_cache(self._device)

    def held(self) -> Mapping[str, int]:
        """Nothing that has a name."""
        return {}


@dataclass(frozen=True)
class Hooks:
    """`on_progress` is called after each pass, `should_stop` before each.

    memory: who manages the device's memory; None is the process itself (`OwnMemory`).
    """

    on_progress: OnProgress | None = None
    should_stop: ShouldStop | None = None
    memory: DeviceMemory | None = None
