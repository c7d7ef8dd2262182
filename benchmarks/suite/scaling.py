"""Scaling of a sharded decode on paper: what ranks exchange, and what that costs on a link.

Bytes and messages are exact: they come from the plan that the decoder follows, and tests hold
them against what real ranks count. Milliseconds are a model: measured compute, and assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wan_vae.chunking import Chunk
from wan_vae.config import WanVAEConfig
from wan_vae.planning.choose import PlanRequest, choose
from wan_vae.sharding.plan import ShardPlan, plan_shards

from .exchanges import decoder_exchanges, halo_bytes

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
# Measured there as well: a rank's host issues a chunk, exchanges included, in this time, however
# small its kernels are.
HOST_ISSUE_MS = 32.0


def steady(frames: int) -> Chunk:
    """A chunk of `frames` latent frames in the middle of a video."""
    return Chunk(1, 1 + frames, is_first=False, is_last=False)


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


def messages(config: WanVAEConfig, plan: ShardPlan, rank: int) -> int:
    """Messages that `rank` receives in a chunk: rows of each neighbour, attention of each rank."""
    halos = sum(
        (e.before > 0 and rank > 0) + (e.after > 0 and rank < plan.active - 1)
        for e in decoder_exchanges(config)
    )
    return halos + plan.active - 1


def surround_bytes(
    config: WanVAEConfig, rows: int, cross: int, itemsize: int, frames: int = 1
) -> int:
    """Bytes read and written to put halo rows around the inputs of first layer and up-samplers.

    Elsewhere the norm writes them into the convolution's operand, with everything else.
    """
    total = 0
    for site in decoder_exchanges(config):
        if site.name.endswith(("decoder.conv1", "resample.1")):
            pixels = (rows * site.scale + 2) * cross * site.scale
            total += 2 * site.channels * site.frames(steady(frames)) * pixels * itemsize
    return total


@dataclass(frozen=True)
class Exchanged:
    """What the busiest rank (two neighbours, where there is one) receives in a steady chunk."""

    messages: int
    halo_bytes: int
    attention_bytes: int
    link_ms: float


def exchanged(
    config: WanVAEConfig, plan: ShardPlan, cross: int, link: Link, itemsize: int, frames: int = 1
) -> Exchanged:
    """Counts and modelled time of a chunk of `frames` latent frames.

    Both neighbours' rows travel at once, each exchange is awaited.
    """
    rank = min(1, plan.active - 1)
    halo = halo_bytes(config, plan, rank, steady(frames), cross, itemsize)
    gathered = attention_bytes(config, plan, rank, cross, itemsize, frames)
    ms = 0.0
    if plan.active > 1:
        sites = len(list(decoder_exchanges(config))) + 1
        ms = sites * link.exchange_us / 1e3 + (halo + gathered) / link.bytes_per_ms
    return Exchanged(messages(config, plan, rank), halo, gathered, ms)


@dataclass(frozen=True)
class Prediction:
    """The slowest rank's steady chunk of `frames` latent frames: exact counts, modelled
    milliseconds and efficiency."""

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
    frames: int = 1,
) -> Prediction:
    """`picture` on `ranks` GPUs in chunks of `frames` latent frames."""
    plan = plan_shards(picture.height, picture.width, ranks)
    cross = cross_size(plan, picture.height, picture.width)
    start, stop = plan.rows_of(0)
    rows = stop - start
    found = exchanged(config, plan, cross, link, itemsize, frames)
    compute_ms = picture.one_gpu_ms * frames * rows / plan.rows
    copy_ms = surround_bytes(config, rows, cross, itemsize, frames) / COPY_BYTES_PER_MS
    chunk_ms = max(compute_ms + copy_ms + found.link_ms, HOST_ISSUE_MS)
    return Prediction(
        axis=plan.axis,
        rows=rows,
        frames=frames,
        messages=found.messages,
        halo_bytes=found.halo_bytes,
        attention_bytes=found.attention_bytes,
        chunk_ms=chunk_ms,
        efficiency=picture.one_gpu_ms * frames / (ranks * chunk_ms),
    )


def planned_frames(config: WanVAEConfig, latent_shape: tuple[int, ...], plan: ShardPlan) -> int:
    """Latent frames a chunk of a decode of [B, z, T, H, W] by `plan`, where memory is no limit."""
    own = plan.pixel_shape_of(0, latent_shape, 1)
    return choose(PlanRequest(config, own, torch.bfloat16, shards=True)).chunk_frames
