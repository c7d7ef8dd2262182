"""How long a user waits the first time: fresh processes, first without and then with kernel caches.

Two processes after each other for each decoder, both with cache folders of their own, empty for
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

from benchmarks.suite.baseline import Baseline
from benchmarks.suite.cases import Case
from benchmarks.suite.measure import NoNumber, Setting
from wan_vae.device import dtype_name

# Where Triton, Inductor, CUDA, PyTorch's run-time compiler and our proofs keep what they made.
CACHE_VARIABLES = (
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "CUDA_CACHE_PATH",
    "PYTORCH_KERNEL_CACHE_PATH",
    "WAN_VAE_CACHE",
)
Caches = Literal["fresh", "warm"]
CACHES: tuple[Caches, ...] = ("fresh", "warm")
_LIMIT_S = 600


@dataclass(frozen=True)
class ColdStart:
    """One fresh process. `start_ms`: interpreter and imports; `build_ms`: model onto the device
    (weights made before; another decoder's own imports are in it); `first_decode_ms`: latent and
    pixels on the device; `next_decode_ms`: the same again."""

    case: str
    decoder: str
    caches: Caches
    start_ms: float
    build_ms: float
    first_decode_ms: float
    next_decode_ms: float


def cold_starts(
    case: Case, decoders: Sequence[Baseline], setting: Setting
) -> Iterator[ColdStart | NoNumber]:
    """Two rows of each decoder: caches fresh, then warm; or one that says why not."""
    for decoder in decoders:
        reason = decoder.unavailable_reason(setting.device, setting.dtype)
        if reason is not None:
            yield NoNumber(case.name, decoder.name, "device", "unavailable", reason)
            continue
        with tempfile.TemporaryDirectory(prefix="wan_vae_bench_") as folder:
            for caches in CACHES:
                row = _one_process(case, decoder.name, caches, Path(folder), setting)
                yield row
                if isinstance(row, NoNumber):
                    break


def _one_process(
    case: Case, name: str, caches: Caches, folder: Path, setting: Setting
) -> ColdStart | NoNumber:
    job = {
        "case": case.name,
        "decoder": name,
        "device": str(setting.device),
        "dtype": dtype_name(setting.dtype),
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
    # -P: another `benchmarks` in the working directory would come first.
    command = [sys.executable, "-P", "-m", "benchmarks.suite.cold_process", json.dumps(job)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return NoNumber(case.name, name, "device", "failed", f"took more than {_LIMIT_S} s")
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return NoNumber(case.name, name, "device", "failed", said[-1][:200])
    # Other decoders print while they are imported: ours is the last line.
    times = json.loads(done.stdout.strip().splitlines()[-1])
    if not times["same"]:
        return NoNumber(case.name, name, "device", "refused", "two decodes differ, or NaN")
    del times["same"]
    return ColdStart(case.name, name, caches, **times)
