"""Pages of host memory that are there before somebody writes to them, and pages that stay.

The first write to a page stops the writer while the system finds and clears it. For a video that
takes longer than the copy, so threads that wait for pixels ask for the pages of the next ones.
CUDA copies by itself only from and to pages that the system cannot move away: `LockedPages`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from typing import Protocol

import torch

# Linux 5.14: maps pages as a write would, without writing; several threads at a time. Python has no
# name for it.
_MADV_POPULATE_WRITE = 23
_madvise: Callable[[int, int, int], int] | None = None
if sys.platform == "linux":
    _madvise = ctypes.CDLL(None, use_errno=True).madvise
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def stretches(part: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Where `part` [A, B, ...] lies: its stretches of memory by the first two dimensions, as first
    byte within its storage and number of bytes."""
    if not part.numel():
        return
    size, outer = part.element_size(), part.stride()[:2]
    inner = zip(part.shape[2:], part.stride()[2:], strict=True)
    length = (1 + sum((n - 1) * step for n, step in inner)) * size
    for i, j in product(*map(range, part.shape[:2])):
        yield (int(part.storage_offset()) + i * outer[0] + j * outer[1]) * size, length


def populate(part: torch.Tensor) -> bool:
    """Map the pages of `part` [A, B, ...] for writing; its contents stay.

    False where this system cannot. Raises OSError where there is no room, in place of the signal
    that ends the process at a write to a file in full memory.
    """
    if _madvise is None:
        return False
    base, page = part.untyped_storage().data_ptr(), mmap.PAGESIZE
    for first, length in stretches(part):
        start = (base + first) // page * page
        if _madvise(start, base + first + length - start, _MADV_POPULATE_WRITE):
            number = ctypes.get_errno()
            if number == errno.EINVAL:  # an older kernel
                return False
            # What a write would answer with a signal.
            number = errno.ENOSPC if number == errno.EFAULT else number
            raise OSError(number, os.strerror(number))
    return True


class Cudart(Protocol):
    """What `LockedPages` needs of CUDA's runtime; `torch.cuda.cudart()` has it. Returns 0 or the
    number of an error."""

    def cudaHostRegister(self, address: int, size: int, flags: int, /) -> int: ...

    def cudaHostUnregister(self, address: int, /) -> int: ...


# The memory is locked for all devices of the process (cudaHostRegisterPortable).
_PORTABLE = 1


class LockedPages:
    """Page-locks dense `memory` of the host until `close`, so that CUDA copies from and to it at
    full speed, and also while it computes.

    Where the system refuses, and for a device that is not CUDA's, `is_locked` is false and nothing
    else is different. cudart: in place of that of a CUDA `device`. No copy of CUDA's may cross the
    bounds of `memory`: it would be an error.
    """

    def __init__(
        self, memory: torch.Tensor, device: torch.device, cudart: Cudart | None = None
    ) -> None:
        if cudart is None and device.type == "cuda":
            cudart = torch.cuda.cudart()
        self._cudart, self._memory = cudart, memory
        self.is_locked = False
        if cudart is None or not memory.numel():
            return
        size = memory.numel() * memory.element_size()
        status = cudart.cudaHostRegister(memory.data_ptr(), size, _PORTABLE)
        self.is_locked = int(status) == 0
        if not self.is_locked:
            _drop_error(device)

    def close(self) -> None:
        """Let the pages go, while the memory is still there. No copy may be under way."""
        if self._cudart is not None and self.is_locked:
            self._cudart.cudaHostUnregister(self._memory.data_ptr())
            self.is_locked = False
        self._memory = torch.empty(0)


def _drop_error(device: torch.device) -> None:
    """Forget the error of a call that was refused: CUDA keeps it for whoever asks next, which is
    PyTorch after the launch of a kernel, and PyTorch has no other way to ask."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)
