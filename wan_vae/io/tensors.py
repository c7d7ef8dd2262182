"""Tensors that a caller or a file hands over: safetensors files, and tensors without data."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError, first_line


def missing_data(x: torch.Tensor) -> str | None:
    """ "nested", "sparse", "fake" or "meta" if `x` has no dense storage; None if it has."""
    if x.is_nested:  # first: nested tensors refuse some of the other questions
        return "nested"
    if x.layout != torch.strided:
        return f"sparse ({x.layout})"
    if any(t.__name__ == "FakeTensor" for t in type(x).__mro__):
        return "fake"
    return "meta" if x.is_meta else None


def read_safetensors(path: Path, start: bytes | None = None) -> dict[str, torch.Tensor]:
    """Map all tensors of a safetensors file into memory. Raises CheckpointError.

    start: the first eight bytes of the file, if the caller has read them already. The header size
    that they claim is compared with the size of the file before anything is parsed, so that a
    hostile header cannot make this function allocate.
    """
    if start is None:
        with path.open("rb") as file:
            start = file.read(8)
    size = path.stat().st_size
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else None
    if header is None or header > size - 8:
        raise CheckpointError(
            f"not a safetensors file, or cut short: {size} bytes"
            + ("" if header is None else f", but its header claims {header}")
        )
    try:
        with safe_open(str(path), framework="pt", device="cpu") as tensors:
            names = tensors.keys()
            return {name: tensors.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        # AttributeError / KeyError: a dtype that this version of PyTorch does not have.
        raise CheckpointError(f"not a readable safetensors file: {first_line(error)}") from error


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions of any new file.

    `save_file` alone creates a file that only its owner can read, even if the umask allows more.
    Raises SafetensorError, OSError.
    """
    path.open("ab").close()
    mode = path.stat().st_mode
    save_file(dict(tensors), str(path))
    path.chmod(mode)
