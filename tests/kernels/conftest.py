"""What the kernels' tests share: an emulation, verdicts of their own, poisoned outputs."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.emulation.emulate import Emulation, frames_map
from wan_vae.kernels.cuda import conv3x3_wgmma, program


@pytest.fixture(scope="session")
def emulated_programs(tmp_path_factory) -> Path:
    """Where kernels are kept that were compiled for the CPU, for all processes of this session."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "emulated"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def emulated(emulated_programs, monkeypatch):
    """Kernels in CUDA C++ run on the CPU, on tensors there; see `Emulation`."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("no g++ on Linux here, which compiles the CUDA C++ kernels for the CPU")
    with Emulation(emulated_programs) as emulation:
        monkeypatch.setattr(program, "_queue", emulation.queue)
        monkeypatch.setattr(conv3x3_wgmma, "frames_map", frames_map)
        yield emulation


@pytest.fixture(scope="module")
def own_proofs(tmp_path_factory, interpreted):
    """The tests' own verdicts, none of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WAN_VAE_CACHE", str(tmp_path_factory.mktemp("proofs")))
        yield


@pytest.fixture
def poisoned_outputs():
    """Deterministic mode fills every `torch.empty` with NaN."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)
