"""What decoder and encoder consist of: their layers in order, with channels and native names.

The network is built from this description, and the memory plan walks over it. Needs no PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..config import WanVAEConfig
from ..options import Part

# Native names of the layers that every decoder has once.
LATENT_CONV = "conv2"
FIRST_CONV = "decoder.conv1"
ATTENTION = "decoder.middle.1"
HEAD = "decoder.head.2"
# And of those that every encoder has once.
PIXEL_CONV = "encoder.conv1"
ENCODER_ATTENTION = "encoder.middle.1"
ENCODER_HEAD = "encoder.head.2"
MOMENTS_CONV = "conv1"


@dataclass(frozen=True)
class Block:
    """A residual block: two convolutions behind a norm and a shortcut around them."""

    name: str
    channels_in: int
    channels: int

    @property
    def conv1(self) -> str:
        """Name of the first 3x3x3 convolution."""
        return f"{self.name}.residual.2"

    @property
    def conv2(self) -> str:
        """Name of the second 3x3x3 convolution."""
        return f"{self.name}.residual.6"

    @property
    def shortcut(self) -> str | None:
        """Name of the 1x1x1 convolution of the shortcut; None where the widths are equal."""
        return None if self.channels_in == self.channels else f"{self.name}.shortcut"


@dataclass(frozen=True)
class Upsampler:
    """Doubles height and width and, if `temporal`, time; the result has `channels`."""

    name: str
    channels_in: int
    channels: int
    temporal: bool

    @property
    def time_conv(self) -> str | None:
        """Name of the 3x1x1 convolution that doubles time, if there is one."""
        return f"{self.name}.time_conv" if self.temporal else None

    @property
    def conv(self) -> str:
        """Name of the 3x3 convolution of the doubled picture."""
        return f"{self.name}.resample.1"


@dataclass(frozen=True)
class Stage:
    """Residual blocks of one resolution, and the up-sampler to the next (None in the last stage).

    shortcut: a parameter-free shortcut runs around the whole stage (Wan 2.2).
    """

    blocks: tuple[Block, ...]
    up: Upsampler | None
    shortcut: bool

    @property
    def channels_in(self) -> int:
        return self.blocks[0].channels_in

    @property
    def channels(self) -> int:
        """Channels between the blocks of this stage."""
        return self.blocks[-1].channels

    @property
    def temporal(self) -> bool:
        """Whether the next stage has twice as many frames."""
        return self.up is not None and self.up.temporal


@dataclass(frozen=True)
class Downsampler:
    """Halves height and width and, if `temporal`, time; the `channels` stay."""

    name: str
    channels: int
    temporal: bool

    @property
    def conv(self) -> str:
        """Name of the 3x3 convolution over every second pixel."""
        return f"{self.name}.resample.1"

    @property
    def time_conv(self) -> str | None:
        """Name of the 3x1x1 convolution over every second frame, if there is one."""
        return f"{self.name}.time_conv" if self.temporal else None


@dataclass(frozen=True)
class EncoderStage:
    """Residual blocks of one resolution, and the down-sampler to the next (None in the last stage).

    shortcut: a parameter-free shortcut runs around the whole stage (Wan 2.2).
    """

    blocks: tuple[Block, ...]
    down: Downsampler | None
    shortcut: bool

    @property
    def channels_in(self) -> int:
        return self.blocks[0].channels_in

    @property
    def channels(self) -> int:
        """Channels of its result."""
        return self.blocks[-1].channels

    @property
    def temporal(self) -> bool:
        """Whether the next stage has half as many frames."""
        return self.down is not None and self.down.temporal


def middle_blocks(config: WanVAEConfig, part: Part = "decoder") -> tuple[Block, Block]:
    """The residual blocks before and after the attention, at the latent's resolution."""
    channels = trunk_channels(config, part)
    return (
        Block(f"{part}.middle.0", channels, channels),
        Block(f"{part}.middle.2", channels, channels),
    )


def trunk_channels(config: WanVAEConfig, part: Part = "decoder") -> int:
    """Channels of features at the latent's resolution."""
    base = config.decoder_dim if part == "decoder" else config.dim
    return base * config.dim_mult[-1]


def stages(config: WanVAEConfig) -> tuple[Stage, ...]:
    """The stages of the decoder that follow its trunk, in order."""
    mult = config.dim_mult
    widths = [config.decoder_dim * m for m in (mult[-1], *reversed(mult))]
    temporal = (*reversed(config.temporal_downsample), False)
    found: list[Stage] = []
    layer = 0  # Wan 2.1 numbers the layers of all stages in one list
    for i, (channels_in, channels) in enumerate(pairwise(widths)):
        if config.residual_shortcuts:
            prefix, layer = f"decoder.upsamples.{i}.upsamples", 0
        else:
            prefix = "decoder.upsamples"
            # Each up-sampler halves the channels, so the stage after it starts from half.
            channels_in = channels_in // 2 if i else channels_in
        inputs = [channels_in, *[channels] * config.num_res_blocks]
        blocks = tuple(
            Block(f"{prefix}.{layer + n}", width, channels) for n, width in enumerate(inputs)
        )
        layer += len(blocks)
        up = None
        if i < len(mult) - 1:
            out = channels if config.residual_shortcuts else channels // 2
            up = Upsampler(f"{prefix}.{layer}", channels, out, temporal[i])
            layer += 1
        found.append(Stage(blocks, up, shortcut=config.residual_shortcuts and up is not None))
    return tuple(found)


def encoder_stages(config: WanVAEConfig) -> tuple[EncoderStage, ...]:
    """The stages of the encoder in order; the last one is at the latent's resolution."""
    widths = [config.dim * m for m in (1, *config.dim_mult)]
    found: list[EncoderStage] = []
    layer = 0  # as in `stages`
    for i, (channels_in, channels) in enumerate(pairwise(widths)):
        prefix = "encoder.downsamples"
        if config.residual_shortcuts:
            prefix, layer = f"{prefix}.{i}.downsamples", 0
        inputs = [channels_in, *[channels] * (config.num_res_blocks - 1)]
        blocks = tuple(
            Block(f"{prefix}.{layer + n}", width, channels) for n, width in enumerate(inputs)
        )
        layer += len(blocks)
        down = None
        if i < len(config.dim_mult) - 1:
            down = Downsampler(f"{prefix}.{layer}", channels, config.temporal_downsample[i])
            layer += 1
        found.append(EncoderStage(blocks, down, config.residual_shortcuts))
    return tuple(found)


def residual_convolutions(config: WanVAEConfig, part: Part = "decoder") -> tuple[str, ...]:
    """Names of the 3x3x3 convolutions of all residual blocks, which do most of the work."""
    described = stages(config) if part == "decoder" else encoder_stages(config)
    blocks = [*middle_blocks(config, part), *(b for stage in described for b in stage.blocks)]
    return tuple(name for block in blocks for name in (block.conv1, block.conv2))
