"""What a decode over several ranks takes, and what was predicted for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.suite.cases import Case
from benchmarks.suite.emulation import Emulated
from benchmarks.suite.ranks.results import Timing
from benchmarks.suite.scaling import LINKS, MeasuredPicture, predict
from wan_vae.pipeline import WanVAE
from wan_vae.report import DecodeReport
from wan_vae.workers.pool import WorkerPool


def time_case(pool: WorkerPool, vae: WanVAE, case: Case, repeats: int) -> Timing:
    """LATENT on the host to IMAGE on the host, after one decode to warm up."""
    z = case.random_latent()
    walls: list[float] = []
    device_ms: list[float] = []
    last: Sequence[DecodeReport] = ()
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        image = pool.decode(vae, z, form="image")
        wall_ms = (time.perf_counter() - start) * 1e3
        del image
        if repeat:
            walls.append(wall_ms)
            last = pool.last_reports
            device_ms.append(max(sum(c.duration_ms for c in r.chunks) for r in last))
    shards, chunks = last[0].shards, len(last[0].chunks)
    peaks = [r.memory.peak_bytes for r in last]
    return Timing(
        case=case.name,
        ranks=len(pool.devices),
        latent_frames=case.latent[2],
        image_ms=statistics.median(walls),
        image_min_ms=min(walls),
        image_max_ms=max(walls),
        device_ms=statistics.median(device_ms),
        chunks=chunks,
        halo_bytes_a_chunk=max((s.halo_bytes for s in shards), default=0) / chunks,
        wait_ms_a_chunk=max((s.wait_ms for s in shards), default=0.0) / chunks,
        peak_bytes=None if None in peaks else max(p for p in peaks if p is not None),
    )


def with_predictions(
    case: Case, timings: Sequence[Timing], emulated: Sequence[Emulated]
) -> list[Timing]:
    """`timings` of one case with speed-ups over one rank, and what model and emulation said."""
    one = next((t for t in timings if t.ranks == 1), None)
    if one is None:
        return list(timings)
    height, width = case.latent[3:]
    picture = MeasuredPicture(case.name, height, width, one.device_ms / one.latent_frames)
    found = []
    for t in timings:
        model = predict(case.config, picture, t.ranks, LINKS[0], clip_frames=t.latent_frames)
        twin = next((e for e in emulated if e.ranks == t.ranks), None)
        found.append(
            replace(
                t,
                speed_up=one.image_ms / t.image_ms,
                device_speed_up=one.device_ms / t.device_ms,
                model_speed_up=model.efficiency * t.ranks if t.ranks > 1 else 1.0,
                emulated_speed_up=None if twin is None else twin.efficiency * t.ranks,
            )
        )
    return found
