"""Outputs that cannot be written and options that make no sense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.malformed.cases import FILE, HANG_S, check, decode_argv, encode_argv
from wan_vae.commands.cli import main
from wan_vae.errors import BackendError, GeometryError, OutputError
from wan_vae.io.latents import save_latent


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
    argv = decode_argv(good / "z.latent", good, tmp_path / output)
    check(argv, OutputError, words, capfd, monkeypatch)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


def test_an_output_of_a_batch_that_exists(tmp_path, good, capfd, monkeypatch):
    save_latent(tmp_path / "z.latent", torch.zeros(2, 16, 2, 4, 4))
    (tmp_path / "out_001.mp4").write_bytes(b"mine")
    argv = decode_argv(tmp_path / "z.latent", good, tmp_path / "out.mp4")
    check(argv, OutputError, "out_001.mp4: exists", capfd, monkeypatch)
    assert (tmp_path / "out_001.mp4").read_bytes() == b"mine"
    assert not (tmp_path / "out_000.mp4").exists()


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
    argv = decode_argv(good / "z.latent", good, tmp_path / "out.mp4", *options)
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
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"wan-vae: {path}: a safetensors file cut short")


# Runs each command of the list in its argument; prints their exit codes and what they told.
_ON_A_FULL_DISK = """
import contextlib, io, json, resource, signal, sys
from wan_vae.commands.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
found = []
for argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as told:
        code = main(argv)
    found.append((code, told.getvalue()))
print(json.dumps(found))
"""
OUTPUTS = ("o.mp4", "frames", "o.safetensors", "z.latent")


@pytest.fixture(scope="module")
def on_a_full_disk(good, tmp_path_factory) -> dict[str, tuple[int, str, Path]]:
    """Output -> exit code, what was told, and the folder it was to go to; all in one process."""
    pytest.importorskip("resource", reason="limits of a process need POSIX")
    folders = {output: tmp_path_factory.mktemp("full") for output in OUTPUTS}
    commands = [
        encode_argv(good / "clip.mp4", good, folder / output)
        if output.endswith(".latent")
        else decode_argv(good / "z.latent", good, folder / output)
        for output, folder in folders.items()
    ]
    done = subprocess.run(
        [sys.executable, "-B", "-c", _ON_A_FULL_DISK, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: (*one, folders[name]) for name, one in zip(OUTPUTS, found, strict=True)}


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_full_disk_is_one_line_and_leaves_nothing(output, on_a_full_disk):
    """A limit on file sizes in the process stands in for the disk."""
    code, told, folder = on_a_full_disk[output]
    assert code == 1, told
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith("wan-vae: ")
    assert "cannot be written" in told.splitlines()[-1]
    assert not list(folder.iterdir())
