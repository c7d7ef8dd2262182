"""One run over several devices from one program: one worker process for each device.

The parent (this process) is not a rank. It moves no pixels: the workers agree among themselves and
write their rows into one host buffer that all of them share. The parent starts the workers, watches
them and keeps them for the next run. If one fails, it ends all of them and says which one, and why.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from .. import geometry, layout
from ..chunking import chunk_lengths
from ..device import dtype_name, host_empty, host_free_bytes
from ..errors import (
    CheckpointError,
    DecodeCancelled,
    DecodeMemoryError,
    GeometryError,
    LatentError,
    ShardingError,
)
from ..hooks import Hooks, OnProgress, ShouldStop
from ..io.fingerprint import fingerprint
from ..io.image import FollowingCopy
from ..io.latents import WHAT, as_batch, check_latent_shape, check_pixels
from ..network.model import NO_ENCODER, WanVAEModel, tensor_version, weight_state
from ..network.weights import copy_weights
from ..options import (
    COLLECTS,
    AxisRequest,
    Backend,
    Collect,
    MemoryFormat,
    Operation,
    Precision,
    RunOptions,
)
from ..pipeline import WanVAE, checked_shape
from ..planning.plan import Plan
from ..report import DecodeReport
from ..runs.engine import checked_options
from ..said import expected_one_of, listed, reworded, said
from ..sharding.plan import plan_shards
from ..walk import parameters
from .devices import Transport, parse_devices, pick_transport
from .giving import Giving, copy_on_host, frames_first
from .joining import WorkerSettings
from .launch import WorkerProcess, receive, settle, spawn, try_send
from .pipe import ready_of
from .shared import SharedBuffer, Spares, aligned, view
from .watch import GRACE_S, Failure, Watch, Watched, error_of, failure_of

Form = Literal["pixels", "image"]

_CONTROL_BYTES = 4096
# How long processes wait for the first run that they were started for: a sampler takes minutes.
_AHEAD_S = 1800.0
# Host memory that must be free for each process that waits: it takes half of that.
_WAITING_BYTES = 1 << 30
ONE_DEVICE = said(
    "run.one_device",
    "one device: nothing to shard; name more devices, or decode without workers",
)


@dataclass(frozen=True)
class _Job:
    """One operation of the pool: `tensor` in, a float32 tensor of `shape` out.

    arguments: what the command tells every rank. by_rank: what it also tells each rank alone.
    """

    operation: Operation
    vae: WanVAE
    tensor: torch.Tensor
    shape: tuple[int, ...]
    hooks: Hooks
    arguments: Mapping[str, Any]
    by_rank: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


class _Turn:
    """A lock for one thread at a time, which says so where its own thread asks again: a callback of
    a run, for which that run would wait for ever. Use as a context; raises ShardingError."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    @property
    def is_taken(self) -> bool:
        """Whether the calling thread has it."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> None:
        if self.is_taken:
            raise ShardingError(
                said(
                    "worker.within",
                    "the workers were called from within a run of theirs (by on_progress or "
                    "should_stop): call them when it has returned",
                )
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = None
        self._lock.release()


class _Loaded:
    """The weights that the workers have: which they were, and what."""

    def __init__(self, vae: WanVAE, state: Mapping[str, torch.Tensor]) -> None:
        self._model = weakref.ref(vae.model)
        self._weights, self._tensors = _weights_of(vae.model), _tensors_of(vae.model)
        self._fingerprint = fingerprint(state)

    def are_of(self, vae: WanVAE) -> bool:
        """Whether these are the weights of `vae` as they are now. Weights that only lie elsewhere,
        because they were moved to a device and back, are the same."""
        model = self._model()
        if model is not vae.model:
            return False
        weights = _weights_of(model)
        if weights == self._weights:
            return True
        if _tensors_of(model) != self._tensors or self._fingerprint is None:
            return False
        if fingerprint(model.state_dict()) != self._fingerprint:
            return False
        self._weights = weights
        return True


def _weights_of(model: WanVAEModel) -> list[tuple[object, ...]]:
    return [weight_state(p) for p in parameters(model)]


def _tensors_of(model: WanVAEModel) -> list[tuple[object, ...]]:
    """Which tensors the weights are, and how often each was changed in place, wherever they lie."""
    return [(id(p), p.dtype, tensor_version(p)) for p in parameters(model)]


class WorkerPool:
    """Worker processes for a list of devices; started on first use and again after a failure.

    transport: how ranks exchange rows: "nccl", "gloo", or "auto". timeout_s: how long a rank waits
    for another rank, and how long a worker may give no sign of life. idle_s: how long workers may
    be without work before they are ended. Decodes from several threads run one after another. The
    memory that workers write to is kept for the next run; frames of an image are copied out of it
    while others are decoded, because a program keeps its images. `close` (or `with`) ends the
    workers; they also end when this process ends in any way. `last_reports`: one report for each
    rank's share of the last operation, in rank order.
    """

    def __init__(
        self,
        devices: str | Sequence[str | torch.device],
        *,
        transport: Literal["auto", "nccl", "gloo"] = "auto",
        timeout_s: float = 30.0,
        idle_s: float = 300.0,
        start_timeout_s: float = 120.0,
        shared_folders: Sequence[Path] | None = None,
    ) -> None:
        self.devices = parse_devices(devices)
        self.transport: Transport = (
            pick_transport(self.devices) if transport == "auto" else transport
        )
        self.timeout_s, self.idle_s = timeout_s, idle_s
        self.start_timeout_s = start_timeout_s
        self.shared_folders = shared_folders
        self.last_reports: tuple[DecodeReport, ...] = ()
        self._ranks: list[WorkerProcess] = []
        # When the processes of the workers were started, by `time.monotonic`.
        self._spawned_s = 0.0
        # Whether the workers have joined one another; before, they only wait (`start_ahead`).
        self._joined = False
        # Removes the folder where the workers meet, at the latest with this object or program.
        self._remove_folder: weakref.finalize[[Path, int], WorkerPool] | None = None
        self._loaded: _Loaded | None = None
        # The plans of each kind of run with these weights.
        self._planned: dict[tuple[object, ...], tuple[Plan, ...]] = {}
        # The memory of the last results, which the workers have mapped.
        self._spares = Spares()
        # Milliseconds by phase since the last report: of this process, and of starting workers.
        self._laps: dict[str, float] = {}
        self._lock = _Turn()
        self._idle: threading.Timer | None = None
        self._uses = 0
        # Until when a run is awaited that was announced, by `time.monotonic`.
        self._awaited_until_s = -math.inf
        self._started_timeout_s = timeout_s

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty before the first use and after `close`."""
        return [r.process.pid for r in self._ranks] if self._joined else []

    def start_ahead(self) -> None:
        """Start the processes of the workers, where there are none, for a run that will come.

        They import PyTorch meanwhile, which is most of a first run's wait, and take no memory of a
        device. Until that run has been done, new ones are started whenever workers end: because
        nobody used them, because of a failure, or to `free_devices`. Returns without waiting for
        them, but waits for a run or a `close` of another thread. They end if no run comes in half
        an hour.
        """
        with self._lock:
            self._awaited_until_s = time.monotonic() + _AHEAD_S
            if not self._is_running():
                self._spawn()
            if not self._joined:
                self._rest(_AHEAD_S)

    def close(self) -> None:
        """End the workers and wait until they are gone. The next decode starts new ones."""
        with self._lock:
            self._awaited_until_s = -math.inf
            self._stop()

    def free_devices(self) -> None:
        """Give back the workers' memory of devices, as `close` does; see `start_ahead`."""
        with self._lock:
            if self._joined:
                self._stop()
                self._spawn_awaited()

    def _spawn_awaited(self) -> None:
        """Start processes for a run that was announced and is still to come, if there is one."""
        left_s, free = self._awaited_until_s - time.monotonic(), host_free_bytes()
        if left_s <= 0.0 or (free is not None and free < len(self.devices) * _WAITING_BYTES):
            return
        with suppress(ShardingError):  # the run says it
            self._spawn()
            self._rest(left_s)

    def _stop(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        for rank in self._ranks:
            try_send(rank.pipe, ("stop", {}))
        self._end(self.timeout_s)

    # -- operations ---------------------------------------------------------------------------

    def plan(
        self,
        vae: WanVAE,
        latent_shape: Sequence[int],
        *,
        operation: Operation = "decode",
        axis: AxisRequest = "auto",
        chunk_frames: int | Sequence[int] | None = None,
        memory_format: MemoryFormat = "auto",
        precision: Precision = "auto",
        backend: Backend = "auto",
        free_bytes: float | None = None,
        earlier: bool = False,
    ) -> tuple[Plan, ...]:
        """What each rank would do with a latent [B, z, T, H, W], in rank order; see `WanVAE.plan`.

        Starts the workers and gives them the weights, because a plan depends on the kernels of
        their devices. All ranks take the chunks of the one that has the least room. Give the plans
        to `decode`, which sends each rank its own. earlier: the plans of an earlier call with the
        same arguments will do, if the workers have these weights still; then nobody is asked.
        Raises GeometryError, BackendError, ShardingError.
        """
        options = RunOptions(
            chunk_frames, memory_format, precision, backend=backend, free_bytes=free_bytes
        )
        shape = checked_shape(latent_shape, operation, axis, vae.config)
        options = checked_options(options)
        if chunk_frames is not None:
            chunk_lengths(shape[2], chunk_frames)
        key = (operation, shape, axis, options)
        known = self._planned.get(key)  # which another thread may take away
        if earlier and known is not None and self._has(vae) and self._is_running():
            return known
        with self._busy(vae), self._timed("workers: plan"):
            self._send_all(
                "plan",
                operation=operation,
                latent_shape=shape,
                axis=axis,
                options=asdict(options),
            )
            plain = self._wait_for_all(said("worker.plan", "plan"), self.start_timeout_s)
            plans = [Plan.from_dict(p) for p in plain]
            pace = plans[0].pace_of_ranks([(p.chunk_frames, p.pass_elements) for p in plans])
            found = tuple(plan.paced(pace) for plan in plans)
            # Before another thread may give the workers other weights.
            self._planned[key] = found
        return found

    def has_planned(self, vae: WanVAE, operation: Operation) -> bool:
        """Whether the workers have proven their kernels for `operation` with these weights."""
        return self._has(vae) and any(key[0] == operation for key in self._planned)

    def decode(
        self,
        vae: WanVAE,
        latent: torch.Tensor,
        *,
        axis: AxisRequest = "auto",
        gather: Collect = "shared",
        form: Form = "pixels",
        normalized: bool = False,
        chunk_frames: int | Sequence[int] | None = None,
        memory_format: MemoryFormat = "auto",
        precision: Precision = "auto",
        backend: Backend = "auto",
        plans: Sequence[Plan] | None = None,
        on_progress: OnProgress | None = None,
        should_stop: ShouldStop | None = None,
        memory_formats: Sequence[MemoryFormat] | None = None,
    ) -> torch.Tensor:
        """Decode on all devices; `vae.last_report` then tells of all ranks.

        Returns host memory: float32 [B, 3, T', H', W'] in [-1, 1], or with form="image"
        [B, T', H', W', 3] in [0, 1]. gather: each rank writes its rows ("shared"), or rank 0 writes
        the picture that it alone ("rank0") or every rank ("all") has gathered. plans: from `plan`,
        in place of the options that it took. memory_formats: one for each rank, in place of
        memory_format. The other options are those of `WanVAE.decode`. `on_progress` counts the
        frames that every rank has done.

        Raises LatentError, GeometryError, ShardingError (with the rank that failed and why),
        DecodeCancelled. Not a collective; decodes of other threads wait.
        """
        if gather not in COLLECTS:
            raise ShardingError(expected_one_of("gather", gather, COLLECTS))
        if form not in ("pixels", "image"):
            raise ShardingError(expected_one_of("form", form, ("pixels", "image")))
        latent = as_batch(latent, WHAT["latent"])
        check_latent_shape(latent, vae.config)  # the ranks look at the values
        options = RunOptions(chunk_frames, memory_format, precision, backend=backend)
        b, c, t, h, w = geometry.pixel_shape(tuple(latent.shape), vae.config)
        arguments = {
            "form": form,
            "axis": axis,
            "gather": gather,
            "normalized": normalized,
            "options": asdict(options),
        }
        return self._run(
            _Job(
                operation="decode",
                vae=vae,
                tensor=latent,
                shape=(b, t, h, w, c) if form == "image" else (b, c, t, h, w),
                hooks=Hooks(on_progress, should_stop),
                arguments=arguments,
                by_rank=self._by_rank(options, memory_formats, self._checked_plans(plans, latent)),
            )
        )

    def _checked_plans(
        self, plans: Sequence[Plan] | None, latent: torch.Tensor
    ) -> tuple[Plan, ...] | None:
        """`plans`, one for each rank and for a decode of `latent`. Raises GeometryError."""
        if plans is None:
            return None
        plans = tuple(plans)
        for plan in plans:
            if not isinstance(plan, Plan):
                raise GeometryError(
                    said(
                        "plan.no_plan_of_rank",
                        "a plan is a {kind}: expected a Plan",
                        kind=type(plan).__name__,
                    )
                )
            if (plan.operation, plan.latent_shape) != ("decode", tuple(latent.shape)):
                raise GeometryError(
                    said(
                        "plan.other_decode",
                        "a plan is for a {operation} of {planned}: this is a decode of {wanted}",
                        operation=plan.operation,
                        planned=list(plan.latent_shape),
                        wanted=list(latent.shape),
                    )
                )
        return plans

    def _by_rank(
        self,
        options: RunOptions,
        memory_formats: Sequence[MemoryFormat] | None,
        plans: Sequence[Plan] | None,
    ) -> list[dict[str, Any]]:
        """What a decode tells each rank alone."""
        ranks = len(self.devices)
        for what, values in (("memory_formats", memory_formats), ("plans", plans)):
            if values is not None and len(values) != ranks:
                raise ShardingError(
                    said(
                        "worker.per_rank",
                        "{name} has {count} entries for {ranks} ranks",
                        name=what,
                        count=len(values),
                        ranks=ranks,
                    )
                )
        by_rank: list[dict[str, Any]] = [{} for _ in range(ranks)]
        if memory_formats is not None:
            for own, fmt in zip(by_rank, memory_formats, strict=True):
                own["options"] = asdict(replace(options, memory_format=fmt))
        if plans is not None:
            if options != RunOptions() or memory_formats is not None:
                raise GeometryError(
                    said(
                        "plan.options_of_ranks",
                        "a decode got plans= and options that the plans have decided: "
                        "give the options to plan()",
                    )
                )
            for own, plan in zip(by_rank, plans, strict=True):
                own["plan"] = plan.as_dict()
        return by_rank

    def encode(
        self,
        vae: WanVAE,
        pixels: torch.Tensor,
        *,
        axis: AxisRequest = "auto",
        normalized: bool = False,
        unit_range: bool = False,
        chunk_frames: int | Sequence[int] | None = None,
        memory_format: MemoryFormat = "auto",
        precision: Precision = "auto",
        backend: Backend = "auto",
        on_progress: OnProgress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> torch.Tensor:
        """Encode on all devices: `WanVAE.encode` with its options, the latent in host memory.

        The ranks agree to stop before a chunk. A video that fits is one chunk, which is computed to
        its end: only `chunk_frames` makes several of it.

        Raises what `decode` raises, and CheckpointError if the checkpoint had no encoder.
        """
        pixels = as_batch(pixels, WHAT["video"])
        check_pixels(pixels, vae.config)
        if vae.encoder is None:
            raise CheckpointError(NO_ENCODER)
        options = RunOptions(chunk_frames, memory_format, precision, backend=backend)
        return self._run(
            _Job(
                operation="encode",
                vae=vae,
                tensor=geometry.crop_for_encode(pixels, vae.config),
                shape=geometry.latent_shape(tuple(pixels.shape), vae.config),
                hooks=Hooks(on_progress, should_stop),
                arguments={
                    "axis": axis,
                    "normalized": normalized,
                    "unit_range": unit_range,
                    "options": asdict(options),
                },
            )
        )

    def check_wire(self) -> list[dict[str, Any]]:
        """Let the ranks check the messages between them in every memory format.

        See `sharding.proof.check_wire`. Returns one answer for each rank. Raises ShardingError,
        also for a pool of one.
        """
        if len(self.devices) < 2:
            raise ShardingError(
                said("worker.one", "one rank sends nothing: there is nothing to prove")
            )
        with self._busy():
            self._send_all("check_wire", wait_s=self.timeout_s)
            return self._wait_for_all(
                said("worker.prove", "prove their messages"), self.timeout_s + GRACE_S
            )

    @contextmanager
    def _busy(self, vae: WanVAE | None = None) -> Iterator[None]:
        """Inside, the workers run, with the weights of `vae`, and serve this thread alone.

        Any error inside ends them.
        """
        with self._lock:
            self._uses += 1
            if self._idle is not None:
                self._idle.cancel()
            try:
                self._start(vae)
                if vae is not None:
                    self._load(vae)
                yield
            except BaseException as error:
                # Ranks may be anywhere in a run: nothing that they say can be trusted.
                self._end(0.0)
                if isinstance(error, Exception):  # and not the end of this program
                    self._spawn_awaited()
                raise
            # The parent ends idle workers: only it knows that no command is on its way to them.
            self._rest(self.idle_s)

    def _rest(self, seconds: float) -> None:
        """End the workers if nobody uses them for so long."""
        if self._idle is not None:
            self._idle.cancel()
        self._idle = threading.Timer(seconds, _end_idle, (weakref.ref(self), self._uses))
        self._idle.daemon = True
        self._idle.start()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Add the time inside to `phase` of the next report's `host_ms`."""
        start = time.perf_counter()
        yield
        ms = (time.perf_counter() - start) * 1e3
        self._laps[phase] = self._laps.get(phase, 0.0) + ms

    def _run(self, job: _Job) -> torch.Tensor:
        """Run `job` in shared memory. Ranks reserve the memory of their output as they write it."""
        with ExitStack() as stack:
            with self._timed("workers"):
                job.vae.last_report, self.last_reports = None, ()
                stack.enter_context(self._busy(job.vae))
            with self._timed("hand over"):
                # In the order in which it lies, so that it is one plain copy.
                given = job.tensor.detach().resolve_neg()
                order = layout.memory_order(given)
                dense = given.permute(order)
                input_bytes, output_bytes = dense.numel() * 4, torch.Size(job.shape).numel() * 4
                input_at = output_at = _CONTROL_BYTES
                # The latent lies first, also of an encode: workers keep its place page-locked.
                if job.operation == "encode":
                    input_at += aligned(output_bytes)
                else:
                    output_at += aligned(input_bytes)
                whole = _CONTROL_BYTES + aligned(input_bytes) + aligned(output_bytes)
                buffer, fresh = self._memory(whole, input_at + aligned(input_bytes))
            try:
                with self._timed("hand over"):
                    target = view(buffer.raw, input_at, dense.shape, torch.float32)
                    giving = self._giving(job, dense, target, order)
                    if giving is None:
                        copy_on_host(dense, target)
                    else:
                        stack.enter_context(giving)
                    self._send_all(
                        job.operation,
                        job.by_rank,
                        path=str(buffer.path),
                        size=buffer.size,
                        kept=self._spares.paths,
                        input=(input_at, tuple(dense.shape)),
                        order=order,
                        output=(output_at, tuple(job.shape)),
                        fresh=fresh,
                        wait_s=self.timeout_s,
                        sent_s=time.monotonic(),
                        **({} if giving is None else {"given": 0}),
                        **job.arguments,
                    )
                    # While the workers get ready. A latent first: threads that map the pages of an
                    # image keep new ones from starting.
                    if giving is not None and job.operation == "decode":
                        while giving.step():
                            pass
                        giving = None
                    copy = self._copy_of(job, buffer, output_at, fresh)
                    if copy is not None:
                        stack.enter_context(copy)
                        if giving is None:
                            copy.prepare()
                with self._timed("run"):
                    results = Watch(
                        Watched(
                            ranks=self._ranks,
                            transport=self.transport,
                            timeout_s=self.timeout_s,
                            buffer=buffer,
                            hooks=job.hooks,
                            operation=job.operation,
                            on_written=None if copy is None else copy.follow,
                            writers=self._writers(job),
                            give=None if giving is None else partial(_step, giving, copy),
                        )
                    ).until_done()
            finally:
                buffer.unlink()
            with self._timed("collect"):
                plain = [r["report"] for r in results if r["report"] is not None]
                self.last_reports = tuple(map(DecodeReport.from_dict, plain))
                is_done = bool(plain) and self.last_reports[0].status == "done"
                # Before another thread may ask whether the memory is in use.
                if copy is not None and is_done:
                    result = copy.finish()
                else:
                    result = buffer.tensor(output_at, job.shape, torch.float32)
                    if job.operation == "encode":
                        # A latent must not keep a whole video.
                        own = host_empty(tuple(job.shape), torch.float32)
                        copy_on_host(result, own)
                        result = own
                if is_done:
                    self._spares.give(buffer)
            self._awaited_until_s = -math.inf
        report = self._whole_report(output_bytes)
        job.vae.last_report = report
        # Both agreed among the ranks, all of which are ready for the next command.
        if (refused := results[0]["refused"]) is not None:
            raise LatentError(reworded(refused["text"], refused["worded"]))
        if report is not None and report.status == "cancelled":
            raise DecodeCancelled(report.error or "cancelled")
        return result

    def _giving(
        self, job: _Job, dense: torch.Tensor, target: torch.Tensor, order: tuple[int, ...]
    ) -> Giving | None:
        """What copies the input, `dense` in memory's `order`, while the workers run; None where all
        is copied before: another dtype, another device, and a video whose frames lie apart."""
        plain = (dense.device.type, dense.dtype) == ("cpu", torch.float32)
        if not plain or (job.operation == "encode" and not frames_first(order)):
            return None
        if job.operation == "encode" and order[0] == 2:
            dense, target = dense.unsqueeze(0), target.unsqueeze(0)

        def tell(parts: int) -> None:
            for rank in self._ranks:
                try_send(rank.pipe, ("given", parts))

        return Giving(dense, target, tell)

    def _writers(self, job: _Job) -> list[int]:
        """The ranks that write a part of the image of `job`: not those without rows."""
        ranks = len(self.devices)
        if job.arguments.get("gather") != "shared" or ranks == 1:
            return [0]
        height, width = job.tensor.shape[3:5]
        return list(range(plan_shards(height, width, ranks, job.arguments["axis"]).active))

    def _copy_of(
        self, job: _Job, buffer: SharedBuffer, output_at: int, fresh: bool
    ) -> FollowingCopy | None:
        """The copy of the image or of the latent that `job` writes; None for pixels, which stay in
        shared memory, and where host memory has no room for both."""
        is_latent = job.operation == "encode"
        if not is_latent and job.arguments.get("form") != "image":
            return None
        written, free = buffer.tensor(output_at, job.shape, torch.float32), host_free_bytes()
        if free is not None and written.numel() * 4 * (2 if fresh else 1) >= free:
            return None
        try:
            # A latent is written at once, at the end: all of its copy's memory can be made ready.
            return FollowingCopy(written, written.shape[1]) if is_latent else FollowingCopy(written)
        except DecodeMemoryError:
            return None

    def _whole_report(self, output_bytes: int) -> DecodeReport | None:
        """The report of rank 0, with the output that all ranks share; None if no run began.

        `host_ms`: the phases of this process since the last report, and as "rank: ..." those of
        rank 0 within "run". "workers: ..." are those of getting new workers ready.
        """
        laps, self._laps = self._laps, {}
        if not self.last_reports:
            return None
        report = self.last_reports[0]
        of_rank = {f"rank: {phase}": ms for phase, ms in report.host_ms.items()}
        warnings = report.warnings
        if len(self.devices) == 1:
            warnings = (*warnings, ONE_DEVICE)
        memory = replace(report.memory, output_bytes=output_bytes)
        return replace(report, memory=memory, warnings=warnings, host_ms={**laps, **of_rank})

    def _memory(self, size: int, reserved: int) -> tuple[SharedBuffer, bool]:
        """Shared memory for a run, and whether it is fresh: see `Spares`."""
        spare = self._spares.take(size)
        if spare is None:
            return SharedBuffer.create(size, self.shared_folders, reserved), True
        spare.raw[:_CONTROL_BYTES] = 0
        return spare, False

    # -- workers --------------------------------------------------------------------------------

    def _start(self, vae: WanVAE | None) -> None:
        """Make sure that all workers run and have joined. If one is gone, all are replaced.

        New ones are given the weights of `vae` while they join one another.
        """
        running = self._is_running()
        # NCCL takes its time-out when ranks join; Gloo with each message.
        changed = self.transport == "nccl" and self._started_timeout_s != self.timeout_s
        if self._joined and running and not changed:
            return
        if self._joined or not running:
            self._spawn()
        self._started_timeout_s = self.timeout_s
        folder = self._folder_to_meet()
        on_cpu = sum(d.type == "cpu" for d in self.devices) or 1
        self._joined = True
        for rank in self._ranks:
            settle(
                rank,
                WorkerSettings(
                    rank=rank.rank,
                    world_size=len(self.devices),
                    device=str(rank.device),
                    transport=self.transport,
                    rendezvous=str(folder / "rendezvous"),
                    start_s=max(self.timeout_s, self.start_timeout_s),
                    wait_s=self.timeout_s,
                    threads=max(1, torch.get_num_threads() // on_cpu),
                    has_nvidia_driver=rank.device.type == "cuda" and torch.version.cuda is not None,
                ),
            )
        settled_s = time.monotonic()
        until_s = settled_s + self.start_timeout_s
        start = said("worker.start", "start")
        imported_s = max(self._wait_for_all(start, self.start_timeout_s, until_s))
        with ExitStack() as stack:
            loading = None if vae is None else stack.enter_context(self._given_weights(vae))
            joined = self._wait_for_all(start, self.start_timeout_s, until_s)
            self._laps["workers: import"] = (imported_s - self._spawned_s) * 1e3
            self._laps["workers: join"] = (max(joined) - max(imported_s, settled_s)) * 1e3
            if loading is not None:
                with self._timed("workers: weights"):  # what is left of it
                    self._until_loaded(loading)

    def _folder_to_meet(self) -> Path:
        """A new folder for the file through which the workers find one another."""
        try:
            folder = Path(tempfile.mkdtemp(prefix="wan_vae_ranks_"))
        except OSError as error:
            raise ShardingError(
                said(
                    "worker.no_meeting",
                    "no folder can be made where the ranks meet ({error}): free space in the "
                    "temporary folder, or set TMPDIR to another one",
                    error=error,
                )
            ) from error
        self._remove_folder = weakref.finalize(self, _remove, folder, os.getpid())
        return folder

    def _is_running(self) -> bool:
        """Whether there are workers, and none is gone."""
        return bool(self._ranks) and all(r.process.poll() is None for r in self._ranks)

    def _spawn(self) -> None:
        """Start new processes in place of all that there were: all, or none."""
        self._end(0.0)
        self._spawned_s = time.monotonic()
        try:
            for i, device in enumerate(self.devices):
                self._ranks.append(spawn(i, device))
        except ShardingError:
            self._end(0.0)
            raise

    def _load(self, vae: WanVAE) -> None:
        """Give the weights to the workers, unless they have them."""
        if not self._has(vae):
            self._loaded = None
            self._planned.clear()
            with self._timed("workers: weights"), self._given_weights(vae) as loading:
                self._until_loaded(loading)

    @contextmanager
    def _given_weights(self, vae: WanVAE) -> Iterator[_Loaded]:
        """Inside, the workers may read the weights from shared memory, and were told to."""
        state = vae.model.state_dict()
        loading = _Loaded(vae, state)
        table, offset = [], 0
        for name, value in state.items():
            table.append((name, offset, tuple(value.shape), dtype_name(value.dtype)))
            offset += aligned(value.numel() * value.element_size())
        buffer = SharedBuffer.create(max(offset, 1), self.shared_folders, reserved=0)
        try:
            # Threads could not write to tensors that are made in inference mode.
            with torch.inference_mode(False):
                places = {
                    name: view(buffer.raw, start, shape, state[name].dtype)
                    for name, start, shape, _ in table
                }
            copy_weights(state, places, before=lambda place: buffer.reserve(place.view(1, 1, -1)))
            self._send_all(
                "load",
                path=str(buffer.path),
                size=buffer.size,
                table=table,
                config=asdict(vae.config),
                dtype=dtype_name(vae.dtype),
                weights_found=vae.weights_found,
            )
            yield loading
        finally:
            buffer.unlink()

    def _until_loaded(self, loading: _Loaded) -> None:
        """Wait until the workers have read the weights that they were given."""
        self._wait_for_all(said("worker.load", "load the weights"), self.start_timeout_s)
        self._loaded = loading

    def _has(self, vae: WanVAE) -> bool:
        """Whether the workers have the weights of `vae` as they are now."""
        loaded = self._loaded  # which another thread may take away
        return loaded is not None and loaded.are_of(vae)

    def _send_all(
        self, command: str, by_rank: Sequence[Mapping[str, Any]] = (), **arguments: Any
    ) -> None:
        for rank in self._ranks:
            own = {**arguments, **(by_rank[rank.rank] if by_rank else {})}
            try_send(rank.pipe, (command, own))  # one that is gone is found by the watch

    def _wait_for_all(self, what: str, timeout_s: float, until_s: float | None = None) -> list[Any]:
        """One message of each worker, in rank order. Raises ShardingError.

        until_s: when `timeout_s` are over, where they do not begin now.
        """
        answers: dict[int, Any] = {}
        left = {r.pipe: r for r in self._ranks}
        until = time.monotonic() + timeout_s if until_s is None else until_s
        failures: list[Failure] = []
        while left and not failures:
            ready = ready_of(left, max(0.0, until - time.monotonic()))
            for pipe in ready:
                rank = left[pipe]
                kind, value = receive(rank)
                if kind == "pong":  # asked for in an operation that ended before it came
                    continue
                del left[pipe]
                answers[rank.rank] = value
                if kind == "error":
                    failures.append(failure_of(rank, value, self.transport))
            if not ready:
                names = listed(r.name for r in left.values())
                first = next(iter(left.values())).rank
                raise ShardingError(
                    said(
                        "worker.too_slow",
                        "{ranks} did not {what} within {seconds} s",
                        ranks=names,
                        what=what,
                        seconds=f"{timeout_s:g}",
                    ),
                    rank=first,
                )
        if failures:
            could_not = said("worker.could_not", "could not {what}", what=what)
            raise error_of(failures, self._ranks, could_not)
        return [answers[r.rank] for r in self._ranks]

    def _end(self, patience_s: float) -> None:
        """End every worker: wait `patience_s` for those told to stop, then kill."""
        until = time.monotonic() + patience_s
        for rank in self._ranks:
            try:
                rank.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.process.kill()  # not terminate: a stopped process would not hear it
                rank.process.wait()
            rank.pipe.close()
        self._ranks, self._loaded, self._joined = [], None, False
        self._spares.clear()
        self._planned.clear()
        self._laps.clear()
        if self._remove_folder is not None:
            self._remove_folder()
            self._remove_folder = None


def _remove(folder: Path, process: int) -> None:
    """Remove `folder`; a process that was forked from its owner's leaves it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _step(giving: Giving, copy: FollowingCopy | None) -> bool:
    """A step of `giving`, and after the last one memory for `copy`, whose threads would have
    hindered those of `giving`; whether there is more to do."""
    if giving.step():
        return True
    if copy is not None:
        copy.prepare()
    return False


def _end_idle(pool: weakref.ref[WorkerPool], uses: int) -> None:
    """End the workers of a pool that nobody has used since `uses`."""
    idle = pool()
    if idle is not None:
        with idle._lock:
            if idle._uses == uses:
                idle._stop()
                idle._spawn_awaited()
