"""Problems: what one layer computes, as frozen values that say nothing of how it is computed.

A problem names everything that a kernel must know to be chosen, built and proven: channels, taps,
dtypes and where the input comes from. It holds no weights and no picture size, because a choice
must not depend on the size of a picture or of a chunk: that keeps the bits the same for every
chunk schedule, strip and shard.

Least precise dtype in which a kernel may read its input (`operand_dtype`):

| input | operand | why |
|---|---|---|
| result of a norm | float16 | the norm bounds it by sqrt(C) * max|gamma|, and float16 rounds eight times finer than bfloat16 |
| features between layers | as they are | nothing to gain |
| latent, or almost the latent | float32 | nothing bounds it, and the layers are small |
| pixels | float16 | they are in [-1, 1]; 8 bits are exact in it |

Sums are float32. A result is rounded once, to the dtype of the features; the results of a head and
of the convolution at an encode's latent are float32.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import torch

from .opset import CallSize

# Rows of the matrix operation x family in kernels/README.md, in order.
Operation = Literal["conv3d", "norm_conv3d", "head", "upsample_conv2d", "strided_conv", "attention"]
# Where the input of a convolution comes from, if from no norm.
Source = Literal["features", "latent", "pixels"]

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class ConvProblem:
    """A causal convolution alone: [B, C, T + kT - 1, H, W] -> [B, O, T, H, W].

    source: "pixels" is an encode's input, "latent" a decode's latent or the moments of an encode,
    "features" what blocks hand on. frames: how many the layer makes of each latent frame of a chunk
    that is not the first. only_frame: the video has one frame, so only the last temporal slice of
    the weight is used.
    """

    source: Source
    in_channels: int
    out_channels: int
    kernel: tuple[int, int, int]
    feature_dtype: torch.dtype
    out_dtype: torch.dtype
    frames: int = 1
    only_frame: bool = False

    operation: ClassVar[Operation] = "conv3d"
    op: ClassVar[str] = "conv3d"

    @property
    def operand_dtype(self) -> torch.dtype:
        """See the table above."""
        if self.source == "features":
            return self.feature_dtype
        return torch.float32 if self.source == "latent" else torch.float16

    @property
    def has_halo(self) -> bool:
        """Whether the layer of a shard reads rows of its neighbours."""
        return self.kernel[1:] != (1, 1)

    def key(self) -> str:
        """Names the class of problems that one proof covers: all but the number of frames."""
        return (
            f"conv3d of {self.source} {_channels(self)} {_taps(self.kernel)} "
            f"{_SHORT[self.operand_dtype]} to {_SHORT[self.out_dtype]}{_image(self.only_frame)}"
        )

    def flops(self, size: CallSize) -> int:
        """Additions and multiplications of one call that makes as many frames as `size` has."""
        taps = prod(self.kernel[1:]) if size.only_frame else prod(self.kernel)
        return 2 * taps * self.in_channels * self.out_channels * _pixels(size)


@dataclass(frozen=True)
class NormConvProblem:
    """RMS norm, SiLU and a causal 3x3x3 convolution, plus a residual, over features.

    frames, only_frame: as in `ConvProblem`.
    """

    in_channels: int
    out_channels: int
    feature_dtype: torch.dtype
    frames: int = 1
    only_frame: bool = False

    operation: ClassVar[Operation] = "norm_conv3d"
    op: ClassVar[str] = "conv3d"
    operand_dtype: ClassVar[torch.dtype] = torch.float16
    kernel: ClassVar[tuple[int, int, int]] = (3, 3, 3)
    has_halo: ClassVar[bool] = True

    @property
    def out_dtype(self) -> torch.dtype:
        """That of the features."""
        return self.feature_dtype

    def key(self) -> str:
        """As `ConvProblem.key`."""
        dtype = _SHORT[self.feature_dtype]
        return f"norm_conv3d {_channels(self)} {dtype}{_image(self.only_frame)}"

    def flops(self, size: CallSize) -> int:
        """As `ConvProblem.flops`; of the convolution."""
        taps = 9 if size.only_frame else 27
        return 2 * taps * self.in_channels * self.out_channels * _pixels(size)


@dataclass(frozen=True)
class HeadProblem:
    """RMS norm, SiLU and a causal 3x3x3 convolution to float32: pixels, or almost the latent."""

    in_channels: int
    out_channels: int
    feature_dtype: torch.dtype
    frames: int = 1
    only_frame: bool = False

    operation: ClassVar[Operation] = "head"
    op: ClassVar[str] = "conv3d"
    operand_dtype: ClassVar[torch.dtype] = torch.float16
    out_dtype: ClassVar[torch.dtype] = torch.float32
    kernel: ClassVar[tuple[int, int, int]] = (3, 3, 3)
    has_halo: ClassVar[bool] = True

    def key(self) -> str:
        """As `ConvProblem.key`."""
        dtype = _SHORT[self.feature_dtype]
        return f"head {_channels(self)} {dtype} to fp32{_image(self.only_frame)}"

    def flops(self, size: CallSize) -> int:
        """As `ConvProblem.flops`; of the convolution."""
        taps = 9 if size.only_frame else 27
        return 2 * taps * self.in_channels * self.out_channels * _pixels(size)


@dataclass(frozen=True)
class UpsampleProblem:
    """Every pixel doubled in height and width, then a 3x3 convolution of each frame."""

    in_channels: int
    out_channels: int
    feature_dtype: torch.dtype
    frames: int = 1

    operation: ClassVar[Operation] = "upsample_conv2d"
    op: ClassVar[str] = "upsample_conv2d"
    kernel: ClassVar[tuple[int, int, int]] = (1, 3, 3)
    has_halo: ClassVar[bool] = True

    @property
    def operand_dtype(self) -> torch.dtype:
        """That of the features."""
        return self.feature_dtype

    @property
    def out_dtype(self) -> torch.dtype:
        """That of the features."""
        return self.feature_dtype

    def key(self) -> str:
        """As `ConvProblem.key`."""
        return f"upsample_conv2d {_channels(self)} {_SHORT[self.feature_dtype]}"

    def flops(self, size: CallSize) -> int:
        """With the doubling folded into the weight: four taps for each pixel that is made."""
        return 2 * 4 * self.in_channels * self.out_channels * 4 * _pixels(size)


@dataclass(frozen=True)
class StridedProblem:
    """A down-sampler's convolution: 1x3x3 over every second pixel or 3x1x1 over every second frame.

    kernel: (1, 3, 3) or (3, 1, 1).
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, int, int]
    feature_dtype: torch.dtype

    operation: ClassVar[Operation] = "strided_conv"
    # A shard's kernel reads the neighbour's row as if it were its own: nothing else is to prove.
    has_halo: ClassVar[bool] = False

    @property
    def op(self) -> str:
        """The operation in a report."""
        return "conv2d" if self.kernel[0] == 1 else "conv3d"

    @property
    def operand_dtype(self) -> torch.dtype:
        """That of the features."""
        return self.feature_dtype

    @property
    def stride(self) -> tuple[int, int, int]:
        """Steps in frames, rows and columns."""
        return (1, 2, 2) if self.kernel[0] == 1 else (2, 1, 1)

    def key(self) -> str:
        """As `ConvProblem.key`."""
        dtype = _SHORT[self.feature_dtype]
        return f"strided_conv {_channels(self)} {_taps(self.kernel)} {dtype}"

    def flops(self, size: CallSize) -> int:
        """Of one call on an input of `size`."""
        made = _pixels(size) // prod(self.stride)
        return 2 * prod(self.kernel) * self.in_channels * self.out_channels * made


