"""Decodes broken on purpose: the rank at fault must be named, and the next decode be right."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.suite.ranks.cases import Sizes
from benchmarks.suite.ranks.results import Fault
from wan_vae.errors import DecodeCancelled, ShardingError
from wan_vae.hooks import Hooks
from wan_vae.pipeline import WanVAE
from wan_vae.workers.pool import WorkerPool

# Process ids of the ranks -> the hooks that break the decode.
Break = Callable[[list[int]], Hooks]


def unavailable_reason() -> str | None:
    """Why no fault can be planted here, or None."""
    if sys.platform == "win32":
        return "not on Windows, which has no signals that kill or stop a process"
    return None


if sys.platform != "win32":

    def _kill(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def _stop(pid: int) -> None:
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
        kill, stop = (_at_first_chunk(act, last) for act in (_kill, _stop))
        with WorkerPool(devices, timeout_s=sizes.timeout_s) as pool:
            attempts = [
                _Attempt("a rank is killed within a chunk", kill, "died (exit code -9)"),
                _Attempt("a rank stops within a chunk", stop, "does not answer"),
                _Attempt("a cancel keeps the workers", _cancel, "cancelled", keeps_workers=True),
            ]
            found = [_after_a_right_one(attempt, pool, vae, z) for attempt in attempts]
        with _AbsentRank(devices, timeout_s=sizes.timeout_s) as pool:
            pool.check_wire()
            absent = _Attempt("a rank never joins: time-out and abort", _nothing, "does not answer")
            found.append(absent.run(pool, vae, z))
        return found

    @dataclass(frozen=True)
    class _Attempt:
        """One fault, and the words that must be in the error."""

        name: str
        breaks: Break
        said: str
        keeps_workers: bool = field(default=False, kw_only=True)

        def run(self, pool: WorkerPool, vae: WanVAE, z: torch.Tensor) -> Fault:
            """Decode with the fault; passed if it was named and the workers ended.

            A cancelled decode keeps them.
            """
            pids, last = pool.pids, len(pool.devices) - 1
            start = time.perf_counter()
            try:
                hooks = self.breaks(pids)
                pool.decode(
                    vae,
                    z,
                    chunk_frames=1,
                    on_progress=hooks.on_progress,
                    should_stop=hooks.should_stop,
                )
                text, passed = "nothing: the decode went through", False
            except ShardingError as error:
                text = str(error)
                passed = error.rank == last and not pool.pids and not self.keeps_workers
            except DecodeCancelled as error:
                text, passed = str(error), pool.pids == pids and self.keeps_workers
            seconds = time.perf_counter() - start
            passed = passed and self.said in text
            passed = passed and (self.keeps_workers or all(map(is_gone, pids)))
            return Fault(len(pool.devices), self.name, passed, seconds, text)

    def _after_a_right_one(
        attempt: _Attempt, pool: WorkerPool, vae: WanVAE, z: torch.Tensor
    ) -> Fault:
        """`attempt` between two decodes, which must have the same bits."""
        expected = pool.decode(vae, z, chunk_frames=1)
        fault = attempt.run(pool, vae, z)
        if fault.passed and not torch.equal(pool.decode(vae, z, chunk_frames=1), expected):
            text = f"{fault.said}; the next decode was wrong"
            return Fault(fault.ranks, fault.name, False, fault.seconds, text)
        return fault

    def _at_first_chunk(act: Callable[[int], None], rank: int) -> Break:
        """A progress callback that acts at the first chunk: the ranks are then in the next."""

        def hooks(pids: list[int]) -> Hooks:
            done: list[bool] = []

            def on_progress(*_: object) -> None:
                if not done:
                    done.append(True)
                    act(pids[rank])

            return Hooks(on_progress)

        return hooks

    def _cancel(pids: list[int]) -> Hooks:
        seen: list[int] = []
        return Hooks(lambda *_: seen.append(1), lambda: bool(seen))

    def _nothing(pids: list[int]) -> Hooks:
        return Hooks()

    class _AbsentRank(WorkerPool):
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
