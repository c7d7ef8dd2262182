"""What a user waits for in a ComfyUI whose caches are empty, and what our node costs by itself.

Three ComfyUIs after each other. Alone: empty caches, nothing compiled ahead. Next: the caches of
the first. Meanwhile: empty caches again, and a stand-in for a sampler in front of the decode, while
a process of low priority compiles.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.suite.cold_start import CACHE_VARIABLES
from benchmarks.suite.node_runs import VAE_FILE, NodeClock
from tests.comfy.server import Comfy
from wan_vae.config import WanVAEConfig
from wan_vae.geometry import pixel_shape

_VAE, _LATENT, _SAMPLER, _DECODE, _PROBE = "1", "2", "3", "4", "5"
# Repeats of what is warm; of images there is more noise, and they are quick.
_WARM, _WARM_IMAGE = 3, 9

Start = Callable[[str, Mapping[str, str]], AbstractContextManager[Comfy]]


@dataclass(frozen=True)
class ColdCase:
    """What is decoded. video: shape of a latent; images: of latents of one frame. sample_s: how
    long the stand-in samples."""

    config: WanVAEConfig
    video: tuple[int, ...]
    images: tuple[tuple[int, ...], ...]
    sample_s: float

    def prompt(self, shape: tuple[int, ...], seed: int, sample_s: float) -> dict[str, Any]:
        """The API prompt: random numbers, the sampler if it has seconds, our decode."""
        batch, channels, frames, height, width = shape
        names = dict(batch=batch, channels=channels, frames=frames, height=height, width=width)
        made = {
            _VAE: _node("VAELoader", vae_name=VAE_FILE),
            _LATENT: _node("ProbeLatent", **names, seed=seed, kind="plain"),
            _DECODE: _node("WanVAEDecode", vae=[_VAE, 0], samples=[_LATENT, 0]),
            _PROBE: _node("WanVAEBenchMemory", value=[_DECODE, 0]),
        }
        if sample_s:
            made[_SAMPLER] = _node("WanVAEBenchSampler", samples=[_LATENT, 0], seconds=sample_s)
            made[_DECODE]["inputs"]["samples"] = [_SAMPLER, 0]
        return made


def _node(class_type: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


@dataclass(frozen=True)
class ColdRow:
    """One measurement. ms: of the node, by ComfyUI's messages; decode_ms: of these, the decode as
    its report counts it; speed: of the sampler in front of it, steps a second. said: lines of our
    pack in ComfyUI's log. host_ms: of the host by phase, by its report."""

    what: str
    ms: float
    decode_ms: float
    speed: float | None = None
    said: tuple[str, ...] = ()
    host_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def own_ms(self) -> float:
        """What the node takes beside the decode."""
        return self.ms - self.decode_ms

    def in_a_line(self) -> str:
        """What was measured, and its times."""
        return f"{self.what}: {self.ms:.1f} ms, of these the decode {self.decode_ms:.1f}"

    def as_dict(self) -> dict[str, object]:
        """The row for a JSON file."""
        return asdict(self)


def cold_rows(case: ColdCase, folder: Path, start: Start) -> Iterator[ColdRow]:
    """Measure. start(name, variables): a ComfyUI with these environment variables, as a context.

    Raises RuntimeError if a prompt fails.
    """
    alone, meanwhile = _caches(folder / "alone"), _caches(folder / "meanwhile")
    with start("alone", alone | {"WAN_VAE_AHEAD": "0"}) as server:
        yield _measured(server, case, "first decode, alone, empty caches", case.video, 1)
        yield _warm(server, case, "warm decode", case.video, _WARM)
        yield _measured(server, case, "sampler, nothing compiles", case.video, 2, case.sample_s / 2)
        for shape in case.images:
            _, _, _, height, width = pixel_shape(shape, case.config)
            size = f"image {width} x {height}"
            yield _measured(server, case, f"first {size}", shape, 1)
            yield _warm(server, case, f"warm {size}", shape, _WARM_IMAGE)
    with start("next", alone | {"WAN_VAE_AHEAD": "0"}) as server:
        yield _measured(server, case, "first decode of the next process", case.video, 1)
    with start("meanwhile", meanwhile) as server:
        what = f"first decode after {case.sample_s:g} s of sampling, empty caches"
        yield _measured(server, case, what, case.video, 1, case.sample_s)
        yield _warm(server, case, "warm decode", case.video, _WARM)


def _caches(folder: Path) -> dict[str, str]:
    return {name: str(folder / name.lower()) for name in CACHE_VARIABLES}


def _measured(
    server: Comfy,
    case: ColdCase,
    what: str,
    shape: tuple[int, ...],
    seed: int,
    sample_s: float = 0.0,
) -> ColdRow:
    clock = NodeClock(_DECODE)
    run = server.run(case.prompt(shape, seed, sample_s), on_message=clock.hear)
    if run.error is not None:
        raise RuntimeError(f"{what}: {run.error['exception_message']}")
    report = run.report(_DECODE)
    speed = run.outputs[_SAMPLER]["speed"][0] if sample_s else None
    # Without the colours that newer ComfyUIs give the level.
    lines = re.sub(r"\x1b\[[0-9;]*m", "", server.log_text()).splitlines()
    said = tuple(line for line in lines if "Wan VAE:" in line)
    host_ms = report.get("host_ms", {})
    return ColdRow(what, clock.ms, report["duration_ms"], speed, said, host_ms)


def _warm(
    server: Comfy, case: ColdCase, what: str, shape: tuple[int, ...], repeats: int
) -> ColdRow:
    """The median of `repeats`."""
    rows = [_measured(server, case, what, shape, 10 + i) for i in range(repeats)]
    middle = statistics.median(row.ms for row in rows)
    return min(rows, key=lambda row: abs(row.ms - middle))


def cold_lines(rows: list[ColdRow]) -> list[str]:
    """The rows as a table, and what the process that compiles did to the sampler."""
    lines = [
        "| what | node, ms | of these the decode | beside it | sampler, steps a second |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        speed = "" if row.speed is None else f"{row.speed:.2f}"
        numbers = f"{row.ms:.1f} | {row.decode_ms:.1f} | {row.own_ms:.1f}"
        lines.append(f"| {row.what} | {numbers} | {speed} |")
    speeds = [row.speed for row in rows if row.speed is not None]
    if len(speeds) == 2 and speeds[0]:
        change = speeds[1] / speeds[0] - 1
        lines += ["", f"The sampler's speed while kernels are compiled: {change:+.1%}."]
    phases = list(dict.fromkeys(phase for row in rows for phase in row.host_ms))
    if phases:
        lines += ["", f"| milliseconds of the host | {' | '.join(phases)} |"]
        lines.append(f"|---|{'---:|' * len(phases)}")
    for row in rows if phases else ():
        numbers = (f"{row.host_ms.get(phase, 0.0):.1f}" for phase in phases)
        lines.append(f"| {row.what} | {' | '.join(numbers)} |")
    said = dict.fromkeys(line for row in rows for line in row.said)
    return [*lines, *(["", *(f"- {line}" for line in said)] if said else [])]
