"""The proof of each operation: random inputs as a run gives them, and the float32 reference.

Nothing here knows a family: a case gets a function that prepares a layer, and calls the layer as
the network does. What the network runs without a kernel stands beside it, to be timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from ... import layout
from ...errors import named
from ...layout import LayoutCounter
from ...ops.eager.attention import attention
from ...ops.eager.conv3d import conv2d, conv3d
from ...ops.eager.norm import rms_norm, rms_norm_silu
from ...ops.eager.upsample import upsample_conv2d
from ...ops.opset import HaloRows
from ...ops.problem import (
    AttentionProblem,
    ConvProblem,
    HeadProblem,
    LayerWeights,
    NormConvProblem,
    Operation,
    Problem,
    StridedProblem,
    UpsampleProblem,
)
from ...options import Axis
from ..device import Device
from ..kernel import (
    AttentionLayer,
    ConvLayer,
    Kernel,
    NormConvLayer,
    StridedLayer,
    UpsampleLayer,
)
from .prove import Verdict, prove

# Kernels against float32 on the same inputs, result rounded to this dtype: half a unit in the last
# place of bfloat16 is 2e-3 at most, of float16 2.4e-4; float32 operands are three TF32 products.
BOUNDS = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 1e-5}
# Frames, rows and columns.
Size = tuple[int, int, int]
# Those of a proof of a layer with 96 output channels or fewer: odd, and more programs than an H200
# has multiprocessors. The interpreter gets a few programs.
_PROOF_SIZE: dict[str, Size] = {
    "cuda": (5, 131, 179),
    "meta": (5, 131, 179),
    "cpu": (2, 5, 7),
}
_PROOF_CHANNELS = 96
# Queries of an attention whose scores are in memory at a time.
_QUERIES = 1024

L = TypeVar("L")


def proof_size(problem: Problem, device: torch.device) -> Size:
    """Frames, rows and columns on which a kernel is proven.

    A wide layer has a program for each block of its output channels, so it gets as many programs
    from a smaller picture. With one size for all, the references of a Wan 2.1 decoder were 10.6
    Tflop in float32 without TF32, and those of Wan 2.2 78; with these they are 3.9 and 11.
    """
    frames, rows, cols = _PROOF_SIZE[device.type]
    if device.type == "cpu" or isinstance(problem, AttentionProblem):  # it has no such blocks
        return frames, rows, cols
    shrink = max(1.0, problem.out_channels / _PROOF_CHANNELS) ** 0.5
    return frames, _odd(rows / shrink), _odd(cols / shrink)


def _odd(size: float) -> int:
    """The next odd number that is no smaller."""
    return ceil(size) | 1


@dataclass(frozen=True)
class Check:
    """One comparison: what the kernel makes, what it should make, the relative error allowed.

    eager: what a run without the kernel computes, in the dtype of the features, with weights in
    channels_last_3d.
    """

    kernel: Callable[[], torch.Tensor]
    reference: Callable[[], torch.Tensor]
    eager: Callable[[], torch.Tensor]
    bound: float


def prove_kernel(
    kernel: Kernel[Any, Any],
    problem: Problem,
    config: str,
    device: Device,
    runs_on: torch.device,
    axis: Axis | None,
    size: Size | None = None,
) -> Verdict:
    """Run a kernel for `problem`, built for `device`, on `runs_on`, as `prove` does; the first
    check that fails decides.

    `axis`: the features have halo rows (or columns) along it, as those of a shard. `size`: frames,
    rows and columns; those of `proof_size` if None.
    """
    size = size or proof_size(problem, runs_on)
    inputs = Inputs(runs_on, problem.feature_dtype, axis, size, device.vendor == "amd")
    verdict = Verdict(True)
    try:
        checks = checks_of(kernel, problem, config, device, inputs)
    except kernel.build_failures as failure:
        return Verdict(False, named(failure))
    for check in checks:
        bound = check.bound + kernel.sums_error
        part = prove(check.kernel, check.reference, bound, kernel.build_failures)
        if not part.passed:
            return part
        if verdict.error is None or (part.error is not None and part.error > verdict.error):
            verdict = part
    return verdict


def checks_of(
    kernel: Kernel[Any, Any], problem: Problem, config: str, device: Device, inputs: Inputs
) -> list[Check]:
    """The checks of one configuration, built for `device`, on `inputs`."""

    def prepare(weights: LayerWeights) -> Any:
        return kernel.prepare(weights, problem, config, device)

    return _CASES[problem.operation](inputs, problem, prepare)


@dataclass(frozen=True)
class Inputs:
    """Random tensors on a device, the same in every process. `dtype`: of features.

    by_products: float32 references ask no library for a convolution, which might search for one.
    """

    device: torch.device
    dtype: torch.dtype
    axis: Axis | None
    size: Size
    by_products: bool = False
    # Features that were made, for the next configuration that reads the same.
    _made: dict[object, torch.Tensor] = field(default_factory=dict, compare=False)

    @property
    def frames(self) -> int:
        return self.size[0]

    def padding(self, kernel: tuple[int, ...] = (3, 3)) -> tuple[int, int]:
        """Zero rows and columns on each side; 0 where halo rows stand instead."""
        rows, cols = (k // 2 for k in kernel[-2:])
        return (0 if self.axis == "height" else rows, 0 if self.axis == "width" else cols)

    def random(self, *shape: int, seed: int) -> torch.Tensor:
        if self.device.type == "meta":  # shapes alone, for what is compiled and not run
            return torch.empty(shape, device=self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device)

    def features(self, c: int, frames: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
        """[1, C, frames, H, W] in NDHWC."""
        key = c, frames, dtype, seed
        if key not in self._made:
            made = self.random(1, frames, *self.size[1:], c, seed=seed).to(dtype)
            self._made[key] = made.permute(0, 4, 1, 2, 3)
        return self._made[key]

    def weight(
        self, o: int, c: int, kernel: tuple[int, int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        kt, kh, kw = kernel
        scale: float = (kt * kh * kw * c) ** 0.5
        weight = self.random(o, kt, kh, kw, c, seed=3) / scale
        return weight.to(dtype).permute(0, 4, 1, 2, 3)

    def exact_conv3d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        padding: tuple[int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
        last_slice: bool = False,
    ) -> torch.Tensor:
        """float32 convolution without TF32, whose rounding would hide a kernel's fault."""
        if self.by_products:
            return _sum_of_products(x, weight, bias, padding, stride, last_slice)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return conv3d(
                x.float(),
                weight.float(),
                bias.float(),
                LayoutCounter(),
                stride=stride,
                padding=padding,
                last_slice=last_slice,
            )

    def bias(self, o: int) -> torch.Tensor:
        return self.random(o, seed=4).to(self.dtype)

    def gamma(self, c: int) -> torch.Tensor:
        return 1 + 0.2 * self.random(c, seed=1)


