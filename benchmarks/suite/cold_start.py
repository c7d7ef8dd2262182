"""How long a user waits the first time: fresh processes, first without and then with kernel caches.

Two processes after each other for each contender, both with cache folders of their own, empty for
the first. Each decodes twice; the second decode says what a warm one costs in that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.suite.cases import Case
from benchmarks.suite.contender import Contender
from benchmarks.suite.measure import NoNumber

# Where Triton, Inductor, CUDA, PyTorch's run-time compiler and our proofs keep what they made.
CACHE_VARIABLES = (
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "CUDA_CACHE_PATH",
    "PYTORCH_KERNEL_CACHE_PATH",
    "WAN_VAE_CACHE",
)
_LIMIT_S = 600


@dataclass(frozen=True)
class ColdStart:
    """One fresh process. `start_ms`: interpreter and imports; `build_ms`: model onto the device
    (weights made before, a peer's own imports within); `first_decode_ms`: latent and pixels on the
    device; `next_decode_ms`: the same again."""

    case: str
    contender: str
    caches: Literal["fresh", "warm"]
    start_ms: float
    build_ms: float
    first_decode_ms: float
    next_decode_ms: float


def cold_starts(
    case: Case, entrants: Sequence[Contender], device: torch.device, dtype: torch.dtype
) -> Iterator[ColdStart | NoNumber]:
    """Two rows of each contender: caches fresh, then warm; or one that says why not."""
    for contender in entrants:
        reason = contender.why_not(device, dtype)
        if reason is not None:
            yield NoNumber(case.name, contender.name, "device", "unavailable", reason)
            continue
        with tempfile.TemporaryDirectory(prefix="wan_vae_bench_") as folder:
            for caches in ("fresh", "warm"):
                row = _one_process(case, contender.name, caches, Path(folder), device, dtype)
                yield row
                if isinstance(row, NoNumber):
                    break


def _one_process(case, name, caches, folder: Path, device, dtype) -> ColdStart | NoNumber:
    job = {
        "case": case.name,
        "contender": name,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "started_s": time.time(),
    }
    # The child must find this very package, installed or not.
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        **{name: str(folder / name.lower()) for name in CACHE_VARIABLES},
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, "-m", "benchmarks.suite.cold_process", json.dumps(job)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return NoNumber(case.name, name, "device", "failed", f"took more than {_LIMIT_S} s")
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return NoNumber(case.name, name, "device", "failed", said[-1][:200])
    # Peers print while they are imported: ours is the last line.
    times = json.loads(done.stdout.strip().splitlines()[-1])
    if not times["same"]:
        return NoNumber(case.name, name, "device", "refused", "two decodes differ, or NaN")
    del times["same"]
    return ColdStart(case.name, name, caches, **times)
