"""Pages of host memory that are there before somebody writes to them.

The first write to a page stops the writer while the system finds and clears it. For a video that
takes longer than the copy, so threads that wait for pixels ask for the pages of the next ones.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from itertools import product

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
