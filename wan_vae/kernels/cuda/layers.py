"""Layers that several kernels in CUDA C++ share: each holds what its kernel reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ... import layout
from ...ops.opset import CallSize, HaloRows, Workspace
from ..kernel import NormCall, NormResult
from ..winograd import Transform

# Operands behind a norm.
OPERAND = torch.float16


@dataclass(frozen=True)
class CudaLayer:
    """What all of them say of themselves."""

    kernel: str
    config: str

    @property
    def family(self) -> str:
        """ "cuda"."""
        return "cuda"

    @property
    def frames_together(self) -> int:
        """See `Prepared`: each frame by itself."""
        return 1


@dataclass(frozen=True)
class CudaNormConv(CudaLayer):
    """A 3x3x3 convolution behind norm and SiLU.

    scale: from `weights.norm_scale`. norm: what writes the operand. conv: the convolution with its
    weights and bias, see `conv3x3_wgmma.conv3x3`. taps: temporal ones. transform: that of the
    operand.
    """

    scale: torch.Tensor
    norm: Callable[[NormCall], NormResult]
    conv: Callable[..., torch.Tensor]
    taps: int
    transform: Transform

    @property
    def frames_together(self) -> int:
        """See `Prepared`: a pair or a quad."""
        return self.transform.frames

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
        past = 0 if only_frame else self.taps - 1
        return self.norm(
            NormCall(x, self.scale, history, past, keep, OPERAND, True, overwrite, halo)
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
        """See `FusedConv`."""
        return self.conv(operand, residual=residual, frames=frames, padding=padding)

    def workspace(self, size: CallSize) -> Workspace:
        """The operand: joined with its history, or the transformed frames of each pair or quad."""
        past = 0 if size.only_frame else 2
        frames = self.transform.operand_frames(size.frames, past)
        channels = self.scale.shape[0]
        frame = channels * size.batch * size.rows * size.cols * OPERAND.itemsize
        return Workspace(frames * frame, past * frame)


@dataclass(frozen=True)
class CudaUpsample(CudaLayer):
    """The 3x3 convolution of an up-sampler, with the doubling folded into its weight."""

    conv: Callable[..., torch.Tensor]

    def run(self, x: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
        """See `UpsampleLayer`."""
        return self.conv(layout.to_format(x, "channels_last_3d"), padding=padding)

    def workspace(self, size: CallSize) -> Workspace:
        """Nothing: the doubled picture does not exist."""
        return Workspace()
