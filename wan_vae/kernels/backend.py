"""The backend of our kernels: which one, in which configuration, runs each layer of a decode or of
an encode.

Wide 3x3x3 convolutions in CUDA C++ where the card has what they need, the rest in Triton. Built
once for a model from the layers' own shapes: a configuration is taken only after its proof on this
device (`kernel_proofs.py`), and a layer without one stays with the eager reference, with
the reason in the report. Where every layer has a kernel, the bits of the result depend on neither
chunks, strips nor shards: each kernel sums in an order of its own, whatever the size of its input.

Operands: behind a norm float16 whatever the stream's dtype (the norm bounds them by sqrt(C) *
max|gamma|, and float16 rounds eight times finer than bfloat16); features between blocks as they
are; the latent, which nothing bounds, as float32; pixels, which are in [-1, 1], as float16: with
products of sixteen channels, of which three hold colours, TF32 would cost what a whole convolution
between blocks does. Sums are float32; results are rounded once, to the stream's dtype. Those of an
encode's last two convolutions, behind the last norm, are float32 as the latent is.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import torch

from .. import layout
from ..layout import LayoutCounter
from ..network.sites import Site
from ..ops.eager import attention as eager_attention
from ..ops.eager import conv3d as eager_conv3d
from ..ops.eager import norm as eager_norm
from ..ops.eager import upsample as eager_upsample
from ..ops.opset import Cut, FusedConv, Refusal
from .cuda.conv3x3 import Form, build, fits
from .cuda.driver import KernelBuildError
from .layer import OPERAND, CudaLayer, Layer, StridedLayer, UpsampleLayer, fit_channels
from .proof.cases import Proofs
from .proof.prove import ProofBook, Verdict
from .triton.attention import AttentionConfig, attention
from .triton.configs import attention_candidates, conv_candidates
from .triton.conv3d import Config
from .triton.norm import norm_scale, norm_silu_join
from .triton.strided import strided_candidates


class KernelBackend:
    """Kernels by layer, proven on this device. Holds copies of the weights that they read."""

    def __init__(
        self,
        sites: Iterable[Site],
        device: torch.device,
        stream: torch.dtype,
        book: ProofBook,
        only_frame: bool,
        cuda: bool,
        cut: Cut,
    ):
        """`stream`: dtype between layers. `book`: verdicts of this device. `only_frame`: the video
        has one frame, and only the last temporal slice of a kernel is used. `cuda`: kernels in
        CUDA C++ may be taken too. `cut`: the axis along which features have halo rows."""
        self.stream, self.only_frame, self._cuda = stream, only_frame, cuda
        self._book, self._proofs = book, Proofs(device, stream, only_frame, cut)
        self._layers: dict[int, Layer | CudaLayer] = {}
        self._upsamplers: dict[int, UpsampleLayer] = {}
        self._strided: dict[int, StridedLayer] = {}
        # The dtype in which the first convolution of an encode reads its pixels, if it runs here.
        self.pixels: torch.dtype | None = None
        self._norms: dict[int, torch.Tensor] = {}
        self._attention: AttentionConfig | None = None
        self._off: dict[tuple[str, str], int] = {}
        sites = list(sites)
        self._build(sites)
        for site, bound in zip(sites, _input_bounds(sites), strict=True):
            if site.kind == "attention":
                self._add_attention(site, bound)
            elif site.kind == "upsample":
                self._add_upsample(site)
            elif site.kind == "strided":
                self._add_strided(site)
            else:
                self._add_conv(site, bound)

    # -- choosing, before the first chunk ------------------------------------------------------

    def _add_conv(self, site: Site, bound: float) -> None:
        if site.gamma is not None and not bound < torch.finfo(OPERAND).max:
            self._refuse("conv3d", f"its input may reach {bound:.0e}, too large for float16")
            return
        if self._add_cuda(site):
            return
        weight = site.weight.detach()
        if site.kind == "pixels":
            weight = fit_channels(weight)
        kinds = {"stream": self.stream, "latent": torch.float32, "moments": torch.float32}
        operand = kinds.get(site.kind, OPERAND)
        out = torch.float32 if site.kind in ("head", "moments") else self.stream
        o, c = weight.shape[:2]
        # Few output channels: a kernel of its own, which has one form.
        if site.kind == "head" and o * 9 <= 128:
            configs: tuple[Config | None, ...] = (None,)
        else:
            configs = conv_candidates(c, o, 1 if self.only_frame else site.frames)
        for config in configs:
            proof = self._proofs.conv(replace(site, weight=weight), operand, out, config)
            if self._proven("conv3d", *proof):
                weight = layout.to_format(weight.to(operand), "channels_last_3d")
                bias = scale = None
                if site.gamma is not None:
                    bias, scale = site.bias.detach().float(), norm_scale(site.gamma)
                self._layers[id(site.weight)] = Layer(weight, config, out, bias, scale)
                if site.kind == "pixels":
                    self.pixels = operand
                return
        if not configs:
            self._refuse("conv3d", f"no configuration for {c} to {o} channels")

    def _form(self, site: Site) -> Form | None:
        """The kernel in CUDA C++ for `site`, if there is one."""
        o, c, *kernel = site.weight.shape
        if not self._cuda or not fits(c, o):
            return None
        if site.kind == "upsample" and self.stream in (torch.bfloat16, torch.float16):
            return Form(c, o, False, 1, self.stream, doubled=True)
        if site.kind != "normed" or kernel != [3, 3, 3]:
            return None
        # Where a latent frame is one frame there are no pairs.
        winograd = site.frames > 1 and not self.only_frame
        return Form(c, o, winograd, 1 if self.only_frame else 3, self.stream)

    def _build(self, sites: list[Site]) -> None:
        """Compile the kernels in CUDA C++ side by side; what does not compile, its proof tells."""
        forms = {form for form in map(self._form, sites) if form is not None}
        with ThreadPoolExecutor(max_workers=8) as pool:
            for job in [pool.submit(build, form) for form in forms]:
                with suppress(KernelBuildError):
                    job.result()

    def _add_cuda(self, site: Site) -> bool:
        """Take a kernel in CUDA C++ for `site` if there is one that is right."""
        form = self._form(site)
        if form is None or not self._proven("conv3d", *self._proofs.cuda(form)):
            return False
        self._layers[id(site.weight)] = CudaLayer.of(site.weight, site.bias, site.gamma, form)
        return True

    def _add_upsample(self, site: Site) -> None:
        o, c = site.weight.shape[:2]
        form = self._form(site)
        candidates = [] if form is None else [form]
        candidates += conv_candidates(c, o, 1 if self.only_frame else site.frames)
        for how in candidates:
            if self._proven("upsample_conv2d", *self._proofs.upsample(site, how)):
                layer = UpsampleLayer.of(site.weight, site.bias, self.stream, how)
                self._upsamplers[id(site.weight)] = layer
                return
        if not candidates:
            self._refuse("upsample_conv2d", f"no configuration for {c} to {o} channels")

    def _add_strided(self, site: Site) -> None:
        op = "conv2d" if site.weight.ndim == 4 else "conv3d"
        o, c = site.weight.shape[:2]
        configs = strided_candidates(c, o)
        for config in configs:
            if self._proven(op, *self._proofs.strided(site, config)):
                layer = StridedLayer.of(site.weight, self.stream, config)
                self._strided[id(site.weight)] = layer
                return
        if not configs:
            self._refuse(op, f"no strided configuration for {c} to {o} channels")

    def _add_attention(self, site: Site, bound: float) -> None:
        """Norm, queries / keys / values, attention and projection: all of them or none."""
        # A row of the weight against an input whose length the norm bounds.
        reach = bound * float(site.weight.detach().float().flatten(1).norm(dim=1).max())
        if not reach < torch.finfo(OPERAND).max:
            self._refuse("attention", f"its values may reach {reach:.0e}, too large for float16")
            return
        c = site.weight.shape[1]
        for config in attention_candidates(c):
            if self._proven("attention", *self._proofs.attention(c, config)):
                break
        else:
            self._refuse("attention", f"no configuration for a head of {c} channels is right")
            return
        layers = {}
        for weight, out in ((site.weight, OPERAND), (site.projection, self.stream)):
            for conv in conv_candidates(c, weight.shape[0], 1):
                if self._proven("conv2d", *self._proofs.conv2d(weight, out, conv)):
                    operand = weight.detach().to(OPERAND)[:, :, None]
                    operand = layout.to_format(operand, "channels_last_3d")
                    layers[id(weight)] = Layer(operand, conv, out)
                    break
            else:
                self._refuse("attention", f"no kernel for its {weight.shape[0]}x{c} convolution")
                return
        self._layers |= layers
        self._norms[id(site.gamma)] = norm_scale(site.gamma)
        self._attention = config

    def _proven(self, op: str, key: str, run) -> bool:
        verdict: Verdict = self._book.verdict(key, run)
        if not verdict.right:
            self._refuse(op, f"{key}: {verdict.reason}")
        return verdict.right

    def _refuse(self, op: str, reason: str) -> None:
        self._off[op, reason] = self._off.get((op, reason), 0) + 1

    # -- for the report ------------------------------------------------------------------------

    @property
    def off(self) -> tuple[Refusal, ...]:
        """Every refusal once, with the number of layers that it concerned."""
        return tuple(
            Refusal(
                op,
                "cuda" if " cuda " in reason else "triton",
                f"{reason} ({layers} layer{'s' if layers > 1 else ''})",
            )
            for (op, reason), layers in self._off.items()
        )

    def backend_of(self, weight: torch.Tensor) -> str:
        """Which backend runs the layer of `weight`: "cuda", "triton" or "eager"."""
        layer = self._layers.get(id(weight))
        upsampler = self._upsamplers.get(id(weight))
        if isinstance(layer, CudaLayer) or (upsampler and isinstance(upsampler.how, Form)):
            return "cuda"
        ours = layer is not None or upsampler is not None or id(weight) in self._strided
        return "triton" if ours else "eager"

    @property
    def used(self) -> dict[str, str]:
        """Backend of each operation of which at least one layer runs here."""
        conv = {}
        if self._layers:
            cuda = any(isinstance(layer, CudaLayer) for layer in self._layers.values())
            conv = {"conv3d": "cuda" if cuda else "triton", "norm_silu": "triton"}
        up = {}
        if self._upsamplers:
            cuda = any(isinstance(layer.how, Form) for layer in self._upsamplers.values())
            up = {"upsample_conv2d": "cuda" if cuda else "triton"}
        names = ("norm", "conv2d", "attention") if self._attention is not None else ()
        down = {"conv2d": "triton"} if self._strided else {}
        return conv | up | down | dict.fromkeys(names, "triton")

    # -- running: the operations of `dispatch.OpSet` -------------------------------------------

    def fused_conv(self, weight: torch.Tensor) -> FusedConv | None:
        """The kernels for the convolution of `weight` behind norm and SiLU, or None."""
        return self._layers.get(id(weight))

    def norm(self, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """As `norm.rms_norm`, of frames [N, C, H, W]; float16 where its reader is ours."""
        scale = self._norms.get(id(gamma))
        if scale is None:
            return eager_norm.rms_norm(x, gamma)
        y, _ = norm_silu_join(x[:, :, None], scale, None, 0, False, OPERAND, silu=False)
        return y[:, :, 0]

    def conv3d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        counter: LayoutCounter,
        *,
        stride: tuple[int, int, int] = (1, 1, 1),
        padding: tuple[int, int] = (0, 0),
        last_slice: bool = False,
    ) -> torch.Tensor:
        """As `conv3d.conv3d`; `x` may have another dtype than `weight`, and so may the result."""
        strided = self._strided.get(id(weight))
        if strided is not None:
            return self._run_strided(strided, x, bias, counter)
        layer = self._layers.get(id(weight))
        if not isinstance(layer, Layer):
            # A head of ours gives float32.
            return eager_conv3d.conv3d(
                x.to(weight.dtype), weight, bias, counter,
                stride=stride, padding=padding, last_slice=last_slice,
            )  # fmt: skip
        x = fit_channels(x, layer.weight.dtype)
        x = layout.match_input(x, layer.weight, counter)
        return layer.run(layout.to_format(x, "channels_last_3d"), bias, None, padding, last_slice)

    def conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        counter: LayoutCounter,
        **options,
    ) -> torch.Tensor:
        """As `conv3d.conv2d`; the 1x1 convolutions of attention and the strided ones are ours."""
        strided = self._strided.get(id(weight))
        if strided is not None:
            frames, after = x[:, :, None], options.get("pad_after", (0, 0))
            return self._run_strided(strided, frames, bias, counter, after)[:, :, 0]
        layer = self._layers.get(id(weight))
        if not isinstance(layer, Layer):
            return eager_conv3d.conv2d(x, weight, bias, counter, **options)
        x = layout.to_format(x.to(layer.weight.dtype), "channels_last_3d")
        return layer.run(x[:, :, None], bias, None, (0, 0), False)[:, :, 0]

    def _run_strided(
        self,
        layer: StridedLayer,
        x: torch.Tensor,
        bias: torch.Tensor,
        counter: LayoutCounter,
        pad_after: tuple[int, int] = (0, 0),
    ) -> torch.Tensor:
        x = layout.match_input(x.to(layer.weight.dtype), layer.weight, counter)
        return layer.run(layout.to_format(x, "channels_last_3d"), bias, pad_after)

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As `attention.attention`."""
        if self._attention is None:
            return eager_attention.attention(q, k, v)
        return attention(q, k, v, self._attention)

    def upsample_conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        counter: LayoutCounter,
        *,
        padding: tuple[int, int] = (1, 1),
    ) -> torch.Tensor:
        """As `upsample.upsample_conv2d`."""
        layer = self._upsamplers.get(id(weight))
        if layer is None:
            return eager_upsample.upsample_conv2d(x, weight, bias, counter, padding=padding)
        return layer.run(layout.to_format(x, "channels_last_3d"), padding)


def _input_bounds(sites: list[Site]) -> list[float]:
    """Largest absolute value that the norm in front of each site can give; infinite without one.

    One message from the device for all of them.
    """
    peaks = [
        site.gamma.detach().abs().max().float() * site.weight.shape[1] ** 0.5
        for site in sites
        if site.gamma is not None
    ]
    known = iter(torch.stack(peaks).tolist() if peaks else ())
    return [float("inf") if site.gamma is None else next(known) for site in sites]
