"""Malformed files and options: a typed error, one readable line at the command line, exit code 1.

Each case runs twice through `cli.main`: as a user sees it, and with WAN_VAE_DEBUG=1, which
lets the typed error through. Nothing may hang, crash, write a file or run a pickle's code.
"""

from __future__ import annotations

import io
import json
import pickle
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from tests.conftest import random_state
from wan_vae.commands.cli import main
from wan_vae.config import wan21, wan22
from wan_vae.errors import (
    BackendError,
    CheckpointError,
    GeometryError,
    LatentError,
    NotAWanVAEError,
    OutputError,
    WanVAEError,
)
from wan_vae.io.latents import save_latent

STATE = random_state(wan21(dim=8))
WEIGHT = "decoder.middle.0.residual.2.weight"
SECONDS = 60


@pytest.fixture(autouse=True)
def no_hang():
    """A case that hangs fails by itself instead of with the whole run."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(signum, frame):
        raise AssertionError(f"still running after {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder with a right checkpoint, a right latent and a right video."""
    folder = tmp_path_factory.mktemp("good")
    save_file(STATE, str(folder / "vae.safetensors"))
    decoder_only = {k: v for k, v in STATE.items() if not k.startswith(("encoder.", "conv1."))}
    save_file(decoder_only, str(folder / "decoder_only.safetensors"))
    latent = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    save_latent(folder / "z.latent", latent)
    save_latent(folder / "image.latent", latent[:, :, :1])
    assert main(_decode(folder / "z.latent", folder, folder / "clip.mp4")) == 0
    return folder


def _decode(latent: Path, good: Path, output: Path, *options: str) -> list[str]:
    vae = good / "vae.safetensors"
    common = ["--vae", str(vae), "-o", str(output), "--device", "cpu", *options]
    return ["decode", str(latent), *common]


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


# -- checkpoints ----------------------------------------------------------------------------------


