"""Where the decoder computes: every layer that a backend may take over, in order, with what its
kernel has to know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..blocks import Attention, ResidualBlock, Upsample
from ..decoder import UpStage
from ..model import WanVAEModel

Kind = Literal["latent", "normed", "head", "stream", "upsample", "attention"]


@dataclass(frozen=True)
class Site:
    """One layer. `frames`: how many it has for each latent frame of a steady chunk. `bias`: of a
    layer behind a norm.

    kind says where its input comes from: "latent" (the latent, or almost), "normed" (norm and
    SiLU, with `gamma`), "head" (the same; its result is the pixels), "stream" (features as blocks
    hand them on), "upsample" (features, doubled in height and width first), "attention" (norm;
    `weight` makes queries, keys and values and `projection` follows).
    """

    kind: Kind
    weight: torch.Tensor
    frames: int
    gamma: torch.Tensor | None = None
    projection: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def decoder_sites(model: WanVAEModel) -> Iterator[Site]:
    """Every convolution of a decode once, and its attention."""
    decoder, frames = model.decoder, 1
    yield Site("latent", model.conv2.weight, frames)
    yield Site("latent", decoder.conv1.weight, frames)
    for layer in (*decoder.middle, *_flat(decoder.upsamples)):
        if isinstance(layer, ResidualBlock):
            for norm, conv in layer.normed_convolutions():
                yield Site("normed", conv.weight, frames, norm.gamma, bias=conv.bias)
            if layer.shortcut is not None:
                yield Site("stream", layer.shortcut.weight, frames)
        elif isinstance(layer, Attention):
            yield Site(
                "attention", layer.to_qkv.weight, frames, layer.norm.gamma, layer.proj.weight
            )
        elif isinstance(layer, Upsample):
            if layer.time_conv is not None:
                yield Site("stream", layer.time_conv.weight, frames)
                frames *= 2
            yield Site("upsample", layer.resample["1"].weight, frames)
    norm, conv = decoder.head.values()
    yield Site("head", conv.weight, frames, norm.gamma, bias=conv.bias)


def _flat(layers: nn.ModuleList) -> Iterator[nn.Module]:
    for layer in layers:
        if isinstance(layer, UpStage):
            yield from layer.upsamples
        else:
            yield layer
