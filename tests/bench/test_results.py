"""What is written down: the numbers that were measured, or why there are none."""

from __future__ import annotations

import importlib.util
import json

import pytest

from benchmarks.suite import compare, write_up
from benchmarks.suite.cold_start import ColdStart
from benchmarks.suite.comparison import SCHEMA, Comparison
from benchmarks.suite.facts import Facts
from benchmarks.suite.measure import NoNumber, Result
from benchmarks.suite.plot import draw
from benchmarks.suite.recorder import LayerShape, LayerTime
from benchmarks.suite.roofline import Ceilings, Roofline
from tests.bench.conftest import Altered

CASE = "wan2.1-720p-81"


def result(decoder, route, ms, peak_bytes=2**30):
    return Result(CASE, decoder, route, "bfloat16", ms, ms - 1, ms + 1, 3, peak_bytes, 1.5e-2)


def layer_time(ms, share_calls=1):
    layer = LayerShape("conv3d", 96, 96, (3, 3, 3), 4, 720, 1280)
    return LayerTime("decoder.x", layer, share_calls, 10**12, 10**9, ms, ms)


@pytest.fixture
def results() -> Comparison:
    made = Comparison(Facts(SCHEMA, "wan-vae bench", "Some GPU", "2026-01-01", {"torch": "2"}))
    made.rows = [
        result("wan_vae (triton)", "device", 100.0),
        result("wan_vae (triton)", "image", 110.0),
        result("diffusers", "device", 250.0),
        NoNumber(CASE, "diffusers", "image", "refused", "wrong"),
        NoNumber(CASE, "fastvae", "device", "unavailable", "not | installed"),
        NoNumber(CASE, "fastvae", "image", "unavailable", "not | installed"),
    ]
    made.cold = [ColdStart(CASE, "wan_vae (triton)", "fresh", 1000.0, 200.0, 3000.0, 100.0)]
    made.ceilings = Ceilings(1e15, 1e12)
    layers = (layer_time(4.0), layer_time(0.001))
    made.rooflines = [Roofline(CASE, "triton", "bfloat16", 10.0, layers)]
    return made


def line_of(text, *words):
    (line,) = (x for x in text.splitlines() if all(word in x for word in words))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_times_ratios_and_reasons(results):
    text = write_up.comparison_markdown(results)
    assert line_of(text, "| wan_vae (triton) | bfloat16")[3:8] == [
        "100.0 (99.0 to 101.0)",
        "1.00",
        "1.50e-02",
        "110.0 (109.0 to 111.0)",
        "1.10",
    ]
    assert line_of(text, "| diffusers | bfloat16")[6:] == ["refused", "", "wrong"]
    unavailable = line_of(text, "| fastvae |", "unavailable")
    assert unavailable[3:] == ["unavailable", "", "", "unavailable", "", "not / installed"]
    assert line_of(text, "wan_vae (triton) | on the device")[3:] == ["2.50", ""]
    assert results.times_faster(CASE, "wan_vae (triton)", "diffusers", "image") is None
    assert line_of(text, "| fresh |")[3:7] == ["1000", "200", "3000", "100"]


def test_layers_beside_the_ceilings(results):
    text = write_up.comparison_markdown(results)
    # 1e12 flops in 4 ms are 250 TFLOP/s of 1000; 1e9 bytes in 4 ms are 0.25 TB/s of 1.
    assert line_of(text, "decoder.x")[6:] == ["4.000", "1.000", "250", "25%", "25%", "40.0%"]
    # The layer below one percent is counted with what lies outside every clock.
    assert line_of(text, "everything else")[-1] == "60.0%"
    assert "floor of all listed operations 2.0 ms" in text


def test_only_failures_of_ours_count(results):
    assert not results.our_failures and not results.wrong(CASE, "wan_vae (triton)")
    assert results.wrong(CASE, "diffusers") and not results.wrong(CASE, "fastvae")
    results.rows.append(NoNumber(CASE, "wan_vae (eager)", "device", "unavailable", "no GPU"))
    assert not results.our_failures
    results.rows.append(NoNumber(CASE, "wan_vae (auto)", "device", "refused", "wrong"))
    assert [row.decoder for row in results.our_failures] == ["wan_vae (auto)"]


