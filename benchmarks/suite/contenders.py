"""Who decodes: this pack by backend, fastvae, diffusers and ComfyUI's core."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch

from benchmarks.suite.comfyui import ComfyUICore
from benchmarks.suite.contender import Built, Contender
from benchmarks.suite.weights import Weights, diffusers_model
from wan_vae.io.image import ImageSink
from wan_vae.options import Backend
from wan_vae.pipeline import WanVAE
from wan_vae.runs.kernel_choice import unavailable_reason


def contenders(backends: Sequence[Backend]) -> list[Contender]:
    """Ours, one for each of `backends`, then the peers."""
    return [*(Ours(b) for b in backends), FastVAE(), Diffusers(), ComfyUICore()]


class Ours:
    """This pack; its image path is that of the ComfyUI node (`ImageSink`)."""

    def __init__(self, backend: Backend):
        self.backend: Backend = backend
        self.name = f"wan_vae ({backend})"

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if self.backend in ("auto", "eager"):
            return None
        return unavailable_reason(self.backend, device, dtype)

    def build(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> Built:
        vae = WanVAE.from_state_dict(weights.native, device=device, dtype=dtype)

        def decode(z: torch.Tensor) -> torch.Tensor:
            return vae.decode(z, backend=self.backend)

        def image(z: torch.Tensor) -> torch.Tensor:
            sink = ImageSink.allocate(tuple(z.shape), vae.config, torch.device("cpu"))
            vae.decode(z, sink=sink, backend=self.backend)
            return sink.image

        def note() -> str:
            layers = vae.last_report.layers
            fast = sum(layer.backend != "eager" for layer in layers)
            said = [f"{fast} of {len(layers)} layers on proven kernels"] if fast else []
            return "; ".join((*said, *vae.last_report.fallbacks))

        return Built(decode, image, note=note)


class FastVAE:
    """fastvae, which wraps diffusers' model; chunks as it chooses them."""

    name = "fastvae"

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return _missing("fastvae", "diffusers")

    def build(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> Built:
        from fastvae import FastVAEDecoder

        decoder = FastVAEDecoder.from_vae(diffusers_model(weights, device, dtype)).to(device)

        def decode(z: torch.Tensor) -> torch.Tensor:
            return decoder.decode(z.to(dtype))

        def note() -> str:
            return "" if device.type == "cuda" else "its kernels need CUDA: its PyTorch path"

        return Built(decode, _image_by_copy(decode, device), note=note)


class Diffusers:
    """diffusers' AutoencoderKLWan as it comes."""

    name = "diffusers"

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return _missing("diffusers")

    def build(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> Built:
        model = diffusers_model(weights, device, dtype)

        def decode(z: torch.Tensor) -> torch.Tensor:
            return model.decode(z.to(dtype)).sample

        return Built(decode, _image_by_copy(decode, device))


def _image_by_copy(
    decode: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The image path of a peer that has none: rescaled on the device, then one copy."""

    def image(z: torch.Tensor) -> torch.Tensor:
        pixels = decode(z.to(device)).float().add_(1.0).mul_(0.5)
        return pixels.movedim(1, -1).contiguous().to("cpu")

    return image


def _missing(*packages: str) -> str | None:
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    return f"not installed: {', '.join(absent)}" if absent else None
