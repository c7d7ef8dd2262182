"""Layers as the Triton kernels run them: each holds the weights that its kernel reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ... import layout
from ...layout import LayoutCounter
from ...ops.opset import CallSize, HaloRows, Workspace
from ..kernel import NormCall
from ..weights import filled_channels, fit_channels
from .attention import attention
from .configs import AttentionConfig, ConvConfig, HeadConfig, StridedConfig
from .conv3d import ConvOperands, Launch, UpsampleOperands, conv3d, folded_upsample
from .head import HeadOperands, head_conv
from .norm import norm_silu_join
from .strided import StridedOperands, strided_conv3d

# Operands behind a norm.
OPERAND = torch.float16


@dataclass(frozen=True)
class TritonLayer:
    """What all of them say of themselves."""

    kernel: str
    config: str

    @property
    def family(self) -> str:
        """ "triton"."""
        return "triton"

    @property
    def frames_together(self) -> int:
        """See `Prepared`: each frame by itself."""
        return 1


@dataclass(frozen=True)
class TritonConv(TritonLayer):
    """A convolution alone. weight: dense channels_last_3d, in the dtype of the operand.

    is_copied: whether the input comes in another dtype or with too few channels. precision: from
    `precision_of`.
    """

    weight: torch.Tensor
    out_dtype: torch.dtype
    is_copied: bool
    tile: ConvConfig
    launch: Launch
    precision: str | None = None

    @property
    def operand_dtype(self) -> torch.dtype:
        """See `ConvLayer`."""
        return self.weight.dtype

    def run(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        counter: LayoutCounter,
        padding: tuple[int, int],
        last_slice: bool,
    ) -> torch.Tensor:
        """See `ConvLayer`."""
        x = fit_channels(x, self.weight.dtype)
        x = layout.match_input(x, self.weight, counter)
        x = layout.to_format(x, "channels_last_3d")
        operands = ConvOperands(
            x, self.weight, bias, None, padding, last_slice, self.out_dtype, self.precision
        )
        return conv3d(operands, self.tile, self.launch)

    def workspace(self, size: CallSize) -> Workspace:
        """The copy of its input, with history, where one is made."""
        if not self.is_copied:
            return Workspace()
        past = 0 if size.only_frame else self.weight.shape[2] - 1
        channels = filled_channels(self.weight.shape[1])
        numbers = channels * size.batch * (size.frames + past) * size.rows * size.cols
        return Workspace(hidden_bytes=numbers * self.weight.itemsize)


@dataclass(frozen=True)
class _BehindNorm(TritonLayer):
    """Norm and SiLU, joined with the history of a causal 3x3x3 convolution.

    scale: from `weights.norm_scale`; bias: float32.
    """

    scale: torch.Tensor
    bias: torch.Tensor

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
        """See `FusedConv`."""
        past = 0 if only_frame else 2
        return norm_silu_join(
            NormCall(x, self.scale, history, past, keep, OPERAND, True, overwrite, halo)
        )

    def workspace(self, size: CallSize) -> Workspace:
        """The operand behind its history, and the two frames that are kept."""
        past = 0 if size.only_frame else 2
        channels = self.scale.shape[0]
        frame = channels * size.batch * size.rows * size.cols * OPERAND.itemsize
        return Workspace((size.frames + past) * frame, past * frame)


@dataclass(frozen=True)
class TritonNormConv(_BehindNorm):
    """A 3x3x3 convolution behind norm and SiLU. weight: dense channels_last_3d."""

    weight: torch.Tensor
    out_dtype: torch.dtype
    tile: ConvConfig
    launch: Launch

    def convolve(
        self,
        operand: torch.Tensor,
        frames: int,
        residual: torch.Tensor | None,
        *,
        padding: tuple[int, int],
        only_frame: bool,
    ) -> torch.Tensor:
        """See `FusedConv`. The result has dtype `out_dtype`."""
        operands = ConvOperands(
            operand, self.weight, self.bias, residual, padding, only_frame, self.out_dtype
        )
        return conv3d(operands, self.tile, self.launch)


@dataclass(frozen=True)
class TritonHead(_BehindNorm):
    """The narrow head. packed: from `head.pack_head`."""

    packed: torch.Tensor
    out_channels: int
    tile: HeadConfig

    def convolve(
        self,
        operand: torch.Tensor,
        frames: int,
        residual: torch.Tensor | None,
        *,
        padding: tuple[int, int],
        only_frame: bool,
    ) -> torch.Tensor:
        """See `FusedConv`. The result is float32."""
        operands = HeadOperands(
            operand, self.packed, self.bias, self.out_channels, padding, only_frame
        )
        y = head_conv(operands, self.tile)
        return y if residual is None else y + residual

    def workspace(self, size: CallSize) -> Workspace:
        """Also the partial sums of nine taps, in float32."""
        joined = super().workspace(size)
        pixels = size.batch * size.frames * size.rows * size.cols
        return Workspace(
            joined.operand_bytes, joined.history_bytes, 9 * self.out_channels * pixels * 4
        )


@dataclass(frozen=True)
class TritonUpsample(TritonLayer):
    """An up-sampler's convolution, with the doubling folded into its weight."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    tile: ConvConfig
    launch: Launch

    def run(self, x: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
        """See `UpsampleLayer`."""
        x = layout.to_format(x, "channels_last_3d")
        operands = UpsampleOperands(x, self.weight, self.bias, padding)
        return folded_upsample(operands, self.tile, self.launch)

    def workspace(self, size: CallSize) -> Workspace:
        """Nothing: the doubled picture does not exist."""
        return Workspace()


@dataclass(frozen=True)
class TritonStrided(TritonLayer):
    """A down-sampler's convolution. weight: [O, C, kT, kH, kW], dense channels_last_3d."""

    weight: torch.Tensor
    stride: tuple[int, int, int]
    tile: StridedConfig
    precision: str | None

    def run(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        counter: LayoutCounter,
        pad_after: tuple[int, int],
    ) -> torch.Tensor:
        """See `StridedLayer`."""
        x = layout.match_input(x.to(self.weight.dtype), self.weight, counter)
        x = layout.to_format(x, "channels_last_3d")
        operands = StridedOperands(x, self.weight, bias, self.stride, pad_after, self.precision)
        return strided_conv3d(operands, self.tile)

    def workspace(self, size: CallSize) -> Workspace:
        """Nothing: padding is not made in memory."""
        return Workspace()


@dataclass(frozen=True)
class TritonAttention(TritonLayer):
    """Norm, queries / keys / values, attention and projection. scale: from `norm_scale`."""

    scale: torch.Tensor
    qkv: TritonConv
    projection: TritonConv
    tile: AttentionConfig
    with_descriptors: bool

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """See `AttentionLayer`."""
        call = NormCall(x[:, :, None], self.scale, past=0, dtype=OPERAND, silu=False)
        return norm_silu_join(call)[0][:, :, 0]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `AttentionLayer`."""
        return attention(q, k, v, self.tile, self.with_descriptors)

    def workspace(self, size: CallSize) -> Workspace:
        """The result of the norm; sums are in registers."""
        channels = self.scale.shape[0]
        pixels = size.batch * size.frames * size.rows * size.cols
        return Workspace(operand_bytes=channels * pixels * OPERAND.itemsize)
