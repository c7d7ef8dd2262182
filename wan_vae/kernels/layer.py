"""One convolution as our kernels run it: alone, strided, or behind norm, SiLU and history."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import layout
from ..ops.opset import HaloRows
from .cuda.conv3x3 import Form, conv3x3, pack, pack_doubled, upsample_conv3x3
from .triton.conv3d import Config, conv3d, fold_upsample, folded_upsample
from .triton.head import head_conv
from .triton.norm import norm_scale, norm_silu_join, norm_silu_pairs
from .triton.strided import StridedConfig, strided_conv3d

# Operands behind a norm.
OPERAND = torch.float16
# A tensor descriptor's rows are multiples of 16 bytes, a product's blocks at least 16 channels.
_CHANNELS = 16


def fit_channels(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`x` [N, C, ...] with zero channels up to a multiple of 16, channels lying together.

    For weights and features alike: products with zeros are added to nothing, which is exact. A
    copy in `dtype` (that of `x` if None) only if channels are missing.
    """
    n, c, *size = x.shape
    if c % _CHANNELS == 0:
        return x if dtype is None else x.to(dtype)
    whole = x.new_zeros((n, *size, c + -c % _CHANNELS), dtype=dtype)
    whole[..., :c] = x.movedim(1, -1)
    return whole.movedim(-1, 1)


@dataclass(frozen=True)
class Layer:
    """A convolution as a Triton kernel runs it: its operand, configuration and the result's dtype.

    `config` None is the narrow head's kernel, whose result is float32. `bias` and `scale` (from
    `triton_norm.norm_scale`), both float32, are those of a layer behind a norm.
    """

    weight: torch.Tensor
    config: Config | None
    out: torch.dtype
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    def run(
        self,
        buffer: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        padding: tuple[int, int],
        last_slice: bool,
    ) -> torch.Tensor:
        """See `triton_conv3d.conv3d`; `buffer` has the operand's dtype."""
        if self.config is None:
            y = head_conv(buffer, self.weight, bias, padding=padding, last_slice=last_slice)
            return y if residual is None else y + residual
        return conv3d(
            buffer, self.weight, bias, residual, self.config,
            padding=padding, last_slice=last_slice, out_dtype=self.out,
        )  # fmt: skip

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
        """See `dispatch.FusedConv`."""
        past = 0 if only_frame else self.weight.shape[2] - 1
        return norm_silu_join(
            x, self.scale, history, past, keep, OPERAND, overwrite=overwrite, halo=halo
        )

    def convolve(
        self,
        operand: torch.Tensor,
        frames: int,
        residual: torch.Tensor | None,
        *,
        padding: tuple[int, int],
        only_frame: bool,
    ) -> torch.Tensor:
        """See `dispatch.FusedConv`. The result has dtype `out`; a narrow head's is float32."""
        return self.run(operand, self.bias, residual, padding, only_frame)


@dataclass(frozen=True)
class CudaLayer:
    """A 3x3x3 convolution behind norm and SiLU in CUDA C++ (`cuda/conv3x3.py`)."""

    packed: torch.Tensor
    form: Form
    bias: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def of(weight: torch.Tensor, bias: torch.Tensor, gamma: torch.Tensor, form: Form) -> CudaLayer:
        """From a weight [O, C, 3, 3, 3], its bias and the norm's gain, of any dtype and format."""
        bias, scale = bias.detach().float(), norm_scale(gamma)
        return CudaLayer(pack(weight, form), form, bias, scale)

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
        """See `dispatch.FusedConv`."""
        if self.form.winograd:
            return norm_silu_pairs(
                x, self.scale, history, keep, OPERAND, overwrite=overwrite, halo=halo
            )
        past = 0 if only_frame else self.form.taps - 1
        return norm_silu_join(
            x, self.scale, history, past, keep, OPERAND, overwrite=overwrite, halo=halo
        )

    def convolve(
        self,
        operand: torch.Tensor,
        frames: int,
        residual: torch.Tensor | None,
        *,
        padding: tuple[int, int],
        only_frame: bool,
    ) -> torch.Tensor:
        """See `dispatch.FusedConv`."""
        return conv3x3(operand, self.packed, self.bias, residual, self.form, frames, padding)


@dataclass(frozen=True)
class UpsampleLayer:
    """The 3x3 convolution of an up-sampler, with the doubling folded into its weight.

    `how` is the configuration of a Triton kernel, or the form of one in CUDA C++.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    how: Config | Form

    @staticmethod
    def of(
        weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, how: Config | Form
    ) -> UpsampleLayer:
        """From a weight [O, C, 3, 3] and its bias, for features of `dtype`."""
        folded, bias = fold_upsample(weight.detach()).to(dtype), bias.detach()
        if isinstance(how, Form):
            return UpsampleLayer(pack_doubled(folded, how), bias.float(), how)
        return UpsampleLayer(folded, bias, how)

    def run(self, x: torch.Tensor, padding: tuple[int, int] = (1, 1)) -> torch.Tensor:
        """As `upsample.upsample_conv2d`; `x` [N, C, H, W] is in channels_last."""
        if isinstance(self.how, Form):
            return upsample_conv3x3(x, self.weight, self.bias, self.how, padding)
        return folded_upsample(x, self.weight, self.bias, self.how, padding)


@dataclass(frozen=True)
class StridedLayer:
    """A down-sampler's convolution in Triton: 1x3x3 over every second pixel, or 3x1x1 over every
    second frame."""

    weight: torch.Tensor
    config: StridedConfig

    @staticmethod
    def of(weight: torch.Tensor, dtype: torch.dtype, config: StridedConfig) -> StridedLayer:
        """From a weight [O, C, 3, 3] or [O, C, 3, 1, 1] of any dtype and format."""
        weight = weight.detach().to(dtype)
        weight = weight[:, :, None] if weight.ndim == 4 else weight
        return StridedLayer(layout.to_format(weight, "channels_last_3d"), config)

    @property
    def stride(self) -> tuple[int, int, int]:
        """Steps in frames, rows and columns."""
        return (1, 2, 2) if self.weight.shape[2] == 1 else (2, 1, 1)

    def run(
        self, x: torch.Tensor, bias: torch.Tensor, pad_after: tuple[int, int] = (0, 0)
    ) -> torch.Tensor:
        """See `triton_strided.strided_conv3d`; `x` [B, C, T, H, W] has the weight's dtype."""
        return strided_conv3d(
            x, self.weight, bias, self.config, stride=self.stride, pad_after=pad_after
        )
