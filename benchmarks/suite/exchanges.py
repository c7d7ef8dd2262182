"""What shards exchange on paper: every exchange of boundary rows of a decode, and its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wan_vae.chunking import Chunk
from wan_vae.config import WanVAEConfig
from wan_vae.network import architecture
from wan_vae.network.architecture import Block
from wan_vae.sharding.plan import ShardPlan


@dataclass(frozen=True)
class Exchange:
    """One exchange of boundary rows before a convolution, under its native name.

    `channels` and `scale` (rows and columns for each latent row) are those of its input;
    `frames(chunk)` says how many frames of it a chunk has. A rank needs `before` rows of the rank
    above and `after` rows of the rank below. `stage`: of the decoder, whose passes each have their
    own exchange; None where the chunk goes through whole.
    """

    name: str
    channels: int
    scale: int = 1
    time_scale: int = 1
    before: int = 1
    after: int = 1
    stage: int | None = None

    def frames(self, chunk: Chunk) -> int:
        """Frames of this layer's input for `chunk`; the video's first frame is never doubled."""
        n = chunk.frames * self.time_scale
        return n - (self.time_scale - 1) if chunk.is_first else n


def decoder_exchanges(config: WanVAEConfig) -> Iterator[Exchange]:
    """Every exchange of one chunk's pass through the decoder, in order."""
    yield Exchange(architecture.FIRST_CONV, config.z_dim)
    for block in architecture.middle_blocks(config):
        yield from _of_block(block, 1, 1)
    scale, time = 1, 1
    stages = architecture.stages(config)
    for i, stage in enumerate(stages):
        for block in stage.blocks:
            yield from _of_block(block, scale, time, i)
        if stage.up is not None:
            time *= 2 if stage.temporal else 1
            yield Exchange(stage.up.conv, stage.up.channels_in, scale, time, stage=i)
            scale *= 2
    yield Exchange(architecture.HEAD, stages[-1].channels, scale, time, stage=len(stages) - 1)


def _of_block(block: Block, scale: int, time: int, stage: int | None = None) -> Iterator[Exchange]:
    yield Exchange(block.conv1, block.channels_in, scale, time, stage=stage)
    yield Exchange(block.conv2, block.channels, scale, time, stage=stage)


def halo_bytes(
    config: WanVAEConfig, plan: ShardPlan, rank: int, chunk: Chunk, cross: int, itemsize: int
) -> int:
    """Bytes that `rank` receives from its neighbours while it decodes `chunk` of one video.

    `cross` is the latent size of the axis that is not cut. Attention's keys and values not counted.
    """
    if rank >= plan.active:
        return 0
    total = 0
    for exchange in decoder_exchanges(config):
        rows = exchange.before * (rank > 0) + exchange.after * (rank < plan.active - 1)
        numbers = exchange.channels * exchange.frames(chunk) * cross * exchange.scale * rows
        total += numbers * itemsize
    return total
