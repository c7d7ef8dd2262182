"""A worker process: one rank on one device, told what to do by its parent's pipe alone.

Started by `workers` as `python -c "..."`, not by multiprocessing's spawn, which would import the
main module of the parent again: in ComfyUI that is a second server. Only plain values cross the
pipe. Ends when the pipe closes (the parent is gone) or on "stop".
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection

import torch

from ..config import WanVAEConfig
from ..device import is_out_of_memory
from ..errors import DecodeCancelled, DecodeMemoryError, WanVAEError
from ..io.image import ImageSink
from ..io.sink import TensorSink
from ..network.model import build_model
from ..pipeline import WanVAE
from ..sharding.context import SINGLE, ShardContext
from ..sharding.plan import plan_shards
from ..sharding.proof import check_wire
from ..sharding.transport import HOST_AND_DEVICE
from .shared import SharedBuffer, view


@dataclass(frozen=True)
class WorkerSettings:
    """How one worker starts; plain values only.

    start_s: for all ranks to arrive. wait_s: for one NCCL message (Gloo's limit comes with each
    decode).
    """

    rank: int
    world_size: int
    device: str
    backend: str
    rendezvous: str
    start_s: float
    wait_s: float
    threads: int


def main(handle: int) -> None:
    """Serve until told to stop. `handle` is this end of the pipe, inherited from the parent."""
    pipe = _Pipe(_connect(handle))
    settings = WorkerSettings(**pipe.receive())
    commands: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, commands), daemon=True).start()
    worker = _Worker(settings, pipe)
    try:
        worker.start()
    except (RuntimeError, WanVAEError) as error:
        pipe.send("error", _describe(error, settings))
        return
    pipe.send("ready", None)
    while True:
        command, arguments = commands.get()
        if command == "stop":
            break
        try:
            pipe.send("done", getattr(worker, command)(**arguments))
            # Not before: to unmap a clip takes tens of milliseconds.
            worker.stale = None
        except (WanVAEError, RuntimeError, MemoryError, OSError, TypeError, ValueError) as error:
            pipe.send("error", _describe(error, settings))
    worker.close()


class _Pipe:
    """This end of the pipe; two threads send, one at a time."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, kind: str, value) -> None:
        with self._lock:
            self._connection.send((kind, value))

    def receive(self):
        return self._connection.recv()


def _connect(handle: int):
    if sys.platform == "win32":
        from multiprocessing.connection import PipeConnection

        return PipeConnection(handle)
    return Connection(handle)


def _listen(pipe: _Pipe, commands: queue.SimpleQueue) -> None:
    """Read commands and answer "ping", whatever the main thread is busy with.

    When the parent is gone, end at once, also out of a wait for another rank.
    """
    with suppress(EOFError, OSError):
        while True:
            message = pipe.receive()
            if message[0] == "ping":
                pipe.send("pong", None)
            else:
                commands.put(message)
    os._exit(1)


