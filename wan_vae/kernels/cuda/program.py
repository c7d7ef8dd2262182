"""Programs: a kernel's source with its macros, compiled for a card and loaded once a device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ctypes import c_int
from dataclasses import dataclass
from importlib.resources import files
from typing import Protocol, TypeVar, runtime_checkable

import torch

from ...said import said
from ..cache_folder import cache_folder
from ..device import Device
from ..kernel import BuildError
from .driver import Argument, Function, compile_source


@dataclass(frozen=True)
class Program:
    """One kernel to compile: its source file in this folder, entry point and macros.

    machine_code: "sm_86" or "compute_86", see `Device.machine_code`. threads, shared_bytes: of one
    program (a block of threads). resident: programs that a multiprocessor holds at the same time,
    which the source promises by its launch bounds. headers: what stands in front of the source.
    """

    file: str
    entry: str
    defines: tuple[tuple[str, int], ...]
    machine_code: str
    threads: int
    shared_bytes: int = 0
    resident: int = 1
    headers: tuple[str, ...] = ("machine.cuh",)

    @property
    def header(self) -> str:
        """What stands in front of the source."""
        return "\n".join(_numbered(name) for name in self.headers)

    @property
    def source(self) -> str:
        """What is compiled."""
        return f"{self.header}\n{_numbered(self.file)}"


P = TypeVar("P", contravariant=True)


@runtime_checkable
class CompiledKernel(Protocol[P]):
    """A kernel of this family: besides what `Kernel` asks, it names what it compiles."""

    def programs(self, problem: P, config: str, device: Device) -> tuple[Program, ...]:
        """What `Kernel.build` compiles, no more and no less."""
        ...


def _numbered(name: str) -> str:
    """The file of this name, so that a compiler's messages name it and its lines."""
    return f'#line 1 "{name}"\n{_text(name)}'


@functools.cache
def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


@functools.cache
def build(program: Program) -> bytes:
    """Machine code, or PTX, of `program`; seconds, unless it is in the cache folder.

    Raises BuildError with the compiler's first message.
    """
    folder = cache_folder()
    kept = None if folder is None else folder / "kernels"
    return compile_source(program.source, dict(program.defines), program.machine_code, kept)


@functools.cache
def _loaded(program: Program, index: int) -> Function:
    """`program` loaded on the current device."""
    return Function(build(program), program.entry, program.shared_bytes, index)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many of them `device` has."""
    if device.type != "cuda":
        return 2  # the emulation of the tests: more tiles than programs
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


Grid = tuple[int, int, int]


def launch(
    program: Program, device: torch.device, grid: Grid, arguments: Sequence[Argument]
) -> None:
    """Queue `program` on the current stream of `device`, `grid` times.

    For an empty grid there is nothing to do.
    """
    if all(grid):
        _queue(program, device, grid, arguments)


# Every kernel goes through here: the tests put their emulation in its place.
def _queue(
    program: Program, device: torch.device, grid: Grid, arguments: Sequence[Argument]
) -> None:
    if device.type == "meta":  # compiled ahead, as the Triton family does it
        build(program)
        return
    if device.type != "cuda":
        raise BuildError(
            said(
                "kernel.nvidia",
                "{entry} was made for NVIDIA cards, not for {kind}",
                entry=program.entry,
                kind=device.type,
            )
        )
    if device.index == torch.cuda.current_device():
        _loaded(program, device.index).launch(grid, program.threads, arguments)
    else:
        with torch.cuda.device(device):
            _loaded(program, device.index).launch(grid, program.threads, arguments)


def launch_persistent(
    program: Program, device: torch.device, tiles: int, arguments: Sequence[Argument]
) -> None:
    """As `launch`, with as many programs as the device holds at once: they share `tiles`."""
    programs = min(tiles, multiprocessors(device) * program.resident)
    launch(program, device, (programs, 1, 1), arguments)


@functools.lru_cache(maxsize=512)
def integers(*numbers: int) -> tuple[c_int, ...]:
    """Arguments of a launch; those of a layer are the same chunk after chunk."""
    return tuple(map(c_int, numbers))
