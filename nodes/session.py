"""One run of a node: our copy of the VAE, its plan, progress, cancel, and the reports.

with session(cls.hidden, vae, precision, "decode") as run:
    plan = run.plan(tuple(latent.shape), memory_format=memory_layout)
    image = run.decode(latent, plan)
return io.NodeOutput(image, ui=run.ui)
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import comfy.model_management as model_management
import comfy.utils
import torch

from ..wan_vae import DecodeCancelled, DecodeReport, Plan, WanVAE, WanVAEError
from ..wan_vae.errors import first_line
from ..wan_vae.io.image import ImageSink
from ..wan_vae.io.latents import statistics_hint
from ..wan_vae.io.sink import Sink
from ..wan_vae.options import MemoryFormat, Operation, RunOptions
from ..wan_vae.report import SCHEMA
from ..wan_vae.runs.engine import PROOF_BYTES, SetupRequest
from . import inputs
from .device_memory import ComfyMemory
from .packed import COPIES, Packed
from .reports import NodeId, Reporter
from .weights import ignored


class Session:
    """One run of one node, from the choice of the VAE to the final report.

    Do not make one yourself: `session` makes it and sends its final report.
    """

    def __init__(self, node: NodeId | None, vae: Any, precision: str) -> None:
        self._reporter = Reporter(node)
        self._bar = comfy.utils.ProgressBar(1)
        self.vae, self._precision = vae, precision
        # Sentences that the final report gets beside the library's own.
        self.warnings: list[str] = []
        self.fallbacks: list[str] = []
        self._packed: Packed | None = None
        self._before: DecodeReport | None = None
        # Milliseconds of the node's own phases, which the final report gets too.
        self._laps: dict[str, float] = {}
        # The final report as the panel reads it.
        self.report: dict[str, Any] = {}

    @property
    def packed(self) -> Packed:
        """Our copy of the VAE, made when it is first asked for. Raises what `COPIES.get` raises."""
        if self._packed is None:
            with self.timed("copy"):
                self._packed = COPIES.get(self.vae, self._precision)
                self._before = self._packed.wan.last_report
                self.warnings += ignored(self.vae)
        return self._packed

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
        """What the node shows: the report, for the panel."""
        return {"wan_vae": [self.report]}

    @property
    def memory(self) -> ComfyMemory:
        """The device's memory, which ComfyUI manages; for the library."""
        return self.packed.memory

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time inside to `phase` of the node in the report's `host_ms`."""
        start, name = time.perf_counter(), f"node: {phase}"
        yield
        self._laps[name] = self._laps.get(name, 0.0) + (time.perf_counter() - start) * 1e3

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
        # Weights first: the device that holds them decides which kernels run.
        request = SetupRequest(operation, tuple(latent_shape), RunOptions())
        proves = self.wan.engine.may_prove(request, self.packed.device)
        if proves or not self.packed.is_ready:
            self.packed.load(PROOF_BYTES if proves else 0)

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
            self.packed.load(plan.needed_bytes)
        return plan

    def look_at(self, latent: torch.Tensor, normalized: bool) -> None:
        """Say in the report if `latent` looks like the kind that `normalized` does not say."""
        hint = statistics_hint(latent, self.wan.config, normalized)
        if hint is not None and hint not in self.warnings:
            self.warnings.append(hint)

    def decode(self, latent: torch.Tensor, plan: Plan, *, normalized: bool = False) -> torch.Tensor:
        """The frames [B, T, H, W, 3] in [0, 1] of `latent` by `plan`, where ComfyUI wants them."""
        vae = self.vae
        sink = ImageSink.allocate(
            plan.latent_shape, self.wan.config, vae.output_device, inputs.output_dtype(vae)
        )
        self.decode_into(sink, latent, plan, normalized=normalized)
        return sink.image

    def decode_into(
        self, sink: Sink, latent: torch.Tensor, plan: Plan, *, normalized: bool = False
    ) -> None:
        """Decode `latent` by `plan` into `sink`, which is closed, or aborted after an error."""
        self.wan.decode(
            latent,
            normalized=normalized,
            sink=sink,
            plan=plan,
            memory=self.memory,
            **self.hooks,
        )

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
        latent = self.wan.encode(
            video,
            plan=plan,
            unit_range=unit_range,
            normalized=normalized,
            memory=self.memory,
            **self.hooks,
        )
        assert latent is not None  # one process always gets the result
        return self.as_output(latent)

    def as_output(self, result: torch.Tensor) -> torch.Tensor:
        """`result` on the device and in the dtype that ComfyUI wants of this VAE."""
        return result.to(device=self.vae.output_device, dtype=inputs.output_dtype(self.vae))

    def _on_progress(self, done: int, total: int, report: DecodeReport) -> None:
        if self._reporter.due():
            self._reporter.send(report.as_dict())
        # After an interrupt the bar would raise; `should_stop` ends the run in a moment instead.
        if not model_management.processing_interrupted():
            self._bar.update_absolute(done, total)

    def finish(self) -> None:
        """Send the library's report of the run that is done, or `report` if the node has set it."""
        last = self.wan.last_report
        if not self.report and last is not None:
            self.report = self._with_notes(last).as_dict()
        self._reporter.finish(self.report)

    def finish_early(self, operation: str, status: str, error: str) -> None:
        """Send the report of a run that ended early: the library's, or else only how it ended."""
        report = None if self._packed is None else self._packed.wan.last_report
        if report is not None and report is not self._before:
            self.report = self._with_notes(replace(report, status=status, error=error)).as_dict()
        else:
            self.report = {
                "schema": SCHEMA,
                "operation": operation,
                "status": status,
                "error": error,
            }
        self._reporter.finish(self.report)

    def _with_notes(self, report: DecodeReport) -> DecodeReport:
        return replace(
            report,
            warnings=(*report.warnings, *self.warnings),
            fallbacks=(*report.fallbacks, *self.fallbacks),
            host_ms={**self._laps, **report.host_ms},
        )


@contextmanager
def session(
    hidden: Any, vae: Any, precision: str, operation: str, through: str | None = None
) -> Iterator[Session]:
    """Run a node's work with progress, cancel and reports.

    hidden: what ComfyUI gives the node as hidden inputs. through: the id of the WanVAEAccelerate
    node that made `vae`, where the node is not one of ours. A cancel raises ComfyUI's own
    exception. Every other error is raised again, after its report was sent: otherwise the panel
    would still show the previous run.
    """
    run = Session(NodeId.of(hidden, through), vae, precision)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield run
    except DecodeCancelled as error:
        run.finish_early(operation, "cancelled", str(error))
        model_management.throw_exception_if_processing_interrupted()
        raise model_management.InterruptProcessingException() from None
    except model_management.InterruptProcessingException:
        run.finish_early(operation, "cancelled", "cancelled")
        raise
    except Exception as error:
        run.finish_early(operation, "failed", _one_line(error))
        raise
    run.finish()


def _one_line(error: Exception) -> str:
    """Our own errors are one readable line; others are named, and may be many lines long."""
    if isinstance(error, WanVAEError):
        return str(error)
    return (
        f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else first_line(error)
    )
