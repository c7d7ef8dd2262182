"""Latent files that are cut, damaged, of a wrong shape or dtype, or not finite."""

from __future__ import annotations

import io
import pickle
import struct
import sys
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tests.unit.malformed.cases import check, decode_argv, keys, nan_like, safetensors_bytes
from wan_vae.errors import LatentError
from wan_vae.io.latents import load_latent


def latent_file(latent: torch.Tensor, key: str = "latent_tensor") -> bytes:
    return save({key: latent.contiguous(), "latent_format_version_0": torch.tensor([])})


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_header(text: str) -> bytes:
    header = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


Z = torch.zeros(1, 16, 2, 4, 4)
# Windows says of such a name that there is no such file; what we add tells why.
TOO_LONG = "characters" if sys.platform == "win32" else "too long"
# What musubi-tuner's scripts write beside a latent that they generate.
MUSUBI = {"seeds": "1", "prompt": "a cat", "infer_steps": "20", "guidance_scale": "5.0"}
LATENTS: dict[str, tuple[str, bytes | Callable[[], bytes], str]] = {
    "empty file": ("z.latent", b"", "an empty file"),
    "cut": ("z.latent", latent_file(Z)[:-7], "cut short: 2209 of 2216 bytes"),
    "text": ("z.latent", b"hello, this is no latent", "a text ('hello, this"),
    "huge header": ("z.latent", safetensors_bytes({}, claimed=2**62), "begin with"),
    "three dimensions": ("z.latent", latent_file(torch.zeros(5, 4, 4)), "expected a floating"),
    "packed tokens": ("z.latent", latent_file(torch.zeros(1, 96, 64)), "packed tokens"),
    "two dimensions": ("z.latent", latent_file(torch.zeros(4, 4)), "expected a floating"),
    "six dimensions": ("z.latent", latent_file(Z[None]), "expected a floating"),
    "a scalar": ("z.latent", latent_file(torch.zeros(())), "expected a floating"),
    "integers": ("z.latent", latent_file(Z.int()), "int32"),
    "booleans": ("z.latent", latent_file(Z.bool()), "bool"),
    "no batch": ("z.latent", latent_file(Z[:0]), "empty"),
    "no channels": ("z.latent", latent_file(Z[:, :0]), "empty"),
    "no frames": ("z.latent", latent_file(Z[:, :, :0]), "empty"),
    "no rows": ("z.latent", latent_file(Z[:, :, :, :0]), "empty"),
    "no columns": ("z.latent", latent_file(Z[..., :0]), "empty"),
    "Wan 2.2's channels": ("z.latent", latent_file(torch.zeros(1, 48, 2, 4, 4)), "Wan 2.2"),
    "four channels": ("z.latent", latent_file(torch.zeros(1, 4, 2, 4, 4)), "has 4 channels"),
    "NaN in a frame": ("z.latent", lambda: latent_file(torch.cat([Z, nan_like(Z)], 2)), "(2)"),
    "inf in every frame": ("z.latent", latent_file(Z + float("inf")), "2 of 2 frames"),
    "no latent among several": ("z.latent", keys("a", "b"), "no latent among 2"),
    "no tensors": ("z.safetensors", save({}), "no latent among 0"),
    "npy of objects": ("z.npy", npy_bytes(np.array([{"a": 1}], dtype=object)), "npy"),
    "npy of integers": ("z.npy", npy_bytes(np.zeros((16, 2, 4, 4), np.int64)), "int64"),
    "npy of text": ("z.npy", npy_bytes(np.array(["a", "b"])), "expected floating"),
    "npy of records": (
        "z.npy",
        npy_bytes(np.zeros(4, dtype=[("a", "f4"), ("b", "i2")])),
        "expected floating",
    ),
    "npy of complex numbers": (
        "z.npy",
        npy_bytes(np.zeros((16, 2, 4, 4), np.complex64)),
        "complex64",
    ),
    "npy cut": ("z.npy", npy_bytes(Z.numpy())[:-9], "npy"),
    "npy empty": ("z.npy", b"", "npy"),
    "npy that claims an exabyte": (
        "z.npy",
        npy_header(
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2**58,), }".replace(
                "2**58", str(2**58)
            )
        ),
        "npy",
    ),
    "npy of negative size": (
        "z.npy",
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-4,), }"),
        "npy",
    ),
    "npy header with code": (
        "z.npy",
        npy_header("{'descr': __import__('os').getcwd(), 'shape': (1,)}"),
        "npy",
    ),
    "npz of several arrays": ("z.npy", lambda: npz_bytes(a=Z.numpy(), b=Z.numpy()), "--key"),
    "npz cut": ("z.npz", lambda: npz_bytes(latent=Z.numpy())[:-30], "cut short"),
    "npz of integers": ("z.npz", lambda: npz_bytes(latent=np.zeros(4, np.int64)), "int64"),
    "PyTorch file of text": ("z.pt", lambda: torch_bytes("hello"), "contains a str"),
    "PyTorch file of two": ("z.pt", lambda: torch_bytes([Z, Z]), "contains a list"),
    "PyTorch file cut": ("z.pt", lambda: torch_bytes(Z)[:-300], "cut short"),
    "PyTorch file of integers": ("z.pt", lambda: torch_bytes(Z.int()), "int32"),
    "PyTorch file of a sparse tensor": ("z.pt", lambda: torch_bytes(Z.to_sparse()), "expected a"),
    "a musubi cache of HunyuanVideo": (
        "z.safetensors",
        save({"latents_2x4x4_float32": Z[0]}, {"architecture": "hunyuan_video"}),
        "a latent of hunyuan_video, which another VAE decodes",
    ),
    "a latent that musubi-tuner made with FramePack": (
        "z.safetensors",
        save({"latent": Z[0]}, {**MUSUBI, "latent_window_size": "9"}),
        "another VAE decodes",
    ),
    "frames before channels": (
        "z.latent", latent_file(Z.transpose(1, 2)), "looks like [B, T, z, H, W]"),
    "channels last": ("z.pt", lambda: torch_bytes(Z.movedim(1, -1)), "looks like [B, T, H, W, z]"),
    "PyTorch file of a nested tensor": (
        "z.pt", lambda: torch_bytes(torch.nested.nested_tensor([Z[0], Z[0]])), "a nested tensor"),
    "PyTorch file of a meta tensor": ("z.pt", lambda: torch_bytes(Z.to("meta")), "a meta tensor"),
    "PyTorch file of settings": (
        "z.pt", lambda: torch_bytes({"latents": Z, "args": Namespace(a=1)}),
        "could run code (it holds argparse.Namespace); if you trust it"),
    "a plain pickle": ("z.pt", pickle.dumps({"latents": [1.5]}, protocol=4), "Unsupported operand"),
    "4 bits": ("z.pt", lambda: torch_bytes(four_bits(Z)), "expected a"),
    "a musubi cache of two": (
        "z.safetensors",
        save({"latents_2x4x4_float32": Z[0], "latents_1x4x4_float32": Z[0, :, :1].clone()}),
        "name one with --key",
    ),
}  # fmt: skip


