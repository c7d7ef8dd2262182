"""Text and progress on a terminal that may be closed, full, or unable to encode a file name."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def log(text: str) -> None:
    """Print one line on stderr; drop it if stderr is closed or full, so that the work goes on."""
    if sys.stderr is not None:  # print(file=None) would write to stdout
        with suppress(OSError, ValueError):  # ValueError: this program has closed it
            print(text, file=sys.stderr, flush=True)


def escape_unencodable() -> None:
    """Let stdout and stderr print characters that they cannot encode as backslash escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def is_closed_pipe(error: OSError, platform: str) -> bool:
    """Whether the program that read stdout (`head`, for example) has ended.

    Windows says "Invalid argument" then, without a name of a file.
    """
    if isinstance(error, BrokenPipeError):
        return True
    return platform == "win32" and error.errno == errno.EINVAL and error.filename is None


def discard_stdout() -> None:
    """Drop what stdout still buffers, which Python would try to write again at exit."""
    with suppress(OSError, ValueError, AttributeError):  # stdout is no file, or None
        target = sys.stdout.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, target)
        os.close(null)


class ProgressBar:
    """A progress bar of frames on stderr; does nothing if stderr is closed or full."""

    def __init__(self, label: str, total: int | None = None):
        self._label, self._total = label, total
        self._bar: tqdm[None] | None = None
        self._is_off = sys.stderr is None

    def show(self) -> bool:
        """Show the bar; always returns False.

        Passed as `should_stop`, so that the bar appears only after the arguments were validated.
        """
        if self._bar is None and not self._is_off:
            from tqdm import tqdm

            with self._drawing():
                self._bar = tqdm(
                    desc=self._label, total=self._total, unit="frame", file=sys.stderr, leave=True
                )
        return False

    def __call__(self, done: int, total: int, report: object) -> None:
        """Draw the progress; passed as `on_progress`."""
        self.show()
        with self._drawing():
            if self._bar is not None:
                self._bar.total = total
                self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Draw the bar for the last time."""
        with self._drawing():
            if self._bar is not None:
                self._bar.close()

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):
            # A run of minutes must not fail because its progress cannot be shown.
            if self._bar is not None:
                self._bar.disable = True  # or its destructor would draw again
            self._bar, self._is_off = None, True
