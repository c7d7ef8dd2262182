"""The proof of each of our kernels: random inputs as a decode gives them, and the float32 twin."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton

from ...network.sites import Site
from ...ops.eager.norm import rms_norm, rms_norm_silu
from ...ops.opset import Cut, HaloRows
from ..cuda.conv3x3 import Form
from ..cuda.driver import KernelBuildError
from ..layer import OPERAND, CudaLayer, Layer, StridedLayer, UpsampleLayer
from ..triton import attention as triton_attention
from ..triton import norm as triton_norm
from ..triton.attention import AttentionConfig
from ..triton.conv3d import Config
from ..triton.strided import StridedConfig
from .prove import Verdict, prove

# Kernels against float32 on the same inputs, result rounded to this dtype: half a unit in the last
# place of bfloat16 is 2e-3 at most, of float16 2.4e-4; float32 operands are three TF32 products.
BOUNDS = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 1e-5}
# Frames, rows and columns of a proof: odd, more programs than an H200 has multiprocessors, and
# small enough that all proofs of a model take seconds. The interpreter gets a few programs.
PROOF_SIZE = {"cuda": (5, 131, 179), "cpu": (2, 5, 7)}
# A kernel that cannot be built for a card raises one of these; anything else is a bug of ours.
BUILD_FAILURES: tuple[type[Exception], ...] = (
    triton.runtime.errors.OutOfResources,
    triton.runtime.errors.PTXASError,
    triton.compiler.errors.CompilationError,
    KernelBuildError,
)

Proof = tuple[str, Callable[[], Verdict]]


class Proofs:
    """Makes the proof of a kernel for a layer: its key in the book, and the run that decides."""

    def __init__(self, device: torch.device, stream: torch.dtype, only_frame: bool, cut: Cut):
        self.device, self.stream, self.only_frame, self.cut = device, stream, only_frame, cut

    def conv(
        self, site: Site, operand: torch.dtype, out: torch.dtype, config: Config | None
    ) -> Proof:
        """The convolution of `site`, with norm, SiLU and join in front if a norm is."""
        o, c, *kernel = site.weight.shape
        name = "narrow" if config is None else config.name
        form = f"{c}x{o} {'x'.join(map(str, kernel))} {_name(operand)} to {_name(out)}"
        key = f"conv3d {site.kind} {form}{' one frame' if self.only_frame else ''} {name}"
        key += self._cut_name
        if site.gamma is not None:
            return key, lambda: self._prove_triton(o, c, out, config)
        return key, lambda: self._prove_conv(o, c, tuple(kernel), operand, out, config)

    def cuda(self, form: Form) -> Proof:
        """A 3x3x3 convolution in CUDA C++, with norm, SiLU and join in front."""
        sizes = f"{form.cin}x{form.cout} {_name(OPERAND)} to {_name(form.out)}"
        key = f"conv3d normed {sizes} cuda {form.name}{self._cut_name}"

        def run() -> Verdict:
            weight = self._weight(form.cout, form.cin, (3, 3, 3), OPERAND)
            bias, gamma = self._behind_norm(form.cout, form.cin)
            layer = CudaLayer.of(weight, bias, gamma, form)
            return self._prove_fused(layer, weight, gamma, BOUNDS[self.stream])

        return key, run

    def conv2d(self, weight: torch.Tensor, out: torch.dtype, config: Config) -> Proof:
        """A 1x1 convolution of attention, result in `out`."""
        o, c = weight.shape[:2]
        key = f"conv2d {c}x{o} {_name(OPERAND)} to {_name(out)} {config.name}"
        return key, lambda: self._prove_conv(o, c, (1, 1, 1), OPERAND, out, config)

    def upsample(self, site: Site, how: Config | Form) -> Proof:
        """The folded up-sampler."""
        o, c = site.weight.shape[:2]
        cuda = "cuda " if isinstance(how, Form) else ""
        key = f"upsample {c}x{o} {_name(self.stream)} {cuda}{how.name}{self._cut_name}"
        return key, lambda: self._prove_upsample(o, c, how)

    def strided(self, site: Site, config: StridedConfig) -> Proof:
        """A down-sampler's convolution, over every second pixel or every second frame."""
        o, c, *kernel = site.weight.shape
        kernel = [1, *kernel] if len(kernel) == 2 else kernel
        key = f"strided {c}x{o} {'x'.join(map(str, kernel))} {_name(self.stream)} {config.name}"
        return key, lambda: self._prove_strided(o, c, tuple(kernel), config)

    def attention(self, channels: int, config: AttentionConfig) -> Proof:
        """Norm without SiLU, then one head over it."""
        key = f"attention {channels} {_name(self.stream)} {config.name}"
        return key, lambda: self._prove_attention(channels, config)

    # -- the runs ------------------------------------------------------------------------------

    @property
    def _cut_name(self) -> str:
        return "" if self.cut == "whole" else f" cut by {self.cut}"

    def _padding(self, kernel: tuple[int, ...] = (3, 3)) -> tuple[int, int]:
        """Zero rows and columns on each side; 0 where halo rows stand instead."""
        h, w = (k // 2 for k in kernel[-2:])
        return (h * (self.cut != "height"), w * (self.cut != "width"))

    def _random(self, *shape: int, seed: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device)

    def _features(self, c: int, frames: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
        """[1, C, frames, H, W] in NDHWC."""
        _, h, w = PROOF_SIZE[self.device.type]
        return self._random(1, frames, h, w, c, seed=seed).to(dtype).permute(0, 4, 1, 2, 3)

    def _weight(self, o: int, c: int, kernel: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        kt, kh, kw = kernel
        weight = self._random(o, kt, kh, kw, c, seed=3) / (kt * kh * kw * c) ** 0.5
        return weight.to(dtype).permute(0, 4, 1, 2, 3)

    def _behind_norm(self, o: int, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A bias and a gain."""
        return self._random(o, seed=4).to(self.stream), 1 + 0.2 * self._random(c, seed=1)

    def _prove_triton(self, o: int, c: int, out: torch.dtype, config: Config | None) -> Verdict:
        """A Triton layer behind a norm, with a residual unless it is the narrow head."""
        weight = self._weight(o, c, (3, 3, 3), OPERAND)
        bias, gamma = self._behind_norm(o, c)
        layer = Layer(weight, config, out, bias.float(), triton_norm.norm_scale(gamma))
        residual = config is not None
        return self._prove_fused(layer, weight, gamma, BOUNDS[out], with_residual=residual)

    def _prove_fused(
        self,
        layer: Layer | CudaLayer,
        weight: torch.Tensor,
        gamma: torch.Tensor,
        rounding: float,
        with_residual: bool = True,
    ) -> Verdict:
        """Norm, SiLU, join and convolution with `weight` as a decode runs them.

        Of a cut picture the layer gets the inner rows, and the outermost as halo.
        """
        o, c = weight.shape[:2]
        frames = PROOF_SIZE[self.device.type][0]
        x = self._features(c, frames, self.stream, seed=0)
        only, padding = self.only_frame, self._padding()
        history = None if only else self._features(c, 2, OPERAND, seed=2)
        residual = self._features(o, frames, self.stream, seed=5) if with_residual else None
        own, halo = x, None
        if self.cut != "whole":
            dim = -2 if self.cut == "height" else -1
            before, own, after = x.split([1, x.shape[dim] - 2, 1], dim)
            rows = (part.permute(0, 2, 3, 4, 1).contiguous() for part in (before, after))
            halo = HaloRows(self.cut, *rows)
            if residual is not None:
                residual = residual.narrow(dim, 1, own.shape[dim])

        def kernel() -> torch.Tensor:
            operand, _ = layer.operand(own, history, only_frame=only, keep=False, halo=halo)
            return layer.convolve(operand, frames, residual, padding=padding, only_frame=only)

        def reference() -> torch.Tensor:
            y = rms_norm_silu(x.float(), gamma)
            y = y if history is None else torch.cat((history.float(), y), 2)
            used = weight[:, :, -1:] if only else weight
            y = _exact_conv3d(y, used.float(), layer.bias, padding)
            return y if residual is None else y + residual.float()

        # The kernel rounds the norm's result to float16, which the reference does not do.
        return prove(kernel, reference, BOUNDS[OPERAND] + rounding, BUILD_FAILURES)

    def _prove_conv(self, o, c, kernel, operand, out, config: Config) -> Verdict:
        frames = PROOF_SIZE[self.device.type][0]
        x = self._features(c, frames + kernel[0] - 1, operand, seed=0)
        weight = self._weight(o, c, kernel, operand)
        bias = self._random(o, seed=4).to(self.stream)
        padding, only = self._padding(kernel), self.only_frame
        used = weight[:, :, -1:] if only else weight
        layer = Layer(weight, config, out)
        return prove(
            lambda: layer.run(x, bias, None, padding, only),
            lambda: _exact_conv3d(x.float(), used.float(), bias.float(), padding),
            # float32 operands are split into TF32 parts: their error joins the rounding's.
            BOUNDS[out] + BOUNDS[torch.float32],
            BUILD_FAILURES,
        )

    def _prove_upsample(self, o: int, c: int, how: Config | Form) -> Verdict:
        frames = PROOF_SIZE[self.device.type][0]
        x = self._features(c, frames, self.stream, seed=0)[0].transpose(0, 1)
        weight = (self._random(o, c, 3, 3, seed=1) / (9 * c) ** 0.5).to(self.stream)
        bias = self._random(o, seed=2).to(self.stream)
        layer = UpsampleLayer.of(weight, bias, self.stream, how)
        padding = self._padding()

        def reference() -> torch.Tensor:
            doubled = F.interpolate(x.float(), scale_factor=2.0, mode="nearest-exact")
            y = _exact_conv3d(doubled[:, :, None], weight.float()[:, :, None], bias.float(), (1, 1))
            (top, left), (h, w) = (2 - 2 * p for p in padding), y.shape[3:]
            return y[:, :, 0, top : h - top, left : w - left]

        # Summed taps are rounded once more than the reference's.
        return prove(
            lambda: layer.run(x, padding),
            reference,
            2 * BOUNDS[self.stream],
            BUILD_FAILURES,
        )

    def _prove_strided(
        self, o: int, c: int, kernel: tuple[int, ...], config: StridedConfig
    ) -> Verdict:
        frames = PROOF_SIZE[self.device.type][0] + kernel[0] - 1
        x = self._features(c, frames, self.stream, seed=0)
        # Even, as in an encode: the last taps meet the zeros past the last row and column.
        x = x[..., : x.shape[3] // 2 * 2, : x.shape[4] // 2 * 2]
        x = x.contiguous(memory_format=torch.channels_last_3d)
        weight = self._weight(o, c, kernel, self.stream)
        bias = self._random(o, seed=4).to(self.stream)
        layer = StridedLayer.of(weight, self.stream, config)
        after = (kernel[1] // 2, kernel[2] // 2)

        def reference() -> torch.Tensor:
            padded = F.pad(x.float(), (0, after[1], 0, after[0]))
            return _exact_conv3d(padded, weight.float(), bias.float(), (0, 0), layer.stride)

        return prove(
            lambda: layer.run(x, bias, after),
            reference,
            BOUNDS[self.stream] + BOUNDS[torch.float32],
            BUILD_FAILURES,
        )

    def _prove_attention(self, c: int, config: AttentionConfig) -> Verdict:
        # More keys than one block holds, and queries that are not all of them, as on a shard.
        x = self._features(c, 1, self.stream, seed=0)
        gamma = 1 + 0.2 * self._random(c, seed=1)
        scale = triton_norm.norm_scale(gamma)

        def heads(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            rows = y.flatten(2).transpose(1, 2)
            return rows[:, 3:], rows, rows.flip(1)

        def kernel() -> torch.Tensor:
            y, _ = triton_norm.norm_silu_join(x, scale, None, 0, False, OPERAND, silu=False)
            q, k, v = heads(y[:, :, 0])
            return triton_attention.attention(q, k, v.contiguous(), config)

        def reference() -> torch.Tensor:
            q, k, v = heads(rms_norm(x[:, :, 0].float(), gamma))
            scores = q @ k.transpose(1, 2) / c**0.5
            return scores.softmax(dim=2) @ v

        # Rounded inputs move a softmax whose scores reach sqrt(C) by up to sqrt(C) roundings.
        return prove(kernel, reference, BOUNDS[OPERAND] * max(4.0, c**0.5), BUILD_FAILURES)


def _exact_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    padding: tuple[int, int],
    stride: tuple[int, int, int] = (1, 1, 1),
) -> torch.Tensor:
    """float32 convolution without TF32, whose rounding would hide a kernel's fault."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return F.conv3d(x, weight, bias, stride=stride, padding=(0, *padding))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