Prepare = Callable[[LayerWeights], L]


def _conv(inputs: Inputs, problem: ConvProblem, prepare: Prepare[ConvLayer]) -> list[Check]:
    o, c, kernel = problem.out_channels, problem.in_channels, problem.kernel
    dtype, only = problem.operand_dtype, problem.only_frame
    x = inputs.features(c, inputs.frames + kernel[0] - 1, dtype, seed=0)
    weight, bias = inputs.weight(o, c, kernel, dtype), inputs.bias(o)
    return [_conv_check(prepare(LayerWeights(weight, bias)), x, weight, bias, inputs, only)]


def _conv_check(
    layer: ConvLayer,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    inputs: Inputs,
    only_frame: bool,
    out_dtype: torch.dtype | None = None,
    is_2d: bool = False,
) -> Check:
    """is_2d: eager runs it frame by frame."""
    padding = inputs.padding(tuple(weight.shape))
    features, own = x.to(inputs.dtype), weight.to(inputs.dtype)

    def run() -> torch.Tensor:
        return layer.run(x, bias, LayoutCounter(), padding, only_frame)

    def eager() -> torch.Tensor:
        if is_2d:
            return conv2d(features[0].transpose(0, 1), own[:, :, 0], bias, LayoutCounter())
        return conv3d(features, own, bias, LayoutCounter(), padding=padding, last_slice=only_frame)

    def reference() -> torch.Tensor:
        return inputs.exact_conv3d(x, weight, bias, padding, last_slice=only_frame)

    # float32 operands are split into TF32 parts: their error joins the rounding's.
    return Check(run, reference, eager, BOUNDS[out_dtype or inputs.dtype] + BOUNDS[torch.float32])


