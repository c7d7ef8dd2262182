"""Kernels that compute nothing: layers that say what memory they take, and calls that take it.

For plans and counted decodes without a card. The sizes are those of our kernels on NVIDIA cards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from wan_vae.config import WanVAEConfig
from wan_vae.kernels.winograd import DIRECT, PAIRS, QUADS
from wan_vae.layout import LayoutCounter, to_format
from wan_vae.network import architecture
from wan_vae.network.model import WanVAEModel
from wan_vae.ops.eager import attention as eager_attention
from wan_vae.ops.eager import conv3d as eager_conv3d
from wan_vae.ops.eager import norm as eager_norm
from wan_vae.ops.eager import upsample as eager_upsample
from wan_vae.ops.opset import CallSize, HaloRows, OpSet, Workspace

TRANSFORMS = {1: DIRECT, 2: PAIRS, 4: QUADS}


@dataclass(frozen=True)
class FakeLayer:
    """A layer of `kind` "normed" (behind norm and SiLU), "head", "wide head", "attention", "pixels"
    or "plain".

    dtype: of features and of what the convolution reads (our kernels read float16, which is as
    large as bfloat16). frames_together: see `Prepared`; by Winograd.
    """

    family: str
    kernel: str
    kind: str
    channels_in: int
    channels: int
    dtype: torch.dtype
    frames_together: int = 1

    def workspace(self, size: CallSize) -> Workspace:
        if self.kind == "plain":
            return Workspace()
        pixels = size.batch * size.rows * size.cols
        frame = pixels * self.channels_in * self.dtype.itemsize
        if self.kind == "pixels":  # a copy with zero channels
            return Workspace(hidden_bytes=(size.frames + (0 if size.only_frame else 2)) * frame)
        if self.kind == "attention":
            return Workspace(size.frames * frame)
        hidden = 9 * 4 * pixels * size.frames * self.channels if self.kind == "head" else 0
        past = 0 if size.only_frame else 2
        return Workspace(self.operand_frames(size.frames, past) * frame, past * frame, hidden)

    def operand_frames(self, frames: int, past: int) -> int:
        """Frames of what the convolution reads."""
        return (TRANSFORMS[self.frames_together] if past else DIRECT).operand_frames(frames, past)


def fake_layers(
    config: WanVAEConfig,
    family: str,
    dtype: torch.dtype,
    covers: Callable[[str], bool] = lambda name: True,
    most_together: int = QUADS.frames,
) -> dict[str, FakeLayer]:
    """The layers of a decoder that kernels of `family` ("triton" or "cuda") run, by native name.

    Those of "cuda" use Winograd wherever a latent frame is several frames. covers: says which
    layers have a kernel. most_together: 2 for layers that make pairs where others make quads.
    """
    found: dict[str, FakeLayer] = {}
    plain = FakeLayer(family, "plain", "plain", 0, 0, dtype)

    def add_block(block: architecture.Block, together: int) -> None:
        for name, channels_in in ((block.conv1, block.channels_in), (block.conv2, block.channels)):
            found[name] = FakeLayer(
                family, "conv", "normed", channels_in, block.channels, dtype, together
            )
        if block.shortcut is not None:
            found[block.shortcut] = plain

    for name in (architecture.LATENT_CONV, architecture.FIRST_CONV):
        found[name] = plain
    c = architecture.trunk_channels(config)
    found[architecture.ATTENTION] = FakeLayer(family, "attention", "attention", c, c, dtype)
    for block in architecture.middle_blocks(config):
        add_block(block, 1)
    frames, stages = 1, architecture.stages(config)
    for stage in stages:
        for block in stage.blocks:
            add_block(block, min(frames, most_together) if family == "cuda" else 1)
        if stage.up is not None:
            found[stage.up.conv] = plain
            if stage.up.time_conv is not None:
                found[stage.up.time_conv], frames = plain, 2 * frames
    found[architecture.HEAD] = FakeLayer(
        family, "head", "head", stages[-1].channels, config.decoder_channels, dtype
    )
    return {name: layer for name, layer in found.items() if covers(name)}


def fake_encoder_layers(
    config: WanVAEConfig,
    family: str,
    dtype: torch.dtype,
    covers: Callable[[str], bool] = lambda name: True,
) -> dict[str, FakeLayer]:
    """`fake_layers` of an encoder. Those of "cuda" use Winograd above the latent's resolution."""
    stages = architecture.encoder_stages(config)
    plain = FakeLayer(family, "plain", "plain", 0, 0, dtype)
    found = {
        architecture.PIXEL_CONV: FakeLayer(family, "pixels", "pixels", 16, 0, dtype),
        architecture.MOMENTS_CONV: plain,
    }
    c = architecture.trunk_channels(config, "encoder")
    found[architecture.ENCODER_ATTENTION] = FakeLayer(family, "attention", "attention", c, c, dtype)
    head = FakeLayer(family, "head", "wide head", c, 2 * config.z_dim, dtype)
    found[architecture.ENCODER_HEAD] = head
    blocks, frames = [], config.temporal_factor
    for stage in stages:
        blocks += [(block, frames) for block in stage.blocks]
        frames //= 2 if stage.temporal else 1
    for block, together in (
        *blocks,
        *((b, 1) for b in architecture.middle_blocks(config, "encoder")),
    ):
        for name, channels_in in ((block.conv1, block.channels_in), (block.conv2, block.channels)):
            found[name] = FakeLayer(
                family,
                "conv",
                "normed",
                channels_in,
                block.channels,
                dtype,
                together if family == "cuda" else 1,
            )
        if block.shortcut is not None:
            found[block.shortcut] = plain
    for stage in stages:
        if stage.down is not None:
            found[stage.down.conv] = plain
            if stage.down.time_conv is not None:
                found[stage.down.time_conv] = plain
    return {name: layer for name, layer in found.items() if covers(name)}


