"""One convolution as the Triton kernels run it, alone or behind norm, SiLU and history."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .triton_conv3d import Config, conv3d
from .triton_head import head_conv
from .triton_norm import norm_silu_join

# Operands behind a norm.
OPERAND = torch.float16


@dataclass(frozen=True)
class Layer:
    """A convolution as a kernel runs it: its operand, configuration and the result's dtype.

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


def run_fused(
    layer: Layer,
    x: torch.Tensor,
    gamma: torch.Tensor,
    history: torch.Tensor | None,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    *,
    padding: tuple[int, int],
    only_frame: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `dispatch.FusedConv`. The head's result is float32, the others' in the stream's dtype."""
    past = 0 if only_frame else layer.weight.shape[2] - 1
    buffer, kept = norm_silu_join(x, gamma, history, past, keep, OPERAND)
    return layer.run(buffer, bias, residual, padding, only_frame), kept
