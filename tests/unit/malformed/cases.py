"""Malformed files and the check that each gives a typed error in one readable line.

Each case runs twice through `cli.main`: as a user sees it, and with WAN_VAE_DEBUG=1, which lets
the typed error through. Nothing may hang, crash, write a file or run the code of a pickle.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tests.conftest import random_state
from wan_vae.commands.cli import main
from wan_vae.config import wan21
from wan_vae.errors import WanVAEError

STATE = random_state(wan21(dim=8))
FILE = save(STATE)
# Far above what a case takes on a busy machine: it ends within seconds or hangs.
HANG_S = 300


def decode_argv(latent: Path, good: Path, output: Path, *options: str) -> list[str]:
    """The arguments that decode `latent` with the VAE of the folder `good`."""
    vae = ["--vae", str(good / "vae.safetensors")]
    return ["decode", str(latent), *vae, "-o", str(output), "--device", "cpu", *options]


def encode_argv(video: Path, good: Path, output: Path, vae: str = "vae.safetensors") -> list[str]:
    """The arguments that encode `video` with a VAE of the folder `good`."""
    return ["encode", str(video), "--vae", str(good / vae), "-o", str(output), "--device", "cpu"]


def check(argv: list[str], expected: type[WanVAEError], words: str, capfd, monkeypatch) -> None:
    """`argv` ends with exit code 1 and one line with `words`, and raises `expected` in debug."""
    monkeypatch.delenv("WAN_VAE_DEBUG", raising=False)
    capfd.readouterr()
    assert main(argv) == 1
    out, err = capfd.readouterr()
    lines = err.strip().splitlines()
    # What a progress bar leaves behind is not the error.
    lines = [line for line in lines if "frame/s" not in line and "?frame" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("wan-vae: ")
    assert len(lines[0]) < 1200, "an error is a line to read, not a listing"
    assert words.lower() in lines[0].lower(), lines[0]
    assert "Traceback" not in out + err
    monkeypatch.setenv("WAN_VAE_DEBUG", "1")
    with pytest.raises(WanVAEError) as caught:
        main(argv)
    assert type(caught.value) is expected, repr(caught.value)


def safetensors_bytes(header: dict | bytes, data: bytes = b"", claimed: int | None = None) -> bytes:
    """A safetensors file made by hand, so that it can lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


def keys(*names: str) -> bytes:
    return save({name: torch.ones(2, 2) for name in names})


def nan_like(x: torch.Tensor, value: float = float("nan")) -> torch.Tensor:
    x = x.clone()
    x.view(-1)[3] = value
    return x
