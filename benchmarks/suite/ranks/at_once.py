"""Child processes that share the rounds of `wan-vae bench faults`: most of a round is waiting.

Each child is the same command, on the same devices, with folders of its own: it plants faults in
its own workers, and looks for what stays in its own folder only. It writes its counts after each
round, and this process adds up what all of them wrote.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.suite.ranks.counted import Counts, read

# Kinds that no other process may run beside: they take all memory of a device.
ALONE = ("memory",)
_ROOT = Path(__file__).resolve().parents[3]
_LAST_LINES = 12
# A child looks at the time between two rounds. Only one that hangs is so late: a round waits for
# `start_timeout_s` of a pool (120 s) twice at most.
LATE_S = 300.0


@dataclass(frozen=True)
class Share:
    """What one child counts: these kinds, in this order, for so many rounds."""

    kinds: Sequence[str]
    rounds: int


# The command of a child: for its share, the seconds that are left, the folder for its counts, and
# the one for everything else.
Command = Callable[[Share, float, Path, Path], Sequence[str]]


@dataclass
class Child:
    """A process that counts, and the folder where it writes.

    last: its last lines. ended: what is wrong with its end; None if nothing is, or while it runs.
    """

    number: int
    folder: Path
    process: subprocess.Popen[str]
    last: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))
    ended: str | None = None

    @property
    def who(self) -> str:
        return f"process {self.number}"


def shares(kinds: Sequence[str], rounds: int, children: int) -> list[Share]:
    """The shares of `children`, or of fewer: all kinds in each, of as many rounds as can be.

    Each child starts with another kind, so that not all of them wait for a time-out, and then start
    their workers, at the same time.
    """
    found = []
    for number in range(min(children, rounds) if kinds else 0):
        first = number % len(kinds)
        own = rounds // children + (number < rounds % children)
        found.append(Share([*kinds[first:], *kinds[:first]], own))
    return found


def run_children(
    counts: Counts, command: Command, folder: Path, limit_s: float, output: Path | None = None
) -> None:
    """Let children count what `counts` wants; it then has the numbers of all of them.

    folder: for theirs. output: for the page, which is written again after each round of a child.
    limit_s: for everything; what is not run then is in `counts.not_run`.
    """
    until = time.monotonic() + limit_s
    rounds = max(counts.wanted.values())
    together = shares([kind for kind in counts.wanted if kind not in ALONE], rounds, counts.at_once)
    alone = shares([kind for kind in counts.wanted if kind in ALONE], rounds, 1)
    done: list[Child] = []
    for group in (together, alone):
        left = until - time.monotonic()
        if group and left > 0:
            with _running(group, command, folder, left, len(done)) as children:
                for child in _heard(children, until + LATE_S):
                    _merge(counts, [*done, *children], output)
                    print(f"{child.who}: {child.last[-1]}", file=sys.stderr, flush=True)
            done += children
            _merge(counts, done, output)
    counts.is_done = True
    if output is not None:
        counts.write(output)


@contextlib.contextmanager
def _running(
    group: Sequence[Share], command: Command, folder: Path, left_s: float, before: int
) -> Iterator[list[Child]]:
    """The children of a group while they run; those that still do afterwards are ended."""
    children: list[Child] = []
    threads = max(1, torch.get_num_threads() // len(group))
    try:
        for number, share in enumerate(group, before + 1):
            own = folder / str(number)
            temporary = own / "tmp"
            temporary.mkdir(parents=True)
            process = subprocess.Popen(
                command(share, left_s, own, temporary),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={
                    **os.environ,
                    "TMPDIR": str(temporary),
                    "PYTHONPATH": os.pathsep.join([str(_ROOT), *_python_path()]),
                    # Each of them would take all cores.
                    "OMP_NUM_THREADS": str(threads),
                },
            )
            children.append(Child(number, own, process))
        yield children
    finally:
        for child in children:
            if child.process.poll() is None:
                child.process.kill()  # its workers end with it
            child.process.wait()


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _heard(children: Sequence[Child], until: float) -> Iterator[Child]:
    """A child for each line that it said, until all have ended or `until` is over."""
    lines: queue.SimpleQueue[tuple[Child, str | None]] = queue.SimpleQueue()

    def listen(child: Child) -> None:
        assert child.process.stderr is not None
        for line in child.process.stderr:
            lines.put((child, line.rstrip()))
        lines.put((child, None))

    for child in children:
        threading.Thread(target=listen, args=(child,), daemon=True).start()
    left = list(children)
    while left:
        try:
            child, line = lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            for late in left:
                late.ended = f"did not end: {_last(late)}"
            return
        if line is None:
            left.remove(child)
            child.ended = _wrong_end(child)
        elif line:
            child.last.append(line)
            yield child


def _wrong_end(child: Child) -> str | None:
    """What is wrong with the end of `child`; None if it came to the end of its rounds."""
    code = child.process.wait()
    data = read(child.folder)
    # The exit code is 1 if a round was wrong, too.
    if data is not None and data["is_done"] and code in (0, 1):
        return None
    return f"ended with exit code {code}: {_last(child)}"


def _last(child: Child) -> str:
    return " / ".join(child.last) or "it said nothing"


def _merge(counts: Counts, children: Sequence[Child], output: Path | None) -> None:
    """Add up what the children have written so far."""
    counts.found.clear()
    counts.failed.clear()
    for child in children:
        if (data := read(child.folder)) is not None:
            counts.take(data, child.who)
        if child.ended is not None:
            counts.failed[child.who] = child.ended
    if output is not None:
        counts.write(output)
