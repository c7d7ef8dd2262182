"""Triton compiles for a card that this process does not touch."""

from __future__ import annotations

import subprocess
from typing import Any

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from ..device import Device
from ..kernel import BuildError

# What Triton raises without the card's driver library (an AssertionError on NVIDIA's) or without a
# compiler of C.
_NO_LAUNCHER = (AssertionError, ImportError, OSError, RuntimeError, subprocess.SubprocessError)


def target_of(device: Device) -> GPUTarget:
    """What Triton's compiler calls `device`. CDNA has 64 threads in a warp.

    Raises ValueError for a card that is neither NVIDIA's nor AMD's.
    """
    if device.vendor == "amd":
        return GPUTarget("hip", device.architecture, 64 if "mfma" in device.features else 32)
    if device.capability is None:
        raise ValueError(f"Triton does not compile for {device.architecture}")
    return GPUTarget("cuda", device.capability[0] * 10 + device.capability[1], 32)


def compile_for(device: Device) -> None:
    """Let every kernel that is compiled in this process from here on be for `device`.

    For a process that launches nothing. Its environment hides the cards. What launches a kernel is
    compiled too, where the card's driver library is installed. The interpreter compiles nothing.
    """
    card = device.runs_on or device
    if card.vendor == "interpreter":
        return
    target = target_of(card)
    triton.runtime.driver.set_active(_AheadDriver(target))


class _AheadDriver(DriverBase):  # type: ignore[misc]  # Triton has no types
    """Names the card. It has no streams and loads nothing.

    launcher_cls, utils: what makes the launcher of a kernel; only where the driver library is.
    """

    def __init__(self, target: GPUTarget) -> None:
        super().__init__()
        self._target = target
        own: Any = backends["nvidia" if target.backend == "cuda" else "amd"].driver
        try:
            made = own()  # compiles the launcher; needs the library, and no card
        except _NO_LAUNCHER:
            return
        self.utils, self.launcher_cls = made.utils, made.launcher_cls

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise BuildError(f"{ty}: nothing is launched here")

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        raise BuildError("nothing is launched here")

    def get_benchmarker(self) -> Any:
        raise BuildError("nothing is launched here")
