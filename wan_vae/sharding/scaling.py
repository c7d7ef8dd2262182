"""Scaling of a sharded decode on paper: what ranks exchange, and what that costs on a link.

Bytes and messages are exact: they come from the plan that the decoder follows, and tests hold
them against what real ranks count. Milliseconds are a model: measured compute, and assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..chunking import Chunk
from ..config import WanVAEConfig
from .plan import ShardPlan, decoder_exchanges, halo_bytes, plan_shards

STEADY = Chunk(1, 2, is_first=False, is_last=False)  # one latent frame, four pixel frames
# NVIDIA H200, device copy, read and write counted (benchmarks/NOTES.md).
COPY_BYTES_PER_MS = 4.2e9


@dataclass(frozen=True)
class Link:
    """Assumed: what one message costs before its first byte, and the rate of its bytes."""

    name: str
    message_us: float
    bytes_per_ms: float


LINKS = (
    Link("NVLink 4 (300 GB/s one way)", 20.0, 300e6),
    Link("PCIe 5 x16 (40 GB/s one way)", 35.0, 40e6),
)
# Assumed: Python and the driver issue a chunk's kernels in this time, however small they are.
HOST_ISSUE_MS = 6.0
# Assumed: all ranks agree before a chunk to go on, which waits for the device.
AGREE_MS = 0.15


def cross_size(plan: ShardPlan, height: int, width: int) -> int:
    """Latent size of the axis that `plan` does not cut."""
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


def surround_bytes(config: WanVAEConfig, rows: int, cross: int, itemsize: int) -> int:
    """Bytes read and written to put halo rows around each convolution's input."""
    total = 0
    for site in decoder_exchanges(config):
        size = site.channels * site.frames(STEADY) * (rows * site.scale + 2) * cross * site.scale
        total += 2 * size * itemsize
    return total


@dataclass(frozen=True)
class Exchanged:
    """What the busiest rank (two neighbours, where there is one) receives in a steady chunk."""

    messages: int
    halo_bytes: int
    attention_bytes: int
    link_ms: float


def exchanged(
    config: WanVAEConfig, plan: ShardPlan, cross: int, link: Link, itemsize: int
) -> Exchanged:
    """Counts and modelled time: both neighbours' rows travel at once, each exchange is awaited."""
    rank = min(1, plan.active - 1)
    halo = halo_bytes(config, plan, rank, STEADY, cross, itemsize)
    gathered = attention_bytes(config, plan, rank, cross, itemsize)
    ms = 0.0
    if plan.active > 1:
        sites = len(list(decoder_exchanges(config))) + 1
        ms = sites * link.message_us / 1e3 + (halo + gathered) / link.bytes_per_ms + AGREE_MS
    return Exchanged(messages(config, plan, rank), halo, gathered, ms)


@dataclass(frozen=True)
class Prediction:
    """The slowest rank's steady chunk: exact counts, modelled milliseconds and efficiency."""

    axis: str
    rows: int
    messages: int
    halo_bytes: int
    attention_bytes: int
    chunk_ms: float
    efficiency: float


def predict(
    config: WanVAEConfig,
    height: int,
    width: int,
    ranks: int,
    link: Link,
    one_gpu_ms: float,
    itemsize: int = 2,
) -> Prediction:
    """A latent of `height` x `width` on `ranks` GPUs; one GPU takes `one_gpu_ms` a steady chunk."""
    plan = plan_shards(height, width, ranks)
    cross = cross_size(plan, height, width)
    start, stop = plan.rows_of(0)
    rows = stop - start
    found = exchanged(config, plan, cross, link, itemsize)
    compute_ms = one_gpu_ms * rows / plan.rows
    copy_ms = surround_bytes(config, rows, cross, itemsize) / COPY_BYTES_PER_MS
    chunk_ms = max(compute_ms + copy_ms, HOST_ISSUE_MS) + found.link_ms
    return Prediction(
        plan.axis, rows, found.messages, found.halo_bytes, found.attention_bytes, chunk_ms,
        one_gpu_ms / (ranks * chunk_ms),
    )  # fmt: skip
