"""Who decodes: this pack by backend, fastvae, diffusers and ComfyUI's core."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence

import torch

from benchmarks.suite.baseline import Baseline, Built
from benchmarks.suite.comfyui import ComfyUICore
from benchmarks.suite.weights import Weights, diffusers_model
from wan_vae.io.image import ImageSink
from wan_vae.options import Backend
from wan_vae.pipeline import WanVAE
from wan_vae.runs.kernel_choice import unavailable_reason

# Packages of other decoders, whose versions belong into a results file.
PACKAGES = ("diffusers", "fastvae")


def decoders(backends: Sequence[Backend]) -> list[Baseline]:
    """Ours, one for each of `backends`, then the others."""
    return [*(Ours(b) for b in backends), FastVAE(), Diffusers(), ComfyUICore()]


def is_ours(name: str) -> bool:
    """Whether `name` is this pack's, with any backend."""
    return name.startswith("wan_vae")


class Ours:
    """This pack; its image path is that of the ComfyUI node (`ImageSink`)."""

    def __init__(self, backend: Backend):
        self.backend: Backend = backend
        self.name = f"wan_vae ({backend})"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if self.backend in ("auto", "eager"):
            return None
        return unavailable_reason(self.backend, device, dtype)

    def build(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> Built:
        vae = WanVAE.from_state_dict(weights.native, device=device, dtype=dtype)

        def decode(z: torch.Tensor) -> torch.Tensor:
            pixels = vae.decode(z, backend=self.backend)
            assert pixels is not None  # None only with a sink
            return pixels

        def image(z: torch.Tensor) -> torch.Tensor:
            sink = ImageSink.allocate(tuple(z.shape), vae.config, torch.device("cpu"))
            vae.decode(z, sink=sink, backend=self.backend)
            return sink.image

        def note() -> str:
            report = vae.last_report
            if report is None:
                return ""
            fast = sum(layer.backend != "eager" for layer in report.layers)
            said = [f"{fast} of {len(report.layers)} layers on proven kernels"] if fast else []
            if not fast and self.backend != "eager":  # else a row of another name is eager's
                why = dict.fromkeys(off.reason for off in report.backends_off)
                said = [f"no layer on proven kernels ({'; '.join(why) or 'none is for them'})"]
            return "; ".join((*said, *report.fallbacks))

        return Built(decode, image, note=note)


class FastVAE:
    """fastvae, which wraps diffusers' model; chunks as it chooses them."""

    name = "fastvae"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return _missing("fastvae", "diffusers")

    def build(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> Built:
        fastvae = importlib.import_module("fastvae")
        decoder = fastvae.FastVAEDecoder.from_vae(diffusers_model(weights, device, dtype))
        decoder = decoder.to(device)

        def decode(z: torch.Tensor) -> torch.Tensor:
            pixels: torch.Tensor = decoder.decode(z.to(dtype))
            return pixels

        def note() -> str:
            return "" if device.type == "cuda" else "its kernels need CUDA: its PyTorch path"

        return Built(decode, _image_by_copy(decode, device), note=note)


class Diffusers:
    """diffusers' AutoencoderKLWan as it comes."""

    name = "diffusers"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return _missing("diffusers")

    def build(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> Built:
        model = diffusers_model(weights, device, dtype)

        def decode(z: torch.Tensor) -> torch.Tensor:
            pixels: torch.Tensor = model.decode(z.to(dtype)).sample
            return pixels

        return Built(decode, _image_by_copy(decode, device))


def _image_by_copy(
    decode: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The image path of a decoder that has none: rescaled on the device, then one copy."""

    def image(z: torch.Tensor) -> torch.Tensor:
        pixels = decode(z.to(device)).float().add_(1.0).mul_(0.5)
        return pixels.movedim(1, -1).contiguous().to("cpu")

    return image


def _missing(*packages: str) -> str | None:
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    return f"not installed: {', '.join(absent)}" if absent else None
