"""`wan-vae bench`: found in a clone only, and each part behind its word."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import kernel_resources
from benchmarks.suite import command, compare
from benchmarks.suite.parts import OTHER_PARTS
from benchmarks.suite.ranks import command as ranks
from wan_vae.commands.bench import BenchmarksNotFound, find_benchmarks, load_benchmarks
from wan_vae.commands.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]


def clone(folder: Path) -> Path:
    """A folder that looks like a clone."""
    (folder / "benchmarks" / "suite").mkdir(parents=True)
    (folder / "benchmarks" / "suite" / "command.py").touch()
    (folder / "pyproject.toml").touch()
    return folder


def test_benchmarks_are_found_in_a_clone(tmp_path):
    assert find_benchmarks(ROOT) == ROOT / "benchmarks"
    pack = clone(tmp_path / "custom_nodes" / "ComfyUI-WanVAE")
    assert find_benchmarks(pack) == pack / "benchmarks"


@pytest.mark.parametrize("missing", ["pyproject.toml", "benchmarks/suite/command.py"])
def test_elsewhere_one_line_says_that_a_clone_is_needed(tmp_path, missing):
    pack = clone(tmp_path / "site-packages")
    (pack / missing).unlink()
    with pytest.raises(BenchmarksNotFound, match="need a clone of the repository") as raised:
        find_benchmarks(pack)
    assert "\n" not in str(raised.value)


def test_the_command_line_says_it_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("wan_vae.commands.bench._PACK", tmp_path)
    assert cli(["bench"]) == 1
    assert "need a clone of the repository" in capsys.readouterr().err


def test_another_package_of_the_name_that_is_loaded_is_named(monkeypatch):
    other = ModuleType("benchmarks")
    other.__path__, other.__file__ = ["elsewhere/benchmarks"], "elsewhere/benchmarks/__init__.py"
    monkeypatch.setitem(sys.modules, "benchmarks", other)
    with pytest.raises(BenchmarksNotFound, match="elsewhere"):
        load_benchmarks(ROOT / "benchmarks")
    assert sys.modules["benchmarks"] is other


def test_another_package_of_the_name_that_is_found_first_does_no_harm(tmp_path):
    """Also in the fresh processes of the cold start."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    arguments = ["bench", "cold", "--device", "cpu", "--case", "wan2.1-narrow", "--only", "eager"]
    done = subprocess.run(
        [sys.executable, "-m", "wan_vae", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "| wan2.1-narrow | wan_vae (eager) | warm |" in done.stdout


def test_words_choose_the_part(monkeypatch):
    called = []
    monkeypatch.setattr(compare, "main", lambda argv: called.append(("compare", argv)) or 0)
    monkeypatch.setattr(ranks, "main", lambda argv: called.append(("ranks", argv)) or 0)
    monkeypatch.setitem(command._RUN, "host", lambda argv: called.append(("host", argv)) or 0)
    for words in (
        ["--part", "decode", "--repeats", "3"],
        ["decode", "--repeats", "3"],
        [],
        ["--ranks", "1,2"],
        ["--limit-s", "9", "--ranks=1"],
        ["host", "--megabytes", "1"],
    ):
        assert command.main(words) == 0
    assert called == [
        ("compare", ["--part", "decode", "--repeats", "3"]),
        ("compare", ["decode", "--repeats", "3"]),
        ("compare", []),
        ("ranks", ["--ranks", "1,2"]),
        ("ranks", ["--limit-s", "9", "--ranks=1"]),
        ("host", ["--megabytes", "1"]),
    ]


def test_every_part_is_in_the_help_and_runs(capsys):
    assert set(OTHER_PARTS) == set(command._RUN)
    with pytest.raises(SystemExit) as stopped:
        cli(["bench", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"wan-vae bench {part}" in text for part in OTHER_PARTS)
    assert "{decode,layers,cold}" in text
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{part}`" in readme for part in (*compare.PARTS, *OTHER_PARTS))


@pytest.mark.parametrize("part", ["ranks", "encode", "scaling", "predictions", "profile", "host"])
def test_each_part_has_a_help_of_its_own(part, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli(["bench", part, "--help"])
    assert stopped.value.code == 0
    assert f"usage: wan-vae bench {part}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "package"), [("kernels", "triton"), ("nodes", "websocket-client")]
)
def test_a_package_that_is_missing_is_one_line(part, package, monkeypatch, capsys):
    found = importlib.util.find_spec
    missing = {"triton", "websocket"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else found(name)
    )
    assert cli(["bench", part, "--help"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("wan-vae: bench: ") and package in told and told.count("\n") == 1


def test_a_compiler_that_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(kernel_resources, "compiler_missing", lambda: "no NVRTC here")
    monkeypatch.setattr("sys.argv", ["kernel_resources.py"])
    with pytest.raises(SystemExit) as stopped:
        kernel_resources.main()
    assert stopped.value.code == 2
    said = "wan-vae bench resources: error: no NVRTC here; --kernels triton does without\n"
    assert capsys.readouterr().err.endswith(said)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here")
@pytest.mark.parametrize(
    ("part", "option"),
    [("kernels", "--tiny"), pytest.param("resources", "--json", marks=pytest.mark.full)],
)
def test_scripts_about_triton_run_in_a_process_of_their_own(part, option, capfd):
    assert command.main([part, "--help"]) == 0
    text = capfd.readouterr().out
    assert option in text and f"usage: wan-vae bench {part}" in text


def test_a_part_by_its_word_is_the_part_by_its_option(tmp_path, capsys):
    texts = []
    for i, words in enumerate((["decode"], ["--part", "decode"])):
        output = tmp_path / str(i)
        arguments = ["--case", "wan2.1-narrow", "--only", "eager", "--device", "cpu"]
        assert cli(["bench", *words, *arguments, "--repeats", "1", "--output", str(output)]) == 0
        texts.append((output / "results.md").read_text(encoding="utf-8"))
    assert "`wan-vae bench decode --case" in texts[0]
    assert "`wan-vae bench --part decode --case" in texts[1]
    for text in texts:
        assert "## Decode" in text and "## Layers" not in text and "## Cold start" not in text