def test_json_keeps_every_row(results, tmp_path):
    write_up.write(results, tmp_path)
    data = json.loads((tmp_path / "results.json").read_text())
    assert [row["kind"] for row in data["rows"]] == [
        "result",
        "result",
        "result",
        "refused",
        "unavailable",
        "unavailable",
    ]
    assert len(data["rooflines"][0]["layers"]) == 2
    assert data["ceilings"]["copy_bytes_per_s"] == 1e12
    assert data["schema"] == SCHEMA and data["date"] == "2026-01-01"
    assert data["rows"][0]["decoder"] == "wan_vae (triton)"


def test_plots(results, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib (test and bench extras) is absent")
    files = draw(results, tmp_path)
    assert [f.name for f in files] == ["time.png", f"roofline-{CASE}-triton.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)
    results.rows = [r for r in results.rows if isinstance(r, NoNumber)]
    results.rooflines = []
    assert draw(results, tmp_path) == []


def run(*arguments):
    return compare.main(["--device", "cpu", "--repeats", "1", *arguments])


def test_runs_without_a_gpu_and_writes_results(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    arguments = ["--case", "wan2.1-narrow", "--part", "decode", "--part", "layers"]
    assert run(*arguments, "--output", str(tmp_path)) == 0
    text = (tmp_path / "results.md").read_text()
    assert text in capsys.readouterr().out
    assert str(tmp_path) not in text
    assert line_of(text, "wan2.1-narrow", "wan_vae (eager)", "float32")[3][0].isdigit()
    assert line_of(text, "comfyui core", "unavailable")[-1] == "COMFYUI_PATH is not set"
    assert "### wan2.1-narrow, eager, float32" in text
    pictures = {p.name for p in tmp_path.glob("*.png")}
    if importlib.util.find_spec("matplotlib") is None:
        assert not pictures and "no plots: matplotlib" in text
    else:
        assert pictures == {
            "time.png",
            "roofline-wan2.1-narrow-eager.png",
            "roofline-wan2.1-narrow-auto.png",
        }


def test_a_wrong_picture_of_ours_fails_the_command_and_gets_no_other_number(monkeypatch, capsys):
    wrong = Altered("wan_vae (eager)", lambda x: x.flip(3))
    monkeypatch.setattr(compare, "decoders", lambda backends: [wrong])
    assert run("--case", "wan2.1-narrow", "--part", "decode", "--part", "cold") == 1
    text = capsys.readouterr().out
    assert "refused" in text and "Cold start" not in text


def test_a_row_of_this_pack_for_each_backend(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends = ["--backend", "auto", "--backend", "eager"]
    assert run("--case", "wan2.1-narrow", "--part", "decode", "--only", "wan_vae", *backends) == 0
    text = capsys.readouterr().out
    assert "wan_vae (auto)" in text and "wan_vae (eager)" in text and "diffusers |" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["wan2.1-narrow", "wan2.2-narrow"])
def test_on_a_gpu_memory_is_counted_and_layers_are_timed(case, tmp_path):
    arguments = ["--case", case, "--part", "decode", "--part", "layers", "--backend", "eager"]
    assert compare.main([*arguments, "--only", "wan_vae", "--output", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "results.json").read_text())
    assert [row["kind"] for row in data["rows"]] == ["result", "result"]
    assert all(row["peak_bytes"] > 0 and row["dtype"] == "bfloat16" for row in data["rows"])
    (roofline,) = data["rooflines"]
    total_ms = sum(layer["total_ms"] for layer in roofline["layers"])
    assert 0 < total_ms < roofline["decode_ms"]


@pytest.mark.parametrize(
    "arguments",
    [["--only", "nobody"], ["--case", "nothing"], ["--repeats", "0"], ["--backend", "tensorrt"]],
    ids=" ".join,
)
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
