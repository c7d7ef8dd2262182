"""A worker process: one rank on one device, told what to do by its parent's pipe alone.

See `begin` for how the process starts and ends.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import WanVAEConfig
from ..device import is_out_of_memory
from ..errors import (
    DecodeCancelled,
    DecodeMemoryError,
    LatentError,
    ShardingError,
    WanVAEError,
    first_line,
)
from ..hooks import Hooks
from ..io import pages
from ..io.image import HostCopier, ImageSink
from ..io.sink import NullSink, Sink, TensorSink
from ..kernels import registry
from ..kernels.device import Device
from ..network.model import build_model
from ..options import AxisRequest, Collect, Operation, RunOptions
from ..pipeline import WanVAE
from ..planning.plan import Plan
from ..report import DecodeReport
from ..runs.decode import DecodeRequest
from ..runs.encode import EncodeRequest
from ..said import said, worded
from ..sharding.context import SINGLE, Agreed, ShardContext
from ..sharding.plan import plan_shards
from ..sharding.proof import check_wire
from ..sharding.transport import Wire
from .devices import make_current
from .giving import Given
from .joining import Joined, WorkerSettings
from .pipe import Commands, PipeEnd
from .shared import SharedBuffer, aligned, view

# Memory that is page-locked is taken from everybody else: as much as a latent takes (19 MB one of
# 81 frames of 720p).
_MOST_LOCKED_BYTES = 64 << 20


@dataclass(frozen=True)
class EncodeJob:
    """One encode: where input and output lie in shared memory, and how it is done.

    input, output: offset in bytes and shape, of float32 tensors. order: the dimensions of the input
    in the order in which it lies. fresh: the memory was not used by a run before. kept: paths of
    memory that may be used again. sent_s: when the parent sent this, by `time.monotonic`.
    """

    path: str
    size: int
    kept: list[str]
    input: tuple[int, tuple[int, ...]]
    order: tuple[int, ...]
    output: tuple[int, tuple[int, ...]]
    fresh: bool
    sent_s: float
    axis: AxisRequest
    wait_s: float
    normalized: bool
    options: dict[str, Any]


def _place(tensor: tuple[int, tuple[int, ...]]) -> tuple[int, int]:
    """Offset and bytes, in whole pages, of a job's `input` or `output`."""
    offset, shape = tensor
    return offset, aligned(prod(shape) * 4)


@dataclass(frozen=True)
class DecodeJob(EncodeJob):
    """One decode. `plan`: of this rank, as plain values; None has the ranks plan for themselves."""

    form: Literal["pixels", "image"]
    gather: Collect
    plan: dict[str, Any] | None = None


def serve(connection: PipeEnd[Any, Any], commands: Commands) -> None:
    """Serve until told to stop. commands: the first ones are those of `begin`."""
    _, plain = commands.get()
    settings = WorkerSettings(**plain)
    pipe = _Sender(connection)
    threading.Thread(
        target=_listen, args=(pipe, commands, Path(settings.rendezvous)), daemon=True
    ).start()
    worker = _Worker(settings, pipe)
    try:
        worker.take_device()
        early = _until_joined(worker, commands)
    except (RuntimeError, WanVAEError) as error:
        pipe.send("error", _describe(error, settings))
        return
    pipe.send("ready", time.monotonic())
    for answer in early:
        pipe.send(*answer)
    while True:
        command, arguments = commands.get()
        if command == "stop":
            break
        pipe.send(*_answer(worker, command, arguments))
        worker.forget()
    worker.close()


def _until_joined(worker: _Worker, commands: Commands) -> list[tuple[str, Any]]:
    """Wait until this rank has joined the others, and get ready meanwhile.

    Weights are read too if they come so early. Returns what the parent is to be told of them, after
    "ready". Raises the error with which joining ended.
    """
    worker.import_kernels()
    early: list[tuple[str, Any]] = []
    command, value = commands.get()
    while command != "joined":
        early.append(_answer(worker, command, value))
        command, value = commands.get()
    if value is None:
        raise SystemExit(1)  # the thread has printed why
    joined: Joined = value
    if joined.error is not None:
        raise joined.error
    return early


