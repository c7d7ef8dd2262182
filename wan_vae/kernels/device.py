"""What a device can do, as data: the capability by which kernels are chosen.

Kernels are chosen for a `Device`, and run on a `torch.device`. These are two things: a test or a
measurement can choose as for one card and run on another, which imitates it: `WAN_VAE_CAPABILITY`
(such as 8.6) makes an NVIDIA card choose kernels, shared memory and machine code as a card of that
capability does. Its driver then compiles the PTX of that architecture for the real card. With an
AMD architecture (such as gfx1100) an NVIDIA card, and Triton's interpreter, choose kernels and
configurations as that card does; Triton compiles them for the card in use.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch

from ..errors import BackendError
from ..said import said

# Names the capability that an NVIDIA card imitates.
IMITATE = "WAN_VAE_CAPABILITY"
# "interpreter" is Triton's, which runs kernels in Python on the CPU, for tests.
Vendor = Literal["nvidia", "amd", "apple", "intel", "cpu", "interpreter", "other"]
# cp_async: copies to shared memory that the program does not wait for. tma: whole tiles, copied by
# one instruction. wgmma, tcgen05: tensor cores that read shared memory. mfma, wmma: AMD's.
Feature = Literal["cp_async", "tma", "wgmma", "tcgen05", "mfma", "wmma"]

_KIB = 1024
# Shared memory that one program may have, in KiB, by compute capability.
_SHARED_KIB = {(7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227}
_SHARED_KIB_OF_OTHERS = 99
# Capabilities of cards for servers alone.
_FULL_RATE = ((7, 0), (8, 0), (9, 0), (10, 0))


@dataclass(frozen=True)
class Device:
    """One kind of card. `architecture` is what a compiler calls it: "sm_90", "gfx1100".

    capability: NVIDIA's compute capability. shared_bytes: of one program. multiprocessors: also
    what other vendors call compute units or cores. runs_on: the device that imitates this one, or
    None if it is itself.
    """

    name: str
    vendor: Vendor
    architecture: str
    features: frozenset[Feature] = frozenset()
    shared_bytes: int = 0
    multiprocessors: int = 1
    capability: tuple[int, int] | None = None
    runs_on: Device | None = None

    @classmethod
    def chosen_for(cls, device: torch.device) -> Device:
        """The device for which kernels are chosen: `Device.of(device)`, or with the environment's
        WAN_VAE_CAPABILITY a card of that capability or architecture, which `device` imitates.

        Raises BackendError for a value that is neither.
        """
        real = cls.of(device)
        wanted = os.environ.get(IMITATE)
        if not wanted or (real.capability is None and real.vendor != "interpreter"):
            return real
        if re.fullmatch(r"gfx[0-9a-f]+", wanted):
            return real.imitating(wanted)
        match = re.fullmatch(r"(\d+)\.(\d)", wanted)
        if match is None:
            raise BackendError(
                said(
                    "device.imitate",
                    "{variable} is {value}: expected a capability such as 8.6, or an AMD "
                    "architecture such as gfx1100",
                    variable=IMITATE,
                    value=repr(wanted),
                )
            )
        return real if real.capability is None else real.imitating((int(match[1]), int(match[2])))

    def imitating(self, wanted: tuple[int, int] | str) -> Device:
        """This device as an NVIDIA card of a capability, or an AMD card of an architecture: its
        features and shared memory, no more."""
        if wanted == self.capability:
            return self
        if isinstance(wanted, str):
            card = amd(f"{self.name} as {wanted}", wanted, self.multiprocessors)
        else:
            card = nvidia(f"{self.name} as {wanted[0]}.{wanted[1]}", wanted, self.multiprocessors)
        return replace(card, runs_on=self)

    @property
    def imitation(self) -> str | None:
        """What the device imitates, in words; None if it is itself."""
        if self.runs_on is None:
            return None
        kind = "" if self.capability is None else "compute capability "
        return f"as {kind}{self.generation} ({IMITATE})"

    @property
    def generation(self) -> str:
        """As WAN_VAE_CAPABILITY names it: "8.6", "gfx1100"."""
        if self.capability is None:
            return self.architecture
        return f"{self.capability[0]}.{self.capability[1]}"

    @property
    def machine_code(self) -> str:
        """What a compiler makes for it: "sm_86", machine code of the card itself; "compute_86",
        PTX that the driver of the card that imitates it compiles.

        PTX of an architecture newer than the real card's cannot be loaded: then it is the real
        card's.
        """
        real = None if self.runs_on is None else self.runs_on.capability
        if real is None or self.capability is None:
            return self.architecture
        major, minor = min(self.capability, real)
        return f"compute_{major}{minor}"

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """The device that `device` names. Reads TRITON_INTERPRET for the CPU."""
        if device.type == "cpu":
            return INTERPRETER if os.environ.get("TRITON_INTERPRET") == "1" else CPU
        if device.type == "mps":
            return cls("Apple GPU", "apple", "mps")
        if device.type == "xpu":
            return cls("Intel GPU", "intel", "xpu")
        if device.type != "cuda":
            return cls(device.type, "other", device.type)
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            architecture = str(properties.gcnArchName).partition(":")[0]
            return amd(properties.name, architecture, properties.multi_processor_count)
        return nvidia(
            properties.name,
            (properties.major, properties.minor),
            properties.multi_processor_count,
        )

    @property
    def has_slow_float32_sums(self) -> bool:
        """Whether its tensor cores add in float32 at half the rate of float16.

        GeForce's do. NVIDIA's cards for servers with the same architecture do not, which their
        capability does not tell: there both are timed for nothing.
        """
        return self.vendor == "nvidia" and self.capability not in _FULL_RATE

    @property
    def tunes_by_search(self) -> bool:
        """Whether the library of convolutions, if it is switched on, tries its algorithms at each
        new shape, for seconds to minutes: AMD's MIOpen does."""
        return self.vendor == "amd" and torch.backends.cudnn.enabled

    @property
    def spoken(self) -> str:
        """The device in a sentence: "this card has 8.9"."""
        if self.capability is not None:
            return f"this card has {self.capability[0]}.{self.capability[1]}"
        return f"this device is {self.architecture}"


