"""DecodeReport: a frozen record of what one run did. `as_dict()` is the panel's wire format.

A run fills in a mutable `ReportBuilder`; `build()` freezes it, at the end and for each progress
event. Names of fields end in their unit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch

from .config import WanVAEConfig
from .device import device_name, versions
from .said import reworded, worded

SCHEMA = "wan_vae.report/1"


@dataclass(frozen=True)
class LayerRecord:
    """One convolution: native name, operation, shape of its weight, format and backend.

    `format`: memory format of the weight as used (contiguous, channels_last_3d, either, other).
    `backend`: what runs this layer. `kernel`: which of its kernels in which configuration; empty
    for eager. `gain`: how many times faster than eager it was when it was chosen on this card; None
    if that was not measured, or eager runs it.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    format: str
    backend: str
    kernel: str = ""
    # A measurement, no part of what was chosen.
    gain: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ChunkRecord:
    """One chunk: latent frames [start, stop), number of pixel frames, milliseconds so far.

    `frames` counts all pixel frames of the chunk, also before they are finished.
    """

    start: int
    stop: int
    is_first: bool
    frames: int
    duration_ms: float


@dataclass(frozen=True)
class BackendOff:
    """A backend that was not used for an operation, and the reason."""

    op: str
    backend: str
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """The part of one rank: latent rows [start_row, stop_row), and what it exchanged.

    If `axis` is "width", all rows are columns, also those of the halo.
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
    """Memory formats: requested, chosen and why; weights as found and as used; the latent's.

    `conversions` counts convolution inputs that were converted to the format of their weight.
    `mixed_calls` counts convolutions whose input and weight had different formats; normally 0.
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
    """Bytes: free before the start, planned, peak above the start, output, weights; and what waits
    in host memory while strips are decoded.

    `peak_bytes` and `free_bytes` are None if the device does not count them (the CPU).
    """

    free_bytes: int | None = None
    planned_bytes: int | None = None
    peak_bytes: int | None = None
    output_bytes: int | None = None
    weights_bytes: int | None = None
    host_bytes: int | None = None


@dataclass(frozen=True)
class ChannelRecord:
    """Mean and standard deviation of one channel of a latent, and those of latents of its VAE."""

    mean: float
    deviation: float
    vae_mean: float
    vae_deviation: float


@dataclass(frozen=True)
class VideoRecord:
    """A video that was written while it was decoded.

    encoder: FFmpeg's name of the one that ran. waited_for_encoder_ms: how long the decode waited
    for the encoder to take a frame, and at the end to finish; waited_for_decoder_ms: how long the
    encoder waited for a frame. flight_bytes: host memory that frames between the two take at most.
    fps: frames a second of the file; None in reports that did not say it.
    """

    encoder: str
    frames: int
    waited_for_encoder_ms: float
    waited_for_decoder_ms: float
    flight_bytes: int
    fps: float | None = None

    @property
    def waited_for(self) -> str:
        """The slower of the two: "encoder" or "decoder"."""
        slower = self.waited_for_encoder_ms > self.waited_for_decoder_ms
        return "encoder" if slower else "decoder"


