"""The command in the surroundings it meets: signals, closed and full streams, names and options."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import wan_vae
from tests.conftest import random_state
from wan_vae import WanVAE
from wan_vae.commands import cli, console, parser, torchrun
from wan_vae.commands import decode as decode_command
from wan_vae.commands.requests import DecodeRequest
from wan_vae.commands.torchrun import RankInfo
from wan_vae.config import wan21
from wan_vae.errors import GeometryError, OutputError, ShardingError
from wan_vae.io import video_read, video_write
from wan_vae.io.latents import load_latent, save_latent
from wan_vae.io.sink import NullSink
from wan_vae.options import RunOptions

ROOT = Path(__file__).parents[2]
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and devices of POSIX")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """v.safetensors and z.latent (5 frames of 16x16)."""
    folder = tmp_path_factory.mktemp("good")
    save_file(random_state(wan21(dim=8)), str(folder / "v.safetensors"))
    save_latent(folder / "z.latent", torch.zeros(1, 16, 2, 2, 2))
    return folder


def decode(good: Path, output: Path | str, *options: str, latents=("z.latent",)) -> int:
    names = [str(good / name) for name in latents]
    vae = ["--vae", str(good / "v.safetensors"), "--device", "cpu"]
    return cli.main(["decode", *names, *vae, "-o", str(output), *options])


# -- how a command ends ---------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
@pytest.mark.parametrize("output", ["o.mp4", "new/frames"])
def test_a_signal_leaves_nothing_behind(name, code, output, good, tmp_path, monkeypatch, capsys):
    number = getattr(signal, name)

    class Killed(console.ProgressBar):
        def __call__(self, done, total, report):
            assert len(list(tmp_path.rglob("*partial*"))) == 1, "or there is nothing to remove"
            os.kill(os.getpid(), number)

    monkeypatch.setattr(decode_command, "ProgressBar", Killed)
    # Tests may run under nohup, whose ignored hang-up is the next test's.
    found = signal.signal(number, signal.default_int_handler if code == 130 else signal.SIG_DFL)
    before = signal.getsignal(number)
    try:
        assert decode(good, tmp_path / output, "--chunk-frames", "1") == code
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, found)
    assert not list(tmp_path.iterdir())
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == ("wan-vae: interrupted" if code == 130 else f"wan-vae: ended by {name}")


@POSIX
def test_a_hangup_that_nohup_ignores_stays_ignored(good, tmp_path, monkeypatch):
    class HungUp(console.ProgressBar):
        def __call__(self, done, total, report):
            os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(decode_command, "ProgressBar", HungUp)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert decode(good, tmp_path / "o.mp4") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_command_runs_in_a_thread_too(good, tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(decode(good, tmp_path / "o.mp4")))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_missing_torch_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "wan_vae", "doctor"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("wan-vae: PyTorch is missing: install torch")


@POSIX
@pytest.mark.parametrize(
    "command",
    [["-m", "wan_vae"], ["-c", "import sys; from wan_vae.__main__ import main; sys.exit(main())"]],
)
def test_ctrl_c_while_torch_is_imported_is_one_line(command, tmp_path):
    """A torch that takes its time: the real one does too."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(30)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    # A test run in the background may ignore SIGINT; only what is ignored is inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, *command, "decode", "z", "--vae", "v", "-o", "o.mp4"],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            cwd=tmp_path,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert (process.returncode, stderr) == (130, "wan-vae: interrupted\n")


