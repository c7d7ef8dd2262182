"""Convolutions where no library is behind them: each form, next to conv3d with and without it.

    wan-vae bench forms [--precision bf16] [--repeats 5]      # or python benchmarks/conv_forms.py

On a CUDA or ROCm device, the layers of 480p in bfloat16; elsewhere a small layer in float32, to try
it out. `wan_vae/ops/eager/unfolded.py` describes the forms; `UNFOLDED` there is the one that runs.
Bytes are those above input, weight and result, where the device counts them, and those of the plan.
The error is relative to float64 on a crop. Below stand other eager operations in two ways.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.suite.measure import free_memory, relative_error, synchronise, times_ms
from wan_vae import layout
from wan_vae.device import DTYPES
from wan_vae.layout import LayoutCounter
from wan_vae.ops.eager import unfolded
from wan_vae.ops.eager.norm import rms_norm_silu
from wan_vae.ops.eager.unfolded import ConvSize, Form
from wan_vae.ops.eager.upsample import doubled_pixels

FORMS: tuple[Form, ...] = ("columns", "taps", "planes")
_FORMATS = ("contiguous", "channels_last_3d")
_ROWS_OF_CROP = 6


@dataclass(frozen=True)
class Layer:
    """A convolution: its name, channels in and out, kernel, frames read, rows, columns, stride."""

    name: str
    c: int
    o: int
    kernel: tuple[int, int, int]
    frames: int
    rows: int
    cols: int
    stride: tuple[int, int, int] = (1, 1, 1)

    @property
    def padding(self) -> tuple[int, int, int]:
        return 0, self.kernel[1] // 2, self.kernel[2] // 2

    @property
    def size(self) -> ConvSize:
        _, rows, cols = self.padding
        return ConvSize(
            (1, self.c, self.frames, self.rows, self.cols),
            (self.o, self.c, *self.kernel),
            self.stride,
            (rows, rows, cols, cols),
        )


_3D = (3, 3, 3)
LAYERS = (
    Layer("2.1 last stage", 96, 96, _3D, 6, 480, 832),
    Layer("2.1 head", 96, 3, _3D, 6, 480, 832),
    Layer("2.1 third stage", 192, 192, _3D, 6, 240, 416),
    Layer("2.1 second stage", 384, 384, _3D, 4, 120, 208),
    Layer("2.1 trunk", 384, 384, _3D, 4, 60, 104),
    Layer("2.1 up-sampler", 192, 96, (1, 3, 3), 4, 480, 832),
    Layer("2.1 time up-sampler", 384, 768, (3, 1, 1), 4, 120, 208),
    Layer("2.1 time down-sampler", 192, 192, (3, 1, 1), 5, 120, 208, (2, 1, 1)),
    Layer("2.2 encoder, first stage", 160, 160, _3D, 6, 240, 416),
    Layer("2.2 encoder, last stage", 640, 640, _3D, 3, 30, 52),
    Layer("2.2 encoder, second stage", 320, 320, _3D, 6, 120, 208),
    Layer("2.2 decoder, last stage", 256, 256, _3D, 6, 240, 416),
    Layer("2.2 decoder, trunk", 1024, 1024, _3D, 4, 30, 52),
    Layer("2.1 image of 1024", 96, 96, (1, 3, 3), 1, 1024, 1024),
)
TINY = (Layer("tiny", 8, 8, _3D, 4, 18, 22), Layer("tiny image", 8, 8, (1, 3, 3), 1, 18, 22))


@dataclass(frozen=True)
class Bench:
    """Where and how long is measured."""

    device: torch.device
    dtype: torch.dtype
    repeats: int

    def row(
        self,
        layer: str,
        what: str,
        work: Callable[[], torch.Tensor],
        error: str = "",
        said: str = "",
    ) -> None:
        """Print a row of the table; a form that runs out of memory has no numbers."""
        free_memory(self.device)
        try:
            peak = self.peak_bytes(work)
            ms = f"{statistics.median(times_ms(work, self.device, self.repeats)):.2f}"
        except torch.OutOfMemoryError:
            peak, ms = None, "out of memory"
        taken = "" if peak is None else f"{peak / 2**20:.0f}"
        print(f"| {layer} | {what} | {ms} | {taken} | {said} | {error} |", flush=True)

    def peak_bytes(self, work: Callable[[], torch.Tensor]) -> int | None:
        """Of the first call, above its result."""
        if self.device.type != "cuda":
            work()
            return None
        synchronise(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = work()
        synchronise(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before - result.nbytes

    def random(self, *shape: int, fmt: str, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        made = torch.randn(shape, generator=generator, device=self.device) * scale
        return layout.to_format(made.to(self.dtype), fmt)

    def layer(self, layer: Layer) -> None:
        """Every form of one layer."""
        size, fan = layer.size, layer.c * layer.kernel[0] * layer.kernel[1] * layer.kernel[2]
        bias = torch.linspace(-1, 1, layer.o, device=self.device).to(self.dtype)
        for fmt in _FORMATS:
            x = self.random(*size.input, fmt=fmt)
            weight = self.random(*size.weight, fmt=fmt, seed=1, scale=fan**-0.5)
            crop = x[:, :, :, : _ROWS_OF_CROP + 1].cpu().double()
            exact = F.conv3d(
                crop, weight.cpu().double(), bias.cpu().double(), layer.stride, layer.padding
            )

            def library(x: torch.Tensor = x, weight: torch.Tensor = weight) -> torch.Tensor:
                return F.conv3d(x, weight, bias, layer.stride, layer.padding)

            def error(work: Callable[[], torch.Tensor], exact: torch.Tensor = exact) -> str:
                try:
                    made = work()[:, :, :, :_ROWS_OF_CROP].cpu().double()
                except torch.OutOfMemoryError:
                    return ""
                expected = exact[:, :, :, :_ROWS_OF_CROP]
                return f"{float((made - expected).norm() / expected.norm()):.1e}"

            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                self.row(layer.name, f"conv3d, cuDNN on, {fmt}", library, error(library))
                if layer.kernel[0] == 1 and layer.frames == 1:
                    flat = layout.to_format(weight[:, :, 0], fmt)
                    frame = x[:, :, 0]
                    self.row(
                        layer.name,
                        f"conv2d, cuDNN on, {fmt}",
                        lambda frame=frame, flat=flat: F.conv2d(  # type: ignore[misc]
                            frame, flat, bias, padding=layer.padding[1:]
                        ),
                    )
            with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
                self.row(layer.name, f"conv3d, cuDNN off, {fmt}", library, error(library))
                for form in FORMS:

                    def run(
                        form: Form = form, x: torch.Tensor = x, weight: torch.Tensor = weight
                    ) -> torch.Tensor:
                        return unfolded.conv(
                            form, x, weight, bias, stride=layer.stride, around=size.around
                        )

                    said = unfolded.hidden_bytes(form, size, x.itemsize, fmt == "channels_last_3d")
                    self.row(layer.name, f"{form}, {fmt}", run, error(run), f"{said / 2**20:.0f}")

    def other(self, c: int, frames: int, rows: int, cols: int) -> None:
        """Norm and SiLU into an operand and apart from it; doubling by interpolation and copy."""
        name = f"{c}, {frames}x{rows}x{cols}"
        fmt = "channels_last_3d"
        x = self.random(1, c, frames, rows, cols, fmt=fmt)
        past = self.random(1, c, 2, rows, cols, fmt=fmt, seed=1)
        weight = self.random(c, c, 3, 3, 3, fmt=fmt, seed=2)
        gamma = torch.ones(c, 1, 1, 1, device=self.device, dtype=self.dtype)

        def apart() -> torch.Tensor:
            return layout.join_frames((past, rms_norm_silu(x, gamma)), weight, LayoutCounter())

        def joined() -> torch.Tensor:
            operand = layout.frames_before(past, x, weight, LayoutCounter())
            rms_norm_silu(x, gamma, out=operand[:, :, 2:])
            return operand

        def error(one: torch.Tensor, other: torch.Tensor) -> str:
            return "same bits" if torch.equal(one, other) else f"{relative_error(one, other):.1e}"

        with torch.inference_mode():
            self.row(name, "norm, SiLU, then join", apart)
            self.row(name, "norm and SiLU into the operand", joined, error(joined(), apart()))
            batch = x[0].transpose(0, 1)[:, :, : rows // 2, : cols // 2]
            batch = batch.contiguous(memory_format=torch.channels_last)

            def interpolated() -> torch.Tensor:
                return F.interpolate(batch, scale_factor=2.0, mode="nearest-exact")

            def copied() -> torch.Tensor:
                return doubled_pixels(batch)

            self.row(name, "doubled by interpolation", interpolated)
            same = "same bits" if torch.equal(interpolated(), copied()) else "WRONG"
            self.row(name, "doubled by a copy of pixels", copied, same)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="wan-vae bench forms",
        description="Convolutions without cuDNN, by form, next to the library's.",
    )
    parser.add_argument("--precision", choices=list(DTYPES), default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layer", help="only layers with this word in their name")
    args = parser.parse_args(argv)
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")
    dtype = DTYPES[args.precision or ("bf16" if is_gpu else "fp32")]
    bench = Bench(device, dtype, args.repeats)
    name = torch.cuda.get_device_name(device) if is_gpu else "CPU"
    print(
        f"{name}, PyTorch {torch.__version__}, {dtype}; the form that runs: {unfolded.UNFOLDED}\n"
    )
    print("| layer | what | ms | MiB above input and result | planned | error |")
    print("|---|---|---:|---:|---:|---:|")
    with torch.inference_mode():
        for layer in LAYERS if is_gpu else TINY:
            if args.layer is None or args.layer in layer.name:
                bench.layer(layer)
    for c, *size in ((96, 4, 480, 832), (192, 4, 480, 832)) if is_gpu else ((8, 4, 12, 10),):
        bench.other(c, *size)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