@dataclass(frozen=True)
class AttentionProblem:
    """One head over the pixels of a frame: norm, 1x1 convolution to queries, keys and values,
    attention, 1x1 convolution back. One problem, because its parts hand float16 to each other."""

    channels: int
    feature_dtype: torch.dtype

    operation: ClassVar[Operation] = "attention"
    op: ClassVar[str] = "attention"
    operand_dtype: ClassVar[torch.dtype] = torch.float16
    kernel: ClassVar[tuple[int, int, int]] = (1, 1, 1)
    has_halo: ClassVar[bool] = False

    @property
    def in_channels(self) -> int:
        """As many as come out."""
        return self.channels

    @property
    def out_channels(self) -> int:
        """As many as go in."""
        return self.channels

    def key(self) -> str:
        """As `ConvProblem.key`."""
        return f"attention {self.channels} {_SHORT[self.feature_dtype]}"

    def flops(self, size: CallSize) -> int:
        """Of all four parts; a frame's pixels attend to each other."""
        c, pixels = self.channels, _pixels(size)
        return 2 * pixels * (4 * c * c + 2 * c * size.rows * size.cols)


Problem = (
    ConvProblem
    | NormConvProblem
    | HeadProblem
    | UpsampleProblem
    | StridedProblem
    | AttentionProblem
)


@dataclass(frozen=True)
class LayerWeights:
    """The tensors of one layer, of any dtype and memory format.

    gamma: the gain of the norm in front. projection: of attention, whose `weight` makes queries,
    keys and values.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    gamma: torch.Tensor | None = None
    projection: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerSite:
    """One layer of a network: its native name ("decoder.head.2"), problem and weights."""

    name: str
    problem: Problem
    weights: LayerWeights


def _channels(problem: Problem) -> str:
    return f"{problem.in_channels}x{problem.out_channels}"


def _taps(kernel: tuple[int, int, int]) -> str:
    return "x".join(map(str, kernel))


def _image(only_frame: bool) -> str:
    return " one frame" if only_frame else ""


def _pixels(size: CallSize) -> int:
    return size.batch * size.frames * size.rows * size.cols
