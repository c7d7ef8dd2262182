"""What the tests of decodes share: small models, random chunk schedules, and a distance."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tests.conftest import SMALL_CONFIGS, random_state
from wan_vae import WanVAE

_VAES: dict[str, WanVAE] = {}


def vae_of(family: str) -> WanVAE:
    if family not in _VAES:
        _VAES[family] = WanVAE.from_state_dict(random_state(SMALL_CONFIGS[family]), device="cpu")
    return _VAES[family]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).norm() / b.norm()).item()


@st.composite
def schedules(draw) -> list[int]:
    """Chunk lengths of one to six latent frames in all."""
    frames = draw(st.integers(1, 6))
    lengths: list[int] = []
    while sum(lengths) < frames:
        lengths.append(draw(st.integers(1, frames - sum(lengths))))
    return lengths
