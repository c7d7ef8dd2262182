"""DecodeReport: what happened, in units, frozen. `as_dict()` is the wire format of the panel.

Last step of the sentence: pixels stream out, and a report says what happened. `ReportBuilder` is
the mutable side that a decode fills in; `build()` freezes it, at the end or for a progress event.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch

from .device import device_name, versions

SCHEMA = "wan_vae.report/1"


@dataclass(frozen=True)
class LayerRecord:
    """One convolution: native name, operation, weight shape, memory format of its weight as used
    (contiguous, channels_last_3d, either, other) and the backend that runs it."""

    name: str
    op: str
    shape: tuple[int, ...]
    format: str
    backend: str


@dataclass(frozen=True)
class ChunkRecord:
    """One chunk: latent frames [start, stop), its pixel frames, milliseconds of its passes so far.

    `frames` are all that the chunk makes, also while it is under way."""

    start: int
    stop: int
    is_first: bool
    frames: int
    duration_ms: float


@dataclass(frozen=True)
class BackendOff:
    """A backend that was not used for an operation, and why."""

    op: str
    backend: str
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """One rank's share: latent rows [start_row, stop_row), what it exchanged.

    Where `axis` is "width" its rows are columns, those of the halo too.
    """

    rank: int
    device: str
    axis: str
    start_row: int
    stop_row: int
    halo_rows: int
    halo_bytes: int
    wait_ms: float


@dataclass(frozen=True)
class LayoutRecord:
    """Memory formats: asked for, chosen and why; weights as found and as used; the latent's.

    `conversions` counts convolution inputs that were matched to their weight (mixed calls
    prevented); `mixed_calls` counts convolutions that ran with differing formats: 0 is normal.
    """

    requested: str = "auto"
    chosen: str = "contiguous"
    reason: str = ""
    latent_format: str = "contiguous"
    weights_found: dict[str, int] = field(default_factory=dict)
    weights_used: dict[str, int] = field(default_factory=dict)
    conversions: int = 0
    mixed_calls: int = 0


@dataclass(frozen=True)
class MemoryRecord:
    """Bytes: free on the device before the start, planned, peak above the start, output, weights.
    `peak_bytes` and `free_bytes` are None where the device does not count them (the CPU)."""

    free_bytes: int | None = None
    planned_bytes: int | None = None
    peak_bytes: int | None = None
    output_bytes: int | None = None
    weights_bytes: int | None = None


@dataclass(frozen=True)
class DecodeReport:
    """What one decode, encode or inspection did. `as_dict()` gives JSON-ready values."""

    operation: str
    status: str
    config: dict[str, object]
    error: str | None = None
    latent_shape: tuple[int, ...] | None = None
    pixel_shape: tuple[int, ...] | None = None
    device: str = "cpu"
    device_name: str = ""
    dtype: str = "float32"
    precision_requested: str = "auto"
    layout: LayoutRecord = field(default_factory=LayoutRecord)
    layers: tuple[LayerRecord, ...] = ()
    backends_used: dict[str, str] = field(default_factory=dict)
    backends_off: tuple[BackendOff, ...] = ()
    chunks: tuple[ChunkRecord, ...] = ()
    strips: int = 1
    fallbacks: tuple[str, ...] = ()
    memory: MemoryRecord = field(default_factory=MemoryRecord)
    shards: tuple[ShardRecord, ...] = ()
    done_frames: int = 0
    total_frames: int = 0
    duration_ms: float | None = None
    frames_per_s: float | None = None
    warnings: tuple[str, ...] = ()
    versions: dict[str, str | None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """The wire format `wan_vae.report/1`: only dicts, lists, strings, numbers, booleans, None.

        Field names are those of this class, except that `backends_used` and `backends_off` become
        `backends: {used, off}`; a `schema` key comes first. Nested records keep their names, and
        every size, time and count has its unit in its name.
        """
        plain = {"schema": SCHEMA, **asdict(self)}
        plain["backends"] = {"used": plain.pop("backends_used"), "off": plain.pop("backends_off")}
        return _jsonable(plain)

    @classmethod
    def from_dict(cls, plain: Mapping[str, object]) -> DecodeReport:
        """The report that `as_dict` made `plain` of, in this process or another."""
        values = {k: v for k, v in plain.items() if k not in ("schema", "backends")}
        values["layout"] = LayoutRecord(**values["layout"])
        values["memory"] = MemoryRecord(**values["memory"])
        values["backends_used"] = plain["backends"]["used"]
        values["backends_off"] = [BackendOff(**v) for v in plain["backends"]["off"]]
        values["layers"] = [
            LayerRecord(**{**v, "shape": tuple(v["shape"])}) for v in plain["layers"]
        ]
        values["chunks"] = [ChunkRecord(**v) for v in plain["chunks"]]
        values["shards"] = [ShardRecord(**v) for v in plain["shards"]]
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _jsonable(value):
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return value


class ReportBuilder:
    """Collects facts while an operation runs; `build()` makes the frozen report of this moment."""

    def __init__(self, operation: str, config, device: torch.device, dtype: torch.dtype):
        self.operation = operation
        self.config = config.as_dict()
        self.device = device
        self.dtype = dtype
        self.values: dict[str, object] = {}
        self.layout: dict[str, object] = {}
        self.memory: dict[str, int | None] = {}
        self.layers: list[LayerRecord] = []
        self.backends_used: dict[str, str] = {}
        self.backends_off: list[BackendOff] = []
        self.chunks: list[ChunkRecord] = []
        self.fallbacks: list[str] = []
        self.shards: list[ShardRecord] = []
        self.warnings: list[str] = []
        self.done_frames = 0
        self.total_frames = 0
        self._started = time.perf_counter()

    def build(self, status: str, error: str | None = None) -> DecodeReport:
        """Freeze what is known now; `duration_ms` counts from the builder's creation."""
        seconds = time.perf_counter() - self._started
        return DecodeReport(
            operation=self.operation,
            status=status,
            error=error,
            config=self.config,
            device=str(self.device),
            device_name=device_name(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            layout=LayoutRecord(**self.layout),
            memory=MemoryRecord(**self.memory),
            layers=tuple(self.layers),
            backends_used=dict(self.backends_used),
            backends_off=tuple(self.backends_off),
            chunks=tuple(self.chunks),
            fallbacks=tuple(self.fallbacks),
            shards=tuple(self.shards),
            warnings=tuple(self.warnings),
            done_frames=self.done_frames,
            total_frames=self.total_frames,
            duration_ms=seconds * 1e3,
            frames_per_s=self.done_frames / seconds if self.done_frames and seconds > 0 else None,
            versions=versions(),
            **self.values,
        )
