"""One run of a node: our copy of the VAE, its plan, progress, cancel, and the reports.

with session(cls.hidden, vae, precision, "decode") as run:
    plan = run.plan(tuple(latent.shape), memory_format=memory_layout)
    image = run.decode(latent, plan)
return io.NodeOutput(image, ui=run.ui)
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import comfy.model_management as model_management
import comfy.utils
import torch
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image

from ..wan_vae import DecodeCancelled, DecodeReport, NotAWanVAEError, Plan, WanVAE, WanVAEError
from ..wan_vae.errors import first_line
from ..wan_vae.io.image import ImageSink
from ..wan_vae.io.latents import check_latent_shape, mismatch
from ..wan_vae.io.preview import PreviewSink
from ..wan_vae.io.sink import Sink
from ..wan_vae.options import PARTS, MemoryFormat, Operation, RunOptions
from ..wan_vae.report import SCHEMA, ChannelRecord, of_batch
from ..wan_vae.runs.engine import PROOF_BYTES, SetupRequest
from ..wan_vae.runs.run import ready
from ..wan_vae.said import said, worded
from . import inputs
from .device_memory import ComfyMemory
from .packed import COPIES, Packed
from .reports import NodeId, Reporter, summary
from .weights import has_weights, ignored


class Session:
    """One run of one node, from the choice of the VAE to the final report.

    Do not make one yourself: `session` makes it and sends its final report.
    """

    def __init__(
        self,
        node: NodeId | None,
        vae: Any,
        precision: str,
        operation: str,
        started_s: float,
        is_shared: bool = False,
    ) -> None:
        """started_s: when the node began, by `time.perf_counter`. is_shared: workers do the run."""
        self._reporter = Reporter(node)
        self.operation = operation
        self._started_s = started_s
        self._bar = comfy.utils.ProgressBar(1)
        # A preview that goes out with the next progress.
        self._frame: tuple[str, Image.Image, int] | None = None
        self.vae, self._precision = vae, precision
        self._is_shared = is_shared
        self._loads = operation in PARTS and not is_shared
        # Sentences that the final report gets beside the library's own.
        self.warnings: list[str] = []
        self.fallbacks: list[str] = []
        # Of the first latent that looks like the other kind.
        self.channels: tuple[ChannelRecord, ...] = ()
        # Those that were not looked at yet, with what the user says of them.
        self._latents: list[tuple[torch.Tensor, bool]] = []
        # What ends with the node's work.
        self.until_end = ExitStack()
        self._packed: Packed | None = None
        # Whether `packed` is of the weights as they are; None where nobody has looked.
        self._is_right: bool | None = None
        # What `plan` was asked for last.
        self._planned: tuple[Sequence[int], dict[str, Any]] | None = None
        self._memory: ComfyMemory | None = None
        self._before: DecodeReport | None = None
        # Milliseconds of the node's own phases, which the final report gets too.
        self._laps: dict[str, float] = {}
        # The final report as the panel reads it.
        self.report: dict[str, Any] = {}
        # Of the clips of a batch that are done, and how many there are; see `one_by_one` and
        # `continues`.
        self._done: list[DecodeReport] = []
        self._clips = 1
        self._laps["node: begin"] = (time.perf_counter() - started_s) * 1e3

    def enter(self, phase: str, **numbers: int) -> None:
        """Say what the run does before its first frames: `compiling`, `starting_workers`,
        `planning` (everything else), or `comfyui` (ComfyUI's own VAE does all of it).

        Only what takes longer than to say so: a message wakes the server's thread, for which this
        one waits some milliseconds.
        """
        with self.timed("messages"):
            self._reporter.send(
                {
                    "schema": SCHEMA,
                    "operation": self.operation,
                    "status": "running",
                    "phase": {"name": phase, **numbers},
                }
            )

    def begin_planning(self) -> None:
        """`enter` that phase, unless something was said before."""
        if not self._reporter.has_sent:
            self.enter("planning")

    @contextmanager
    def _packing(self) -> Iterator[None]:
        """While a copy of the weights is made: say so, and count the time apart."""
        self.begin_planning()
        self.until_end.enter_context(_uncollected())
        with self.timed("copy"):
            yield

    @property
    def packed(self) -> Packed:
        """Our copy of the VAE, made when it is first asked for. Raises what `COPIES.get` raises.

        From the third run on it is the one of the run before, and the weights are looked at when
        the host waits for the device: who uses its numbers asks `has_right_weights`.
        """
        if self._packed is None:
            with self.timed("look"):
                assumed = None
                if self.operation in PARTS and self._is_right is None:  # else a look has said no
                    assumed = COPIES.assumed(self.vae, self._precision)
                self._packed = self._found() if assumed is None else assumed
                self._before = self._packed.wan.last_report
                if assumed is None:
                    self._is_right = True
                    self._tell_of_ignored(self._packed)
        return self._packed

    def _found(self) -> Packed:
        """Our copy of the VAE as it is. Raises what `COPIES.get` raises."""
        try:
            return COPIES.get(self.vae, self._precision, self._packing, loads=self._loads)
        except NotAWanVAEError as error:
            if not has_weights(self.vae):
                raise
            raise NotAWanVAEError(
                said(
                    "vae.advice",
                    "{error}; for this one use ComfyUI's own VAE nodes",
                    error=error,
                )
            ) from error

    def _tell_of_ignored(self, packed: Packed) -> None:
        self.warnings += [*ignored(self.vae), *packed.wan.notes]

    def _look(self) -> None:
        """See whether the copy that is used is of the weights as they are, once."""
        if self._is_right is None:
            self._is_right = COPIES.is_right(self.vae, self.packed)
            if self._is_right:
                self._tell_of_ignored(self.packed)

    def has_right_weights(self) -> bool:
        """Whether `packed` is a copy of the VAE's weights as they are now. If another node has
        changed them, the next one is, and what was made or planned is to be made again."""
        with self.timed("look"):
            self._look()
        if not self._is_right:
            self._packed, self._memory = None, None
        return bool(self._is_right)

    def not_a_wan_vae(self) -> str | None:
        """Why the VAE is none of Wan's; None if it is one. Raises what `packed` raises otherwise,
        also for a VAE without weights, which nobody can use."""
        try:
            self.packed  # noqa: B018
        except NotAWanVAEError as error:
            if not isinstance(error.__cause__, NotAWanVAEError):
                raise
            return error.__cause__.finding
        return None

    def speed(self, frames: int) -> dict[str, float]:
        """What a report says of the time since the node began, in which it made `frames`."""
        seconds = time.perf_counter() - self._started_s
        return {"duration_ms": seconds * 1e3, "frames_per_s": frames / seconds}

    @property
    def wan(self) -> WanVAE:
        return self.packed.wan

    @property
    def hooks(self) -> dict[str, Any]:
        """The keyword arguments on_progress and should_stop of the library."""
        return {
            "on_progress": self._on_progress,
            "should_stop": model_management.processing_interrupted,
        }

    @property
    def ui(self) -> dict[str, list[Any]]:
        """What the node shows. The report itself comes by the route."""
        return {"wan_vae": [summary(self.report)]}

    def one_by_one(self, latent: torch.Tensor) -> Iterator[torch.Tensor]:
        """The clips of a batch, each [1, C, T, H, W], whose runs make one report together."""
        clips = latent.split(1)
        self._clips = len(clips)
        for clip in clips:
            yield clip
            report = self.wan.last_report
            assert report is not None  # the run that the caller made of this clip
            self._done.append(report)

    def continues(self, done: Sequence[DecodeReport]) -> None:
        """The run makes one report with those of clips that were `done` before it."""
        self._done, self._clips = list(done), len(done) + 1

    @property
    def memory(self) -> ComfyMemory:
        """The device's memory, which ComfyUI manages; for the library."""
        if self._memory is None:
            self._memory = self.packed.memory
        return self._memory

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time inside to `phase` of the node in the report's `host_ms`, without that of
        phases within."""
        start, name, before = time.perf_counter(), f"node: {phase}", sum(self._laps.values())
        yield
        inner = sum(self._laps.values()) - before
        own = (time.perf_counter() - start) * 1e3 - inner
        self._laps[name] = self._laps.get(name, 0.0) + own

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Add the time inside that is in no phase of the library's report, which is made there."""
        with self.timed("set up"):
            yield
        if (report := self.wan.last_report) is not None:
            self._laps["node: set up"] -= sum(report.host_ms.values())

    def plan(
        self,
        latent_shape: Sequence[int],
        *,
        operation: Operation = "decode",
        memory_format: MemoryFormat = "auto",
        chunk_frames: int = 0,
        whole_frames: bool = False,
        tile: Sequence[int] | None = None,
    ) -> Plan:
        """Make the plan of a run, and ask ComfyUI to free exactly what must be free for it.

        chunk_frames: 0 lets the plan decide. tile: shape of a latent; the run takes no more memory
        at a time than that one would, as long as this does not need strips. The weights are on the
        device afterwards. The run executes this plan, or makes a smaller one if ComfyUI could not
        free that much.
        """
        self._planned = (
            latent_shape,
            {
                "operation": operation,
                "memory_format": memory_format,
                "chunk_frames": chunk_frames,
                "whole_frames": whole_frames,
                "tile": tile,
            },
        )
        # Weights first: the device that holds them decides which kernels run.
        options = RunOptions(memory_format=memory_format)
        request = SetupRequest(operation, tuple(latent_shape), options)
        with self.timed("plan"):
            proves = self.wan.engine.may_prove(request, self.packed.device)
            is_ready = self.packed.is_ready
        if proves:
            self.enter("compiling")
        elif not is_ready or latent_shape[2] > 1:
            self.begin_planning()
        if proves or not is_ready:
            with self.timed("load"):
                self.packed.load(PROOF_BYTES if proves else 0)
        if proves:
            self.until_end.enter_context(_uncollected())
            with self.timed("kernels"):
                ready(self.wan.engine, request, self.memory)
            self.enter("planning")

        def planned(shape: Sequence[int], frames: int | None, free_bytes: float = math.inf) -> Plan:
            return self.wan.plan(
                shape,
                operation=operation,
                chunk_frames=frames,
                memory_format=memory_format,
                free_bytes=free_bytes,
                whole_frames=whole_frames,
            )

        with self.timed("plan"):
            plan = planned(latent_shape, chunk_frames or None)
            if tile is not None:
                bound = planned(tile, None).planned_bytes
                if plan.planned_bytes > bound:
                    smaller = planned(latent_shape, None, bound)
                    # Strips compute rows twice: they are for memory that is not there.
                    plan = planned(latent_shape, 1) if smaller.strips else smaller
        with self.timed("room"):
            if not self.memory.has(plan.needed_bytes):
                self.packed.load(plan.needed_bytes)
        return plan

    def look_at(self, latent: torch.Tensor, normalized: bool) -> None:
        """Say in the report if `latent` looks like the kind that `normalized` does not say.

        Its numbers are looked at when the host waits for the device. Raises LatentError for a
        latent that is none of this VAE.
        """
        check_latent_shape(latent, self.wan.config)
        self._latents.append((latent, normalized))

    def _look_at_latents(self) -> None:
        latents, self._latents = self._latents, []
        for latent, normalized in latents:
            found = mismatch(latent, self.wan.config, normalized)
            if found is not None and found.sentence not in self.warnings:
                self.warnings.append(found.sentence)
                self.channels = self.channels or found.channels

    def decode(self, latent: torch.Tensor, plan: Plan, *, normalized: bool = False) -> torch.Tensor:
        """The frames [B, T, H, W, 3] in [0, 1] of `latent` by `plan`, where ComfyUI wants them."""
        image = self._decoded(latent, plan, normalized)
        if not self.has_right_weights():
            del image  # two would take twice the memory
            image = self._decoded(latent, self._plan_again(), normalized)
        return image

    def _decoded(self, latent: torch.Tensor, plan: Plan, normalized: bool) -> torch.Tensor:
        vae = self.vae
        with self.timed("output"):
            sink = ImageSink.allocate(
                plan.latent_shape, self.wan.config, vae.output_device, inputs.output_dtype(vae)
            )
        self._decode_into(sink, latent, plan, normalized)
        return sink.image

    def _plan_again(self) -> Plan:
        """The plan of before, for another copy of the weights."""
        assert self._planned is not None  # the one of before was made by `plan`
        shape, others = self._planned
        return self.plan(shape, **others)

    def decode_into(
        self, sink: Sink, latent: torch.Tensor, plan: Plan, *, normalized: bool = False
    ) -> None:
        """Decode `latent` by `plan` into `sink`, which is closed, or aborted after an error.

        ComfyUI shows frames as it shows a sampler's.
        """
        # Before: what a sink has written cannot be taken back.
        if not self.has_right_weights():
            plan = self._plan_again()
        self._decode_into(sink, latent, plan, normalized)

    def _decode_into(self, sink: Sink, latent: torch.Tensor, plan: Plan, normalized: bool) -> None:
        frames, height = plan.pixel_shape[2:4]
        # One image is no sooner there as a preview than as the result.
        if frames > 1 and args.preview_method != LatentPreviewMethod.NoPreviews:
            sink = PreviewSink(sink, self._preview, height=height, most=args.preview_size)
        with self._running():
            self.wan.decode(
                latent,
                normalized=normalized,
                sink=sink,
                plan=plan,
                memory=self.memory,
                **self.hooks,
            )
        if self._frame is not None:  # the sink had it at its end, behind the last progress
            self._move_bar(self._bar.current, self._bar.total)

    def _preview(self, frame: torch.Tensor) -> None:
        # A sink shows a frame before the run says that it is done. ComfyUI sends the bar's place
        # with each preview, and nothing else for 0.1 s: by itself, the bar would be one pass late.
        self._frame = "JPEG", Image.fromarray(frame.numpy()), args.preview_size

    def _move_bar(self, done: int, total: int) -> None:
        """Move ComfyUI's own bar, and show the frame that waits for that."""
        frame, self._frame = self._frame, None
        # After an interrupt the bar would raise; `should_stop` ends the run in a moment instead.
        if not model_management.processing_interrupted():
            self._bar.update_absolute(done, total, frame)

    def encode(
        self,
        video: torch.Tensor,
        plan: Plan,
        unit_range: bool = True,
        *,
        normalized: bool = False,
    ) -> torch.Tensor:
        """The latent of `video` [B, 3, T, H, W] by `plan`, where ComfyUI wants it.

        unit_range: `video` is in [0, 1], as an IMAGE, and not in [-1, 1].
        """
        latent = self._encoded(video, plan, unit_range, normalized)
        if not self.has_right_weights():
            latent = self._encoded(video, self._plan_again(), unit_range, normalized)
        return latent

    def _encoded(
        self, video: torch.Tensor, plan: Plan, unit_range: bool, normalized: bool
    ) -> torch.Tensor:
        with self._running():
            latent = self.wan.encode(
                video,
                plan=plan,
                unit_range=unit_range,
                normalized=normalized,
                memory=self.memory,
                **self.hooks,
            )
        assert latent is not None  # one process always gets the result
        with self.timed("output"):
            return self.as_output(latent)

    def as_output(self, result: torch.Tensor) -> torch.Tensor:
        """`result` on the device and in the dtype that ComfyUI wants of this VAE."""
        return result.to(device=self.vae.output_device, dtype=inputs.output_dtype(self.vae))

    def _on_progress(self, done: int, total: int, report: DecodeReport) -> None:
        # What is left to do for the host is to wait: for workers, or for the last pixels.
        if self._is_shared or done == total:
            self._look()
            self._look_at_latents()
        report = self._of_batch(report)
        if self._reporter.due():
            self._reporter.send(report.as_dict())
        # Of one image the end is the only progress, which ComfyUI shows by itself.
        if report.total_frames > 1:
            self._move_bar(report.done_frames, report.total_frames)

    def finish(self) -> None:
        """Send the library's report of the run that is done, or `report` if the node has set it,
        with what ComfyUI's side has to say."""
        assert self._packed is None or self._is_right  # who made something has asked
        with self.timed("latent"):
            self._look_at_latents()
        if self.report:
            self.report = {**self._notes(), **self.report}
        elif (last := self.wan.last_report) is not None:
            self.report = self.with_notes(last).as_dict()
        self._reporter.send(self.report)

    def finish_early(self, status: str, error: str) -> None:
        """Send the report of a run that ended early: the library's, or else only how it ended."""
        if self._packed is not None:
            self._look_at_latents()
        report = None if self._packed is None else self._packed.wan.last_report
        if report is not None and report is not self._before:
            self.report = self.with_notes(replace(report, status=status, error=error)).as_dict()
        else:
            self.report = {
                **self._notes(error),
                "schema": SCHEMA,
                "operation": self.operation,
                "status": status,
                "error": str.__str__(error),
            }
        self._reporter.send(self.report)

    def _notes(self, error: str | None = None) -> dict[str, Any]:
        """What a report that is not the library's says beside its numbers, as plain values."""
        return {
            "warnings": list(map(str.__str__, self.warnings)),
            "fallbacks": list(map(str.__str__, self.fallbacks)),
            "worded": worded((error, *self.warnings, *self.fallbacks)),
        }

    def _of_batch(self, report: DecodeReport) -> DecodeReport:
        """`report` of the clip at work (or of the last one) with those that are done."""
        if self._clips == 1:
            return report
        done = [one for one in self._done if one is not report]
        return of_batch([*done, report], self._clips)

    def with_notes(self, report: DecodeReport) -> DecodeReport:
        """`report` of the whole batch, with what ComfyUI's side has to say."""
        report = self._of_batch(report)
        return replace(
            report,
            warnings=(*report.warnings, *self.warnings),
            fallbacks=(*report.fallbacks, *self.fallbacks),
            host_ms=self._all_phases(report.host_ms),
            latent_channels=self.channels,
        )

    def _all_phases(self, of_library: dict[str, float]) -> dict[str, float]:
        """Milliseconds of the host by phase, the node's and the library's; and what of the node's
        time is in none of them."""
        phases = {**self._laps, **of_library}
        # Those of rank 0 are within the run, and those of new workers within the node's plan.
        within = ("rank: ", "workers: ")
        known = sum(ms for phase, ms in phases.items() if not phase.startswith(within))
        rest = (time.perf_counter() - self._started_s) * 1e3 - known
        return {**phases, "node: rest": max(0.0, rest)}


@contextmanager
def session(
    hidden: Any,
    vae: Any,
    precision: str,
    operation: str,
    through: str | None = None,
    *,
    is_shared: bool = False,
) -> Iterator[Session]:
    """Run a node's work with progress, cancel and reports.

    hidden: what ComfyUI gives the node as hidden inputs. through: the id of the node that
    made `vae` or the video, where the node is not one of ours. is_shared: workers will do the work,
    on devices of theirs. A cancel raises ComfyUI's own exception. Every other error is raised
    again, after its report was sent: otherwise the panel would still show the previous run.
    """
    started_s = time.perf_counter()
    run = Session(NodeId.of(hidden, through), vae, precision, operation, started_s, is_shared)
    try:
        with run.until_end, torch.inference_mode(False), torch.no_grad():
            yield run
    except DecodeCancelled as error:
        run.finish_early("cancelled", str(error))
        model_management.throw_exception_if_processing_interrupted()
        raise model_management.InterruptProcessingException() from None
    except model_management.InterruptProcessingException:
        run.finish_early("cancelled", "cancelled")
        raise
    except Exception as error:
        run.finish_early("failed", _one_line(error))
        raise
    run.finish()


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected inside, where thousands of objects are made that stay.

    Each 700 of them bring on a collection, and some of these go through all of the half a million
    objects of ComfyUI: 0.3 to 0.5 s of a process's first run (H200), in which the device waits.
    ComfyUI collects anyway when a prompt is done.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _one_line(error: Exception) -> str:
    """Our own errors are one readable line; others are named, and may be many lines long."""
    if isinstance(error, WanVAEError):
        return str(error)
    return (
        f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else first_line(error)
    )
