"""Checkpoints that are cut, damaged, hostile, of another model, or of other tensors."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tests.unit.malformed.cases import FILE, STATE, check, keys, nan_like, safetensors_bytes
from wan_vae.errors import CheckpointError, NotAWanVAEError
from wan_vae.io.checkpoint import load_checkpoint

WEIGHT = "decoder.middle.0.residual.2.weight"


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


class Hostile:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


Z = torch.ones(2, 2)
HEADER_BYTES = struct.unpack("<Q", FILE[:8])[0]
ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
MID = WEIGHT.replace(".", "__")

# name -> (file name, bytes, error, words of the message)
CHECKPOINTS: dict[str, tuple[str, bytes | Callable[[], bytes], type, str]] = {
    "empty file": ("v.safetensors", b"", CheckpointError, "empty"),
    "four bytes": ("v.safetensors", FILE[:4], CheckpointError, "cut short"),
    "length only": ("v.safetensors", FILE[:8], CheckpointError, "cut short"),
    "cut in the header": ("v.safetensors", FILE[:100], CheckpointError, "inside its header"),
    "cut after the header": (
        "v.safetensors", FILE[: 8 + HEADER_BYTES], CheckpointError, "cut short"),
    "cut in the middle": ("v.safetensors", FILE[: len(FILE) // 2], CheckpointError, "cut short"),
    "last byte missing": (
        "v.safetensors", FILE[:-1], CheckpointError,
        f"cut short: {len(FILE) - 1} of {len(FILE)}"),
    "bytes too many": ("v.safetensors", FILE + b"more", CheckpointError, "4 bytes longer"),
    "header of 2^63 bytes": (
        "v.safetensors", safetensors_bytes({}, claimed=2**63), CheckpointError, "begin with"),
    "header of a terabyte": (
        "v.safetensors", safetensors_bytes({}, claimed=2**40), CheckpointError, "begin with"),
    "header of no bytes": (
        "v.safetensors", safetensors_bytes(b""), CheckpointError, "cut short"),
    "header is no JSON": (
        "v.safetensors", safetensors_bytes(b"{]" * 20), CheckpointError, "readable"),
    "header is a list": (
        "v.safetensors", safetensors_bytes(b"[1, 2]"), CheckpointError, "no safetensors"),
    "header is not UTF-8": (
        "v.safetensors", safetensors_bytes(b'{"\xff\xfe": 1}'), CheckpointError, "readable"),
    "header nested deeply": (
        "v.safetensors", safetensors_bytes(b'{"a":' * 50_000), CheckpointError, "readable"),
    "tensor larger than the file": (
        "v.safetensors",
        safetensors_bytes({"a": {**ENTRY, "shape": [2**40], "data_offsets": [0, 2**42]}}),
        CheckpointError, "cut short"),
    "size that overflows": (
        "v.safetensors",
        safetensors_bytes({"a": {**ENTRY, "shape": [2**62, 2**62]}}, bytes(16)),
        CheckpointError, "readable"),
    "negative size": (
        "v.safetensors", safetensors_bytes({"a": {**ENTRY, "shape": [-2, -2]}}, bytes(16)),
        CheckpointError, "readable"),
    "offsets backwards": (
        "v.safetensors", safetensors_bytes({"a": {**ENTRY, "data_offsets": [16, 0]}}, bytes(16)),
        CheckpointError, "longer than its header"),
    "overlapping tensors": (
        "v.safetensors", safetensors_bytes({"a": ENTRY, "b": ENTRY}, bytes(16)),
        CheckpointError, "readable"),
    "unknown dtype": (
        "v.safetensors", safetensors_bytes({"a": {**ENTRY, "dtype": "Q3"}}, bytes(16)),
        CheckpointError, "readable"),
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
        CheckpointError, "decoder.head.2.weight is (16"),
    "a head of five channels": (
        "v.safetensors",
        lambda: changed(decoder__head__2__weight=torch.ones(5, 8, 3, 3, 3)),
        NotAWanVAEError, "5 outputs, expected one of 1, 3, 4, 12, 16"),
    "an encoder of two channels": (
        "v.safetensors",
        lambda: changed(encoder__conv1__weight=torch.ones(8, 2, 3, 3, 3)),
        NotAWanVAEError, "2 inputs, expected 3 or 4"),
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
        CheckpointError, "wrong shape"),
    "integer weights": (
        "v.safetensors", lambda: changed(**{MID: STATE[WEIGHT].to(torch.int8)}), CheckpointError,
        "int8"),
    "scaled float8 weights": (
        "v.safetensors",
        lambda: changed(**{
            MID: STATE[WEIGHT].to(torch.float8_e4m3fn),
            WEIGHT.removesuffix("weight").replace(".", "__") + "scale_weight": torch.ones(1),
        }),
        CheckpointError, "scaled float8"),
    "NaN in float8 weights": (
        "v.safetensors",
        lambda: changed(**{MID: nan_like(STATE[WEIGHT]).to(torch.float8_e4m3fn)}),
        CheckpointError, f"NaN or inf in {WEIGHT}"),
    "float64 beyond float32": (
        "v.safetensors", lambda: changed(**{MID: STATE[WEIGHT].double() * 1e300}),
        CheckpointError, f"NaN or inf in {WEIGHT}"),
    "NaN in a weight": (
        "v.safetensors", lambda: changed(**{MID: nan_like(STATE[WEIGHT])}), CheckpointError,
        f"NaN or inf in {WEIGHT}"),
    "inf in a bias": (
        "v.safetensors",
        lambda: changed(decoder__conv1__bias=nan_like(STATE["decoder.conv1.bias"], float("inf"))),
        CheckpointError, "NaN or inf"),
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
        NotAWanVAEError, "half a Wan VAE: its encoder"),
    "scales as ComfyUI writes them now": (
        "v.safetensors",
        lambda: changed(**{
            WEIGHT.removesuffix("weight").replace(".", "__") + "comfy_quant": torch.ones(
                9, dtype=torch.uint8)
        }),
        CheckpointError, "scaled float8"),
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
    "pth with a nested tensor": (
        "v.pth", lambda: torch_bytes({**STATE, WEIGHT: torch.nested.nested_tensor([Z, Z])}),
        CheckpointError, f"{WEIGHT} is nested"),
    "pth with a deciding nested tensor": (
        "v.pth",
        lambda: torch_bytes({
            **STATE, "decoder.head.2.weight": torch.nested.nested_tensor([Z, Z])
        }),
        CheckpointError, "is nested"),
    "pth with quantized tensors": (
        "v.pth",
        lambda: torch_bytes({
            **STATE, WEIGHT: torch.quantize_per_tensor(STATE[WEIGHT], 0.1, 0, torch.qint8)
        }),
        CheckpointError, "qint8"),
    "pth with settings of a trainer": (
        "v.pth", lambda: torch_bytes({"model": STATE, "args": Namespace(a=1)}),
        CheckpointError, "could run code (it holds argparse.Namespace)"),
    "pth with a module": (
        "v.pth", lambda: torch_bytes(torch.nn.Linear(2, 2)), CheckpointError,
        "it holds torch.nn.modules.linear.Linear"),
    "a state dict in a list": (
        "v.pth", lambda: torch_bytes([STATE]), CheckpointError, "contains a list"),
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
        (b'\xef\xbb\xbf{"_class_name": "AutoencoderKLWan"}', CheckpointError, "a folder without"),
    ],
)
def test_malformed_folder(config, expected, words, tmp_path, capfd, monkeypatch):
    if config is not None:
        (tmp_path / "config.json").write_bytes(config)
    check(["inspect", str(tmp_path)], expected, words, capfd, monkeypatch)


def test_a_folder_names_what_it_holds(tmp_path, capfd, monkeypatch):
    for name in ("b.safetensors", "a.pth", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    words = "with a.pth, b.safetensors: pass a checkpoint file"
    check(["inspect", str(tmp_path)], CheckpointError, words, capfd, monkeypatch)


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
        load_checkpoint(path)


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
        found = load_checkpoint(path)
    except CheckpointError:
        return
    assert found.state.keys() == STATE.keys()
    assert all(found.state[k].shape == STATE[k].shape for k in STATE)
