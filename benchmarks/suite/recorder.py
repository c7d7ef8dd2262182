"""A set of operations under a clock: the same results, and the time of every call by shape.

Operations are the units that a backend may replace (`wan_vae.ops.opset.OpSet`): kernels that join
history or add a residual count what they move.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeVar

import torch

from benchmarks.suite.measure import synchronise
from wan_vae.clock import Mark
from wan_vae.layout import LayoutCounter
from wan_vae.network.model import WanVAEModel
from wan_vae.ops.opset import FusedConv, HaloRows, OpSet

_Marks = tuple[Mark, Mark]
_T = TypeVar("_T")


@dataclass(frozen=True)
class LayerShape:
    """One distinct shape of one operation.

    `kernel` is that of the weight as used; `frames`, `height` and `width` are of the result.
    """

    op: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class LayerTime:
    """What a layer costs in one decode. `name`: the first layer of this shape; `calls`: of all
    layers of this shape; `flops` and `moved_bytes`: of one call, the least that any implementation
    needs; `median_ms` of one call, `total_ms` of all."""

    name: str
    layer: LayerShape
    calls: int
    flops: int
    moved_bytes: int
    median_ms: float
    total_ms: float


@dataclass
class _Calls:
    """Everything recorded of one layer shape."""

    name: str
    flops: int
    moved_bytes: int
    marks: list[_Marks] = field(default_factory=list)


class Recorder:
    """`ops` does what the given `OpSet` does; `layer_times` says what its calls took."""

    def __init__(self, model: WanVAEModel, ops: OpSet, device: torch.device):
        self._inner, self._device = ops, device
        self._parameters = {
            id(p): (name.rpartition(".")[0], p)
            for name, p in model.named_parameters()
            if not name.startswith("encoder.")
        }
        self._calls: dict[LayerShape, _Calls] = {}
        self.ops = replace(
            ops,
            norm=self._norm,
            norm_silu=self._norm_silu,
            conv3d=self._conv3d,
            conv2d=self._conv2d,
            upsample_conv2d=self._upsample_conv2d,
            attention=self._attention,
            fused_conv=self._fused_conv,
        )

    def layer_times(self) -> tuple[LayerTime, ...]:
        """What was recorded; layers that take longest come first."""
        synchronise(self._device)
        rows = [self._layer_time(layer, calls) for layer, calls in self._calls.items()]
        return tuple(sorted(rows, key=lambda row: -row.total_ms))

    def _layer_time(self, layer: LayerShape, calls: _Calls) -> LayerTime:
        times = [start.ms_until(stop) for start, stop in calls.marks]
        return LayerTime(
            name=calls.name,
            layer=layer,
            calls=len(times),
            flops=calls.flops,
            moved_bytes=calls.moved_bytes,
            median_ms=statistics.median(times),
            total_ms=sum(times),
        )

    # -- the clock ---------------------------------------------------------------------------------

    def time(self, work: Callable[[], _T]) -> tuple[_T, _Marks]:
        """The result of `work`, and the moments before and after it."""
        start = Mark.now(self._device)
        result = work()
        return result, (start, Mark.now(self._device))

    def layer_name(self, weight: torch.Tensor) -> str:
        """The layer that `weight` belongs to.

        A video of one frame is decoded with slices of the kernels: then the first layer whose
        kernel has this shape but for its temporal length.
        """
        if id(weight) in self._parameters:
            return self._parameters[id(weight)][0]
        shape = (*weight.shape[:2], *weight.shape[3:])
        for name, p in self._parameters.values():
            if p.ndim == weight.ndim == 5 and (*p.shape[:2], *p.shape[3:]) == shape:
                return name
        return "?"

    def keep(
        self, name: str, layer: LayerShape, flops: int, moved_bytes: int, marks: _Marks
    ) -> None:
        """Add one call to those of its shape."""
        calls = self._calls.setdefault(layer, _Calls(name, flops, moved_bytes))
        calls.marks.append(marks)

    # -- the operations ----------------------------------------------------------------------------

    def _conv3d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        counter: LayoutCounter,
        **options: Any,
    ) -> torch.Tensor:
        y, marks = self.time(lambda: self._inner.conv3d(x, weight, bias, counter, **options))
        o, c, *kernel = weight.shape
        used = weight
        if options.get("last_slice"):
            kernel[0], used = 1, weight[:, :, -1:]
        layer = LayerShape("conv3d", c, o, tuple(kernel), *y.shape[2:])
        flops = 2 * y.numel() * c * prod(kernel)
        self.keep(self.layer_name(weight), layer, flops, moved(x, used, bias, y), marks)
        return y

    def _conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        counter: LayoutCounter,
        **options: Any,
    ) -> torch.Tensor:
        y, marks = self.time(lambda: self._inner.conv2d(x, weight, bias, counter, **options))
        o, c, *kernel = weight.shape
        layer = LayerShape("conv2d", c, o, tuple(kernel), y.shape[0], *y.shape[2:])
        flops = 2 * y.numel() * c * prod(kernel)
        self.keep(self.layer_name(weight), layer, flops, moved(x, weight, bias, y), marks)
        return y

    def _upsample_conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        counter: LayoutCounter,
        **options: Any,
    ) -> torch.Tensor:
        y, marks = self.time(
            lambda: self._inner.upsample_conv2d(x, weight, bias, counter, **options)
        )
        o, c, *kernel = weight.shape
        layer = LayerShape("upsample + conv2d", c, o, tuple(kernel), y.shape[0], *y.shape[2:])
        # Folded, each result pixel meets 2x2 pixels of the small picture, not 3x3 of the large.
        flops = 2 * y.numel() * c * 4
        self.keep(self.layer_name(weight), layer, flops, moved(x, weight, bias, y), marks)
        return y

    def _fused_conv(self, weight: torch.Tensor) -> FusedConv | None:
        kernel = self._inner.fused_conv(weight)
        return None if kernel is None else _TimedFused(self, kernel, weight)

    def _norm_silu(
        self, x: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        y, marks = self.time(lambda: self._inner.norm_silu(x, gamma, out=out))
        layer = LayerShape("norm + SiLU", x.shape[1], x.shape[1], (), *x.shape[2:])
        self.keep(self.layer_name(gamma), layer, 0, moved(x, y), marks)
        return y

    def _norm(self, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        y, marks = self.time(lambda: self._inner.norm(x, gamma))
        layer = LayerShape("norm", x.shape[1], x.shape[1], (), x.shape[0], *x.shape[2:])
        self.keep(self.layer_name(gamma), layer, 0, moved(x, y), marks)
        return y

    def _attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y, marks = self.time(lambda: self._inner.attention(q, k, v))
        n, length, c = q.shape
        layer = LayerShape("attention", c, c, (), n, 1, length)
        flops = 4 * n * length * k.shape[1] * c
        self.keep("decoder.middle.1", layer, flops, moved(q, k, v, y), marks)
        return y


class _TimedFused:
    """A `FusedConv` under the recorder's clock: norm with its join, then convolution."""

    def __init__(self, recorder: Recorder, kernel: FusedConv, weight: torch.Tensor):
        self._recorder, self._kernel, self._weight = recorder, kernel, weight

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
        (y, kept), marks = self._recorder.time(
            lambda: self._kernel.operand(
                x, history, only_frame=only_frame, keep=keep, overwrite=overwrite, halo=halo
            )
        )
        layer = LayerShape("norm + SiLU", x.shape[1], x.shape[1], (), *x.shape[2:])
        size = moved(x, history, y, kept)
        self._recorder.keep(self._recorder.layer_name(self._weight), layer, 0, size, marks)
        return y, kept

    def convolve(
        self,
        operand: torch.Tensor,
        frames: int,
        residual: torch.Tensor | None,
        *,
        padding: tuple[int, int],
        only_frame: bool,
    ) -> torch.Tensor:
        y, marks = self._recorder.time(
            lambda: self._kernel.convolve(
                operand, frames, residual, padding=padding, only_frame=only_frame
            )
        )
        o, c, kt, kh, kw = self._weight.shape
        shape = (1 if only_frame else kt, kh, kw)
        layer = LayerShape("conv3d", c, o, shape, *y.shape[2:])
        # Of the direct convolution: Winograd's kernel may be above the ceiling.
        flops = 2 * y.numel() * c * prod(shape)
        used = self._weight[:, :, -1:] if only_frame else self._weight
        size = moved(operand, used, residual, y)
        self._recorder.keep(self._recorder.layer_name(self._weight), layer, flops, size, marks)
        return y


def moved(*tensors: torch.Tensor | None) -> int:
    """Bytes of all tensors: what a kernel reads and writes at least."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
