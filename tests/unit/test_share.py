"""`wan-vae doctor --share`: a block for an issue, complete and without anything private."""

from __future__ import annotations

import getpass
import platform
from dataclasses import replace
from pathlib import Path, PureWindowsPath

import pytest
import torch

from tests.conftest import SMALL_CONFIGS
from wan_vae.commands import outlook, share
from wan_vae.commands.cli import main
from wan_vae.commands.kernel_rows import KernelRow
from wan_vae.ops.opset import LayerChoice

MINI = Path(__file__).parents[2] / "examples/wan_vae_mini.safetensors"
TIMED = LayerChoice("cuda", "mma", "winograd_halfsums", 1.25, 3.5)


def test_the_block_says_what_ran_where_and_how_fast(capsys):
    assert main(["doctor", "--share", "--device", "cpu", "--vae", str(MINI)]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].startswith("### wan-vae ") and lines[0].endswith(" on CPU")
    for start in ("| card | CPU |", "| driver | none |", "| versions | torch "):
        assert any(line.startswith(start) for line in lines), start
    assert any(line.startswith("| decode of 64 x 64 x 5 | ") for line in lines)
    assert any("weights from a file, float32" in line for line in lines)
    assert any(line.startswith("| 1 | head ") and "| eager |" in line for line in lines)
    private = (str(Path.home()), str(MINI.parent), getpass.getuser() + "/", platform.node())
    assert [word for word in private if word and word in text] == []


def test_without_a_file_the_weights_are_random(monkeypatch):
    monkeypatch.setattr(outlook, "wan21", lambda: SMALL_CONFIGS["wan2.1"])
    assert "wan2.1, random weights, float32" in share.share_text(torch.device("cpu"), None)


def test_layers_in_kernels_have_their_times(monkeypatch):
    monkeypatch.setattr(outlook, "wan21", lambda: SMALL_CONFIGS["wan2.1"])
    rows = (KernelRow("head 96x3", 1, TIMED), KernelRow("conv3d", 2, replace(TIMED, ms=None)))
    monkeypatch.setattr(share, "_rows", lambda vae, shape: rows)
    lines = share.share_text(torch.device("cpu"), None).splitlines()
    assert "| 1 | head 96x3 | cuda mma winograd_halfsums | 1.250 | 3.500 | 2.8x |" in lines
    assert "| 2 | conv3d | cuda mma winograd_halfsums |  | 3.500 |  |" in lines
    assert any(line.startswith("- _halfsums: ") for line in lines)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("cannot open /opt/some-one/x.so: no", "cannot open x.so: no"),
        ("File '/usr/lib/libcuda.so.1' is old", "File 'libcuda.so.1' is old"),
        (r"C:\Users\jane\AppData\wan_vae\proof-1.json is damaged", "proof-1.json is damaged"),
        ("1.5 TFLOP/s, bf16/fp16, and/or", "1.5 TFLOP/s, bf16/fp16, and/or"),
    ],
)
def test_folders_are_left_out(text, left):
    assert share.without_folders(text) == left


def test_the_home_folder_is_left_out_whatever_its_name(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/Jane Doe"))
    assert share.without_folders("in /home/Jane Doe/cache/a.json") == "in a.json"
    assert share.without_folders(f"in {Path('/home/Jane Doe/cache/a.json')}") == "in a.json"
    monkeypatch.setattr(Path, "home", lambda: PureWindowsPath(r"C:\Users\Jane Doe"))
    for stroke in ("\\", "/"):
        said = "in " + stroke.join(("C:", "Users", "Jane Doe", "cache", "a.json"))
        assert share.without_folders(said) == "in a.json"
