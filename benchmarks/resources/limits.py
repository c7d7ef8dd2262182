"""The limits that compiled kernels are held to: those of the card, and what may be spilled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from wan_vae.kernels.device import Device, nvidia

from .usage import RESERVED_SHARED_BYTES, Resources

# What may be spilled, and where more than that: data, so that a change of it is seen.
ALLOWED = Path(__file__).with_name("limits.json")
_REGISTERS_OF_THREAD = 255
# Of a multiprocessor. Registers are given out in eights to each thread.
_REGISTERS, _STEP = 65536, 8
_THREADS = {75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}


@dataclass(frozen=True)
class Spill:
    """Bytes of stack that kernels may have. family, kernel, config: patterns as in a shell.
    capabilities: the lowest and the highest. why: one sentence."""

    family: str
    kernel: str
    config: str
    capabilities: tuple[int, int]
    stack_bytes: int
    why: str

    def covers(self, row: Resources) -> bool:
        """Whether it is about this kernel."""
        least, most = self.capabilities
        return (
            least <= row.capability <= most
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
        spills = (Spill(**s | {"capabilities": tuple(s["capabilities"])}) for s in data["spills"])
        return cls(data["stack_bytes"], tuple(spills))

    def stack_of(self, row: Resources) -> int:
        """Bytes of stack that this kernel may have."""
        return next((s.stack_bytes for s in self.spills if s.covers(row)), self.stack_bytes)


def card(capability: int) -> Device:
    """A card of compute capability `capability`, such as 89."""
    return nvidia(f"sm_{capability}", divmod(capability, 10), 1)


def exceeded(rows: Iterable[Resources], limits: Limits) -> Iterator[str]:
    """A line for each limit that a kernel exceeds on the card that it was compiled for."""
    for row in rows:
        for what, taken, most in _held(row, limits):
            if taken > most:
                yield f"{row.kernel}, {row.config}, sm_{row.capability}: {what}: {taken} of {most}"


def _held(row: Resources, limits: Limits) -> Iterator[tuple[str, int, int]]:
    """What is limited, how much of it the kernel takes, and how much it may."""
    shared = card(row.capability).shared_bytes
    yield "bytes of stack", row.stack_bytes, limits.stack_of(row)
    yield "registers of a thread", row.registers, _REGISTERS_OF_THREAD
    yield "bytes of shared memory", row.shared_bytes, shared
    # Launch bounds: so many programs find room on a multiprocessor at the same time.
    resident, given = row.resident, -(-row.registers // _STEP) * _STEP
    at_once = f" of {resident} programs at once"
    yield f"registers{at_once}", given * row.threads * resident, _REGISTERS
    yield f"threads{at_once}", row.threads * resident, _THREADS[row.capability]
    if resident > 1:
        reserved = RESERVED_SHARED_BYTES if row.capability >= 80 else 0
        taken = (row.shared_bytes + reserved) * resident
        yield f"bytes of shared memory{at_once}", taken, shared + reserved
