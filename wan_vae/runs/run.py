"""Run: what every decode and encode has in common: the plan, the loop over the pieces of the
result, progress, cancel, a new start when memory runs out, the clock and the report.

`decode.py` and `encode.py` make the pieces (`_whole`, `_in_strips`). `ranks.py` holds what differs
if several ranks share the picture.
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import TypeVar

import torch

from .. import geometry
from ..arithmetic import own_arithmetic
from ..chunking import Chunk, PassEnds, schedule
from ..device import dtype_name, is_out_of_memory
from ..errors import DecodeCancelled, DecodeMemoryError, GeometryError, first_line
from ..hooks import DeviceMemory, Hooks, OwnMemory
from ..kernels.device import Device
from ..layout import LayoutCounter
from ..network.blocks import Step
from ..network.cache import FeatureCache
from ..network.model import WanVAEModel
from ..ops.opset import OpSet
from ..options import Operation
from ..planning.passes import frames_together, pass_ends
from ..planning.plan import Plan
from ..report import BackendOff, DecodeReport, ReportBuilder
from ..said import said
from ..sharding.plan import ShardPlan
from .clock import RunClock
from .engine import PROOF_BYTES, Engine, Setup, SetupRequest
from .holders import who_holds
from .ranks import Ranks, WholePicture

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """A part of the result that is final, [B, C, t, rows, W] on the device, and its place in it."""

    values: torch.Tensor
    start_frame: int
    first_row: int


class Run(ABC):
    """One decode or encode while it runs: its plan, its progress and its report.

    Call `begin`, then `execute`. `report` is None until the run has ended; then it is the final
    report, also if the run failed or was cancelled.
    """

    def __init__(
        self, engine: Engine, setup: Setup, hooks: Hooks, ranks: Ranks | None = None
    ) -> None:
        self.engine, self.setup, self.hooks = engine, setup, hooks
        self.ranks: Ranks = WholePicture() if ranks is None else ranks
        self.config = engine.config
        self.model: WanVAEModel = setup.model
        self.ops: OpSet = setup.ops
        self.device = setup.device
        self.memory: DeviceMemory = hooks.memory or OwnMemory(setup.device)
        self.counter = LayoutCounter()
        self.clock = RunClock(self.device)
        self.builder = ReportBuilder(setup.request.operation, self.config, self.device, setup.dtype)
        self.builder.precision_requested = setup.request.options.precision
        self.builder.imitation = Device.chosen_for(self.device).imitation
        self.builder.latent_shape = setup.request.latent_shape
        self.total_frames = geometry.pixel_shape(setup.request.latent_shape, self.config)[2]
        # The videos of a batch go through together: `done_frames` and `total_frames` are of one.
        self.videos = setup.request.latent_shape[0]
        self.builder.total_frames = self.videos * self.total_frames
        self.done_frames = 0
        self.report: DecodeReport | None = None
        self._plan: Plan | None = None
        # Of a moment ago, which the other ranks know already.
        self._early_plan: Plan | None = None
        self._least_failed: float = inf  # planned bytes
        # Of all ranks, once they have told each other.
        self._all_finite: bool | None = None
        # Once a run: a plan that fails a second time knows too little of what is free.
        self._may_try_again = True

    # -- the plan ------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """What this run executes now; if memory ran out, it takes less at a time than at first."""
        if self._plan is None:
            raise RuntimeError("a run has no plan before begin()")
        return self._plan

    def begin(self, whole_frames: bool = False, plan: Plan | None = None) -> None:
        """Fix the plan. Call it before the first chunk, after everything that stays is allocated.

        whole_frames: whether the sink needs whole frames. plan: a plan made before for the same
        run; a new one replaces it if it needs more memory than is free now. A collective: every
        rank calls it.
        """
        notes: tuple[str, ...] = ()
        fitting = self._early_plan if plan is None else self._fitting(plan, whole_frames)
        if fitting is None:
            plan, notes = self._planned(plan, whole_frames)
        else:
            plan = fitting
        pace = self.ranks.agree_on(plan)
        if pace != plan.pace:
            plan = self.engine.counted(self.setup, plan.paced(pace))
        self._report_plan(plan, notes)
        self._plan = plan
        self.clock = RunClock(self.device)  # its peak is above what is allocated now
        self.builder.lap("begin")

    def _planned(self, plan: Plan | None, whole_frames: bool) -> tuple[Plan, tuple[str, ...]]:
        """`plan`, or a new one for what is free now if there is none or it cannot be executed; and
        notes on why."""
        now = plan_in_room(self.engine, self.setup, self.memory, whole_frames, plan)
        if plan is None:
            return now, ()
        if reason := self._outdated(plan, now):
            return now, (f"planned again: {reason}",)
        # Where memory runs out all the same, strips must give what the output needs.
        whole = plan.whole_frames or whole_frames
        return replace(plan, free_bytes=now.free_bytes, whole_frames=whole), ()

    def _fitting(self, plan: Plan, whole_frames: bool) -> Plan | None:
        """`plan`, made before, if what it needs is free now, so that no new one would take less;
        else None. Without the time that planning takes.

        Raises GeometryError for the plan of another run.
        """
        self._check_run_of(plan)
        setup, whole = self.setup, plan.whole_frames or whole_frames
        facts = str(setup.device), dtype_name(setup.dtype), self.engine.layer_choices(setup)
        is_same = facts == (plan.device, plan.dtype, plan.choices)
        if not is_same or plan.shards is not None or (plan.strips and whole != plan.whole_frames):
            return None
        free = self.engine.free_bytes(setup, self.memory)
        if free is not None and free < max(plan.needed_bytes, plan.planned_bytes):
            return None
        return replace(plan, free_bytes=free, whole_frames=whole)

    def _plan_now(self, whole_frames: bool) -> Plan:
        """A plan for what is free now."""
        return self.engine.plan(self.setup, whole_frames=whole_frames, memory=self.memory)

    def _outdated(self, plan: Plan, now: Plan) -> str | None:
        """Why `plan`, made before, cannot be executed now; None if it can. now: a plan of now.

        Raises GeometryError for the plan of another run.
        """
        self._check_run_of(plan)
        if (now.device, now.dtype, now.choices) != (plan.device, plan.dtype, plan.choices):
            return said("plan.changed", "device, dtype or kernels are not those of the plan")
        if now.whole_frames and plan.strips and not plan.whole_frames:
            return said("plan.whole_frames", "the output needs whole frames")
        if now.free_bytes is not None and now.planned_bytes < plan.planned_bytes:
            return said(
                "plan.less_free",
                "{planned} GiB were planned, {free} GiB are free now",
                planned=f"{plan.planned_bytes / 2**30:.2f}",
                free=f"{now.free_bytes / 2**30:.2f}",
            )
        return None

    def _check_run_of(self, plan: Plan) -> None:
        """Raise GeometryError unless `plan` was made for this run."""
        request = self.setup.request
        same = (request.operation, request.latent_shape, request.shards)
        if (plan.operation, plan.latent_shape, plan.shards) != same:
            raise GeometryError(
                said(
                    "plan.other_run",
                    "the plan is for {planned}: this is {wanted}",
                    planned=_what(plan.operation, plan.latent_shape, plan.shards),
                    wanted=_what(*same),
                )
            )

    def _report_plan(self, plan: Plan, notes: tuple[str, ...]) -> None:
        builder = self.builder
        builder.layout.update(self.engine.describe(plan))
        builder.layers = list(plan.choices.layers)
        builder.backends_used = dict(plan.choices.used)
        builder.backends_off = [BackendOff(r.op, r.family, r.text) for r in plan.choices.refusals]
        builder.memory.update(
            free_bytes=plan.free_bytes,
            planned_bytes=plan.planned_bytes,
            weights_bytes=plan.weights_bytes,
        )
        builder.strips = plan.strips or 1
        builder.plan = replace(plan, notes=(*notes, *plan.notes)).summary()
        builder.fallbacks.extend(plan.notes)
        builder.memory["host_bytes"] = plan.host_bytes

    # -- the pieces of the result --------------------------------------------------------------

    @abstractmethod
    def _whole(self) -> Iterator[Piece]:
        """Every piece of the result, chunk after chunk, without strips.

        With several ranks, only this rank's rows are computed.
        """

    @abstractmethod
    def _in_strips(self, count: int) -> Iterator[Piece]:
        """Every piece of the result, in `count` strips of rows one after another."""

    @abstractmethod
    def _pass_frames(self, shape: tuple[int, ...], elements: int, together: int) -> tuple[int, ...]:
        """`Step.pass_frames` for [B, z, T, rows, W] of what goes through the stages at once."""

    @abstractmethod
    def _does_not_fit(self, tried: str, reason: str) -> DecodeMemoryError:
        """The error to raise when nothing smaller is left; `tried` names the smallest attempt."""

    @property
    def may_start_over(self) -> bool:
        """Whether a run that is out of memory may start over with less at a time."""
        return self.ranks.exchange is None

    def pieces(self) -> Generator[Piece, None, None]:
        """Every piece of the result: in whole chunks, or in strips where memory is short.

        If memory runs out, what nobody uses is given back, a plan for what is free then is made,
        and the run starts over from the first frame (see `_start_over`). It cannot go on from the
        failed chunk, because each chunk overwrites the history of the one before. Frames that were
        yielded already are computed again, but not yielded again; only strips that go one after
        another yield all rows again, and the sink writes over them.
        A caller that had no memory for a piece throws a DecodeMemoryError into the generator: the
        piece is then made and yielded again.
        Raises DecodeMemoryError when nothing smaller is left.
        """
        while True:
            try:
                yield from self._attempt()
                return
            except DecodeMemoryError as error:
                failure = str(error)
                release_frames(error)
            # Outside of the except block, so that no traceback holds the tensors.
            if not self.may_start_over:
                raise self._does_not_fit("", failure)
            self._start_over(failure)

    def _attempt(self) -> Iterator[Piece]:
        """Every piece, by the plan of now."""
        strips = self.plan.strips
        return self._whole() if strips is None else self._in_strips(strips)

    def _start_over(self, failure: str) -> None:
        """Choose what is tried next, after the plan has run out of memory.

        In this order: a plan for what is free once nobody's memory was given back, if it takes less
        than the failed one; the same plan once more, if it should fit now; half as much at a time.
        Raises DecodeMemoryError when nothing smaller is left.
        """
        failed = self.plan
        self._least_failed = min(self._least_failed, failed.planned_bytes)
        self.clock.restart()
        self._release()
        self.memory.give_back(failed.needed_bytes)
        # The caller's number of free bytes is no measurement.
        free = self.memory.free_bytes()
        now = None if free is None else self._plan_now(failed.whole_frames)
        text = (
            failure
            if failed.strips is None
            else said(
                "run.strips", "{strips} strips: {failure}", strips=failed.strips, failure=failure
            )
        )
        # Less than all that failed: more strips can take more, and a plan must not come twice.
        is_less = now is not None and now.planned_bytes < self._least_failed
        if now is not None and free is not None and is_less and _may_follow(now, failed):
            self._plan = now
            if now.strips is not None and now.strips != failed.strips:
                text = said(
                    "run.planned_strips",
                    "{failure}; planned again for {free} GiB that are free now: {strips} strips",
                    failure=text,
                    free=f"{free / 2**30:.2f}",
                    strips=now.strips,
                )
            else:
                text = said(
                    "run.planned",
                    "{failure}; planned again for {free} GiB that are free now",
                    failure=text,
                    free=f"{free / 2**30:.2f}",
                )
        elif now is not None and _fits(now, failed) and self._may_try_again:
            self._may_try_again = False
            text = said(
                "run.once_more",
                "{failure}; tried once more with the memory that was given back",
                failure=text,
            )
        else:
            smaller = self._smaller(failed)
            if smaller is None:
                tried = said(
                    "run.tried",
                    "even with one latent frame a chunk and {strips} strip(s)",
                    strips=failed.strips or 1,
                )
                self.builder.fallbacks.append(text)
                raise self._does_not_fit(tried, failure)
            if smaller.lengths != failed.lengths and smaller.strips == failed.strips:
                text = said(
                    "run.again",
                    "{failure}; started again with {frames}",
                    failure=text,
                    frames=smaller.chunk_frames,
                )
            self._plan = self.engine.counted(self.setup, smaller)
        self.builder.strips = self.plan.strips or 1
        self.builder.memory.update(
            planned_bytes=self.plan.planned_bytes, host_bytes=self.plan.host_bytes
        )
        self.builder.restarts += 1
        self.builder.fallbacks.append(text)

    def _smaller(self, plan: Plan) -> Plan | None:
        """A plan that takes less at a time than `plan`; None if there is none.

        First chunks are halved. Then the picture goes in strips, twice as many each time, up to
        strips of one row; a number of strips that was asked for stays.
        """
        halved = plan.halved()
        is_shorter = halved.lengths != plan.lengths
        if plan.strips is None and is_shorter:
            return halved
        counts: list[int] = []
        if plan.options.strips is None:
            rows, n = plan.latent_shape[3], 2
            while n < rows:
                counts.append(n)
                n *= 2
            counts = [n for n in (*counts, rows) if n > (plan.strips or 0)]
        if counts:
            parked = plan.parked or self.engine.may_park(self.setup, plan.whole_frames)
            # Of strips that park from here on, the parts are chosen when their bytes are counted.
            return replace(halved, strips=counts[0], parked=parked)
        return halved if is_shorter else None

    @abstractmethod
    def _release(self) -> None:
        """Let go of device memory that was cut for the failed plan."""

    def chunks(self, rows: int) -> Iterator[tuple[Chunk, Step]]:
        """The chunks of the plan in turn, with a fresh history, each with its step.

        rows: latent rows of the features that go through the stages, which decide their passes.
        """
        cache = FeatureCache()
        for chunk in self._schedule():
            yield chunk, self.step(cache, chunk, rows)

    def _schedule(self) -> list[Chunk]:
        """The chunks of the plan."""
        return schedule(self.plan.latent_shape[2], self.plan.lengths)

    def step(self, cache: FeatureCache, chunk: Chunk, rows: int) -> Step:
        """The `Step` for `chunk`, with the history in `cache`. rows: see `chunks`."""
        frames: tuple[int, ...] = ()
        ends = PassEnds()
        elements, shards = self.plan.pass_elements, self.plan.shards
        if elements is not None:
            shape = (*self.plan.latent_shape[:3], rows, self.plan.latent_shape[4])
            together = frames_together(self.ops.layers)
            if shards is not None:
                # Of the largest part, as all ranks exchange rows of the same frames.
                shape = shards.pixel_shape_of(0, self.plan.latent_shape, 1)
            frames = self._pass_frames(shape, elements, together)
            if shards is not None:
                ends = pass_ends(self.config, self.plan.latent_shape, frames, together)
        return Step(
            cache,
            chunk,
            exchange=self.ranks.exchange,
            ops=self.ops,
            counter=self.counter,
            pass_frames=frames,
            pass_ends=ends,
        )

    def frames_of(self, chunk: Chunk) -> int:
        """Pixel frames of `chunk`."""
        first, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, self.config)
        return last - first

    def timed(self, chunk: Chunk, what: str, work: Callable[[], T]) -> T:
        """Return `work()`, which computes a part of `chunk`, and measure its time.

        Raises DecodeCancelled if the caller or a rank wants to stop, and DecodeMemoryError, which
        says that `what` did not fit.
        """
        should_stop = self.hooks.should_stop
        stop = should_stop is not None and should_stop()
        if self.ranks.agree_to_stop(chunk, stop):
            raise DecodeCancelled(
                said(
                    "run.cancelled",
                    "cancelled after {done} of {total} frames",
                    done=self.videos * self.done_frames,
                    total=self.builder.total_frames,
                )
            )
        with self.clock.measure(chunk, self.frames_of(chunk)):
            return in_memory(what, work)

    def shortage(self) -> str:
        """How much memory is missing and who holds the rest, for the message of a final failure:
        sentences that end in a semicolon, or nothing where nobody can say."""
        least = self.engine.least_bytes(self.setup, self.plan.whole_frames)
        return who_holds(self.device, self.memory, least)

    # -- executing and ending --------------------------------------------------------------------

    def execute(
        self, put: Callable[[Piece], None], close: Callable[[], None], puts_again: bool = True
    ) -> None:
        """Compute every piece, `put` it and report progress; then `close`. Sets `report`.

        puts_again: whether a piece may be put twice, where memory ran out in the first `put`.
        Every error is raised again, after `report` was set.
        """
        try:
            with own_arithmetic(self.device):
                # Closed also where an error keeps this frame: a generator holds device memory.
                with closing(self.pieces()) as pieces:
                    piece = next(pieces, None)
                    while piece is not None:
                        refused = self._attempt_to(put, piece, puts_again)
                        if refused is None:
                            self._tell_progress()
                            piece = next(pieces, None)
                        else:
                            piece = pieces.throw(refused)
                self.builder.lap("chunks")
                close()
                self.builder.lap("copies")
            self.complete()
        except BaseException as error:
            failure = self._translated(error)
            self.fail(failure)
            forget_failure(error)
            if failure is error:
                raise
            raise failure from None

    def _attempt_to(
        self, put: Callable[[Piece], None], piece: Piece, puts_again: bool
    ) -> DecodeMemoryError | None:
        """`put` the piece; the error if there is no memory for that. Raises it if the piece cannot
        be put again."""
        try:
            in_memory(said("run.output", "output"), partial(put, piece))
            return None
        except DecodeMemoryError as error:
            release_frames(error)
            refused = error.with_traceback(None)
        if puts_again and self.may_start_over:
            return refused
        raise self._does_not_fit(
            said("run.while_written", "while its output was written"), str(refused)
        )

    def _tell_progress(self) -> None:
        on_progress = self.hooks.on_progress
        if on_progress is not None:
            self.ranks.read_waits(wait=False)
            self._fill(wait=False)
            report = self.builder.build("running")
            on_progress(report.done_frames, report.total_frames, report)

    def _translated(self, error: BaseException) -> BaseException:
        """`error`, or for a shard that is out of memory an error that names its rank."""
        if isinstance(error, DecodeMemoryError) or not is_out_of_memory(error):
            return error
        return self._out_of_memory(first_line(error)) or error

    def _out_of_memory(self, reason: str) -> DecodeMemoryError | None:
        """The error for memory that ran out outside of a chunk; None leaves it as it is."""
        return self.ranks.out_of_memory(reason)

    def _settle(self) -> None:
        """Read the times of all passes and exchanges but the last, as the device comes to their
        ends: where the host has nothing else to do, so that little is left when the device is done.
        """
        self.clock.settle()
        self.ranks.read_waits(wait=True)

    def _agree_on_end(self) -> bool:
        """Whether no rank met NaN or inf, once all work is launched; waits for the device. Puts
        every rank's share into the report. A collective, only once."""
        if self._all_finite is None:
            with own_arithmetic(self.device):
                self._settle()
                finite = self._is_finite()
                self._all_finite = self.ranks.complete(self.builder, self.counter, finite)
        return self._all_finite

    def complete(self) -> None:
        """Set the final report; waits for the device, so that its times are true."""
        finite = self._agree_on_end()
        self._fill(wait=True)
        if not finite:
            self._is_not_finite()
        self.builder.lap("finish")
        self.report = self.builder.build("done")

    def fail(self, error: BaseException) -> None:
        """Set the report of a run that ended early. It does not wait for the device, which may be
        broken.
        """
        self._release()
        stopped = isinstance(error, (DecodeCancelled, GeneratorExit, KeyboardInterrupt))
        self._fill(wait=False)
        self.report = self.builder.build("cancelled" if stopped else "failed", str(error) or None)

    @abstractmethod
    def _is_finite(self) -> bool:
        """Whether this rank met neither NaN nor inf; waits for the device."""

    @abstractmethod
    def _is_not_finite(self) -> None:
        """Say that a rank met NaN or inf: in a warning or in an error."""

    def _fill(self, wait: bool) -> None:
        self.builder.layout["conversions"] = self.counter.conversions
        self.builder.layout["mixed_calls"] = self.counter.mixed_calls
        self.builder.done_frames = self.videos * self.done_frames
        self.builder.chunks = self.clock.records(wait)
        self.builder.memory["peak_bytes"] = self.clock.peak_bytes()


