"""Following one operation of a pool: progress, cancel, failures, signs of life, blame."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DecodeMemoryError, ShardingError, WanVAEError
from ..hooks import Hooks
from ..options import Operation
from ..report import DecodeReport
from ..said import reworded, said
from .launch import WorkerProcess, receive, try_send
from .pipe import PipeEnd, ready_of
from .shared import SharedBuffer

# How long the parent looks at its pipes before it asks `should_stop` again.
_POLL_S = 0.1
# How often it asks busy workers for a sign of life.
_PING_S = 0.5
# After a first failure the other ranks fail too, within moments; the cause is chosen among them.
GRACE_S = 2.0


@dataclass(frozen=True)
class Failure:
    """What went wrong on which rank; `blames` is the rank that did not answer it.

    `kind` is the name of the worker's exception, or "died", "stuck" (gave no sign of life) or
    "aborted" (NCCL ended the process after a message that never came).
    """

    rank: WorkerProcess
    kind: str
    text: str
    blames: int | None = None


def failure_of(rank: WorkerProcess, value: Mapping[str, Any], transport: str) -> Failure:
    """What the error message `value` of `rank` says."""
    kind = value["kind"]
    # Windows has no such exit codes, and no NCCL.
    aborted = getattr(signal, "SIGABRT", None)
    if kind == "died" and transport == "nccl" and aborted and rank.process.poll() == -aborted:
        kind = "aborted"
    text = reworded(value["text"], value.get("worded", {}))
    return Failure(rank, kind, text, value["rank"])


@dataclass(frozen=True)
class Watched:
    """What is watched: the busy ranks, how they talk, and the memory that they share."""

    ranks: Sequence[WorkerProcess]
    transport: str
    timeout_s: float
    buffer: SharedBuffer
    hooks: Hooks
    operation: Operation
    # Called with n when all `writers` have written their part of frames [0, n).
    on_written: Callable[[int], None] | None = None
    writers: Sequence[int] = ()
    # Gives the ranks a part of their input; whether there is more to give.
    give: Callable[[], bool] | None = None


class Watch:
    """Follows one operation: progress, cancel, failures, signs of life."""

    def __init__(self, watched: Watched) -> None:
        self.ranks, self.buffer = watched.ranks, watched.buffer
        self.transport, self.timeout_s = watched.transport, watched.timeout_s
        self.what = (
            said("worker.while_encoding", "failed while encoding")
            if watched.operation == "encode"
            else said("worker.while_decoding", "failed while decoding")
        )
        self.hooks = watched.hooks
        self.done_frames = [0] * len(self.ranks)
        self.reported_frames = 0
        self.on_written = watched.on_written
        # Frames that each rank has written.
        self.written = dict.fromkeys(watched.writers, 0)
        self.give = watched.give
        self.report: dict[str, Any] | None = None
        self.mapped = 0
        self.asked_at: dict[int, float] = {}  # ranks that have a ping to answer
        self.next_ping = time.monotonic() + _PING_S

    def until_done(self) -> list[dict[str, Any]]:
        """The result of each rank, in order. Raises ShardingError, DecodeCancelled."""
        ranks, should_stop = self.ranks, self.hooks.should_stop
        left = {r.pipe: r for r in ranks}
        results: dict[int, dict[str, Any]] = {}
        failures: list[Failure] = []
        until: float | None = None
        while left and (until is None or time.monotonic() < until):
            if until is None and not self.buffer.raw[0] and should_stop and should_stop():
                self.buffer.raw[0] = 1
            # Also after a failure or a cancel: ranks that wait for their input hear of neither.
            if self.give is not None and not self.give():
                self.give = None
            for pipe in ready_of(left, _POLL_S if self.give is None else 0.0):
                rank = left[pipe]
                kind, value = receive(rank)
                self.asked_at.pop(rank.rank, None)
                if kind == "done":
                    del left[pipe]
                    results[rank.rank] = value
                elif kind == "error":
                    del left[pipe]
                    failures.append(failure_of(rank, value, self.transport))
                    until = until or time.monotonic() + GRACE_S
                elif kind == "pong":
                    pass
                elif kind == "written":
                    self.written[rank.rank] = value
                    if self.on_written is not None and not failures:
                        self.on_written(min(self.written.values()))
                elif kind == "mapped":
                    self.mapped += 1
                    if self.mapped == len(ranks):
                        self.buffer.unlink()  # from here on, nothing is left after a crash
                else:
                    self._progress(rank, *value)
            # After what was waiting in the pipes has been read: we may have been away ourselves.
            if stuck := self._without_a_sign_of_life(left):
                failures += stuck
                break
        if not failures:
            failures = self._refused_by_some(results)
        if failures:
            raise error_of(failures, ranks, self.what, set(results))
        return [results[r.rank] for r in ranks]

    def _refused_by_some(self, results: Mapping[int, dict[str, Any]]) -> list[Failure]:
        """What ranks say of an input that others took: they do not all have the same."""
        refused = [r for r in self.ranks if results[r.rank]["refused"] is not None]
        if len(refused) == len(self.ranks):
            return []
        return [failure_of(r, results[r.rank]["refused"], self.transport) for r in refused]

    def _without_a_sign_of_life(
        self, left: Mapping[PipeEnd[Any, Any], WorkerProcess]
    ) -> list[Failure]:
        """Ask the workers that are still busy, and return those that have not answered in time.

        Finds a process that was stopped, also where no other rank waits for it, or where the
        others sit in NCCL and cannot say so.
        """
        now, timeout_s = time.monotonic(), self.timeout_s
        # An answer may have come while this process copied frames.
        answered = set(ready_of(left, 0))
        no_sign = said(
            "worker.no_sign", "gave no sign of life for {seconds} s", seconds=f"{timeout_s:g}"
        )
        stuck = [
            Failure(r, "stuck", no_sign, r.rank)
            for pipe, r in left.items()
            if now - self.asked_at.get(r.rank, now) > timeout_s and pipe not in answered
        ]
        if now >= self.next_ping:
            self.next_ping = now + _PING_S
            for rank in left.values():
                if rank.rank not in self.asked_at:
                    self.asked_at[rank.rank] = now
                    try_send(rank.pipe, ("ping", None))
        return stuck

    def _progress(
        self, rank: WorkerProcess, done: int, total: int, of_rank: dict[str, Any] | None
    ) -> None:
        """Tell of the frames that every rank has done; ranks without rows keep step."""
        self.done_frames[rank.rank] = done
        self.report = of_rank or self.report
        everywhere = min(self.done_frames)
        on_progress = self.hooks.on_progress
        if everywhere > self.reported_frames and self.report and on_progress is not None:
            self.reported_frames = everywhere
            report = DecodeReport.from_dict(self.report)
            on_progress(everywhere, total, replace(report, done_frames=everywhere))


def _died(rank: str, text: str, what: str) -> str:
    return said("worker.died", "{rank} died ({how}); it {what}", rank=rank, how=text, what=what)


def _has_no_memory(rank: str, text: str, what: str) -> str:
    return said(
        "worker.no_memory",
        "{rank} is out of memory: {reason}; it {what}",
        rank=rank,
        reason=text,
        what=what,
    )


def _is_silent(rank: str, text: str, _what: str) -> str:
    return said(
        "worker.silent",
        "{rank} does not answer (stuck or overloaded): {reason}",
        rank=rank,
        reason=text,
    )


# What is the cause wherever it happened, the first before the others, and its sentence.
_CAUSES: dict[str, Callable[[str, str, str], str]] = {
    "died": _died,
    DecodeMemoryError.__name__: _has_no_memory,
    "stuck": _is_silent,
}


def error_of(
    failures: list[Failure],
    ranks: Sequence[WorkerProcess],
    what: str,
    finished: Set[int] = frozenset(),
) -> WanVAEError:
    """The one error that names the cause: a death, then no memory, then what was said first."""
    for kind, sentence in _CAUSES.items():
        for f in failures:
            if f.kind == kind:
                return ShardingError(sentence(f.rank.name, f.text, what), rank=f.rank.rank)
    silent = [r for r in ranks if r.rank not in {f.rank.rank for f in failures} | finished]
    for f in failures:
        if f.kind in (ShardingError.__name__, "aborted"):
            if silent:
                stuck = next((r for r in silent if r.rank == f.blames), silent[0])
                return ShardingError(_is_silent(stuck.name, f.text, what), rank=stuck.rank)
            return ShardingError(f.text, rank=f.blames)
    first = failures[0]
    return ShardingError(
        said(
            "worker.raised",
            "{rank} {what}: {kind}: {text}",
            rank=first.rank.name,
            what=what,
            kind=first.kind,
            text=first.text,
        ),
        rank=first.rank.rank,
    )
