"""The Triton family: which kernels there are, what each requires, how each makes its layers.

The best of an operation comes first. Below sm_90 Triton turns tensor descriptors into plain loads
that nothing overlaps, so kernels that use them require TMA for the sake of speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
import triton

from ... import layout
from ...errors import named
from ...ops.problem import (
    AttentionProblem,
    ConvProblem,
    HeadProblem,
    LayerWeights,
    NormConvProblem,
    Operation,
    StridedProblem,
    UpsampleProblem,
)
from ...said import said
from ..bounds import Bound
from ..device import Device, Feature, Vendor
from ..kernel import BuildError, Family, Kernel, Requires
from ..proof.cases import Inputs, checks_of, proof_size
from ..weights import behind_norm, filled_channels, fit_channels, fold_upsample, norm_scale
from . import conv3d_pointer, conv3d_tma
from .configs import (
    AttentionConfig,
    ConvConfig,
    ConvTable,
    HeadConfig,
    StridedConfig,
    attention_candidates,
    head_candidates,
    pointer_table,
    strided_candidates,
    tma_table,
)
from .conv3d import Launch, precision_of
from .head import pack_head
from .launch import get_ready
from .layers import (
    OPERAND,
    TritonAttention,
    TritonConv,
    TritonHead,
    TritonNormConv,
    TritonStrided,
    TritonUpsample,
)

_VENDORS: frozenset[Vendor] = frozenset({"nvidia", "amd", "interpreter"})
_MATRIX_UNITS: frozenset[Feature] = frozenset({"mfma", "wmma"})
_META = torch.device("meta")
_LARGEST = torch.finfo(OPERAND).max
# A convolution of few output channels has a kernel of its own: nine columns for each of them.
_NARROW = 128 // 9
BUILD_FAILURES: tuple[type[Exception], ...] = (
    BuildError,
    triton.runtime.errors.OutOfResources,
    triton.runtime.errors.PTXASError,
    triton.compiler.errors.CompilationError,
)


@dataclass(frozen=True)
class _TritonKernel:
    """What all of them have in common. `used`: see `Kernel`."""

    name: str
    operation: Operation
    requires: Requires
    used: Mapping[str, str]
    family: str = "triton"
    build_failures: tuple[type[Exception], ...] = BUILD_FAILURES
    sums_error: float = 0.0
    compiles_at_launch: bool = True

    def build(self, problem: Any, config: str, device: Device) -> None:
        """See `Kernel`. For the card in use: launched on `meta` tensors, as its proof does it."""
        if device.vendor not in _VENDORS:
            raise BuildError(
                said(
                    "kernel.triton_target",
                    "Triton does not compile for {architecture}",
                    architecture=device.architecture,
                )
            )
        inputs = Inputs(_META, problem.feature_dtype, None, proof_size(problem, _META))
        try:
            for check in checks_of(cast(Kernel[Any, Any], self), problem, config, device, inputs):
                check.kernel()
        except BUILD_FAILURES as failure:
            raise BuildError(named(failure)) from failure

    def bound(self, weights: LayerWeights, problem: object, config: str) -> Bound | None:
        """See `Kernel`. Sums are float32."""
        return None


@dataclass(frozen=True)
class _Tiles:
    """How a convolution is loaded, and its configurations by device and dtype of the operand."""

    table: Callable[[Device, torch.dtype], ConvTable]
    launch: Launch

    def candidates(
        self,
        problem: ConvProblem | NormConvProblem | HeadProblem | UpsampleProblem,
        device: Device,
    ) -> Sequence[str]:
        """See `ConvTable.candidates`. The channels of pixels are filled up."""
        channels = problem.in_channels
        if isinstance(problem, ConvProblem) and problem.source == "pixels":
            channels = filled_channels(channels)
        table = self.table(device, problem.operand_dtype)
        return table.candidates(channels, problem.out_channels, problem.frames)

    def pointwise(self, channels: int, out_channels: int, device: Device) -> Sequence[str]:
        """Of a 1x1 convolution of float16."""
        return self.table(device, OPERAND).candidates(channels, out_channels, 1)


_TMA = _Tiles(tma_table, conv3d_tma.launch)
_POINTER = _Tiles(pointer_table, conv3d_pointer.launch)


@dataclass(frozen=True)
class ConvKernel(_TritonKernel):
    """Convolutions alone."""

    tiles: _Tiles = _TMA

    def candidates(self, problem: ConvProblem, device: Device) -> Sequence[str]:
        """See `Kernel`."""
        return self.tiles.candidates(problem, device)

    def prepare(
        self, weights: LayerWeights, problem: ConvProblem, config: str, device: Device
    ) -> TritonConv:
        """See `Kernel`."""
        weight = weights.weight.detach()
        if problem.source == "pixels":
            weight = fit_channels(weight)
        weight = layout.to_format(weight.to(problem.operand_dtype), "channels_last_3d")
        is_copied = problem.operand_dtype != problem.feature_dtype or problem.source == "pixels"
        return TritonConv(
            self.name,
            config,
            weight,
            problem.out_dtype,
            is_copied,
            ConvConfig.parse(config),
            self.tiles.launch,
            precision_of(problem.operand_dtype, device),
        )


@dataclass(frozen=True)
class NormConvKernel(_TritonKernel):
    """Convolutions behind norm and SiLU, wide heads too."""

    tiles: _Tiles = _TMA

    def candidates(self, problem: NormConvProblem | HeadProblem, device: Device) -> Sequence[str]:
        """See `Kernel`."""
        return self.tiles.candidates(problem, device)

    def prepare(
        self,
        weights: LayerWeights,
        problem: NormConvProblem | HeadProblem,
        config: str,
        device: Device,
    ) -> TritonNormConv:
        """See `Kernel`."""
        weight = layout.to_format(weights.weight.detach().to(OPERAND), "channels_last_3d")
        scale, bias = behind_norm(weights)
        return TritonNormConv(
            self.name,
            config,
            scale,
            bias,
            weight,
            problem.out_dtype,
            ConvConfig.parse(config),
            self.tiles.launch,
        )


@dataclass(frozen=True)
class HeadKernel(_TritonKernel):
    """Narrow heads."""

    def candidates(self, problem: HeadProblem, device: Device) -> Sequence[str]:
        """See `Kernel`."""
        return head_candidates(device)

    def prepare(
        self, weights: LayerWeights, problem: HeadProblem, config: str, device: Device
    ) -> TritonHead:
        """See `Kernel`."""
        scale, bias = behind_norm(weights)
        packed = pack_head(weights.weight, OPERAND)
        tile = HeadConfig.parse(config)
        return TritonHead(self.name, config, scale, bias, packed, problem.out_channels, tile)


@dataclass(frozen=True)
class UpsampleKernel(_TritonKernel):
    """Up-samplers."""

    tiles: _Tiles = _TMA

    def candidates(self, problem: UpsampleProblem, device: Device) -> Sequence[str]:
        """See `Kernel`."""
        return self.tiles.candidates(problem, device)

    def prepare(
        self, weights: LayerWeights, problem: UpsampleProblem, config: str, device: Device
    ) -> TritonUpsample:
        """See `Kernel`."""
        folded = fold_upsample(weights.weight.detach()).to(problem.feature_dtype)
        bias = None if weights.bias is None else weights.bias.detach()
        tile = ConvConfig.parse(config)
        return TritonUpsample(self.name, config, folded, bias, tile, self.tiles.launch)


@dataclass(frozen=True)
class StridedKernel(_TritonKernel):
    """Down-samplers."""

    def candidates(self, problem: StridedProblem, device: Device) -> Sequence[str]:
        """See `Kernel`."""
        return strided_candidates(problem.in_channels, problem.out_channels, device)

    def prepare(
        self, weights: LayerWeights, problem: StridedProblem, config: str, device: Device
    ) -> TritonStrided:
        """See `Kernel`."""
        weight = weights.weight.detach().to(problem.feature_dtype)
        weight = weight[:, :, None] if weight.ndim == 4 else weight
        weight = layout.to_format(weight, "channels_last_3d")
        tile = StridedConfig.parse(config)
        precision = precision_of(problem.feature_dtype, device)
        return TritonStrided(self.name, config, weight, problem.stride, tile, precision)


@dataclass(frozen=True)
class AttentionKernel(_TritonKernel):
    """Attention. A configuration names those of attention, queries / keys / values, projection."""

    tiles: _Tiles = _TMA

    def candidates(self, problem: AttentionProblem, device: Device) -> Sequence[str]:
        """See `Kernel`. Every attention with the best convolutions, then with the smaller ones."""
        c = problem.channels
        qkv = self.tiles.pointwise(c, 3 * c, device)
        projection = self.tiles.pointwise(c, c, device)
        return [
            _SEPARATOR.join((core, qkv[min(i, len(qkv) - 1)], projection[i]))
            for i in range(len(projection))
            for core in attention_candidates(c, device, self.tiles is _TMA)
        ]

    def prepare(
        self, weights: LayerWeights, problem: AttentionProblem, config: str, device: Device
    ) -> TritonAttention:
        """See `Kernel`."""
        core, qkv, projection = config.split(_SEPARATOR)
        if weights.gamma is None or weights.projection is None:
            raise ValueError("attention needs the gain of its norm and a projection")
        return TritonAttention(
            self.name,
            config,
            norm_scale(weights.gamma),
            self._pointwise(weights.weight, OPERAND, qkv),
            self._pointwise(weights.projection, problem.feature_dtype, projection),
            AttentionConfig.parse(core),
            self.tiles is _TMA,
        )

    def _pointwise(self, weight: torch.Tensor, out_dtype: torch.dtype, config: str) -> TritonConv:
        """A 1x1 convolution of float16."""
        weight = layout.to_format(weight.detach().to(OPERAND)[:, :, None], "channels_last_3d")
        tile = ConvConfig.parse(config)
        return TritonConv(self.name, config, weight, out_dtype, False, tile, self.tiles.launch)


_SEPARATOR = " / "


def _used(*operations: str) -> Mapping[str, str]:
    return MappingProxyType(dict.fromkeys(operations, "triton"))


def _tma(**others: Any) -> Requires:
    return Requires(_VENDORS - {"amd"}, features=frozenset({"tma"}), **others)


def _pointer(**others: Any) -> Requires:
    return Requires(_VENDORS, capability=(8, 0), amd_features=_MATRIX_UNITS, **others)


_CONV, _FUSED = _used("conv3d"), _used("conv3d", "norm_silu")
_UPSAMPLE, _ATTENTION = _used("upsample_conv2d"), _used("norm", "conv2d", "attention")
_BELOW = {"largest_operand": _LARGEST}
_WIDE = {"out_channels": (_NARROW + 1, 1 << 30), "largest_operand": _LARGEST}

KERNELS: tuple[Kernel[Any, Any], ...] = (
    ConvKernel("tma", "conv3d", _tma(), _CONV),
    ConvKernel("pointer", "conv3d", _pointer(), _CONV, tiles=_POINTER),
    NormConvKernel("tma", "norm_conv3d", _tma(**_BELOW), _FUSED),
    NormConvKernel("pointer", "norm_conv3d", _pointer(**_BELOW), _FUSED, tiles=_POINTER),
    HeadKernel(
        "narrow", "head", _pointer(out_channels=(1, _NARROW), largest_operand=_LARGEST), _FUSED
    ),
    NormConvKernel("tma", "head", _tma(**_WIDE), _FUSED),
    NormConvKernel("pointer", "head", _pointer(**_WIDE), _FUSED, tiles=_POINTER),
    UpsampleKernel("tma", "upsample_conv2d", _tma(), _UPSAMPLE),
    UpsampleKernel("pointer", "upsample_conv2d", _pointer(), _UPSAMPLE, tiles=_POINTER),
    StridedKernel("pointer", "strided_conv", _pointer(), _used("conv2d")),
    AttentionKernel("tma", "attention", _tma(**_BELOW), _ATTENTION),
    AttentionKernel("pointer", "attention", _pointer(**_BELOW), _ATTENTION, tiles=_POINTER),
)


def unavailable_reason(device: Device) -> str | None:
    """Nothing is needed besides Triton itself."""
    return None


def make_family() -> Family:
    """This family."""
    return Family("triton", KERNELS, unavailable_reason, get_ready=get_ready)
