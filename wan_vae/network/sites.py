"""Every layer of decoder and encoder that a kernel may run: native name, problem and weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..ops.problem import (
    AttentionProblem,
    ConvProblem,
    HeadProblem,
    LayerSite,
    LayerWeights,
    NormConvProblem,
    Problem,
    Source,
    StridedProblem,
    UpsampleProblem,
)
from ..options import Part
from ..walk import named_modules
from .blocks import (
    Attention,
    CausalConv3d,
    Conv2d,
    Downsample,
    ResidualBlock,
    RMSNorm,
    Upsample,
)
from .decoder import UpStage
from .encoder import DownStage
from .model import WanVAEModel


def layer_sites(model: WanVAEModel, part: Part, only_frame: bool = False) -> Iterator[LayerSite]:
    """The layers of `part` of `model`, each once, in the order in which they run.

    The dtype of the weights is that of the features. `only_frame`: the video has one frame.
    """
    make = decoder_sites if part == "decoder" else encoder_sites
    return make(model, only_frame)


def decoder_sites(model: WanVAEModel, only_frame: bool = False) -> Iterator[LayerSite]:
    """The layers of a decode; see `layer_sites`."""
    sites, decoder = _Sites(model, only_frame), model.decoder
    yield sites.conv(model.conv2, "latent")
    yield sites.conv(decoder.conv1, "latent")
    for layer in (*decoder.middle, *_flat(decoder.upsamples)):
        yield from sites.block(layer)
        if isinstance(layer, Upsample):
            if layer.time_conv is not None:
                yield sites.conv(layer.time_conv, "features")
                sites.double_time()
            yield sites.upsample(layer)
    yield sites.head(decoder.head)


def encoder_sites(model: WanVAEModel, only_frame: bool = False) -> Iterator[LayerSite]:
    """The layers of an encode; see `layer_sites`. Raises ValueError without an encoder."""
    encoder, last = model.encoder, model.conv1
    if encoder is None or last is None:
        raise ValueError("the model has no encoder")
    sites = _Sites(model, only_frame, frames=model.config.temporal_factor)
    yield sites.conv(encoder.conv1, "pixels")
    for layer in (*_flat(encoder.downsamples), *encoder.middle):
        yield from sites.block(layer)
        if isinstance(layer, Downsample):
            conv = layer.resample["1"]
            assert isinstance(conv, Conv2d)
            yield sites.strided(conv)
            if layer.time_conv is not None:
                yield sites.strided(layer.time_conv)
                sites.halve_time()
    yield sites.head(encoder.head)
    yield sites.conv(last, "latent", out_dtype=torch.float32)


class _Sites:
    """Makes the sites of one model; knows how many frames a latent frame is at this layer."""

    def __init__(self, model: WanVAEModel, only_frame: bool, frames: int = 1):
        self.names = {id(module): name for name, module in named_modules(model)}
        self.dtype = model.conv2.weight.dtype
        self.only_frame = only_frame
        self.frames = 1 if only_frame else frames

    def double_time(self) -> None:
        self.frames *= 1 if self.only_frame else 2

    def halve_time(self) -> None:
        self.frames //= 1 if self.only_frame else 2

    def site(self, module: nn.Module, problem: Problem, weights: LayerWeights) -> LayerSite:
        return LayerSite(self.names[id(module)], problem, weights)

    def conv(
        self, conv: CausalConv3d, source: Source, out_dtype: torch.dtype | None = None
    ) -> LayerSite:
        out, channels = conv.weight.shape[:2]
        problem = ConvProblem(
            source,
            channels,
            out,
            conv.kernel,
            self.dtype,
            out_dtype or self.dtype,
            self.frames,
            self.only_frame,
        )
        return self.site(conv, problem, LayerWeights(conv.weight, conv.bias))

    def norm_conv(self, norm: RMSNorm, conv: CausalConv3d) -> LayerSite:
        out, channels = conv.weight.shape[:2]
        problem = NormConvProblem(channels, out, self.dtype, self.frames, self.only_frame)
        return self.site(conv, problem, LayerWeights(conv.weight, conv.bias, norm.gamma))

    def head(self, layers: nn.ModuleDict) -> LayerSite:
        norm, conv = layers.values()
        assert isinstance(norm, RMSNorm)
        assert isinstance(conv, CausalConv3d)
        out, channels = conv.weight.shape[:2]
        problem = HeadProblem(channels, out, self.dtype, self.frames, self.only_frame)
        return self.site(conv, problem, LayerWeights(conv.weight, conv.bias, norm.gamma))

    def upsample(self, layer: Upsample) -> LayerSite:
        conv = layer.resample["1"]
        assert isinstance(conv, Conv2d)
        out, channels = conv.weight.shape[:2]
        problem = UpsampleProblem(channels, out, self.dtype, self.frames)
        return self.site(conv, problem, LayerWeights(conv.weight, conv.bias))

    def strided(self, conv: Conv2d | CausalConv3d) -> LayerSite:
        out, channels = conv.weight.shape[:2]
        kernel = (1, 3, 3) if isinstance(conv, Conv2d) else conv.kernel
        problem = StridedProblem(channels, out, kernel, self.dtype)
        return self.site(conv, problem, LayerWeights(conv.weight, conv.bias))

    def block(self, layer: nn.Module) -> Iterator[LayerSite]:
        """The sites of a residual block or of an attention; none of any other layer."""
        if isinstance(layer, ResidualBlock):
            for norm, conv in layer.normed_convolutions():
                yield self.norm_conv(norm, conv)
            if layer.shortcut is not None:
                yield self.conv(layer.shortcut, "features")
        elif isinstance(layer, Attention):
            qkv, projection = layer.to_qkv, layer.proj
            weights = LayerWeights(qkv.weight, qkv.bias, layer.norm.gamma, projection.weight)
            problem = AttentionProblem(qkv.weight.shape[1], self.dtype)
            yield self.site(layer, problem, weights)


def _flat(layers: nn.ModuleList) -> Iterator[nn.Module]:
    for layer in layers:
        if isinstance(layer, UpStage):
            yield from layer.upsamples
        elif isinstance(layer, DownStage):
            yield from layer.downsamples
        else:
            yield layer