def four_bits(z: torch.Tensor) -> torch.Tensor:
    """A dtype of two numbers a byte, which PyTorch has since 2.8; before, quantized numbers."""
    if hasattr(torch, "float4_e2m1fn_x2"):
        return z.to(torch.uint8).view(torch.float4_e2m1fn_x2)
    return torch.quantize_per_tensor(z, 0.1, 0, torch.quint4x2)


def npz_bytes(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("case", LATENTS)
def test_malformed_latent(case, tmp_path, good, capfd, monkeypatch):
    name, content, words = LATENTS[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content())
    check(decode_argv(path, good, tmp_path / "out.mp4"), LatentError, words, capfd, monkeypatch)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize(
    ("name", "words"),
    [("none.latent", "no such file"), (".", "a folder"), ("x" * 300 + ".latent", TOO_LONG)],
)
def test_missing_latent(name, words, tmp_path, good, capfd, monkeypatch):
    argv = decode_argv(tmp_path / name, good, tmp_path / "out.mp4")
    check(argv, LatentError, words, capfd, monkeypatch)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.binary(max_size=300), suffix=st.sampled_from([".latent", ".safetensors", ".npy"]))
def test_random_bytes_as_a_latent(data, suffix, tmp_path):
    path = tmp_path / f"z{suffix}"
    path.write_bytes(data)
    with pytest.raises(LatentError):
        load_latent(path)