def safetensors_bytes(header: dict | bytes, data: bytes = b"", claimed: int | None = None) -> bytes:
    """A safetensors file made by hand, so that it can lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


def changed(**tensors: object) -> bytes:
    """The right state with some tensors replaced (None removes one); `__` stands for a dot."""
    state = dict(STATE)
    for key, value in tensors.items():
        key = key.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return save(state)


def torch_bytes(value: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def keys(*names: str) -> bytes:
    return save({name: torch.ones(2, 2) for name in names})


class Hostile:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def nan_like(x: torch.Tensor, value: float = float("nan")) -> torch.Tensor:
    x = x.clone()
    x.view(-1)[3] = value
    return x


FILE = save(STATE)
HEADER_BYTES = struct.unpack("<Q", FILE[:8])[0]
ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
MID = WEIGHT.replace(".", "__")
QWEN21 = {
    k: v[:, :, :1] if v.ndim == 5 else v
    for k, v in random_state(wan22(dim=8, decoder_dim=16)).items()
}

# name -> (file name, bytes, error, words of the message)
CHECKPOINTS: dict[str, tuple[str, bytes | Callable[[], bytes], type, str]] = {
    "empty file": ("v.safetensors", b"", CheckpointError, "empty"),
    "four bytes": ("v.safetensors", FILE[:4], CheckpointError, "cut short"),
    "length only": ("v.safetensors", FILE[:8], CheckpointError, "cut short"),
    "cut in the header": ("v.safetensors", FILE[:100], CheckpointError, "claims"),
    "cut after the header": (
        "v.safetensors", FILE[: 8 + HEADER_BYTES], CheckpointError, "not a readable"),
    "cut in the middle": ("v.safetensors", FILE[: len(FILE) // 2], CheckpointError, "readable"),
    "last byte missing": ("v.safetensors", FILE[:-1], CheckpointError, "readable"),
    "bytes too many": ("v.safetensors", FILE + b"more", CheckpointError, "readable"),
    "header of 2^63 bytes": (
        "v.safetensors", safetensors_bytes({}, claimed=2**63), CheckpointError, "claims"),
    "header of a terabyte": (
        "v.safetensors", safetensors_bytes({}, claimed=2**40), CheckpointError, "claims"),
    "header of no bytes": (
        "v.safetensors", safetensors_bytes(b""), CheckpointError, "not a readable"),
    "header is no JSON": (
        "v.safetensors", safetensors_bytes(b"{]" * 20), CheckpointError, "readable"),
    "header is a list": (
        "v.safetensors", safetensors_bytes(b"[1, 2]"), CheckpointError, "readable"),
    "header is not UTF-8": (
        "v.safetensors", safetensors_bytes(b'{"\xff\xfe": 1}'), CheckpointError, "readable"),
    "header nested deeply": (
        "v.safetensors", safetensors_bytes(b'{"a":' * 50_000), CheckpointError, "readable"),
    "tensor larger than the file": (
        "v.safetensors",
        safetensors_bytes({"a": {**ENTRY, "shape": [2**40], "data_offsets": [0, 2**42]}}),
        CheckpointError, "readable"),
    "size that overflows": (
        "v.safetensors",
        safetensors_bytes({"a": {**ENTRY, "shape": [2**62, 2**62]}}, bytes(16)),
        CheckpointError, "readable"),
    "negative size": (
        "v.safetensors", safetensors_bytes({"a": {**ENTRY, "shape": [-2, -2]}}, bytes(16)),
        CheckpointError, "readable"),
    "offsets backwards": (
        "v.safetensors", safetensors_bytes({"a": {**ENTRY, "data_offsets": [16, 0]}}, bytes(16)),
        CheckpointError, "readable"),
    "overlapping tensors": (
        "v.safetensors", safetensors_bytes({"a": ENTRY, "b": ENTRY}, bytes(16)),
        CheckpointError, "readable"),
    "unknown dtype": (
        "v.safetensors", safetensors_bytes({"a": {**ENTRY, "dtype": "Q3"}}, bytes(16)),
        CheckpointError, "readable"),
    "text": ("v.safetensors", b"Git LFS pointer\n" * 20, CheckpointError, "claims"),
    "a PNG": ("v.safetensors", b"\x89PNG\r\n\x1a\n" + bytes(99), CheckpointError, "claims"),
    "no tensors": ("v.safetensors", save({}), NotAWanVAEError, "holds no tensors"),
    "one tensor missing": (
        "v.safetensors", lambda: changed(**{MID: None}), CheckpointError, f"missing {WEIGHT}"),
    "the deciding tensor missing": (
        "v.safetensors", lambda: changed(decoder__conv1__weight=None), CheckpointError,
        "decides the architecture"),
    "a tensor too many": (
        "v.safetensors", lambda: changed(ema__decay=torch.ones(1)), CheckpointError,
        "unknown ema.decay"),
    "a transposed weight": (
        "v.safetensors",
        lambda: changed(decoder__conv1__weight=STATE["decoder.conv1.weight"].transpose(0, 1)
                        .contiguous()),
        CheckpointError, "expected"),
    "two weights swapped": (
        "v.safetensors",
        lambda: changed(conv2__weight=STATE["decoder.head.2.weight"],
                        decoder__head__2__weight=STATE["conv2.weight"]),
        NotAWanVAEError, "not a Wan 2.1 VAE"),
    "a weight of no size": (
        "v.safetensors", lambda: changed(**{MID: torch.ones(0, 32, 3, 3, 3)}), CheckpointError,
        "wrong shape"),
    "a scalar weight": (
        "v.safetensors", lambda: changed(**{MID: torch.ones(())}), CheckpointError, "wrong shape"),
    "a head of no channels": (
        "v.safetensors", lambda: changed(decoder__head__0__gamma=torch.ones(0, 1, 1, 1)),
        CheckpointError, "non-empty"),
    "another width inside": (
        "v.safetensors", lambda: changed(encoder__conv1__weight=torch.ones(12, 3, 3, 3, 3)),
        CheckpointError, "differ"),
    "integer weights": (
        "v.safetensors", lambda: changed(**{MID: STATE[WEIGHT].to(torch.int8)}), CheckpointError,
        "int8"),
    "float64 weights": (
        "v.safetensors", lambda: changed(**{MID: STATE[WEIGHT].double()}), CheckpointError,
        "float64"),
    "float8 weights": (
        "v.safetensors", lambda: changed(**{MID: STATE[WEIGHT].to(torch.float8_e4m3fn)}),
        CheckpointError, "float8"),
    "NaN in a weight": (
        "v.safetensors", lambda: changed(**{MID: nan_like(STATE[WEIGHT])}), CheckpointError,
        f"NaN or inf in {WEIGHT}"),
    "inf in a bias": (
        "v.safetensors",
        lambda: changed(decoder__conv1__bias=nan_like(STATE["decoder.conv1.bias"], float("inf"))),
        CheckpointError, "NaN or inf"),
    "Qwen-Image 2.1": ("v.safetensors", lambda: save(
        {k: v.contiguous() for k, v in QWEN21.items()}), NotAWanVAEError, "Qwen-Image 2.1"),
    "a Stable Diffusion VAE": (
        "v.safetensors", keys("decoder.up.0.block.0.norm1.weight"), NotAWanVAEError,
        "Stable Diffusion"),
    "a Wan transformer": (
        "v.safetensors", keys("blocks.0.self_attn.q.weight"), NotAWanVAEError, "transformer"),
    "a HunyuanVideo VAE": (
        "v.safetensors", keys("decoder.up.0.block.0.conv1.conv.weight"), NotAWanVAEError,
        "HunyuanVideo"),
    "an LTX VAE": (
        "v.safetensors", keys("decoder.last_scale_shift_table"), NotAWanVAEError, "LTX"),
    "an unknown model": ("v.safetensors", keys("a.b", "c"), NotAWanVAEError, "first keys: a.b"),
    "the encoder alone": (
        "v.safetensors",
        lambda: save({k: v for k, v in STATE.items() if k.startswith("encoder.")}),
        NotAWanVAEError, "not a Wan VAE"),
    "two prefixes": (
        "v.safetensors",
        lambda: save({("vae." if i % 2 else "model.") + k: v
                      for i, (k, v) in enumerate(STATE.items())}),
        CheckpointError, "missing"),
    "pth cut in the middle": (
        "v.pth", lambda: torch_bytes(STATE)[:50_000], CheckpointError, "PyTorch file"),
    "pth of garbage": ("v.pth", b"\x80\x02}q\x00." * 9, CheckpointError, ""),
    "pth that is text": ("v.pth", b"hello world, I am no checkpoint\n", CheckpointError, ""),
    "pth with a list": ("v.pth", lambda: torch_bytes([torch.ones(2)]), CheckpointError, "a list"),
    "pth with a tensor": ("v.pth", lambda: torch_bytes(torch.ones(2)), CheckpointError, "a Tensor"),
    "pth with numbers": (
        "v.pth", lambda: torch_bytes({"a": 1, "b": 2}), CheckpointError, "something else"),
    "pth with numbered keys": (
        "v.pth", lambda: torch_bytes({0: torch.ones(2)}), CheckpointError, "something else"),
    "pth with sparse tensors": (
        "v.pth", lambda: torch_bytes({**STATE, WEIGHT: STATE[WEIGHT].to_sparse()}),
        CheckpointError, "sparse"),
    "pth with complex tensors": (
        "v.pth", lambda: torch_bytes({**STATE, WEIGHT: STATE[WEIGHT].to(torch.complex64)}),
        CheckpointError, "complex64"),
    "a plain pickle of a dict": (
        "v.pth", pickle.dumps({"a": [1, 2, 3]}), CheckpointError, ""),
    "a zip that is no checkpoint": ("v.safetensors", lambda: zip_bytes(), CheckpointError, ""),
}  # fmt: skip


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    return buffer.getvalue()


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_malformed_checkpoint(case, tmp_path, good, capfd, monkeypatch):
    name, content, expected, words = CHECKPOINTS[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content())
    check(["inspect", str(path)], expected, words, capfd, monkeypatch)
    output = tmp_path / "out.mp4"
    argv = ["decode", str(good / "z.latent"), "--vae", str(path), "-o", str(output)]
    check([*argv, "--device", "cpu"], expected, words, capfd, monkeypatch)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_hostile_pickle_does_not_run(legacy, tmp_path, capfd, monkeypatch):
    trap, path = tmp_path / "trap", tmp_path / "v.pth"
    content = torch_bytes(
        {**STATE, "evil": Hostile(trap)}, _use_new_zipfile_serialization=not legacy
    )
    path.write_bytes(content)
    check(["inspect", str(path)], CheckpointError, "could run code", capfd, monkeypatch)
    assert not trap.exists()


def test_a_bare_hostile_pickle_does_not_run(tmp_path, capfd, monkeypatch):
    trap, path = tmp_path / "trap", tmp_path / "v.ckpt"
    path.write_bytes(pickle.dumps(Hostile(trap)))
    check(["inspect", str(path)], CheckpointError, "", capfd, monkeypatch)
    assert not trap.exists()


def test_missing_checkpoint(tmp_path, capfd, monkeypatch):
    path = str(tmp_path / "none.safetensors")
    check(["inspect", path], CheckpointError, "no such file", capfd, monkeypatch)


@pytest.mark.parametrize(
    ("config", "expected", "words"),
    [
        (None, CheckpointError, "a folder without"),
        (b"{", CheckpointError, "not readable JSON"),
        (b"\xff\xfe\x00", CheckpointError, "not readable JSON"),
        (b'{"_class_name": "AutoencoderKL"}', NotAWanVAEError, "AutoencoderKL"),
        (b'{"_class_name": ["x"]}', NotAWanVAEError, "names the class"),
        (b'{"_class_name": "AutoencoderKLWan"}', CheckpointError, "a folder without"),
    ],
)
def test_malformed_folder(config, expected, words, tmp_path, capfd, monkeypatch):
    if config is not None:
        (tmp_path / "config.json").write_bytes(config)
    check(["inspect", str(tmp_path)], expected, words, capfd, monkeypatch)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(cut=st.integers(0, len(FILE) - 1))
def test_a_checkpoint_cut_anywhere(cut, tmp_path):
    path = tmp_path / "v.safetensors"
    path.write_bytes(FILE[:cut])
    with pytest.raises(CheckpointError):
        _load_checkpoint(path)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.integers(0, 8 + HEADER_BYTES - 1), value=st.integers(0, 255))
def test_a_damaged_header_is_refused_or_harmless(place, value, tmp_path):
    """One changed byte of length or header: refused, or no change (a space, the same byte)."""
    damaged = bytearray(FILE)
    damaged[place] = value
    path = tmp_path / "v.safetensors"
    path.write_bytes(damaged)
    try:
        found = _load_checkpoint(path)
    except CheckpointError:
        return
    assert found.state.keys() == STATE.keys()
    assert all(found.state[k].shape == STATE[k].shape for k in STATE)


def _load_checkpoint(path):
    from wan_vae.io.checkpoint import load_checkpoint

    return load_checkpoint(path)


# -- latents --------------------------------------------------------------------------------------


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
LATENTS: dict[str, tuple[str, bytes | Callable[[], bytes], str]] = {
    "empty file": ("z.latent", b"", "cut short"),
    "cut": ("z.latent", latent_file(Z)[:-7], "readable"),
    "text": ("z.latent", b"hello, this is no latent", "claims"),
    "huge header": ("z.latent", safetensors_bytes({}, claimed=2**62), "claims"),
    "three dimensions": ("z.latent", latent_file(torch.zeros(16, 4, 4)), "expected a floating"),
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
        "z.npy", npy_bytes(np.zeros(4, dtype=[("a", "f4"), ("b", "i2")])), "expected floating"),
    "npy of complex numbers": (
        "z.npy", npy_bytes(np.zeros((16, 2, 4, 4), np.complex64)), "complex64"),
    "npy cut": ("z.npy", npy_bytes(Z.numpy())[:-9], "npy"),
    "npy empty": ("z.npy", b"", "npy"),
    "npy that claims an exabyte": (
        "z.npy",
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2**58,), }"
                   .replace("2**58", str(2**58))), "npy"),
    "npy of negative size": (
        "z.npy", npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-4,), }"), "npy"),
    "npy header with code": (
        "z.npy", npy_header("{'descr': __import__('os').getcwd(), 'shape': (1,)}"), "npy"),
    "npz named npy": ("z.npy", lambda: npz_bytes(), "npy"),
}  # fmt: skip


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, latent=Z.numpy())
    return buffer.getvalue()


@pytest.mark.parametrize("case", LATENTS)
def test_malformed_latent(case, tmp_path, good, capfd, monkeypatch):
    name, content, words = LATENTS[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content())
    check(_decode(path, good, tmp_path / "out.mp4"), LatentError, words, capfd, monkeypatch)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize(
    ("name", "words"),
    [("none.latent", "no such file"), (".", "a folder"), ("x" * 300 + ".latent", "too long")],
)
def test_missing_latent(name, words, tmp_path, good, capfd, monkeypatch):
    argv = _decode(tmp_path / name, good, tmp_path / "out.mp4")
    check(argv, LatentError, words, capfd, monkeypatch)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.binary(max_size=300), suffix=st.sampled_from([".latent", ".safetensors", ".npy"]))
def test_random_bytes_as_a_latent(data, suffix, tmp_path):
    from wan_vae.io.latents import load_latent

    path = tmp_path / f"z{suffix}"
    path.write_bytes(data)
    with pytest.raises(LatentError):
        load_latent(path)


# -- videos to encode -----------------------------------------------------------------------------


def _encode(video: Path, good: Path, output: Path, vae: str = "vae.safetensors") -> list[str]:
    return [
        "encode", str(video), "--vae", str(good / vae), "-o", str(output), "--device", "cpu",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("v.mp4", b"", "not a readable video"),
        ("v.mp4", b"this is text, not a video" * 9, "not a readable video"),
        ("v.mp4", "cut", "not a readable video"),
        ("v.png", b"\x89PNG\r\n\x1a\n broken", "not a readable image"),
        ("v.jpg", b"", "not a readable image"),
        ("v.xyz", b"what is this", "not a readable video"),
    ],
)
def test_malformed_video(name, content, words, tmp_path, good, capfd, monkeypatch):
    if content == "cut":
        content = (good / "clip.mp4").read_bytes()[:200]
    path = tmp_path / name
    path.write_bytes(content)
    argv = _encode(path, good, tmp_path / "z.latent")
    check(argv, LatentError, words, capfd, monkeypatch)
    assert not (tmp_path / "z.latent").exists()


def test_missing_video(tmp_path, good, capfd, monkeypatch):
    argv = _encode(tmp_path / "none.mp4", good, tmp_path / "z.latent")
    check(argv, LatentError, "no such file", capfd, monkeypatch)


def test_a_picture_smaller_than_a_latent_pixel(tmp_path, good, capfd, monkeypatch):
    from wan_vae.io.video_write import save_png

    save_png(np.zeros((4, 4, 3), np.uint8), tmp_path / "v.png")
    argv = _encode(tmp_path / "v.png", good, tmp_path / "z.latent")
    check(argv, GeometryError, "too small", capfd, monkeypatch)


def test_encoding_without_an_encoder(tmp_path, good, capfd, monkeypatch):
    argv = _encode(good / "clip.mp4", good, tmp_path / "z.latent", "decoder_only.safetensors")
    check(argv, CheckpointError, "no encoder", capfd, monkeypatch)


@pytest.mark.parametrize("name", ["z.mp4", "z", "x" * 300 + ".latent"])
def test_encode_to_an_impossible_file(name, tmp_path, good, capfd, monkeypatch):
    argv = _encode(good / "clip.mp4", good, tmp_path / name)
    check(argv, OutputError, "", capfd, monkeypatch)


# -- outputs and options --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("out.gif", "unknown kind of output"),
        ("out.png", "do not fit one .png"),
        ("file/out.mp4", "file is a file, not a folder"),
        ("taken", "not a folder of frames"),
        ("file", "not a folder of frames"),
        ("x" * 300 + ".mp4", "name too long"),
        ("x" * 300, "name too long"),
        ("folder.mp4", "folder"),
        ("folder.safetensors", "folder"),
    ],
)
def test_impossible_output(output, words, tmp_path, good, capfd, monkeypatch):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    for name in ("folder.mp4", "folder.safetensors"):
        (tmp_path / name).mkdir()
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    argv = _decode(good / "z.latent", good, tmp_path / output)
    check(argv, OutputError, words, capfd, monkeypatch)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


def test_a_batch_does_not_fit_a_video(tmp_path, good, capfd, monkeypatch):
    save_latent(tmp_path / "z.latent", torch.zeros(2, 16, 2, 4, 4))
    argv = _decode(tmp_path / "z.latent", good, tmp_path / "out.mp4")
    check(argv, OutputError, "batch of 2", capfd, monkeypatch)


@pytest.mark.parametrize(
    ("options", "expected", "words"),
    [
        (["--device", "toaster"], BackendError, "toaster"),
        (["--device", "cuda:99"], BackendError, "cuda:99"),
        (["--chunk-frames", "0"], GeometryError, "chunk_frames is 0"),
        (["--chunk-frames", "-3"], GeometryError, "chunk_frames is -3"),
        (["--strips", "0"], GeometryError, "0 strips"),
        (["--strips", "999"], GeometryError, "999 strips"),
        (["--fps", "0"], OutputError, "frames a second"),
        (["--fps", "-1"], OutputError, "frames a second"),
        (["--fps", "nan"], OutputError, "frames a second"),
        (["--fps", "inf"], OutputError, "frames a second"),
        (["--fps", "1e30"], OutputError, "frames a second"),
    ],
)
def test_impossible_option(options, expected, words, tmp_path, good, capfd, monkeypatch):
    argv = _decode(good / "z.latent", good, tmp_path / "out.mp4", *options)
    check(argv, expected, words, capfd, monkeypatch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv", [[], ["dekode"], ["decode"], ["decode", "z.latent"], ["inspect", "--nonsense", "x"]]
)
def test_wrong_usage_is_exit_code_2(argv, capfd):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage: wan-vae" in capfd.readouterr().err


def test_the_real_process_prints_one_line_and_no_traceback(tmp_path):
    """In-process calls cannot see an error that escapes at interpreter exit."""
    path = tmp_path / "v.safetensors"
    path.write_bytes(FILE[: len(FILE) // 2])
    done = subprocess.run(
        [sys.executable, "-m", "wan_vae", "inspect", str(path)],
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"wan-vae: {path}: not a readable safetensors file")


@pytest.mark.parametrize("output", ["o.mp4", "frames", "o.safetensors", "z.latent"])
def test_a_full_disk_is_one_line_and_leaves_nothing(output, tmp_path, good):
    """A limit on file sizes in the process stands in for the disk."""
    pytest.importorskip("resource", reason="limits of a process need POSIX")
    if output.endswith(".latent"):
        argv = _encode(good / "clip.mp4", good, tmp_path / output)
    else:
        argv = _decode(good / "z.latent", good, tmp_path / output)
    code = (
        "import resource, signal, sys\n"
        "from wan_vae.commands.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, *argv], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("wan-vae: ")
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
