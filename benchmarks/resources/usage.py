"""What a compiled kernel takes, as the tools that come with Triton read it from machine code."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# The first KiB of a program's shared memory is the driver's, and from 9.0 on machine code counts it
# as the program's own.
RESERVED_SHARED_BYTES = 1024


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    family: "triton" or "cuda". architecture: what it is compiled for, "sm_90" or "gfx1100". loads:
    how a convolution in Triton is loaded. shared_bytes, threads: of one program. resident: programs
    that a multiprocessor is meant to hold at the same time. tensor_core_instructions, waits:
    counted for Triton alone, else None; waits not for AMD.
    """

    kernel: str
    config: str
    family: str
    architecture: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    resident: int = 1
    loads: str = ""
    tensor_core_instructions: int | None = None
    waits: int | None = None


class Usage(NamedTuple):
    """registers, stack_bytes (spilled registers too): of a thread. shared_bytes: static, of a
    program."""

    registers: int
    stack_bytes: int
    shared_bytes: int


def usage_of(cubin: bytes) -> Usage:
    """What the one kernel in `cubin` takes. Raises ValueError if that cannot be read."""
    text = _run("cuobjdump", ["--dump-resource-usage"], cubin)
    numbers = []
    for name in ("REG", "STACK", "SHARED"):
        match = re.search(rf"\b{name}:(\d+)", text)
        if match is None:
            raise ValueError(f"no {name} in what cuobjdump says")
        numbers.append(int(match[1]))
    return Usage(*numbers)


def amd_usage_of(assembly: str) -> Usage:
    """What the one kernel in assembly for an AMD card takes, by the notes at its end: vector
    registers, scratch memory. Raises ValueError if that cannot be read."""
    numbers = []
    for name in ("vgpr_count", "private_segment_fixed_size", "group_segment_fixed_size"):
        match = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if match is None:
            raise ValueError(f"no {name} in the assembly")
        numbers.append(int(match[1]))
    return Usage(*numbers)


def nvdisasm(cubin: bytes) -> str:
    """The instructions of `cubin`."""
    return _run("nvdisasm", ["-c"], cubin)


def _run(tool: str, arguments: Sequence[str], cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_tools() / tool), *arguments, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def _tools() -> Path:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("cuobjdump comes with Triton: pip install triton")
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin"
