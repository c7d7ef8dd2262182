"""Each layer of a decode against what the device can do: matrix product and copy, measured here.

A real decode runs with every operation wrapped in a clock, on whatever backend is asked for, so
the times are those of the layers where they stand. Operations are the units that a backend may
replace (`ops.dispatch.OpSet`): kernels that join history or add a residual count what they move.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch

from benchmarks.suite.cases import Case
from benchmarks.suite.measure import synchronise, times_ms
from benchmarks.suite.weights import Weights
from wan_vae import layout
from wan_vae.arithmetic import own_arithmetic
from wan_vae.chunking import schedule
from wan_vae.device import free_bytes
from wan_vae.kernels.cache_folder import cache_folder
from wan_vae.kernels.proof.cache import ProofCache, environment
from wan_vae.network.blocks import Step
from wan_vae.network.cache import FeatureCache
from wan_vae.network.model import WanVAEModel
from wan_vae.ops.opset import FusedConv, OpSet
from wan_vae.options import Backend
from wan_vae.pipeline import WanVAE
from wan_vae.planning import memory
from wan_vae.runs.kernel_choice import select_ops

# Side of the square matrices and bytes of the copied block. On a GPU large against its caches
# (an H200 has 50 MB of L2) and long against a launch; on a CPU what takes a fraction of a second.
_MATRIX_SIDE = {"cuda": 8192}
_MATRIX_SIDE_ELSEWHERE = 512
_COPY_BYTES = {"cuda": 2**30}
_COPY_BYTES_ELSEWHERE = 2**26
_CEILING_REPEATS = 15
# Calls between two looks at the host's clock: a launch and a wait are percents of one GPU copy.
_CEILING_BATCH = {"cuda": 10}


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: multiply-adds counted as two, bytes read plus bytes written."""

    matrix_flops_per_s: float
    copy_bytes_per_s: float

    def floor_ms(self, flops: int, moved_bytes: int) -> float:
        """The least time of work of this size: the slower of arithmetic and memory."""
        return 1e3 * max(flops / self.matrix_flops_per_s, moved_bytes / self.copy_bytes_per_s)


@dataclass(frozen=True)
class Layer:
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

    case: str
    backend: str
    name: str
    layer: Layer
    calls: int
    flops: int
    moved_bytes: int
    median_ms: float
    total_ms: float


