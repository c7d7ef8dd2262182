"""Reports and plans as lines of text, for the command line and for nodes that return a string."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from ..planning.plan import Plan
from ..report import DecodeReport, LayerRecord, VideoRecord
from ..said import listed, said

# A line of text: its label and what it says. Lines without a label continue the one above.
Row = tuple[str, str]
# What a person calls the memory formats of a report.
_FORMAT_NAMES = {"either": said("format.either", "layout-free (1x1x1)")}


def report_text(
    report: DecodeReport, *, dtypes: Mapping[str, int] | None = None, all_layers: bool = False
) -> str:
    """The report of a run or an inspection: what, where, which memory format and why, how fast.

    dtypes: how many stored weights are of each dtype, if the caller knows. all_layers: list each
    layer; otherwise they are counted.
    """
    return rows_text(report_rows(report, dtypes=dtypes, all_layers=all_layers))


def report_rows(
    report: DecodeReport, *, dtypes: Mapping[str, int] | None = None, all_layers: bool = False
) -> list[Row]:
    """The rows of `report_text`. Those of an inspection have keys, as sentences of a report do."""
    layout = report.layout
    rows: list[Row] = [
        (said("row.model", "model"), _model(report.config)),
        (
            said("row.compute", "compute"),
            said(
                "inspect.compute",
                "{dtype} on {device} ({name})",
                dtype=report.dtype,
                device=report.device,
                name=report.device_name,
            ),
        ),
        (
            said("row.layout", "layout"),
            said(
                "inspect.layout",
                "{chosen} (requested: {requested}; {reason})",
                chosen=layout.chosen,
                requested=layout.requested,
                reason=layout.reason,
            ),
        ),
    ]
    if dtypes is not None:
        found = said("inspect.weights", "as loaded: {counts}", counts=counts(dtypes))
        rows.append((said("row.weights", "weights"), found))
    rows.append(
        (
            said("row.conv3d", "conv3d"),
            said(
                "inspect.conv3d",
                "weights as loaded: {loaded}; as used: {used}",
                loaded=counts(layout.weights_found),
                used=counts(layout.weights_used),
            ),
        )
    )
    if report.operation != "inspect":
        rows += _run_rows(report)
    rows += _backend_rows(report.backends_used, report.layers, all_layers)
    rows += [
        (
            said("row.off", "not used"),
            said(
                "inspect.off",
                "{op} {backend}: {reason}",
                op=off.op,
                backend=off.backend,
                reason=off.reason,
            ),
        )
        for off in report.backends_off
    ]
    rows += [(said("row.fallback", "fallback"), text) for text in report.fallbacks]
    rows += [(said("row.warning", "warning"), text) for text in report.warnings]
    return rows


def plan_text(plan: Plan, *, all_layers: bool = False) -> str:
    """What a run of `plan` will do, why, and how much memory it takes."""
    latent, pixels = list(plan.latent_shape), list(plan.pixel_shape)
    source, result = (pixels, latent) if plan.operation == "encode" else (latent, pixels)
    layout, choices = plan.layout, plan.choices
    rows = [
        ("plan", f"{plan.operation} {source} -> {result}"),
        ("compute", f"{plan.dtype} on {plan.device}"),
        ("layout", f"{layout.chosen} (requested: {layout.requested}; {layout.reason})"),
        *_backend_rows(choices.used, choices.layers, all_layers),
    ]
    rows += [("not used", f"{r.op} {r.family}: {r.text}") for r in choices.refusals]
    rows.append(("chunks", f"{len(plan.lengths)} (latent frames: {_runs(plan.lengths)})"))
    if plan.pass_elements is None:
        rows.append(("passes", "each chunk in one pass"))
    else:
        rows.append(("passes", f"at most {plan.pass_elements:,} numbers in the features of one"))
    if plan.strips is None:
        rows.append(("strips", "none: the whole picture"))
    else:
        order = "inside each chunk" if plan.whole_frames else "each with all chunks"
        if plan.parked:
            order = f"each with all chunks of a part (latent frames: {_runs(plan.parts)})"
        extra = f"{plan.extra_work:.0%} more multiplications than without strips"
        rows.append(("strips", f"{plan.strips}, {order}; {extra}"))
    if plan.shards is not None:
        bounds = ", ".join(f"{start}-{stop}" for start, stop in plan.shards.bounds)
        rows.append(("shards", f"along the {plan.shards.axis}, latent rows {bounds}"))
    rows += [
        ("memory", f"planned peak: {gibibytes(plan.planned_bytes)}, above weights and result"),
        ("", f"weights: {gibibytes(plan.weights_bytes)}"),
        ("", f"result in float32: {gibibytes(4 * prod(result))}"),
        ("", f"free on the device: {gibibytes(plan.free_bytes)}"),
    ]
    rows += [("note", text) for text in plan.notes]
    return rows_text(rows)


def count(n: int, noun: str) -> str:
    """`n` and its noun: "1 chunk", "2 chunks"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def counts(numbers: Mapping[str, int]) -> str:
    """How many there are of each kind: "31 contiguous, 1 layout-free (1x1x1)"."""
    parts = [
        said("inspect.count", "{count} {kind}", count=n, kind=_FORMAT_NAMES.get(name, name))
        for name, n in numbers.items()
        if n
    ]
    return listed(parts) or said("inspect.none", "none")


def gibibytes(size: float | None) -> str:
    """A size in GiB, or "unknown"."""
    return "unknown" if size is None else f"{size / 2**30:.2f} GiB"


