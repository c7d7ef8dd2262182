"""One convolution as our kernels run it, alone or behind norm, SiLU and history."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cuda.conv3x3 import Form, conv3x3, pack
from .triton_conv3d import Config, conv3d
from .triton_head import head_conv
from .triton_norm import norm_silu_join, norm_silu_pairs

# Operands behind a norm.
OPERAND = torch.float16


@dataclass(frozen=True)
class Layer:
    """A convolution as a Triton kernel runs it: its operand, configuration and the result's dtype.

    `config` None is the head's kernel, whose result is float32.
    """

    weight: torch.Tensor
    config: Config | None
    out: torch.dtype

    def run(
        self,
        buffer: torch.Tensor,
        bias: torch.Tensor,
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
        gamma: torch.Tensor,
        history: torch.Tensor | None,
        *,
        only_frame: bool,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `dispatch.FusedConv`."""
        past = 0 if only_frame else self.weight.shape[2] - 1
        return norm_silu_join(x, gamma, history, past, keep, OPERAND)

    def convolve(
        self,
        operand: torch.Tensor,
        frames: int,
        bias: torch.Tensor,
        residual: torch.Tensor | None,
        *,
        padding: tuple[int, int],
        only_frame: bool,
    ) -> torch.Tensor:
        """See `dispatch.FusedConv`. The head's result is float32, the others' the stream's."""
        return self.run(operand, bias, residual, padding, only_frame)


@dataclass(frozen=True)
class CudaLayer:
    """A 3x3x3 convolution behind norm and SiLU in CUDA C++ (`cuda/conv3x3.py`)."""

    packed: torch.Tensor
    form: Form

    @staticmethod
    def of(weight: torch.Tensor, form: Form) -> CudaLayer:
        """From a weight [O, C, 3, 3, 3] of any dtype and format."""
        return CudaLayer(pack(weight, form), form)

    def operand(
        self,
        x: torch.Tensor,
        gamma: torch.Tensor,
        history: torch.Tensor | None,
        *,
        only_frame: bool,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `dispatch.FusedConv`."""
        if self.form.winograd:
            return norm_silu_pairs(x, gamma, history, keep, OPERAND)
        past = 0 if only_frame else self.form.taps - 1
        return norm_silu_join(x, gamma, history, past, keep, OPERAND)

    def convolve(
        self,
        operand: torch.Tensor,
        frames: int,
        bias: torch.Tensor,
        residual: torch.Tensor | None,
        *,
        padding: tuple[int, int],
        only_frame: bool,
    ) -> torch.Tensor:
        """See `dispatch.FusedConv`."""
        return conv3x3(operand, self.packed, bias.float(), residual, self.form, frames, padding)
