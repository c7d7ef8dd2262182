"""The CUDA family: which kernels there are, what each requires, how each makes its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ...ops.problem import LayerWeights, NormConvProblem, Operation, UpsampleProblem
from ..bounds import Bound
from ..device import Device
from ..kernel import BuildError, Family, FusedNorm, Requires
from ..weights import fold_upsample, norm_scale
from . import driver
from .conv3x3_wgmma import Variant, pack, pack_doubled, program
from .layers import OPERAND, CudaNormConv, CudaUpsample
from .program import build

# wgmma is Hopper's alone.
_HOPPER = Requires(
    features=frozenset({"wgmma"}),
    in_multiple=32,
    out_multiples=(96, 64),
    largest_operand=torch.finfo(OPERAND).max,
)


@dataclass(frozen=True)
class _CudaKernel:
    """What all of them have in common. `used`: see `Kernel`."""

    operation: Operation
    requires: Requires
    used: Mapping[str, str]
    name: str = "wgmma"
    family: str = "cuda"
    build_failures: tuple[type[Exception], ...] = (BuildError,)

    def bound(self, weights: LayerWeights, problem: object, config: str) -> Bound | None:
        """See `Kernel`. Sums are float32."""
        return None

    def _build(self, variant: Variant, device: Device) -> None:
        if device.machine_code != "sm_90":
            raise BuildError(f"its machine code is for compute capability 9.0, {device.spoken}")
        if not driver.has_tensor_maps():
            raise BuildError("needs a driver of CUDA 12 or later")
        build(program(variant))


@dataclass(frozen=True)
class NormConv(_CudaKernel):
    """3x3x3 convolutions behind norm and SiLU: by Winograd along time, or direct.

    norm: writes their operands.
    """

    norm: FusedNorm | None = None

    def candidates(self, problem: NormConvProblem, device: Device) -> Sequence[str]:
        """See `Kernel`."""
        if problem.only_frame:
            return ("direct1",)
        # Where a latent frame is one frame there are no pairs.
        return ("winograd",) if problem.frames > 1 else ("direct3",)

    def build(self, problem: NormConvProblem, config: str, device: Device) -> None:
        """See `Kernel`."""
        self._build(_variant(problem, config), device)

    def prepare(
        self, weights: LayerWeights, problem: NormConvProblem, config: str, device: Device
    ) -> CudaNormConv:
        """See `Kernel`."""
        if weights.gamma is None or weights.bias is None or self.norm is None:
            raise ValueError("a layer behind a norm needs a gain, a bias and a kernel for the norm")
        variant = _variant(problem, config)
        packed, bias = pack(weights.weight, variant), weights.bias.detach().float()
        scale = norm_scale(weights.gamma)
        return CudaNormConv(self.name, variant, packed, bias, scale, self.norm)


@dataclass(frozen=True)
class Upsample(_CudaKernel):
    """The 3x3 convolution of an up-sampler; its operand has the dtype of the features."""

    def candidates(self, problem: UpsampleProblem, device: Device) -> Sequence[str]:
        """See `Kernel`."""
        return ("doubled",)

    def build(self, problem: UpsampleProblem, config: str, device: Device) -> None:
        """See `Kernel`."""
        self._build(_doubled(problem), device)

    def prepare(
        self, weights: LayerWeights, problem: UpsampleProblem, config: str, device: Device
    ) -> CudaUpsample:
        """See `Kernel`."""
        if weights.bias is None:
            raise ValueError("an up-sampler needs a bias")
        variant = _doubled(problem)
        folded = fold_upsample(weights.weight.detach()).to(problem.feature_dtype)
        packed, bias = pack_doubled(folded, variant), weights.bias.detach().float()
        return CudaUpsample(self.name, variant, packed, bias)


def _variant(problem: NormConvProblem, config: str) -> Variant:
    return Variant(
        problem.in_channels,
        problem.out_channels,
        config == "winograd",
        1 if config == "direct1" else 3,
        problem.out_dtype,
    )


def _doubled(problem: UpsampleProblem) -> Variant:
    return Variant(
        problem.in_channels, problem.out_channels, False, 1, problem.feature_dtype, doubled=True
    )


def unavailable_reason(device: Device) -> str | None:
    """Why kernels cannot be compiled or launched in this process, or None."""
    return driver.unavailable_reason()


def make_family(norm: FusedNorm | None) -> Family:
    """This family. It has no norm of its own yet: `norm` is another family's."""
    if norm is None:
        raise ValueError("the CUDA family borrows the kernels of a norm")
    fused = MappingProxyType({"conv3d": "cuda", "norm_silu": norm.family})
    doubled = MappingProxyType({"upsample_conv2d": "cuda"})
    kernels = (
        NormConv("norm_conv3d", _HOPPER, fused, norm=norm),
        Upsample("upsample_conv2d", _HOPPER, doubled),
    )
    return Family("cuda", kernels, unavailable_reason)