def _answer(worker: _Worker, command: str, arguments: Mapping[str, Any]) -> tuple[str, Any]:
    """Do what the parent asks for; returns what it is told."""
    try:
        return "done", worker.commands[command](**arguments)
    except (WanVAEError, RuntimeError, MemoryError, OSError, TypeError, ValueError) as error:
        return "error", _describe(error, worker.settings)


class _Sender:
    """This end of the pipe; two threads send, one at a time."""

    def __init__(self, connection: PipeEnd[Any, Any]):
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, kind: str, value: object) -> None:
        with self._lock:
            self._connection.send((kind, value))

    def receive(self) -> tuple[str, Any]:
        message: tuple[str, Any] = self._connection.recv()
        return message


def _listen(pipe: _Sender, commands: Commands, rendezvous: Path) -> None:
    """Read commands and answer "ping", whatever the main thread is busy with.

    When the parent is gone, end at once, also out of a wait for another rank; the folder of the
    file where the ranks met goes too, which a parent that was killed has left.
    """
    with suppress(EOFError, OSError):
        _receive_all(pipe, commands)
    with suppress(OSError):  # the last one removes it
        rendezvous.unlink(missing_ok=True)
        rendezvous.parent.rmdir()
    os._exit(1)


def _receive_all(pipe: _Sender, commands: Commands) -> None:
    """See `_listen`. Raises EOFError or OSError when the parent is gone."""
    given = Given()
    while True:
        command, value = pipe.receive()
        if command == "ping":
            pipe.send("pong", None)
        elif command == "given":
            given.give(value)
        else:
            if "given" in value:  # here, in the order of the pipe: a run may have been left
                given = value["given"] = Given(value["given"])
            commands.put((command, value))


def _describe(error: BaseException, settings: WorkerSettings) -> dict[str, Any]:
    """An error as plain values: kind, one line of text with its words, the rank at fault."""
    text = first_line(error)
    kind, rank = type(error).__name__, getattr(error, "rank", None)
    if is_out_of_memory(error):
        kind = DecodeMemoryError.__name__
    if isinstance(error, DecodeMemoryError) or kind == DecodeMemoryError.__name__:
        rank = settings.rank
    return {"kind": kind, "text": text, "rank": rank, "worded": worded([text])}


class Laps:
    """Phases of a command before its run: `ms` begins with the time that it was on its way."""

    def __init__(self, sent_s: float) -> None:
        self.ms = {"wake": (time.monotonic() - sent_s) * 1e3}
        self._last_s = time.monotonic()

    def add(self, phase: str, less_ms: float = 0.0) -> None:
        """Add the time since the last phase, without `less_ms` of it."""
        now_s = time.monotonic()
        self.ms[phase] = (now_s - self._last_s) * 1e3 - less_ms
        self._last_s = now_s


