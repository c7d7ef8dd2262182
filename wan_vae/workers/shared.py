"""Host memory that processes of one machine share: a memory-mapped file, unlinked once all have it.

A file and not a named segment, because its room can be reserved before it is written (a full
/dev/shm otherwise kills the writer with SIGBUS), and because nothing is left after a crash.
"""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

import numpy as np
import torch

from ..errors import ShardingError
from ..io import pages
from ..said import said, together


def default_folders() -> tuple[Path, ...]:
    """Where shared memory may live, the fastest first: RAM, then the temporary folder."""
    folders = [Path("/dev/shm")]
    with suppress(FileNotFoundError):  # nobody may write to any
        folders.append(Path(tempfile.gettempdir()))
    return tuple(folders)


_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_count_fork)


# Linux and FreeBSD have it; elsewhere the room for a file cannot be reserved before it is written.
_fallocate: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)


class SharedBuffer:
    """`size` bytes, mapped by every process that opens `path`.

    The mapping lives as long as this object or a tensor of it does, also after `unlink`. On Windows
    a mapped file has to stay: the last process that lets go of it removes it.
    """

    def __init__(self, path: Path, size: int):
        self.path, self.size = path, size
        # The arrays through which tensors see the mapping, for as long as there are any.
        self._arrays: list[weakref.ref[np.ndarray]] = []
        self._forks = _forks
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        closing = weakref.finalize(self, os.close, descriptor)
        try:
            self._mapping = mmap.mmap(descriptor, size)
        except OSError:
            closing()  # now: Windows removes no file that is open
            raise
        if sys.platform == "win32":
            weakref.finalize(self._mapping, _remove_if_unmapped, path)
        # What is page-locked, and where it lies.
        self._locked: tuple[pages.LockedPages, tuple[int, int]] | None = None
        self._descriptor = None if _fallocate is None else descriptor
        if _fallocate is None:
            closing()

    @property
    def raw(self) -> torch.Tensor:
        """The bytes, uint8 [size]."""
        return self._bytes(0, self.size)

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The tensor that starts `offset` bytes in, with a storage of its own extent."""
        return view(self._bytes(offset, prod(shape) * dtype.itemsize), 0, shape, dtype)

    def _bytes(self, offset: int, count: int) -> torch.Tensor:
        # Each an array of its own: NumPy lets slices refer to the mapping alone.
        array = np.frombuffer(self._mapping, np.uint8, count, offset)
        self._arrays = [array for array in self._arrays if array() is not None]
        self._arrays.append(weakref.ref(array))
        return torch.from_numpy(array)

    @property
    def in_use(self) -> bool:
        """Whether there is a tensor of it, here or in a process that was forked from this one."""
        return self._forks != _forks or any(array() is not None for array in self._arrays)

    @classmethod
    def create(
        cls, size: int, folders: Sequence[Path] | None = None, reserved: int | None = None
    ) -> SharedBuffer:
        """A file of `size` bytes in the first of `folders` that has room. Raises ShardingError.

        Its first `reserved` bytes (None: all) may be written now, the others after `reserve`: the
        memory of a large output takes as long to reserve as a few GPUs take to decode it.
        """
        refused: list[str] = []
        for folder in folders or default_folders():
            if not folder.is_dir():
                continue
            free = shutil.disk_usage(folder).free
            if free < size:
                refused.append(
                    said(
                        "worker.folder_has",
                        "{folder} has {free} MiB",
                        folder=folder,
                        free=f"{free / 2**20:.0f}",
                    )
                )
                continue
            try:
                return cls._create_in(folder, size, reserved)
            except OSError as error:  # also where nobody may write, or no memory can be mapped
                refused.append(f"{folder}: {error.strerror}")
        raise ShardingError(
            said(
                "worker.no_room",
                "no room for {size} MiB of memory shared between the ranks ({reasons}): free "
                "memory in /dev/shm or space in the temporary folder",
                size=f"{size / 2**20:.0f}",
                reasons=together(refused) or said("worker.no_folder", "no folder for it"),
            )
        )

    @classmethod
    def _create_in(cls, folder: Path, size: int, reserved: int | None) -> SharedBuffer:
        """See `create`. Raises OSError, and then leaves no file."""
        descriptor, name = tempfile.mkstemp(prefix="wan_vae_", dir=folder)
        try:
            try:
                os.truncate(descriptor, size)
                if _fallocate is not None and reserved != 0:
                    _fallocate(descriptor, 0, size if reserved is None else reserved)
            finally:
                os.close(descriptor)  # before it is removed, for Windows
            return cls.open(name, size)
        except OSError:
            os.unlink(name)
            raise

    @classmethod
    def open(cls, path: str | Path, size: int) -> SharedBuffer:
        """Map an existing file of `size` bytes."""
        return cls(Path(path), size)

    def reserve(self, part: torch.Tensor) -> None:
        """Make room for `part`, a view of `raw` of three dimensions or more, before it is written.

        By stretches of memory of its first two dimensions, and mapped where the system can do that:
        reserving alone lets one thread at a time, of all ranks. Raises ShardingError if there is
        none.
        """
        if self._descriptor is None or _fallocate is None:
            return
        try:
            if pages.populate(part):
                return
            for start, length in pages.stretches(part):
                _fallocate(self._descriptor, start, length)
        except OSError as error:
            raise ShardingError(
                said(
                    "worker.no_room_in",
                    "no room for {size} MiB of memory shared between the ranks in "
                    "{folder}: {error}",
                    size=f"{self.size / 2**20:.0f}",
                    folder=self.path.parent,
                    error=error.strerror,
                )
            ) from error

    def lock(
        self, offset: int, size: int, device: torch.device, cudart: pages.Cudart | None = None
    ) -> None:
        """Page-lock `size` bytes from `offset` on, and nothing else, for copies to `device`; once,
        also where the system refuses. `unlock` before this object is let go of.

        cudart: see `LockedPages`.
        """
        if self._locked is None or self._locked[1] != (offset, size):
            self.unlock()
            locked = pages.LockedPages(self._bytes(offset, size), device, cudart)
            self._locked = locked, (offset, size)

    def unlock(self, unless: tuple[int, int] | None = None) -> None:
        """Let go of what is page-locked, unless it lies at offset and size `unless`."""
        if self._locked is not None and self._locked[1] != unless:
            self._locked[0].close()
            self._locked = None

    def unlink(self) -> None:
        """Remove the name: no other process can open it, mappings stay. Twice does no harm."""
        if sys.platform == "win32":
            _remove_if_unmapped(self.path)
        else:
            self.path.unlink(missing_ok=True)


class Spares:
    """Shared memory of earlier runs, for the next: fresh memory takes as long as a few GPUs do.

    A buffer whose tensor somebody holds stays too, as it is free soon: a program shows one result
    while it makes the next.
    """

    def __init__(self, limit: int = 2):
        self._limit = limit
        self._buffers: list[SharedBuffer] = []

    @property
    def paths(self) -> list[str]:
        """By these a worker knows which of its mappings may be asked for again."""
        return [str(buffer.path) for buffer in self._buffers]

    def take(self, size: int) -> SharedBuffer | None:
        """A buffer of about `size` bytes that nobody uses; it is no spare any more."""
        for buffer in self._buffers:
            if size <= buffer.size <= 2 * size and not buffer.in_use:
                self._buffers.remove(buffer)
                return buffer
        return None

    def give(self, buffer: SharedBuffer) -> None:
        """Keep `buffer`, all of which was reserved; the oldest goes if there are too many."""
        self._buffers.append(buffer)
        del self._buffers[: -self._limit]

    def clear(self) -> None:
        """Keep none."""
        self._buffers.clear()


def _remove_if_unmapped(path: Path) -> None:
    """Remove a file that no process has mapped; on Windows any other raises PermissionError."""
    with suppress(PermissionError):
        path.unlink(missing_ok=True)


_ALIGNMENT = 4096


def aligned(size: int) -> int:
    """`size` rounded up to whole pages, so that any dtype can start there."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def view(raw: torch.Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The tensor of `shape` and `dtype` that starts `offset` bytes into `raw`."""
    count = dtype.itemsize
    for n in shape:
        count *= n
    return raw[offset : offset + count].view(dtype).view(tuple(shape))
