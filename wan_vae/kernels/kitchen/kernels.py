"""The kitchen family: 3x3x3 convolutions behind a norm, of float16 with sums in float16.

Other layers stay with other families, because nothing bounds the sums of an operand that comes from
no norm, and a head gives float32, which comfy-kitchen does not write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from types import MappingProxyType
from typing import Any

import torch

from ... import layout
from ...ops.problem import LayerWeights, NormConvProblem, Operation
from ..bounds import LARGEST_FLOAT16, Bound, float16_sums_bound
from ..device import Device
from ..kernel import BuildError, Family, Kernel, Requires
from ..proof.cases import proof_size
from . import package
from .layers import OPERAND, KitchenNormConv

# Relative error of its sums, beside the rounding of operand and result. Measured on an H100 with
# comfy-kitchen 0.2.40: 9.9e-4 to 1.9e-3 for 24 to 384 channels; it grows as the root of their
# number, so up to 3.1e-3 for 1024.
_SUMS_ERROR = 4e-3
# The fewest products that a tensor core adds before it rounds a sum to float16.
_PRODUCTS_A_ROUNDING = 8


@dataclass(frozen=True)
class KitchenKernel:
    """comfy-kitchen's `fp16_conv3d`. release: of the package, None if it is not installed."""

    name: str
    requires: Requires
    release: str | None
    operation: Operation = "norm_conv3d"
    family: str = "kitchen"
    sums_error: float = _SUMS_ERROR
    compiles_at_launch: bool = False
    build_failures: tuple[type[Exception], ...] = (BuildError,)

    @property
    def used(self) -> Mapping[str, str]:
        """See `Kernel`. The norm is PyTorch's."""
        return MappingProxyType({"conv3d": self.family})

    def candidates(self, problem: NormConvProblem, device: Device) -> Sequence[str]:
        """See `Kernel`. The release, so that a verdict is on the kernels that it was made for."""
        if self.release is None or problem.feature_dtype != OPERAND:
            return ()
        return (self.release,)

    def bound(self, weights: LayerWeights, problem: NormConvProblem, config: str) -> Bound | None:
        """See `Kernel`: of a sum over all taps and channels, with what its roundings may add."""
        if weights.gamma is None:
            return None
        taps = weights.weight.detach()
        taps = taps[:, :, 2:] if problem.only_frame else taps
        channels = problem.in_channels
        bound = float16_sums_bound(weights.gamma, taps.flatten(2, 3)[None], 1, channels)
        roundings = taps[0].numel() / _PRODUCTS_A_ROUNDING
        growth = exp(roundings * torch.finfo(OPERAND).eps / 2)
        return replace(bound, limit=LARGEST_FLOAT16 / growth)

    def build(self, problem: NormConvProblem, config: str, device: Device) -> None:
        """See `Kernel`. Everything is compiled in the package."""
        reason = package.unavailable_reason(device, self.release)
        if reason is not None:
            raise BuildError(reason)

    def prepare(
        self, weights: LayerWeights, problem: NormConvProblem, config: str, device: Device
    ) -> KitchenNormConv:
        """See `Kernel`. Raises BuildError if the package does not take the layer."""
        if weights.gamma is None or weights.bias is None:
            raise ValueError("a layer behind a norm needs the gain of the norm, and a bias")
        taps = weights.weight.detach().to(OPERAND)
        taps = taps[:, :, 2:] if problem.only_frame else taps
        weight = layout.to_format(taps, "channels_last_3d")
        bias = weights.bias.detach().to(OPERAND)
        conv = package.convolution(device)
        if device.vendor != "interpreter":  # there it is PyTorch's convolution, for the tests
            frames, rows, cols = proof_size(problem, weight.device)
            size = (1 if problem.only_frame else frames, rows, cols)
            package.check_own_kernel(conv, weight, bias, size)
        gamma = weights.gamma.detach().flatten().float()
        return KitchenNormConv(self.name, config, gamma, weight, bias, conv)


def _requires(**others: Any) -> Requires:
    return Requires(
        feature_dtypes=frozenset({OPERAND}),
        in_multiple=8,
        out_multiples=(8,),
        largest_operand=LARGEST_FLOAT16,
        **others,
    )


def make_family() -> Family:
    """This family, of the release that is installed."""
    release = package.installed_version()
    kernels: tuple[Kernel[Any, Any], ...] = (
        KitchenKernel(
            "cutlass",
            _requires(vendors=frozenset({"nvidia", "interpreter"}), capability=(7, 5)),
            release,
        ),
        KitchenKernel(
            "wmma",
            _requires(vendors=frozenset({"amd"}), amd_features=frozenset({"wmma"})),
            release,
        ),
    )
    return Family(
        "kitchen",
        kernels,
        lambda device: package.unavailable_reason(device, release),
        is_timed_beside=True,
    )
