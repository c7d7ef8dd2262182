"""The CUDA family: which kernels there are, what each requires, how each makes its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from ...ops.problem import HeadProblem, LayerWeights, NormConvProblem, UpsampleProblem
from ...said import said
from ..bounds import Bound, float16_sums_bound, winograd_phases
from ..device import Device
from ..kernel import BuildError, Family, Kernel, Requires
from ..weights import behind_norm, fold_upsample
from ..winograd import QUADS, grown_quad_phases
from . import conv3x3_mma, conv3x3_wgmma, driver
from .attention import ATTENTION_KERNELS
from .base import CudaKernel
from .conv_layers import CONV_KERNELS
from .layers import OPERAND, CudaNormConv, CudaUpsample
from .norm import make_norm, norm_program
from .program import Program

# Winograd along time and rows, or F(4,3) along time, makes numbers up to four times as large.
_LARGEST = torch.finfo(OPERAND).max / 4
# wgmma is Hopper's alone.
_HOPPER = Requires(
    features=frozenset({"wgmma"}),
    in_multiple=32,
    out_multiples=(96, 64),
    largest_operand=_LARGEST,
)
_TURING = Requires(capability=(7, 5), in_multiple=8, out_multiples=(8,), largest_operand=_LARGEST)
_TURING_HEAD = Requires(capability=(7, 5), in_multiple=8, largest_operand=_LARGEST)


# -- Hopper ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wgmma(CudaKernel):
    """Machine code for compute capability 9.0 itself, which no other card can imitate."""

    def build(self, problem: Any, config: str, device: Device) -> None:
        """See `Kernel`."""
        if device.machine_code != "sm_90":
            raise BuildError(
                said(
                    "kernel.machine_code",
                    "its machine code is for compute capability 9.0, {device}",
                    device=device.spoken,
                )
            )
        if not driver.has_tensor_maps():
            raise BuildError(said("kernel.old_driver", "needs a driver of CUDA 12 or later"))
        super().build(problem, config, device)


@dataclass(frozen=True)
class NormConvWgmma(_Wgmma):
    """3x3x3 convolutions behind norm and SiLU: by Winograd along time, or direct."""

    def candidates(self, problem: NormConvProblem, device: Device) -> Sequence[str]:
        """See `Kernel`."""
        form = _form(problem)
        return ("winograd4", form) if _has_quads(problem) else (form,)

    def programs(
        self, problem: NormConvProblem, config: str, device: Device
    ) -> tuple[Program, ...]:
        """The convolution, and the norm that writes its operand."""
        variant = _variant(problem, config)
        return conv3x3_wgmma.program(variant), _norm_of(problem, variant, device)

    def prepare(
        self, weights: LayerWeights, problem: NormConvProblem, config: str, device: Device
    ) -> CudaNormConv:
        """See `Kernel`."""
        variant, (scale, bias) = _variant(problem, config), behind_norm(weights)
        packed = conv3x3_wgmma.pack(weights.weight, variant)
        conv = partial(conv3x3_wgmma.conv3x3, packed=packed, bias=bias, variant=variant)
        norm, transform = make_norm(device.machine_code).of(variant.transform), variant.transform
        return CudaNormConv(self.name, config, scale, norm, conv, variant.taps, transform)


@dataclass(frozen=True)
class UpsampleWgmma(_Wgmma):
    """The 3x3 convolution of an up-sampler; its operand has the dtype of the features."""

    def candidates(self, problem: UpsampleProblem, device: Device) -> Sequence[str]:
        """See `Kernel`."""
        return ("doubled",)

    def programs(
        self, problem: UpsampleProblem, config: str, device: Device
    ) -> tuple[Program, ...]:
        """The convolution."""
        return (conv3x3_wgmma.program(_doubled(problem)),)

    def prepare(
        self, weights: LayerWeights, problem: UpsampleProblem, config: str, device: Device
    ) -> CudaUpsample:
        """See `Kernel`."""
        variant, (folded, bias) = _doubled(problem), _folded(weights, problem)
        packed = conv3x3_wgmma.pack_doubled(folded, variant)
        conv = partial(conv3x3_wgmma.upsample_conv3x3, packed=packed, bias=bias, variant=variant)
        return CudaUpsample(self.name, config, conv)


def _variant(problem: NormConvProblem, config: str) -> conv3x3_wgmma.Variant:
    return conv3x3_wgmma.Variant(
        problem.in_channels,
        problem.out_channels,
        config.startswith("winograd"),
        1 if config == "direct1" else 3,
        problem.out_dtype,
        quads=config == "winograd4",
    )


def _doubled(problem: UpsampleProblem) -> conv3x3_wgmma.Variant:
    return conv3x3_wgmma.Variant(
        problem.in_channels, problem.out_channels, False, 1, problem.feature_dtype, doubled=True
    )


# -- every card ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mma(CudaKernel):
    """conv3x3_mma.cu: a configuration is a form and a tile that the card has shared memory for."""

    def _fitting(self, names: Sequence[str], problem: Any, device: Device) -> list[str]:
        """Those for which the card has shared memory."""
        return [
            name
            for name in names
            if self._conv(problem, name, device).shared_bytes <= device.shared_bytes
        ]

    def variant(self, problem: Any, config: str, device: Device) -> conv3x3_mma.Variant:
        """What is compiled for `config`."""
        form, tile, half_sums = conv3x3_mma.parse(config)
        return conv3x3_mma.Variant(
            problem.in_channels,
            problem.out_channels,
            form,
            tile,
            problem.operand_dtype,
            problem.out_dtype,
            device.machine_code,
            half_sums,
        )

    def programs(self, problem: Any, config: str, device: Device) -> tuple[Program, ...]:
        """The convolution."""
        return (self._conv(problem, config, device),)

    def _conv(self, problem: Any, config: str, device: Device) -> Program:
        return conv3x3_mma.program(self.variant(problem, config, device))


@dataclass(frozen=True)
class NormConvMma(_Mma):
    """3x3x3 convolutions behind norm and SiLU, heads too: by Winograd along time, or direct."""

    def candidates(self, problem: NormConvProblem | HeadProblem, device: Device) -> Sequence[str]:
        """See `Kernel`."""
        form = _form(problem)
        if form == "winograd" and problem.operation == "head":
            form = "direct3"  # few channels come out: reading is the cost, not multiplying
        names = conv3x3_mma.configs(form, problem.out_channels)
        quads: list[str] = []
        if form == "winograd" and _has_quads(problem):
            quads = conv3x3_mma.configs("winograd4", problem.out_channels)
        if device.has_slow_float32_sums and problem.operation == "norm_conv3d":
            # Cheaper products before what is best where all are fast. "winograd2d" is not among
            # them: see conv3x3_mma_2d.cu.
            halves = [*conv3x3_mma.half_sums(quads)[:1], *conv3x3_mma.half_sums(names)[:1]]
            return self._fitting([*halves, *quads[:1], *names[:2]], problem, device)
        return self._fitting([*quads[:2], *names], problem, device)

    def bound(self, weights: LayerWeights, problem: Any, config: str) -> Bound | None:
        """See `Kernel`: of sums in float16."""
        form, tile, half_sums = conv3x3_mma.parse(config)
        if not half_sums or weights.gamma is None:
            return None
        taps, channels = weights.weight.detach(), tile.summed_channels
        if form == "winograd":
            return float16_sums_bound(weights.gamma, winograd_phases(taps), 2, channels)
        if form == "winograd4":
            return float16_sums_bound(weights.gamma, grown_quad_phases(taps), 1, channels)
        if form == "winograd2d":
            # Along rows too, whose taps stand where those of time stood: three columns are left.
            rows = winograd_phases(taps).flatten(0, 1).unsqueeze(3)
            return float16_sums_bound(weights.gamma, winograd_phases(rows), 4, channels)
        taps = taps[:, :, 2:] if form == "direct1" else taps
        return float16_sums_bound(weights.gamma, taps.permute(2, 0, 1, 3, 4), 1, channels)

    def programs(
        self, problem: NormConvProblem | HeadProblem, config: str, device: Device
    ) -> tuple[Program, ...]:
        """The convolution, and the norm that writes its operand."""
        variant = self.variant(problem, config, device)
        return conv3x3_mma.program(variant), _norm_of(problem, variant, device)

    def prepare(
        self,
        weights: LayerWeights,
        problem: NormConvProblem | HeadProblem,
        config: str,
        device: Device,
    ) -> CudaNormConv:
        """See `Kernel`."""
        variant, (scale, bias) = self.variant(problem, config, device), behind_norm(weights)
        packed = conv3x3_mma.pack(weights.weight, variant)
        conv = partial(conv3x3_mma.conv3x3, packed=packed, bias=bias, variant=variant)
        norm, transform = make_norm(device.machine_code).of(variant.transform), variant.transform
        return CudaNormConv(self.name, config, scale, norm, conv, variant.taps, transform)


@dataclass(frozen=True)
class UpsampleMma(_Mma):
    """The 3x3 convolution of an up-sampler; its operand has the dtype of the features."""

    def candidates(self, problem: UpsampleProblem, device: Device) -> Sequence[str]:
        """See `Kernel`."""
        names = conv3x3_mma.configs("doubled", problem.out_channels)
        return self._fitting(names, problem, device)

    def prepare(
        self, weights: LayerWeights, problem: UpsampleProblem, config: str, device: Device
    ) -> CudaUpsample:
        """See `Kernel`."""
        variant, (folded, bias) = self.variant(problem, config, device), _folded(weights, problem)
        packed = conv3x3_mma.pack_doubled(folded, variant)
        conv = partial(conv3x3_mma.upsample_conv3x3, packed=packed, bias=bias, variant=variant)
        return CudaUpsample(self.name, config, conv)


# -- of both ---------------------------------------------------------------------------------------


def _form(problem: NormConvProblem | HeadProblem) -> conv3x3_mma.Form:
    if problem.only_frame:
        return "direct1"
    # Where a latent frame is one frame there are no pairs.
    return "winograd" if problem.frames > 1 else "direct3"


def _has_quads(problem: NormConvProblem | HeadProblem) -> bool:
    """Whether the frames that a layer makes of a latent frame are a quad."""
    return not problem.only_frame and problem.frames == QUADS.frames


def _norm_of(
    problem: NormConvProblem | HeadProblem,
    variant: conv3x3_mma.Variant | conv3x3_wgmma.Variant,
    device: Device,
) -> Program:
    """The norm that writes the operand."""
    past = variant.taps - 1
    return norm_program(
        problem.in_channels, problem.feature_dtype, past, variant.transform, device.machine_code
    )


def _folded(weights: LayerWeights, problem: UpsampleProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """An up-sampler's folded weight and its bias."""
    if weights.bias is None:
        raise ValueError("an up-sampler needs a bias")
    folded = fold_upsample(weights.weight.detach()).to(problem.feature_dtype)
    return folded, weights.bias.detach().float()


def unavailable_reason(device: Device) -> str | None:
    """Why kernels cannot be compiled or launched in this process, or None."""
    return driver.unavailable_reason()


_FUSED = MappingProxyType({"conv3d": "cuda", "norm_silu": "cuda"})
_UP = MappingProxyType({"upsample_conv2d": "cuda"})

KERNELS: tuple[Kernel[Any, Any], ...] = (
    NormConvWgmma("wgmma", "norm_conv3d", _HOPPER, _FUSED),
    NormConvMma("mma", "norm_conv3d", _TURING, _FUSED),
    NormConvMma("mma", "head", _TURING_HEAD, _FUSED),
    UpsampleWgmma("wgmma", "upsample_conv2d", _HOPPER, _UP),
    UpsampleMma("mma", "upsample_conv2d", _TURING, _UP),
    *CONV_KERNELS,
    *ATTENTION_KERNELS,
)


def make_family() -> Family:
    """This family."""
    return Family(
        "cuda",
        KERNELS,
        unavailable_reason,
        can_compile=lambda: driver.compiler_missing() is None,
        get_ready=driver.get_ready,
    )
