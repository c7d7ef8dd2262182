"""The decode command under torchrun: each latent over the ranks of a node, the list over the nodes.

    torchrun --nnodes M --nproc-per-node N -m wan_vae decode *.latent --vae FILE -o FOLDER

Nodes do not communicate: each decodes every M-th latent of the list. Outputs that exist are
skipped, and a file gets its name when it is complete, so the same command, started again after a
failure, continues where it ended.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch

from .. import geometry
from ..device import pick_device
from ..errors import DecodeCancelled, OutputError, ShardingError, WanVAEError, first_line
from ..io.latents import LatentFile, check_latent, read_latent, statistics_hint
from ..io.sink import NullSink, Sink
from ..pipeline import WanVAE
from ..sharding.context import SINGLE, ShardContext
from ..sharding.transport import HOST_AND_DEVICE, Wire, group_environment
from .console import ProgressBar, log
from .load import load_vae
from .outputs import frame_rate, frame_rate_note, open_output, outputs_of_batch
from .requests import DecodeRequest

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class RankInfo:
    """This process under torchrun: rank `rank` of `ranks` on node `node` of `nodes`."""

    rank: int
    ranks: int
    node: int
    nodes: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> RankInfo | None:
        """Read torchrun's variables; None for a program that torchrun did not start.

        Raises ShardingError if variables are missing or contradict each other.
        """
        if "TORCHELASTIC_RUN_ID" not in environment:
            return None
        names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
        try:
            info = cls(*(int(environment[name]) for name in names))
        except (KeyError, ValueError):
            info = None
        if info is None or not (0 <= info.rank < info.ranks and 0 <= info.node < info.nodes):
            values = ", ".join(f"{name}={environment.get(name, '(missing)')}" for name in names)
            raise ShardingError(
                f"TORCHELASTIC_RUN_ID is set, but {values}: expected the four numbers that "
                "torchrun sets, so start the program with torchrun, or unset TORCHELASTIC_RUN_ID"
            )
        return info


def rank_device(info: RankInfo, requested: str | None) -> str:
    """The device of this rank: a CUDA device of its own, or the one that --device names."""
    if requested is not None:
        return requested
    if not torch.cuda.is_available():
        return "cpu"
    if info.ranks > torch.cuda.device_count():
        raise ShardingError(
            f"{info.ranks} ranks on a node with {torch.cuda.device_count()} CUDA device(s): start "
            "as many ranks as devices, or name one with --device to share it",
            rank=info.rank,
        )
    return f"cuda:{info.rank}"


def join(info: RankInfo, device: torch.device, has_own_device: bool) -> ShardContext:
    """Join the group of this node's ranks, on loopback interfaces; a collective of the node.

    Uses NCCL if each rank has a CUDA device of its own, else Gloo. Makes `device` the current one.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if info.ranks == 1:
        return SINGLE
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    for name, value in group_environment().items():
        os.environ.setdefault(name, value)
    use_nccl = has_own_device and device.type == "cuda" and dist.is_nccl_available()
    # torchrun's own store brings ranks together; the prefix separates nodes and restarts.
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=TIMEOUT_S)))
    except (ValueError, dist.DistError) as error:  # a variable is missing, or an address is wrong
        raise ShardingError(
            f"the ranks cannot meet: {first_line(error)}; start them with torchrun",
            rank=info.rank,
        ) from error
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        HOST_AND_DEVICE if use_nccl else "gloo",
        store=PrefixStore(f"wan_vae/{info.node}/{restart}", store),
        rank=info.rank,
        world_size=info.ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
        # Connects now, when all ranks are here, and not at the first message.
        device_id=device if use_nccl else None,
    )
    return ShardContext(info.rank, info.ranks, "auto", timeout_s=TIMEOUT_S)


@dataclass
class Summary:
    """The result for each latent of this node."""

    info: RankInfo
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def show(self) -> int:
        """Print it on rank 0 of the node; returns the exit code: 0, or 3 if some failed."""
        if self.info.rank == 0:
            head = f"node {self.info.node}: "
            results = {"done": self.done, "skipped": self.skipped, "failed": self.failed}
            for word, texts in results.items():
                for text in texts:
                    print(f"{head}{word:<7} {text}", flush=True)
            print(
                f"{head}{len(self.done)} decoded, {len(self.skipped)} skipped (already there), "
                f"{len(self.failed)} failed",
                flush=True,
            )
        return 3 if self.failed else 0


class DeferredErrorSink:
    """Keeps the first error of a sink in `error` until all ranks can stop together."""

    needs_whole_frames = True

    def __init__(self, sink: Sink):
        self.sink = sink
        self.error: WanVAEError | None = None

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        """Write to the sink, unless it has failed."""
        with self._deferring():
            if self.error is None:
                self.sink.write(pixels, start_frame, first_row)

    def close(self) -> None:
        """Close the sink, or abort it if it has failed."""
        with self._deferring():
            if self.error is None:
                self.sink.close()
        if self.error is not None:
            self.abort()

    def abort(self) -> None:
        """Abort the sink."""
        self.sink.abort()

    @contextmanager
    def _deferring(self) -> Iterator[None]:
        try:
            yield
        except WanVAEError as error:
            self.error = error
        except OSError as error:
            self.error = OutputError(str(error))


