"""What `wan-vae bench ranks` found, and how it reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from benchmarks.suite.facts import Facts

SCHEMA = "wan_vae.bench.ranks/1"


@dataclass(frozen=True)
class Check:
    """One comparison with one device."""

    ranks: int
    name: str
    passed: bool
    said: str


@dataclass(frozen=True)
class Timing:
    """One case on `ranks` devices. `image_ms`: LATENT to IMAGE, both on the host, median; with
    `device_ms`, the chunks of the slowest rank. Halo bytes, waits and peaks are the largest of any
    rank; waits include the wait for slower ranks. Speed-ups are over one rank."""

    case: str
    ranks: int
    latent_frames: int
    image_ms: float
    image_min_ms: float
    image_max_ms: float
    device_ms: float
    chunks: int
    halo_bytes_a_chunk: float
    wait_ms_a_chunk: float
    peak_bytes: int | None
    speed_up: float | None = None
    device_speed_up: float | None = None
    model_speed_up: float | None = None
    emulated_speed_up: float | None = None


@dataclass(frozen=True)
class Fault:
    """One planted fault: how long until it was named, and what was said."""

    ranks: int
    name: str
    passed: bool
    seconds: float
    said: str


@dataclass
class RanksResults:
    """Everything that one run found. `devices`: the most that it used; `seconds` for everything."""

    facts: Facts
    devices: int
    seconds: float = 0.0
    backends: dict[int, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def passed(self, ranks: int) -> bool:
        """Whether the picture on `ranks` ranks was right."""
        return all(c.passed for c in self.checks if c.ranks == ranks)

    @property
    def all_good(self) -> bool:
        """Nothing that ran failed."""
        return all(c.passed for c in self.checks) and all(f.passed for f in self.faults)

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        found = asdict(self)
        del found["facts"]
        return {**self.facts.as_dict(), **found}


def ranks_markdown(results: RanksResults) -> str:
    """The results as Markdown."""
    lines = ["# One decode over several devices", "", *results.facts.lines()]
    lines += [f"- devices: {results.devices}", f"- seconds: {results.seconds:.0f}"]
    lines += [f"- transport on {n} ranks: {name}" for n, name in results.backends.items()]
    lines += ["", "## Correct", "", "| ranks | what | | found |", "|---:|---|---|---|"]
    lines += [f"| {c.ranks} | {c.name} | {_word(c.passed)} | {c.said} |" for c in results.checks]
    lines += [
        "",
        "## Time",
        "",
        "LATENT to IMAGE on the host, median (min to max); the device's part; speed-ups over one",
        "rank, with what the model (scaling.py) and the emulation on one device said for NVLink.",
        "",
        "| case | ranks | image ms | speed-up | device ms | speed-up | model | emulated "
        "| chunks | halo MB a chunk | wait ms a chunk | peak GiB a rank |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for t in results.timings:
        peak = "" if t.peak_bytes is None else f"{t.peak_bytes / 2**30:.2f}"
        lines.append(
            f"| {t.case} | {t.ranks} | {t.image_ms:.1f} ({t.image_min_ms:.1f} to "
            f"{t.image_max_ms:.1f}) | {_times(t.speed_up)} | {t.device_ms:.1f} | "
            f"{_times(t.device_speed_up)} | {_times(t.model_speed_up)} | "
            f"{_times(t.emulated_speed_up)} | {t.chunks} | {t.halo_bytes_a_chunk / 1e6:.2f} | "
            f"{t.wait_ms_a_chunk:.2f} | {peak} |"
        )
    lines += ["", "## Faults", "", "| ranks | what | | seconds | said |", "|---:|---|---|---:|---|"]
    lines += [
        f"| {f.ranks} | {f.name} | {_word(f.passed)} | {f.seconds:.1f} | {f.said} |"
        for f in results.faults
    ]
    if results.skipped:
        lines += ["", "## Not run", ""]
        lines += [f"- {text}" for text in results.skipped]
    return "\n".join(lines) + "\n"


def _word(passed: bool) -> str:
    return "right" if passed else "**wrong**"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