def in_memory(what: str, work: Callable[[], T]) -> T:
    """Return `work()`. Raises DecodeMemoryError, which says that `what` did not fit."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = first_line(error)
        release_frames(error)
    # Outside of the except block, so that no traceback holds the tensors of the failed attempt.
    raise DecodeMemoryError(said("run.no_memory", "{what}: {failure}", what=what, failure=failure))


def granted(
    device: torch.device,
    memory: DeviceMemory,
    wanted_bytes: int,
    what: str,
    work: Callable[[], T],
) -> T:
    """Return `work()`, which allocates `wanted_bytes` before there is a plan; where they are not
    free, what nobody uses is given back first. Raises DecodeMemoryError, which names `what`."""
    try:
        return in_memory(what, work)
    except DecodeMemoryError as error:
        release_frames(error)
    memory.give_back(wanted_bytes)
    try:
        return in_memory(what, work)
    except DecodeMemoryError as error:
        failure = str(error)
    raise DecodeMemoryError(
        said(
            "run.out_of_memory",
            "out of memory on {device}: {failure}; {shortage}free device memory, or run on the CPU",
            device=device,
            failure=failure,
            shortage=who_holds(device, memory, wanted_bytes),
        )
    )


def plan_in_room(
    engine: Engine,
    setup: Setup,
    memory: DeviceMemory,
    whole_frames: bool = False,
    before: Plan | None = None,
) -> Plan:
    """A plan for what is free now, or can be. before: a plan of the same run, made earlier."""
    now = engine.plan(setup, whole_frames=whole_frames, memory=memory)
    wanted = now.wanted_bytes if before is None else before.planned_bytes
    if now.free_bytes is not None and now.planned_bytes < wanted:
        # Less at a time than in a device with memory to spare: first what nobody uses goes.
        memory.give_back(now.wanted_bytes if before is None else before.needed_bytes)
        now = engine.plan(setup, whole_frames=whole_frames, memory=memory)
    return now


def ready(engine: Engine, request: SetupRequest, memory: DeviceMemory) -> Setup:
    """`engine.setup(request)`, which proves kernels in device memory before there is a plan."""
    work = partial(engine.setup, request)
    return granted(
        engine.device, memory, PROOF_BYTES, said("run.proofs", "proofs of kernels"), work
    )


def release_frames(error: BaseException) -> None:
    """Let go of the variables in the frames that `error` has left, also if somebody keeps it: a
    debugger, a logger, or a program that shows the error later."""
    traceback.clear_frames(error.__traceback__)


def forget_failure(error: BaseException) -> None:
    """`release_frames` for errors whose cause is known: memory that ran out, and a cancel. Those of
    others keep their variables, for whoever looks for the cause."""
    if isinstance(error, DecodeCancelled | DecodeMemoryError) or is_out_of_memory(error):
        release_frames(error)


def _may_follow(plan: Plan, failed: Plan) -> bool:
    """Whether `plan` can follow `failed`: a sink may hold rows of strips already, which whole
    frames would not write again."""
    return failed.strips is None or plan.strips is not None


def _fits(now: Plan, failed: Plan) -> bool:
    """Whether `failed` should fit into what is free now, for which `now` was planned."""
    return now.planned_bytes >= failed.planned_bytes


def latent_frames_of(chunk: Chunk) -> str:
    """A chunk in words."""
    if chunk.frames == 1:
        return said("run.chunk_of_one", "chunk of 1 latent frame")
    return said("run.chunk", "chunk of {frames} latent frames", frames=chunk.frames)


def _what(operation: Operation, latent_shape: tuple[int, ...], shards: ShardPlan | None) -> str:
    """An operation in words."""
    shape = list(latent_shape)
    if operation == "encode":
        text = said("plan.encode", "an encode of a latent {shape}", shape=shape)
    else:
        text = said("plan.decode", "a decode of a latent {shape}", shape=shape)
    if shards is None:
        return text
    return said(
        "plan.over_ranks",
        "{text} over {ranks} ranks by {axis}",
        text=text,
        ranks=shards.world_size,
        axis=shards.axis,
    )