def _norm_conv(
    inputs: Inputs,
    problem: NormConvProblem | HeadProblem,
    prepare: Prepare[NormConvLayer],
) -> list[Check]:
    """Norm, SiLU, join and convolution. A layer between blocks also adds a residual.

    The layer of a shard gets the inner rows, and the outermost ones as its halo.
    """
    o, c, only = problem.out_channels, problem.in_channels, problem.only_frame
    frames, padding = inputs.frames, inputs.padding()
    weight, bias = inputs.weight(o, c, problem.kernel, problem.operand_dtype), inputs.bias(o)
    gamma = inputs.gamma(c)
    layer = prepare(LayerWeights(weight, bias, gamma))
    x = inputs.features(c, frames, inputs.dtype, seed=0)
    history = None if only else inputs.features(c, 2, problem.operand_dtype, seed=2)
    residual = None
    if isinstance(problem, NormConvProblem):
        residual = inputs.features(o, frames, inputs.dtype, seed=5)
    own, halo = x, None
    if inputs.axis is not None:
        dim = -2 if inputs.axis == "height" else -1
        last = x.shape[dim] - 1
        own = x.narrow(dim, 1, last - 1)
        edges = (x.narrow(dim, 0, 1), x.narrow(dim, last, 1))
        rows = [edge.permute(0, 2, 3, 4, 1).contiguous() for edge in edges]
        halo = HaloRows(inputs.axis, rows[0], rows[1])
        if residual is not None:
            residual = residual.narrow(dim, 1, own.shape[dim])

    def run() -> torch.Tensor:
        operand, _ = layer.operand(own, history, only_frame=only, keep=False, halo=halo)
        return layer.convolve(operand, frames, residual, padding=padding, only_frame=only)

    def reference() -> torch.Tensor:
        y = rms_norm_silu(x.float(), gamma)
        y = y if history is None else torch.cat((history.float(), y), 2)
        y = inputs.exact_conv3d(y, weight, bias, padding, last_slice=only)
        return y if residual is None else y + residual.float()

    past = None if history is None else history.to(inputs.dtype)
    eager_weight = weight.to(inputs.dtype)

    def eager() -> torch.Tensor:
        counter = LayoutCounter()
        if past is None:
            y = rms_norm_silu(x, gamma)
        else:  # as `blocks.joined_operand`
            y = layout.frames_before(past, x, eager_weight, counter)
            rms_norm_silu(x, gamma, out=y[:, :, past.shape[2] :])
        y = conv3d(y, eager_weight, bias, counter, padding=padding, last_slice=only)
        return y if residual is None else y.add_(residual)

    # The kernel rounds the norm's result to float16, which the reference does not do.
    bound = BOUNDS[problem.operand_dtype] + BOUNDS[problem.out_dtype]
    return [Check(run, reference, eager, bound)]


def _upsample(
    inputs: Inputs, problem: UpsampleProblem, prepare: Prepare[UpsampleLayer]
) -> list[Check]:
    o, c = problem.out_channels, problem.in_channels
    x = inputs.features(c, inputs.frames, inputs.dtype, seed=0)[0].transpose(0, 1)
    weight = (inputs.random(o, c, 3, 3, seed=1) / (9 * c) ** 0.5).to(inputs.dtype)
    bias = inputs.random(o, seed=2).to(inputs.dtype)
    layer, padding = prepare(LayerWeights(weight, bias)), inputs.padding()

    def reference() -> torch.Tensor:
        y = F.interpolate(x.float(), scale_factor=2.0, mode="nearest-exact")
        y = inputs.exact_conv3d(y[:, :, None], weight[:, :, None], bias, (1, 1))[:, :, 0]
        # Nothing is made for a halo row, which became two.
        top, left = (2 - 2 * p for p in padding)
        return y[..., top : y.shape[2] - top, left : y.shape[3] - left]

    eager_weight = layout.to_format(weight, "channels_last_3d")

    def eager() -> torch.Tensor:
        return upsample_conv2d(x, eager_weight, bias, LayoutCounter(), padding=padding)

    # Summed taps are rounded once more than the reference's.
    return [Check(lambda: layer.run(x, padding), reference, eager, 2 * BOUNDS[inputs.dtype])]


