"""The small scripts behind docs/performance.md run; their numbers need a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import chunk_profile, encode, host_memory, next_process, small_cards, video
from benchmarks.every_kernel import once, trials
from tests.conftest import random_state
from wan_vae.config import wan21
from wan_vae.io.latents import load_latent
from wan_vae.kernels.device import CARDS
from wan_vae.kernels.registry import kernels_of
from wan_vae.ops.problem import Operation

ROOT = Path(__file__).resolve().parents[2]


SCRIPTS = ("chunk_profile.py", "encode.py", "video.py", "small_cards.py", "host_memory.py")
# Each as its user starts it: `python benchmarks/...py`, from anywhere.
START = """
import runpy, sys
before = list(sys.path)
for script in sys.argv[1:]:
    # As Python sets it, and without what the script before it imported from the repository.
    sys.path[:] = [str(__import__("pathlib").Path(script).parent), *before[1:]]
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]
    sys.argv[:] = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, script
"""


def test_each_script_starts_from_anywhere(tmp_path):
    scripts = [str(ROOT / "benchmarks" / name) for name in SCRIPTS]
    done = subprocess.run(
        [sys.executable, "-c", START, *scripts],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(SCRIPTS)


def test_a_chunk_is_profiled_whole_and_as_a_shard(capsys):
    words = ["--device", "cpu", "--height", "2", "--width", "4", "--frames", "1"]
    assert chunk_profile.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("rank 0 of")]
    assert [lines[i].split(",")[0] for i in heads] == ["rank 0 of 1", "rank 0 of 2"]
    assert all(float(lines[i + 1].split()[0]) > 0 for i in heads)
    assert any("convolution" in line for line in lines)


def test_a_first_decode_is_timed_phase_by_phase(tmp_path):
    config = wan21(dim=8)
    save_file(random_state(config), tmp_path / "vae.safetensors")
    job = {
        "file": str(tmp_path / "vae.safetensors"),
        "device": "cpu",
        "latent": [1, config.z_dim, 2, 4, 4],
        "profile": 3,
        "started_s": time.time(),
    }
    found = next_process.process(job)
    phases = list(found["ms"])
    assert phases[0] == "Python and PyTorch" and phases[-2:] == [
        "rest of the decode",
        "second decode",
    ]
    assert phases[3] == "weights" and "weights" in found["functions"]
    assert all(ms > 0 for ms in found["ms"].values())
    # Of the whole decode the first pass is the first part.
    assert found["ms"]["first pass"] > found["ms"]["rest of the decode"]
    assert [len(lines) for lines in found["functions"].values()] == [3, 3, 3]
    page = next_process.lines_of(["next"], [found])
    assert all(any(line.startswith(f"| {phase} |") for line in page) for phase in phases)
    waited = sum(ms for name, ms in found["ms"].items() if name not in (phases[0], phases[-1]))
    assert f"| {waited:.1f} |" in page[2 + len(phases)]


def test_the_encoder_is_held_against_others_before_it_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    file = tmp_path / "rows.json"
    options = ["--backend", "eager", "--repeats", "1", "--layers", "--output", str(file)]
    assert encode.main(["--device", "cpu", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(file.read_text())
    rows = {(row["decoder"], row["route"]): row for row in found["rows"]}
    for route in ("device", "image"):
        assert rows["wan_vae (eager)", route]["error"] < 1e-5
        assert rows["wan_vae (eager)", route]["median_ms"] > 0
        assert rows["comfyui core", route]["reason"] == "COMFYUI_PATH is not set"
    (layers,) = found["layers"].values()
    assert layers[0][0] == "conv1" and layers[-1][0] == "all"
    assert sum(ms for _, ms in layers[:-1]) == pytest.approx(layers[-1][1])
    assert len({line for line in lines if line.startswith("| wan2.1-narrow")}) == len(rows)


def test_a_video_is_timed_beside_x264_alone(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert video.main(["--device", "cpu", "--repeats", "1", "--output", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = json.loads(file.read_text())["rows"]
    assert row["case"] == "wan2.1-narrow" and row["file_bytes"] > 0
    assert all(row[f"{way}_ms"] > 0 for way in ("x264", "decode", "stream", "image", "save"))
    assert row["waited_for"] in ("encoder", "decoder")
    assert sum(line.startswith("| wan2.1-narrow |") for line in lines) == 1


def test_a_video_of_the_miniature_vae_has_real_pictures(tmp_path, capsys):
    shape = (1, 16, 11, 90, 160)
    latent = video.mini_latent(shape)
    sample = load_latent(ROOT / "examples/latents/cat_416x240_17f.latent")
    assert tuple(latent.shape) == shape and latent.is_contiguous()
    assert torch.equal(latent[:, :, :5, :30, :52], sample)
    assert torch.equal(latent[:, :, 5:10, 30:60, 104:156], sample)
    assert torch.equal(latent[:, :, 10, 60:, 156:], sample[:, :, 0, :, :4])
    file = tmp_path / "rows.json"
    words = ["--device", "cpu", "--repeats", "1", "--mini", "--output", str(file)]
    assert video.main(words) == 0
    said = capsys.readouterr()
    found = json.loads(file.read_text())
    assert found["weights"] == "miniature"
    assert [row["case"] for row in found["rows"]] == ["wan2.1-narrow, miniature VAE"]
    assert "times of decodes are not those of Wan 2.1" in said.out
    lines = said.err.splitlines()
    assert lines[0] == "wan2.1-narrow, miniature VAE"
    ways = [line.partition(":")[0].strip() for line in lines[1:]]
    assert ways == ["x264", "decode", "image", "save", "stream"]
    with pytest.raises(SystemExit):
        video.main(["--device", "cpu", "--mini", "--case", "wan2.2-narrow"])
    assert "does not fit wan2.2-narrow" in capsys.readouterr().err


def test_each_case_of_videos_is_written_before_the_next(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    names = ["wan2.1-narrow", "wan2.2-narrow"]

    def measured(name, *_):
        if name == names[1]:
            raise RuntimeError("planted")
        return video.Times(name, 1.0, 2.0, 3.0, 4.0, 5.0, "encoder", 0.0, 0.0, 7)

    monkeypatch.setattr(video, "measure", measured)
    words = [word for name in names for word in ("--case", name)]
    with pytest.raises(RuntimeError, match="planted"):
        video.main(["--device", "cpu", "--output", str(file), *words])
    found = json.loads(file.read_text())
    assert [row["case"] for row in found["rows"]] == names[:1] and found["weights"] == "random"


def test_an_encoder_that_gives_something_else_gets_no_time():
    case, device = encode.CASES["wan2.1-narrow"], torch.device("cpu")
    other = encode.Encoder(lambda pixels: torch.ones(case.latent), lambda frames: torch.ones(1))
    wrong = encode.Candidate("wrong", lambda *_: None, lambda *_: other)
    rows = list(encode.measure(case, [wrong], device, torch.float32, 1))
    assert [row.kind for row in rows] == ["refused", "refused"]


def test_an_image_and_a_stream_are_measured_side_by_side(tmp_path, capsys):
    words = ("--device", "cpu", "--case", "wan2.1-narrow", "--cap", "0", "--repeats", "1")
    assert small_cards.main([*words, "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| wan2.1-narrow")]
    assert [row[1] for row in rows] == ["IMAGE", "stream"]
    assert all(row[-1] == "equal |" for row in rows)
    (image, stream) = json.loads((tmp_path / "small.json").read_text())["rows"]
    assert image["planned_bytes"] > 0 and stream["restarts"] == 0


def test_what_is_wrong_on_a_small_card_is_named():
    row = small_cards.SmallRow(
        "720p", "stream", 6, "caching", 2, 1, 2, 21, 1, 5, 100, 116, 7, 1, False
    )
    found = row.faults()
    assert len(found) == 3 and "memory ran out 1 times" in found[0] and "took" in found[1]
    assert replace(row, peak_bytes=114, restarts=0, equal=True).faults() == []


def test_host_memory_is_timed(capsys):
    assert host_memory.main(["--megabytes", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "PyTorch's, fresh",
        "NumPy's, fresh",
        "used before",
    ]


@pytest.mark.parametrize("name", ["RTX 3060", "H100", "RTX 2060"])
def test_every_kernel_of_a_card_is_tried(name):
    """In every configuration of every layer; once for each of them, for the sanitizer."""
    card = CARDS[name]
    found = trials(("cuda",), card, torch.float16)
    few = once(found)
    assert 30 < len(few) < len(found) / 4
    tried = {(kernel.operation, kernel.name) for kernel, *_ in few.values()}
    kernels = [k for op in get_args(Operation) for k in kernels_of(op, ("cuda",))]
    fitting = {(k.operation, k.name) for k in kernels if k.requires.unmet_by_device(card) is None}
    assert tried == fitting
    assert {axis for *_, axis in found.values()} == {None, "height", "width"}
