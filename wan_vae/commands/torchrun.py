"""The decode command under torchrun: each latent over a node's ranks, the list over the nodes.

    torchrun --nnodes M --nproc-per-node N -m wan_vae decode *.latent --vae FILE -o FOLDER

Nodes never talk to one another: each decodes every M-th latent of the list. Outputs that exist are
skipped, and files appear under their names only when they are whole, so that the same command,
started again after a failure, goes on where it ended.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch

from .. import geometry
from ..device import pick_device as best_device
from ..errors import DecodeCancelled, OutputError, ShardingError, WanVAEError, first_line
from ..io.latents import check_latent, load_latent
from ..io.sink import Sink
from ..sharding.context import SINGLE, ShardContext
from ..sharding.transport import HOST_AND_DEVICE, Wire, group_environment
from .console import say

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Place:
    """This process among all: rank of `ranks` in node `node` of `nodes`."""

    rank: int
    ranks: int
    node: int
    nodes: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place | None:
        """From torchrun's variables; None for a program that it did not start.

        Raises ShardingError where they are incomplete or contradict each other.
        """
        if "TORCHELASTIC_RUN_ID" not in environment:
            return None
        names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
        said = ", ".join(f"{name}={environment.get(name, '(missing)')}" for name in names)
        try:
            place = cls(*(int(environment[name]) for name in names))
        except (KeyError, ValueError):
            place = None
        if place is None or not (0 <= place.rank < place.ranks and 0 <= place.node < place.nodes):
            raise ShardingError(
                f"TORCHELASTIC_RUN_ID is set, but {said}: expected torchrun's four numbers, so "
                "start it with torchrun, or unset TORCHELASTIC_RUN_ID"
            )
        return place


def pick_device(place: Place, asked: str | None) -> str:
    """The device of this rank: its own CUDA device, or what `--device` says for all ranks."""
    if asked is not None:
        return asked
    if not torch.cuda.is_available():
        return "cpu"
    if place.ranks > torch.cuda.device_count():
        raise ShardingError(
            f"{place.ranks} ranks on a node with {torch.cuda.device_count()} CUDA device(s): start "
            "as many ranks as devices, or name one with --device to share it",
            rank=place.rank,
        )
    return f"cuda:{place.rank}"


def join(place: Place, device: torch.device, own_device: bool) -> ShardContext:
    """The group of this node's ranks, on loopback interfaces; a collective of the node.

    NCCL where each rank has a CUDA device of its own, else Gloo. `device` becomes the current one.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.ranks == 1:
        return SINGLE
    import torch.distributed as dist

    for name, value in group_environment().items():
        os.environ.setdefault(name, value)
    nccl = own_device and device.type == "cuda" and dist.is_nccl_available()
    # torchrun's own store brings ranks together; the prefix keeps nodes and restarts apart.
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=TIMEOUT_S)))
    except (ValueError, dist.DistError) as error:  # a variable is missing, or its address is wrong
        raise ShardingError(
            f"the ranks cannot meet: {first_line(error)}; start them with torchrun",
            rank=place.rank,
        ) from error
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        HOST_AND_DEVICE if nccl else "gloo",
        store=dist.PrefixStore(f"wan_vae/{place.node}/{restart}", store),
        rank=place.rank,
        world_size=place.ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
        # Connects now, where all ranks are, and not at some first message.
        device_id=device if nccl else None,
    )
    return ShardContext(place.rank, place.ranks, "auto", timeout_s=TIMEOUT_S)


@dataclass
class Summary:
    """What became of each latent of this node."""

    place: Place
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def show(self) -> int:
        """Print it on the node's rank 0; the exit code: 0, or 3 if some failed."""
        if self.place.rank == 0:
            head = f"node {self.place.node}: "
            for word in ("done", "skipped", "failed"):
                for text in getattr(self, word):
                    print(f"{head}{word:<7} {text}", flush=True)
            print(
                f"{head}{len(self.done)} decoded, {len(self.skipped)} skipped (already there), "
                f"{len(self.failed)} failed",
                flush=True,
            )
        return 3 if self.failed else 0


