"""The benchmark's gate: a wrong picture gets no number."""

from __future__ import annotations

import pytest
import torch

from wan_vae.bench import compare

pytest.importorskip("diffusers", reason="the peer (test extra) is absent")


def test_runs_without_a_gpu_and_writes_results(tmp_path, capsys, monkeypatch):
    small = {**compare._DIFFUSERS_OPTIONS, "wan2.1": dict(base_dim=8, z_dim=16)}
    monkeypatch.setattr(compare, "_DIFFUSERS_OPTIONS", small)
    arguments = ["--case", "wan2.1-tiny", "--device", "cpu", "--repeats", "1"]
    assert compare.main([*arguments, "--output", str(tmp_path)]) == 0
    text = (tmp_path / "results.md").read_text()
    assert "| wan2.1-tiny | wan_vae |" in text and "| wan2.1-tiny | diffusers |" in text
    assert text in capsys.readouterr().out
    assert (tmp_path / "results.json").exists()


def test_a_wrong_decoder_is_refused():
    case = compare.CASES["wan2.1-tiny"]
    reference = torch.randn(1, 3, 9, 64, 64)

    def garbled(z):
        return reference.flip(3)

    row = compare._measure_one(
        case, "garbled", "float32", garbled, torch.zeros(1), reference, torch.device("cpu"), 1
    )
    assert isinstance(row, compare.Refused) and "gate" in row.reason


def test_nan_is_refused_too():
    reference = torch.randn(1, 3, 2, 8, 8)
    nan = reference * float("nan")
    assert not compare.relative_error(nan, reference) < compare.GATE
    assert compare.relative_error(reference[:, :, :1], reference) == float("inf")
