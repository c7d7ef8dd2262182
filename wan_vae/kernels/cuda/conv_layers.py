"""Layers and kernels of `conv.py`: convolutions alone, strided ones, wide heads, and the pointwise
ones of attention.

A configuration names the output channels of one program ("n128"). All of them add in the same
order, so a layer has the same bits in each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from ... import layout
from ...layout import LayoutCounter
from ...ops.opset import CallSize, Workspace
from ...ops.problem import ConvProblem, HeadProblem, LayerWeights, StridedProblem
from ..device import Device
from ..kernel import Kernel, Requires
from ..weights import CHANNELS, behind_norm, filled_channels, fit_channels
from ..winograd import DIRECT
from .base import CudaKernel
from .conv import BLOCKS, FLOAT32_BLOCK, Call, Variant, conv, pack, program
from .layers import OPERAND, CudaLayer, CudaNormConv
from .norm import make_norm, norm_program
from .program import Program

_ONE = (1, 1, 1)
# Heads of fewer output channels have a kernel of their own, of nine columns for each.
_WIDE = 15


# -- layers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer(CudaLayer):
    """What all of them have: the kernel's variant with its weights."""

    variant: Variant
    packed: torch.Tensor
    machine_code: str

    @property
    def operand_dtype(self) -> torch.dtype:
        """See `ConvLayer`."""
        return self.variant.operand

    def _operand(self, x: torch.Tensor, counter: LayoutCounter) -> torch.Tensor:
        """`x` as the kernel reads it; a change of its format is counted."""
        x = fit_channels(x, self.variant.operand)
        # One of a single pixel is as good in either format to the network's other kernels.
        if self.variant.kernel != _ONE and layout.detect(x) not in ("channels_last_3d", "either"):
            counter.conversions += 1
        return layout.to_format(x, "channels_last_3d")


@dataclass(frozen=True)
class CudaConv(_Layer):
    """A convolution alone. is_copied: its input comes in another dtype or with too few channels."""

    is_copied: bool

    def run(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        counter: LayoutCounter,
        padding: tuple[int, int],
        last_slice: bool,
    ) -> torch.Tensor:
        """See `ConvLayer`. The result has dtype `variant.out`."""
        x = self._operand(x, counter)
        call = Call(x, self.packed, bias, padding, last_slice=last_slice)
        return conv(call, self.variant, self.machine_code)

    def workspace(self, size: CallSize) -> Workspace:
        """The copy of its input, with history, where one is made."""
        if not self.is_copied:
            return Workspace()
        past = 0 if size.only_frame else self.variant.kernel[0] - 1
        pixels = size.batch * (size.frames + past) * size.rows * size.cols
        return Workspace(hidden_bytes=self.variant.cin * pixels * self.variant.operand.itemsize)


@dataclass(frozen=True)
class CudaStrided(_Layer):
    """A down-sampler's convolution."""

    is_copied: bool

    def run(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        counter: LayoutCounter,
        pad_after: tuple[int, int],
    ) -> torch.Tensor:
        """See `StridedLayer`."""
        x = self._operand(x, counter)
        call = Call(x, self.packed, bias, pad_after=pad_after)
        return conv(call, self.variant, self.machine_code)

    def workspace(self, size: CallSize) -> Workspace:
        """The copy of its input where channels are missing; padding is not made in memory."""
        if not self.is_copied:
            return Workspace()
        pixels = size.batch * size.frames * size.rows * size.cols
        return Workspace(hidden_bytes=self.variant.cin * pixels * self.variant.operand.itemsize)


@dataclass(frozen=True)
class CudaWideHead(CudaNormConv):
    """A head of many output channels. conv: of operand, padding and last_slice, as in `Call`."""

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
        y = self.conv(operand, padding=padding, last_slice=only_frame)
        return y if residual is None else y + residual


def pointwise(weight: torch.Tensor, out_dtype: torch.dtype, machine_code: str) -> CudaConv:
    """A 1x1 convolution [O, C, 1, 1] of float16, as attention has two.

    machine_code: see `Device.machine_code`; `pointwise_program` is compiled for it.
    """
    variant = _pointwise(weight.shape[1], weight.shape[0], out_dtype)
    packed = pack(weight[:, :, None], variant)
    is_copied = variant.cin != weight.shape[1]
    return CudaConv("gemm", _name(variant.block), variant, packed, machine_code, is_copied)


def pointwise_program(
    in_channels: int, out_channels: int, out_dtype: torch.dtype, machine_code: str
) -> Program:
    """What `pointwise` launches."""
    return program(_pointwise(in_channels, out_channels, out_dtype), machine_code)


def _pointwise(in_channels: int, out_channels: int, out_dtype: torch.dtype) -> Variant:
    cin, block = filled_channels(in_channels), blocks_for(out_channels)[0]
    return Variant(cin, out_channels, _ONE, _ONE, OPERAND, out_dtype, block)


# -- configurations --------------------------------------------------------------------------------


def blocks_for(out_channels: int) -> tuple[int, ...]:
    """Output channels of one program that suit a layer of 16-bit operands, the best first.

    The first two of `BLOCKS` that fill the fewest channels with zeros.
    """
    filled = {block: -out_channels % block for block in BLOCKS}
    fewest = min(filled.values())
    return tuple(block for block in BLOCKS if filled[block] == fewest)[:2]


