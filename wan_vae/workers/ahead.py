"""A process of low priority that compiles kernels while the caller does something else.

It sees no card: the environment hides them, and what it must know of the card is in its job. There
is one at a time on a machine, by a lock in the cache folder, and none where nothing is to be
compiled. It ends when its jobs are done, and when the process that started it ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BackendError, CheckpointError, NotAWanVAEError
from ..kernels import registry
from ..kernels.cache_folder import cache_folder
from ..kernels.kernel import Family
from ..runs.ahead import Ahead, AheadJob, Outcome
from .lock import FileLock

LOCK = "ahead.lock"
# Exit codes: another process is at work; the job cannot be done, for a reason in words.
BUSY, IMPOSSIBLE = 3, 4
# So low that a sampler does not notice it, if not all cores are taken.
_NICE = 19
_MOST_THREADS = 4
# Each names the cards that a process may see.
_HIDE_CARDS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Ended:
    """How a process ended: `outcomes` of `runs.ahead.Outcome`, or what it `said` instead."""

    job: AheadJob
    outcomes: tuple[Mapping[str, Any], ...]
    code: int
    said: str


class AheadCompiler:
    """Compiles jobs in turn, one process each, from a thread of its own.

    on_end: hears of each process that has ended, in that thread.
    """

    def __init__(self, on_end: Callable[[Ended], None]) -> None:
        self._on_end = on_end
        self._lock = threading.Lock()
        self._waiting: deque[AheadJob] = deque()
        self._asked: list[AheadJob] = []
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def ask(self, job: AheadJob) -> None:
        """Have `job` compiled; returns at once. A job is tried once: what failed might do so at
        each prompt."""
        with self._lock:
            if self._is_closed or job in self._asked:
                return
            self._asked.append(job)
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is left to do; whether that is so."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    def close(self) -> None:
        """End the process, if there is one, and take no more jobs."""
        with self._lock:
            self._is_closed = True
            self._waiting.clear()
            process = self._process
        if process is not None:
            process.terminate()
        self.wait()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                asked = self._waiting.popleft()
            try:
                job = asked.of_config().left()
            except (CheckpointError, NotAWanVAEError):
                continue  # the node that is given it will say so
            is_busy = bool(job.work) and _is_busy()
            ended = _run(job, self._started) if job.work and not is_busy else None
            with self._lock:
                self._process = None
                if is_busy or (ended is not None and ended.code == BUSY):
                    self._asked.remove(asked)
            if ended is not None:
                self._on_end(ended)

    def _started(self, process: subprocess.Popen[bytes]) -> bool:
        """Remember it; False where nobody wants it any more."""
        with self._lock:
            self._process = process
            return not self._is_closed


def _is_busy() -> bool:
    """Whether another process compiles, or there is no folder to keep anything in."""
    lock = _lock()
    free = lock is not None and lock.acquire()
    if lock is not None:
        lock.release()
    return not free


def _lock() -> FileLock | None:
    folder = cache_folder()
    return None if folder is None else FileLock(folder / LOCK)


def _run(job: AheadJob, started: Callable[[subprocess.Popen[bytes]], bool]) -> Ended:
    """One process, from its start to its end."""
    library = Path(__file__).parents[1]
    # By the folder's name, as `launch.spawn`. Without -P the working directory would come first.
    code = (
        f"import sys; sys.path.insert(0, {str(library.parent)!r}); "
        f"from {library.name}.workers.ahead import main; main()"
    )
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.BELOW_NORMAL_PRIORITY_CLASS | subprocess.CREATE_NO_WINDOW
    environment = {**os.environ, **dict.fromkeys(_HIDE_CARDS, ""), "OMP_NUM_THREADS": "1"}
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            creationflags=flags,
        )
    except OSError as error:
        return Ended(job, (), IMPOSSIBLE, f"cannot start: {error}")
    assert process.stdin is not None and process.stdout is not None
    if not started(process):
        process.terminate()
    # The pipe stays open while this process lives: its end is what the other one ends by.
    with process.stdin as pipe, process.stdout as output:
        try:
            pipe.write(json.dumps(job.as_dict()).encode() + b"\n")
            pipe.flush()
        except OSError:  # it has ended: its code says why
            pass
        lines = output.read().decode(errors="replace").splitlines()
        code_ = process.wait()
    outcomes = tuple(json.loads(line) for line in lines if line.startswith('{"work"'))
    said = [line for line in lines if line.strip() and not line.startswith('{"work"')]
    return Ended(job, outcomes, code_, said[-1] if said else "")


# -- in the process ------------------------------------------------------------------------------


def main() -> None:
    """The process: reads a job, prints an outcome for each piece of its work."""
    if hasattr(os, "nice"):
        os.nice(_NICE)
    job = AheadJob.from_dict(json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with, args=(sys.stdin.fileno(),), daemon=True).start()
    lock = _lock()
    if lock is None or not lock.acquire():
        raise SystemExit(BUSY)
    try:
        for outcome in compile_here(job, threads()):
            print(json.dumps(outcome.as_dict()), flush=True)
    except BackendError as error:
        print(error, flush=True)
        raise SystemExit(IMPOSSIBLE) from None
    finally:
        lock.release()


def compile_here(job: AheadJob, compilers: int | None) -> Iterator[Outcome]:
    """Compile `job` in this process, in which Triton launches nothing afterwards: see `Ahead`."""
    ahead = Ahead(job)
    if "triton" in ahead.families and isinstance(registry.load("triton"), Family):
        from ..kernels.triton.ahead import compile_for  # Triton may not be installed

        compile_for(job.device)
    yield from ahead.compile(compilers)


def threads() -> int:
    """Compilers at a time: few, and never all cores, because somebody is sampling."""
    return max(1, min(_MOST_THREADS, (os.cpu_count() or 2) // 2))


def _end_with(pipe: int) -> None:
    """End this process when the one at the other end of the pipe has ended."""
    # Not through sys.stdin, whose lock would be held when this process wants to end.
    while os.read(pipe, 1):
        pass
    os._exit(0)
