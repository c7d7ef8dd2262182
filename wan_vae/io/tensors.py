"""Tensors that a caller or a file hands over: safetensors and PyTorch files."""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..device import numbers_of
from ..errors import CheckpointError, first_line
from ..layout import memory_order
from .kinds import PYTORCH, Wanted, is_safetensors, kind_of

_USUAL = (torch.Tensor, torch.nn.Parameter)


def missing_data(x: torch.Tensor) -> str | None:
    """Why the numbers of `x` do not lie in its memory: "nested", "sparse", "quantized", "fake",
    "meta" or "freed" (its memory was given back); None if they do."""
    if x.is_nested:  # first: nested tensors refuse some of the other questions
        return "nested"
    if x.layout != torch.strided:
        return f"sparse ({x.layout})"
    if x.is_quantized:  # PyTorch takes its bits for numbers, and crashes over them
        return "quantized"
    if type(x) not in _USUAL and any(t.__name__ == "FakeTensor" for t in type(x).__mro__):
        return "fake"
    if x.is_meta:
        return "meta"
    return "freed" if _needed_bytes(x) > x.untyped_storage().nbytes() else None


def seen_finite(x: torch.Tensor) -> bool:
    """Whether a quick look shows every number of `x`, on the CPU, to be finite; False says nothing.

    A sum of numbers of which one is NaN or inf is neither finite. By NumPy, in this thread: of more
    than 32768 numbers PyTorch wakes a thread for each core, which takes longer than to look (10 to
    20 ms on a host with two H200, also for 1 MB).
    """
    is_known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    if not is_known or missing_data(x) is not None:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(x.detach().resolve_neg().numpy().sum()))


class Extremes:
    """The smallest and the largest number of all tensors that were seen, on their device, of which
    nobody is asked meanwhile. If there was a NaN, both are NaN.

    By `aminmax` and `cat` alone: a process loads each of PyTorch's CUDA kernels when it is first
    used (`isfinite(x).all()` has three, 6 to 13 ms each, H200), and a run needs these two anyway.
    """

    def __init__(self) -> None:
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None

    def see(self, x: torch.Tensor) -> None:
        """Look at `x`, in one pass over memory."""
        if not x.numel():
            return
        # As it lies in memory: of a tensor in another order a dense copy would be made.
        low, high = (end.float() for end in x.detach().permute(memory_order(x)).aminmax())
        if self._found is not None:
            low, high = torch.cat([end.view(1) for end in (*self._found, low, high)]).aminmax()
        self._found = low, high

    def read(self) -> tuple[float, float] | None:
        """Both; None if there was no number. Waits for the device."""
        if self._found is None:
            return None
        low, high = numbers_of(self._found)
        return low, high

    def are_finite(self) -> bool:
        """Whether there was neither NaN nor inf. Waits for the device."""
        return all(map(isfinite, self.read() or ()))


def _needed_bytes(x: torch.Tensor) -> int:
    """Bytes of storage up to the last number of `x`."""
    if x.is_contiguous():
        return int(x.storage_offset() + x.numel()) * x.element_size() if x.numel() else 0
    if x.numel() == 0:
        return 0
    last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return int(x.storage_offset() + last + 1) * x.element_size()


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Map all tensors of a safetensors file into memory. Raises CheckpointError.

    The sizes that its header claims are compared with the size of the file before anything else is
    parsed, so that a hostile header cannot make this function allocate, and a download that broke
    off is named.
    """
    if problem := _size_problem(path):
        raise CheckpointError(f"a safetensors file {problem}")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as tensors:
            names = tensors.keys()
            return {name: tensors.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, KeyError, AttributeError, RuntimeError, OSError) as error:
        # AttributeError / KeyError: a dtype that this version of PyTorch does not have.
        raise CheckpointError(f"not a readable safetensors file: {first_line(error)}") from error


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The texts that a readable safetensors file holds beside its tensors."""
    with safe_open(str(path), framework="pt", device="cpu") as tensors:
        return dict(tensors.metadata() or {})


def _size_problem(path: Path) -> str | None:
    """What is wrong with the size of a safetensors file; None if nothing is, or nobody can say."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > size - 8:
            return f"cut short inside its header: {size} bytes; download it again"
        text = file.read(length)
    try:
        entries = json.loads(text)
        ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None  # the library says what is wrong with the header
    if size < expected:
        return f"cut short: {size} of {expected} bytes; download it again"
    if size > expected:
        return f"{size - expected} bytes longer than its header says: damaged; download it again"
    return None


# What torch.load raises for a damaged file depends on where the damage is.
_DAMAGED_PTH = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,  # and UnicodeDecodeError
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    AssertionError,
    struct.error,
    OverflowError,
    MemoryError,
    RecursionError,
    zipfile.BadZipFile,
)


def read_pytorch(path: Path) -> object:
    """Read a PyTorch file of plain tensors; with `weights_only`, a pickle can hold nothing else.

    Raises CheckpointError.
    """
    try:
        # A file object, because torch.load would judge the content by the suffix of a path.
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "refused: the pickle contains more than tensors and could run code "
            f"({_refused(error)}); if you trust it, convert it to safetensors"
        ) from error
    except _DAMAGED_PTH as error:
        raise CheckpointError(f"not a readable PyTorch file: {first_line(error)}") from error


# What the unpickler refuses stands behind advice of several lines to load the file all the same.
_REFUSED = re.compile(r"GLOBAL ([\w.]+)|(Unsupported \w+ \w+)")


def _refused(error: pickle.UnpicklingError) -> str:
    """What of a pickle was refused: "it holds argparse.Namespace"."""
    found = _REFUSED.search(str(error))
    if found is None:
        return first_line(error)
    return found[2] or f"it holds {found[1]}"


# Names that people give to PyTorch files.
PYTORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")


def read_tensors(path: Path, wanted: Wanted) -> object:
    """What a safetensors file (a dict of tensors) or a PyTorch file (anything) holds.

    The content decides, because people rename files. Raises CheckpointError, which says what the
    file is if it is something else.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if is_safetensors(start):
            return read_safetensors(path)
        kind = kind_of(path)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}") from error
    if kind is not None and kind != PYTORCH:
        raise CheckpointError(kind.instead_of(wanted))
    # A pickle begins with its protocol.
    if kind == PYTORCH or start[:1] == b"\x80" or path.suffix.lower() in PYTORCH_SUFFIXES:
        return read_pytorch(path)
    raise CheckpointError(
        f"no safetensors and no PyTorch file, or cut short: {path.stat().st_size} bytes that begin "
        f"with {start!r}"
    )


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions of any new file.

    `save_file` alone creates a file that only its owner can read, even if the umask allows more.
    Raises SafetensorError, OSError.
    """
    path.open("ab").close()
    mode = path.stat().st_mode
    save_file(dict(tensors), str(path))
    path.chmod(mode)