def _strided(
    inputs: Inputs, problem: StridedProblem, prepare: Prepare[StridedLayer]
) -> list[Check]:
    o, c, kernel = problem.out_channels, problem.in_channels, problem.kernel
    x = inputs.features(c, inputs.frames + kernel[0] - 1, inputs.dtype, seed=0)
    # Even, as in an encode: the last taps meet the zeros past the last row and column.
    x = x[..., : x.shape[3] // 2 * 2, : x.shape[4] // 2 * 2]
    x = x.contiguous(memory_format=torch.channels_last_3d)
    weight, bias = inputs.weight(o, c, kernel, inputs.dtype), inputs.bias(o)
    layer, after = prepare(LayerWeights(weight, bias)), (kernel[1] // 2, kernel[2] // 2)

    def reference() -> torch.Tensor:
        padded = F.pad(x.float(), (0, after[1], 0, after[0]))
        return inputs.exact_conv3d(padded, weight, bias, (0, 0), problem.stride)

    def eager() -> torch.Tensor:
        if kernel[0] > 1:
            return conv3d(x, weight, bias, LayoutCounter(), stride=problem.stride)
        frames = x[0].transpose(0, 1)
        return conv2d(frames, flat_weight, bias, LayoutCounter(), stride=2, pad_after=after)

    flat_weight = layout.to_format(weight[:, :, 0], "channels_last_3d")
    return [
        Check(
            lambda: layer.run(x, bias, LayoutCounter(), after),
            reference,
            eager,
            BOUNDS[inputs.dtype] + BOUNDS[torch.float32],
        )
    ]


def _attention(
    inputs: Inputs, problem: AttentionProblem, prepare: Prepare[AttentionLayer]
) -> list[Check]:
    """Norm and attention, then each of the 1x1 convolutions.

    More keys than one block holds, and queries that are not all of them, as on a shard.
    """
    c, operand = problem.channels, problem.operand_dtype
    root: float = c**0.5
    x, gamma = inputs.features(c, 1, inputs.dtype, seed=0), inputs.gamma(c)
    qkv = inputs.weight(3 * c, c, problem.kernel, operand)
    projection = inputs.weight(c, c, problem.kernel, operand)
    layer = prepare(LayerWeights(qkv[:, :, 0], None, gamma, projection[:, :, 0]))

    def heads(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = y.flatten(2).transpose(1, 2)
        return rows[:, 3:], rows, rows.flip(1)

    def run() -> torch.Tensor:
        q, k, v = heads(layer.norm(x[:, :, 0]))
        return layer.attend(q, k, v.contiguous())

    def reference() -> torch.Tensor:
        q, k, v = heads(rms_norm(x[:, :, 0].float(), gamma))
        # In slices of queries: all scores at once would be 2.2 GB, and their softmax as much.
        rows = q.split(_QUERIES, dim=1)
        return torch.cat([(r @ k.transpose(1, 2) / root).softmax(dim=2) @ v for r in rows], dim=1)

    def eager() -> torch.Tensor:
        q, k, v = heads(rms_norm(x[:, :, 0], gamma))
        return attention(q, k, v.contiguous())

    frames = inputs.features(c, inputs.frames, operand, seed=0)
    return [
        # Rounded inputs move a softmax whose scores reach sqrt(C) by up to sqrt(C) roundings.
        Check(run, reference, eager, BOUNDS[operand] * max(4.0, root)),
        _conv_check(layer.qkv, frames, qkv, inputs.bias(3 * c), inputs, False, operand, True),
        _conv_check(
            layer.projection, frames, projection, inputs.bias(c), inputs, False, None, True
        ),
    ]


_CASES: dict[Operation, Callable[[Inputs, Any, Prepare[Any]], list[Check]]] = {
    "conv3d": _conv,
    "norm_conv3d": _norm_conv,
    "head": _norm_conv,
    "upsample_conv2d": _upsample,
    "strided_conv": _strided,
    "attention": _attention,
}


def _sum_of_products(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    padding: tuple[int, int],
    stride: tuple[int, int, int],
    last_slice: bool,
) -> torch.Tensor:
    """`eager.conv3d.conv3d` as a matrix product for each tap, in float32, a frame at a time."""
    if last_slice:
        weight = weight[:, :, -1:]
    o, _, kt, kh, kw = weight.shape
    st, sy, sx = stride
    taps = weight.float().permute(2, 3, 4, 1, 0)
    x = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, *(padding[1],) * 2, *(padding[0],) * 2))
    b, frames, rows, cols, c = x.shape
    frames, rows, cols = (frames - kt) // st + 1, (rows - kh) // sy + 1, (cols - kw) // sx + 1
    y = torch.empty((b, frames, rows, cols, o), device=x.device)
    for t in range(frames):
        total = bias.float().expand(b * rows * cols, o).contiguous()
        for dt in range(kt):
            source = x[:, t * st + dt].float()
            for dy in range(kh):
                for dx in range(kw):
                    seen = source[:, dy::sy, dx::sx][:, :rows, :cols]
                    total.addmm_(seen.reshape(-1, c), taps[dt, dy, dx])
        y[:, t] = total.view(b, rows, cols, o)
    return y.permute(0, 4, 1, 2, 3)
