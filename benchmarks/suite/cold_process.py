"""The fresh process of `cold_start`: `-m benchmarks.suite.cold_process JOB` prints one JSON line.

Its pictures pass no float32 gate here: the same decoder passed it in the main process. That the
first decode equals the second (to the gate: a decoder may choose another algorithm) is checked.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from benchmarks.suite.baseline import Built
from benchmarks.suite.cases import CASES
from benchmarks.suite.decoders import decoders
from benchmarks.suite.measure import HALF_GATE, relative_error, times_ms
from benchmarks.suite.weights import Weights
from wan_vae.options import BACKENDS


def main(job: dict[str, Any]) -> dict[str, float | bool]:
    """Times of one process; see `cold_start.ColdStart`."""
    case, device = CASES[job["case"]], torch.device(job["device"])
    dtype = getattr(torch, job["dtype"])
    decoder = next(d for d in decoders(BACKENDS) if d.name == job["decoder"])
    reason = decoder.unavailable_reason(device, dtype)  # imports ComfyUI, if that is the decoder
    if reason is not None:
        raise SystemExit(f"{decoder.name}: {reason}")
    start_ms = (time.time() - job["started_s"]) * 1e3
    weights, z = Weights.random(case.config), case.random_latent()
    kept: list[Built] = []

    def build() -> None:
        kept.append(decoder.build(weights, device, dtype))

    with torch.inference_mode():
        (build_ms,) = times_ms(build, device, 1)
        (built,) = kept
        z = z.to(device)
        pictures: list[torch.Tensor] = []
        first_ms, next_ms = times_ms(lambda: pictures.append(built.decode(z)), device, 2)
        first, second = pictures
        same = relative_error(second, first.clamp(-1, 1)) < HALF_GATE
    built.close()
    return {
        "start_ms": start_ms,
        "build_ms": build_ms,
        "first_decode_ms": first_ms,
        "next_decode_ms": next_ms,
        "same": same,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
