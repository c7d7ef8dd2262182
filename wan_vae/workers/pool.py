"""One decode over several devices from one program: worker processes, one a device, kept warm.

The parent is no rank. It plans nothing and moves no pixels: the workers agree among themselves and
write their rows into one host buffer that all share. It starts them, watches them, and when one
fails ends them all and says which and why.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal

import torch

from .. import geometry
from ..device import pick_device
from ..errors import (
    BackendError,
    CheckpointError,
    DecodeCancelled,
    DecodeMemoryError,
    ShardingError,
    WanVAEError,
)
from ..io.image import ImageSink
from ..io.latents import as_batch, check_latent, check_pixels
from ..io.sink import TensorSink
from ..network.model import tensor_version
from ..pipeline import WanVAE, crop_for_encode
from ..report import DecodeReport
from ..sharding.context import AxisRequest
from ..sharding.transport import group_environment
from .shared import SharedBuffer, aligned, view
from .worker import WorkerSettings

GatherMode = Literal["shared", "rank0", "all"]
Form = Literal["pixels", "image"]

# How long the parent looks at its pipes before it asks `should_stop` again.
_POLL_S = 0.1
# How often it asks busy workers for a sign of life.
_PING_S = 0.5
# After a first failure the other ranks fail too, within moments; the cause is chosen among them.
_GRACE_S = 2.0
_CONTROL_BYTES = 4096


_KINDS = ("cpu", "cuda", "mps", "xpu")


def parse_devices(text: str | Sequence[str | torch.device]) -> list[torch.device]:
    """Devices from "all", "0,1,3", "cuda:0,cuda:1", "cpu,cpu", or a sequence of them.

    "all" is every CUDA device, or one CPU without any. Raises ShardingError that names the entry
    that is missing on this machine.
    """
    if isinstance(text, str):
        if text.strip() == "all":
            count = torch.cuda.device_count()
            return [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
        text = [part.strip() for part in text.split(",") if part.strip()]
    if not text:
        raise ShardingError("no device was named: expected 'all', '0,1' or 'cpu,cpu'")
    devices = []
    for rank, part in enumerate(text):
        name = f"cuda:{part}" if isinstance(part, str) and part.isdigit() else part
        if isinstance(name, str) and not name.startswith(_KINDS):
            raise ShardingError(
                f"rank {rank} cannot start: device {part!r} is unknown: expected 'all', '0,1' or "
                "'cpu,cpu'", rank=rank,
            )  # fmt: skip
        try:
            devices.append(pick_device(name))
        except BackendError as error:
            raise ShardingError(f"rank {rank} cannot start: {error}", rank=rank) from None
    return devices


def pick_backend(devices: Sequence[torch.device]) -> str:
    """NCCL for different CUDA devices where this PyTorch has it, else Gloo (staged by the host)."""
    different = len(set(devices)) == len(devices)
    if different and all(d.type == "cuda" for d in devices):
        import torch.distributed as dist

        if dist.is_nccl_available():
            return "nccl"
    return "gloo"


@dataclass
class _Rank:
    """A worker as its parent sees it."""

    rank: int
    device: torch.device
    process: subprocess.Popen
    pipe: Connection

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.device})"


@dataclass(frozen=True)
class _Failure:
    """What went wrong on which rank; `blames` is the rank that it waited for in vain.

    `kind` is the name of the worker's exception, or "died", "stuck" (gave no sign of life) or
    "aborted" (NCCL ended the process after a message that never came).
    """

    rank: _Rank
    kind: str
    text: str
    blames: int | None = None


class WorkerPool:
    """Worker processes for a list of devices; started on first use and again after a failure.

    timeout_s: how long a rank waits for another, and a worker may give no sign of life.
    idle_s: after so long without work the workers are ended. Decodes from several threads queue
    up. The memory of the last result stays with the workers for the next. `close` (or `with`)
    ends the workers; they also end by themselves when this process does, however it ends.
    `last_reports`: of each rank's own share of the last operation, in rank order.
    """

    def __init__(
        self,
        devices: str | Sequence[str | torch.device],
        *,
        backend: Literal["auto", "nccl", "gloo"] = "auto",
        timeout_s: float = 30.0,
        idle_s: float = 300.0,
        start_timeout_s: float = 120.0,
        shared_folders: Sequence[Path] | None = None,
    ):
        self.devices = parse_devices(devices)
        self.backend = pick_backend(self.devices) if backend == "auto" else backend
        self.timeout_s, self.idle_s = timeout_s, idle_s
        self.start_timeout_s = start_timeout_s
        self.shared_folders = shared_folders
        self._ranks: list[_Rank] = []
        self._folder: Path | None = None
        self._loaded: tuple | None = None
        # The memory of the last result, which the workers have mapped.
        self._spare: SharedBuffer | None = None
        self._lock = threading.Lock()
        self._idle: threading.Timer | None = None
        self._uses = 0
        self._started_timeout_s = timeout_s
        self.last_reports: tuple[DecodeReport, ...] = ()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty before the first use and after `close`."""
        return [r.process.pid for r in self._ranks]

    def close(self) -> None:
        """End the workers and wait until they are gone. The next decode starts new ones."""
        with self._lock:
            if self._idle is not None:
                self._idle.cancel()
            self._stop()

    def _stop(self) -> None:
        for rank in self._ranks:
            _try_send(rank.pipe, ("stop", {}))
        self._end(self.timeout_s)

    # -- a decode -----------------------------------------------------------------------------

    def decode(
        self,
        vae: WanVAE,
        latent: torch.Tensor,
        *,
        axis: AxisRequest = "auto",
        gather: GatherMode = "shared",
        form: Form = "pixels",
        on_progress: Callable[[int, int, DecodeReport], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        memory_formats: Sequence[str] | None = None,
        **options,
    ) -> torch.Tensor:
        """Decode on all devices; `vae.last_report` then tells of all ranks.

        Returns host memory: float32 [B, 3, T', H', W'] in [-1, 1], or with form="image"
        [B, T', H', W', 3] in [0, 1]. gather: each rank writes its rows ("shared"), or rank 0 writes
        the picture that it alone ("rank0") or every rank ("all") has gathered. `options` are those
        of `WanVAE.decode`: normalized, chunk_frames, memory_format, precision, backend;
        `memory_formats` instead gives each rank its own. `on_progress` counts the frames that
        every rank has done.

        Raises LatentError, GeometryError, ShardingError (with the rank that failed and why),
        DecodeCancelled. Not a collective; other threads' decodes wait.
        """
        if gather not in ("shared", "rank0", "all"):
            raise ShardingError(f"gather is {gather!r}: expected 'shared', 'rank0' or 'all'")
        if form not in ("pixels", "image"):
            raise ShardingError(f"form is {form!r}: expected 'pixels' or 'image'")
        latent = latent.unsqueeze(0) if latent.ndim == 4 else latent
        check_latent(latent, vae.config)
        shape = geometry.pixel_shape(tuple(latent.shape), vae.config)
        if form == "image":
            shape = (shape[0], *shape[2:], shape[1])
        arguments = {"form": form, "axis": axis, "gather": gather, "options": options}
        by_rank = None
        if memory_formats is not None:
            if len(memory_formats) != len(self.devices):
                raise ShardingError(
                    f"{len(memory_formats)} memory formats for {len(self.devices)} ranks"
                )
            by_rank = [{"options": {**options, "memory_format": f}} for f in memory_formats]
        return self._work(
            "decode", vae, latent, shape, on_progress, should_stop, arguments, by_rank
        )

    def encode(
        self,
        vae: WanVAE,
        pixels: torch.Tensor,
        *,
        axis: AxisRequest = "auto",
        on_progress: Callable[[int, int, DecodeReport], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        **options,
    ) -> torch.Tensor:
        """Encode on all devices: `WanVAE.encode` with its options, the latent in host memory.

        Raises what `decode` raises, and CheckpointError if the checkpoint had no encoder.
        """
        pixels = as_batch(pixels, "video")
        check_pixels(pixels, vae.config)
        if vae.encoder is None:
            raise CheckpointError("this checkpoint has no encoder: load a full VAE file to encode")
        shape = geometry.latent_shape(tuple(pixels.shape), vae.config)
        pixels = crop_for_encode(pixels, vae.config)
        arguments = {"axis": axis, "options": options}
        return self._work("encode", vae, pixels, shape, on_progress, should_stop, arguments)

    def check_wire(self) -> list[dict]:
        """Have the ranks prove their messages in every memory format; see `proof.check_wire`.

        One answer for each rank. Raises ShardingError, also for a pool of one.
        """
        if len(self.devices) < 2:
            raise ShardingError("one rank sends nothing: there is nothing to prove")
        with self._busy():
            self._send_all("check_wire", wait_s=self.timeout_s)
            return self._wait_for_all("prove their messages", self.timeout_s + _GRACE_S)

    @contextmanager
    def _busy(self):
        """The workers are running and ours alone; whatever goes wrong ends them."""
        with self._lock:
            self._uses += 1
            if self._idle is not None:
                self._idle.cancel()
            try:
                self._start()
                yield
            except BaseException:
                # Ranks may be anywhere in a decode: nothing that they say can be trusted.
                self._end(0.0)
                raise
            # By the parent, who alone knows that no command is on its way to them.
            self._idle = threading.Timer(self.idle_s, _end_idle, (weakref.ref(self), self._uses))
            self._idle.daemon = True
            self._idle.start()

    def _work(
        self, command, vae, tensor, shape, on_progress, should_stop, arguments, by_rank=None
    ) -> torch.Tensor:
        """One operation: `tensor` in and a float32 tensor of `shape` out, in shared memory.

        Ranks claim the memory of what they write, as they write it.
        """
        with self._busy():
            self._load(vae)
            input_at = _CONTROL_BYTES
            output_at = input_at + aligned(tensor.numel() * 4)
            output_bytes = torch.Size(shape).numel() * 4
            size = output_at + aligned(output_bytes)
            if command == "decode":
                buffer, fresh = self._memory(size, claimed=output_at)
                arguments = {**arguments, "fresh": fresh}
            else:
                buffer = SharedBuffer.create(size, self.shared_folders, claimed=output_at)
            try:
                view(buffer.raw, input_at, tensor.shape, torch.float32).copy_(tensor)
                self._send_all(
                    command,
                    by_rank,
                    path=str(buffer.path),
                    size=buffer.size,
                    input=(input_at, tuple(tensor.shape)),
                    output=(output_at, tuple(shape)),
                    wait_s=self.timeout_s,
                    **arguments,
                )
                watch = _Watch(self, buffer, on_progress, should_stop, command)
                results = watch.until_done()
            finally:
                buffer.unlink()
            self.last_reports = tuple(DecodeReport.from_dict(r["report"]) for r in results)
            # Before another thread may ask whether the memory is in use.
            result = buffer.tensor(output_at, shape, torch.float32)
            if command == "decode" and self.last_reports[0].status == "done":
                self._spare = buffer
        report = self.last_reports[0]
        vae.last_report = replace(report, memory=replace(report.memory, output_bytes=output_bytes))
        if report.status == "cancelled":
            # Agreed among the ranks, all of which are ready for the next command.
            raise DecodeCancelled(report.error or "cancelled")
        return result

    def _memory(self, size: int, claimed: int) -> tuple[SharedBuffer, bool]:
        """Shared memory for a decode, and whether it is fresh.

        That of the last decode if nobody holds its result any more: fresh memory costs as much
        time as a few GPUs take to decode into it.
        """
        spare, self._spare = self._spare, None
        if spare is not None and not spare.in_use and size <= spare.size <= 2 * size:
            spare.raw[:_CONTROL_BYTES] = 0
            return spare, False
        return SharedBuffer.create(size, self.shared_folders, claimed), True

    # -- workers --------------------------------------------------------------------------------

    def _start(self) -> None:
        """Have all workers running; those of a pool of which one is gone are replaced."""
        running = self._ranks and all(r.process.poll() is None for r in self._ranks)
        # NCCL takes its time-out when ranks join; Gloo with each message.
        if running and (self.backend != "nccl" or self._started_timeout_s == self.timeout_s):
            return
        self._end(0.0)
        self._started_timeout_s = self.timeout_s
        self._folder = Path(tempfile.mkdtemp(prefix="wan_vae_ranks_"))
        on_cpu = sum(d.type == "cpu" for d in self.devices) or 1
        for i, device in enumerate(self.devices):
            self._ranks.append(
                _spawn(
                    WorkerSettings(
                        rank=i,
                        world_size=len(self.devices),
                        device=str(device),
                        backend=self.backend,
                        rendezvous=(self._folder / "rendezvous").as_uri(),
                        start_s=max(self.timeout_s, self.start_timeout_s),
                        wait_s=self.timeout_s,
                        threads=max(1, torch.get_num_threads() // on_cpu),
                    ),
                    device,
                )
            )
        self._wait_for_all("start", self.start_timeout_s)

    def _load(self, vae: WanVAE) -> None:
        """Give the weights to the workers through shared memory, unless they have them."""
        # Which tensors the weights are, and how often each was changed in place.
        weights = [(id(p), p.dtype, tensor_version(p)) for p in vae.model.parameters()]
        if self._loaded is not None:
            model, found = self._loaded
            if model() is vae.model and found == weights:
                return
        self._loaded = None
        state = vae.model.state_dict()
        table, offset = [], 0
        for name, value in state.items():
            kind = str(value.dtype).removeprefix("torch.")
            table.append((name, offset, tuple(value.shape), kind))
            offset += aligned(value.numel() * value.element_size())
        buffer = SharedBuffer.create(max(offset, 1), self.shared_folders)
        try:
            for (_, start, shape, _), value in zip(table, state.values(), strict=True):
                view(buffer.raw, start, shape, value.dtype).copy_(value)
            self._send_all(
                "load",
                path=str(buffer.path),
                size=buffer.size,
                table=table,
                config=asdict(vae.config),
                dtype=str(vae.dtype).removeprefix("torch."),
                found=vae.weights_found,
            )
            self._wait_for_all("load the weights", self.start_timeout_s)
        finally:
            buffer.unlink()
        self._loaded = (weakref.ref(vae.model), weights)

    def _send_all(
        self, command: str, by_rank: Sequence[Mapping] | None = None, **arguments
    ) -> None:
        for rank in self._ranks:
            own = {**arguments, **(by_rank[rank.rank] if by_rank else {})}
            _try_send(rank.pipe, (command, own))  # one that is gone is found by the watch

    def _wait_for_all(self, what: str, timeout_s: float) -> list:
        """One message of each worker, waited for; in rank order. Raises ShardingError."""
        said = {}
        left, until = {r.pipe: r for r in self._ranks}, time.monotonic() + timeout_s
        failures: list[_Failure] = []
        while left and not failures:
            ready = wait(list(left), max(0.0, until - time.monotonic()))
            for pipe in ready:
                rank = left[pipe]
                kind, value = _receive(rank)
                if kind == "pong":  # asked for in an operation that ended before it came
                    continue
                del left[pipe]
                said[rank.rank] = value
                if kind == "error":
                    failures.append(self._failure(rank, value))
            if not ready:
                names = ", ".join(r.name for r in left.values())
                first = next(iter(left.values())).rank
                raise ShardingError(f"{names} did not {what} within {timeout_s:g} s", rank=first)
        if failures:
            raise _error(failures, self._ranks, f"could not {what}")
        return [said[r.rank] for r in self._ranks]

    def _failure(self, rank: _Rank, value: dict) -> _Failure:
        kind = value["kind"]
        # Windows has no such exit codes, and no NCCL.
        if kind == "died" and self.backend == "nccl" and rank.process.poll() == -signal.SIGABRT:
            kind = "aborted"
        return _Failure(rank, kind, value["text"], value["rank"])

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
        self._ranks, self._loaded, self._spare = [], None, None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _end_idle(pool: weakref.ref[WorkerPool], uses: int) -> None:
    """End the workers of a pool that nobody has used since `uses`."""
    found = pool()
    if found is not None:
        with found._lock:
            if found._uses == uses:
                found._stop()


class _Watch:
    """Follows one operation: progress, cancel, failures, signs of life."""

    def __init__(
        self, pool: WorkerPool, buffer: SharedBuffer, on_progress, should_stop, command: str
    ):
        self.pool, self.buffer = pool, buffer
        self.what = f"failed while {command.removesuffix('e')}ing"
        self.on_progress, self.should_stop = on_progress, should_stop
        self.done_frames = [0] * len(pool.devices)
        self.told_frames = 0
        self.report: dict | None = None
        self.mapped = 0
        self.asked_at: dict[int, float] = {}  # ranks that have a ping to answer
        self.next_ping = time.monotonic() + _PING_S

    def until_done(self) -> list[dict]:
        """The result of each rank, in order. Raises ShardingError, DecodeCancelled."""
        ranks = self.pool._ranks
        left = {r.pipe: r for r in ranks}
        results: dict[int, dict] = {}
        failures: list[_Failure] = []
        until = None
        while left and (until is None or time.monotonic() < until):
            if until is None and not self.buffer.raw[0] and self.should_stop and self.should_stop():
                self.buffer.raw[0] = 1
            for pipe in wait(list(left), _POLL_S):
                rank = left[pipe]
                kind, value = _receive(rank)
                self.asked_at.pop(rank.rank, None)
                if kind == "done":
                    del left[pipe]
                    results[rank.rank] = value
                elif kind == "error":
                    del left[pipe]
                    failures.append(self.pool._failure(rank, value))
                    until = until or time.monotonic() + _GRACE_S
                elif kind == "pong":
                    pass
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
        if failures:
            raise _error(failures, ranks, self.what, set(results))
        return [results[r.rank] for r in ranks]

    def _without_a_sign_of_life(self, left: Mapping[Connection, _Rank]) -> list[_Failure]:
        """Ask the workers that are still busy, and return those that have not answered in time.

        Finds a process that was stopped, also where no other rank waits for it, or where the
        others sit in NCCL and cannot say so.
        """
        now, timeout_s = time.monotonic(), self.pool.timeout_s
        stuck = [
            _Failure(r, "stuck", f"gave no sign of life for {timeout_s:g} s", r.rank)
            for r in left.values()
            if now - self.asked_at.get(r.rank, now) > timeout_s
        ]
        if now >= self.next_ping:
            self.next_ping = now + _PING_S
            for rank in left.values():
                if rank.rank not in self.asked_at:
                    self.asked_at[rank.rank] = now
                    _try_send(rank.pipe, ("ping", None))
        return stuck

    def _progress(self, rank: _Rank, done: int, total: int, report: dict | None) -> None:
        """Tell of the frames that every rank has done; ranks without rows keep step."""
        self.done_frames[rank.rank] = done
        self.report = report or self.report
        everywhere = min(self.done_frames)
        if everywhere > self.told_frames and self.report and self.on_progress is not None:
            self.told_frames = everywhere
            told = DecodeReport.from_dict(self.report)
            self.on_progress(everywhere, total, replace(told, done_frames=everywhere))


def decode_sharded(
    vae: WanVAE | Mapping[str, torch.Tensor],
    latent: torch.Tensor,
    devices: str | Sequence[str | torch.device] = "all",
    *,
    pool: WorkerPool | None = None,
    fallback: bool = False,
    form: Form = "pixels",
    timeout_s: float = 30.0,
    on_progress: Callable[[int, int, DecodeReport], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    axis: AxisRequest = "auto",
    gather: GatherMode = "shared",
    **options,
) -> torch.Tensor:
    """Decode `latent` over `devices`; results, options and errors are those of `WorkerPool.decode`.

    vae: a WanVAE or a state dict. pool: workers to use (and keep); without one, workers are started
    for this decode. fallback: after a ShardingError decode on the VAE's own device instead; the
    report's `fallbacks` then says why.
    """
    if not isinstance(vae, WanVAE):
        vae = WanVAE.from_state_dict(vae, device="cpu")
    hooks = {"on_progress": on_progress, "should_stop": should_stop}
    try:
        if pool is not None:
            return pool.decode(vae, latent, axis=axis, gather=gather, form=form, **hooks, **options)
        with WorkerPool(devices, timeout_s=timeout_s) as own:
            return own.decode(vae, latent, axis=axis, gather=gather, form=form, **hooks, **options)
    except ShardingError as error:
        if not fallback:
            raise
        reason = f"decoded on {vae.device} alone, because sharding failed: {error}"
    latent = latent.unsqueeze(0) if latent.ndim == 4 else latent
    if form == "image":
        sink = ImageSink.allocate(tuple(latent.shape), vae.config, torch.device("cpu"))
        result = sink.image
    else:
        result = torch.empty(geometry.pixel_shape(tuple(latent.shape), vae.config))
        sink = TensorSink(result)
    vae.decode(latent, sink=sink, **hooks, **options)
    report = vae.last_report
    vae.last_report = replace(report, fallbacks=(reason, *report.fallbacks))
    return result


# -- processes and pipes ------------------------------------------------------------------------


def _spawn(settings: WorkerSettings, device: torch.device) -> _Rank:
    """Start one worker with an inherited pipe; raises ShardingError if the system refuses."""
    ours, theirs = Pipe()
    handle = theirs.fileno()
    package = __package__.rpartition(".")[0]
    library = Path(__file__).parents[1]
    # The package by its folder's name, from its own parent folder: inside ComfyUI, ours is a
    # sub-package of a folder whose name is not importable.
    code = (
        f"import sys; sys.path.insert(0, {str(library.parent)!r}); "
        f"from {library.name}.workers.worker import main; main({handle})"
    )
    environment = {**os.environ, **group_environment()}
    inherit: dict = {"pass_fds": (handle,)}
    if sys.platform == "win32":
        os.set_handle_inheritable(handle, True)
        startup = subprocess.STARTUPINFO(lpAttributeList={"handle_list": [handle]})
        inherit = {"startupinfo": startup}
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            env=environment,
            **inherit,
        )
    except OSError as error:
        raise ShardingError(
            f"rank {settings.rank} ({device}) of {package} cannot start: {error}",
            rank=settings.rank,
        ) from error
    finally:
        theirs.close()
    _try_send(ours, asdict(settings))
    return _Rank(settings.rank, device, process, ours)


def _try_send(pipe: Connection, message) -> None:
    """Send; a worker that is gone is noticed where its answer is awaited."""
    try:
        pipe.send(message)
    except (BrokenPipeError, ConnectionResetError):
        return


def _receive(rank: _Rank) -> tuple[str, object]:
    """One message of a worker; its end is an error message too."""
    try:
        return rank.pipe.recv()
    except (EOFError, ConnectionResetError):
        code = rank.process.wait()
        return "error", {"kind": "died", "text": f"exit code {code}", "rank": rank.rank}


def _error(
    failures: list[_Failure], ranks: list[_Rank], what: str, finished: set[int] = frozenset()
) -> WanVAEError:
    """The one error that names the cause: a death, then no memory, then what was said first."""
    causes = {
        "died": "died ({}); it " + what,
        DecodeMemoryError.__name__: "is out of memory: {}; it " + what,
        "stuck": "does not answer (stuck or overloaded): {}",
    }
    for kind, text in causes.items():
        for f in failures:
            if f.kind == kind:
                return ShardingError(f"{f.rank.name} {text.format(f.text)}", rank=f.rank.rank)
    silent = [r for r in ranks if r.rank not in {f.rank.rank for f in failures} | finished]
    for f in failures:
        if f.kind in (ShardingError.__name__, "aborted"):
            if silent:
                stuck = next((r for r in silent if r.rank == f.blames), silent[0])
                return ShardingError(
                    f"{stuck.name} does not answer (stuck or overloaded): {f.text}",
                    rank=stuck.rank,
                )
            return ShardingError(f.text, rank=f.blames)
    first = failures[0]
    return ShardingError(
        f"{first.rank.name} {what}: {first.kind}: {first.text}", rank=first.rank.rank
    )
