"""A decode or encode on one rank of several: the sentence of `pipeline`, on this rank's rows.

Every function here is a collective: all ranks of the context's group call it with equal arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from zlib import crc32

import torch

from .. import geometry, layout
from ..arithmetic import own_arithmetic
from ..chunking import Chunk, schedule
from ..device import DTYPES, free_bytes, is_out_of_memory
from ..errors import DecodeCancelled, DecodeMemoryError, ShardingError
from ..network.blocks import Step
from ..network.cache import FeatureCache
from ..planning import memory
from ..report import ShardRecord
from ..sharding.context import ShardContext
from ..sharding.gather import GATHERS, Gather, check_gather, gather_picture
from ..sharding.halo import Shard
from ..sharding.plan import ShardPlan, plan_shards
from ..sharding.transport import DTYPES as WIRE_DTYPES
from ..sharding.transport import Wire

_OPERATIONS = ("decode", "encode")
_DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class ShardJob:
    """What the ranks have agreed on before the first chunk."""

    shard: Shard
    lengths: tuple[int, ...]
    gather: Gather

    @property
    def plan(self) -> ShardPlan:
        return self.shard.plan


def start_job(
    context: ShardContext,
    operation: str,
    tensor: torch.Tensor,
    latent_shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    gather: Gather,
    lengths: Callable[[ShardPlan], Sequence[int] | int],
) -> ShardJob:
    """Plan the shards and prove that all ranks hold the same `tensor` and options. A collective.

    `lengths(plan)` gives an explicit schedule, or the frames a chunk that this rank has memory
    for; the ranks then take the smallest. Raises ShardingError, GeometryError.
    """
    check_gather(gather)
    plan = plan_shards(latent_shape[3], latent_shape[4], context.world_size, context.axis)
    wire = Wire(context, device)
    wire.connect()
    wire.agree(
        operation=_OPERATIONS.index(operation),
        **dict(zip(("batch", "channels", "frames", "height", "width"), tensor.shape, strict=True)),
        axis=-plan.dim,
        gather=GATHERS.index(gather),
        precision=WIRE_DTYPES.index(dtype),
    )
    own = lengths(plan)
    explicit = () if isinstance(own, int) else tuple(own)
    wire.agree(
        schedule=crc32(repr(explicit).encode()),
        contents=0 if context.same_input else _checksum(tensor),
    )
    if not explicit:
        fewest = min(row[0] for row in wire.all_gather_numbers([own]))
        explicit = tuple(c.frames for c in schedule(latent_shape[2], fewest))
    return ShardJob(Shard(context, plan, wire), explicit, gather)


def _checksum(tensor: torch.Tensor) -> int:
    # 20 MB, a 720p latent of 81 frames: 16 ms, which is why workers, who share one, go without.
    return crc32(tensor.detach().float().cpu().contiguous().numpy().tobytes())


def chunks(
    job: ShardJob, should_stop: Callable[[], bool] | None, describe: Callable[[], str]
) -> Iterator[Chunk]:
    """The chunks in turn. Before each, all ranks stop if one of them was asked to. A collective."""
    for chunk in schedule(sum(job.lengths), job.lengths):
        stop = should_stop is not None and should_stop()
        rows = job.shard.wire.all_gather_numbers([stop, chunk.start])
        if any(row[0] for row in rows):
            raise DecodeCancelled(f"cancelled after {describe()}")
        if len({row[1] for row in rows}) > 1:
            raise ShardingError(f"ranks are at different chunks: {[row[1] for row in rows]}")
        yield chunk


def finish_job(job: ShardJob, builder, counter, pixels_finite: bool) -> bool:
    """Put every rank's share into `builder`; whether all ranks' pixels were finite. A collective.

    `mixed_calls` and `conversions` of the report become sums over the ranks.
    """
    wire, shard = job.shard.wire, job.shard
    device = wire.device
    mine = [
        _DEVICE_TYPES.index(device.type),
        -1 if device.index is None else device.index,
        shard.halo_rows,
        shard.halo_bytes,
        int(wire.wait_ms() * 1e3),
        counter.mixed_calls,
        counter.conversions,
        pixels_finite,
    ]
    rows = wire.all_gather_numbers(mine)
    builder.shards = [_record(job, rank, row) for rank, row in enumerate(rows)]
    counter.mixed_calls = sum(row[5] for row in rows)
    counter.conversions = sum(row[6] for row in rows)
    if job.plan.idle:
        builder.warnings.append(
            f"{len(job.plan.idle)} of {job.plan.world_size} ranks stayed idle: the latent has "
            f"only {job.plan.rows} rows along its {job.plan.axis}"
        )
    return all(row[7] for row in rows)


def _record(job: ShardJob, rank: int, row: list[int]) -> ShardRecord:
    kind, index, halo_rows, halo_bytes, wait_us, *_ = row
    name = _DEVICE_TYPES[kind] + (f":{index}" if index >= 0 else "")
    start, stop = job.plan.rows_of(rank)
    return ShardRecord(rank, name, job.plan.axis, start, stop, halo_rows, halo_bytes, wait_us / 1e3)


def own_part(x: torch.Tensor, plan: ShardPlan, rank: int, factor: int = 1) -> torch.Tensor:
    """This rank's rows of `x` [..., H, W], `factor` times the latent's size; a view."""
    rows, columns = plan.place(rank, factor)
    return x[..., rows, columns]


def decode_shard(
    vae, latent, context: ShardContext, gather: Gather, *, normalized, chunk_frames,
    memory_format, precision, out, sink, on_progress, should_stop, **options,
) -> torch.Tensor | None:  # fmt: skip
    """`WanVAE.decode` on one rank; see there. A collective."""
    from ..io.latents import as_batch, check_latent_shape
    from ..io.sink import TensorSink, check_out

    latent = as_batch(latent, "latent")
    check_latent_shape(latent, vae.config)
    dtype = vae.dtype if precision == "auto" else DTYPES.get(precision, vae.dtype)
    rank, config, device = context.rank, vae.config, vae.device

    plan = plan_shards(latent.shape[3], latent.shape[4], context.world_size, context.axis)
    run = vae._start_decode(
        latent, normalized, chunk_frames, memory_format, precision, None, None,
        axis=plan.axis, **options,
    )  # fmt: skip
    modelled = {"memory_format": run.memory_format, "backend": run.ops.used["conv3d"]}

    def lengths(plan: ShardPlan):
        if chunk_frames is not None:
            return [c.frames for c in schedule(latent.shape[2], chunk_frames)]
        own = plan.pixel_shape_of(0, tuple(latent.shape), 1)  # the tallest part
        free = free_bytes(device)
        return memory.plan_chunk_frames(config, own, dtype, free, **modelled)

    job = start_job(context, "decode", latent, tuple(latent.shape), device, dtype, gather, lengths)
    shard = job.shard
    factor = config.spatial_factor
    z = own_part(run.z, plan, rank).contiguous()
    run.builder.memory["free_bytes"] = free_bytes(device)
    run.builder.memory["planned_bytes"] = memory.planned_bytes(
        config, tuple(z.shape), dtype, max(job.lengths), **modelled
    )
    part_shape = plan.pixel_shape_of(rank, run.pixel_shape, factor)
    shape = part_shape if gather == "own" else run.pixel_shape
    receives = gather != "rank0" or rank == 0
    if out is not None and sink is not None:
        raise ValueError("decode takes out= or sink=, not both")
    if sink is None and receives:
        if out is None:
            out = torch.empty(shape, dtype=torch.float32, device=device)
        check_out(out, shape)
        sink = TensorSink(out)
    run.builder.memory["output_bytes"] = 0 if out is None else out.numel() * out.element_size()
    cache = FeatureCache()
    told = f"of {run.total_frames} frames"
    try:
        with own_arithmetic(device):
            for chunk in chunks(job, should_stop, lambda: f"{run.done_frames} {told}"):
                first, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, config)
                if shard.has_rows:
                    step = Step(cache, chunk, shard, run.ops, run.counter)
                    with run.clock.measure(chunk, last - first):
                        pixels = run.model.decode_chunk(z[:, :, chunk.start : chunk.stop], step)
                    run.pixels_finite &= torch.isfinite(pixels).all()
                else:
                    empty = (*part_shape[:2], last - first, *part_shape[3:])
                    pixels = torch.empty(empty, device=device)
                picture = gather_picture(shard, pixels, gather, factor, "pixels")
                if picture is not None and picture.numel():
                    sink.write(picture, first, 0)
                run.done_frames = last
                if on_progress is not None:
                    on_progress(last, run.total_frames, run.progress_report())
            if sink is not None:
                sink.close()
            finite = finish_job(job, run.builder, run.counter, bool(run.pixels_finite))
            run.pixels_finite.fill_(finite)
        vae.last_report = run.finish("done")
    except BaseException as error:
        if sink is not None:
            sink.abort()
        vae.last_report = run.finish_failed(error)
        if is_out_of_memory(error):
            raise _out_of_memory(context, device, error) from None
        raise
    return out


def _out_of_memory(context: ShardContext, device, error) -> DecodeMemoryError:
    return DecodeMemoryError(
        f"rank {context.rank} of {context.world_size} is out of memory on {device}: "
        f"{str(error).splitlines()[0]}; use smaller chunks or more devices"
    )


def encode_shard(
    vae, pixels, context: ShardContext, gather: Gather, clock, builder, ops, counter, model, *,
    chunk_frames, on_progress, should_stop,
) -> torch.Tensor | None:  # fmt: skip
    """The chunks of `WanVAE.encode` on one rank; `pixels` are cropped to whole latent pixels.

    A collective. Returns the latent [B, z, t, h, w] float32 as `gather` says, before normalisation.
    """
    config, device, rank = vae.config, vae.device, context.rank
    latent_shape = geometry.latent_shape(tuple(pixels.shape), config)
    dtype = model.conv2.weight.dtype
    job = start_job(
        context, "encode", pixels, latent_shape, device, dtype, gather,
        lambda _: [c.frames for c in schedule(latent_shape[2], chunk_frames or 1)],
    )  # fmt: skip
    shard, plan = job.shard, job.plan
    own = own_part(pixels, plan, rank, config.spatial_factor)
    part_shape = plan.pixel_shape_of(rank, latent_shape, 1)
    latent = torch.empty(part_shape, dtype=torch.float32, device=device)
    cache = FeatureCache()
    told = f"of {builder.total_frames} frames"
    for chunk in chunks(job, should_stop, lambda: f"{builder.done_frames} {told}"):
        first, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, config)
        if shard.has_rows:
            x = own[:, :, first:last].to(device=device, dtype=ops.pixels or dtype)
            step = Step(cache, chunk, shard, ops, counter)
            with clock.measure(chunk, last - first):
                mean, _ = model.encode_chunk(layout.to_format(x, "contiguous"), step)
            latent[:, :, chunk.start : chunk.stop] = mean
        builder.done_frames = last
        if on_progress is not None:
            on_progress(last)
    whole = gather_picture(shard, latent, gather, 1, "latent")
    finish_job(job, builder, counter, True)
    return whole
