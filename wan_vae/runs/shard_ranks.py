"""One rank's part of a run over several: see `ranks.Ranks`, whose methods are collectives here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar
from zlib import crc32

import torch

from ..chunking import Chunk
from ..errors import BackendError, DecodeMemoryError, ShardingError
from ..layout import LayoutCounter
from ..ops.opset import HaloExchange, LayerChoice
from ..options import GATHERS, Gather, Operation
from ..planning.plan import Pace, Plan
from ..report import ReportBuilder, ShardRecord
from ..said import said
from ..sharding.context import ShardContext
from ..sharding.gather import check_gather, gather_picture
from ..sharding.halo import Shard
from ..sharding.plan import ShardPlan
from ..sharding.transport import DTYPES, Wire

_OPERATIONS: tuple[Operation, ...] = ("decode", "encode")
_DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")
T = TypeVar("T")


@dataclass(frozen=True)
class ShardRequest:
    """What a rank says of its run before the ranks agree: see `ShardRanks.join`.

    choices: of its kernels, by the name of the layer. is_finite: of the values of `tensor`, as far
    as they were looked at. plan: of this rank, where it has one already; then the ranks agree on
    chunks and passes in the same message, and whether to begin: stop is this rank's wish not to.
    """

    context: ShardContext
    shards: ShardPlan
    operation: Operation
    tensor: torch.Tensor
    device: torch.device
    dtype: torch.dtype
    gather: Gather
    choices: Mapping[str, LayerChoice]
    is_finite: bool = True
    plan: Plan | None = None
    stop: bool = False


class ShardRanks:
    """This rank's part of a picture that several ranks share."""

    def __init__(self, request: ShardRequest, shard: Shard, rows: Sequence[Sequence[int]]):
        """rows: of each rank a digest of its kernels, and what it said of its plan."""
        self._request, self._shard = request, shard
        self._context, self._shards = request.context, request.shards
        self._kernels = [digest for digest, *_ in rows]
        # What the ranks agreed on as they joined, until it is asked for.
        self._pace: Pace | None = None
        self._stop: bool | None = None
        if request.plan is not None:
            self._stop = any(stop for _, stop, *_ in rows)
            if len(set(self._kernels)) == 1:  # else with the plans for the kernels of rank 0
                self._pace = _slowest(request.plan, [pace for _, _, *pace in rows])

    @classmethod
    def join(cls, request: ShardRequest) -> ShardRanks:
        """Connect the ranks, and prove that they hold the same tensor and options. A collective.

        Raises ShardingError.
        """
        check_gather(request.gather)
        context, tensor = request.context, request.tensor
        wire = Wire(context, request.device)
        wire.connect()
        sizes = ("batch", "channels", "frames", "height", "width")
        facts = {
            "operation": _OPERATIONS.index(request.operation),
            **dict(zip(sizes, tensor.shape, strict=True)),
            "axis": -request.shards.dim,
            "gather": GATHERS.index(request.gather),
            "precision": DTYPES.index(request.dtype),
            "finite": int(request.is_finite),
            "schedule": 0 if request.plan is None else _schedule(request.plan),
        }
        texts = sorted(f"{name}: {choice.text}" for name, choice in request.choices.items())
        pace = [] if request.plan is None else [int(request.stop), *_numbers(request.plan)]
        # In one message, as each takes a millisecond or so of a warm run's time.
        rows = wire.begin(facts, [crc32("\n".join(texts).encode()), *pace])
        return cls(request, Shard(context, request.shards, wire), rows)

    def agree_on_kernels(self, adopt: Callable[[Mapping[str, LayerChoice]], T]) -> T | None:
        """Let all ranks run the kernels of rank 0, because other kernels give other bits.

        adopt: takes the choices of rank 0 in place of this rank's. Returns its result, or None
        where they are the same already. A collective where any rank has others. Raises
        ShardingError on every rank if one of them cannot run what rank 0 runs.
        """
        wire, rank, digests = self._shard.wire, self._context.rank, self._kernels
        if len(set(digests)) == 1:
            return None
        mine = self._request.choices if rank == 0 else {}
        plain = {name: asdict(choice) for name, choice in mine.items()}
        theirs = json.loads(wire.all_gather_texts(json.dumps(plain))[0])
        adopted, failure = None, ""
        if digests[rank] != digests[0]:
            try:
                adopted = adopt({name: LayerChoice(**facts) for name, facts in theirs.items()})
            except BackendError as error:
                failure = str(error)
        for other, text in enumerate(wire.all_gather_texts(failure)):
            if text:
                raise ShardingError(
                    said(
                        "shard.kernels",
                        "rank {rank} cannot run the kernels that rank 0 has chosen "
                        "({reason}): use cards of one kind, or backend='eager'",
                        rank=other,
                        reason=text,
                    ),
                    rank=other,
                )
        return adopted

    @property
    def exchange(self) -> HaloExchange | None:
        return self._shard

    @property
    def has_rows(self) -> bool:
        return self._shard.has_rows

    @property
    def receives(self) -> bool:
        return self._request.gather != "rank0" or self._context.rank == 0

    def own_part(self, x: torch.Tensor, factor: int = 1) -> torch.Tensor:
        return own_part(x, self._shards, self._context.rank, factor)

    def part_shape(self, shape: tuple[int, ...], factor: int = 1) -> tuple[int, ...]:
        return self._shards.pixel_shape_of(self._context.rank, shape, factor)

    def result_shape(self, shape: tuple[int, ...], factor: int = 1) -> tuple[int, ...]:
        return self.part_shape(shape, factor) if self._request.gather == "own" else shape

    def agree_on(self, plan: Plan) -> Pace:
        pace, self._pace = self._pace, None
        if pace is not None:
            return pace
        facts = {
            "schedule": _schedule(plan),
            "contents": 0 if self._context.same_input else _checksum(self._request.tensor),
        }
        return _slowest(plan, self._shard.wire.agree(facts, _numbers(plan)))

    def agree_to_stop(self, chunk: Chunk, stop: bool) -> bool:
        agreed, self._stop = self._stop, None
        if agreed is not None:
            return agreed
        rows = self._shard.wire.all_gather_numbers([stop, chunk.start])
        if any(row[0] for row in rows):
            return True
        if len({row[1] for row in rows}) > 1:
            raise ShardingError(
                said(
                    "shard.steps",
                    "ranks are at different chunks: {chunks}",
                    chunks=[row[1] for row in rows],
                )
            )
        return False

    def gather(self, part: torch.Tensor, factor: int, site: str) -> torch.Tensor | None:
        return gather_picture(self._shard, part, self._request.gather, factor, site)

    def read_waits(self, wait: bool) -> None:
        self._shard.wire.read_waits(wait)

    def complete(self, builder: ReportBuilder, counter: LayoutCounter, finite: bool) -> bool:
        """See `Ranks`. `mixed_calls` and `conversions` of the report become sums over the ranks."""
        wire, shard = self._shard.wire, self._shard
        device = wire.device
        mine = [
            _DEVICE_TYPES.index(device.type),
            -1 if device.index is None else device.index,
            shard.halo_rows,
            shard.halo_bytes,
            int(wire.wait_ms() * 1e3),
            counter.mixed_calls,
            counter.conversions,
            finite,
        ]
        rows = wire.all_gather_numbers(mine)
        builder.shards = [self._record(rank, row) for rank, row in enumerate(rows)]
        counter.mixed_calls = sum(row[5] for row in rows)
        counter.conversions = sum(row[6] for row in rows)
        if self._shards.idle:
            builder.warnings.append(
                said(
                    "run.idle_ranks",
                    "{idle} of {ranks} ranks stayed idle: the latent has only {rows} rows along "
                    "its {axis}",
                    idle=len(self._shards.idle),
                    ranks=self._shards.world_size,
                    rows=self._shards.rows,
                    axis=self._shards.axis,
                )
            )
        return all(row[7] for row in rows)

    def _record(self, rank: int, row: Sequence[int]) -> ShardRecord:
        kind, index, halo_rows, halo_bytes, wait_us, *_ = row
        name = _DEVICE_TYPES[kind] + (f":{index}" if index >= 0 else "")
        start, stop = self._shards.rows_of(rank)
        return ShardRecord(
            rank=rank,
            device=name,
            axis=self._shards.axis,
            start_row=start,
            stop_row=stop,
            halo_rows=halo_rows,
            halo_bytes=halo_bytes,
            wait_ms=wait_us / 1e3,
        )

    def out_of_memory(self, reason: str) -> DecodeMemoryError | None:
        context = self._context
        return DecodeMemoryError(
            said(
                "shard.out_of_memory",
                "rank {rank} of {ranks} is out of memory on {device}: {reason}; use "
                "smaller chunks or more devices",
                rank=context.rank,
                ranks=context.world_size,
                device=self._request.device,
                reason=reason,
            )
        )


def _numbers(plan: Plan) -> list[int]:
    """What a rank tells the others of its plan: latent frames of a chunk, numbers of a pass."""
    return [plan.chunk_frames, 0 if plan.pass_elements is None else plan.pass_elements]


def _schedule(plan: Plan) -> int:
    """A digest of the chunks that the caller asked for, which must be the same on all ranks."""
    asked = plan.options.chunk_frames
    return crc32(repr(() if asked is None else plan.lengths).encode())


def _slowest(plan: Plan, rows: Sequence[Sequence[int]]) -> Pace:
    """The pace that suits all ranks. rows: the `_numbers` of each; plan: of this one."""
    return plan.pace_of_ranks([(frames, elements or None) for frames, elements in rows])


def own_part(x: torch.Tensor, shards: ShardPlan, rank: int, factor: int = 1) -> torch.Tensor:
    """The rows of `rank` of `x` [..., H, W], `factor` times the latent's size; a view."""
    rows, columns = shards.place(rank, factor)
    return x[..., rows, columns]


def _checksum(tensor: torch.Tensor) -> int:
    # 20 MB, a 720p latent of 81 frames: 16 ms, which is why workers, who share one, go without.
    return crc32(tensor.detach().float().cpu().contiguous().numpy().tobytes())
