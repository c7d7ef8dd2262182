"""Paths: which can be read, which can be written, and the partial file until a result is complete.

Also the import of optional packages, whose errors name the file that needs them.
"""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePath
from types import ModuleType

from ..errors import OutputError, WanVAEError, first_line
from ..said import said

# The longest file name, in bytes, on all common file systems.
_NAME_BYTES = 255
# The longest path that Windows opens unless long paths are switched on there, in characters, and
# how much longer than the target's the name of a partial file may be.
_WINDOWS_PATH, _PARTIAL_ADDS = 259, 32


def unreadable_reason(path: Path) -> str | None:
    """The reason why `path` is not a readable regular file, or None. Never opens a pipe."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return f"no such file{too_long_note(path, sys.platform)}"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return "a folder: expected a file"
    return "a pipe or a device: expected a file, so save its contents to a file first"


@contextmanager
def writing(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Turn OSError and `more` (full disk, no permission, impossible name) into OutputError."""
    errors: tuple[type[Exception], ...] = (OSError, *more)
    try:
        yield
    except errors as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        note = too_long_note(path, sys.platform, _PARTIAL_ADDS)
        if note:
            reason = said("file.with_note", "{reason}{note}", reason=reason, note=note)
        raise OutputError(
            said("file.unwritable", "{path}: cannot be written: {reason}", path=path, reason=reason)
        ) from error


def too_long_note(path: PurePath, platform: str, more: int = 0) -> str:
    """What to add to an error about `path` on Windows, where it and `more` characters are many.

    Windows says of such a path that there is no such file or folder.
    """
    length = len(str(path.absolute() if isinstance(path, Path) else path))
    if platform != "win32" or length + more <= _WINDOWS_PATH:
        return ""
    return said(
        "file.windows_path",
        " (the path has {length} characters: unless long paths are switched on, Windows takes "
        "{most} here; choose a shorter folder)",
        length=length,
        most=_WINDOWS_PATH - more,
    )


def impossible_name(name: str, platform: str) -> str | None:
    """Why `platform` has no file of this name, where it would not say so itself; None if it has.

    On Windows, "10:30.mp4" would be a stream of the file "10", which nobody sees.
    """
    if platform == "win32" and ":" in name:
        return said("file.colon", "a file name cannot contain ':' on Windows")
    return None


def nearest_folder(path: Path, exists: Callable[[Path], bool] = os.path.lexists) -> Path | None:
    """The lowest of the folders above `path` that exists; None on a drive or share that is not
    there."""
    return next((folder for folder in path.absolute().parents if exists(folder)), None)


def check_output(path: Path, *, is_folder: bool = False) -> None:
    """Raise OutputError if no file (or folder) of this name can be created. Creates nothing."""
    name = path.name
    if name in ("", ".."):
        raise OutputError(
            said(
                "file.no_name",
                "{path}: not a file name: expected a name such as out.mp4",
                path=path,
            )
        )
    if name.endswith(".") or (name.startswith(".") and not path.suffix):
        raise OutputError(
            said(
                "file.incomplete",
                "{path}: an incomplete file name: expected a name such as out.mp4, or a folder",
                path=path,
            )
        )
    if "\0" in str(path):
        raise OutputError(
            said(
                "file.nul",
                "{path}: cannot be written: a file name cannot contain NUL",
                path=repr(str(path)),
            )
        )
    if reason := impossible_name(name, sys.platform):
        raise OutputError(
            said("file.unwritable", "{path}: cannot be written: {reason}", path=path, reason=reason)
        )
    try:
        lengths = [len(os.fsencode(part)) for part in path.parts]
    except UnicodeEncodeError as error:
        raise OutputError(
            said(
                "file.character",
                "{path}: cannot be written: a file name cannot contain {character}",
                path=repr(str(path)),
                character=repr(error.object[error.start]),
            )
        ) from error
    if max(lengths) > _NAME_BYTES:
        raise OutputError(
            said("file.long", "{path}: cannot be written: file name too long", path=path)
        )
    with writing(path):
        if not is_folder and path.is_dir():
            raise OutputError(
                said("file.folder", "{path}: is a folder: expected the name of a file", path=path)
            )
        folder = nearest_folder(path)
        if folder is None:
            raise OutputError(
                said(
                    "file.no_drive",
                    "{path}: cannot be written: {drive} is not there",
                    path=path,
                    drive=path.absolute().anchor,
                )
            )
        if not folder.is_dir():
            raise OutputError(
                said(
                    "file.below_file",
                    "{path}: {name} is a file, not a folder",
                    path=path,
                    name=folder.name,
                )
            )


