"""Time our kernels beside the library's on the layers of Wan 2.1 at 720p; gate first.

    python benchmarks/kernels.py                                  # one CUDA device
    TRITON_INTERPRET=1 python benchmarks/kernels.py --tiny        # that it runs at all, on the CPU

A configuration gets a time only if six runs on random data are equal bit for bit and close to a
float32 result. Configurations are those that a decode proves first, and some that may be better.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from benchmarks.suite.measure import times_ms
from wan_vae.kernels import registry
from wan_vae.kernels.cuda.conv3x3_wgmma import Variant, conv3x3, pack
from wan_vae.kernels.device import Device
from wan_vae.kernels.kernel import NormCall
from wan_vae.kernels.triton import attention as triton_attention
from wan_vae.kernels.triton import conv3d_pointer, conv3d_tma
from wan_vae.kernels.triton.configs import (
    AttentionConfig,
    ConvConfig,
    attention_candidates,
    conv_candidates,
    pointer_candidates,
)
from wan_vae.kernels.triton.conv3d import ConvOperands, conv3d
from wan_vae.kernels.triton.head import HeadOperands, head_conv, pack_head
from wan_vae.kernels.triton.kernels import BUILD_FAILURES
from wan_vae.kernels.triton.norm import norm_silu_join, norm_silu_pairs
from wan_vae.kernels.weights import norm_scale
from wan_vae.ops.eager.attention import attention
from wan_vae.ops.eager.norm import rms_norm_silu
from wan_vae.ops.opset import CallSize
from wan_vae.ops.problem import NormConvProblem

LAST = torch.channels_last_3d
HALF = torch.float16
# float16 operands and result against float32 on the same operands; Winograd is at 3e-4.
BOUND = 5e-4


@dataclass(frozen=True)
class Layer:
    """A 3x3x3 convolution: channels, frames of a steady chunk, rows, columns, what to try too."""

    channels: int
    frames: int
    rows: int
    columns: int
    also: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        """Of one call."""
        problem = NormConvProblem(self.channels, self.channels, HALF)
        return problem.flops(CallSize(1, self.frames, self.rows, self.columns))


LAYERS = (
    Layer(384, 1, 90, 160, ("f1_p16x16_n128+0_k32_w8_s3", "f1_p8x16_n64+0_k64_w8_s3")),
    Layer(384, 2, 180, 320, ("f4_p8x16_n64+0_k32_w8_s3",)),
    Layer(192, 4, 360, 640, ("f4_p8x8_n64+0_k32_w4_s3", "f4_p8x8_n64+0_k64_w4_s3")),
    Layer(96, 4, 720, 1280, ("f4_p8x16_n64+32_k32_w8_s3", "f4_p8x8_n64+32_k32_w4_s2")),
)
TINY = (Layer(16, 2, 5, 7, ("f1_p4x8_n16+0_k16_w4_s2",)),)


class Bench:
    """Random inputs, gate and clock on one device."""

    def __init__(self, device: torch.device, repeats: int):
        self.device, self.repeats = device, repeats
        self._generator = torch.Generator(device).manual_seed(0)

    def random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        noise = torch.randn(shape, generator=self._generator, device=self.device)
        return (noise * scale).to(HALF)

    def median_ms(self, work: Callable[[], object]) -> float:
        times_ms(work, self.device, 1)
        return sorted(times_ms(work, self.device, self.repeats))[self.repeats // 2]

    def candidate(
        self, name: str, work: Callable[[], torch.Tensor], expected: torch.Tensor, flops: float
    ) -> bool:
        """Print the time of `work`, or why it has none; whether it was right."""
        try:
            results = [work() for _ in range(6)]
        except BUILD_FAILURES as error:
            print(f"  {name}: {str(error).splitlines()[0][:90]}", flush=True)
            return False
        different = sum(not torch.equal(r, results[0]) for r in results[1:])
        error = _relative(results[0], expected)
        del results
        if different or not error < BOUND:
            print(f"  {name}: refused, error {error:.1e}, {different} of 5 differ", flush=True)
            return False
        ms = self.median_ms(work)
        print(f"  {name} {ms:.3f} ms {flops / ms / 1e9:.0f} TFLOP/s error {error:.1e}", flush=True)
        return True

    def convolution(self, layer: Layer) -> bool:
        c, t, h, w = layer.channels, layer.frames, layer.rows, layer.columns
        x = self.random(1, t + 2, h, w, c).permute(0, 4, 1, 2, 3)
        weight = self.random(c, 3, 3, 3, c, scale=(27 * c) ** -0.5).permute(0, 4, 1, 2, 3)
        bias = self.random(c)
        flops, operands = layer.flops, ConvOperands(x, weight, bias)
        expected = F.conv3d(x.float(), weight.float(), bias.float(), padding=(0, 1, 1))
        ms = self.median_ms(lambda: F.conv3d(x, weight, bias, padding=(0, 1, 1)))
        print(f"{c} {t}x{h}x{w}: library {ms:.3f} ms {flops / ms / 1e9:.0f} TFLOP/s", flush=True)
        tries = [
            *(("tma", conv3d_tma.launch, n) for n in (*conv_candidates(c, c, t), *layer.also)),
            *(("pointer", conv3d_pointer.launch, n) for n in pointer_candidates(c, c, t)),
        ]
        right = [
            self.candidate(
                f"{loads} {name}",
                partial(conv3d, operands, ConvConfig.parse(name), launch),
                expected,
                flops,
            )
            for loads, launch, name in tries
        ]
        device = Device.of(self.device)
        if registry.unavailable_reason("cuda", device, HALF) is None:
            right += self.cuda(layer)
        return any(right)

    def cuda(self, layer: Layer) -> list[bool]:
        """The variants in CUDA C++, with a residual, as the second convolution of a block has."""
        c, t, h, w = layer.channels, layer.frames, layer.rows, layer.columns
        x, residual = (self.random(1, t, h, w, c).permute(0, 4, 1, 2, 3) for _ in range(2))
        bias = torch.randn(c, device=self.device)
        scale = norm_scale(torch.ones(c, device=self.device))
        weight = self.random(c, 3, 3, 3, c, scale=(27 * c) ** -0.5).permute(0, 4, 1, 2, 3)
        joined, _ = norm_silu_join(NormCall(x, scale))
        pairs, _ = norm_silu_pairs(NormCall(x, scale))
        expected = F.conv3d(joined.float(), weight.float(), bias, padding=(0, 1, 1))
        expected += residual
        right = []
        for winograd, operand in ((True, pairs), (False, joined)):
            variant = Variant(c, c, winograd, 3, HALF)
            packed = pack(weight, variant)
            work = partial(conv3x3, operand, packed, bias, residual, variant, t, (1, 1))
            right.append(self.candidate(f"cuda {variant.name}", work, expected, layer.flops))
        return right

    def attention(self, channels: int, positions: int) -> bool:
        q, k, v = self.random(1, positions, 3 * channels).split(channels, dim=2)
        flops = 4.0 * positions**2 * channels
        expected = attention(q.float(), k.float(), v.float())
        ms = self.median_ms(lambda: attention(q, k, v))
        print(f"attention {positions} x {channels}: library {ms:.3f} ms", flush=True)
        right = [
            self.candidate(
                name,
                partial(triton_attention.attention, q, k, v, AttentionConfig.parse(name)),
                expected,
                flops,
            )
            for name in attention_candidates(channels)
        ]
        return any(right)

    def norm_and_head(self, channels: int, frames: int, rows: int, columns: int) -> None:
        x = self.random(1, frames, rows, columns, channels).permute(0, 4, 1, 2, 3)
        gamma = torch.ones(channels, device=self.device)
        call = NormCall(x, norm_scale(gamma), x[:, :, :2].contiguous(memory_format=LAST), keep=True)
        fused = self.median_ms(lambda: norm_silu_join(call)[0])
        eager = self.median_ms(lambda: rms_norm_silu(x, gamma))
        print(f"norm + SiLU: {fused:.3f} ms with history, eager {eager:.3f} without", flush=True)
        buffer, _ = norm_silu_join(call)
        weight = self.random(3, channels, 3, 3, 3, scale=0.02).contiguous(memory_format=LAST)
        expected = F.conv3d(buffer.float(), weight.float(), padding=(0, 1, 1))
        ms = self.median_ms(lambda: F.conv3d(buffer, weight, padding=(0, 1, 1)))
        print(f"head {channels} to 3: library {ms:.3f} ms", flush=True)
        flops = 2.0 * 81 * channels * frames * rows * columns
        operands = HeadOperands(buffer, pack_head(weight, HALF), None, 3)
        self.candidate("narrow", lambda: head_conv(operands), expected, flops)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b).norm() / b.norm()).item()


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a layer has no configuration that is right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    args = parser.parse_args(argv)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    bench = Bench(torch.device("cpu" if args.tiny else "cuda"), 3 if args.tiny else 9)
    with torch.no_grad():
        right = [bench.convolution(layer) for layer in (TINY if args.tiny else LAYERS)]
        right.append(bench.attention(*((48, 19) if args.tiny else (384, 14400))))
        bench.norm_and_head(*((16, 2, 5, 7) if args.tiny else (96, 4, 720, 1280)))
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
