"""A decode to IMAGE and a stream of whole frames on a card with little memory, side by side.

    wan-vae bench small [--cap 6 --cap 8] [--case wan2.1-1080p-81] [--output FOLDER]
    PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync wan-vae bench small     # ComfyUI's allocator

Another process holds all memory of the card but --cap GB, in which this process's CUDA context has
to fit too. The frames of the stream must have the bits of the IMAGE. Ends with 1 if they do not, if
memory ran out on the way, or if a peak is more than 15% above the plan. --cap 0 holds nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.suite.ballast import Ballast
from benchmarks.suite.cases import CASES, Case
from benchmarks.suite.facts import Facts, repeatable, write_results
from benchmarks.suite.measure import synchronise
from benchmarks.suite.weights import random_vae
from wan_vae.config import wan21
from wan_vae.device import Allocator, allocator_of, pick_device
from wan_vae.io.image import ImageSink
from wan_vae.options import Backend
from wan_vae.pipeline import WanVAE
from wan_vae.report import DecodeReport

SCHEMA = "wan_vae.bench.small/1"
SMALL_CASES = {**CASES, "wan2.1-1080p-81": Case("wan2.1-1080p-81", wan21(), (1, 16, 21, 135, 240))}
_MOST_ABOVE_PLAN = 1.15
# What CUDA takes for a process, beside the allocator.
_CONTEXT_BYTES = 600 * 10**6


@dataclass(frozen=True)
class SmallRow:
    """One way through one case. ms: median of the runs after the first. The rest is of the last run
    (`DecodeReport`); restarts: of all runs. parts: of the video, in strips of whole frames."""

    case: str
    way: str
    cap_gb: float
    allocator: Allocator
    first_ms: float
    ms: float
    strips: int
    chunk_frames: int
    parts: int
    free_bytes: int | None
    planned_bytes: int
    peak_bytes: int | None
    host_bytes: int
    restarts: int
    equal: bool

    def faults(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if self.restarts:
            found.append(f"memory ran out {self.restarts} times")
        if self.peak_bytes is not None and self.peak_bytes > _MOST_ABOVE_PLAN * self.planned_bytes:
            found.append(f"planned {_gib(self.planned_bytes)} GiB, took {_gib(self.peak_bytes)}")
        if not self.equal:
            found.append("the frames have other bits than the IMAGE")
        return [f"{self.case} {self.way}, {self.cap_gb:g} GB: {text}" for text in found]


def rows_of(
    case: Case, vae: WanVAE, cap_gb: float, backend: Backend, repeats: int
) -> Iterator[SmallRow]:
    """The IMAGE decode of `case` and its stream."""
    z = case.random_latent()

    def image() -> torch.Tensor:
        sink = ImageSink.allocate(case.latent, case.config, torch.device("cpu"))
        vae.decode(z, sink=sink, backend=backend)
        return sink.image

    expected = image()
    yield _timed(case, "IMAGE", vae, cap_gb, repeats, image, lambda: True)

    def stream() -> None:
        for _ in vae.decode_stream(z, backend=backend):
            pass  # the reader lets go of them at once

    def is_equal() -> bool:
        start = 0
        for pixels in vae.decode_stream(z, backend=backend):
            frames = pixels.add(1.0).mul_(0.5).movedim(1, -1).cpu()
            if not torch.equal(frames, expected[:, start : start + frames.shape[1]]):
                return False
            start += frames.shape[1]
        return start == expected.shape[1]

    yield _timed(case, "stream", vae, cap_gb, repeats, stream, is_equal)


def _timed(
    case: Case,
    way: str,
    vae: WanVAE,
    cap_gb: float,
    repeats: int,
    work: Callable[[], object],
    is_equal: Callable[[], bool],
) -> SmallRow:
    times, reports = [], list[DecodeReport]()
    for _ in range(1 + repeats):
        synchronise(vae.device)
        start = time.perf_counter()
        work()
        synchronise(vae.device)
        times.append((time.perf_counter() - start) * 1e3)
        assert vae.last_report is not None
        reports.append(vae.last_report)
    report, plan = reports[-1], reports[-1].plan
    assert plan is not None and report.memory.planned_bytes is not None
    return SmallRow(
        case=case.name,
        way=way,
        cap_gb=cap_gb,
        allocator=allocator_of(vae.device),
        first_ms=times[0],
        ms=statistics.median(times[1:]),
        strips=report.strips,
        chunk_frames=max(chunk.stop - chunk.start for chunk in report.chunks),
        parts=len(plan["parts"]),
        free_bytes=report.memory.free_bytes,
        planned_bytes=report.memory.planned_bytes,
        peak_bytes=report.memory.peak_bytes,
        host_bytes=report.memory.host_bytes or 0,
        restarts=sum(one.restarts for one in reports),
        equal=is_equal(),
    )


def markdown(rows: Sequence[SmallRow], facts: Facts) -> str:
    """The results as Markdown."""
    lines = [
        "# Decodes on a card with little memory",
        "",
        *facts.lines(),
        "- another process holds the rest of the card; random weights; first: with all kernels'",
        "  modules still to load; ms: median of the runs after it; memory of the last one",
        "",
        "| case | way | card, GB | allocator | first, ms | ms | strips | chunk | parts "
        "| free GiB | planned GiB | peak GiB | host GiB | restarts | bits |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        cells = [
            row.case,
            row.way,
            f"{row.cap_gb:g}",
            row.allocator,
            f"{row.first_ms:.0f}",
            f"{row.ms:.0f}",
            row.strips,
            row.chunk_frames,
            row.parts,
            *(_gib(n) for n in (row.free_bytes, row.planned_bytes, row.peak_bytes, row.host_bytes)),
            row.restarts,
            "equal" if row.equal else "differ",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; 1 if a row is not as it must be."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="wan-vae bench small",
        description="A decode to IMAGE and a stream of frames on a card with little memory.",
    )
    parser.add_argument("--cap", action="append", type=float, help="GB of the card (6 and 8)")
    parser.add_argument("--case", action="append", choices=list(SMALL_CASES))
    parser.add_argument("--backend", default="auto", choices=("auto", "eager"))
    parser.add_argument("--device", help="cuda:0, cpu, ... (default: the best one)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs (default: 3)")
    parser.add_argument("--output", type=Path, help="folder for small.md and small.json")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    rows: list[SmallRow] = []
    for cap in args.cap or (6.0, 8.0):
        # From the second on, this process has its context already.
        context = _CONTEXT_BYTES if device.type == "cuda" and torch.cuda.is_initialized() else 0
        left = (cap * 1e9 - context) / 2**30 if cap and device.type == "cuda" else None
        with Ballast(left):
            for name in args.case or ("wan2.1-720p-81", "wan2.1-1080p-81"):
                case = SMALL_CASES[name]
                vae = random_vae(case.config, device)
                for row in rows_of(case, vae, cap, args.backend, args.repeats):
                    rows.append(row)
                    print(json.dumps(asdict(row)), file=sys.stderr, flush=True)
                del vae
        if device.type == "cuda":
            torch.cuda.empty_cache()
    command = repeatable(["small", *argv])
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    if settings:
        command = f"PYTORCH_CUDA_ALLOC_CONF={settings} {command}"
    facts = Facts.begin(SCHEMA, command, device)
    text = markdown(rows, facts)
    print(text)
    if args.output is not None:
        data = {**facts.as_dict(), "rows": [asdict(row) for row in rows]}
        write_results(args.output, "small", text, data)
    faults = [fault for row in rows for fault in row.faults()]
    for fault in faults:
        print(f"small: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