def decode_list(request: DecodeRequest, outputs: Sequence[Path], info: RankInfo) -> int:
    """Decode the latents of this node to `outputs`; returns the exit code. A collective.

    A latent that cannot be read or written is listed as failed, and the run continues with the
    next one. An error inside a decode leaves the ranks at different places of it: the error is
    listed and ends the program, and the next start decodes the rest.
    """
    device = rank_device(info, request.device)
    context = join(info, pick_device(device), has_own_device=request.device is None)
    vae = load_vae(request.vae, device, request.options.precision)
    node = _NodeRun(request, info, context, vae)
    for path, output in list(zip(request.latents, outputs, strict=True))[info.node :: info.nodes]:
        node.decode(path, output)
    if info.rank == 0 and (note := frame_rate_note(outputs, request.fps, vae.config)):
        print(note, flush=True)
    return node.summary.show()


class _NodeRun:
    """The decodes of one node, seen from one of its ranks. Its methods are collectives."""

    def __init__(self, request: DecodeRequest, info: RankInfo, context: ShardContext, vae: WanVAE):
        self.request, self.info, self.context, self.vae = request, info, context, vae
        self.summary = Summary(info)
        self._is_broken = False
        self._wire = None if context.is_single else Wire(context, vae.device)

    def decode(self, path: Path, output: Path) -> None:
        """Decode what one file holds, a batch to an output each; the results go to `summary`."""
        if self._is_broken:
            self.summary.failed.append(f"{path}: not begun")
            return
        error: WanVAEError | None = None
        file: LatentFile | None = None
        try:
            file = read_latent(path, self.request.key)
            check_latent(file.latent, self.vae.config)
        except WanVAEError as failure:
            error = failure
        if self._on_any_rank(error is not None):
            self.summary.failed.append(f"{path}: {error or 'see the other ranks'}")
            return
        assert file is not None  # or there would be an error
        outputs = outputs_of_batch(output, file.latent.shape[0])
        parts = file.latent.split(1) if len(outputs) > 1 else [file.latent]
        for part, place in zip(parts, outputs, strict=True):
            if not self._is_broken:
                self._decode_part(path, replace(file, latent=part), place)

    def _decode_part(self, path: Path, file: LatentFile, output: Path) -> None:
        """Decode one latent of `path`."""
        if self._of_rank_0(os.path.lexists(output)):
            self.summary.skipped.append(str(output))
            return
        error: WanVAEError | None = None
        sink = DeferredErrorSink(NullSink())
        try:
            if self.info.rank == 0:
                shape = geometry.pixel_shape(tuple(file.latent.shape), self.vae.config)
                fps = frame_rate(self.request.fps, self.vae.config)
                written, warnings = open_output(output, shape, fps)
                sink = DeferredErrorSink(written)
                hint = statistics_hint(file.latent, self.vae.config, self._is_normalized(file))
                for text in (*file.notes, *warnings, *([] if hint is None else [hint])):
                    log(f"wan-vae: {path}: {text}")
        except WanVAEError as failure:
            error = failure
        if self._on_any_rank(error is not None):
            sink.abort()
        else:
            try:
                error = self._run(file, sink, output)
            except WanVAEError as failure:
                self._is_broken = True
                self.summary.failed.append(f"{path}: {failure}")
                if self.info.rank != 0:  # rank 0 may not know the cause
                    log(f"wan-vae: node {self.info.node}, rank {self.info.rank}: {failure}")
                return
            if not self._on_any_rank(error is not None):
                self.summary.done.append(str(output))
                return
        self.summary.failed.append(f"{path}: {error or 'see the other ranks'}")

    def _run(self, file: LatentFile, sink: DeferredErrorSink, output: Path) -> WanVAEError | None:
        """Decode; returns the error of the sink, after which the ranks are still in step."""
        options = self.request.options
        bar = ProgressBar(output.name) if self.info.rank == 0 else None
        try:
            self.vae.decode(
                file.latent,
                shard=self.context,
                gather="rank0",
                sink=sink,
                normalized=self._is_normalized(file),
                chunk_frames=options.chunk_frames,
                memory_format=options.memory_format,
                precision=options.precision,
                backend=options.backend,
                on_progress=bar,
                should_stop=lambda: sink.error is not None,
            )
        except DecodeCancelled as cancelled:
            return sink.error or cancelled
        except BaseException:
            sink.abort()  # a decode that refuses its arguments does not
            raise
        finally:
            if bar is not None:
                bar.close()
        return sink.error

    def _is_normalized(self, file: LatentFile) -> bool:
        return self.request.normalized or file.is_normalized is True

    def _of_rank_0(self, number: int) -> int:
        """The `number` of rank 0."""
        return number if self._wire is None else self._wire.all_gather_numbers([number])[0][0]

    def _on_any_rank(self, fact: bool) -> bool:
        """Whether `fact` is true on any rank."""
        if self._wire is None:
            return fact
        return any(row[0] for row in self._wire.all_gather_numbers([fact]))
