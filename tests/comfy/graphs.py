"""API prompts, and the small files that a test server needs."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.conftest import random_state
from wan_vae.config import wan21

# A real architecture, and narrow.
VAES = ("wan21.safetensors", "wan21_other.safetensors")
OTHER_VAE = "image_vae.safetensors"


def write_vaes(folder: Path) -> None:
    """Two random Wan 2.1 VAEs, and one that is no Wan VAE."""
    for seed, name in enumerate(VAES):
        save_file(random_state(wan21(dim=8), seed), folder / name)
    # Enough for ComfyUI to take it for a Stable Diffusion VAE (it fills in what is missing).
    save_file({"decoder.conv_in.weight": torch.zeros(512, 4, 3, 3)}, folder / OTHER_VAE)


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def load_vae(name: str = "wan21.safetensors") -> dict:
    return node("VAELoader", vae_name=name)


def latent(batch=1, channels=16, frames=3, height=8, width=12, seed=0, kind="plain") -> dict:
    return node(
        "ProbeLatent",
        batch=batch,
        channels=channels,
        frames=frames,
        height=height,
        width=width,
        seed=seed,
        kind=kind,
    )


def decode_and_compare(samples: dict, vae: dict | None = None, **options) -> dict:
    """Our decode (node 3) and core's (4) of one latent, and the comparison (5)."""
    return {
        "1": vae or load_vae(),
        "2": samples,
        "3": node("WanVAEDecode", vae=["1", 0], samples=["2", 0], **options),
        "4": node("VAEDecode", vae=["1", 0], samples=["2", 0]),
        "5": node("ProbeCompareImages", a=["3", 0], b=["4", 0]),
    }


def decode(samples: dict, vae: dict | None = None, **options) -> dict:
    """Our decode (node 3) with something that wants its image (5)."""
    return {
        "1": vae or load_vae(),
        "2": samples,
        "3": node("WanVAEDecode", vae=["1", 0], samples=["2", 0], **options),
        "5": node("ProbeSink", value=["3", 0]),
    }


def wan22(prompt: dict) -> dict:
    """The same prompt with a Wan 2.2 VAE in node 1 (made from the one in node 0)."""
    return {**prompt, "0": load_vae(), "1": node("ProbeWan22VAE", vae=["0", 0])}
