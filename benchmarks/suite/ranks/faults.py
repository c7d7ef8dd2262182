"""Decodes broken on purpose: the rank at fault must be named, and the next decode be right.

`rounds.py` counts the outcomes of many rounds.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

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
            found = [_after_a_right_one(attempt, pool, vae, z) for attempt in attempts]
        with AbsentRank(devices, timeout_s=sizes.timeout_s) as pool:
            pool.check_wire()
            found.append(ABSENT.run(pool, vae, z))
        return found

    @dataclass(frozen=True)
    class Attempt:
        """One fault, and the words that must be in the error.

        blames_last: whether the last rank must be named. keeps_workers: whether they stay, as after
        a cancel. chunk_frames: latent frames of a chunk.
        """

        name: str
        breaks: Break
        said: str
        blames_last: bool = field(default=True, kw_only=True)
        keeps_workers: bool = field(default=False, kw_only=True)
        chunk_frames: int = field(default=1, kw_only=True)

        def run(self, pool: WorkerPool, vae: WanVAE, z: torch.Tensor) -> Fault:
            """Decode with the fault; passed if it was named and the workers ended.

            A cancelled decode keeps them.
            """
            pids, last = pool.pids, len(pool.devices) - 1
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
                passed = error.rank == last or not self.blames_last
                passed = passed and not pool.pids and not self.keeps_workers
            except DecodeCancelled as error:
                text, passed = str(error), pool.pids == pids and self.keeps_workers
            seconds = time.perf_counter() - start
            passed = passed and self.said in text
            passed = passed and (self.keeps_workers or all(map(is_gone, pids)))
            return Fault(len(pool.devices), self.name, passed, seconds, text)

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

    def at_first_chunk(act: Callable[[int], None], rank: int) -> Break:
        """A progress callback that acts at the first chunk: the ranks are then in the next."""

        @contextmanager
        def hooks(pids: list[int]) -> Iterator[Hooks]:
            done: list[bool] = []

            def on_progress(*_: object) -> None:
                if not done:
                    done.append(True)
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
