"""The small scripts behind docs/performance.md run; their numbers need a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_chunk_is_profiled_whole_and_as_a_shard():
    lines = run("chunk_profile.py", "--height", "2", "--width", "4", "--frames", "1")
    heads = [i for i, line in enumerate(lines) if line.startswith("rank 0 of")]
    assert [lines[i].split(",")[0] for i in heads] == ["rank 0 of 1", "rank 0 of 2"]
    assert all(float(lines[i + 1].split()[0]) > 0 for i in heads)
    assert any("convolution" in line for line in lines)


def test_host_memory_is_timed():
    lines = run("host_memory.py", "--megabytes", "1")
    assert [line.partition(":")[0] for line in lines] == [
        "PyTorch's, fresh",
        "NumPy's, fresh",
        "used before",
    ]
