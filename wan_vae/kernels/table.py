"""The table of prepared layers, by weight; it makes the operations of a run.

A call looks up its weight in a dictionary. A weight without an entry runs eager.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from .. import layout
from ..layout import LayoutCounter
from ..ops.opset import FusedConv, LayerChoice, OpSet, Prepared, Refusal, eager_ops
from ..ops.problem import ConvProblem, LayerSite
from .kernel import (
    AttentionLayer,
    ConvLayer,
    Kernel,
    NormConvLayer,
    StridedLayer,
    UpsampleLayer,
)


@dataclass
class LayerTable:
    """Layers by the identity of their weight, and what could not be used and why.

    families: in order of preference, for the report. eager: what runs every other layer.
    """

    families: Sequence[str]
    eager: OpSet = field(default_factory=eager_ops)
    layers: dict[str, Prepared] = field(default_factory=dict)
    choices: dict[str, LayerChoice] = field(default_factory=dict)
    _convs: dict[int, ConvLayer] = field(default_factory=dict)
    _fused: dict[int, NormConvLayer] = field(default_factory=dict)
    _upsamplers: dict[int, UpsampleLayer] = field(default_factory=dict)
    _strided: dict[int, StridedLayer] = field(default_factory=dict)
    # By the gain of the norm in front, and by the width of the head.
    _norms: dict[int, AttentionLayer] = field(default_factory=dict)
    _heads: dict[int, AttentionLayer] = field(default_factory=dict)
    _choice_of: dict[int, LayerChoice] = field(default_factory=dict)
    _used: dict[str, set[str]] = field(default_factory=dict)
    _pixels: torch.dtype | None = None
    # Layers by (operation, family, reason): refusals that count, and those that only count for a
    # layer that no other kernel runs.
    _failed: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)
    _unfit: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)

    # -- filling -------------------------------------------------------------------------------

    def bind(
        self, site: LayerSite, kernel: Kernel[Any, Any], layer: Any, choice: LayerChoice
    ) -> None:
        """Let `layer`, which `kernel` prepared as `choice` says, run the layer of `site`."""
        weights = site.weights
        key = id(weights.weight)
        bound = [key]
        match site.problem.operation:
            case "conv3d":
                self._convs[key] = layer
                if isinstance(site.problem, ConvProblem) and site.problem.source == "pixels":
                    self._pixels = layer.operand_dtype
            case "norm_conv3d" | "head":
                self._fused[key] = layer
            case "upsample_conv2d":
                self._upsamplers[key] = layer
            case "strided_conv":
                self._strided[key] = layer
            case "attention":
                self._convs[key] = layer.qkv
                self._convs[id(weights.projection)] = layer.projection
                self._norms[id(weights.gamma)] = layer
                self._heads[weights.weight.shape[1]] = layer
                bound.append(id(weights.projection))
        self.layers[site.name] = layer
        self.choices[site.name] = choice
        self._choice_of |= dict.fromkeys(bound, choice)
        for operation, family in kernel.used.items():
            self._used.setdefault(operation, set()).add(family)

    def refuse(self, site: LayerSite, family: str, reason: str, *, failed: bool) -> None:
        """Keep why a kernel of `family` does not run the layer of `site`.

        failed: it should have, but it is wrong here or cannot be built: always reported. Otherwise
        it was not made for the layer, which is reported if no other kernel was.
        """
        kept = self._failed if failed else self._unfit
        names = kept.setdefault((site.problem.op, family, reason), [])
        if site.name not in names:  # two kernels of a family may say the same
            names.append(site.name)

    # -- for plan and report -------------------------------------------------------------------

    @property
    def used(self) -> dict[str, str]:
        """The preferred one of the families that run each operation of which a layer runs here."""
        order = {family: i for i, family in enumerate(self.families)}
        return {
            operation: min(families, key=lambda family: order.get(family, len(order)))
            for operation, families in self._used.items()
        }

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Each reason once, with the layers that it concerns."""
        eager = {
            reason: missing
            for reason, names in self._unfit.items()
            if (missing := [name for name in names if name not in self.layers])
        }
        return tuple(
            Refusal(op, family, reason, tuple(names))
            for (op, family, reason), names in (*self._failed.items(), *eager.items())
        )

    def choice_of(self, weight: torch.Tensor) -> LayerChoice | None:
        """The kernel that runs the layer of `weight`, or None for eager."""
        return self._choice_of.get(id(weight))

    def ops(self) -> OpSet:
        """The operations of a run: those of this table, and eager ones for every other layer."""
        eager = self.eager
        return replace(
            eager,
            norm=self.norm,
            conv3d=self.conv3d,
            conv2d=self.conv2d,
            upsample_conv2d=self.upsample_conv2d,
            attention=self.attention,
            fused_conv=self.fused_conv,
            pixels=self._pixels,
            choice_of=self.choice_of,
            used={**eager.used, **self.used},
            refusals=self.refusals,
            layers=MappingProxyType(dict(self.layers)),
            choices=MappingProxyType(dict(self.choices)),
        )

    # -- running: the operations of `OpSet` ----------------------------------------------------

    def fused_conv(self, weight: torch.Tensor) -> FusedConv | None:
        """The layer of the convolution of `weight` behind norm and SiLU, or None."""
        return self._fused.get(id(weight))

    def norm(self, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """As `eager.norm.rms_norm`, of frames [N, C, H, W]; in the dtype that its reader wants."""
        layer = self._norms.get(id(gamma))
        return self.eager.norm(x, gamma) if layer is None else layer.norm(x)

    def conv3d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        counter: LayoutCounter,
        *,
        stride: tuple[int, int, int] = (1, 1, 1),
        padding: tuple[int, int] = (0, 0),
        last_slice: bool = False,
    ) -> torch.Tensor:
        """As `eager.conv3d.conv3d`; `x` may have another dtype than `weight`, and so may the
        result."""
        strided = self._strided.get(id(weight))
        if strided is not None:
            return strided.run(x, bias, counter, (0, 0))
        layer = self._convs.get(id(weight))
        if layer is not None:
            return layer.run(x, bias, counter, padding, last_slice)
        return self.eager.conv3d(
            x.to(weight.dtype),  # a head in a kernel gives float32
            weight,
            bias,
            counter,
            stride=stride,
            padding=padding,
            last_slice=last_slice,
        )

    def conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        counter: LayoutCounter,
        *,
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
        pad_after: tuple[int, int] = (0, 0),
    ) -> torch.Tensor:
        """As `eager.conv3d.conv2d`."""
        strided = self._strided.get(id(weight))
        if strided is not None:
            return strided.run(x[:, :, None], bias, counter, pad_after)[:, :, 0]
        layer = self._convs.get(id(weight))
        if layer is not None:
            x = layout.to_format(x.to(layer.operand_dtype), "channels_last_3d")
            return layer.run(x[:, :, None], bias, counter, (0, 0), False)[:, :, 0]
        return self.eager.conv2d(
            x, weight, bias, counter, stride=stride, padding=padding, pad_after=pad_after
        )

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As `eager.attention.attention`."""
        layer = self._heads.get(q.shape[2])
        return self.eager.attention(q, k, v) if layer is None else layer.attend(q, k, v)

    def upsample_conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        counter: LayoutCounter,
        *,
        padding: tuple[int, int] = (1, 1),
    ) -> torch.Tensor:
        """As `eager.upsample.upsample_conv2d`."""
        layer = self._upsamplers.get(id(weight))
        if layer is not None:
            return layer.run(x, padding)
        return self.eager.upsample_conv2d(x, weight, bias, counter, padding=padding)