def _describe(error: BaseException, settings: WorkerSettings) -> dict:
    """An error as plain values: kind, one line of text, the rank at fault."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    kind, rank = type(error).__name__, getattr(error, "rank", None)
    if is_out_of_memory(error):
        kind = DecodeMemoryError.__name__
    if isinstance(error, DecodeMemoryError) or kind == DecodeMemoryError.__name__:
        rank = settings.rank
    return {"kind": kind, "text": text, "rank": rank}


class _Worker:
    """One rank: its process group, its VAE, and the commands that the parent may name."""

    def __init__(self, settings: WorkerSettings, pipe: _Pipe):
        self.settings, self.pipe = settings, pipe
        self.device = torch.device(settings.device)
        self.vae: WanVAE | None = None
        # The memory of the last decode, which the next one may be given again.
        self.mapped: SharedBuffer | None = None
        self.stale: SharedBuffer | None = None

    def start(self) -> None:
        """Join the other ranks: through a file, over the loopback interface."""
        settings = self.settings
        if self.device.type == "cpu":
            torch.set_num_threads(settings.threads)
        else:
            torch.cuda.set_device(self.device)
        if settings.world_size == 1:
            return
        import torch.distributed as dist

        nccl, start = settings.backend == "nccl", timedelta(seconds=settings.start_s)
        # A store of our own, so that ranks may take longer to arrive than one message may.
        store, rank, world_size = next(
            dist.rendezvous(settings.rendezvous, settings.rank, settings.world_size, timeout=start)
        )
        store.set_timeout(start)
        dist.init_process_group(
            HOST_AND_DEVICE if nccl else settings.backend,
            store=dist.PrefixStore("wan_vae", store),
            rank=rank,
            world_size=world_size,
            # NCCL knows no time-out for one message, only this one.
            timeout=timedelta(seconds=settings.wait_s) if nccl else start,
            # Connects now, where the parent waits for it, and not within the first decode.
            device_id=self.device if nccl else None,
        )

    def close(self) -> None:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    def load(self, path, size, table, config, dtype, found) -> None:
        """Build the VAE from the weights in shared memory; nothing keeps the memory afterwards."""
        raw = SharedBuffer.open(path, size).raw
        dtype = getattr(torch, dtype)
        state = {
            name: view(raw, offset, shape, getattr(torch, kind))
            for name, offset, shape, kind in table
        }
        self.vae = WanVAE(
            build_model(WanVAEConfig(**config), state, self.device, dtype), weights_found=found
        )

    def _context(self, axis, wait_s: float) -> ShardContext:
        settings = self.settings
        if settings.world_size == 1:
            return SINGLE
        return ShardContext(
            settings.rank, settings.world_size, axis, timeout_s=wait_s, same_input=True
        )

    def _hooks(self, raw: torch.Tensor) -> dict:
        """on_progress to the parent, should_stop from the first byte of the shared memory."""

        def on_progress(done: int, total: int, report) -> None:
            plain = report.as_dict() if self.settings.rank == 0 else None
            self.pipe.send("progress", (done, total, plain))

        return {"on_progress": on_progress, "should_stop": lambda: bool(raw[0])}

    def decode(self, path, size, fresh, input, output, form, axis, gather, wait_s, options) -> dict:
        """Decode the latent in shared memory; this rank's rows go to the output beside it.

        Memory that is not `fresh` is that of the last decode, and all of it was claimed.
        """
        if fresh:
            self.stale, self.mapped = self.mapped, SharedBuffer.open(path, size)
        buffer = self.mapped
        raw = buffer.raw
        self.pipe.send("mapped", None)
        latent = view(raw, *input, torch.float32)
        out = view(raw, *output, torch.float32)
        rank, world_size = self.settings.rank, self.settings.world_size
        if gather == "shared" and world_size > 1:
            plan = plan_shards(latent.shape[3], latent.shape[4], world_size, axis)
            rows, columns = plan.place(rank, self.vae.config.spatial_factor)
            # [B, T', H', W', 3] or [B, 3, T', H', W']
            out = out[:, :, rows, columns] if form == "image" else out[..., rows, columns]
        sink = (ImageSink if form == "image" else TensorSink)(out, buffer.claim if fresh else None)
        writes = gather == "shared" or rank == 0
        with suppress(DecodeCancelled):  # the report says it
            self.vae.decode(
                latent.clone() if self.device.type == "cpu" else latent,
                shard=self._context(axis, wait_s),
                gather="own" if gather == "shared" else gather,
                sink=sink if writes else _Nowhere(),
                **self._hooks(raw),
                **options,
            )
        return {"report": self.vae.last_report.as_dict()}

    def encode(self, path, size, input, output, axis, wait_s, options) -> dict:
        """Encode the pixels in shared memory; rank 0 writes the latent beside them."""
        buffer = SharedBuffer.open(path, size)
        raw = buffer.raw
        self.pipe.send("mapped", None)
        with suppress(DecodeCancelled):
            latent = self.vae.encode(
                view(raw, *input, torch.float32),
                shard=self._context(axis, wait_s),
                gather="rank0",
                **self._hooks(raw),
                **options,
            )
            if latent is not None:
                place = view(raw, *output, torch.float32)
                buffer.claim(place)
                place.copy_(latent)
        return {"report": self.vae.last_report.as_dict()}

    def check_wire(self, wait_s) -> dict:
        """Send known numbers around, each rank's in another memory format. A collective.

        Whether they arrived as they should, through our gather, our exchange, and for comparison
        through an unguarded gather (NCCL garbles dense NDHWC there; Gloo copies right or refuses).
        """
        return check_wire(self._context("auto", wait_s), self.device)


class _Nowhere:
    """The sink of a rank whose copy of the picture nobody asked for."""

    needs_whole_frames = False

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        """Drop them."""

    def close(self) -> None:
        """Nothing to flush."""

    abort = close
