"""The causal decoder: turns a chunk of the latent into a chunk of pixels.

It has two parts. The *trunk*, at latent resolution, needs the whole picture, because attention sees
all pixels. The *stages* after it need only a few rows around each pixel, so a strip of the picture
can be finished alone, from a crop of the trunk's features with enough halo.

Features grow on the way. In the trunk, a latent frame is too small to fill a large device; in the
last stage, it takes gigabytes. So a whole chunk goes through the trunk at once, and through each
stage in *passes* of `Step.pass_frames` frames. Each pass goes on to the end before the next starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

import torch
from torch import nn

from ..chunking import next_pass
from ..config import WanVAEConfig
from ..geometry import Strip, strip_halos
from .architecture import Stage, middle_blocks, stages
from .blocks import (
    Attention,
    CausalConv3d,
    DuplicateShortcut,
    ResidualBlock,
    RMSNorm,
    Step,
    Upsample,
    add,
    head,
    name_slots,
)


class UpStage(nn.Module):
    """Residual blocks and an up-sampler with Wan 2.2's shortcut around them."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.upsamples = nn.ModuleList(_layers(stage))
        self.shortcut = (
            DuplicateShortcut(stage.channels_in, stage.channels, 2 if stage.temporal else 1, 2)
            if stage.shortcut
            else None
        )

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        y = x
        for layer in self.upsamples:
            y = layer(y, step)
        return y if self.shortcut is None else add(y, self.shortcut(x, step))


def _layers(stage: Stage) -> list[nn.Module]:
    """The residual blocks of a stage and its up-sampler."""
    layers: list[nn.Module] = [ResidualBlock(b.channels_in, b.channels) for b in stage.blocks]
    if stage.up is not None:
        layers.append(Upsample(stage.up.channels_in, stage.up.channels, stage.up.temporal))
    return layers


class Decoder(nn.Module):
    """Decoder of Wan 2.1 and 2.2. Parameter names are native names without `decoder.`."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.config = config
        first, last = middle_blocks(config)
        self.conv1 = CausalConv3d(config.z_dim, first.channels_in)
        self.middle = nn.ModuleList(
            [
                ResidualBlock(first.channels_in, first.channels),
                Attention(first.channels),
                ResidualBlock(last.channels_in, last.channels),
            ]
        )
        described = stages(config)
        modules: list[list[nn.Module]] = [
            [UpStage(stage)] if config.residual_shortcuts else _layers(stage) for stage in described
        ]
        self.upsamples = nn.ModuleList([module for layers in modules for module in layers])
        # The layers of stage i are those from _stage_starts[i] to _stage_starts[i + 1].
        self._stage_starts = tuple(accumulate((len(layers) for layers in modules), initial=0))
        channels = described[-1].channels
        self.head = nn.ModuleDict(
            {"0": RMSNorm(channels), "2": CausalConv3d(channels, config.decoder_channels)}
        )
        name_slots(self, "decoder.")

    def forward(self, z: torch.Tensor, step: Step) -> torch.Tensor:
        """Result of conv2 [B, z, T, H, W] -> pixels [B, 3, T', H', W'], not clamped."""
        return self.stages(self.trunk(z, step), step)

    def trunk(self, z: torch.Tensor, step: Step) -> torch.Tensor:
        """[B, z, T, H, W] -> features [B, C, T, H, W]; needs the whole picture (attention)."""
        x: torch.Tensor = self.conv1(z, step)
        for layer in self.middle:
            x = layer(x, step)
        return x

    def stages(self, x: torch.Tensor, step: Step, strip: Strip | None = None) -> torch.Tensor:
        """Features -> pixels [B, 3, T', H', W'], not clamped. Joins all `passes`."""
        return join_passes(self.passes(x, step, strip))

    def passes(
        self, x: torch.Tensor, step: Step, strip: Strip | None = None
    ) -> Iterator[torch.Tensor]:
        """Features -> pixels [B, 3, t, H', W'] of each pass, in order, not clamped.

        With a `strip`, `x` holds the rows `strip.halo_start : strip.halo_stop` of the trunk's
        features, and the result is the strip's own pixel rows. At an inner edge, where the picture
        continues, each convolution pads with zeros and makes one more row wrong. The halo is as
        deep as the convolutions that follow, and the wrong rows are cropped on the way.
        """
        # Work stack of (stage, features, step). Nothing else holds a reference, and `x` is rebound,
        # so each tensor is freed as soon as it is consumed.
        pending = [(0, x, step)]
        del x
        while pending:
            i, x, part = pending.pop()
            frames = first_pass(x.shape[2], i, part)
            if frames < x.shape[2]:
                now, later = part.chunk.split()
                # A copy: a view would keep all frames alive until the last of them is done.
                pending.append((i, x[:, :, frames:].clone(), replace(part, chunk=later)))
                x, part = x[:, :, :frames], replace(part, chunk=now)
            for layer in self.upsamples[self._stage_starts[i] : self._stage_starts[i + 1]]:
                x = layer(x, part)
            if i + 2 < len(self._stage_starts):
                # A copy is dense for the layers that follow, and it frees the cropped rows.
                x = x if strip is None else self._crop(x, strip, i, i + 1).clone()
                pending.append((i + 1, x, part))
                continue
            x = head(self.head, x, part)
            x = x if strip is None else self._crop(x, strip, i, None)
            x = unpatchify(x, self.config.decoder_patch_size, self.config.rows_first)
            yield x

    def _crop(self, x: torch.Tensor, strip: Strip, stage: int, after: int | None) -> torch.Tensor:
        """Drop the rows of `x`, the result of `stage`, that are not needed later.

        `after` is the next stage, or None if `x` are the pixels.
        """
        halos = strip_halos(self.config)
        if after is None:
            return strip.crop(x, 2**stage, halos[stage], 2**stage, 0)
        return strip.crop(x, 2**stage, halos[stage], 2**after, halos[after])


def join_passes(passes: Iterator[torch.Tensor]) -> torch.Tensor:
    """Join the pixels [B, 3, t, H, W] of all passes; a single pass is not copied."""
    found = list(passes)
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def first_pass(frames: int, stage: int, step: Step) -> int:
    """How many of `frames` frames of features enter `stage` in the next pass; see `next_pass`."""
    chunk = step.chunk
    return next_pass(frames, stage, step.pass_frames, step.pass_ends, chunk.is_first, chunk.is_last)


def unpatchify(x: torch.Tensor, patch: int, rows_first: bool = False) -> torch.Tensor:
    """[B, 3*p*p, T, H, W] -> [B, 3, T, H*p, W*p]; channel order is (colour, column, row).

    rows_first: it is (colour, row, column), as in `torch.nn.functional.pixel_shuffle`.
    """
    if patch == 1:
        return x
    b, c, t, h, w = x.shape
    row, column = (2, 3) if rows_first else (3, 2)
    x = x.reshape(b, c // patch**2, patch, patch, t, h, w).permute(0, 1, 4, 5, row, 6, column)
    return x.reshape(b, c // patch**2, t, h * patch, w * patch)
