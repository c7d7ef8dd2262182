"""Compile the kernels for cards that need not be there; say what each takes of them.

    python benchmarks/kernel_resources.py                        # Hopper: all configurations
    python benchmarks/kernel_resources.py --card sm_86           # as chosen and compiled for Ampere
    python benchmarks/kernel_resources.py --card gfx1100         # and for RDNA 3
    python benchmarks/kernel_resources.py --first --json         # those that are tried first
    python benchmarks/kernel_resources.py --kernels cuda --check # exits 1 if a limit is exceeded

Registers a thread, bytes of stack (spilled registers) and shared memory of a program. For Triton
also how many tensor core instructions the loop has and how often it waits for them: as many waits
as instructions means that the compiler serialised them, for want of registers. (Not for AMD.)

Features are bfloat16; for sm_75 float16, because its tensor cores read no other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.resources import cuda_kernels
from benchmarks.resources.limits import ALLOWED, ARCHITECTURES, Limits, card, exceeded
from benchmarks.resources.usage import Resources
from wan_vae.config import WanVAEConfig, wan21, wan22
from wan_vae.kernels import registry
from wan_vae.kernels.cuda.driver import compiler_missing
from wan_vae.network.model import WanVAEModel
from wan_vae.network.sites import decoder_sites, encoder_sites
from wan_vae.ops.problem import Problem

FAMILIES: dict[str, Callable[[], WanVAEConfig]] = {"wan2.1": wan21, "wan2.2": wan22}
KERNELS = ("cuda", "triton")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def problems(families: list[str], dtype: torch.dtype, images: bool) -> list[Problem]:
    """Those of the full-width models, decoded and encoded, each once; `images`: of videos of one
    frame too."""
    found: dict[Problem, None] = {}
    for family in families:
        with torch.device("meta"):
            model = WanVAEModel(FAMILIES[family]()).to(dtype)
        for only_frame in (False, True) if images else (False,):
            sites = (*decoder_sites(model, only_frame), *encoder_sites(model, only_frame))
            found |= dict.fromkeys(site.problem for site in sites)
    return list(found)


def resources(args: argparse.Namespace, architecture: str) -> Iterator[Resources]:
    """What kernels take that are chosen for `architecture`."""
    device, wanted = card(architecture), args.kernels or KERNELS
    families = args.family or list(FAMILIES)
    dtype = DTYPES[args.dtype or ("float16" if architecture == "sm_75" else "bfloat16")]
    if "cuda" in wanted:
        layers = problems(families, dtype, images=True)
        made = cuda_kernels.jobs(layers, device, args.first, args.kernel)
        named = [job for job in made if _wanted(job.name, args)]
        yield from cuda_kernels.compile_jobs(named, device)
    if "triton" in wanted:
        from benchmarks.resources import triton_kernels

        # Those of an image are those of a video, with fewer taps.
        layers = problems(families, dtype, images=False)
        jobs = triton_kernels.jobs(layers, device, args.first, args.kernel)
        of_layer = [job for job in jobs if _wanted(job.name, args)]
        for target in args.target or [architecture]:
            yield from triton_kernels.compile_jobs(of_layer, card(target))


def _wanted(name: str, args: argparse.Namespace) -> bool:
    return any(part in name for part in args.layer or [""])


def line(r: Resources) -> str:
    """A row of the table."""
    counts = ("" if n is None else str(n) for n in (r.tensor_core_instructions, r.waits))
    cells = (
        *(r.family, r.kernel, r.config, r.architecture, str(r.registers), str(r.stack_bytes)),
        *(f"{r.shared_bytes / 1024:.0f}", f"{r.resident} x {r.threads}", *counts),
    )
    return f"| {' | '.join(cells)} |"


def _missing(args: argparse.Namespace) -> str | None:
    """What the wanted kernels are compiled with and is not here; None if it is."""
    wanted = args.kernels or KERNELS
    if "cuda" in wanted:
        missing = compiler_missing()
        if missing is not None:
            return f"{missing}; --kernels triton does without"
    if "triton" in wanted and registry.missing_package("triton"):
        return "triton is not installed; --kernels cuda does without"
    return None


def main() -> int:
    """Print a table, or JSON, or what exceeds the limits."""
    parser = argparse.ArgumentParser(
        prog="wan-vae bench resources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--card",
        action="append",
        choices=ARCHITECTURES,
        help="chosen and compiled for; repeatable (default: sm_90, Hopper; with --check: all)",
    )
    parser.add_argument(
        "--target",
        action="append",
        choices=ARCHITECTURES,
        help="compile Triton's for others instead; repeatable",
    )
    parser.add_argument("--kernels", choices=KERNELS, action="append", help="default: both")
    parser.add_argument("--kernel", help='only kernels of this name, such as "pointer"')
    parser.add_argument(
        "--layer", action="append", help='only layers whose name has this, "96x96"; repeatable'
    )
    parser.add_argument("--first", action="store_true", help="only what is tried first")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: both")
    parser.add_argument("--dtype", choices=DTYPES, help="of features (default: see above)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 if a kernel exceeds a limit")
    parser.add_argument(
        "--limits", type=Path, default=ALLOWED, help="what may be spilled (default: %(default)s)"
    )
    args = parser.parse_args()
    missing = _missing(args)
    if missing is not None:
        parser.error(missing)
    cards = args.card or (ARCHITECTURES if args.check else ("sm_90",))
    rows = []
    if not args.json:
        print(
            "| family | kernel | configuration | for | registers | stack | shared KiB | threads | "
            "tensor core | waits |"
        )
        print("|---|---|---|---|---:|---:|---:|---:|---:|---:|")
    for architecture in cards:
        for row in resources(args, architecture):
            rows.append(row)
            if not args.json:
                print(line(row), flush=True)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    if not args.check:
        return 0
    if not rows:
        parser.error("--check: there is no kernel of that name")
    limits = Limits.read(args.limits)
    faults = list(exceeded(rows, limits))
    for fault in faults:
        print(f"exceeds: {fault}", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
