"""Layers as the kernels in CUDA C++ run them: each holds the weights that its kernel reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ... import layout
from ...ops.opset import CallSize, HaloRows, Workspace
from ..kernel import FusedNorm, NormCall
from .conv3x3_wgmma import Variant, conv3x3, upsample_conv3x3

# Operands behind a norm.
OPERAND = torch.float16


@dataclass(frozen=True)
class CudaLayer:
    """What all of them say of themselves, and the kernel's variant with its weights and bias."""

    kernel: str
    variant: Variant
    packed: torch.Tensor
    bias: torch.Tensor

    @property
    def family(self) -> str:
        """ "cuda"."""
        return "cuda"

    @property
    def config(self) -> str:
        """The name of the variant."""
        return self.variant.name


@dataclass(frozen=True)
class CudaNormConv(CudaLayer):
    """A 3x3x3 convolution behind norm and SiLU. scale: from `weights.norm_scale`."""

    scale: torch.Tensor
    norm: FusedNorm

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
        is_pairs = self.variant.winograd
        past = 2 if is_pairs else 0 if only_frame else self.variant.taps - 1
        call = NormCall(x, self.scale, history, past, keep, OPERAND, True, overwrite, halo)
        return self.norm.pairs(call) if is_pairs else self.norm.join(call)

    def convolve(
        self,
        operand: torch.Tensor,
        frames: int,
        residual: torch.Tensor | None,
        *,
        padding: tuple[int, int],
        only_frame: bool,
    ) -> torch.Tensor:
        """See `FusedConv`."""
        return conv3x3(operand, self.packed, self.bias, residual, self.variant, frames, padding)

    def workspace(self, size: CallSize) -> Workspace:
        """The operand: joined with its history, or four transformed frames for each pair."""
        past = 0 if size.only_frame else 2
        frames = -(-size.frames // 2) * 4 if self.variant.winograd else size.frames + past
        channels = self.variant.cin
        frame = channels * size.batch * size.rows * size.cols * OPERAND.itemsize
        return Workspace(frames * frame, past * frame)


@dataclass(frozen=True)
class CudaUpsample(CudaLayer):
    """The 3x3 convolution of an up-sampler, with the doubling folded into its weight."""

    def run(self, x: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
        """See `UpsampleLayer`."""
        x = layout.to_format(x, "channels_last_3d")
        return upsample_conv3x3(x, self.packed, self.bias, self.variant, padding)

    def workspace(self, size: CallSize) -> Workspace:
        """Nothing: the doubled picture does not exist."""
        return Workspace()