def _name(block: int) -> str:
    return f"n{block}"


def _block(config: str) -> int:
    """The block of a configuration. Raises ValueError for a name that is none."""
    number = config.removeprefix("n")
    if not number.isdigit() or config != _name(int(number)) or int(number) not in BLOCKS:
        names = ", ".join(map(_name, BLOCKS))
        raise ValueError(f"{config!r} is no configuration: expected one of {names}")
    return int(number)


# -- kernels ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv(CudaKernel):
    """Convolutions alone."""

    def candidates(self, problem: ConvProblem, device: Device) -> Sequence[str]:
        """See `Kernel`."""
        if problem.operand_dtype == torch.float32:
            return (_name(FLOAT32_BLOCK),)
        return tuple(map(_name, blocks_for(problem.out_channels)))

    def programs(self, problem: ConvProblem, config: str, device: Device) -> tuple[Program, ...]:
        """See `CompiledKernel`."""
        return (program(self._variant(problem, config), device.machine_code),)

    def prepare(
        self, weights: LayerWeights, problem: ConvProblem, config: str, device: Device
    ) -> CudaConv:
        """See `Kernel`."""
        variant = self._variant(problem, config)
        packed = pack(weights.weight, variant)
        changes = problem.operand_dtype != problem.feature_dtype or problem.source == "pixels"
        is_copied = changes or variant.cin != problem.in_channels
        return CudaConv(self.name, config, variant, packed, device.machine_code, is_copied)

    def _variant(self, problem: ConvProblem, config: str) -> Variant:
        return Variant(
            filled_channels(problem.in_channels),
            problem.out_channels,
            problem.kernel,
            _ONE,
            problem.operand_dtype,
            problem.out_dtype,
            _block(config),
        )


@dataclass(frozen=True)
class StridedConv(CudaKernel):
    """Down-samplers."""

    def candidates(self, problem: StridedProblem, device: Device) -> Sequence[str]:
        """See `Kernel`."""
        return tuple(map(_name, blocks_for(problem.out_channels)))

    def programs(self, problem: StridedProblem, config: str, device: Device) -> tuple[Program, ...]:
        """See `CompiledKernel`."""
        return (program(self._variant(problem, config), device.machine_code),)

    def prepare(
        self, weights: LayerWeights, problem: StridedProblem, config: str, device: Device
    ) -> CudaStrided:
        """See `Kernel`."""
        variant, weight = self._variant(problem, config), weights.weight
        packed = pack(weight[:, :, None] if weight.ndim == 4 else weight, variant)
        is_copied = variant.cin != problem.in_channels
        return CudaStrided(self.name, config, variant, packed, device.machine_code, is_copied)

    def _variant(self, problem: StridedProblem, config: str) -> Variant:
        return Variant(
            filled_channels(problem.in_channels),
            problem.out_channels,
            problem.kernel,
            problem.stride,
            problem.feature_dtype,
            problem.feature_dtype,
            _block(config),
        )


@dataclass(frozen=True)
class WideHead(CudaKernel):
    """Heads of many output channels, behind norm and SiLU."""

    def candidates(self, problem: HeadProblem, device: Device) -> Sequence[str]:
        """See `Kernel`."""
        return tuple(map(_name, blocks_for(problem.out_channels)))

    def programs(self, problem: HeadProblem, config: str, device: Device) -> tuple[Program, ...]:
        """See `CompiledKernel`."""
        code, past = device.machine_code, 0 if problem.only_frame else 2
        norm = norm_program(problem.in_channels, problem.feature_dtype, past, DIRECT, code)
        return program(self._variant(problem, config), code), norm

    def prepare(
        self, weights: LayerWeights, problem: HeadProblem, config: str, device: Device
    ) -> CudaWideHead:
        """See `Kernel`."""
        variant, code = self._variant(problem, config), device.machine_code
        (scale, bias), packed = behind_norm(weights), pack(weights.weight, variant)

        def head(x: torch.Tensor, padding: tuple[int, int], last_slice: bool) -> torch.Tensor:
            call = Call(x, packed, bias, padding, last_slice=last_slice)
            return conv(call, variant, code)

        norm, taps = make_norm(code).join, problem.kernel[0]
        return CudaWideHead(self.name, config, scale, norm, head, taps, DIRECT)

    def _variant(self, problem: HeadProblem, config: str) -> Variant:
        return Variant(
            problem.in_channels,
            problem.out_channels,
            problem.kernel,
            _ONE,
            OPERAND,
            problem.out_dtype,
            _block(config),
        )


def _used(*operations: str) -> Mapping[str, str]:
    return MappingProxyType(dict.fromkeys(operations, "cuda"))


_CARD = Requires(capability=(7, 5))
_HEAD = replace(
    _CARD,
    in_multiple=CHANNELS,
    out_channels=(_WIDE, 1 << 30),
    largest_operand=torch.finfo(OPERAND).max,
)

CONV_KERNELS: tuple[Kernel[Any, Any], ...] = (
    Conv("gemm", "conv3d", _CARD, _used("conv3d")),
    StridedConv("gemm", "strided_conv", _CARD, _used("conv2d")),
    WideHead("gemm", "head", _HEAD, _used("conv3d", "norm_silu")),
)