def rows_text(rows: Iterable[Row]) -> str:
    """`rows` as lines, one below the other."""
    return "\n".join(f"{label:<9} {text}" for label, text in rows)


def _model(config: Mapping[str, object]) -> str:
    factor = config["decoded_factor"]
    parts = []
    if config["decoder_colours"] == 1:
        parts.append(said("inspect.grey", "grey pictures"))
    if config["decoder_colours"] == 4:
        parts.append(said("inspect.alpha", "pictures with alpha"))
    if factor != config["spatial_factor"]:
        parts.append(said("inspect.doubled", "twice as large as what was encoded"))
    if config["image_only"]:
        parts.append(said("inspect.images", "images only"))
    if not config.get("has_encoder", True):
        parts.append(said("inspect.no_encoder", "no encoder"))
    text = said(
        "inspect.model",
        "{family} VAE: {channels} latent channels, width {encoder} / {decoder}, {factor}x{factor} "
        "pixels per latent pixel",
        family=config["family"],
        channels=config["z_dim"],
        encoder=config["dim"],
        decoder=config["decoder_dim"],
        factor=factor,
    )
    return listed([text, *parts])


def _run_rows(report: DecodeReport) -> list[Row]:
    layout, memory = report.layout, report.memory
    latent, pixels = list(report.latent_shape or ()), list(report.pixel_shape or ())
    if report.operation == "encode":
        shapes = ("pixels", f"{pixels} {layout.latent_format} -> latent {latent}")
    else:
        shapes = ("latent", f"{latent} {layout.latent_format} -> pixels {pixels}")
    rows = [
        shapes,
        ("formats", f"format conversions: {layout.conversions}"),
        ("", f"calls with mixed formats (should be 0): {layout.mixed_calls}"),
        (
            "time",
            f"{(report.duration_ms or 0) / 1e3:.2f} s, {report.frames_per_s or 0:.1f} frames/s, "
            f"{count(len(report.chunks), 'chunk')}, {count(report.strips, 'strip')}",
        ),
    ]
    if memory.peak_bytes is not None:
        planned = gibibytes(memory.planned_bytes)
        rows.append(("memory", f"peak {gibibytes(memory.peak_bytes)} (planned: {planned})"))
    if report.video is not None:
        rows += _video_rows(report.video)
    return rows


def _video_rows(video: VideoRecord) -> list[Row]:
    on_encoder, on_decoder = video.waited_for_encoder_ms / 1e3, video.waited_for_decoder_ms / 1e3
    rate = "" if video.fps is None else f" at {video.fps:g} frames/s"
    return [
        ("video", f"{count(video.frames, 'frame')}{rate} by {video.encoder}"),
        (
            "",
            f"waited for the {video.waited_for}: decode {on_encoder:.2f} s for the encoder, "
            f"encoder {on_decoder:.2f} s for the decode",
        ),
    ]


def _backend_rows(
    used: Mapping[str, str], layers: Sequence[LayerRecord], all_layers: bool
) -> list[Row]:
    """The backend of each operation, and the layers: counted by format and backend, or listed."""
    operations: defaultdict[str, list[str]] = defaultdict(list)
    for op, backend in used.items():
        operations[backend].append(op)
    texts = [f"{backend}: {', '.join(ops)}" for backend, ops in operations.items()]
    rows = _labelled(said("row.backends", "backends"), texts)
    groups: defaultdict[tuple[str, str, str], list[LayerRecord]] = defaultdict(list)
    for layer in layers:
        groups[layer.op, layer.format, layer.backend].append(layer)
    rows += _labelled(
        said("row.layers", "layers"),
        [
            said(
                "inspect.layers",
                "{count} {op} {format} {backend}{gains}",
                count=len(group),
                op=op,
                format=_FORMAT_NAMES.get(name, name),
                backend=backend,
                gains=_gains(group),
            )
            for (op, name, backend), group in groups.items()
        ],
    )
    if all_layers:
        rows += [(said("row.layer", "layer"), _layer(layer)) for layer in layers]
    return rows


def _layer(layer: LayerRecord) -> str:
    shape = "x".join(map(str, layer.shape))
    return said(
        "inspect.layer",
        "{name} {op} {shape} {format} {runs}{gains}",
        name=f"{layer.name:<42}",
        op=layer.op,
        shape=f"{shape:<16}",
        format=_FORMAT_NAMES.get(layer.format, layer.format),
        runs=f"{layer.backend} {layer.kernel}".strip(),
        gains=_gains([layer]),
    )


def _gains(layers: Sequence[LayerRecord]) -> str:
    """How many times faster than eager the layers are: ", 2.8x", ", 1.2x to 3.1x"; or nothing."""
    gains = sorted(layer.gain for layer in layers if layer.gain is not None)
    if not gains:
        return ""
    least, most = (f"{gain:.1f}x" for gain in (gains[0], gains[-1]))
    if least == most:
        return f", {least}"
    return said("inspect.gains", ", {least} to {most}", least=least, most=most)


def _labelled(label: str, texts: Sequence[str]) -> list[Row]:
    """A line for each text, the label on the first."""
    return [(label if i == 0 else "", text) for i, text in enumerate(texts)]


def _runs(lengths: Sequence[int]) -> str:
    """Chunk lengths with repetitions counted: "1, 5 x 4"."""
    groups: list[tuple[int, int]] = []
    for length in lengths:
        if groups and groups[-1][1] == length:
            groups[-1] = (groups[-1][0] + 1, length)
        else:
            groups.append((1, length))
    return ", ".join(f"{n} x {length}" if n > 1 else str(length) for n, length in groups)
