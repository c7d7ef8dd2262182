"""The Triton backend: which kernel, in which configuration, runs each layer of a decode.

Built once for a decode from the layers' own shapes: a configuration is taken only after its proof
(`proof.py`) on this device, and a layer without one stays with the eager reference, with the
reason in the report. Operands are float16 whatever the stream's dtype: the input of every 3x3x3
convolution behind a norm is bounded by sqrt(C) * max|gamma|, so float16 is safe there, and rounds
eight times finer than bfloat16. Sums are float32; results go back to the stream's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton

from .. import layout
from ..layout import LayoutCounter
from ..report import BackendOff
from . import triton_conv3d, triton_head, triton_norm
from .dispatch import FusedConv
from .norm import rms_norm_silu
from .proof import ProofBook, Verdict, prove
from .triton_conv3d import Config

OPERAND = torch.float16
# float16 operands against float32 on the same float16 inputs, result rounded to the stream's
# dtype: half a unit in the last place of bfloat16 is 2e-3 at most, of float16 2.4e-4.
BOUNDS = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 1e-5}
# Frames, rows and columns of a proof: odd, more programs than an H200 has multiprocessors, and
# small enough that all proofs of a model take seconds. The interpreter gets a few programs.
PROOF_SIZE = {"cuda": (5, 131, 179), "cpu": (2, 5, 7)}
# A kernel that cannot be built for a card raises one of these; anything else is a bug of ours.
BUILD_FAILURES: tuple[type[Exception], ...] = (
    triton.runtime.errors.OutOfResources,
    triton.runtime.errors.PTXASError,
    triton.compiler.errors.CompilationError,
)

# Output channels -> configurations in order of preference. Predicted on an NVIDIA H200, see
# benchmarks/NOTES.md; the time of each is in benchmarks/kernels.py's table.
_BY_WIDTH: tuple[tuple[int, tuple[Config, ...]], ...] = (
    (96, (Config(4, 8, 8, 64, 32, 32, 4, 3), Config(4, 8, 8, 64, 32, 32, 4, 2))),
    (128, (Config(2, 8, 16, 128, 0, 32, 8, 3), Config(2, 8, 8, 64, 0, 32, 4, 2))),
    (192, (Config(2, 8, 16, 128, 64, 32, 8, 3), Config(2, 8, 8, 64, 32, 32, 4, 2))),
)
_NARROW = (Config(2, 4, 8, 16, 0, 16, 4, 2),)


def candidates(cin: int, cout: int) -> tuple[Config, ...]:
    """Configurations to prove for `cin` -> `cout` channels, best first; those that fit `cin`."""
    found = next((c for width, c in _BY_WIDTH if cout % width == 0), _NARROW)
    return tuple(c for c in found if cin % c.BK == 0)


@dataclass(frozen=True)
class _Layer:
    """A convolution behind a norm: its operand in the kernel's form, and how to run it."""

    weight: torch.Tensor
    config: Config | None  # None: the head's kernel
    kernel_frames: int


