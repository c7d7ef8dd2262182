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
from itertools import accumulate, pairwise

import torch
from torch import nn

from ..config import WanVAEConfig
from ..geometry import Strip, strip_halos
from .blocks import (
    Attention,
    CausalConv3d,
    DuplicateShortcut,
    ResidualBlock,
    RMSNorm,
    Step,
    Upsample,
    add,
    name_slots,
    norm_silu_conv,
)


class UpStage(nn.Module):
    """Residual blocks and an up-sampler with Wan 2.2's shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, up: bool, temporal: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        layers: list[nn.Module] = [ResidualBlock(a, b) for a, b in pairwise(widths)]
        if up:
            layers.append(Upsample(out_channels, out_channels, temporal))
        self.upsamples = nn.ModuleList(layers)
        self.shortcut = (
            DuplicateShortcut(in_channels, out_channels, 2 if temporal else 1, 2) if up else None
        )

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        y = x
        for layer in self.upsamples:
            y = layer(y, step)
        return y if self.shortcut is None else add(y, self.shortcut(x, step))


class Decoder(nn.Module):
    """Decoder of Wan 2.1 and 2.2. Parameter names are native names without `decoder.`."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.config = config
        base, mult = config.decoder_dim, config.dim_mult
        widths = [base * m for m in (mult[-1], *reversed(mult))]
        temporal_up = (*reversed(config.temporal_downsample), False)
        blocks = config.num_res_blocks + 1
        self.conv1 = CausalConv3d(config.z_dim, widths[0])
        self.middle = nn.ModuleList(
            [
                ResidualBlock(widths[0], widths[0]),
                Attention(widths[0]),
                ResidualBlock(widths[0], widths[0]),
            ]
        )
        stages: list[list[nn.Module]] = []
        for i, out in enumerate(widths[1:]):
            up = i < len(mult) - 1
            if config.residual_shortcuts:
                stages.append([UpStage(widths[i], out, blocks, up, temporal_up[i])])
                continue
            # Wan 2.1's up-samplers halve the channels, so the next stage starts with half of them.
            width = widths[i] if i == 0 else widths[i] // 2
            layers: list[nn.Module] = []
            for _ in range(blocks):
                layers.append(ResidualBlock(width, out))
                width = out
            if up:
                layers.append(Upsample(out, out // 2, temporal_up[i]))
            stages.append(layers)
        self.upsamples = nn.ModuleList([layer for layers in stages for layer in layers])
        # Stage i has the layers from _stage_starts[i] up to _stage_starts[i + 1].
        self._stage_starts = tuple(accumulate((len(layers) for layers in stages), initial=0))
        self.head = nn.ModuleDict(
            {"0": RMSNorm(widths[-1]), "2": CausalConv3d(widths[-1], config.image_channels)}
        )
        name_slots(self, "decoder.")

    def forward(self, z: torch.Tensor, step: Step) -> torch.Tensor:
        """Result of conv2 [B, z, T, H, W] -> pixels [B, 3, T', H', W'], not clamped."""
        return self.stages(self.trunk(z, step), step)

    def trunk(self, z: torch.Tensor, step: Step) -> torch.Tensor:
        """[B, z, T, H, W] -> features [B, C, T, H, W]; needs the whole picture (attention)."""
        x = self.conv1(z, step)
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
        norm, conv = self.head.values()
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
            x = norm_silu_conv(x, norm, conv, part)
            x = x if strip is None else self._crop(x, strip, i, None)
            x = unpatchify(x, self.config.patch_size)
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
    """How many of `frames` frames of features enter `stage` in the next pass.

    If they do not all enter together, the first frame of the video goes alone. Where a latent frame
    is several frames, an even number of frames then remains, because some kernels work on pairs.
    """
    if not step.pass_frames or frames <= step.pass_frames[stage]:
        return frames
    return 1 if step.chunk.is_first else step.pass_frames[stage]


def unpatchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """[B, 3*p*p, T, H, W] -> [B, 3, T, H*p, W*p]; channel order is (colour, column, row)."""
    if patch == 1:
        return x
    b, c, t, h, w = x.shape
    x = x.reshape(b, c // patch**2, patch, patch, t, h, w).permute(0, 1, 4, 5, 3, 6, 2)
    return x.reshape(b, c // patch**2, t, h * patch, w * patch)
