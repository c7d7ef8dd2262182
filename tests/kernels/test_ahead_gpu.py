"""On a card: after the process that compiles, a first decode and encode compile nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.conftest import PATIENCE_S, random_state
from wan_vae import WanVAE
from wan_vae.config import wan21
from wan_vae.device import auto_dtype, dtype_name
from wan_vae.kernels import registry
from wan_vae.kernels.device import Device
from wan_vae.kernels.proof.cache import environment
from wan_vae.runs.ahead import AheadJob, jobs_of_work
from wan_vae.workers.ahead import AheadCompiler, Ended

pytestmark = pytest.mark.gpu


def entries(*folders: Path) -> set[str]:
    return {str(path) for folder in folders for path in folder.iterdir()}


def test_a_first_decode_compiles_nothing(tmp_path, monkeypatch):
    kernels, triton = tmp_path / "kernels", tmp_path / "triton"
    triton.mkdir()
    monkeypatch.setenv("WAN_VAE_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(triton))
    device = torch.device("cuda", 0)
    card, dtype = Device.chosen_for(device), auto_dtype(device)[0]
    if not registry.families_of("auto", card):
        pytest.skip(f"no kernels by default on {card.spoken}")
    config, ended = wan21(dim=32), list[Ended]()
    compiler = AheadCompiler(ended.append)
    work = jobs_of_work(("decoder", "encoder"))
    compiler.ask(AheadJob(config, card, dtype_name(dtype), environment(device), work))
    assert compiler.wait(PATIENCE_S)
    (only,) = ended
    assert only.code == 0 and len(only.outcomes) == len(work), only.said
    assert os.listdir(kernels)
    before = entries(kernels, triton)
    vae = WanVAE.from_state_dict(random_state(config), device=device, dtype=dtype)
    for frames in (1, 3):
        pixels = vae.decode(torch.randn(1, 16, frames, 8, 12, device=device))
        assert vae.encode(pixels).isfinite().all()
    assert entries(kernels, triton) - before == set()
