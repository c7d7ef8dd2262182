"""The same random weights for every contender, each in its own key layout.

The masters are float32 tensors on the CPU under native keys (what ComfyUI loads). Diffusers' keys
are found by sending its own names through our checkpoint reader, so that no table is kept twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from wan_vae.config import WanVAEConfig
from wan_vae.io.checkpoint import canonical_state_dict
from wan_vae.network.model import expected_shapes

_WEIGHT_SEED = 0


@dataclass(frozen=True)
class Weights:
    """Master weights of one architecture: native key -> float32 tensor on the CPU."""

    config: WanVAEConfig
    native: dict[str, torch.Tensor]

    @classmethod
    def random(cls, config: WanVAEConfig) -> Weights:
        """Seeded: kernels uniform as PyTorch's own layers start, gains near 1, small biases."""
        generator = torch.Generator().manual_seed(_WEIGHT_SEED)
        native = {}
        for name, shape in expected_shapes(config).items():
            if name.endswith("gamma"):
                native[name] = 1 + 0.1 * torch.randn(shape, generator=generator)
            elif name.endswith("bias"):
                native[name] = 0.02 * torch.randn(shape, generator=generator)
            else:
                bound = prod(shape[1:]) ** -0.5
                native[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return cls(config, native)


def diffusers_model(weights: Weights, device: torch.device, dtype: torch.dtype):
    """diffusers' AutoencoderKLWan with copies of `weights` on `device`. Raises ImportError."""
    import diffusers

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
            "in_channels": config.image_channels,
            "out_channels": config.image_channels,
            "patch_size": config.patch_size,
            "scale_factor_spatial": config.spatial_factor,
            "latents_mean": [0.0] * config.z_dim,
            "latents_std": [1.0] * config.z_dim,
        }
    return options
