"""The causal encoder: turns a chunk of pixels into a chunk of the latent."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from ..config import WanVAEConfig
from .blocks import (
    Attention,
    AverageShortcut,
    CausalConv3d,
    Downsample,
    ResidualBlock,
    RMSNorm,
    Step,
    head,
    name_slots,
)


class DownStage(nn.Module):
    """Residual blocks and a down-sampler with Wan 2.2's shortcut around them."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, down: bool, temporal: bool
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        layers: list[nn.Module] = [ResidualBlock(a, b) for a, b in pairwise(widths)]
        if down:
            layers.append(Downsample(out_channels, temporal))
        self.downsamples = nn.ModuleList(layers)
        self.shortcut = AverageShortcut(
            in_channels, out_channels, 2 if temporal else 1, 2 if down else 1
        )

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        y = x
        for layer in self.downsamples:
            y = layer(y, step)
        shortcut: torch.Tensor = self.shortcut(x, step)
        return y + shortcut


class Encoder(nn.Module):
    """Encoder of Wan 2.1 and 2.2. Parameter names are native names without `encoder.`."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.config = config
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        temporal_down = (*config.temporal_downsample, False)
        self.conv1 = CausalConv3d(config.image_channels, widths[0])
        layers: list[nn.Module] = []
        for i, (width, out) in enumerate(pairwise(widths)):
            down = i < len(config.dim_mult) - 1
            if config.residual_shortcuts:
                blocks = config.num_res_blocks
                layers.append(DownStage(width, out, blocks, down, temporal_down[i]))
                continue
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(width, out))
                width = out
            if down:
                layers.append(Downsample(out, temporal_down[i]))
        self.downsamples = nn.ModuleList(layers)
        top = widths[-1]
        self.middle = nn.ModuleList(
            [ResidualBlock(top, top), Attention(top), ResidualBlock(top, top)]
        )
        self.head = nn.ModuleDict({"0": RMSNorm(top), "2": CausalConv3d(top, 2 * config.z_dim)})
        name_slots(self, "encoder.")

    def forward(self, pixels: torch.Tensor, step: Step) -> torch.Tensor:
        """Pixels [B, 3, T, H, W] -> moments [B, 2z, t, h, w] before conv1 of the VAE."""
        x = self.conv1(patchify(pixels, self.config.patch_size), step)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, step)
        return head(self.head, x, step)


def patchify(x: torch.Tensor, patch: int) -> torch.Tensor:
    """[B, 3, T, H, W] -> [B, 3*p*p, T, H/p, W/p]; channel order is (colour, column, row)."""
    if patch == 1:
        return x
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t, h // patch, patch, w // patch, patch).permute(0, 1, 6, 4, 2, 3, 5)
    return x.reshape(b, c * patch**2, t, h // patch, w // patch)