@dataclass(frozen=True)
class Roofline:
    """All layers of one decode, dearest first. `decode_ms` was measured with the clocks on."""

    case: str
    backend: str
    dtype: str
    decode_ms: float
    layers: tuple[LayerTime, ...]

    @property
    def elsewhere_ms(self) -> float:
        """Time of the decode outside every clock: residual adds, cache, launches."""
        return self.decode_ms - sum(layer.total_ms for layer in self.layers)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Best of several square matrix products in `dtype`, and of several copies."""
    n = _MATRIX_SIDE.get(device.type, _MATRIX_SIDE_ELSEWHERE)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty(n, n, device=device, dtype=dtype)
    source = torch.empty(
        _COPY_BYTES.get(device.type, _COPY_BYTES_ELSEWHERE), dtype=torch.uint8, device=device
    )
    source.zero_()
    target = torch.empty_like(source)

    batch = _CEILING_BATCH.get(device.type, 1)

    def best_s(work: Callable[[], object]) -> float:
        def run() -> None:
            for _ in range(batch):
                work()

        return min(times_ms(run, device, _CEILING_REPEATS)) / 1e3 / batch

    return Ceilings(
        2 * n**3 / best_s(lambda: torch.mm(a, b, out=product)),
        2 * source.numel() / best_s(lambda: target.copy_(source)),
    )


def measure_roofline(
    case: Case, weights: Weights, device: torch.device, dtype: torch.dtype, backend: Backend
) -> Roofline:
    """Decode `case` once to warm up and once under clocks. Raises what a decode raises."""
    vae = WanVAE.from_state_dict(weights.native, device=device, dtype=dtype)
    z = case.random_latent().to(device=device, dtype=dtype)
    chosen = layout.decide("auto", device, dtype).chosen
    layout.pack_weights(vae.decoder, chosen)
    ops = select_ops(
        backend, vae.model, z.shape[2] == 1,
        lambda: ProofCache(environment(device), cache_folder()),
    )  # fmt: skip
    plan = memory.plan_decode(
        vae.config, tuple(z.shape), dtype, chosen, free_bytes(device),
        backend=ops.used["conv3d"],
    )  # fmt: skip
    _walk(vae, z, ops, plan.lengths)
    recorder = Recorder(vae.model, ops, device)
    (decode_ms,) = times_ms(lambda: _walk(vae, z, recorder.ops, plan.lengths), device, 1)
    layers = recorder.layer_times(case.name, backend)
    return Roofline(case.name, backend, str(dtype).removeprefix("torch."), decode_ms, layers)


def _walk(vae: WanVAE, z: torch.Tensor, ops: OpSet, lengths: Sequence[int]) -> None:
    """The decode of `z` in chunks of `lengths` latent frames; pixels are dropped."""
    cache = FeatureCache()
    with own_arithmetic(z.device):
        for chunk in schedule(z.shape[2], lengths):
            vae.model.decode_chunk(z[:, :, chunk.start : chunk.stop], Step(cache, chunk, ops=ops))


@dataclass
class _Calls:
    """Everything recorded of one layer shape."""

    name: str
    flops: int
    moved_bytes: int
    marks: list[tuple] = field(default_factory=list)


class Recorder:
    """An `OpSet` that does what another one does and keeps the time of every call."""

    def __init__(self, model: WanVAEModel, ops: OpSet, device: torch.device):
        self._inner, self._device = ops, device
        self._parameters = {
            id(p): (name.rpartition(".")[0], p)
            for name, p in model.named_parameters()
            if not name.startswith("encoder.")
        }
        self._calls: dict[Layer, _Calls] = {}
        self.ops = replace(
            ops, norm=self._norm, norm_silu=self._norm_silu, conv3d=self._conv3d,
            conv2d=self._conv2d, upsample_conv2d=self._upsample_conv2d, attention=self._attention,
            fused_conv=self._fused_conv,
        )  # fmt: skip

    def layer_times(self, case: str, backend: str) -> tuple[LayerTime, ...]:
        """What was recorded, dearest first."""
        synchronise(self._device)
        rows = [self._layer_time(case, backend, *found) for found in self._calls.items()]
        return tuple(sorted(rows, key=lambda row: -row.total_ms))

    def _layer_time(self, case: str, backend: str, layer: Layer, calls: _Calls) -> LayerTime:
        times = [self._elapsed_ms(start, stop) for start, stop in calls.marks]
        return LayerTime(
            case, backend, calls.name, layer, len(times), calls.flops, calls.moved_bytes,
            statistics.median(times), sum(times),
        )  # fmt: skip

    # -- the clock ---------------------------------------------------------------------------------

    def _mark(self):
        if self._device.type != "cuda":
            synchronise(self._device)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _elapsed_ms(self, start, stop) -> float:
        if self._device.type == "cuda":
            return start.elapsed_time(stop)
        return (stop - start) * 1e3

    def _time(self, work: Callable):
        start = self._mark()
        result = work()
        return result, (start, self._mark())

    def _name(self, weight: torch.Tensor) -> str:
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

    def _keep(self, name: str, layer: Layer, flops: int, moved_bytes: int, marks: tuple) -> None:
        calls = self._calls.setdefault(layer, _Calls(name, flops, moved_bytes))
        calls.marks.append(marks)

    # -- the operations ----------------------------------------------------------------------------

    def _conv3d(self, x, weight, bias, counter, **options):
        y, marks = self._time(lambda: self._inner.conv3d(x, weight, bias, counter, **options))
        o, c, *kernel = weight.shape
        used = weight
        if options.get("last_slice"):
            kernel[0], used = 1, weight[:, :, -1:]
        layer = Layer("conv3d", c, o, tuple(kernel), *y.shape[2:])
        flops = 2 * y.numel() * c * prod(kernel)
        self._keep(self._name(weight), layer, flops, _bytes(x, used, bias, y), marks)
        return y

    def _conv2d(self, x, weight, bias, counter, **options):
        y, marks = self._time(lambda: self._inner.conv2d(x, weight, bias, counter, **options))
        o, c, *kernel = weight.shape
        layer = Layer("conv2d", c, o, tuple(kernel), y.shape[0], *y.shape[2:])
        flops = 2 * y.numel() * c * prod(kernel)
        self._keep(self._name(weight), layer, flops, _bytes(x, weight, bias, y), marks)
        return y

    def _upsample_conv2d(self, x, weight, bias, counter, **options):
        y, marks = self._time(
            lambda: self._inner.upsample_conv2d(x, weight, bias, counter, **options)
        )
        o, c, *kernel = weight.shape
        layer = Layer("upsample + conv2d", c, o, tuple(kernel), y.shape[0], *y.shape[2:])
        # Folded, each result pixel meets 2x2 pixels of the small picture, not 3x3 of the large.
        flops = 2 * y.numel() * c * 4
        self._keep(self._name(weight), layer, flops, _bytes(x, weight, bias, y), marks)
        return y

    def _fused_conv(self, weight):
        kernel = self._inner.fused_conv(weight)
        return None if kernel is None else _TimedFused(self, kernel, weight)

    def _norm_silu(self, x, gamma):
        y, marks = self._time(lambda: self._inner.norm_silu(x, gamma))
        layer = Layer("norm + SiLU", x.shape[1], x.shape[1], (), *x.shape[2:])
        self._keep(self._name(gamma), layer, 0, _bytes(x, y), marks)
        return y

    def _norm(self, x, gamma):
        y, marks = self._time(lambda: self._inner.norm(x, gamma))
        layer = Layer("norm", x.shape[1], x.shape[1], (), x.shape[0], *x.shape[2:])
        self._keep(self._name(gamma), layer, 0, _bytes(x, y), marks)
        return y

    def _attention(self, q, k, v):
        y, marks = self._time(lambda: self._inner.attention(q, k, v))
        n, length, c = q.shape
        layer = Layer("attention", c, c, (), n, 1, length)
        flops = 4 * n * length * k.shape[1] * c
        self._keep("decoder.middle.1", layer, flops, _bytes(q, k, v, y), marks)
        return y


class _TimedFused:
    """A `dispatch.FusedConv` under the recorder's clock: norm with its join, then convolution."""

    def __init__(self, recorder: Recorder, kernel: FusedConv, weight: torch.Tensor):
        self._recorder, self._kernel, self._weight = recorder, kernel, weight

    def operand(self, x, history, **options):
        (y, kept), marks = self._recorder._time(lambda: self._kernel.operand(x, history, **options))
        layer = Layer("norm + SiLU", x.shape[1], x.shape[1], (), *x.shape[2:])
        moved = _bytes(x, history, y, kept)
        self._recorder._keep(self._recorder._name(self._weight), layer, 0, moved, marks)
        return y, kept

    def convolve(self, operand, frames, residual, *, only_frame, **options):
        y, marks = self._recorder._time(
            lambda: self._kernel.convolve(
                operand, frames, residual, only_frame=only_frame, **options
            )
        )
        o, c, kt, kh, kw = self._weight.shape
        shape = (1 if only_frame else kt, kh, kw)
        layer = Layer("conv3d", c, o, shape, *y.shape[2:])
        # Of the direct convolution: Winograd's kernel may be above the ceiling.
        flops = 2 * y.numel() * c * prod(shape)
        used = self._weight[:, :, -1:] if only_frame else self._weight
        moved = _bytes(operand, used, residual, y)
        self._recorder._keep(self._recorder._name(self._weight), layer, flops, moved, marks)
        return y


def _bytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
