"""Words and progress on a terminal that may be closed, full, or unable to spell a name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def say(text: str) -> None:
    """One line on stderr. Lost where stderr is closed or full: the work matters more."""
    if sys.stderr is not None:  # print(file=None) would write to stdout
        with suppress(OSError, ValueError):  # ValueError: closed by this program
            print(text, file=sys.stderr, flush=True)


def spell_anything() -> None:
    """Names that stdout or stderr cannot encode are printed with backslashes, not refused."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def drop_stdout() -> None:
    """Forget what stdout still holds: Python would try to write it once more at exit."""
    with suppress(OSError, ValueError, AttributeError):  # no file behind it, or none at all
        target = sys.stdout.fileno()
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, target)
        os.close(nothing)


class Bar:
    """A progress bar of frames on stderr; none where that is closed or full."""

    def __init__(self, label: str, total: int | None = None):
        self._label, self._total = label, total
        self._bar, self._is_off = None, sys.stderr is None

    def begin(self) -> bool:
        """Show it. As `should_stop` of a decode: asked once the arguments are accepted; False."""
        if self._bar is None and not self._is_off:
            from tqdm import tqdm

            with self._drawing():
                self._bar = tqdm(
                    desc=self._label, total=self._total, unit="frame", file=sys.stderr, leave=True
                )
        return False

    def __call__(self, done: int, total: int, report) -> None:
        self.begin()
        with self._drawing():
            if self._bar is not None:
                self._bar.total = total
                self._bar.update(done - self._bar.n)

    def close(self) -> None:
        with self._drawing():
            if self._bar is not None:
                self._bar.close()

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):
            # A decode of minutes does not end because nobody can watch it.
            if self._bar is not None:
                self._bar.disable = True  # its destructor would draw once more
            self._bar, self._is_off = None, True
