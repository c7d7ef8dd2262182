"""Which families of kernels there are, in order of preference; each is imported at first use.

To add a family: a package in this folder with `make_family`, and a line in `_MODULES`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import torch

from ..errors import BackendError, first_line
from ..ops.problem import Operation
from ..options import BACKENDS, Backend
from ..said import Said, expected_one_of, said
from .device import Device
from .kernel import Family, Kernel, no_gpu

_MODULES = {"cuda": ".cuda", "triton": ".triton", "kitchen": ".kitchen"}
# Python packages without which a family cannot be imported.
_PACKAGES = {"triton": "triton"}

FAMILIES = tuple(_MODULES)
# The families that a request may use, in order of preference.
REQUESTS = MappingProxyType(
    {"eager": (), "triton": ("triton",), "cuda": ("cuda",), "kitchen": ("kitchen",)}
)
# What "auto" stands for on the cards of a vendor.
_AUTO = MappingProxyType({"nvidia": REQUESTS["cuda"], "amd": ("triton", "kitchen")})
# What "auto" asks for too where a family cannot compile. Triton beside the CUDA family gains
# nothing (815.9 ms without, 820.0 with it: `wan-vae bench`, NVIDIA H200, 81 frames of 1280 x 720),
# and costs each process its import and the digest of its compiler.
_IN_PLACE_OF = MappingProxyType({"cuda": ("triton",)})
# The lowest compute capability of the NVIDIA cards for which "auto" asks for kernels: for all that
# there are. Of those of Turing (7.5) most need a later one, which the report says. A layer for
# which eager is faster on the card runs eager.
AUTO_CAPABILITY = (7, 5)
# How the architectures of the AMD cards begin for which "auto" asks for kernels: those for which
# they are compiled and held to limits without a card (`wan-vae bench resources --check`).
AUTO_AMD = ("gfx942", "gfx11", "gfx120")


def missing_package(family: str) -> str | None:
    """The package that `family` needs and that is not installed; None if nothing is missing."""
    package = _PACKAGES.get(family)
    return package if package is not None and importlib.util.find_spec(package) is None else None


# What the import of a family raises with another release of what it needs: no such module, or no
# such name in it; parameters that its decorators do not know; a library that does not load or finds
# no driver.
_UNIMPORTABLE = (
    ImportError,
    AttributeError,
    TypeError,
    ValueError,
    KeyError,
    OSError,
    RuntimeError,
    SyntaxError,
)


# A family may be imported by the thread that gets a process ready, and by a decode: the second one
# waits, because half of a package is no reason to do without its kernels.
_IMPORTING = threading.RLock()


def load(name: str) -> Family | str:
    """The family of this name, or why it cannot be imported."""
    with _IMPORTING:
        return _load(name)


@functools.cache
def _load(name: str) -> Family | str:
    missing = missing_package(name)
    if missing is not None:
        return _not_installed(missing)
    try:
        module = importlib.import_module(_MODULES[name], __package__)
        family: Family = module.make_family()
    except _UNIMPORTABLE as error:
        return said("kernel.import", "cannot be imported: {error}", error=first_line(error))
    return family


def families_of(requested: Backend, device: Device) -> tuple[str, ...]:
    """The families that `requested` stands for on `device`.

    "auto" imports those that need a compiler, to see whether it is here. Raises BackendError.
    """
    if requested not in BACKENDS:
        raise BackendError(expected_one_of("backend", requested, BACKENDS))
    if requested != "auto":
        return REQUESTS[requested]
    if auto_reason(device):
        return REQUESTS["eager"]
    families = _AUTO[device.vendor]
    mute = [name for name in families if name in _IN_PLACE_OF and _cannot_compile(name)]
    return (*families, *(other for name in mute for other in _IN_PLACE_OF[name]))


def _cannot_compile(name: str) -> bool:
    """Whether the family can compile nothing on this machine, for any card."""
    family = load(name)
    return isinstance(family, str) or not family.can_compile()


def auto_reason(device: Device) -> str | None:
    """Why "auto" asks for no kernels on `device`, or None."""
    if device.vendor in ("cpu", "interpreter"):
        return no_gpu()
    if device.vendor == "nvidia" and (device.capability or (0, 0)) >= AUTO_CAPABILITY:
        return None
    if device.vendor == "amd" and device.architecture.startswith(AUTO_AMD):
        return None
    return said(
        "kernel.not_by_default",
        "used by default on NVIDIA cards of compute capability {capability} or later and on AMD's "
        "{amd}, {device}",
        capability="{}.{}".format(*AUTO_CAPABILITY),
        amd=", ".join(AUTO_AMD),
        device=device.spoken,
    )


def _not_installed(package: str) -> Said:
    return said("kernel.not_installed", "{package} is not installed", package=package)


def unavailable_reason(name: str, device: Device, feature_dtype: torch.dtype) -> str | None:
    """Why no kernel of the family can run on `device`, or None if one can."""
    # First: what is not installed changes nothing where there is no card, and PyTorch may have none
    # of what a family imports there.
    if device.vendor == "cpu":
        return no_gpu()
    missing = missing_package(name)
    if missing is not None:
        return _not_installed(missing)
    family = load(name)
    if isinstance(family, str):
        return family
    reasons = [
        kernel.requires.unmet_by_device(device)
        or kernel.requires.unmet_by_dtype(device, feature_dtype)
        for kernel in family.kernels
    ]
    if None not in reasons:
        return _least_demanding(family, device, reasons)
    return family.unavailable_reason(device)


def _least_demanding(family: Family, device: Device, reasons: list[str | None]) -> str | None:
    """The reason of the kernel that asks for the lowest capability, of those for this vendor's
    cards if there are any: what is missing at least."""
    order = [
        (
            device.vendor not in kernel.requires.vendors,
            kernel.requires.capability or (99, 0),
            len(kernel.requires.features),
            reason,
        )
        for kernel, reason in zip(family.kernels, reasons, strict=True)
    ]
    return min(order, key=lambda entry: entry[:3])[3]


def is_timed_beside(name: str) -> bool:
    """See `Family`."""
    family = load(name)
    return isinstance(family, Family) and family.is_timed_beside


def kernels_of(operation: Operation, families: tuple[str, ...]) -> Iterator[Kernel[Any, Any]]:
    """The kernels for `operation` of those of `families` that can be imported, the best first."""
    for name in families:
        family = load(name)
        if isinstance(family, Family):
            yield from (kernel for kernel in family.kernels if kernel.operation == operation)
