"""comfy-kitchen as it is installed here: its version, and its convolution for a device.

The package is imported when a device was asked for that it may have kernels for, and not before: it
loads 40 MB or more. Facts of its interface: releases 0.2.34 to 0.2.40.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import first_line
from ...said import said
from ..device import Device, Vendor
from ..kernel import BuildError

_DISTRIBUTION = "comfy-kitchen"
# The first release with the function.
_LEAST_VERSION = (0, 2, 34)
FUNCTION = "fp16_conv3d"
# Which of its backends has compiled kernels for a vendor's cards; "eager" is for the tests.
_BACKENDS: dict[Vendor, str] = {"nvidia": "cuda", "amd": "hip", "interpreter": "eager"}
# What an import raises for a torch or a C library that is too old for it.
_IMPORT_FAILURES = (ImportError, OSError, AttributeError, RuntimeError)

# `fp16_conv3d(x, weight, bias, residual, stride)`, see `layers.py`.
Convolution = Callable[..., torch.Tensor]


def installed_version() -> str | None:
    """The release that is installed, or None."""
    try:
        return version(_DISTRIBUTION)
    except PackageNotFoundError:
        return None


def unavailable_reason(device: Device, release: str | None) -> str | None:
    """Why comfy-kitchen of version `release` has no kernels for `device`, or None if it has.

    Imports the package if its version will do.
    """
    if release is None:
        return said("kitchen.missing", "comfy-kitchen is not installed")
    numbers = tuple(int(n) for n in re.findall(r"\d+", release)[:3])
    if numbers < _LEAST_VERSION:
        least = ".".join(map(str, _LEAST_VERSION))
        return said(
            "kitchen.old",
            "{package} {release} is installed: its convolution came with {least}",
            package=_DISTRIBUTION,
            release=release,
            least=least,
        )
    if device.runs_on is not None:
        return said(
            "kitchen.imitates",
            "{package} has machine code for the card itself, and imitates no other",
            package=_DISTRIBUTION,
        )
    backend = _BACKENDS.get(device.vendor)
    if backend is None:
        return said(
            "kitchen.device",
            "{package} has no compiled kernels for this device",
            package=_DISTRIBUTION,
        )
    try:
        registry = _registry()
    except _IMPORT_FAILURES as error:
        return said(
            "kitchen.import",
            "{package} {release} cannot be imported: {error}",
            package=_DISTRIBUTION,
            release=release,
            error=first_line(error),
        )
    # Such as a build of PyTorch for CUDA 12, or a card without matrix instructions.
    answer = registry.validate_backend_for_call(backend, FUNCTION, {})
    if answer.success:
        return None
    return said(
        "kitchen.refuses",
        "{package} {release} cannot run here: {reason}",
        package=_DISTRIBUTION,
        release=release,
        reason=first_line(answer.failure_reason),
    )


def convolution(device: Device) -> Convolution:
    """The function of the backend for `device`, for which there is no `unavailable_reason`."""
    found: Convolution = _registry().get_implementation(FUNCTION, _BACKENDS[device.vendor])
    return found


def _registry() -> Any:
    return importlib.import_module("comfy_kitchen").registry


class _Watch(TorchDispatchMode):
    """Counts the convolutions that PyTorch computes."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.convolutions = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        # "aten::conv3d" or "aten::convolution", by whether gradients are recorded.
        if func.name().startswith(("aten::conv3d", "aten::convolution")):
            self.convolutions += 1
        return func(*args, **(kwargs or {}))


def check_own_kernel(
    conv: Convolution, weight: torch.Tensor, bias: torch.Tensor, size: tuple[int, int, int]
) -> None:
    """Raise BuildError if `conv` hands a layer over to PyTorch, without a word.

    That is right, but neither fast nor what a report would say. size: frames, rows and columns of
    the result. It decides too: 0.2.40 hands 32 x 32 over on an H200, and runs 96 x 96 itself. So
    it is that of a proof, which then is one of the package's own kernel.
    """
    frames, rows, cols = size
    operand = (1, frames - 1 + weight.shape[2], rows + 2, cols + 2, weight.shape[1])
    x = torch.zeros(operand, dtype=weight.dtype, device=weight.device)
    with _Watch() as watch:
        conv(x.permute(0, 4, 1, 2, 3), weight, bias, None, [1, 1, 1])
    if watch.convolutions:
        o, c = weight.shape[:2]
        raise BuildError(
            said(
                "kernel.handed_over",
                "{package} hands {in_channels} to {out_channels} channels over to PyTorch",
                package=_DISTRIBUTION,
                in_channels=c,
                out_channels=o,
            )
        )
