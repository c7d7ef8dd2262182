"""Paths: why one cannot be read, where a result may appear, and its name until it is whole."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import OutputError, first_line

# Bytes of one name, on every file system in use.
_NAME_BYTES = 255


def why_unreadable(path: Path) -> str | None:
    """Why `path` is not a file of bytes to read, or None if it is. Never waits for a pipe."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "no such file"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return "a folder: expected a file"
    return "a pipe or a device: expected a file, so copy what it gives to one first"


@contextmanager
def writing(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Turn what a full disk, a missing right or an impossible name raises into OutputError."""
    try:
        yield
    except (OSError, *more) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"{path}: cannot be written: {reason}") from error


def check_output(path: Path, *, is_folder: bool = False) -> None:
    """Raise OutputError where no file (or folder) of this name can come to be. Makes nothing."""
    name = path.name
    if name in ("", ".."):
        raise OutputError(f"{path}: not the name of a file: name one, such as out.mp4")
    if name.endswith(".") or (name.startswith(".") and not path.suffix):
        raise OutputError(f"{path}: only half a name: expected such as out.mp4, or a folder")
    if "\0" in str(path):
        raise OutputError(f"{str(path)!r}: cannot be written: a name holds no NUL")
    if any(len(os.fsencode(part)) > _NAME_BYTES for part in path.parts):
        raise OutputError(f"{path}: cannot be written: File name too long")
    with writing(path):
        if not is_folder and path.is_dir():
            raise OutputError(f"{path}: is a folder: name a file in it")
        folder = next(p for p in path.absolute().parents if os.path.lexists(p))
        if not folder.is_dir():
            raise OutputError(f"{path}: {folder.name} is a file, not a folder")


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions of any new file.

    `save_file` alone lets nobody else read it, whatever the umask. Raises SafetensorError, OSError.
    """
    path.open("ab").close()
    mode = path.stat().st_mode
    save_file(dict(tensors), str(path))
    path.chmod(mode)


class Partial:
    """`target` while it is being written: an empty file or folder of this writer alone.

    It lies beside `target`, so that the rename at the end is atomic, under a name that no other
    writer has, so that two decodes to one output do not mix. Folders that had to be made for it
    go away with it when it is discarded.
    """

    def __init__(self, target: Path, *, is_folder: bool = False):
        """Make it, and the folders above it. Raises OutputError."""
        check_output(target, is_folder=is_folder)
        self.target, self.is_folder = target, is_folder
        own = f"{os.getpid()}-{secrets.token_hex(4)}"
        # A part of the stem: the whole one and our own words may be longer than a name can be.
        self.path = target.with_name(f".{target.stem[:40]}.{own}.partial{target.suffix}")
        self._made: list[Path] = []
        try:
            with writing(target):
                for folder in target.parents:
                    if folder.exists():
                        break
                    self._made.append(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                if is_folder:
                    self.path.mkdir()
                else:
                    self.path.open("xb").close()
        except OutputError:
            self.discard()
            raise

    def publish(self) -> None:
        """Give it its name, in place of a file that had it. Raises OutputError."""
        with writing(self.target):
            self.path.replace(self.target)
        self._made = []

    def discard(self) -> None:
        """Remove what was written; harmless after `publish` and when called again."""
        if self.is_folder:
            shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # the error that led here is the one to tell
            self.path.unlink(missing_ok=True)
        for folder in self._made:
            with suppress(OSError):  # not empty: another writer's
                folder.rmdir()
        self._made = []
