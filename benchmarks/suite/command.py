"""The command `wan-vae bench`: which cases, which of our backends, where the results go."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

from benchmarks.suite import write_up
from benchmarks.suite.cases import CASES, CPU_CASES, GPU_CASES, Case
from benchmarks.suite.cold_start import ColdStart, cold_starts
from benchmarks.suite.comfyui import ComfyUICore
from benchmarks.suite.contender import Contender
from benchmarks.suite.contenders import Ours, contenders
from benchmarks.suite.measure import NoNumber, Row, failures, free_memory, measure_case, one_line
from benchmarks.suite.plot import draw
from benchmarks.suite.results import Results, repeatable
from benchmarks.suite.roofline import Roofline, measure_ceilings, measure_roofline
from benchmarks.suite.weights import Weights
from wan_vae.device import DTYPES, pick_device, pick_dtype
from wan_vae.options import BACKENDS

PARTS = ("decode", "layers", "cold")
_DEFAULT_BACKENDS = ("eager", "auto")


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns 0, or 1 if this pack failed or drew a wrong picture."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(args.precision, device)
    if device.type == "cuda":
        # ComfyUI and some kernels go to the current device, whichever tensors they are given.
        torch.cuda.set_device(device)
    # float32 means float32: the reference must not be rounded to TF32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    defaults = GPU_CASES if device.type == "cuda" else CPU_CASES
    cases = [CASES[name] for name in args.case or defaults]
    entrants = contenders(args.backend or _DEFAULT_BACKENDS)
    if args.only:
        entrants = [c for c in entrants if any(word in c.name for word in args.only)]
        if not entrants:
            parser.error(f"no decoder has {' or '.join(args.only)} in its name")
    parts = args.part or PARTS
    results = Results.begin(repeatable(argv), device)

    if importlib.util.find_spec("diffusers") is None:
        results.notes.append("the reference was not held against diffusers: it is not installed")
    if "decode" not in parts:
        results.notes.append("no pictures were gated: the part `decode` was left out")

    if "layers" in parts:
        results.ceilings = measure_ceilings(device, dtype)
    for case in cases:
        weights = Weights.random(case.config)
        if "decode" in parts:
            for row in measure_case(case, entrants, weights, device, dtype, args.repeats):
                results.rows.append(row)
                _say(f"{row.case}: {row.contender}: {row.route}: {_outcome(row)}")
                _keep(results, args.output)
        if "layers" in parts:
            _measure_layers(results, case, weights, entrants, device, dtype)
            _keep(results, args.output)
    if "cold" in parts:
        free_memory(device)
        right = [c for c in entrants if not results.wrong(cases[0].name, c.name)]
        for row in cold_starts(cases[0], right, device, dtype):
            results.cold.append(row)
            _say(f"{row.case}: {row.contender}: cold start: {_outcome(row)}")
    _add_versions(results, entrants)
    if args.output is not None:
        _draw(results, args.output)
        write_up.write(results, args.output)
    print(write_up.markdown(results))
    return 1 if results.our_failures else 0


def _keep(results: Results, folder: Path | None) -> None:
    """Write what there is: it survives whatever happens to the next row."""
    if folder is not None:
        write_up.write(results, folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wan-vae bench",
        allow_abbrev=False,
        description="Compare this pack with fastvae, diffusers and ComfyUI's core (a checkout "
        "named by COMFYUI_PATH) on the same random weights and latents, in one process.",
        epilog="wan-vae bench --ranks 1,2 is another command: one decode over several devices, "
        "proven, timed and broken (wan-vae bench --ranks 1,2 --help).",
    )
    parser.add_argument(
        "--case", action="append", choices=list(CASES), metavar="CASE",
        help=f"repeatable; one of {', '.join(CASES)} (default on a GPU: {', '.join(GPU_CASES)}; "
        f"elsewhere: {', '.join(CPU_CASES)}); the first one is also started cold",
    )  # fmt: skip
    parser.add_argument(
        "--backend", action="append", choices=BACKENDS,
        help=f"backend of this pack, repeatable (default: {' and '.join(_DEFAULT_BACKENDS)})",
    )  # fmt: skip
    parser.add_argument(
        "--only", action="append", metavar="WORD",
        help="only decoders with WORD in their name, repeatable (wan_vae, fastvae, ...)",
    )  # fmt: skip
    parser.add_argument("--device", help="cuda:0, cpu, ... (default: the best one)")
    parser.add_argument(
        "--precision", default="auto", choices=("auto", *DTYPES),
        help="of every decoder (default: bf16 on a GPU, fp32 elsewhere)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=_positive, default=5, help="timed decodes (default: 5)")
    parser.add_argument(
        "--part", action="append", choices=PARTS,
        help="repeatable (default: all): decode compares, layers times each of ours, cold starts "
        "fresh processes",
    )  # fmt: skip
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
    results: Results,
    case: Case,
    weights: Weights,
    entrants: list[Contender],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Add the layer times of each of our backends, except one whose picture was wrong."""
    for entrant in entrants:
        if not isinstance(entrant, Ours) or results.wrong(case.name, entrant.name):
            continue
        free_memory(device)
        reason = entrant.why_not(device, dtype)
        if reason is not None:
            found = NoNumber(case.name, entrant.name, "device", "unavailable", reason)
        else:
            try:
                found = measure_roofline(case, weights, device, dtype, entrant.backend)
            except failures() as error:
                found = NoNumber(case.name, entrant.name, "device", "failed", one_line(error))
        results.rooflines.append(found)
        _say(f"{case.name}: {entrant.name}: layers: {_outcome(found)}")


def _add_versions(results: Results, entrants: list[Contender]) -> None:
    for entrant in entrants:
        if isinstance(entrant, ComfyUICore) and entrant.version:
            results.versions["ComfyUI"] = entrant.version


def _draw(results: Results, folder: Path) -> None:
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


def _say(text: str) -> None:
    """Progress on stderr; stdout has the results."""
    print(text, file=sys.stderr, flush=True)