@dataclass(frozen=True)
class DecodeReport:
    """What one decode, encode or inspection did. `as_dict()` returns values for JSON."""

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
    # How often memory ran out and the run started over; `fallbacks` say why.
    restarts: int = 0
    fallbacks: tuple[str, ...] = ()
    memory: MemoryRecord = field(default_factory=MemoryRecord)
    shards: tuple[ShardRecord, ...] = ()
    # Pixel frames of all videos of a batch.
    done_frames: int = 0
    total_frames: int = 0
    duration_ms: float | None = None
    frames_per_s: float | None = None
    # Of a run under way, once it has made more than the first frame: how long the others will take.
    left_ms: float | None = None
    warnings: tuple[str, ...] = ()
    versions: dict[str, str | None] = field(default_factory=dict)
    # What was planned, without what stands above: see `Plan.summary`; None if nothing was.
    plan: dict[str, object] | None = None
    # None if no video was written.
    video: VideoRecord | None = None
    # The channels of a latent that looks like the other kind, in order; a warning says so.
    latent_channels: tuple[ChannelRecord, ...] = ()
    # Milliseconds of the host by phase, in order; see `ReportBuilder.lap` and `WorkerPool`.
    host_ms: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """Return the wire format `wan_vae.report/1`: dicts, lists, strings, numbers, bools, None.

        Keys are the field names of this class, with three exceptions: `schema` comes first,
        `backends_used` and `backends_off` become `backends: {used, off}`, and `worded` has the keys
        and values of sentences, for readers of other languages (see `said.worded`).
        """
        plain: dict[str, object] = {"schema": SCHEMA, **_jsonable_fields(self)}
        plain["backends"] = {"used": plain.pop("backends_used"), "off": plain.pop("backends_off")}
        reasons = (self.error, self.layout.reason, *(off.reason for off in self.backends_off))
        plain["worded"] = worded((*reasons, *self.warnings, *self.fallbacks))
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> DecodeReport:
        """Rebuild the report from the result of `as_dict`, of this process or another."""
        elsewhere = ("schema", "backends", "worded")
        values: dict[str, Any] = {k: v for k, v in plain.items() if k not in elsewhere}
        words = plain.get("worded", {})
        for name in ("warnings", "fallbacks"):
            values[name] = [reworded(sentence, words) for sentence in values[name]]
        layout = values["layout"]
        values["layout"] = LayoutRecord(**{**layout, "reason": reworded(layout["reason"], words)})
        if values["error"] is not None:
            values["error"] = reworded(values["error"], words)
        values["memory"] = MemoryRecord(**values["memory"])
        values["backends_used"] = plain["backends"]["used"]
        values["backends_off"] = [
            BackendOff(**{**v, "reason": reworded(v["reason"], words)})
            for v in plain["backends"]["off"]
        ]
        values["layers"] = [
            LayerRecord(**{**v, "shape": tuple(v["shape"])}) for v in plain["layers"]
        ]
        values["chunks"] = [ChunkRecord(**v) for v in plain["chunks"]]
        values["shards"] = [ShardRecord(**v) for v in plain["shards"]]
        channels = plain.get("latent_channels", ())  # which older reports do not have
        values["latent_channels"] = [ChannelRecord(**v) for v in channels]
        if plain.get("video") is not None:
            values["video"] = VideoRecord(**plain["video"])
        for name, value in values.items():
            if isinstance(value, list):
                values[name] = tuple(value)
        return cls(**values)


def _jsonable_fields(record: object) -> dict[str, object]:
    # Not `asdict`, which copies all values first: a run makes a report after each pass. And without
    # a call for each of a thousand values, most of which stay as they are.
    return {
        name: value if type(value) in _PLAIN else _jsonable(value)
        for name, value in vars(record).items()
    }


# What JSON has as it is; not classes made of them, such as `said.Said`.
_PLAIN = (int, float, bool, str, type(None))


