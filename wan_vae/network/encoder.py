"""The causal encoder: turns a chunk of pixels into a chunk of the latent.

As the decoder, in the other direction: first the *stages* that halve the picture, of which a row
sees only a few rows around it, so that a strip of the picture can go through them alone; then the
*trunk* at the latent's resolution (the last stage, attention, the head), which needs the whole
picture.

Features shrink on the way. A stage with large features takes a chunk in *passes* of
`Step.pass_frames` frames; what it makes of them is joined for the next stage, which takes more at a
time. Pixels are asked for pass by pass, so that the clip need not lie on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from itertools import accumulate

import torch
from torch import nn

from .. import layout
from ..chunking import Pass
from ..config import WanVAEConfig
from ..geometry import Strip, encoder_halos
from .architecture import EncoderStage, encoder_stages, middle_blocks
from .blocks import (
    Attention,
    AverageShortcut,
    CausalConv3d,
    Downsample,
    ResidualBlock,
    RMSNorm,
    Step,
    add,
    head,
    name_slots,
)

# Gives the pixels [B, 3, t, rows, W] of frames [first, last) of a chunk, on the device.
PixelSource = Callable[[int, int], torch.Tensor]


class DownStage(nn.Module):
    """Residual blocks and a down-sampler with Wan 2.2's shortcut around them."""

    def __init__(self, stage: EncoderStage):
        super().__init__()
        self.downsamples = nn.ModuleList(_layers(stage))
        self.shortcut = AverageShortcut(
            stage.channels_in,
            stage.channels,
            2 if stage.temporal else 1,
            1 if stage.down is None else 2,
        )

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        y = x
        for layer in self.downsamples:
            y = layer(y, step)
        shortcut: torch.Tensor = self.shortcut(x, step)
        return add(y, shortcut)


def _layers(stage: EncoderStage) -> list[nn.Module]:
    """The residual blocks of a stage and its down-sampler."""
    layers: list[nn.Module] = [ResidualBlock(b.channels_in, b.channels) for b in stage.blocks]
    if stage.down is not None:
        layers.append(Downsample(stage.down.channels, stage.down.temporal))
    return layers


class Encoder(nn.Module):
    """Encoder of Wan 2.1 and 2.2. Parameter names are native names without `encoder.`."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.config = config
        described = encoder_stages(config)
        self.conv1 = CausalConv3d(config.encoder_channels, described[0].channels_in)
        modules: list[list[nn.Module]] = [
            [DownStage(stage)] if stage.shortcut else _layers(stage) for stage in described
        ]
        self.downsamples = nn.ModuleList([module for layers in modules for module in layers])
        # As in the decoder: the layers of stage i are those from [i] to [i + 1].
        self._stage_starts = tuple(accumulate((len(layers) for layers in modules), initial=0))
        top = middle_blocks(config, "encoder")[0].channels
        self.middle = nn.ModuleList(
            [ResidualBlock(top, top), Attention(top), ResidualBlock(top, top)]
        )
        self.head = nn.ModuleDict({"0": RMSNorm(top), "2": CausalConv3d(top, 2 * config.z_dim)})
        name_slots(self, "encoder.")

    def trunk(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """Result of the stages [B, C, t, h, w] -> moments [B, 2z, t, h, w], of the whole picture.

        Frees `x` if the caller holds it no more.
        """
        for layer in (*self.downsamples[self._stage_starts[-2] :], *self.middle):
            x = layer(x, step)
        return head(self.head, x, step)

    def stages(
        self, pixels: PixelSource, frames: int, step: Step, strip: Strip | None = None
    ) -> Generator[None, None, torch.Tensor]:
        """All stages but the last: pixels of `frames` frames -> features [B, C, t, h, w].

        A generator: it yields after each pass through a stage, so that a run can stop, and returns
        the features. With a `strip`, `pixels` gives the rows of the strip with the halo of
        the first stage (`geometry.encoder_halos`), and the result is the strip's own latent rows.
        At an inner edge each convolution makes one more row wrong; these are cropped on the way.
        """
        part = Pass(0, frames, step.chunk)
        return (yield from self._through(self._last_stage, pixels, part, step, strip))

    def passes(self, frames: int, step: Step) -> Iterator[Pass]:
        """Those for which `stages` asks for pixels, in its order."""
        return Pass(0, frames, step.chunk).parts(self._last_stage, step.pass_frames, self.config)

    @property
    def _last_stage(self) -> int:
        """The last one of `stages`."""
        return len(self._stage_starts) - 3

    def _through(
        self, i: int, pixels: PixelSource, part: Pass, step: Step, strip: Strip | None
    ) -> Generator[None, None, torch.Tensor]:
        """The result of stages 0 to `i` for the frames of `part`."""
        passes = part.split(i, step.pass_frames, self.config)
        if len(passes) > 1:
            return (yield from self._joined(i, pixels, part, passes, step, strip))
        step = replace(step, chunk=part.chunk)
        if i:
            x = yield from self._through(i - 1, pixels, part, step, strip)
        else:
            x = patchify(pixels(part.first, part.last), self.config.patch_size)
            x = self.conv1(x, step)
        for layer in self.downsamples[self._stage_starts[i] : self._stage_starts[i + 1]]:
            x = layer(x, step)
        yield
        # A copy is dense for the layers that follow, and it frees the cropped rows.
        return x if strip is None else self._crop(x, strip, i).clone()

    def _joined(
        self,
        i: int,
        pixels: PixelSource,
        part: Pass,
        passes: list[Pass],
        step: Step,
        strip: Strip | None,
    ) -> Generator[None, None, torch.Tensor]:
        """`_through` of each pass, in one tensor."""
        whole: torch.Tensor | None = None
        done = 0
        for one in passes:
            y = yield from self._through(i, pixels, one, step, strip)
            if whole is None:
                shape = list(y.shape)
                shape[2] = part.at_stage(i + 1, self.config)
                whole = layout.empty_like_format(y, tuple(shape))
            whole[:, :, done : done + y.shape[2]] = y
            done += y.shape[2]
            del y  # before the next pass
        assert whole is not None and done == whole.shape[2]
        return whole

    def _crop(self, x: torch.Tensor, strip: Strip, stage: int) -> torch.Tensor:
        """Drop the rows of `x`, the result of `stage`, that the next stage does not need."""
        halos, scale = encoder_halos(self.config), 1 << (len(self._stage_starts) - 2 - stage)
        after = halos[stage + 1] if stage + 1 < len(halos) else 0
        return strip.crop(x, scale, halos[stage], scale // 2, after)


def patchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """[B, 3, T, H, W] -> [B, 3*p*p, T, H/p, W/p]; channel order is (colour, column, row)."""
    if patch == 1:
        return x
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t, h // patch, patch, w // patch, patch).permute(0, 1, 6, 4, 2, 3, 5)
    return x.reshape(b, c * patch**2, t, h // patch, w // patch)
