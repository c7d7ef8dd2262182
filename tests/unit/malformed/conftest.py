"""Right files for the tests of malformed ones, and a guard against a case that hangs."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.malformed.cases import HANG_S, STATE, decode_argv
from wan_vae.commands.cli import main
from wan_vae.io.latents import save_latent


@pytest.fixture(autouse=True)
def no_hang():
    """Let a case that hangs fail, so that the other cases still run."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(signum, frame):
        raise AssertionError(f"still running after {HANG_S} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> Path:
    """A folder with a right checkpoint, a right latent and a right video."""
    folder = tmp_path_factory.mktemp("good")
    save_file(STATE, str(folder / "vae.safetensors"))
    decoder_only = {k: v for k, v in STATE.items() if not k.startswith(("encoder.", "conv1."))}
    save_file(decoder_only, str(folder / "decoder_only.safetensors"))
    latent = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    save_latent(folder / "z.latent", latent)
    save_latent(folder / "image.latent", latent[:, :, :1])
    assert main(decode_argv(folder / "z.latent", folder, folder / "clip.mp4")) == 0
    return folder