def import_package(module: str, package: str, path: Path, error: type[WanVAEError]) -> ModuleType:
    """Import `module` of the installable `package`, which is needed to read or write `path`.

    Raises `error`, with the command that installs the package, if the import fails.
    """
    try:
        return importlib.import_module(module)
    except ImportError as failure:
        raise error(
            f"{path}: needs {package}, which cannot be imported ({first_line(failure)}): "
            f"pip install {package}"
        ) from failure


def ffmpeg_name(path: Path) -> str:
    """`path` as FFmpeg takes it: absolute, because it reads `10:30.mp4` as a protocol."""
    return str(path.absolute())


def _reserve(path: Path) -> bool:
    """Make an empty file of this name; False if there is one. Of several writers, one makes it."""
    try:
        path.open("xb").close()
    except FileExistsError:
        return False
    return True


@contextmanager
def reserved(path: Path) -> Iterator[None]:
    """Hold the name `path` with an empty file, until a result takes its place: whoever counts files
    to find a free name counts it. It goes after an error.

    A file of that name stays until then. Nothing is held where the folder is not there yet. Raises
    OutputError for a name that no file can have.
    """
    check_output(path)
    with writing(path):
        is_ours = path.parent.is_dir() and _reserve(path)
    with ExitStack() as failed:
        if is_ours:
            failed.callback(path.unlink, missing_ok=True)
        yield
        failed.pop_all()


class Partial:
    """A temporary file or folder that becomes `target` when it is complete.

    It is in the folder of `target`, so that the final rename is atomic. Its name is unique, so that
    two decodes to one output do not mix. `discard` also removes the folders that were created for
    it.
    """

    def __init__(self, target: Path, *, is_folder: bool = False):
        """Create it, empty, and the folders above it. Raises OutputError."""
        check_output(target, is_folder=is_folder)
        self.target, self.is_folder = target, is_folder
        unique = f"{os.getpid()}-{secrets.token_hex(4)}"
        # A part of the stem only: all of it and `unique` may be longer than a name can be.
        self.path = target.with_name(f".{target.stem[:40]}.{unique}.partial{target.suffix}")
        self._created_folders: list[Path] = []
        try:
            with writing(target):
                for folder in target.parents:
                    if folder.exists():
                        break
                    self._created_folders.append(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                if is_folder:
                    self.path.mkdir()
                else:
                    self.path.open("xb").close()
        except OutputError:
            self.discard()
            raise

    def publish(self, names: Iterable[Path] = ()) -> Path:
        """Rename it to `target`, in place of a file of that name; returns its name.

        names: rename it to the first of these in the folder of `target` that nothing has, and take
        no name from another writer, of this machine or another. Raises OutputError.
        """
        with writing(self.target):
            reserved = next(filter(_reserve, names), None)
            try:
                self.path.replace(reserved or self.target)
            except OSError:
                if reserved is not None:
                    reserved.unlink()
                raise
        self._created_folders = []
        return reserved or self.target

    def discard(self) -> None:
        """Remove it and the created folders; does nothing after `publish` or a second time."""
        if self.is_folder:
            shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # the error that led here is the one to report
            self.path.unlink(missing_ok=True)
        for folder in self._created_folders:
            with suppress(OSError):  # not empty: another writer uses it
                folder.rmdir()
        self._created_folders = []
