"""What ranks do in tests: (rank, ranks, group, **arguments) -> picklable result."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

import wan_vae
from tests.conftest import SMALL_CONFIGS, random_state
from wan_vae import WanVAE
from wan_vae.sharding import ShardContext

MINI = Path(__file__).parents[2] / "examples" / "wan_vae_mini.safetensors"


@cache
def model(name: str, weight_format: str = "contiguous") -> WanVAE:
    """A small VAE by name, with checkpoint weights in a memory format."""
    if name == "mini":
        return wan_vae.load(MINI, device="cpu")
    state = random_state(SMALL_CONFIGS[name])
    if weight_format == "channels_last_3d":
        state = {
            k: v.contiguous(memory_format=torch.channels_last_3d) if v.ndim == 5 else v
            for k, v in state.items()
        }
    return WanVAE.from_state_dict(state, device="cpu")


def noise(shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _to_numpy(x):
    return None if x is None else x.numpy()


def decode(rank, ranks, group, *, name, shape, axis="auto", gather="all", formats=None, **options):
    """Decode noise with shards: (pixels or None, report)."""
    wanted = formats[rank] if formats else "contiguous"
    vae = model(name, wanted)
    context = ShardContext(rank, ranks, axis, group)
    if formats:
        options["memory_format"] = wanted
    pixels = vae.decode(noise(shape), shard=context, gather=gather, **options)
    return _to_numpy(pixels), vae.last_report.as_dict()


def encode(rank, ranks, group, *, name, shape, axis="auto", gather="all", **options):
    """Encode noise with shards: (latent or None, report)."""
    vae = model(name)
    context = ShardContext(rank, ranks, axis, group)
    latent = vae.encode(noise(shape).tanh(), shard=context, gather=gather, **options)
    return _to_numpy(latent), asdict(vae.last_report)