class TritonBackend:
    """Kernels by layer, proven on this device. Holds float16 copies of the weights it runs."""

    def __init__(self, device: torch.device, stream: torch.dtype, book: ProofBook):
        """`stream`: dtype between layers. `book`: verdicts of this device."""
        self.device, self.stream, self.book = device, stream, book
        self._layers: dict[int, _Layer] = {}
        self._folded: dict[int, tuple[torch.Tensor, Config]] = {}
        self._off: dict[tuple[str, str], int] = {}

    # -- choosing, before the first chunk ------------------------------------------------------

    def add_conv(self, weight: torch.Tensor, gamma: torch.Tensor, only_frame: bool) -> None:
        """Take over the 3x3x3 convolution `weight` behind a norm of gain `gamma`, if proven."""
        o, c, kt = weight.shape[:3]
        bound = float(gamma.abs().max()) * c**0.5
        if not bound < torch.finfo(OPERAND).max:
            self._refuse("conv3d", f"its input may reach {bound:.0e}, too large for float16")
            return
        form = f"{c}x{o} {_name(self.stream)}{' one frame' if only_frame else ''}"
        # Few output channels: the head's kernel, which has one form.
        configs = (None,) if o * 9 <= 128 else candidates(c, o)
        for config in configs:
            key = f"head {form}" if config is None else f"conv3d {form} {config.name}"
            if self._proven("conv3d", key, lambda k=config: self._prove_fused(o, c, k, only_frame)):
                operand = layout.to_format(weight.detach().to(OPERAND), "channels_last_3d")
                self._layers[id(weight)] = _Layer(operand, config, kt)
                return
        if not configs:
            self._refuse("conv3d", f"no configuration for {c} to {o} channels")

    def add_upsample(self, weight: torch.Tensor) -> None:
        """Take over the up-sampler with the 3x3 convolution `weight`, folded, if proven."""
        o, c = weight.shape[:2]
        for config in candidates(c, o):
            key = f"upsample {c}x{o} {_name(self.stream)} {config.name}"
            if self._proven("upsample_conv2d", key, lambda k=config: self._prove_upsample(o, c, k)):
                folded = triton_conv3d.fold_upsample(weight.detach()).to(self.stream)
                self._folded[id(weight)] = (folded, config)
                return
        if not candidates(c, o):
            self._refuse("upsample_conv2d", f"no configuration for {c} to {o} channels")

    @property
    def off(self) -> tuple[BackendOff, ...]:
        """Every refusal once, with the number of layers that it left to the eager reference."""
        return tuple(
            BackendOff(op, "triton", f"{reason} ({layers} layer{'s' if layers > 1 else ''})")
            for (op, reason), layers in self._off.items()
        )

    def runs(self, weight: torch.Tensor) -> bool:
        """True if a kernel of this backend runs the layer of `weight`."""
        return id(weight) in self._layers or id(weight) in self._folded

    def _proven(self, op: str, key: str, run) -> bool:
        verdict: Verdict = self.book.verdict(key, run)
        if not verdict.right:
            self._refuse(op, f"{key}: {verdict.reason}")
        return verdict.right

    def _refuse(self, op: str, reason: str) -> None:
        self._off[op, reason] = self._off.get((op, reason), 0) + 1

    # -- running ---------------------------------------------------------------------------------

    def fused_conv(self, weight: torch.Tensor) -> FusedConv | None:
        """The kernel for the convolution of `weight` behind norm and SiLU, or None."""
        layer = self._layers.get(id(weight))
        if layer is None:
            return None

        return partial(_run, layer)

    def upsample_conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        counter: LayoutCounter,
        *,
        eager,
        **options,
    ) -> torch.Tensor:
        """As `upsample.upsample_conv2d`; `eager` runs the layers that were not taken over."""
        found = self._folded.get(id(weight))
        if found is None:
            return eager(x, weight, bias, counter, **options)
        folded, config = found
        x = layout.match_input(x, weight, counter)
        return triton_conv3d.folded_upsample(x, folded, bias, config)

    # -- proofs ------------------------------------------------------------------------------------

    def _random(self, *shape: int, seed: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device)

    def _prove_fused(self, o: int, c: int, config: Config | None, only_frame: bool) -> Verdict:
        """Norm, SiLU, join and convolution (or head, without a `config`) as a decode runs them."""
        t, h, w = PROOF_SIZE[self.device.type]
        x = self._random(1, t, h, w, c, seed=0).to(self.stream).permute(0, 4, 1, 2, 3)
        gamma = 1 + 0.2 * self._random(c, seed=1)
        history = None
        if not only_frame:
            history = self._random(1, 2, h, w, c, seed=2).to(OPERAND).permute(0, 4, 1, 2, 3)
        weight = (self._random(o, 3, 3, 3, c, seed=3) / (27 * c) ** 0.5).to(OPERAND)
        weight = weight.permute(0, 4, 1, 2, 3)
        bias = self._random(o, seed=4).to(self.stream)
        residual = None
        if config is not None:
            residual = self._random(1, t, h, w, o, seed=5).to(self.stream).permute(0, 4, 1, 2, 3)
        layer = _Layer(weight, config, 3)

        def kernel() -> torch.Tensor:
            y, _ = _run(layer, x, gamma, history, bias, residual, only_frame=only_frame, keep=False)
            return y

        def reference() -> torch.Tensor:
            y = rms_norm_silu(x.float(), gamma)
            y = y if history is None else torch.cat((history.float(), y), 2)
            used = weight[:, :, -1:] if only_frame else weight
            y = _exact_conv3d(y, used.float(), bias.float())
            return y if residual is None else y + residual.float()

        # The kernel rounds the norm's result to float16, which the reference does not do.
        bound = BOUNDS[OPERAND] if config is None else BOUNDS[OPERAND] + BOUNDS[self.stream]
        return prove(kernel, reference, bound, BUILD_FAILURES)

    def _prove_upsample(self, o: int, c: int, config: Config) -> Verdict:
        t, h, w = PROOF_SIZE[self.device.type]
        x = self._random(t, h, w, c, seed=0).to(self.stream).permute(0, 3, 1, 2)
        weight = (self._random(o, c, 3, 3, seed=1) / (9 * c) ** 0.5).to(self.stream)
        bias = self._random(o, seed=2).to(self.stream)
        folded = triton_conv3d.fold_upsample(weight).to(self.stream)

        def reference() -> torch.Tensor:
            doubled = F.interpolate(x.float(), scale_factor=2.0, mode="nearest-exact")
            y = _exact_conv3d(doubled[:, :, None], weight.float()[:, :, None], bias.float())
            return y[:, :, 0]

        # Summed taps are rounded once more than the reference's.
        return prove(
            lambda: triton_conv3d.folded_upsample(x, folded, bias, config),
            reference,
            2 * BOUNDS[self.stream],
            BUILD_FAILURES,
        )


def _run(
    layer: _Layer,
    x: torch.Tensor,
    gamma: torch.Tensor,
    history: torch.Tensor | None,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    *,
    only_frame: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `dispatch.FusedConv`. The head's result is float32, the others' in x's dtype."""
    past = 0 if only_frame else layer.kernel_frames - 1
    buffer, kept = triton_norm.norm_silu_join(x, gamma, history, past, keep, OPERAND)
    if layer.config is None:
        y = triton_head.head_conv(buffer, layer.weight, bias, last_slice=only_frame)
        return y if residual is None else y + residual, kept
    y = triton_conv3d.conv3d(
        buffer, layer.weight, bias, residual, layer.config,
        last_slice=only_frame, out_dtype=x.dtype,
    )  # fmt: skip
    return y, kept


def _exact_conv3d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """float32 convolution without TF32, whose rounding would hide a kernel's fault."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return F.conv3d(x, weight, bias, padding=(0, 1, 1))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
