"""Signals that end the program: raised as exceptions, so that partial files are removed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """A signal asked the program to end; handled as Ctrl-C is."""

    def __init__(self, number: int):
        super().__init__()
        self.signal = signal.Signals(number)


@contextmanager
def termination_raises() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM and SIGHUP, so that no partial file is left behind.

    A signal that is ignored (nohup) or has a handler is left alone. So are all ranks of a node but
    the first: they write no files, and one that waits in a collective must end without delay.
    """
    is_main = threading.current_thread() is threading.main_thread()
    is_first_rank = os.environ.get("LOCAL_RANK", "0") == "0"
    candidates = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    caught = [
        number
        for number in candidates
        if number is not None
        and is_main
        and is_first_rank
        and signal.getsignal(number) == signal.SIG_DFL
    ]

    def end(number: int, frame: FrameType | None) -> None:
        for other in caught:  # a second signal must not interrupt the removal of files
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
