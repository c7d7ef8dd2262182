"""`wan-vae bench` without a part, or with decode, layers or cold: compare decoders."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.suite import write_up
from benchmarks.suite.baseline import Baseline
from benchmarks.suite.cases import CASES, CPU_CASES, GPU_CASES, Case
from benchmarks.suite.cold_start import ColdStart, cold_starts
from benchmarks.suite.comfyui import ComfyUICore
from benchmarks.suite.comparison import SCHEMA, Comparison
from benchmarks.suite.decoders import PACKAGES, Ours, decoders
from benchmarks.suite.facts import Facts, repeatable
from benchmarks.suite.measure import (
    NoNumber,
    Row,
    Setting,
    failures,
    free_memory,
    measure_case,
    one_line,
)
from benchmarks.suite.parts import other_parts
from benchmarks.suite.plot import draw
from benchmarks.suite.roofline import Roofline, measure_ceilings, measure_roofline
from benchmarks.suite.weights import Weights
from wan_vae.device import DTYPES, pick_device, pick_dtype
from wan_vae.options import BACKENDS, Backend

PARTS = ("decode", "layers", "cold")
_DEFAULT_BACKENDS: tuple[Backend, ...] = ("eager", "auto")


def main(argv: Sequence[str]) -> int:
    """Run the comparison; returns 0, or 1 if this pack failed or drew a wrong picture.

    argv: the words after `wan-vae bench`, of which the first may be one of `PARTS`.
    """
    parser = _parser()
    parts = argv[:1] if argv and argv[0] in PARTS else []
    args = parser.parse_args(argv[len(parts) :])
    parts = [*parts, *(args.part or ())] or PARTS
    device = pick_device(args.device)
    setting = Setting(device, pick_dtype(args.precision, device), args.repeats)
    if device.type == "cuda":
        # ComfyUI and some kernels go to the current device, whichever tensors they are given.
        torch.cuda.set_device(device)
    if args.no_cudnn:
        torch.backends.cudnn.enabled = False
    # float32 means float32: the reference must not be rounded to TF32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    defaults = GPU_CASES if device.type == "cuda" else CPU_CASES
    cases = [CASES[name] for name in args.case or defaults]
    compared = decoders(args.backend or _DEFAULT_BACKENDS)
    if args.only:
        compared = [d for d in compared if any(word in d.name for word in args.only)]
        if not compared:
            parser.error(f"no decoder has {' or '.join(args.only)} in its name")
    results = Comparison(Facts.begin(SCHEMA, repeatable(argv), device))
    _add_package_versions(results)

    if importlib.util.find_spec("diffusers") is None:
        results.notes.append("the reference was not compared with diffusers: it is not installed")
    if args.no_cudnn:
        results.notes.append("cuDNN (on ROCm MIOpen) was off for every decoder and the reference")
    if "decode" not in parts:
        results.notes.append("no pictures were gated: the part `decode` was left out")

    if "layers" in parts:
        results.ceilings = measure_ceilings(device, setting.dtype)
    for case in cases:
        weights = Weights.random(case.config)
        if "decode" in parts:
            for row in measure_case(case, compared, weights, setting):
                results.rows.append(row)
                _log(f"{row.case}: {row.decoder}: {row.route}: {_outcome(row)}")
                _keep(results, args.output)
        if "layers" in parts:
            _measure_layers(results, case, weights, compared, setting)
            _keep(results, args.output)
    if "cold" in parts:
        free_memory(device)
        right = [d for d in compared if not results.wrong(cases[0].name, d.name)]
        for start in cold_starts(cases[0], right, setting):
            results.cold.append(start)
            _log(f"{start.case}: {start.decoder}: cold start: {_outcome(start)}")
            _keep(results, args.output)
    _add_comfyui_version(results, compared)
    if args.output is not None:
        _draw(results, args.output)
        write_up.write(results, args.output)
    print(write_up.comparison_markdown(results))
    return 1 if results.our_failures else 0


def _add_package_versions(results: Comparison) -> None:
    for package in PACKAGES:
        try:
            results.facts.versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # its rows say that it is absent


def _keep(results: Comparison, folder: Path | None) -> None:
    """Write what there is: it survives whatever happens to the next row."""
    if folder is not None:
        write_up.write(results, folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wan-vae bench",
        allow_abbrev=False,
        description="Compare this pack with fastvae, diffusers and ComfyUI's core (a checkout "
        "named by COMFYUI_PATH) on the same random weights and latents, in one process.",
        epilog=other_parts(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--case",
        action="append",
        choices=list(CASES),
        metavar="CASE",
        help=f"repeatable; one of {', '.join(CASES)} (default on a GPU: {', '.join(GPU_CASES)}; "
        f"elsewhere: {', '.join(CPU_CASES)}); the first one is also started cold",
    )
    parser.add_argument(
        "--backend",
        action="append",
        choices=BACKENDS,
        help=f"backend of this pack, repeatable (default: {' and '.join(_DEFAULT_BACKENDS)})",
    )
    parser.add_argument(
        "--no-cudnn",
        action="store_true",
        help="switch cuDNN (on ROCm MIOpen) off for every decoder, as ComfyUI does on most AMD "
        "cards; not for the part cold, whose processes start with PyTorch's own switches",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="WORD",
        help="only decoders with WORD in their name, repeatable (wan_vae, fastvae, ...)",
    )
    parser.add_argument("--device", help="cuda:0, cpu, ... (default: the best one)")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", *DTYPES),
        help="of every decoder (default: bf16 on a GPU, fp32 elsewhere)",
    )
    parser.add_argument("--repeats", type=_positive, default=5, help="timed decodes (default: 5)")
    parser.add_argument(
        "--part",
        action="append",
        choices=PARTS,
        help="repeatable (default: all): decode compares, layers times each of ours, cold starts "
        "fresh processes",
    )
    parser.add_argument(
        "--output", type=Path, help="folder for results.md, results.json and the plots"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected 1 or more")
    return value


def _measure_layers(
    results: Comparison,
    case: Case,
    weights: Weights,
    compared: Sequence[Baseline],
    setting: Setting,
) -> None:
    """Add the layer times of each of our backends, except one whose picture was wrong."""
    device, dtype = setting.device, setting.dtype
    for decoder in compared:
        if not isinstance(decoder, Ours) or results.wrong(case.name, decoder.name):
            continue
        free_memory(device)
        reason = decoder.unavailable_reason(device, dtype)
        found: Roofline | NoNumber
        if reason is not None:
            found = NoNumber(case.name, decoder.name, "device", "unavailable", reason)
        else:
            try:
                found = measure_roofline(case, weights, device, dtype, decoder.backend)
            except failures() as error:
                found = NoNumber(case.name, decoder.name, "device", "failed", one_line(error))
        results.rooflines.append(found)
        _log(f"{case.name}: {decoder.name}: layers: {_outcome(found)}")


def _add_comfyui_version(results: Comparison, compared: Sequence[Baseline]) -> None:
    """Known only after its import, which the first of its rows makes."""
    for decoder in compared:
        if isinstance(decoder, ComfyUICore) and decoder.version:
            results.facts.versions["ComfyUI"] = decoder.version


def _draw(results: Comparison, folder: Path) -> None:
    """The plots, or a line in the results that says what they need."""
    if importlib.util.find_spec("matplotlib") is None:
        results.notes.append("no plots: matplotlib is not installed (the extra bench has it)")
        return
    names = ", ".join(f"[{path.stem}]({path.name})" for path in draw(results, folder))
    results.notes.append(f"plots: {names}")


def _outcome(row: Row | ColdStart | Roofline) -> str:
    """A row in a few words, for the progress lines."""
    match row:
        case NoNumber():
            return f"{row.kind}: {row.reason}"
        case ColdStart():
            return f"caches {row.caches}, first decode {row.first_decode_ms:.0f} ms"
        case Roofline():
            return f"{len(row.layers)} shapes, decode {row.decode_ms:.1f} ms"
    return f"{row.median_ms:.1f} ms"


def _log(text: str) -> None:
    """Progress on stderr; stdout has the results."""
    print(text, file=sys.stderr, flush=True)
