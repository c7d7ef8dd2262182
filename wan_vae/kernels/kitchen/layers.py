"""Layers as comfy-kitchen's convolution runs them. The norm in front is PyTorch's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...ops.eager.norm import rms_norm_silu
from ...ops.opset import CallSize, HaloRows, Workspace
from .package import Convolution

OPERAND = torch.float16
# Numbers that one call may read: it counts them in 32 bits.
_COUNTABLE = 1 << 31
# Of one frame, while its norm is made in float32: the frame, the quotient, and what joins a halo.
_NORM_COPIES = 3


@dataclass(frozen=True)
class KitchenNormConv:
    """A 3x3x3 convolution behind norm and SiLU.

    gamma: the norm's gain, float32. weight [O, C, 3 or 1, 3, 3] float16, dense channels_last_3d.
    conv: comfy-kitchen's, which pads nothing: its operand has the zeros around the picture in it.
    """

    kernel: str
    config: str
    gamma: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    conv: Convolution

    @property
    def family(self) -> str:
        """ "kitchen"."""
        return "kitchen"

    @property
    def frames_together(self) -> int:
        """See `Prepared`: each frame by itself."""
        return 1

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
        """See `FusedConv`. The result has a row of zeros above and below and a column of zeros
        left and right, but where halo rows stand.

        The norm is made in float32, frame by frame, and rounded once.
        """
        past = 0 if only_frame else 2
        b, c, frames, h, w = x.shape
        rows, cols = 1, 1
        if halo is not None and halo.axis == "height":
            rows, h = 0, h + 2
        elif halo is not None:
            cols, w = 0, w + 2
        joined = _dense(x, (b, past + frames, h + 2 * rows, w + 2 * cols, c)).zero_()
        inner = joined[..., rows : rows + h, cols : cols + w]
        if past and history is not None:
            inner[:, :, :past].copy_(history)
        for i in range(frames):
            frame = _surrounded(x[:, :, i], halo, i).float()
            inner[:, :, past + i].copy_(rms_norm_silu(frame, self.gamma))
        if not (keep and past):
            return joined, None
        if not overwrite or history is None:
            history = _dense(x, (b, past, h, w, c))
        return joined, history.copy_(inner[:, :, -past:])

    def convolve(
        self,
        operand: torch.Tensor,
        frames: int,
        residual: torch.Tensor | None,
        *,
        padding: tuple[int, int],
        only_frame: bool,
    ) -> torch.Tensor:
        """See `FusedConv`. `padding` is in `operand` already."""
        b, _, _, h, w = operand.shape
        taps = self.weight.shape[2]
        frame = operand[0, :, 0].numel()
        if b * operand.shape[2] * frame < _COUNTABLE:
            return self.conv(operand, self.weight, self.bias, residual, [1, 1, 1])
        out = _dense(operand, (b, frames, h - 2, w - 2, self.weight.shape[0]))
        step = max(1, _COUNTABLE // frame - taps)
        for clip in range(b):
            for first in range(0, frames, step):
                made = slice(first, min(first + step, frames))
                part = operand[clip : clip + 1, :, made.start : made.stop + taps - 1]
                added = None if residual is None else residual[clip : clip + 1, :, made]
                y = self.conv(part, self.weight, self.bias, added, [1, 1, 1])
                out[clip : clip + 1, :, made].copy_(y)
        return out

    def workspace(self, size: CallSize) -> Workspace:
        """The operand with its zeros, the frames that are kept, and the norm of one frame."""
        past = 0 if size.only_frame else 2
        numbers = self.gamma.numel() * size.batch
        padded = numbers * (size.rows + 2) * (size.cols + 2) * OPERAND.itemsize
        frame = numbers * size.rows * size.cols
        return Workspace(
            (size.frames + past) * padded,
            past * frame * OPERAND.itemsize,
            _NORM_COPIES * frame * torch.float32.itemsize,
        )


def _dense(like: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """float16 [B, C, T, H, W] in channels_last_3d, from `size` (B, T, H, W, C)."""
    return torch.empty(size, dtype=OPERAND, device=like.device).permute(0, 4, 1, 2, 3)


def _surrounded(frame: torch.Tensor, halo: HaloRows | None, index: int) -> torch.Tensor:
    """`frame` [B, C, H, W], the frame of this index, between the rows or columns of its halo."""
    if halo is None:
        return frame
    dim = 2 if halo.axis == "height" else 3
    edges = []
    for edge in (halo.before, halo.after):
        if edge is None:
            edges.append(torch.zeros_like(frame.narrow(dim, 0, 1)))
        else:
            edges.append(edge[:, index].movedim(-1, 1))
    return torch.cat((edges[0], frame, edges[1]), dim)