class _Worker:
    """One rank: its process group, its VAE, and the commands that the parent may name."""

    def __init__(self, settings: WorkerSettings, pipe: _Sender, cudart: pages.Cudart | None = None):
        """cudart: what page-locks memory in place of CUDA's runtime."""
        self.settings, self.pipe, self._cudart = settings, pipe, cudart
        self.device = torch.device(settings.device)
        self._vae: WanVAE | None = None
        self._agreed = Agreed()
        # The memory of the last runs by its path; the next one may be given it again.
        self._mapped: dict[str, SharedBuffer] = {}
        self._kept: set[str] = set()
        # The memory of the last decode, and where in it the latent lies.
        self._decoded: tuple[SharedBuffer, tuple[int, int]] | None = None

        self.commands: dict[str, Callable[..., object]] = {
            "load": self.on_load,
            "plan": self.on_plan,
            "decode": self.on_decode,
            "encode": self.on_encode,
            "check_wire": self.on_check_wire,
        }

    def take_device(self) -> None:
        """Make the device current, and decide how many threads compute beside it."""
        if self.device.type == "cpu":
            torch.set_num_threads(self.settings.threads)
        else:
            make_current(self.device)
        if self.device.type == "cuda":
            # Here the host launches, and copies in threads of ours. For any tensor of more than
            # 32768 numbers PyTorch would wake a thread for each core, in every worker.
            torch.set_num_threads(1)

    def import_kernels(self) -> None:
        """Import the kernels that a plan will look at on this device."""
        registry.families_of("auto", Device.chosen_for(self.device))

    def close(self) -> None:
        """Leave the other ranks, and let go of shared memory."""
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        self._kept.clear()
        self._drop_unkept()

    def forget(self) -> None:
        """Let go of memory that no run will use again, and page-lock the latent's place in memory
        that one may: not in a run, as it takes milliseconds."""
        self._drop_unkept()
        decoded, self._decoded = self._decoded, None
        if decoded is not None:
            buffer, place = decoded
            if place[1] <= _MOST_LOCKED_BYTES:
                buffer.lock(*place, self.device, self._cudart)

    def _drop_unkept(self) -> None:
        for path in self._mapped.keys() - self._kept:
            self._mapped.pop(path).unlock()

    def on_load(
        self,
        path: str,
        size: int,
        table: list[tuple[str, int, tuple[int, ...], str]],
        config: dict[str, Any],
        dtype: str,
        weights_found: dict[str, dict[str, int]],
    ) -> None:
        """Build the VAE from the weights in shared memory; nothing keeps the memory afterwards."""
        raw = SharedBuffer.open(path, size).raw
        state = {
            name: view(raw, offset, shape, getattr(torch, kind))
            for name, offset, shape, kind in table
        }
        model = build_model(WanVAEConfig(**config), state, self.device, getattr(torch, dtype))
        self._vae = WanVAE(model, weights_found)

    @property
    def vae(self) -> WanVAE:
        if self._vae is None:
            raise ShardingError(
                said("worker.no_weights", "a worker got a command before the weights")
            )
        return self._vae

    def _context(self, axis: AxisRequest, wait_s: float) -> ShardContext:
        settings = self.settings
        if settings.world_size == 1:
            return SINGLE
        return ShardContext(
            settings.rank,
            settings.world_size,
            axis,
            timeout_s=wait_s,
            same_input=True,
            agreed=self._agreed,
        )

    def _hooks(self, raw: torch.Tensor) -> Hooks:
        """Progress to the parent, and the wish to stop from the first byte of the shared memory."""

        def on_progress(done: int, total: int, report: DecodeReport) -> None:
            plain = report.as_dict() if self.settings.rank == 0 else None
            self.pipe.send("progress", (done, total, plain))

        return Hooks(on_progress, lambda: bool(raw[0]))

    def on_plan(
        self,
        operation: Operation,
        latent_shape: tuple[int, ...],
        axis: AxisRequest,
        options: dict[str, Any],
    ) -> dict[str, object]:
        """The plan of this rank, as plain values.

        Where nothing is known of this kind of card, rank 0 proves and times its kernels, and the
        others read its verdicts: not every rank compiles and measures the same. A collective.
        """
        settings, later = self.settings, False
        wire: Wire | None = None
        if settings.world_size > 1:
            wire = Wire(self._context(axis, settings.start_s), self.device)
            known = wire.all_gather_numbers([self.vae.engine.known_verdicts(self.device)])
            later = settings.rank > 0 and known[0] == known[settings.rank] == [0]
            if later:
                wire.all_gather_numbers([0])  # rank 0 is done
        plan = self.vae.plan(
            latent_shape, operation=operation, ranks=settings.world_size, axis=axis, **options
        )
        if wire is not None and not later:
            wire.all_gather_numbers([0])
        return plan.as_dict()

    def on_decode(self, given: Given | None = None, **arguments: Any) -> dict[str, object]:
        """Decode the latent in shared memory; this rank's rows go to the output there.

        given: of a latent that the parent still copies.
        """
        laps = Laps(arguments["sent_s"])
        job = DecodeJob(**arguments)
        buffer, latent = self._open(job)
        raw = buffer.raw
        laps.add("open")
        out = view(raw, *job.output, torch.float32)
        rank, world_size = self.settings.rank, self.settings.world_size
        if job.gather == "shared" and world_size > 1:
            shards = plan_shards(latent.shape[3], latent.shape[4], world_size, job.axis)
            rows, columns = shards.place(rank, self.vae.config.decoded_factor)
            # [B, T', H', W', 3] or [B, 3, T', H', W']
            out = out[:, :, rows, columns] if job.form == "image" else out[..., rows, columns]
        reserve = buffer.reserve if job.fresh else None
        sink: Sink = NullSink()
        if job.form == "image" and (job.gather == "shared" or rank == 0):
            # The parent copies frames while the next ones are decoded.
            sink = ImageSink(out, reserve, on_written=partial(self.pipe.send, "written"))
        elif job.gather == "shared" or rank == 0:
            sink = TensorSink(out, reserve)
        plan = None if job.plan is None else Plan.from_dict(job.plan)
        await_latent = None
        if given is not None:
            await_latent = partial(given.wait_for, job.input[1][1], seconds=job.wait_s)
        refused: dict[str, Any] | None = None
        try:
            self.vae.run_decode(
                DecodeRequest(
                    latent=latent,
                    await_latent=await_latent,
                    normalized=job.normalized,
                    options=RunOptions(**job.options) if plan is None else plan.options,
                    hooks=self._hooks(raw),
                    plan=plan,
                    sink=sink,
                    context=self._context(job.axis, job.wait_s),
                    gather="own" if job.gather == "shared" else job.gather,
                )
            )
            self._decoded = buffer, _place(job.input)
        except DecodeCancelled:
            pass  # the report says it
        except LatentError as error:
            refused = _describe(error, self.settings)
        return self._report(laps, refused)

    def on_encode(
        self, unit_range: bool, given: Given | None = None, **arguments: Any
    ) -> dict[str, object]:
        """Encode the pixels in shared memory; rank 0 writes the latent there.

        given: of pixels that the parent still copies.
        """
        laps = Laps(arguments["sent_s"])
        job = EncodeJob(**arguments)
        buffer, pixels = self._open(job)
        raw = buffer.raw
        laps.add("open")
        await_frames = None if given is None else partial(given.wait_for, seconds=job.wait_s)
        refused: dict[str, Any] | None = None
        try:
            latent = self.vae.run_encode(
                EncodeRequest(
                    pixels=pixels,
                    normalized=job.normalized,
                    unit_range=unit_range,
                    options=RunOptions(**job.options),
                    hooks=self._hooks(raw),
                    context=self._context(job.axis, job.wait_s),
                    gather="rank0",
                    await_frames=await_frames,
                )
            )
            if latent is not None:
                place = view(raw, *job.output, torch.float32)
                reserve = buffer.reserve if job.fresh else None
                if latent.is_cuda:
                    copier = HostCopier(latent.device, reserve, is_new=False)
                    copier.copy(latent.contiguous(), place, place[:, :0])
                    copier.finish()
                else:
                    buffer.reserve(place)
                    place.copy_(latent)
        except DecodeCancelled:
            pass  # the report says it
        except LatentError as error:
            refused = _describe(error, self.settings)
        return self._report(laps, refused)

    def _open(self, job: EncodeJob) -> tuple[SharedBuffer, torch.Tensor]:
        """The shared memory of `job`, mapped, and its input."""
        # Memory that is not fresh is that of a run before, and all of it was reserved.
        if job.fresh:
            self._mapped[job.path] = SharedBuffer.open(job.path, job.size)
        self._kept = {job.path, *job.kept}
        buffer = self._mapped[job.path]
        # No copy to or from a device may cross the bounds of what is page-locked.
        buffer.unlock(unless=_place(job.input if isinstance(job, DecodeJob) else job.output))
        self.pipe.send("mapped", None)
        offset, shape = job.input
        back = sorted(range(len(job.order)), key=job.order.__getitem__)
        return buffer, view(buffer.raw, offset, shape, torch.float32).permute(back)

    def _report(self, laps: Laps, refused: dict[str, Any] | None) -> dict[str, object]:
        """The answer to a run: the report, whose `host_ms` begins with `laps`, None of a run that
        did not begin; and the error about an input that all ranks have `refused`, in step."""
        report = self.vae.last_report
        if report is None:
            return {"report": None, "refused": refused}
        # What the run itself did not see, before its first lap: checks, kernels, the other ranks.
        laps.add("set up", less_ms=sum(report.host_ms.values()))
        plain = replace(report, host_ms={**laps.ms, **report.host_ms}).as_dict()
        return {"report": plain, "refused": refused}

    def on_check_wire(self, wait_s: float) -> dict[str, Any]:
        """Send known numbers around, each rank's in another memory format. A collective.

        Whether they arrived as they should, through our gather, our exchange, and for comparison
        through an unguarded gather (NCCL garbles dense NDHWC there; Gloo copies right or refuses).
        """
        return check_wire(self._context("auto", wait_s), self.device)
