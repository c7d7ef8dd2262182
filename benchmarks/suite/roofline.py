"""Each layer of a decode against what the device can do: matrix product and copy, measured here.

A real decode runs with every operation under a clock (`recorder`), on any backend, so the times are
those of the layers where they stand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.suite.cases import Case
from benchmarks.suite.measure import times_ms
from benchmarks.suite.recorder import LayerTime, Recorder
from benchmarks.suite.weights import Weights
from wan_vae.device import dtype_name
from wan_vae.io.sink import NullSink
from wan_vae.options import Backend, RunOptions
from wan_vae.pipeline import WanVAE
from wan_vae.runs.decode import DecodeRequest, DecodeRun

# Side of the square matrices and bytes of the copied block. On a GPU large against its caches
# (an H200 has 50 MB of L2) and long against a launch; on a CPU what takes a fraction of a second.
_MATRIX_SIDE = {"cuda": 8192}
_MATRIX_SIDE_ELSEWHERE = 512
_COPY_BYTES = {"cuda": 2**30}
_COPY_BYTES_ELSEWHERE = 2**26
_CEILING_REPEATS = 15
# Calls between two looks at the host's clock: a launch and a wait are percents of one GPU copy.
_CEILING_BATCH = {"cuda": 10}


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: multiply-adds counted as two, bytes read plus bytes written."""

    matrix_flops_per_s: float
    copy_bytes_per_s: float

    def floor_ms(self, flops: int, moved_bytes: int) -> float:
        """The least time of work of this size: the slower of arithmetic and memory."""
        return 1e3 * max(flops / self.matrix_flops_per_s, moved_bytes / self.copy_bytes_per_s)


@dataclass(frozen=True)
class Roofline:
    """All layers of one decode; those that take longest come first.

    `decode_ms` was measured with the clocks on.
    """

    case: str
    backend: str
    dtype: str
    decode_ms: float
    layers: tuple[LayerTime, ...]

    @property
    def elsewhere_ms(self) -> float:
        """Time of the decode outside every clock: residual adds, cache, launches."""
        return self.decode_ms - sum(layer.total_ms for layer in self.layers)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Best of several square matrix products in `dtype`, and of several copies."""
    n = _MATRIX_SIDE.get(device.type, _MATRIX_SIDE_ELSEWHERE)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty(n, n, device=device, dtype=dtype)
    source = torch.empty(
        _COPY_BYTES.get(device.type, _COPY_BYTES_ELSEWHERE), dtype=torch.uint8, device=device
    )
    source.zero_()
    target = torch.empty_like(source)

    batch = _CEILING_BATCH.get(device.type, 1)

    def best_s(work: Callable[[], object]) -> float:
        def run() -> None:
            for _ in range(batch):
                work()

        return min(times_ms(run, device, _CEILING_REPEATS)) / 1e3 / batch

    return Ceilings(
        2 * n**3 / best_s(lambda: torch.mm(a, b, out=product)),
        2 * source.numel() / best_s(lambda: target.copy_(source)),
    )


def measure_roofline(
    case: Case, weights: Weights, device: torch.device, dtype: torch.dtype, backend: Backend
) -> Roofline:
    """Decode `case` once to warm up and once under clocks. Raises what a decode raises."""
    vae = WanVAE.from_state_dict(weights.native, device=device, dtype=dtype)
    options = RunOptions(backend=backend)
    request = DecodeRequest(case.random_latent().to(device), options=options, sink=NullSink())
    DecodeRun(vae.engine, request).decode()
    run = DecodeRun(vae.engine, request)
    recorder = Recorder(run.model, run.ops, device)
    run.ops = recorder.ops
    (decode_ms,) = times_ms(run.decode, device, 1)
    layers = recorder.layer_times()
    return Roofline(case.name, backend, dtype_name(dtype), decode_ms, layers)
