"""What is decoded: latent shapes of the published models, and small ones to try the harness on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wan_vae.config import WanVAEConfig, wan21, wan22
from wan_vae.geometry import pixel_shape

_LATENT_SEED = 1


@dataclass(frozen=True)
class Case:
    """One latent shape [B, z, T, H, W] of one architecture."""

    name: str
    config: WanVAEConfig
    latent: tuple[int, int, int, int, int]

    def random_latent(self) -> torch.Tensor:
        """The latent that every decoder gets: seeded, float32, on the CPU."""
        generator = torch.Generator().manual_seed(_LATENT_SEED)
        return torch.randn(self.latent, generator=generator)

    @property
    def pixels(self) -> tuple[int, ...]:
        """Shape [B, 3, T', H', W'] of the decoded pixels."""
        return pixel_shape(self.latent, self.config)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("wan2.1-720p-81", wan21(), (1, 16, 21, 90, 160)),
        Case("wan2.1-480p-81", wan21(), (1, 16, 21, 60, 104)),
        Case("wan2.2-720p-121", wan22(), (1, 48, 31, 44, 80)),
        Case("wan2.2-480p-121", wan22(), (1, 48, 31, 30, 52)),
        Case("wan2.1-1024-image", wan21(), (1, 16, 1, 128, 128)),
        Case("wan2.1-tiny", wan21(), (1, 16, 3, 8, 8)),
        Case("wan2.2-tiny", wan22(), (1, 48, 3, 4, 4)),
        Case("wan2.1-narrow", wan21(dim=8), (1, 16, 2, 4, 4)),
        Case("wan2.2-narrow", wan22(dim=8, decoder_dim=16), (1, 48, 2, 2, 2)),
    )
}
# The table of the README; the others run only when they are named.
GPU_CASES = ("wan2.1-720p-81", "wan2.1-480p-81", "wan2.2-720p-121", "wan2.1-1024-image")
CPU_CASES = ("wan2.1-tiny", "wan2.2-tiny")
