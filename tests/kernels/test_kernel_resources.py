"""The kernels compile for cards that need not be there, and fit them.

The interpreter, in which the other tests here run, compiles nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")

REPOSITORY = Path(__file__).resolve().parents[2]
# Of one program.
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
# These hold all channels of a pixel, or were measured fast all the same (see `configs.py`).
STACK_BYTES = {"norm_conv3d 96x96 3x3x3": 128, "norm 640": 128, "norm 1024": 128}


def compiled(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """What the script says of the kernels that are tried first."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    script = REPOSITORY / "benchmarks" / "kernel_resources.py"
    done = subprocess.run(
        [sys.executable, str(script), "--first", "--json", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    for row in rows:
        assert row["shared_bytes"] <= SHARED_BYTES[row["capability"]], row
        multiplies = not row["kernel"].startswith("norm ") and row["config"] != "gather"
        assert (row["tensor_core_instructions"] > 0) == multiplies, row
        assert row["stack_bytes"] <= STACK_BYTES.get(row["kernel"], 0), row
    return rows


def test_what_hopper_tries_first_compiles_fits_and_does_not_spill(tmp_path):
    """Both families in one process: most of their kernels are the same."""
    rows = compiled(tmp_path)
    assert {row["kernel"].split()[0] for row in rows} == {
        *("latent", "features", "pixels", "norm_conv3d", "head", "norm"),
        *("upsample_conv2d", "strided_conv", "attention"),
    }
    assert all(row["loads"] == "tma" for row in rows if row["loads"])


def test_what_cards_without_tma_try_first_compiles_fits_and_does_not_spill(tmp_path):
    """Chosen as for a card of capability 8.6; the widest layers also for others."""
    rows = compiled(tmp_path, "--capability", "86", "--family", "wan2.1", "--layer", "conv3d 96x")
    rows += compiled(tmp_path, "--capability", "86", "--family", "wan2.1", "--layer", "latent")
    wide = ("--capability", "86", "--layer", "conv3d 384x384")
    rows += compiled(tmp_path, *wide, "--target", "80", "--target", "89", "--target", "90")
    assert {row["capability"] for row in rows} == SHARED_BYTES.keys()
    assert {row["loads"] for row in rows} == {"pointer"}


def test_the_script_that_times_them_runs():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = REPOSITORY / "benchmarks" / "kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), "--tiny"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("16 2x5x7: library", "attention 19 x 48", "norm + SiLU", "head 16 to 3"):
        assert part in done.stdout
    assert "refused" not in done.stdout
