"""One device against several in a running ComfyUI: the cases, their runs, and how they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.suite.node_runs import (
    ACCELERATE,
    VAE_FILE,
    VAE_FILE_22,
    NodeCase,
    NodeRow,
    difference,
    host_phases,
    measure,
    timed_run,
)
from tests.comfy.server import Comfy

# On the CPU a library takes other kernels for half a picture: of the spread of the numbers.
_CPU_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Pair:
    """The same work on one device and on several."""

    name: str
    one: NodeCase
    several: NodeCase


@dataclass(frozen=True)
class PairRows:
    """What one pair took."""

    name: str
    one: NodeRow
    several: NodeRow

    @property
    def speed_up(self) -> float:
        return self.one.median_ms / self.several.median_ms

    def in_a_line(self) -> str:
        """The two times and the difference."""
        return (
            f"one device {self.one.median_ms:.1f} ms, several {self.several.median_ms:.1f} ms, "
            f"difference {self.several.difference}"
        )

    def faults(self, on_cpu: bool) -> list[str]:
        """What is wrong: a run that is not done or fell back, other bits than one device's."""
        found = [*self.one.faults(), *self.several.faults()]
        report = self.several.report or {}
        found += [f"{self.name}: {text}" for text in report.get("fallbacks", ())]
        allowed = _CPU_TOLERANCE if on_cpu else 0.0
        if self.several.difference is None or self.several.difference > allowed:
            found.append(f"{self.name}: differs from one device by {self.several.difference}")
        return found


def pairs(on_cpu: bool, devices: str, wan22: bool, warm: int) -> tuple[Pair, ...]:
    """Decodes of the published sizes, an encode alone and inside image to video, a large image.

    The image is decoded on `devices` because they are named, and once more with `all`, which may
    choose one device.
    """
    if on_cpu:
        large, small, image = (9, 64, 96), (5, 64, 64), (1, 64, 64)
    else:
        large, small, image = (81, 720, 1280), (81, 480, 832), (1, 2048, 2048)

    def decode(size: tuple[int, int, int], which: str = devices, vae: str = VAE_FILE) -> Pair:
        frames, height, width = size
        kind = "image" if frames == 1 else f"video, {frames} frames"
        one = NodeCase("Wan VAE Decode", "WanVAEDecode", *size, warm=warm, vae=vae)
        several = replace(
            one,
            title="Wan VAE Decode (Sharded)",
            node="WanVAEDecodeSharded",
            inputs={"devices": which},
        )
        name = f"decode {width} x {height} {kind}"
        if vae != VAE_FILE:
            name = f"Wan 2.2 {name}"
        return Pair(name if which == devices else f"{name}, {which}", one, several)

    alone = NodeCase("VAE Encode", "VAEEncode", *large, warm=warm, patch=ACCELERATE)
    encode = NodeCase("image to video", "WanImageToVideo", *large, warm=warm, patch=ACCELERATE)
    frames, height, width = large
    return (
        decode(large),
        decode(small),
        *(
            Pair(
                f"encode {width} x {height} video, {frames} frames, in {case.title}",
                case,
                replace(case, patch_inputs={"devices": devices}),
            )
            for case in (alone, encode)
        ),
        decode(image),
        decode(image, "all"),
        *((decode((121, 704, 1280), vae=VAE_FILE_22),) if wan22 else ()),
    )


def measure_pair(server: Comfy, pair: Pair, seed: int, restart: bool) -> PairRows:
    """Run both, compare their results. restart: also a run after the workers were ended.

    Raises RuntimeError if a node fails.
    """
    one = measure(server, pair.one, seed)
    several = measure(server, pair.several, seed)
    apart = difference(server, pair.several, pair.several.comparison_with(pair.one, seed + 90))
    restart_ms: float | None = None
    phases: dict[str, float] = {}
    if restart:
        server.post("/free", {"unload_models": True, "free_memory": True})
        restart_ms, again = timed_run(server, pair.several, seed + 91)
        phases = host_phases(again, pair.several)
    several = replace(several, difference=apart, restart_ms=restart_ms, restart_host_ms=phases)
    return PairRows(pair.name, one, several)


def pairs_markdown(rows: Sequence[PairRows]) -> list[str]:
    """Tables: times and speed-ups; where the host's time goes; the start of new workers."""
    lines = [
        "| what | one device, ms | several, ms | speed-up | first run of several, ms "
        "| with kernels in the cache, ms | difference | ranks |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        report = row.several.report or {}
        shares = ", ".join(
            f"{s['device']} {s['stop_row'] - s['start_row']}" for s in report.get("shards", ())
        )
        restart = "" if row.several.restart_ms is None else f"{row.several.restart_ms:.0f}"
        lines.append(
            f"| {row.name} | {row.one.warm} | {row.several.warm} | {row.speed_up:.2f}x "
            f"| {row.several.first_ms:.0f} | {restart} | {row.several.difference:.1e} "
            f"| {shares or 'one device'} |"
        )
    phases = list(
        dict.fromkeys(p for row in rows for p in (*row.several.host_ms, *row.one.host_ms))
    )
    lines += [
        "",
        "Milliseconds of the host by phase, medians of the warm runs (one device / several).",
        "`rank:` are those of rank 0, within `run`; `rank: chunks` is the time to launch all",
        "chunks, which is hidden where the device is busy; `rank: copies` the wait for the last",
        "pixels.",
        "",
        "| phase | " + " | ".join(row.name for row in rows) + " |",
        "|---|" + "---:|" * len(rows),
    ]
    for phase in phases:
        cells = [f"{_ms(row.one, phase)} / {_ms(row.several, phase)}" for row in rows]
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    devices = [f"{_device_ms(row.one)} / {_device_ms(row.several)}" for row in rows]
    lines.append("| the device, all chunks (last run) | " + " | ".join(devices) + " |")
    for row in rows:
        if row.several.restart_host_ms:
            lines += ["", f"After the workers ended, {row.name}, milliseconds of the host:", ""]
            lines += _phase_table(row.several.restart_host_ms)
    return lines


def _phase_table(phases: Mapping[str, float]) -> list[str]:
    return [
        f"| {' | '.join(phases)} |",
        "|" + "---:|" * len(phases),
        f"| {' | '.join(f'{ms:.1f}' for ms in phases.values())} |",
    ]


def _ms(row: NodeRow, phase: str) -> str:
    return f"{row.host_ms[phase]:.1f}" if phase in row.host_ms else "-"


def _device_ms(row: NodeRow) -> str:
    chunks = (row.report or {}).get("chunks", ())
    return f"{sum(chunk['duration_ms'] for chunk in chunks):.1f}"
