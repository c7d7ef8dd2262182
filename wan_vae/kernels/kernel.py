"""What a kernel is: an operation, a family, requirements as data, configurations, and a layer.

A family (Triton, CUDA C++) offers `Kernel`s. `select.py` asks each of them the same questions in
the same order, so nothing outside a family's folder knows how its kernels work. Configurations
cross that border as names ("f2_p8x16_n128+0_k32_w8_s3"), which the family parses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from ..errors import BackendError
from ..layout import LayoutCounter
from ..ops.opset import FusedConv, HaloRows, Prepared
from ..ops.problem import LayerWeights, Operation, Problem
from ..said import Said, said
from .bounds import Bound
from .device import Device, Feature, Vendor

_VENDOR_NAMES: dict[Vendor, str] = {
    "nvidia": "NVIDIA",
    "amd": "AMD",
    "apple": "Apple",
    "intel": "Intel",
}
_FEATURE_NAMES: dict[Feature, str] = {
    "cp_async": "cp.async (compute capability 8.0 or later)",
    "tma": "TMA (compute capability 9.0 or later)",
    "wgmma": "wgmma (compute capability 9.0, Hopper)",
    "tcgen05": "tcgen05 (compute capability 10.x)",
    "mfma": "MFMA (CDNA)",
    "wmma": "WMMA (RDNA 3 or later)",
}


class BuildError(BackendError):
    """A kernel cannot be compiled, loaded or launched here. One line, with the reason."""


def no_gpu() -> Said:
    """The one reason why nothing but PyTorch runs where there is no card."""
    return said("kernel.no_gpu", "no GPU")


def _needs(feature: str, device: Device) -> Said:
    return said(
        "kernel.feature", "needs {feature}, {device}", feature=feature, device=device.spoken
    )


@dataclass(frozen=True)
class Requires:
    """What a kernel asks of a device and of a problem.

    vendors: whose cards. features: all of them. capability: the lowest compute capability of an
    NVIDIA card. amd_features: of which an AMD card has one.
    in_multiple: of which the input channels are a multiple. out_multiples: of one of which the
    output channels are. out_channels: the least and the most of them. largest_operand: the largest
    number that it can read behind a norm.
    """

    vendors: frozenset[Vendor] = frozenset({"nvidia"})
    features: frozenset[Feature] = frozenset()
    capability: tuple[int, int] | None = None
    amd_features: frozenset[Feature] = frozenset()
    feature_dtypes: frozenset[torch.dtype] = frozenset({torch.bfloat16, torch.float16})
    in_multiple: int = 1
    out_multiples: tuple[int, ...] = (1,)
    out_channels: tuple[int, int] = (1, 1 << 30)
    largest_operand: float = float("inf")

    def unmet_by_device(self, device: Device) -> str | None:
        """What `device` lacks, or None."""
        if device.vendor not in self.vendors:
            if device.vendor in ("cpu", "interpreter"):
                return no_gpu()
            return said(
                "kernel.vendor",
                "written for {vendor} cards, {device}",
                vendor=self._vendor_names,
                device=device.spoken,
            )
        if device.vendor == "interpreter":
            return None
        if device.vendor == "amd":
            if self.amd_features.isdisjoint(device.features):
                return _needs(self._amd_features, device)
        elif self.capability is not None and (
            device.capability is None or device.capability < self.capability
        ):
            major, minor = self.capability
            return said(
                "kernel.capability",
                "needs compute capability {capability}, {device}",
                capability=f"{major}.{minor}",
                device=device.spoken,
            )
        for feature in sorted(self.features - device.features):
            return _needs(_FEATURE_NAMES[feature], device)
        return None

    def unmet_by_dtype(self, device: Device, feature_dtype: torch.dtype) -> str | None:
        """Why features of `feature_dtype` cannot be read, or None.

        The interpreter, which is for tests, reads every dtype.
        """
        if device.vendor == "interpreter":
            return None
        has_bf16 = device.capability is None or device.capability >= (8, 0)
        if feature_dtype == torch.bfloat16 and not has_bf16:
            return said(
                "kernel.bf16_capability",
                "bfloat16 was asked for, of which tensor cores need 8.0, {device}",
                device=device.spoken,
            )
        if feature_dtype in self.feature_dtypes:
            return None
        name = str(feature_dtype).removeprefix("torch.")
        if feature_dtype == torch.bfloat16:
            return said(
                "kernel.fp16_alone",
                "bfloat16 was asked for, the kernels read and write float16 alone",
            )
        return said(
            "kernel.fp16_operands",
            "{dtype} was asked for, the kernels' operands are float16",
            dtype=name,
        )

    def unmet(self, device: Device, problem: Problem) -> str | None:
        """The first requirement that `device` or `problem` does not meet, or None."""
        reason = self.unmet_by_device(device) or self.unmet_by_dtype(device, problem.feature_dtype)
        if reason is not None:
            return reason
        channels, out = problem.in_channels, problem.out_channels
        if channels % self.in_multiple:
            return said(
                "kernel.in_channels",
                "needs multiples of {wanted} input channels, the layer has {channels}",
                wanted=self.in_multiple,
                channels=channels,
            )
        if all(out % multiple for multiple in self.out_multiples):
            wanted = " or ".join(map(str, self.out_multiples))
            return said(
                "kernel.out_channels",
                "needs multiples of {wanted} output channels, the layer has {channels}",
                wanted=wanted,
                channels=out,
            )
        least, most = self.out_channels
        if not least <= out <= most:
            if out > most:
                return said(
                    "kernel.most_channels",
                    "needs at most {most} output channels, the layer has {channels}",
                    most=most,
                    channels=out,
                )
            return said(
                "kernel.least_channels",
                "needs at least {least} output channels, the layer has {channels}",
                least=least,
                channels=out,
            )
        return None

    def describe(self) -> str:
        """One line for the matrix in README.md."""
        parts = []
        if self.features or self.capability:
            parts += [_FEATURE_NAMES[feature] for feature in sorted(self.features)]
            if self.capability is not None:
                parts.append(
                    f"compute capability {self.capability[0]}.{self.capability[1]} or later"
                )
            if self.amd_features:
                parts[-1] += f" or AMD's {self._amd_features}"
        else:
            parts.append(f"any {self._vendor_names} card")
        if self.in_multiple > 1:
            parts.append(f"input channels in multiples of {self.in_multiple}")
        if self.out_multiples != (1,):
            parts.append(f"output channels in those of {' or '.join(map(str, self.out_multiples))}")
        if self.out_channels[1] < 1 << 30:
            parts.append(f"at most {self.out_channels[1]} output channels")
        if self.out_channels[0] > 1:
            parts.append(f"at least {self.out_channels[0]} output channels")
        return ", ".join(parts)

    @property
    def _amd_features(self) -> str:
        return " or ".join(_FEATURE_NAMES[feature] for feature in sorted(self.amd_features))

    @property
    def _vendor_names(self) -> str:
        names = (_VENDOR_NAMES[v] for v in sorted(self.vendors) if v in _VENDOR_NAMES)
        return " and ".join(names)


# -- layers, by the shape of their call ------------------------------------------------------------


class Layer(Prepared, Protocol):
    """A prepared layer, and which kernel in which configuration it is."""

    @property
    def kernel(self) -> str:
        """The name of the kernel."""
        ...

    @property
    def config(self) -> str:
        """The name of its configuration."""
        ...


class ConvLayer(Layer, Protocol):
    """A convolution alone."""

    @property
    def operand_dtype(self) -> torch.dtype:
        """The dtype in which the kernel reads its input."""
        ...

    def run(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        counter: LayoutCounter,
        padding: tuple[int, int],
        last_slice: bool,
    ) -> torch.Tensor:
        """As `eager.conv3d.conv3d`; `x` [B, C, T, H, W] of any dtype and memory format."""
        ...


class NormConvLayer(Layer, FusedConv, Protocol):
    """Norm, SiLU and the convolution behind them."""


class UpsampleLayer(Layer, Protocol):
    """An up-sampler's doubling and convolution."""

    def run(self, x: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
        """As `eager.upsample.upsample_conv2d`; `x` [N, C, H, W] of any memory format."""
        ...


class StridedLayer(Layer, Protocol):
    """A down-sampler's convolution."""

    def run(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        counter: LayoutCounter,
        pad_after: tuple[int, int],
    ) -> torch.Tensor:
        """`x` [B, C, T, H, W] of any memory format; `pad_after`: zero rows below and columns on
        the right, as in `eager.conv3d.conv2d`."""
        ...


class AttentionLayer(Layer, Protocol):
    """The four parts of an attention, which run together or not at all."""

    @property
    def qkv(self) -> ConvLayer:
        """The 1x1 convolution to queries, keys and values; [N, C, 1, H, W] float16."""
        ...

    @property
    def projection(self) -> ConvLayer:
        """The 1x1 convolution back."""
        ...

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """RMS norm of frames [N, C, H, W], in the dtype that `qkv` reads."""
        ...

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As `eager.attention.attention`."""
        ...


# -- norm and SiLU ---------------------------------------------------------------------------------


class NormCall(NamedTuple):
    """SiLU(rms_norm(x)) behind history frames, for the kernels in `FusedNorm`.

    x [B, C, T, H, W]; scale: from `weights.norm_scale`; history [B, C, past, H', W'] or None for
    zeros. past: how many history frames the result has. keep: whether the new history is wanted,
    with `overwrite` in the memory of the old one. dtype: of the result, that of `x` if None.
    silu: False for the norm alone. halo: the neighbours' rows, which make H' (or W') larger than H
    (W) by two. channels: of the result and the history, zeros behind those of `x`; C if None.
    """

    x: torch.Tensor
    scale: torch.Tensor
    history: torch.Tensor | None = None
    past: int = 2
    keep: bool = False
    dtype: torch.dtype | None = None
    silu: bool = True
    overwrite: bool = False
    halo: HaloRows | None = None
    channels: int | None = None


NormResult = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class FusedNorm:
    """The norm kernels of a family.

    join: the operand [B, C, past + T, H', W'] and the new history. pairs: transformed for Winograd,
    [B, C, 4 * ceil(T / 2), H', W'].
    """

    family: str
    join: Callable[[NormCall], NormResult]
    pairs: Callable[[NormCall], NormResult]


# -- kernels and families --------------------------------------------------------------------------

P = TypeVar("P", contravariant=True)
L = TypeVar("L", covariant=True)


class Kernel(Protocol[P, L]):
    """How one family computes one operation: problems P become layers L."""

    @property
    def operation(self) -> Operation:
        """Which problems it is for."""
        ...

    @property
    def family(self) -> str:
        """Its family."""
        ...

    @property
    def name(self) -> str:
        """Its name, unique within operation and family."""
        ...

    @property
    def requires(self) -> Requires:
        """What it asks of device and problem."""
        ...

    @property
    def used(self) -> Mapping[str, str]:
        """The family that runs each operation of `OpSet` that its layers take part in."""
        ...

    @property
    def build_failures(self) -> tuple[type[Exception], ...]:
        """What preparing or launching a configuration raises that cannot be built for a card."""
        ...

    @property
    def sums_error(self) -> float:
        """The relative error that its sums may add to the rounding of operand and result; 0 where
        they go on in float32."""
        ...

    @property
    def compiles_at_launch(self) -> bool:
        """Whether a launch compiles what was not built: then what is proven is not built again."""
        ...

    def candidates(self, problem: P, device: Device) -> Sequence[str]:
        """Configurations to prove, the best first. They depend on nothing but the arguments."""
        ...

    def bound(self, weights: LayerWeights, problem: P, config: str) -> Bound | None:
        """The largest number that `config` computes with these weights, if it could overflow.

        The layer is refused where it does. Queues work on the weights' device, and does not wait.
        """
        ...

    def build(self, problem: P, config: str, device: Device) -> None:
        """Compile what can be compiled before the first launch, to `device.machine_code`. Raises
        BuildError and nothing else."""
        ...

    def prepare(self, weights: LayerWeights, problem: P, config: str, device: Device) -> L:
        """The layer, with copies of the weights in the kernel's own order."""
        ...


@dataclass(frozen=True)
class Family:
    """What the package of a family offers. `unavailable_reason` says what it misses on a device
    besides what its kernels require, such as a compiler. can_compile: whether that compiler is on
    this machine, with or without a card. is_timed_beside: whether one of its configurations is
    timed too where families before it have enough of them, because nobody can tell its speed from
    its place. get_ready: does what the first launch in a process does once and needs no card for;
    raises nothing, because that launch will say what is wrong."""

    name: str
    kernels: tuple[Kernel[Any, Any], ...]
    unavailable_reason: Callable[[Device], str | None]
    is_timed_beside: bool = False
    can_compile: Callable[[], bool] = lambda: True
    get_ready: Callable[[], None] = lambda: None
