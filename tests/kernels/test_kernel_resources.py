"""The kernels compile for a Hopper card, which need not be there, and fit it.

The interpreter, in which the other tests here run, compiles nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")

REPOSITORY = Path(__file__).resolve().parents[2]
# Of one program on compute capability 9.0.
SHARED_BYTES = 227 * 1024


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2"])
def test_what_is_tried_first_compiles_fits_and_does_not_spill(tmp_path, family):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = REPOSITORY / "benchmarks" / "kernel_resources.py"
    done = subprocess.run(
        [sys.executable, str(script), "--first", "--family", family, "--json"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["kernel"].split()[0] for row in rows} == {
        "latent", "normed", "stream", "upsample", "attention", "norm", "head", "pixels", "strided",
        "moments",
    }  # fmt: skip
    for row in rows:
        assert row["shared_bytes"] <= SHARED_BYTES, row
        multiplies = not row["kernel"].startswith("norm ") and row["config"] != "gather"
        assert (row["tensor_core_instructions"] > 0) == multiplies, row
        # The first was measured fast all the same, see `triton_configs`; the others hold a pixel's
        # channels, all of them.
        exceptions = {"normed 96x96 3x3x3": 128, "norm 640": 128, "norm 1024": 128}
        assert row["stack_bytes"] <= exceptions.get(row["kernel"], 0), row


def test_the_script_that_times_them_runs():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = REPOSITORY / "benchmarks" / "kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), "--tiny"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("16 2x5x7: library", "attention 19 x 48", "norm + SiLU", "head 16 to 3"):
        assert part in done.stdout
    assert "refused" not in done.stdout
