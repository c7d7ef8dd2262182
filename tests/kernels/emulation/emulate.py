"""Kernels in CUDA C++ on a CPU: their source behind machine.h, compiled by g++, called by ctypes.

What is emulated, and which mistakes show, is said in fibers.h and machine.h.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from wan_vae.kernels.cuda.driver import Argument, TensorMap
from wan_vae.kernels.cuda.program import Grid, Program

FOLDER = Path(__file__).parent
HEADERS = ("machine.h", "fibers.h")
# Behind them and the macros, where this is a program's first header.
_BEHIND = {"machine.cuh": (), "hopper.cuh": ("hopper.h",)}
# Of a program's warps, of a warp's lanes and of a grid's programs.
ORDERS = ("forward", "reversed", "rotated")
# Most of the time goes to compiling: -O2 costs more than it saves.
_FLAGS = (
    *("-std=c++17", "-O1", "-march=native", "-w", "-fPIC", "-shared"),
    # longjmp goes from stack to stack, which a fortified one takes for a mistake.
    *("-U_FORTIFY_SOURCE", "-fcf-protection=none"),
    # Each library has its own threads and memory.
    *("-fvisibility=hidden", "-fno-gnu-unique"),
)


class EmulationError(AssertionError):
    """What a kernel did wrong: an address, a barrier that not all threads reach."""


class _Launch(ctypes.Structure):
    """`Launch` of fibers.h."""

    _fields_ = (
        ("grid", c_uint32 * 3),
        ("threads", c_int),
        ("shared_bytes", c_uint32),
        ("order", c_int),
        ("arguments", c_int),
        ("pointers", POINTER(c_void_p)),
        ("sizes", POINTER(c_int)),
        ("ranges", c_int),
        ("lows", POINTER(c_void_p)),
        ("lengths", POINTER(c_uint64)),
        ("all_ranges_known", c_int),
    )


class _Frames(ctypes.Structure):
    """`Frames` of hopper.h: what a tensor map says."""

    _fields_ = (
        ("address", c_void_p),
        *((name, c_int) for name in ("n", "h", "w", "c", "rows", "columns", "channels")),
    )


def frames_map(
    address: int, shape: tuple[int, int, int, int], box: tuple[int, int, int]
) -> TensorMap:
    """As `driver.frames_map`, for the emulation."""
    frames = bytes(_Frames(address, *shape, *box))
    return TensorMap.from_buffer_copy(frames.ljust(ctypes.sizeof(TensorMap), b"\0"))


class Emulation(TorchFunctionMode):
    """Launches programs on the CPU. As a context it notes which tensors the addresses are of, so
    that the vector loads and stores beyond them are found.

    order: one of ORDERS, for the launches to come. conflicts: eight rows of 16 bytes that ldmatrix
    could not read at once, in the launches so far.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.order = ORDERS[0]
        self.conflicts = 0
        self._folder = folder
        self._libraries: dict[str, ctypes.CDLL] = {}
        # Bytes from an address on; the addresses since the last launch.
        self._extents: dict[int, int] = {}
        self._noted: set[int] = set()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Note what `data_ptr` answers, and how far the tensor goes from there, in bytes."""
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.data_ptr and result:
            tensor = args[0]
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in steps)
            extent = (last + 1) * tensor.element_size()
            # Two views of one launch may begin at the same place.
            if result in self._noted:
                extent = max(extent, self._extents[result])
            self._extents[result] = extent
            self._noted.add(result)
        return result

    def queue(
        self, program: Program, device: torch.device, grid: Grid, arguments: Sequence[Argument]
    ) -> None:
        """As `program._queue`, but finished when it returns. Raises EmulationError."""
        if device.type != "cpu":
            raise ValueError(f"the emulation runs on a CPU, not on {device}")
        addresses = [a.value for a in arguments if isinstance(a, c_void_p) and a.value]
        known = [a for a in addresses if a in self._extents]
        self._noted.clear()
        n, m = len(arguments), len(known)
        launch = _Launch(
            grid,
            program.threads,
            program.shared_bytes,
            ORDERS.index(self.order),
            n,
            (c_void_p * n)(*(ctypes.addressof(a) for a in arguments)),
            (c_int * n)(*(ctypes.sizeof(a) for a in arguments)),
            m,
            (c_void_p * m)(*known),
            (c_uint64 * m)(*(self._extents[a] for a in known)),
            m == len(addresses),
        )
        library = self._library(program)
        fault = library.emulated(byref(launch))
        self.conflicts += library.emulated_conflicts()
        if fault is not None:
            raise EmulationError(f"{program.entry}: {fault.decode()}")

    def in_every_order(self, compute: Callable[[], Any]) -> Any:
        """What `compute` returns: a tensor, or a sequence of them and of None. Its bits must be the
        same whichever thread runs first."""
        was, results = self.order, []
        for self.order in ORDERS:
            result = compute()
            parts = [result] if isinstance(result, torch.Tensor) else list(result)
            results.append((result, [None if p is None else _bits(p) for p in parts]))
        self.order = was
        for order, (_, bits) in zip(ORDERS[1:], results[1:], strict=True):
            for ours, first in zip(bits, results[0][1], strict=True):
                same = ours is first if first is None else torch.equal(ours, first)
                assert same, f"other bits if the threads run {order}"
        return results[0][0]

    def _library(self, program: Program) -> ctypes.CDLL:
        """`program` compiled, from the folder if it was compiled before."""
        digits = re.fullmatch(r"(?:sm|compute)_(\d+)[af]?", program.machine_code)
        assert digits is not None, program.machine_code
        behind = _BEHIND[program.headers[0]]
        text = "\n".join(
            [
                f"#define __CUDA_ARCH__ {digits[1]}0",
                f'#include "{FOLDER / HEADERS[0]}"',
                *(f"#define {name} {value}" for name, value in program.defines),
                *(f'#include "{FOLDER / name}"' for name in behind),
                # They have the names of the program's first header.
                program.source[program.source.index("\n#line") :],
                'extern "C" __attribute__((visibility("default")))',
                "const char* emulated(const emulation::Launch& launch) {",
                f"  return emulation::run({program.entry}, launch);",
                "}",
                'extern "C" __attribute__((visibility("default")))',
                "u64 emulated_conflicts() { return emulation::conflicts; }",
                "",
            ]
        )
        headers = [(FOLDER / name).read_text(encoding="utf-8") for name in (*HEADERS, *behind)]
        key = hashlib.sha256("\0".join([*headers, text]).encode()).hexdigest()[:16]
        if key not in self._libraries:
            path = self._folder / f"{program.entry}-{key}.so"
            if not path.exists():
                compile_library(text, path)
            library = ctypes.CDLL(str(path))
            library.emulated.restype = c_char_p
            library.emulated_conflicts.restype = c_uint64
            self._libraries[key] = library
        return self._libraries[key]


def compile_library(text: str, path: Path) -> None:
    """C++ `text` as the shared library `path`, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, made = Path(folder, "kernel.cc"), Path(folder, "kernel.so")
        source.write_text(text, encoding="utf-8")
        command = ["g++", *_FLAGS, str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"g++: {done.stderr[:2000]}"
        os.replace(made, path)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that compares by bits: NaN is like itself, 0 is not like -0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.clone().view(integers[tensor.element_size()])
