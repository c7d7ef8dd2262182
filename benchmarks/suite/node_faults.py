"""Faults on purpose in a running ComfyUI, and our nodes after them, which must be right.

Each fault happens to a server with little free memory. Then a decode, an encode and a video file
are made, whose bits must be those of a server with all memory.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.suite.node_runs import NodeCase, NodeRow, failed, measure
from tests.comfy.server import Comfy

_BALLAST = Path(__file__).with_name("ballast.py")


@dataclass(frozen=True)
class Fault:
    """What happens before a node of ours runs: a node of the probe with these inputs.

    raises: the node fails, as a node of somebody else that runs out of memory.
    """

    title: str
    node: str
    inputs: Mapping[str, object] = field(default_factory=dict)
    raises: bool = False

    def happen(self, server: Comfy, salt: int) -> None:
        """Let it happen. Raises RuntimeError if it does not go as it should."""
        inputs = {"gib": 1.0, **self.inputs, "salt": salt}
        run = server.run({"1": {"class_type": self.node, "inputs": inputs}})
        if (run.error is not None) != self.raises:
            said = None if run.error is None else run.error["exception_message"]
            raise RuntimeError(f"{self.title}: {said}")


# For 5 GB that are free: what stays is enough for each node, if it takes little at a time.
FAULTS = (
    Fault(
        "another node ran out of memory, its traceback is kept",
        "WanVAEBenchRunOut",
        {"gib": 2.0},
        raises=True,
    ),
    Fault("a sampler's model of 3 GiB is loaded", "WanVAEBenchModel", {"gib": 3.0}),
    Fault(
        "another process takes memory between plan and run",
        "WanVAEBenchTaker",
        {"gib": 2.0, "script": str(_BALLAST)},
    ),
)
_RELEASE = Fault("release", "WanVAEBenchRelease")


def fault_cases() -> tuple[NodeCase, ...]:
    """What must work after each fault."""
    size = (81, 720, 1280)
    # Random latents make random pictures, on which x264 takes some five times as long at the node's
    # own crf as at 45 (CPU seconds of 9 frames of 640 x 360, random weights). Fewer frames would
    # save as much, and memory would be less tight: in strips, a plan grows with the frames.
    video = {"fps": 16.0, "filename_prefix": "video/fault", "crf": 45.0}
    return (
        NodeCase("Wan VAE Decode", "WanVAEDecode", *size, warm=0),
        NodeCase("Wan VAE Encode", "WanVAEEncode", *size, warm=0),
        NodeCase("Wan VAE Decode to Video", "WanVAEDecodeToVideo", *size, warm=0, inputs=video),
    )


def rows_without_faults(server: Comfy) -> Iterator[NodeRow]:
    """Each case once, for the bits of its result."""
    for seed, case in enumerate(fault_cases()):
        _say("nothing", case)
        yield _said(measure(server, case, 1000 * (seed + 1)))


def rows_after_faults(server: Comfy, expected: Mapping[str, int | None]) -> Iterator[NodeRow]:
    """Each case after each fault. expected: the digest of each case's result, by its title."""
    salts = itertools.count(1)
    for fault in FAULTS:
        for seed, case in enumerate(fault_cases()):
            _RELEASE.happen(server, next(salts))
            _say(fault.title, case)
            # A result of the run before must not answer.
            server.post("/free", {"unload_models": True, "free_memory": True})
            fault.happen(server, next(salts))
            yield _said(_after(server, fault, case, 1000 * (seed + 1), expected))
    _RELEASE.happen(server, next(salts))


def _say(after: str, case: NodeCase) -> None:
    print(f"after {after}: {case.title}, {case.video}", file=sys.stderr, flush=True)


def _said(row: NodeRow) -> NodeRow:
    """`row`, printed for who waits."""
    print(f"  {row.in_a_line()}", file=sys.stderr, flush=True)
    return row


def _after(
    server: Comfy, fault: Fault, case: NodeCase, seed: int, expected: Mapping[str, int | None]
) -> NodeRow:
    try:
        row = measure(server, case, seed)
    except RuntimeError as error:
        return replace(failed(case, error), after=fault.title)
    if row.digest != expected[case.title]:
        return replace(row, after=fault.title, error="other bits than with all memory")
    return replace(row, after=fault.title)


def fault_lines(rows: list[NodeRow]) -> list[str]:
    """A table of what happened, for Markdown."""
    lines = ["| after | node | ms | strips | planned GiB | starts | what the report says |"]
    lines.append("|---|---|---:|---:|---:|---:|---|")
    for row in rows:
        report: dict[str, Any] = row.report or {}
        planned = report.get("memory", {}).get("planned_bytes")
        cells = [
            row.after or "nothing",
            row.node,
            f"{row.first_ms:.0f}",
            report.get("strips", ""),
            "" if planned is None else f"{planned / 2**30:.2f}",
            1 + report.get("restarts", 0),
            row.error or "; ".join(report.get("fallbacks", ())),
        ]
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return lines
