"""The limits that compiled kernels are held to: those of the card, and what may be spilled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from wan_vae.kernels.device import Device, amd, nvidia

from .usage import RESERVED_SHARED_BYTES, Resources

# What may be spilled, and where more than that: data, so that a change of it is seen.
ALLOWED = Path(__file__).with_name("limits.json")
# Registers are given out in eights to each thread.
_STEP = 8


@dataclass(frozen=True)
class _Registers:
    """Of a thread, and of a multiprocessor (what AMD calls a compute unit); its threads."""

    of_thread: int
    of_multiprocessor: int
    threads: int


_NVIDIA = {
    name: _Registers(255, 65536, threads)
    for name, threads in {
        **{"sm_75": 1024, "sm_80": 2048, "sm_86": 1536, "sm_89": 1536},
        **{"sm_90": 2048, "sm_100": 2048, "sm_120": 1536},
    }.items()
}
# CDNA: four SIMD units of 512 registers in 64 lanes. RDNA 3 and 4: two of 1536 in 32 lanes.
_AMD = {
    "gfx942": _Registers(512, 4 * 512 * 64, 2048),
    "gfx1100": _Registers(256, 2 * 1536 * 32, 1024),
    "gfx1201": _Registers(256, 2 * 1536 * 32, 1024),
}
_REGISTERS = _NVIDIA | _AMD
ARCHITECTURES = tuple(_REGISTERS)


@dataclass(frozen=True)
class Spill:
    """Bytes of stack that kernels may have. family, kernel, config: patterns as in a shell.
    architectures: such patterns, of which one fits. why: one sentence."""

    family: str
    kernel: str
    config: str
    architectures: tuple[str, ...]
    stack_bytes: int
    why: str

    def covers(self, row: Resources) -> bool:
        """Whether it is about this kernel."""
        return (
            any(fnmatchcase(row.architecture, pattern) for pattern in self.architectures)
            and fnmatchcase(row.family, self.family)
            and fnmatchcase(row.kernel, self.kernel)
            and fnmatchcase(row.config, self.config)
        )


@dataclass(frozen=True)
class Limits:
    """stack_bytes: of a kernel that no entry of `spills` is about; of several the first counts."""

    stack_bytes: int
    spills: tuple[Spill, ...]

    @classmethod
    def read(cls, path: Path) -> Limits:
        """From JSON."""
        data = json.loads(path.read_text(encoding="utf-8"))
        spills = (Spill(**s | {"architectures": tuple(s["architectures"])}) for s in data["spills"])
        return cls(data["stack_bytes"], tuple(spills))

    def stack_of(self, row: Resources) -> int:
        """Bytes of stack that this kernel may have."""
        return next((s.stack_bytes for s in self.spills if s.covers(row)), self.stack_bytes)


def card(architecture: str) -> Device:
    """A card of `architecture`, such as "sm_89" or "gfx1100"."""
    if architecture in _AMD:
        return amd(architecture, architecture, 1)
    return nvidia(architecture, divmod(int(architecture.removeprefix("sm_")), 10), 1)


def exceeded(rows: Iterable[Resources], limits: Limits) -> Iterator[str]:
    """A line for each limit that a kernel exceeds on the card that it was compiled for."""
    for row in rows:
        for what, taken, most in _held(row, limits):
            if taken > most:
                yield f"{row.kernel}, {row.config}, {row.architecture}: {what}: {taken} of {most}"


def _held(row: Resources, limits: Limits) -> Iterator[tuple[str, int, int]]:
    """What is limited, how much of it the kernel takes, and how much it may."""
    device, most = card(row.architecture), _REGISTERS[row.architecture]
    shared = device.shared_bytes
    yield "bytes of stack", row.stack_bytes, limits.stack_of(row)
    yield "registers of a thread", row.registers, most.of_thread
    yield "bytes of shared memory", row.shared_bytes, shared
    # Launch bounds: so many programs find room on a multiprocessor at the same time.
    resident, given = row.resident, -(-row.registers // _STEP) * _STEP
    at_once = f" of {resident} programs at once"
    yield f"registers{at_once}", given * row.threads * resident, most.of_multiprocessor
    yield f"threads{at_once}", row.threads * resident, most.threads
    # Turing's 64 KiB hold one program of most kernels: the others wait for it.
    if device.capability != (7, 5) and resident > 1:
        taken = (row.shared_bytes + RESERVED_SHARED_BYTES) * resident
        yield f"bytes of shared memory{at_once}", taken, shared + RESERVED_SHARED_BYTES
