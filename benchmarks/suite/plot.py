"""Two pictures beside the results file: time by resolution, and layers under their roofs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.suite.cases import CASES
from benchmarks.suite.comparison import Comparison
from benchmarks.suite.measure import ROUTES, Result
from benchmarks.suite.roofline import Ceilings, Roofline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinguishable without colour vision (Okabe and Ito).
_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#009E73")
# Area of a mark for a layer that takes the whole decode, and the least, in square points.
_AREA, _LEAST_AREA = 1200, 12
_LABELLED = 4


def draw(results: Comparison, folder: Path) -> list[Path]:
    """Write `time.png` and, for each layer list, `roofline-CASE-BACKEND.png`; returns the files.

    Needs matplotlib (ImportError); draws only what has numbers.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    if any(isinstance(row, Result) for row in results.rows):
        size = (2 + 2.6 * len(results.cases), 1.4 + 0.42 * len(results.decoders))
        figures["time.png"] = _times(Figure(figsize=size, layout="constrained"), results)
    for found in results.rooflines:
        if isinstance(found, Roofline) and results.ceilings is not None:
            figure = Figure(figsize=(8, 5), layout="constrained")
            figures[f"roofline-{found.case}-{found.backend}.png"] = _roof(
                figure, found, results.ceilings, results.facts.device
            )
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)
    return [folder / name for name in figures]


def _times(figure: Figure, results: Comparison) -> Figure:
    """A panel for each case, a bar for each decoder; pale: on to the host IMAGE."""
    names, cases = results.decoders, results.cases
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        for i, name in enumerate(names):
            colour = _COLOURS[i % len(_COLOURS)]
            device, image = (results.find(case, name, route) for route in ROUTES)
            text = "" if device is None else getattr(device, "kind", "")
            if isinstance(image, Result):
                axes.barh(i, image.median_ms, color=colour, alpha=0.35)
            if isinstance(device, Result):
                axes.barh(i, device.median_ms, 0.6, color=colour)
                text = f"{device.median_ms:.0f}"
            axes.annotate(
                text, (0, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
        _, _, frames, height, width = CASES[case].pixels
        axes.set_title(f"{case}\n{frames} x {height} x {width}", fontsize=9)
        axes.set_xlabel("ms", fontsize=8)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.suptitle(f"Decode on {results.facts.device}; pale: LATENT to host IMAGE", fontsize=10)
    return figure


def _roof(figure: Figure, roofline: Roofline, ceilings: Ceilings, device: str) -> Figure:
    """TFLOP/s by intensity on logarithmic axes; area by share of the decode."""
    axes = figure.add_subplot()
    layers = [row for row in roofline.layers if row.flops]
    intensity = [row.flops / row.moved_bytes for row in layers]
    reached = [row.flops / row.median_ms / 1e9 for row in layers]
    area = [max(_LEAST_AREA, _AREA * row.total_ms / roofline.decode_ms) for row in layers]
    axes.scatter(intensity, reached, s=area, color=_COLOURS[0], alpha=0.55, linewidths=0)
    for row, x, y in list(zip(layers, intensity, reached, strict=True))[:_LABELLED]:
        layer = row.layer
        text = f"{layer.in_channels} to {layer.out_channels}, {layer.height}x{layer.width}"
        axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    roof = ceilings.matrix_flops_per_s / 1e12
    ridge = ceilings.matrix_flops_per_s / ceilings.copy_bytes_per_s
    left, right = min([ridge, *intensity]) / 2, max([ridge, *intensity]) * 2
    axes.plot([left, ridge, right], [roof * left / ridge, roof, roof], color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte that must move")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{roofline.case}, {roofline.backend}, {roofline.dtype}, {device}", fontsize=10)
    return figure
