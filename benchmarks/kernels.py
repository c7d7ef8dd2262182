"""Time our kernels beside the library's on the layers of Wan 2.1 at 720p; gate first.

    python benchmarks/kernels.py                                  # one CUDA device
    WAN_VAE_CAPABILITY=8.9 python benchmarks/kernels.py           # as a card of that capability
    python benchmarks/kernels.py --amd                            # also in AMD's configurations
    python benchmarks/kernels.py --repeat-products 1,2,3,5        # as if tensor cores were slower
    TRITON_INTERPRET=1 python benchmarks/kernels.py --tiny        # that it runs at all, on the CPU

A configuration gets a time only if six runs on random data are equal bit for bit and close to a
float32 result. Below each stands the norm that writes its operand. --amd adds what AMD's cards
would be given (pointer loads, their tiles), compiled for this card: it says that they are right,
and what loading without tensor descriptors costs here, not how fast an AMD card is.
--repeat-products issues each product of the 3x3x3 convolutions by mma.sync so many times, which
imitates cards whose tensor cores are slow beside the rest (GeForce), and says what share of the
tensor cores' ceiling is reached; it does not imitate their memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from ctypes import c_int, c_void_p
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from benchmarks.suite.measure import times_ms
from wan_vae.kernels import registry
from wan_vae.kernels.cuda import conv3x3_mma
from wan_vae.kernels.cuda.driver import Function, compile_source
from wan_vae.kernels.cuda.kernels import NormConvMma
from wan_vae.kernels.cuda.program import Program, multiprocessors
from wan_vae.kernels.device import Device
from wan_vae.kernels.kernel import NormCall
from wan_vae.kernels.triton import attention as triton_attention
from wan_vae.kernels.triton.configs import (
    AttentionConfig,
    HeadConfig,
    attention_candidates,
    head_candidates,
)
from wan_vae.kernels.triton.head import HeadOperands, head_conv, pack_head
from wan_vae.kernels.triton.kernels import BUILD_FAILURES
from wan_vae.kernels.triton.norm import norm_silu_join
from wan_vae.kernels.weights import norm_scale
from wan_vae.ops.eager.attention import attention
from wan_vae.ops.eager.norm import rms_norm_silu
from wan_vae.ops.opset import CallSize
from wan_vae.ops.problem import LayerWeights, NormConvProblem

LAST = torch.channels_last_3d
HALF = torch.float16
# float16 operands and result against float32 on the same operands; Winograd is at 3e-4, with sums
# in float16 at 4e-4.
BOUND = 6e-4


@dataclass(frozen=True)
class Layer:
    """A 3x3x3 convolution: channels, frames of a latent frame and of a chunk, rows, columns."""

    channels: int
    doubled: int
    frames: int
    rows: int
    columns: int

    @property
    def problem(self) -> NormConvProblem:
        """Without its size."""
        return NormConvProblem(self.channels, self.channels, HALF, self.doubled)

    @property
    def flops(self) -> float:
        """Of one call."""
        return self.problem.flops(CallSize(1, self.frames, self.rows, self.columns))


LAYERS = (
    Layer(384, 1, 2, 90, 160),
    Layer(384, 2, 2, 180, 320),
    Layer(192, 4, 4, 360, 640),
    Layer(96, 4, 4, 720, 1280),
    Layer(256, 4, 4, 352, 640),  # of Wan 2.2
)
AMD = ("gfx942", "gfx1100", "gfx1201")
TINY = (Layer(16, 2, 2, 5, 7),)


class Bench:
    """Random inputs, gate and clock on one device."""

    def __init__(self, device: torch.device, repeats: int, imitated: Sequence[str] = ()):
        self.device, self.repeats = device, repeats
        self.card = Device.chosen_for(device)
        # The card, then those whose configurations are timed too.
        self.cards = (self.card, *(self.card.imitating(name) for name in imitated))
        self._ceilings: dict[bool, float] = {}
        self._generator = torch.Generator(device).manual_seed(0)

    def random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        noise = torch.randn(shape, generator=self._generator, device=self.device)
        return (noise * scale).to(HALF)

    def median_ms(self, work: Callable[[], object]) -> float:
        times_ms(work, self.device, 1)
        return sorted(times_ms(work, self.device, self.repeats))[self.repeats // 2]

    def candidate(
        self,
        name: str,
        work: Callable[[], torch.Tensor],
        expected: torch.Tensor,
        flops: float,
        bound: float = BOUND,
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
        if different or not error < bound:
            print(f"  {name}: refused, error {error:.1e}, {different} of 5 differ", flush=True)
            return False
        ms = self.median_ms(work)
        print(f"  {name} {ms:.3f} ms {flops / ms / 1e9:.0f} TFLOP/s error {error:.1e}", flush=True)
        return True

    def convolution(self, layer: Layer) -> bool:
        """Whether a kernel is right. Times are of the convolution, its operand is there."""
        c, t, h, w = layer.channels, layer.frames, layer.rows, layer.columns
        x, residual = (self.random(1, t, h, w, c).permute(0, 4, 1, 2, 3) for _ in range(2))
        history = self.random(1, 2, h, w, c).permute(0, 4, 1, 2, 3)
        weight = self.random(c, 3, 3, 3, c, scale=(27 * c) ** -0.5).permute(0, 4, 1, 2, 3)
        bias, gamma = self.random(c), torch.ones(c, device=self.device)
        joined = torch.cat((history, rms_norm_silu(x.float(), gamma).to(HALF)), 2)
        joined = joined.contiguous(memory_format=LAST)
        ms = self.median_ms(lambda: F.conv3d(joined, weight, bias, padding=(0, 1, 1)))
        expected = F.conv3d(joined.float(), weight.float(), bias.float(), padding=(0, 1, 1))
        expected += residual
        flops = layer.flops
        print(f"{c} {t}x{h}x{w}: library {ms:.3f} ms {flops / ms / 1e9:.0f} TFLOP/s", flush=True)
        right = []
        for card, kernel, config in self.candidates(layer):
            try:
                kernel.build(layer.problem, config, card)
                weights = LayerWeights(weight, bias, gamma)
                ours = kernel.prepare(weights, layer.problem, config, card)
                operand, _ = ours.operand(x, history, only_frame=False, keep=False)
            except kernel.build_failures as error:
                print(f"  {config}: {str(error).splitlines()[0][:90]}", flush=True)
                continue
            work = partial(ours.convolve, operand, t, residual, padding=(1, 1), only_frame=False)
            name = f"{kernel.family} {kernel.name} {config}{self.label(card)}"
            bound = BOUND + kernel.sums_error
            right.append(self.candidate(name, work, expected, flops, bound))
            make = partial(
                ours.operand, x, history.clone(), only_frame=False, keep=True, overwrite=True
            )
            print(f"    its norm {self.median_ms(make):.3f} ms", flush=True)
        return any(right)

    def label(self, card: Device) -> str:
        """Behind what is timed in the configuration of another card."""
        return "" if card is self.card else f" as {card.architecture}"

    def candidates(self, layer: Layer) -> list[tuple[Device, Any, str]]:
        """Cards, their kernels and configurations for `layer`."""
        return [
            (card, kernel, config)
            for card in self.cards
            for kernel in registry.kernels_of("norm_conv3d", registry.FAMILIES)
            if kernel.requires.unmet(card, layer.problem) is None
            for config in kernel.candidates(layer.problem, card)
        ]

    def repeated(self, layer: Layer, repeats: Sequence[int]) -> None:
        """Times with products issued several times, and the share of the ceiling."""
        c, t, h, w = layer.channels, layer.frames, layer.rows, layer.columns
        residual = self.random(1, t, h, w, c).permute(0, 4, 1, 2, 3)
        weight, bias = self.random(c, c, 3, 3, 3, scale=0.02), torch.zeros(c, device=self.device)
        print(f"{c} {t}x{h}x{w}, products issued r times", flush=True)
        for _, kernel, config in self.candidates(layer):
            if not isinstance(kernel, NormConvMma):
                continue
            once = kernel.variant(layer.problem, config, self.card)
            frames = once.transform.operand_frames(t, 2)
            operand = self.random(1, frames, h, w, c).permute(0, 4, 1, 2, 3)
            products = layer.flops * {
                "winograd": 2 / 3,
                "winograd2d": 4 / 9,
                "winograd4": 1 / 2,
            }.get(once.form, 1.0)
            cells = []
            for r in repeats:
                variant = replace(once, repeat=r)
                packed = conv3x3_mma.pack(weight, variant)
                ms = self.median_ms(
                    partial(
                        conv3x3_mma.conv3x3, operand, packed, bias, residual, variant, t, (1, 1)
                    )
                )
                share = products * r / ms / 1e9 / self.ceiling(once.half_sums)
                cells.append(f"r {r}: {ms:.3f} ms, {share:.0%} of the ceiling")
            print(f"  {config}: {'; '.join(cells)}", flush=True)

    def ceiling(self, half_sums: bool) -> float:
        """TFLOP/s of mma.sync alone."""
        if half_sums not in self._ceilings:
            program = Program("", "ceiling", (), self.card.machine_code, threads=256)
            source = "\n".join(
                [program.header, Path(__file__).with_name("mma_ceiling.cu").read_text("utf-8")]
            )
            defines = {"HALF_SUMS": int(half_sums)}
            code = compile_source(source, defines, program.machine_code, None)
            with torch.cuda.device(self.device):
                function = Function(code, program.entry, 0)
            out = torch.empty(256, dtype=torch.int32, device=self.device)
            rounds, rates = 4000, []
            arguments = [c_void_p(out.data_ptr()), c_int(rounds)]
            for blocks in (multiprocessors(out.device), 2 * multiprocessors(out.device)):
                ms = self.median_ms(partial(function.launch, (blocks, 1, 1), 256, arguments))
                rates.append(blocks * 8 * rounds * 24 * 2 * 16 * 8 * 16 / ms / 1e9)
            self._ceilings[half_sums] = max(rates)
            print(f"  ceiling: {self._ceilings[half_sums]:.0f} TFLOP/s", flush=True)
        return self._ceilings[half_sums]

    def attention(self, channels: int, positions: int) -> bool:
        q, k, v = self.random(1, positions, 3 * channels).split(channels, dim=2)
        flops = 4.0 * positions**2 * channels
        expected = attention(q.float(), k.float(), v.float())
        ms = self.median_ms(lambda: attention(q, k, v))
        print(f"attention {positions} x {channels}: library {ms:.3f} ms", flush=True)
        right = []
        for card in self.cards:
            for is_tma in (True, False) if card.vendor != "amd" else (False,):
                loads = "tma" if is_tma else "pointer"
                for name in attention_candidates(channels, card, is_tma):
                    config = AttentionConfig.parse(name)
                    work = partial(triton_attention.attention, q, k, v, config, is_tma)
                    label = f"{loads} {name}{self.label(card)}"
                    right.append(self.candidate(label, work, expected, flops))
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
        for card in self.cards:
            for name in head_candidates(card):
                work = partial(head_conv, operands, HeadConfig.parse(name))
                self.candidate(f"narrow {name}{self.label(card)}", work, expected, flops)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b).norm() / b.norm()).item()


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a layer has no configuration that is right."""
    parser = argparse.ArgumentParser(
        prog="wan-vae bench kernels", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--amd", action="store_true", help="also in AMD's configurations")
    parser.add_argument(
        "--repeat-products",
        metavar="R,R",
        type=lambda text: [int(part) for part in text.split(",")],
        help="only the 3x3x3 convolutions by mma.sync, each product issued so many times",
    )
    args = parser.parse_args(argv)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device, imitated = torch.device("cpu" if args.tiny else "cuda"), AMD if args.amd else ()
    bench = Bench(device, 3 if args.tiny else 9, imitated)
    with torch.no_grad():
        if args.repeat_products:
            for layer in LAYERS:
                bench.repeated(layer, args.repeat_products)
            return 0
        right = [bench.convolution(layer) for layer in (TINY if args.tiny else LAYERS)]
        right.append(bench.attention(*((48, 19) if args.tiny else (384, 14400))))
        bench.norm_and_head(*((16, 2, 5, 7) if args.tiny else (96, 4, 720, 1280)))
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