def _jsonable(value: object) -> object:
    if type(value) in _PLAIN:
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return _jsonable_fields(value)
    if isinstance(value, dict):
        return {str(k): v if type(v) in _PLAIN else _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [v if type(v) in _PLAIN else _jsonable(v) for v in value]
    # Sentences of `said` become plain: what knows their keys is in `worded`.
    return str.__str__(value) if isinstance(value, str) else value


class ReportBuilder:
    """Collects facts while an operation runs; `build()` freezes them into a report."""

    def __init__(
        self, operation: str, config: WanVAEConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.operation = operation
        self.config = config.as_dict()
        self.device = device
        self.dtype = dtype
        self.latent_shape: tuple[int, ...] | None = None
        self.pixel_shape: tuple[int, ...] | None = None
        self.precision_requested = "auto"
        # What the device behaves as, in words, if not as itself.
        self.imitation: str | None = None
        self.strips = 1
        self.restarts = 0
        self.plan: dict[str, object] | None = None
        self.layout: dict[str, Any] = {}
        self.memory: dict[str, int | None] = {}
        self.video: VideoRecord | None = None
        self.layers: list[LayerRecord] = []
        self.backends_used: dict[str, str] = {}
        self.backends_off: list[BackendOff] = []
        self.chunks: list[ChunkRecord] = []
        self.fallbacks: list[str] = []
        self.shards: list[ShardRecord] = []
        self.warnings: list[str] = []
        self.done_frames = 0
        self.total_frames = 0
        # Frames and milliseconds of the first pass, from which on the pace is counted.
        self._first_pass: tuple[int, float] | None = None
        self.host_ms: dict[str, float] = {}
        self._started = self._lap_started = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap (or the creation of the builder) to `phase`.

        It is the host's time: a device may be done later.
        """
        now = time.perf_counter()
        self.host_ms[phase] = self.host_ms.get(phase, 0.0) + (now - self._lap_started) * 1e3
        self._lap_started = now

    def build(self, status: str, error: str | None = None) -> DecodeReport:
        """Make a report of what is known now. `duration_ms` counts from the builder's creation."""
        seconds = time.perf_counter() - self._started
        done, total = self.done_frames, self.total_frames
        name = device_name(self.device)
        return DecodeReport(
            operation=self.operation,
            status=status,
            error=error,
            config=self.config,
            device=str(self.device),
            device_name=name if self.imitation is None else f"{name} {self.imitation}",
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
            done_frames=done,
            total_frames=total,
            duration_ms=seconds * 1e3,
            frames_per_s=done / seconds if done and seconds > 0 else None,
            left_ms=self._left_ms(seconds * 1e3) if status == "running" and done else None,
            versions=versions(),
            latent_shape=self.latent_shape,
            pixel_shape=self.pixel_shape,
            precision_requested=self.precision_requested,
            strips=self.strips,
            restarts=self.restarts,
            plan=self.plan,
            video=self.video,
            host_ms=dict(self.host_ms),
        )

    def _left_ms(self, spent_ms: float) -> float | None:
        """How long the missing frames take at the pace of those behind the first pass.

        The first pass waits for much that comes once, and may be the first frame of each video,
        which takes less than the later ones: from that alone nobody knows (None).
        """
        if self._first_pass is None or self.done_frames < self._first_pass[0]:  # started again
            self._first_pass = self.done_frames, spent_ms
        first_frames, first_ms = self._first_pass
        missing, paced = self.total_frames - self.done_frames, self.done_frames - first_frames
        if paced:
            return (spent_ms - first_ms) * missing / paced
        videos = self.latent_shape[0] if self.latent_shape else 1
        is_known = not missing or self.done_frames > videos
        return spent_ms * missing / self.done_frames if is_known else None


def of_batch(reports: Sequence[DecodeReport], videos: int) -> DecodeReport:
    """One report of a batch of `videos` whose runs so far are `reports`, one for each.

    Frames, times and outputs are sums, peaks are maxima, and a sentence stands once. Everything
    else is that of the last run, with shapes of the whole batch.
    """
    last = reports[-1]
    per_video = last.total_frames
    done = sum(report.done_frames for report in reports)
    spent_ms = sum(report.duration_ms or 0.0 for report in reports)
    left_ms = last.left_ms
    if left_ms is not None:
        whole_ms = (last.duration_ms or 0.0) + left_ms
        left_ms += whole_ms * (videos - len(reports))
    records = [report.memory for report in reports]
    peaks = [record.peak_bytes for record in records if record.peak_bytes is not None]
    return replace(
        last,
        latent_shape=_batched(last.latent_shape, videos),
        pixel_shape=_batched(last.pixel_shape, videos),
        done_frames=done,
        total_frames=per_video * videos,
        duration_ms=spent_ms,
        frames_per_s=done / spent_ms * 1e3 if done and spent_ms else None,
        left_ms=left_ms,
        chunks=tuple(chunk for report in reports for chunk in report.chunks),
        warnings=_once(report.warnings for report in reports),
        fallbacks=_once(report.fallbacks for report in reports),
        memory=replace(
            last.memory,
            peak_bytes=max(peaks, default=None),
            output_bytes=sum(r.output_bytes or 0 for r in records),
        ),
    )


def _batched(shape: tuple[int, ...] | None, videos: int) -> tuple[int, ...] | None:
    return None if shape is None else (videos, *shape[1:])


def _once(sentences: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one for some in sentences for one in some))
