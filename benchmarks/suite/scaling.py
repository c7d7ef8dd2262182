"""Scaling of a sharded decode on paper: what ranks exchange, and what that costs on a link.

Bytes and messages are exact: they come from the plan that the decoder follows, and tests hold
them against what real ranks count. Milliseconds are a model: measured compute, and assumptions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from wan_vae.chunking import Chunk, schedule
from wan_vae.config import WanVAEConfig
from wan_vae.planning.choose import PlanRequest, choose
from wan_vae.planning.passes import pass_ends, pass_frames, stage_passes
from wan_vae.sharding.plan import ShardPlan, plan_shards

from .exchanges import Exchange, decoder_exchanges, halo_bytes

# NVIDIA H200, device copy, read and write counted (docs/performance.md).
COPY_BYTES_PER_MS = 4.2e9


@dataclass(frozen=True)
class Link:
    """What one exchange costs before its first byte, and the rate of its bytes."""

    name: str
    exchange_us: float
    bytes_per_ms: float


# An exchange on NVLink: measured on two H100, 3.8 to 4.3 ms for the 34 of a chunk whatever their
# size, waits for the slower rank included (benchmarks/results). PCIe and the rates are assumed.
LINKS = (
    Link("NVLink 4 (300 GB/s one way)", 120.0, 300e6),
    Link("PCIe 5 x16 (40 GB/s one way)", 135.0, 40e6),
)
# Measured on two H200 (rank: chunks of an image): a rank's host issues 34 exchanges, and what lies
# between them, in 15.4 ms, however small its kernels are.
HOST_ISSUE_MS = 15.4 / 34
# Frames that our kernels make together.
_TOGETHER = 4


def cross_size(plan: ShardPlan, height: int, width: int) -> int:
    """Latent size of the axis along which `plan` does not divide."""
    return width if plan.axis == "height" else height


def attention_bytes(
    config: WanVAEConfig, plan: ShardPlan, rank: int, cross: int, itemsize: int, frames: int = 1
) -> int:
    """Bytes of the other ranks' rows of attention's input that `rank` receives in a chunk."""
    start, stop = plan.rows_of(rank)
    channels = config.decoder_dim * config.dim_mult[-1]
    return channels * (plan.rows - (stop - start)) * cross * itemsize * frames


# How often a chunk passes each stage of the decoder; empty: each once.
Passes = Mapping[int, int]
_ONCE: Passes = {}


def messages(config: WanVAEConfig, plan: ShardPlan, rank: int, passes: Passes = _ONCE) -> int:
    """Messages that `rank` receives in a chunk: rows of each neighbour, attention of each rank."""
    halos = sum(
        ((e.before > 0 and rank > 0) + (e.after > 0 and rank < plan.active - 1)) * _times(e, passes)
        for e in decoder_exchanges(config)
    )
    return halos + plan.active - 1


def _times(exchange: Exchange, passes: Passes) -> int:
    return 1 if exchange.stage is None else passes.get(exchange.stage, 1)


def exchanges(config: WanVAEConfig, passes: Passes = _ONCE) -> int:
    """Exchanges of a chunk, that of attention included."""
    return 1 + sum(_times(e, passes) for e in decoder_exchanges(config))


def surround_bytes(config: WanVAEConfig, rows: int, cross: int, itemsize: int, chunk: Chunk) -> int:
    """Bytes read and written to put halo rows around the inputs of first layer and up-samplers.

    Elsewhere the norm writes them into the convolution's operand, with everything else.
    """
    total = 0
    for site in decoder_exchanges(config):
        if site.name.endswith(("decoder.conv1", "resample.1")):
            pixels = (rows * site.scale + 2) * cross * site.scale
            total += 2 * site.channels * site.frames(chunk) * pixels * itemsize
    return total


@dataclass(frozen=True)
class Exchanged:
    """What the busiest rank (two neighbours, where there is one) receives in a chunk."""

    messages: int
    halo_bytes: int
    attention_bytes: int
    link_ms: float


def exchanged(
    config: WanVAEConfig,
    plan: ShardPlan,
    cross: int,
    link: Link,
    itemsize: int,
    chunk: Chunk,
    passes: Passes = _ONCE,
) -> Exchanged:
    """Counts and modelled time of `chunk`.

    Both neighbours' rows travel at once, each exchange is awaited.
    """
    rank = min(1, plan.active - 1)
    halo = halo_bytes(config, plan, rank, chunk, cross, itemsize)
    gathered = attention_bytes(config, plan, rank, cross, itemsize, chunk.frames)
    ms = 0.0
    if plan.active > 1:
        count = exchanges(config, passes)
        ms = count * link.exchange_us / 1e3 + (halo + gathered) / link.bytes_per_ms
    return Exchanged(messages(config, plan, rank, passes), halo, gathered, ms)


@dataclass(frozen=True)
class Prediction:
    """The slowest rank's chunk of `frames` latent frames: exact counts, modelled milliseconds and
    efficiency."""

    axis: str
    rows: int
    frames: int
    messages: int
    halo_bytes: int
    attention_bytes: int
    chunk_ms: float
    efficiency: float


@dataclass(frozen=True)
class MeasuredPicture:
    """A latent of `height` x `width`, and the measured time of one latent frame on one GPU."""

    name: str
    height: int
    width: int
    one_gpu_ms: float


def predict(
    config: WanVAEConfig,
    picture: MeasuredPicture,
    ranks: int,
    link: Link,
    *,
    itemsize: int = 2,
    clip_frames: int = 1,
) -> Prediction:
    """The first chunk of `clip_frames` latent frames of `picture` on `ranks` GPUs, as it is planned
    where memory is no limit."""
    plan = plan_shards(picture.height, picture.width, ranks)
    cross = cross_size(plan, picture.height, picture.width)
    start, stop = plan.rows_of(0)
    rows = stop - start
    clip = (1, config.z_dim, clip_frames, picture.height, picture.width)
    chunk, passes = planned(config, clip, plan)
    found = exchanged(config, plan, cross, link, itemsize, chunk, passes)
    compute_ms = picture.one_gpu_ms * chunk.frames * rows / plan.rows
    copy_ms = surround_bytes(config, rows, cross, itemsize, chunk) / COPY_BYTES_PER_MS
    host_ms = exchanges(config, passes) * HOST_ISSUE_MS
    chunk_ms = max(compute_ms + copy_ms + found.link_ms, host_ms)
    return Prediction(
        axis=plan.axis,
        rows=rows,
        frames=chunk.frames,
        messages=found.messages,
        halo_bytes=found.halo_bytes,
        attention_bytes=found.attention_bytes,
        chunk_ms=chunk_ms,
        efficiency=picture.one_gpu_ms * chunk.frames / (ranks * chunk_ms),
    )


def planned(
    config: WanVAEConfig, latent_shape: tuple[int, ...], plan: ShardPlan
) -> tuple[Chunk, Passes]:
    """The first chunk of a decode of [B, z, T, H, W] by `plan` where memory is no limit, and how
    often it passes each stage."""
    own = plan.pixel_shape_of(0, latent_shape, 1)
    choice = choose(PlanRequest(config, own, torch.bfloat16, shards=True))
    chunk, *_ = schedule(latent_shape[2], choice.lengths)
    if choice.pass_elements is None:
        return chunk, _ONCE
    limits = pass_frames(config, own, choice.pass_elements, _TOGETHER)
    ends = pass_ends(config, latent_shape, limits, _TOGETHER)
    return chunk, Counter(stage for stage, _ in stage_passes(config, chunk, limits, ends))