def decode_list(args, load, outputs: list[Path], place: Place, bar) -> int:
    """Decode `args.latents` to `outputs`; every rank of every node calls it. Returns the exit code.

    `load(args, path)` gives the VAE, `bar(label)` a progress bar. A latent that cannot be read or
    written is listed and the rest goes on. An error inside a decode leaves the ranks at different
    places: it is listed and ends the program; what was not begun is left to the next start.
    """
    args.device, own_device = pick_device(place, args.device), args.device is None
    context = join(place, best_device(args.device), own_device)
    vae = load(args, args.vae)
    wire = None if context.is_single else Wire(context, vae.device)
    summary = Summary(place)

    def of_rank_0(number: int) -> int:
        return number if wire is None else wire.all_gather_numbers([number])[0][0]

    def failed_somewhere(failed: bool) -> bool:
        return failed if wire is None else any(r[0] for r in wire.all_gather_numbers([failed]))

    jobs = list(zip(args.latents, outputs, strict=True))[place.node :: place.nodes]
    for i, (path, output) in enumerate(jobs):
        if of_rank_0(os.path.lexists(output)):
            summary.skipped.append(str(output))
            continue
        latent = sink = error = None
        try:
            latent = load_latent(path)
            check_latent(latent, vae.config)
            if place.rank == 0:
                sink = _open(output, latent, vae.config, args)
        except WanVAEError as problem:
            error = problem
        if failed_somewhere(error is not None):
            summary.failed.append(f"{path}: {error or 'see the other ranks'}")
            if sink is not None:
                sink.abort()
            continue
        progress = bar(output.name) if place.rank == 0 else None
        try:
            error = _decode(vae, latent, context, sink, args, progress)
        except WanVAEError as problem:
            if sink is not None:
                sink.abort()  # the decode has, unless it refused its arguments
            summary.failed.append(f"{path}: {problem}")
            summary.failed += [f"{p}: not begun" for p, _ in jobs[i + 1 :]]
            if place.rank != 0:  # rank 0 may not be the one that knows why
                say(f"wan-vae: node {place.node}, rank {place.rank}: {problem}")
            return summary.show()
        except BaseException:  # Ctrl-C, or a mistake of ours
            if sink is not None:
                sink.abort()
            raise
        finally:
            if progress is not None:
                progress.close()
        if failed_somewhere(error is not None):
            summary.failed.append(f"{path}: {error or 'see the other ranks'}")
        else:
            summary.done.append(str(output))
    return summary.show()


def _open(output: Path, latent: torch.Tensor, config, args) -> _CarefulSink:
    from ..io.video import open_sink

    shape = latent.shape if latent.ndim == 5 else (1, *latent.shape)
    return _CarefulSink(open_sink(output, geometry.pixel_shape(tuple(shape), config), args.fps))


def _decode(vae, latent, context, sink: _CarefulSink | None, args, progress) -> WanVAEError | None:
    """Decode one latent; the error of rank 0's sink, after which all ranks are still in step."""
    try:
        vae.decode(
            latent,
            shard=context,
            gather="rank0",
            sink=sink if sink is not None else _CarefulSink(None),
            normalized=args.normalized,
            chunk_frames=args.chunk_frames,
            memory_format=args.memory_format,
            precision=args.precision,
            backend=args.backend,
            on_progress=progress,
            should_stop=None if sink is None else (lambda: sink.error is not None),
        )
    except DecodeCancelled as stopped:
        return stopped if sink is None else sink.error
    return None if sink is None else sink.error


class _CarefulSink:
    """Keeps the error of a sink until all ranks can stop together; None drops the pixels."""

    def __init__(self, sink: Sink | None):
        self.sink = sink
        self.needs_whole_frames = True
        self.error: WanVAEError | None = None

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        if self.error is None:
            self._try("write", pixels, start_frame, first_row)

    def close(self) -> None:
        if self.error is None:
            self._try("close")
        if self.error is not None:
            self.abort()

    def abort(self) -> None:
        if self.sink is not None:
            self.sink.abort()

    def _try(self, method: str, *arguments) -> None:
        if self.sink is None:
            return
        try:
            getattr(self.sink, method)(*arguments)
        except WanVAEError as error:
            self.error = error
        except OSError as error:
            self.error = OutputError(str(error))
