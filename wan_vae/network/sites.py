"""Where decoder and encoder compute: every layer that a backend may take over, in order, with what
its kernel has to know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .blocks import Attention, Downsample, ResidualBlock, Upsample
from .decoder import UpStage
from .encoder import DownStage
from .model import WanVAEModel

Kind = Literal[
    "latent", "normed", "head", "stream", "upsample", "attention", "pixels", "strided", "moments"
]


@dataclass(frozen=True)
class Site:
    """One layer. `frames`: how many it has for each latent frame of a steady chunk. `bias`: of a
    layer behind a norm or of an up-sampler.

    kind says where its input comes from: "latent" (the latent, or almost), "normed" (norm and
    SiLU, with `gamma`), "head" (the same; its result is float32: the pixels, or almost the latent),
    "stream" (features as blocks hand them on), "upsample" (features, doubled in height and width
    first), "attention" (norm; `weight` makes queries, keys and values and `projection` follows),
    "pixels" (an encode's input), "strided" (features; every second pixel is made if `weight` is
    4-D, every second frame if it is 5-D), "moments" (the result of an encode's head).
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
        yield from _block_sites(layer, frames)
        if isinstance(layer, Upsample):
            if layer.time_conv is not None:
                yield Site("stream", layer.time_conv.weight, frames)
                frames *= 2
            conv = layer.resample["1"]
            yield Site("upsample", conv.weight, frames, bias=conv.bias)
    norm, conv = decoder.head.values()
    yield Site("head", conv.weight, frames, norm.gamma, bias=conv.bias)


def encoder_sites(model: WanVAEModel) -> Iterator[Site]:
    """Every convolution of an encode once, and its attention. `model` must have an encoder."""
    encoder, frames = model.encoder, model.config.temporal_factor
    yield Site("pixels", encoder.conv1.weight, frames)
    for layer in (*_flat(encoder.downsamples), *encoder.middle):
        yield from _block_sites(layer, frames)
        if isinstance(layer, Downsample):
            yield Site("strided", layer.resample["1"].weight, frames)
            if layer.time_conv is not None:
                frames //= 2
                yield Site("strided", layer.time_conv.weight, frames)
    norm, conv = encoder.head.values()
    yield Site("head", conv.weight, frames, norm.gamma, bias=conv.bias)
    yield Site("moments", model.conv1.weight, frames)


def _block_sites(layer: nn.Module, frames: int) -> Iterator[Site]:
    """The sites of a residual block or an attention; none of any other layer."""
    if isinstance(layer, ResidualBlock):
        for norm, conv in layer.normed_convolutions():
            yield Site("normed", conv.weight, frames, norm.gamma, bias=conv.bias)
        if layer.shortcut is not None:
            yield Site("stream", layer.shortcut.weight, frames)
    elif isinstance(layer, Attention):
        yield Site("attention", layer.to_qkv.weight, frames, layer.norm.gamma, layer.proj.weight)


def _flat(layers: nn.ModuleList) -> Iterator[nn.Module]:
    for layer in layers:
        if isinstance(layer, UpStage):
            yield from layer.upsamples
        elif isinstance(layer, DownStage):
            yield from layer.downsamples
        else:
            yield layer
