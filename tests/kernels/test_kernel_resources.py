"""The kernels compile for cards that need not be there, and fit them.

The interpreter and the emulation, in which the other tests here run, compile nothing for a card.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")

from benchmarks import kernel_resources
from benchmarks.resources.limits import ALLOWED, ARCHITECTURES, Limits, Spill, card, exceeded
from benchmarks.resources.usage import Resources
from wan_vae.kernels.cuda import base, driver
from wan_vae.kernels.cuda import kernels as cuda_kernels
from wan_vae.kernels.cuda.program import CompiledKernel
from wan_vae.ops.problem import HeadProblem, NormConvProblem

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Done:
    """How a run of the script ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script with these arguments; `folder` is for what Triton compiles."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    script = REPOSITORY / "benchmarks" / "kernel_resources.py"
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def checked(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """What the script says of kernels that exceed no limit."""
    return rows_of(run(folder, "--json", "--check", *arguments))


def rows_of(done: subprocess.CompletedProcess[str] | Done) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


# -- Triton ----------------------------------------------------------------------------------------


def compiled(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """What the script says of the kernels that are tried first."""
    rows = checked(folder, "--kernels", "triton", "--first", *arguments)
    for row in rows:
        multiplies = not row["kernel"].startswith("norm ") and row["config"] != "gather"
        # Of float32 RDNA's tensor cores have no products.
        multiplies &= not (row["kernel"].startswith("latent") and "gfx1" in row["architecture"])
        assert (row["tensor_core_instructions"] > 0) == multiplies, row
    return rows


EVERYTHING: tuple[str, ...] = ()
# Of Wan 2.1: each kernel that is compiled for a layer, with one of its widths.
ONE_EACH = tuple(
    word
    for layer in (
        *("latent 16x16", "features 96x192", "features 384x768", "pixels", "attention"),
        *("norm 96", "norm_conv3d 96x96", "head 96x", "upsample_conv2d 192x96"),
        *("strided_conv 96x96", "strided_conv 192x192 3x1x1"),
    )
    for word in ("--layer", layer)
)
quick_or_all = pytest.mark.parametrize(
    "family,layers",
    [
        pytest.param("wan2.1", ONE_EACH, id="wan2.1-one-of-each"),
        pytest.param("wan2.1", EVERYTHING, id="wan2.1", marks=pytest.mark.full),
        # Most of its kernels are those of the first.
        pytest.param("wan2.2", EVERYTHING, id="wan2.2", marks=pytest.mark.full),
    ],
)


@quick_or_all
def test_what_hopper_tries_first_compiles_fits_and_does_not_spill(tmp_path, family, layers):
    rows = compiled(tmp_path, "--card", "sm_90", "--family", family, *layers)
    assert {row["kernel"].split()[0] for row in rows} == {
        *("latent", "features", "pixels", "norm_conv3d", "head", "norm"),
        *("upsample_conv2d", "strided_conv", "attention"),
    }
    assert all(row["loads"] == "tma" for row in rows if row["loads"])


@pytest.mark.full
def test_what_cards_without_tma_try_first_compiles_fits_and_does_not_spill(tmp_path):
    """Chosen as for a card of capability 8.6; the widest layers also for others."""
    rows = compiled(tmp_path, "--card", "sm_86", "--family", "wan2.1", "--layer", "conv3d 96x")
    rows += compiled(tmp_path, "--card", "sm_86", "--family", "wan2.1", "--layer", "latent")
    wide = ("--card", "sm_86", "--layer", "conv3d 384x384")
    rows += compiled(tmp_path, *wide, "--target", "sm_80", "--target", "sm_89", "--target", "sm_90")
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_86", "sm_89", "sm_90"}
    assert {row["loads"] for row in rows} == {"pointer"}


@pytest.mark.parametrize(
    "architecture,layers",
    [
        pytest.param("gfx1100", ONE_EACH, id="gfx1100-one-of-each"),
        *(
            pytest.param(name, EVERYTHING, id=name, marks=pytest.mark.full)
            for name in ("gfx1100", "gfx1201", "gfx942")
        ),
    ],
)
def test_what_amds_cards_try_first_compiles_fits_and_does_not_spill(architecture, layers, tmp_path):
    """All layers of a decode and an encode of Wan 2.1; what else is tried, and Wan 2.2, takes
    minutes: `wan-vae bench resources --check`."""
    rows = compiled(tmp_path, "--card", architecture, "--family", "wan2.1", *layers)
    assert {row["kernel"].split()[0] for row in rows} == {
        *("latent", "features", "pixels", "norm_conv3d", "head", "norm"),
        *("upsample_conv2d", "strided_conv", "attention"),
    }
    assert {row["loads"] for row in rows} == {"pointer", ""}
    assert all(row["stack_bytes"] == 0 for row in rows)
    threads = {row["threads"] for row in rows}
    assert threads == ({256, 512} if architecture == "gfx942" else {128, 256})


def test_features_in_float16_compile_for_amd_too(tmp_path):
    layers = ("--layer", "norm_conv3d 96x96", "--layer", "features 96x", "--layer", "norm 96")
    rows = compiled(tmp_path, "--card", "gfx1100", "--dtype", "float16", *layers)
    assert rows and all(row["stack_bytes"] == 0 for row in rows)


# -- CUDA C++ --------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch, capsys) -> Callable[..., Done]:
    """The script, called in this process. (Triton's compiler needs one without the interpreter.)"""

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["kernel_resources.py", *arguments])
        try:
            code = kernel_resources.main()
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            code = stop.code
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def nvrtc():
    """The compiler, or a skip."""
    try:
        driver.nvrtc_version()
    except OSError as error:
        pytest.skip(f"no NVRTC here (pip install nvidia-cuda-nvrtc): {error}")


# Each program, with one of its widths; a layer of 96 channels for an image too.
ONE_EACH_IN_CUDA = tuple(
    word
    for layer in (
        *("conv3d of latent 16x16", "conv3d of features 96x192", "conv3d of features 384x768"),
        *("conv3d of pixels", "conv 384x384", "attention", "norm_join 96", "norm_pairs 192"),
        *("norm_quads 96", "norm_conv3d 96x96", "norm_conv3d 192x384", "head 96x"),
        *("upsample_conv2d 192x96", "strided_conv 96x96", "strided_conv 192x192 3x1x1"),
    )
    for word in ("--layer", layer)
)


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize(
    "family,layers",
    [
        pytest.param("wan2.1", ONE_EACH_IN_CUDA, id="wan2.1-one-of-each"),
        pytest.param("wan2.1", EVERYTHING, id="wan2.1", marks=pytest.mark.full),
        pytest.param("wan2.2", EVERYTHING, id="wan2.2", marks=pytest.mark.full),
    ],
)
def test_what_a_geforce_tries_first_in_cuda_fits(script, family, layers):
    """Chosen as for a card of capability 8.6, for videos and images."""
    chosen = ("--kernels", "cuda", "--card", "sm_86", "--first", "--family", family)
    rows = rows_of(script("--json", "--check", *chosen, *layers))
    names = [row["kernel"] for row in rows]
    assert {name.split()[0] for name in names} == {
        *("conv3d", "norm_conv3d", "head", "upsample_conv2d", "strided_conv", "attention"),
        # Beside them: norms, and attention's convolutions.
        *("norm_join", "norm_pairs", "norm_quads", "conv"),
    }
    assert any(name.endswith("one frame") for name in names)
    assert all(row["registers"] > 0 and row["threads"] > 0 for row in rows)


@pytest.mark.full
@pytest.mark.usefixtures("nvrtc")
def test_what_every_card_tries_first_in_cuda_fits(script):
    """All that is tried takes minutes more: `wan-vae bench resources --check`."""
    others = ("sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
    chosen = [word for architecture in others for word in ("--card", architecture)]
    rows = rows_of(script("--json", "--check", "--kernels", "cuda", "--first", *chosen))
    assert {row["architecture"] for row in rows} == set(others)


@pytest.mark.usefixtures("nvrtc")
def test_a_kernel_that_spills_more_than_is_allowed_is_named(script, tmp_path):
    few = ("--kernels", "cuda", "--card", "sm_86", "--first")
    layer = (*few, "--layer", "upsample_conv2d 384x192")
    (row,) = rows_of(script("--json", "--check", *layer))
    spill = {
        **{"family": "cuda", "kernel": row["kernel"], "config": row["config"], "why": "planted"},
        **{"architectures": ["sm_86"], "stack_bytes": row["stack_bytes"] - 1},
    }
    planted = tmp_path / "limits.json"
    planted.write_text(json.dumps({"stack_bytes": 0, "spills": [spill]}))
    done = script(*layer, "--check", "--limits", str(planted))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"exceeds: {row['kernel']}, {row['config']}, sm_86: bytes of stack: "
        f"{row['stack_bytes']} of {row['stack_bytes'] - 1}"
    ]


@pytest.mark.usefixtures("nvrtc")
def test_a_check_of_nothing_fails(script):
    nothing = ("--kernels", "cuda", "--card", "sm_86", "--layer", "7x7")
    done = script(*nothing, "--check")
    assert done.returncode == 2 and "no kernel of that name" in done.stderr


def test_each_limit_is_held():
    fits = Resources("k", "c", "cuda", "sm_86", 128, 0, 48 * 1024, threads=256, resident=2)
    limits = Limits(0, ())
    assert list(exceeded([fits], limits)) == []
    for change, what in (
        ({"stack_bytes": 8}, "bytes of stack: 8 of 0"),
        ({"registers": 256, "resident": 1}, "registers of a thread: 256 of 255"),
        ({"registers": 129}, "registers of 2 programs at once: 69632 of 65536"),
        ({"shared_bytes": 100 * 1024, "resident": 1}, "shared memory: 102400 of 101376"),
        ({"shared_bytes": 50 * 1024}, "shared memory of 2 programs at once: 104448 of 102400"),
        ({"registers": 32, "threads": 1024}, "threads of 2 programs at once: 2048 of 1536"),
    ):
        (line,) = exceeded([replace(fits, **change)], limits)
        assert what in line
    spilling = replace(fits, stack_bytes=8)
    assert list(exceeded([spilling], replace(limits, stack_bytes=8))) == []


def test_an_amd_card_has_limits_of_its_own():
    fits = Resources("k", "c", "triton", "gfx1100", 256, 0, 64 * 1024, threads=256)
    cdna = replace(fits, architecture="gfx942", registers=512, threads=256)
    limits = Limits(0, ())
    assert list(exceeded([fits, cdna], limits)) == []
    for row, what in (
        (replace(fits, registers=257), "registers of a thread: 257 of 256"),
        (replace(fits, shared_bytes=65 * 1024), "shared memory: 66560 of 65536"),
        (replace(fits, stack_bytes=4), "gfx1100: bytes of stack: 4 of 0"),
        (replace(cdna, threads=512), "registers of 1 programs at once: 262144 of 131072"),
    ):
        (line,) = exceeded([row], limits)
        assert what in line


def row_of(spill: Spill, architecture: str) -> Resources:
    """A kernel that the entry is about."""
    names = (spill.kernel.replace("*", "x"), spill.config.replace("*", "x"))
    return Resources(*names, spill.family, architecture, 1, 0, 0, 1)


def test_what_may_be_spilled_says_why_and_where():
    for spill in Limits.read(ALLOWED).spills:
        assert spill.why.endswith(".")
        assert any(spill.covers(row_of(spill, name)) for name in ARCHITECTURES)


def test_every_kernel_in_cuda_names_what_it_builds(monkeypatch):
    built: list[Any] = []
    monkeypatch.setattr(base, "build", built.append)
    monkeypatch.setattr(driver, "has_tensor_maps", lambda: True)
    assert all(isinstance(kernel, CompiledKernel) for kernel in cuda_kernels.KERNELS)
    hopper, bf16 = card("sm_90"), torch.bfloat16
    problems = (NormConvProblem(96, 96, bf16, 4), HeadProblem(96, 3, bf16, 4))
    for kernel, problem in zip(cuda_kernels.KERNELS[:3], (problems[0], *problems), strict=True):
        config = kernel.candidates(problem, hopper)[0]
        kernel.build(problem, config, hopper)
        programs = kernel.programs(problem, config, hopper)
        assert len(programs) == 2 and tuple(built) == programs
        built.clear()


# -- their times -----------------------------------------------------------------------------------


@pytest.mark.full
def test_the_script_that_times_them_runs():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = REPOSITORY / "benchmarks" / "kernels.py"
    command = [sys.executable, str(script), "--tiny", "--amd"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("gfx942", "gfx1100", "gfx1201"):
        for part in ("triton pointer f2_p4x8_n16+0_k16_w4_s2", "pointer m16_n16_d16x1_w4_s2"):
            assert f"{part} as {name}" in done.stdout
    for part in ("16 2x5x7: library", "attention 19 x 48", "norm + SiLU", "head 16 to 3"):
        assert part in done.stdout
    assert "refused" not in done.stdout