def test_importing_the_package_does_not_import_torch():
    code = (
        "import sys, wan_vae; assert 'torch' not in sys.modules; "
        "assert set(wan_vae.__all__) <= set(dir(wan_vae)); "
        "assert not hasattr(wan_vae, 'nonsense'); "
        "print([getattr(wan_vae, n).__module__ for n in ('load', 'load_latent', 'WanVAEError')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "['wan_vae.pipeline', 'wan_vae.io.latents', 'wan_vae']\n", done.stderr


@pytest.mark.parametrize("name", wan_vae.__all__)
def test_every_public_name_is_there(name):
    assert getattr(wan_vae, name) is not None


# -- streams that are closed, full, or cannot spell -----------------------------------------------


class Full:
    """A stream on a full disk."""

    errors = "strict"

    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        raise OSError(28, "No space left on device")

    def isatty(self):
        return False

    def reconfigure(self, **options):
        pass


class Gone(Full):
    """A pipe whose reader has left."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("stderr", [None, Full(), Gone()], ids=["closed", "full", "gone"])
def test_progress_that_nobody_can_see_does_not_end_a_decode(stderr, good, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        assert decode(good, tmp_path / "o.mp4") == 0
        assert decode(good, tmp_path / "o.gif") == 1, "nor does an error that nobody can read"
    assert video_read.read_pixels(tmp_path / "o.mp4").shape == (1, 3, 5, 16, 16)


@pytest.mark.parametrize(("stdout", "said"), [(Full(), "No space left"), (Gone(), "")])
def test_a_report_that_cannot_be_written_is_at_most_one_line(
    stdout, said, good, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert cli.main(["inspect", str(good / "v.safetensors")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (1 if said else 0)
    assert said in "".join(lines)


@POSIX
def test_a_full_disk_behind_stdout_in_a_real_process():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from wan_vae.commands import cli, parser; "
                "parser._doctor = lambda *_: print('x') or 0; sys.exit(cli.main(['doctor']))",
            ],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
    assert done.returncode == 1
    assert done.stderr == "wan-vae: standard output: No space left on device\n"


def test_a_name_that_the_terminal_cannot_spell_is_printed_all_the_same():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from wan_vae.commands import cli, parser; "
            "parser._doctor = lambda *_: print('\\u00e9\\udcff') or 0; "
            "sys.exit(cli.main(['doctor']))",
        ],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stdout.splitlines()) == (0, [b"\\xe9\\udcff"]), done.stderr


def test_a_refused_argument_draws_no_bar(good, tmp_path, capsys):
    assert decode(good, tmp_path / "o.mp4", "--backend", "triton") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "backend 'triton' cannot run" in lines[0]
    assert not list(tmp_path.iterdir())


def test_encode_takes_a_backend(good, tmp_path, capsys):
    video_write.save_png(np.full((16, 16, 3), 128, np.uint8), tmp_path / "p.png")
    argv = [
        "encode",
        str(tmp_path / "p.png"),
        "--vae",
        str(good / "v.safetensors"),
        "--device",
        "cpu",
        "-o",
        str(tmp_path / "z.latent"),
        "--backend",
    ]
    assert cli.main([*argv, "cuda"]) == 1
    said = capsys.readouterr().err
    assert "backend 'cuda' cannot run: no GPU" in said
    assert not (tmp_path / "z.latent").exists()
    assert cli.main([*argv, "eager"]) == 0


# -- outputs of the command -----------------------------------------------------------------------


@pytest.mark.parametrize("output", ["new/frames", "new/o.mp4", "new/o.safetensors"])
@pytest.mark.parametrize("option", [("--chunk-frames", "0"), ("--strips", "99")])
def test_a_refused_argument_leaves_no_file_and_no_folder(output, option, good, tmp_path):
    assert decode(good, tmp_path / output, *option) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [GeometryError, KeyboardInterrupt, RuntimeError])
def test_a_decode_that_aborts_nothing_itself_leaves_nothing(error, good, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise error("refused")

    monkeypatch.setattr(WanVAE, "decode", refuse)
    try:
        assert decode(good, tmp_path / "new" / "frames") in (1, 130)
    except RuntimeError as mistake:
        assert str(mistake) == "refused", "a bug: a traceback, but no files"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["o.gif", ".mp4", "out.", ".", "x" * 300 + ".mp4"])
def test_an_impossible_output_is_refused_before_the_vae_is_loaded(
    output, good, monkeypatch, capsys
):
    monkeypatch.setattr(decode_command, "load_vae", None)  # calling it would be a TypeError
    assert decode(good, output) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("latents", [("z.latent",), ("z.latent", "y.latent")])
def test_an_output_that_exists_is_overwritten_only_when_told(latents, good, tmp_path, capsys):
    save_latent(good / "y.latent", torch.zeros(1, 16, 1, 2, 2))
    output = tmp_path / ("o.mp4" if len(latents) == 1 else "out")
    there = output if len(latents) == 1 else output / "z.mp4"
    there.parent.mkdir(exist_ok=True)
    there.write_text("mine")
    assert decode(good, output, latents=latents) == 1
    assert f"{there}: exists: use another name" in capsys.readouterr().err
    assert there.read_text() == "mine"
    assert [p.name for p in there.parent.iterdir()] == [there.name], "nothing was begun"
    assert decode(good, output, "--force", latents=latents) == 0
    assert video_read.read_pixels(there).shape[2] == 5


def test_encode_keeps_the_latent_that_is_there(good, tmp_path, capsys):
    video_write.save_png(np.full((16, 16, 3), 128, np.uint8), tmp_path / "p.png")
    argv = [
        "encode",
        str(tmp_path / "p.png"),
        "--vae",
        str(good / "v.safetensors"),
        "--device",
        "cpu",
        "-o",
        str(tmp_path / "my.LATENT"),
    ]
    (tmp_path / "my.LATENT").write_text("hours of sampling")
    assert cli.main(argv) == 1
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "my.LATENT").read_text() == "hours of sampling"
    assert cli.main([*argv, "--force"]) == 0
    assert load_latent(tmp_path / "my.LATENT").shape == (1, 16, 1, 2, 2)
    out = capsys.readouterr().out
    assert "pixels    [1, 3, 1, 16, 16]" in out and "-> latent [1, 16, 1, 2, 2]" in out
    assert "1 chunk, 1 strip" in out and "chunks" not in out


@pytest.mark.parametrize("kind", ["name of 5000 characters", "pipe", "device"])
@pytest.mark.parametrize("role", ["vae", "latent", "video"])
def test_an_input_that_is_no_file_is_one_line(kind, role, good, tmp_path, capsys):
    if kind == "pipe":
        path = tmp_path / "pipe.mp4"
        if not hasattr(os, "mkfifo"):
            pytest.skip("no named pipes here")
        os.mkfifo(path)
    else:
        path = Path("x" * 5000 if kind.startswith("name") else os.devnull)
    vae = ["--vae", str(path if role == "vae" else good / "v.safetensors")]
    latent = path if role == "latent" else good / "z.latent"
    if role == "video":
        argv = ["encode", str(path), *vae, "-o", str(tmp_path / "o.latent")]
    else:
        argv = ["decode", str(latent), *vae, "-o", str(tmp_path / "o.mp4"), "--device", "cpu"]
    assert cli.main(argv) == 1
    said = capsys.readouterr().err.splitlines()
    # On Windows the system says something else, and the message has our own words beside it.
    long = "the path has" if sys.platform == "win32" else "too long"
    words = long if kind.startswith("name") else "a pipe or a device"
    assert len(said) == 1 and words in said[0]
    assert not list(tmp_path.glob("*o.*"))


# -- what it says ---------------------------------------------------------------------------------


def parsers() -> dict[str, argparse.ArgumentParser]:
    (choices,) = [a.choices for a in parser.build_parser()._actions if a.dest == "command"]
    return {name: sub for name, sub in choices.items() if name != "bench"}


@pytest.mark.parametrize("name", parsers())
def test_every_option_has_words_and_a_default(name):
    for action in parsers()[name]._actions:
        assert action.help, action.dest
        if action.option_strings and action.dest != "help":
            assert "default" in action.help or action.required, action.dest
            if isinstance(action.default, (str, float, Path)):
                default = action.default
                shown = f"{default:g}" if isinstance(default, float) else str(default)
                assert f"default: {shown}" in action.help, action.dest


def test_help_names_every_kind_of_file(capsys):
    kinds = {"decode": video_write.VIDEO_SUFFIXES, "encode": ("video", "animation", "picture")}
    for name, words in kinds.items():
        text = parsers()[name].format_help()
        assert all(word in text for word in words), text


def test_inspect_tells_the_files_dtypes_from_the_computations(tmp_path, capsys):
    state = random_state(wan21(dim=8))
    halves = [k for k in state if k.startswith("decoder.")]
    state |= {k: state[k].half() for k in halves}
    save_file({f"vae.{k}": v for k, v in state.items()}, str(tmp_path / "v.safetensors"))
    assert cli.main(["inspect", str(tmp_path / "v.safetensors")]) == 0
    text = capsys.readouterr().out
    assert f"{len(halves)} tensors of float16" in text
    assert f"{len(state) - len(halves)} tensors of float32" in text
    assert "compute   float32 on cpu" in text and "with the prefix 'vae.'" in text
    assert "decoder.conv1" not in text and "--layers" in text
    assert cli.main(["inspect", str(tmp_path / "v.safetensors"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["file"]["dtypes"]["float16"] == len(halves)
    assert report["compute_dtype"] == "float32"


# -- torchrun's variables -------------------------------------------------------------------------

RUN = {
    "TORCHELASTIC_RUN_ID": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"LOCAL_RANK": None}, r"LOCAL_RANK=\(missing\)"),
        ({"GROUP_WORLD_SIZE": "many"}, "GROUP_WORLD_SIZE=many"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        ({"GROUP_RANK": "-1"}, "GROUP_RANK=-1"),
    ],
)
def test_variables_that_torchrun_would_not_set(change, words):
    assert RankInfo.from_environment(RUN) == RankInfo(0, 2, 0, 1)
    assert RankInfo.from_environment({}) is None
    broken = {k: v for k, v in (RUN | change).items() if v is not None}
    with pytest.raises(ShardingError, match=words):
        RankInfo.from_environment(broken)


def test_ranks_that_cannot_meet_get_an_error_that_says_so(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torchrun, "group_environment", dict)
    with pytest.raises(ShardingError, match=r"cannot meet: .*expected.*; start them"):
        torchrun.join(RankInfo(0, 2, 0, 1), torch.device("cpu"), has_own_device=False)


@pytest.mark.parametrize("error", [GeometryError, KeyboardInterrupt])
def test_a_rank_that_decodes_nothing_aborts_its_sink(error, good, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise error("refused")

    monkeypatch.setattr(WanVAE, "decode", refuse)
    output = tmp_path / "new" / "frames"
    request = DecodeRequest(
        latents=(good / "z.latent",),
        vae=good / "v.safetensors",
        output=output,
        device="cpu",
        options=RunOptions(),
        normalized=False,
        fps=16.0,
        overwrite=False,
    )
    try:
        code = torchrun.decode_list(request, [output], RankInfo(0, 1, 0, 1))
    except KeyboardInterrupt:
        code = 3
    assert code == 3
    assert not list(tmp_path.iterdir())


class FullDisk(NullSink):
    """A sink that fails from its second write on, and counts what happens to it."""

    writes = closes = aborts = 0

    def write(self, pixels, start_frame, first_row):
        self.writes += 1
        if self.writes == 2:
            raise OSError(28, "No space left on device")

    def close(self):
        self.closes += 1

    def abort(self):
        self.aborts += 1


def test_an_error_of_a_sink_waits_until_the_ranks_can_stop_together():
    full = FullDisk()
    sink = torchrun.DeferredErrorSink(full)
    sink.write(torch.zeros(1), 0, 0)
    assert sink.error is None
    for frame in (1, 2):
        sink.write(torch.zeros(1), frame, 0)
    assert isinstance(sink.error, OutputError) and "No space left" in str(sink.error)
    sink.close()
    assert (full.writes, full.closes, full.aborts) == (2, 0, 1)


def test_an_error_of_the_output_has_its_name_not_the_partial_ones(tmp_path):
    with pytest.raises(OutputError, match=r"^my\.latent: cannot be written"):
        save_latent(tmp_path / "none" / "p.latent", torch.zeros(1), name=Path("my.latent"))
