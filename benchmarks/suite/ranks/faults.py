"""Decodes broken on purpose: the rank at fault must be named, and the next decode be right.

`rounds.py` counts the outcomes of many rounds.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.suite.ballast import Ballast
from benchmarks.suite.ranks.cases import Sizes
from benchmarks.suite.ranks.results import Fault
from wan_vae.errors import DecodeCancelled, ShardingError
from wan_vae.hooks import Hooks
from wan_vae.pipeline import WanVAE
from wan_vae.workers.pool import WorkerPool

# Process ids of the ranks -> the hooks that break the decode; afterwards the fault is gone.
Break = Callable[[list[int]], AbstractContextManager[Hooks]]


def unavailable_reason() -> str | None:
    """Why no fault can be planted here, or None."""
    if sys.platform == "win32":
        return "not on Windows, which has no signals that kill or stop a process"
    return None


if sys.platform != "win32":

    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def stop(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)

    def resume(pid: int) -> None:
        os.kill(pid, signal.SIGCONT)

    def is_gone(pid: int) -> bool:
        """Whether no process has this id."""
        try:
            os.kill(pid, 0)  # on Windows this would be Ctrl-C
        except ProcessLookupError:
            return True
        return False

    def check_faults(devices: Sequence[str], vae: WanVAE, sizes: Sizes) -> list[Fault]:
        """Break decodes on the last rank, one after another."""
        z, last = sizes.faults.random_latent(), len(devices) - 1
        with WorkerPool(devices, timeout_s=sizes.timeout_s) as pool:
            attempts = [killed(last), stopped(last), CANCEL]
            if len(devices) >= 4:
                attempts.insert(1, killed_together(last - 1, last))
            found = [_after_a_right_one(attempt, pool, vae, z) for attempt in attempts]
            expected = pool.decode(vae, z, chunk_frames=1).clone()
            found.append(slow(pool, vae, z, expected, sizes.timeout_s * _PAUSE))
            pool.decode(vae, z)
            in_full = _most_planned(pool)
        with AbsentRank(devices, timeout_s=sizes.timeout_s) as pool:
            pool.check_wire()
            found.append(ABSENT.run(pool, vae, z))
        if vae.device.type == "cuda" and len(set(devices)) == len(devices):
            found.append(short_of_memory(devices, vae, z, expected, in_full))
        return found

    @dataclass(frozen=True)
    class Attempt:
        """One fault, and the words that must be in the error.

        blamed: how many of the last ranks are at fault, of which one must be named; 0: none must
        be. keeps_workers: whether they stay, as after a cancel. chunk_frames: latent frames of a
        chunk.
        """

        name: str
        breaks: Break
        said: str
        blamed: int = field(default=1, kw_only=True)
        keeps_workers: bool = field(default=False, kw_only=True)
        chunk_frames: int = field(default=1, kw_only=True)

        def run(self, pool: WorkerPool, vae: WanVAE, z: torch.Tensor) -> Fault:
            """Decode with the fault; passed if it was named and the workers ended.

            A cancelled decode keeps them.
            """
            pids, ranks = pool.pids, len(pool.devices)
            start = time.perf_counter()
            try:
                with self.breaks(pids) as hooks:
                    pool.decode(
                        vae,
                        z,
                        chunk_frames=self.chunk_frames,
                        on_progress=hooks.on_progress,
                        should_stop=hooks.should_stop,
                    )
                text, passed = "nothing: the decode went through", False
            except ShardingError as error:
                text = str(error)
                passed = not self.blamed or error.rank in range(ranks - self.blamed, ranks)
                passed = passed and not pool.pids and not self.keeps_workers
            except DecodeCancelled as error:
                text, passed = str(error), pool.pids == pids and self.keeps_workers
            seconds = time.perf_counter() - start
            passed = passed and self.said in text
            passed = passed and (self.keeps_workers or all(map(is_gone, pids)))
            return Fault(ranks, self.name, passed, seconds, text)

    def _after_a_right_one(
        attempt: Attempt, pool: WorkerPool, vae: WanVAE, z: torch.Tensor
    ) -> Fault:
        """`attempt` between two decodes, which must have the same bits."""
        expected = pool.decode(vae, z, chunk_frames=1)
        fault = attempt.run(pool, vae, z)
        if fault.passed and not torch.equal(pool.decode(vae, z, chunk_frames=1), expected):
            text = f"{fault.said}; the next decode was wrong"
            return Fault(fault.ranks, fault.name, False, fault.seconds, text)
        return fault

    # The share of the time-out for which a slow rank stands still.
    _PAUSE = 0.4

    def slow(
        pool: WorkerPool, vae: WanVAE, z: torch.Tensor, expected: torch.Tensor, pause_s: float
    ) -> Fault:
        """The last rank stands still for a while: the others wait, and nothing else happens."""
        pids = pool.pids
        start = time.perf_counter()

        def pause(pid: int) -> None:
            stop(pid)
            threading.Timer(pause_s, resume, (pid,)).start()

        name = "a rank is slow: the others wait"
        try:
            with at_first_chunk(pause, len(pids) - 1)(pids) as hooks:
                found = pool.decode(vae, z, chunk_frames=1, on_progress=hooks.on_progress)
        except ShardingError as error:
            return Fault(len(pids), name, False, time.perf_counter() - start, str(error))
        seconds = time.perf_counter() - start
        right = torch.equal(found, expected)
        said = f"the picture is {_word(right)}; the rank stood still for {pause_s:.1f} s"
        passed = right and pool.pids == pids and seconds >= pause_s
        return Fault(len(pids), name, passed, seconds, said)

    def short_of_memory(
        devices: Sequence[str], vae: WanVAE, z: torch.Tensor, expected: torch.Tensor, in_full: int
    ) -> Fault:
        """The last device has too little for the plan of the others, which takes `in_full` bytes:
        all take less at a time."""
        start = time.perf_counter()
        name = "a rank has less memory than the others"
        # Beside the share, what its process needs to use the card at all.
        leave = _SHARE * in_full / 2**30 + 0.6
        try:
            with Ballast(leave, devices[-1]), WorkerPool(devices) as pool:
                right = torch.equal(pool.decode(vae, z), expected)
                planned = _most_planned(pool)
                restarts = max(report.restarts for report in pool.last_reports)
        except ShardingError as error:
            return Fault(len(devices), name, False, time.perf_counter() - start, str(error))
        said = (
            f"the picture is {_word(right)}; {leave:.2f} GiB left, a rank plans "
            f"{planned / 2**30:.2f} instead of {in_full / 2**30:.2f} GiB, {restarts} new starts"
        )
        passed = right and planned < in_full and not restarts
        return Fault(len(devices), name, passed, time.perf_counter() - start, said)

    # Of what the plan takes, so much is left on the device that has little.
    _SHARE = 0.7

    def _most_planned(pool: WorkerPool) -> int:
        return max(report.memory.planned_bytes or 0 for report in pool.last_reports)

    def _word(is_right: bool) -> str:
        return "right" if is_right else "wrong"

    def at_first_chunk(act: Callable[[int], None], *ranks: int) -> Break:
        """A progress callback that acts on `ranks` at the first chunk: they are in the next."""

        @contextmanager
        def hooks(pids: list[int]) -> Iterator[Hooks]:
            done: list[bool] = []

            def on_progress(*_: object) -> None:
                if not done:
                    done.append(True)
                    for rank in ranks:
                        act(pids[rank])

            yield Hooks(on_progress)

        return hooks

    @contextmanager
    def _cancel(pids: list[int]) -> Iterator[Hooks]:
        seen: list[int] = []
        yield Hooks(lambda *_: seen.append(1), lambda: bool(seen))

    def killed(rank: int) -> Attempt:
        """`rank`, the last one, is killed."""
        act = at_first_chunk(kill, rank)
        return Attempt("a rank is killed within a chunk", act, "died (exit code -9)")

    def killed_together(first: int, second: int) -> Attempt:
        """The last two ranks are killed at once."""
        act = at_first_chunk(kill, first, second)
        name = "two ranks are killed at once within a chunk"
        return Attempt(name, act, "died (exit code -9)", blamed=2)

    def stopped(rank: int) -> Attempt:
        """`rank`, the last one, stops."""
        return Attempt("a rank stops within a chunk", at_first_chunk(stop, rank), "does not answer")

    CANCEL = Attempt("a cancel keeps the workers", _cancel, "cancelled", keeps_workers=True)
    # In a pool of `AbsentRank`.
    ABSENT = Attempt(
        "a rank never joins: time-out and abort", lambda _: nullcontext(Hooks()), "does not answer"
    )

    class AbsentRank(WorkerPool):
        """A pool whose last worker is never told to decode: the others wait in a collective."""

        def _send_all(
            self,
            command: str,
            by_rank: Sequence[Mapping[str, Any]] = (),
            **arguments: Any,
        ) -> None:
            if command != "decode":
                super()._send_all(command, by_rank, **arguments)
                return
            present, self._ranks = self._ranks, self._ranks[:-1]
            super()._send_all(command, by_rank, **arguments)
            self._ranks = present