def fake_ops(model: WanVAEModel, layers: Mapping[str, FakeLayer]) -> OpSet:
    """Operations that run the layers of `model` in `layers` without computing, the others eager."""
    return _FakeKernels(model, layers).ops


class _FakeKernels:
    """Allocates what our kernels allocate, converts what they convert, and fills nothing."""

    def __init__(self, model: WanVAEModel, layers: Mapping[str, FakeLayer]):
        self._layers: dict[int, FakeLayer] = {}
        for name, parameter in model.named_parameters():
            owner = name.rpartition(".")[0]
            for attention in (architecture.ATTENTION, architecture.ENCODER_ATTENTION):
                if owner.startswith(attention):
                    owner = attention
            if owner in layers and not name.endswith("bias"):
                self._layers[id(parameter)] = layers[owner]
        self._has_attention = not layers.keys().isdisjoint(
            (architecture.ATTENTION, architecture.ENCODER_ATTENTION)
        )
        self.ops = replace(
            OpSet(),
            norm=self._norm,
            conv3d=self._conv3d,
            conv2d=self._conv2d,
            upsample_conv2d=self._upsample_conv2d,
            attention=self._attention,
            fused_conv=self._fused_conv,
            layers=layers,
        )

    def _norm(self, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        if id(gamma) not in self._layers:
            return eager_norm.rms_norm(x, gamma)
        return torch.empty_like(x.contiguous(memory_format=torch.channels_last))

    def _conv3d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        counter: LayoutCounter,
        **options,
    ) -> torch.Tensor:
        if id(weight) not in self._layers:
            return eager_conv3d.conv3d(x, weight, bias, counter, **options)
        layer = self._layers[id(weight)]
        # A copy with more channels is of the right format, and held until there is a result.
        if layer.kind == "pixels":
            read = _empty(x, layer.channels_in, x.shape[2])
        else:
            read = to_format(x, "channels_last_3d")
        past = 0 if options.get("last_slice") else weight.shape[2] - 1
        step, _, _ = options.get("stride", (1, 1, 1))
        frames = (x.shape[2] - past + step - 1) // step
        return _empty(read, len(weight), frames)

    def _conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        counter: LayoutCounter,
        **options,
    ) -> torch.Tensor:
        if id(weight) not in self._layers:
            return eager_conv3d.conv2d(x, weight, bias, counter, **options)
        x = to_format(x, "channels_last_3d")
        step = options.get("stride", 1)
        return _empty(x[:, :, None, ::step, ::step], len(weight), 1)[:, :, 0]

    def _upsample_conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        counter: LayoutCounter,
        **options,
    ) -> torch.Tensor:
        if id(weight) not in self._layers:
            return eager_upsample.upsample_conv2d(x, weight, bias, counter, **options)
        x = to_format(x, "channels_last_3d")
        n, _, h, w = x.shape
        return x.new_empty((n, 2 * h, 2 * w, len(weight))).permute(0, 3, 1, 2)

    def _attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not self._has_attention:
            return eager_attention.attention(q, k, v)
        return q.new_empty(q.shape)

    def _fused_conv(self, weight: torch.Tensor) -> _FakeFused | None:
        layer = self._layers.get(id(weight))
        return None if layer is None else _FakeFused(layer)


class _FakeFused:
    """Norm, SiLU and join, then the convolution: a `FusedConv`."""

    def __init__(self, layer: FakeLayer):
        self._layer = layer

    def operand(
        self,
        x: torch.Tensor,
        history: torch.Tensor | None,
        *,
        only_frame: bool,
        keep: bool,
        overwrite: bool = False,
        halo: HaloRows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        c, past = x.shape[1], 0 if only_frame else 2
        frames = self._layer.operand_frames(x.shape[2], past)
        operand = _empty(x, c, frames)
        if keep and not overwrite:
            history = _empty(x, c, past)
        return operand, history if keep else None

    def convolve(
        self,
        operand: torch.Tensor,
        frames: int,
        residual: torch.Tensor | None,
        *,
        padding: tuple[int, int],
        only_frame: bool,
    ) -> torch.Tensor:
        layer = self._layer
        if layer.kind == "head":
            b, _, _, h, w = operand.shape
            size = (b, layer.channels, frames, h, w)
            partial = operand.new_empty((9, *size), dtype=torch.float32)
            return partial.new_empty(size)
        if layer.kind == "wide head":
            b, _, _, h, w = operand.shape
            return operand.new_empty((b, layer.channels, frames, h, w), dtype=torch.float32)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last_3d)
        return _empty(operand, layer.channels, frames)


def _empty(x: torch.Tensor, channels: int, frames: int) -> torch.Tensor:
    """An NDHWC tensor of the size of `x` [B, C, T, H, W] but for channels and frames."""
    b, _, _, h, w = x.shape
    return x.new_empty((b, frames, h, w, channels)).permute(0, 4, 1, 2, 3)
