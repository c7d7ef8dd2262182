"""The random weights of every benchmark, and the same ones for each decoder in its own key layout.

Weights are float32 tensors under native keys (what ComfyUI loads). Diffusers' keys are found by
sending its own names through our checkpoint reader, so that no table is kept twice.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from wan_vae.config import WanVAEConfig
from wan_vae.io.checkpoint import canonical_state_dict
from wan_vae.network.model import build_model, expected_shapes
from wan_vae.pipeline import WanVAE

_WEIGHT_SEED = 0
_CPU = torch.device("cpu")


def random_state(config: WanVAEConfig, device: torch.device = _CPU) -> dict[str, torch.Tensor]:
    """Seeded weights, made on `device`: kernels uniform as PyTorch's own layers start, gains near
    1, small biases. Another kind of device has other numbers."""
    generator = torch.Generator(device).manual_seed(_WEIGHT_SEED)
    state = {}
    for name, shape in expected_shapes(config).items():
        if name.endswith("gamma"):
            noise = torch.randn(shape, generator=generator, device=device)
            state[name] = 1 + 0.1 * noise
        elif name.endswith("bias"):
            noise = torch.randn(shape, generator=generator, device=device)
            state[name] = 0.02 * noise
        else:
            bound = prod(shape[1:]) ** -0.5
            empty = torch.empty(shape, device=device)
            state[name] = empty.uniform_(-bound, bound, generator=generator)
    return state


def random_vae(config: WanVAEConfig, device: torch.device) -> WanVAE:
    """A VAE with `random_state` on `device`, in bfloat16 on CUDA and float32 elsewhere."""
    vae = WanVAE(build_model(config, random_state(config, device), device, torch.float32))
    if device.type == "cuda":
        vae.model.to(torch.bfloat16)
    return vae


@dataclass(frozen=True)
class Weights:
    """Master weights of one architecture: native key -> float32 tensor on the CPU."""

    config: WanVAEConfig
    native: dict[str, torch.Tensor]

    @classmethod
    def random(cls, config: WanVAEConfig) -> Weights:
        """`random_state`, made on the CPU: the same on every machine."""
        return cls(config, random_state(config))


def diffusers_model(weights: Weights, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' AutoencoderKLWan with copies of `weights` on `device`. Raises ImportError."""
    diffusers = importlib.import_module("diffusers")
    with torch.device("meta"):
        model = diffusers.AutoencoderKLWan(**_diffusers_options(weights.config))
    named = model.state_dict()
    # The reader renames keys and keeps the tensors, so a tensor leads from one name to the other.
    native_name = {id(v): k for k, v in canonical_state_dict(named).state.items()}
    own = {
        key: torch.empty(value.shape, dtype=dtype, device=device).copy_(
            weights.native[native_name[id(value)]]
        )
        for key, value in named.items()
    }
    model.load_state_dict(own, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _diffusers_options(config: WanVAEConfig) -> dict[str, object]:
    """Arguments of AutoencoderKLWan for `config`; its own spelling."""
    options: dict[str, object] = {
        "base_dim": config.dim,
        "z_dim": config.z_dim,
        "dim_mult": list(config.dim_mult),
        "num_res_blocks": config.num_res_blocks,
        "temperal_downsample": list(config.temporal_downsample),
    }
    if config.residual_shortcuts:
        options |= {
            "decoder_base_dim": config.decoder_dim,
            "is_residual": True,
            "in_channels": config.encoder_channels,
            "out_channels": config.decoder_channels,
            "patch_size": config.patch_size,
            "scale_factor_spatial": config.spatial_factor,
            "latents_mean": [0.0] * config.z_dim,
            "latents_std": [1.0] * config.z_dim,
        }
    return options