def nvidia(name: str, capability: tuple[int, int], multiprocessors: int) -> Device:
    """An NVIDIA card of compute capability `capability`."""
    features: set[Feature] = set()
    if capability >= (8, 0):
        features.add("cp_async")
    if capability >= (9, 0):
        features.add("tma")
    if capability == (9, 0):
        features.add("wgmma")
    if capability[0] == 10:
        features.add("tcgen05")
    shared = _SHARED_KIB.get(capability, _SHARED_KIB_OF_OTHERS) * _KIB
    architecture = f"sm_{capability[0]}{capability[1]}"
    return Device(
        name, "nvidia", architecture, frozenset(features), shared, multiprocessors, capability
    )


def amd(name: str, architecture: str, multiprocessors: int) -> Device:
    """An AMD card of `architecture`, such as "gfx1100"."""
    features: set[Feature] = set()
    if architecture.startswith(("gfx908", "gfx90a", "gfx94", "gfx95")):
        features.add("mfma")
    elif architecture.startswith(("gfx11", "gfx120")):
        features.add("wmma")
    return Device(name, "amd", architecture, frozenset(features), 64 * _KIB, multiprocessors)


CPU = Device("CPU", "cpu", "cpu")
INTERPRETER = Device(
    "Triton's interpreter", "interpreter", "interpreter", frozenset({"cp_async", "tma"}), 1 << 30
)

# Cards that people have, by the name that they use.
CARDS = MappingProxyType(
    {
        card.name: card
        for card in (
            nvidia("RTX 2060", (7, 5), 30),
            nvidia("RTX 3060", (8, 6), 28),
            nvidia("RTX 3090", (8, 6), 82),
            nvidia("A100", (8, 0), 108),
            nvidia("RTX 4060", (8, 9), 24),
            nvidia("RTX 4090", (8, 9), 128),
            nvidia("L40S", (8, 9), 142),
            nvidia("RTX 5060 Ti", (12, 0), 36),
            nvidia("RTX 5090", (12, 0), 170),
            nvidia("H100", (9, 0), 132),
            nvidia("H200", (9, 0), 132),
            nvidia("B200", (10, 0), 148),
            amd("RX 7900 XTX", "gfx1100", 96),
            amd("RX 9070 XT", "gfx1201", 64),
            amd("MI300X", "gfx942", 304),
            Device("Apple M3", "apple", "mps"),
            Device("Intel Arc", "intel", "xpu"),
            CPU,
        )
    }
)
