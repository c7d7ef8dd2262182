"""What fresh host memory costs a copy from the GPU: PyTorch's, NumPy's, and memory in use before.

    wan-vae bench host [--megabytes 388]      # or python benchmarks/host_memory.py

388 MB is the IMAGE of 81 frames of 480p. Medians of five; without a GPU the source is on the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch


def median_ms(work: Callable[[], object], repeats: int = 5) -> float:
    """Of `work`, whose result is freed outside of the clock."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        times.append((time.perf_counter() - start) * 1e3)
        del result
    return statistics.median(times)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="wan-vae bench host",
        description="What fresh host memory costs a copy from the GPU.",
    )
    parser.add_argument("--megabytes", type=float, default=388.0)
    n = int(parser.parse_args(argv).megabytes * 1e6) // 4
    source = torch.zeros(n, device="cuda" if torch.cuda.is_available() else "cpu")
    used = torch.zeros(n)
    for name, work in {
        "PyTorch's, fresh": lambda: torch.empty(n).copy_(source),
        "NumPy's, fresh": lambda: torch.from_numpy(np.empty(n, np.float32)).copy_(source),
        "used before": lambda: used.copy_(source),
    }.items():
        print(f"{name}: {median_ms(work):.1f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
