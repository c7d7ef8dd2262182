"""Results as a file to keep: Markdown tables with device, versions, date and command."""

from __future__ import annotations

from pathlib import Path

from benchmarks.suite.cold_start import ColdStart
from benchmarks.suite.comparison import Comparison
from benchmarks.suite.decoders import is_ours
from benchmarks.suite.facts import write_results
from benchmarks.suite.measure import ROUTES, NoNumber, Result, Route
from benchmarks.suite.roofline import Ceilings, Roofline

# Layers below this share of the decode are summed in the table; the JSON file has all.
_SHOWN_SHARE = 0.01
_ROUTE_NAMES: dict[Route, str] = {"device": "on the device", "image": "LATENT to IMAGE"}


def write(results: Comparison, folder: Path) -> None:
    """Write `results.md` and `results.json` into `folder`, replacing those of earlier calls."""
    write_results(folder, "results", comparison_markdown(results), results.as_dict())


def comparison_markdown(results: Comparison) -> str:
    """The whole run: facts, times, ratios, cold starts, layers."""
    lines = [
        *results.facts.lines(),
        "- weights and latents random and the same for all; error is relative, from a float32",
        "  decode; peak is device memory above weights and output",
        *(f"- {note}" for note in results.notes),
        "",
        *(_times(results) if results.rows else ()),
        *_ratios(results),
        *(_cold(results) if results.cold else ()),
        *(_layers(results) if results.rooflines else ()),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _times(results: Comparison) -> list[str]:
    lines = [
        "## Decode",
        "",
        "Latent on the device to pixels on it; then a ComfyUI LATENT on the CPU to a float32 IMAGE",
        "there, with its ratio to the first. Medians, smallest to largest in brackets.",
        "",
        "| case | decoder | dtype | on the device, ms | peak GiB | error "
        "| LATENT to IMAGE, ms | ratio | note |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for case in results.cases:
        for name in results.decoders:
            device, image = (results.find(case, name, route) for route in ROUTES)
            if device is None:
                continue
            dtype = peak = error = ratio = ""
            notes = []
            if isinstance(device, Result):
                dtype, error = device.dtype, f"{device.error:.2e}"
                peak = "" if device.peak_bytes is None else f"{device.peak_bytes / 2**30:.2f}"
                notes.append(device.note)
                if isinstance(image, Result):
                    ratio = f"{image.median_ms / device.median_ms:.2f}"
            for row in (device, image):
                if isinstance(row, NoNumber):
                    notes.append(row.reason)
            note = "; ".join(dict.fromkeys(n for n in notes if n))
            lines.append(
                _row(case, name, dtype, _time(device), peak, error, _time(image), ratio, note)
            )
    return [*lines, ""]


def _ratios(results: Comparison) -> list[str]:
    """The time of the others over ours: above 1, ours is faster."""
    ours = [name for name in results.decoders if is_ours(name)]
    others = [name for name in results.decoders if not is_ours(name)]
    if not ours or not others:
        return []
    lines = [
        "## Times faster than",
        "",
        _row("case", "decoder", "route", *others),
        "|---|---|---|" + "---:|" * len(others),
    ]
    for case in results.cases:
        for name in ours:
            for route in ROUTES:
                ratios = [results.times_faster(case, name, other, route) for other in others]
                if any(ratios):
                    shown = ["" if r is None else f"{r:.2f}" for r in ratios]
                    lines.append(_row(case, name, _ROUTE_NAMES[route], *shown))
    return [*lines, ""]


def _cold(results: Comparison) -> list[str]:
    lines = [
        "## Cold start",
        "",
        "Fresh processes, caches in folders of their own: empty, then as the first one left them.",
        "",
        "| case | decoder | caches | imports, ms | model, ms | first decode | next | note |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in results.cold:
        if isinstance(row, ColdStart):
            times = (row.start_ms, row.build_ms, row.first_decode_ms, row.next_decode_ms)
            lines.append(_row(row.case, row.decoder, row.caches, *(f"{t:.0f}" for t in times), ""))
        else:
            reason = f"{row.kind}: {row.reason}"
            lines.append(_row(row.case, row.decoder, "", "", "", "", "", reason))
    return [*lines, ""]


def _layers(results: Comparison) -> list[str]:
    lines = ["## Layers", ""]
    ceilings = results.ceilings
    if ceilings is not None:
        lines += [
            f"Ceilings measured in this run: matrix product "
            f"{ceilings.matrix_flops_per_s / 1e12:.4g} TFLOP/s, copy "
            f"{ceilings.copy_bytes_per_s / 1e12:.3g} TB/s (read + write). Floor: the slower of",
            "arithmetic and memory at these ceilings. Times are taken inside a decode.",
            "",
        ]
    for found in results.rooflines:
        if isinstance(found, NoNumber):
            lines += [f"{found.case}, {found.decoder}: {found.kind}: {found.reason}", ""]
        elif ceilings is not None:
            lines += _layer_table(found, ceilings)
    return lines


def _layer_table(roofline: Roofline, ceilings: Ceilings) -> list[str]:
    lines = [
        f"### {roofline.case}, {roofline.backend}, {roofline.dtype}",
        "",
        "| operation | first such layer | channels | kernel | result | calls | ms | floor ms "
        "| TFLOP/s | of matrix | of copy | share |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rest_ms = roofline.elsewhere_ms
    floor = 0.0
    for row in roofline.layers:
        layer = row.layer
        floor += row.calls * ceilings.floor_ms(row.flops, row.moved_bytes)
        if row.total_ms < _SHOWN_SHARE * roofline.decode_ms:
            rest_ms += row.total_ms
            continue
        seconds = row.median_ms / 1e3
        flops, moved = row.flops / seconds, row.moved_bytes / seconds
        lines.append(
            _row(
                layer.op,
                row.name,
                f"{layer.in_channels} to {layer.out_channels}",
                "x".join(map(str, layer.kernel)),
                f"{layer.frames}x{layer.height}x{layer.width}",
                row.calls,
                f"{row.median_ms:.3f}",
                f"{ceilings.floor_ms(row.flops, row.moved_bytes):.3f}",
                f"{flops / 1e12:.3g}" if row.flops else "",
                f"{flops / ceilings.matrix_flops_per_s:.0%}" if row.flops else "",
                f"{moved / ceilings.copy_bytes_per_s:.0%}",
                f"{row.total_ms / roofline.decode_ms:.1%}",
            )
        )
    share = rest_ms / roofline.decode_ms
    lines += [
        _row("everything else", *[""] * 5, f"{rest_ms:.3f}", *[""] * 4, f"{share:.1%}"),
        "",
        f"Decode {roofline.decode_ms:.1f} ms with the clocks on; floor of all listed operations "
        f"{floor:.1f} ms.",
        "",
    ]
    return lines


def _time(row: Result | NoNumber | None) -> str:
    if isinstance(row, Result):
        return f"{row.median_ms:.1f} ({row.min_ms:.1f} to {row.max_ms:.1f})"
    return "" if row is None else row.kind


def _row(*cells: object) -> str:
    """One line of a table; a bar within a cell would end it."""
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"
