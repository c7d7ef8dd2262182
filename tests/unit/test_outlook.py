"""What `wan-vae doctor` says of a decode on devices that are not here."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wan_vae import WanVAE, hooks
from wan_vae.commands import doctor, outlook, parser
from wan_vae.commands.cli import main
from wan_vae.commands.outlook import PICTURES, PREDICTED_S
from wan_vae.device import pick_device
from wan_vae.errors import BackendError
from wan_vae.kernels.device import CARDS, Device

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    """As wide as the real one, so that the plans are those of a user; never run."""
    return outlook.random_vae(torch.device("cpu"))


def told(vae: WanVAE, monkeypatch, card: str, free: int | None) -> list[str]:
    """The outlook as on `card` with so much free."""
    monkeypatch.setattr(Device, "of", lambda device: CARDS[card])
    monkeypatch.setattr(hooks, "device_free_bytes", lambda device: free)
    monkeypatch.setattr(outlook, "device_name", lambda device: card)
    return outlook.outlook(vae)


@pytest.mark.parametrize("card", ["CPU", "Apple M3", "Intel Arc", "RX 7900 XTX", "MI300X"])
def test_each_device_has_backends_reasons_memory_and_time(vae, monkeypatch, card):
    lines = told(vae, monkeypatch, card, None if card == "CPU" else 24 * GIB)
    text = "\n".join(lines)
    assert "decode: float32, weights 0." in lines[0]
    assert ("nobody says how much is free" in lines[0]) == (card == "CPU")
    assert "eager: norm, norm_silu, conv3d, conv2d, upsample_conv2d, attention" in text
    reasons = [line for line in lines if " not in " in line]
    assert reasons and all(": " in line for line in reasons)
    for name, *_ in PICTURES:
        (line,) = (line for line in lines if line.startswith(f"  {name}: "))
        assert re.search(r"planned peak \d+\.\d\d GiB", line)
    assert text.count("nothing was measured on such a device") == len(PICTURES)


def test_the_reasons_of_an_amd_card_name_both_families(vae, monkeypatch):
    text = "\n".join(told(vae, monkeypatch, "RX 7900 XTX", 24 * GIB))
    assert "conv3d not in triton: " in text and "conv3d not in kitchen: " in text


def test_short_memory_is_strips_and_their_work(vae, monkeypatch):
    roomy = told(vae, monkeypatch, "Apple M3", 64 * GIB)
    short = told(vae, monkeypatch, "Apple M3", 6 * GIB)
    tiny = told(vae, monkeypatch, "Apple M3", GIB // 8)
    assert not any("strips" in line for line in roomy)
    (line,) = (line for line in short if "720p" in line)
    assert re.search(r"\d+ strips, \d+% of the work twice", line)
    assert any("not sure to fit" in line for line in tiny)


def test_a_picture_that_is_refused_is_a_line(vae, monkeypatch):
    def refuse(*arguments, **options):
        raise BackendError("no such thing\nhere")

    monkeypatch.setattr(WanVAE, "plan", refuse)
    assert outlook.outlook(vae) == [f"  {name}: refused: no such thing" for name, *_ in PICTURES]


def test_predicted_seconds_are_those_of_the_page():
    page = (ROOT / "docs" / "cards.md").read_text(encoding="utf-8")
    table = page[page.index("table: predictions") : page.index("end of table")]
    rows = [
        line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| RTX")
    ]
    rows += [line.strip("| ").split(" | ") for line in table.splitlines() if "| L40S" in line]
    found = {}
    for card, hd, sd, _ in rows:
        for picture, cell in (("720p x 81", hd), ("480p x 81", sd)):
            most, least, _ = cell.split(" / ")
            least = most if least == "-" else least
            found[re.sub(r" \(.*", "", card), picture] = (float(least), float(most))
    assert found == dict(PREDICTED_S)
    assert {picture for _, picture in PREDICTED_S} <= {name for name, *_ in PICTURES}


@pytest.mark.parametrize(
    ("card", "family", "strips", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", "cuda", None, "2.2 to 3.3 s predicted, not measured"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "cuda", None, "nothing was measured"),
        ("NVIDIA GeForce RTX 3080 Ti", "cuda", None, "nothing was measured"),
        ("NVIDIA GeForce RTX 4090", "eager", None, "nothing was measured"),
        ("NVIDIA GeForce RTX 4090", "cuda", 3, "nothing was measured"),
    ],
)
def test_a_prediction_is_for_this_card_and_our_kernels(card, family, strips, expected):
    choices = SimpleNamespace(used={"conv3d": family})
    plan = SimpleNamespace(strips=strips, choices=choices)
    assert expected in outlook._time("720p x 81", plan, card)


def test_a_device_that_fails_is_a_line_of_doctor(monkeypatch, capsys):
    def fails(device: torch.device) -> WanVAE:
        raise RuntimeError("MPS backend out of memory\nmore")

    monkeypatch.setattr(doctor, "random_vae", fails)
    monkeypatch.setattr(doctor, "check_device", lambda device: iter(()))
    doctor._report_on(torch.device("cpu"))
    assert "decode: cannot be planned: MPS backend out of memory\n" in capsys.readouterr().out


def test_directml_is_a_device_where_its_package_is(tmp_path, monkeypatch):
    with pytest.raises(BackendError, match="PyTorch sees none of its kind"):
        pick_device("privateuseone:0")
    (tmp_path / "torch_directml.py").write_text("")
    # Not `syspath_prepend`, which trips over importlib where Python's parts are of two releases.
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert pick_device("privateuseone:0") == torch.device("privateuseone", 0)
    assert torch.device("privateuseone", 0) in doctor._devices(None)


@pytest.mark.parametrize("command", [["doctor"], ["bench"]])
def test_bench_share_is_doctor_share_and_needs_no_clone(command, monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr("wan_vae.commands.bench._PACK", tmp_path)
    monkeypatch.setattr("wan_vae.commands.share.run_share", lambda *given: asked.append(given) or 0)
    assert main([*command, "--share", "--device", "cpu", "--vae", "a.safetensors"]) == 0
    assert main([*command, "--share"]) == 0
    assert asked == [("cpu", "a.safetensors"), (None, None)]
    with pytest.raises(SystemExit):
        parser.parse([*command, "--share", "--nonsense"])()
