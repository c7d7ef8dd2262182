"""Prove every configuration of every kernel on this card, at a small odd size.

    python benchmarks/every_kernel.py                                   # CUDA C++ and Triton
    WAN_VAE_CAPABILITY=8.6 python benchmarks/every_kernel.py --family cuda
    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/every_kernel.py --once
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/every_kernel.py --once

A proof (wan_vae/kernels/proof/) runs a kernel twice on poisoned memory and holds it against float32.
Layers are those of Wan 2.1, Wan 2.2 and a narrow model, decoder and encoder, videos and images, whole
pictures and shards. --once: each kernel and configuration with one layer, for tools that take their
time; --only WORD picks proofs by name, --share 1/2 and 2/2 are halves. Exits with 1 if a proof fails; what cannot be built is named
and passed over.
"""  # noqa: E501

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from wan_vae.config import WanVAEConfig, wan21, wan22
from wan_vae.kernels import registry
from wan_vae.kernels.device import Device
from wan_vae.kernels.kernel import BuildError, Kernel
from wan_vae.kernels.proof import cases
from wan_vae.kernels.select import proof_key
from wan_vae.network.model import WanVAEModel
from wan_vae.network.sites import layer_sites
from wan_vae.ops.problem import Problem
from wan_vae.options import Axis, Part

PARTS: tuple[Part, ...] = ("decoder", "encoder")
AXES: tuple[Axis | None, ...] = (None, "height", "width")
Trial = tuple[Kernel[Any, Any], Problem, str, Axis | None]


def trials(families: Sequence[str], card: Device, dtype: torch.dtype) -> dict[str, Trial]:
    """Every kernel and configuration that a layer may get on `card`, by the name of its proof."""
    found: dict[str, Trial] = {}
    for problem in _problems(dtype):
        for kernel in registry.kernels_of(problem.operation, tuple(families)):
            if kernel.requires.unmet(card, problem) is not None:
                continue
            for config in kernel.candidates(problem, card):
                for axis in AXES if problem.has_halo else (None,):
                    key = proof_key(kernel, problem, config, axis)
                    found[key] = kernel, problem, config, axis
    return found


def once(todo: dict[str, Trial]) -> dict[str, Trial]:
    """One trial of each kernel and configuration: that of the fewest channels."""
    least: dict[tuple[str, ...], str] = {}
    for key, (kernel, problem, config, _) in todo.items():
        name = kernel.family, kernel.name, kernel.operation, config
        known = least.get(name)
        if known is None or problem.in_channels < todo[known][1].in_channels:
            least[name] = key
    return {key: todo[key] for key in least.values()}


def _problems(dtype: torch.dtype) -> Iterator[Problem]:
    configs: tuple[WanVAEConfig, ...] = (wan21(), wan22(), wan21(dim=24))
    for config in configs:
        with torch.device("meta"):
            model = WanVAEModel(config).to(dtype)
        for part in PARTS:
            for only_frame in (False, True):
                for site in layer_sites(model, part, only_frame):
                    yield site.problem


def built(todo: dict[str, Trial], card: Device) -> dict[str, str]:
    """Compiles all, several at once; the reason of those that cannot be built, by name."""

    def build(trial: Trial) -> str:
        kernel, problem, config, _ = trial
        try:
            kernel.build(problem, config, card)
        except BuildError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(todo, pool.map(build, todo.values()), strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", action="append", choices=registry.FAMILIES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--once", action="store_true", help="one layer of each configuration")
    parser.add_argument("--only", action="append", help="proofs with this word, repeatable")
    parser.add_argument("--share", default="1/1", help="1/2 and 2/2: the halves, for two processes")
    parser.add_argument(
        "--size", default="5,21,35", help="frames, rows and columns (5: a quad and one of the past)"
    )
    args = parser.parse_args(argv)
    device = torch.device("cuda", 0)
    card = Device.chosen_for(device)
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float16
    frames, rows, columns = (int(part) for part in args.size.split(","))
    size = frames, rows, columns
    todo = trials(args.family or registry.FAMILIES, card, dtype)
    todo = once(todo) if args.once else todo
    if args.only is not None:
        todo = {key: trial for key, trial in todo.items() if any(word in key for word in args.only)}
    share, shares = (int(part) for part in args.share.split("/"))
    todo = dict(list(todo.items())[share - 1 :: shares])
    unbuilt = {key: reason for key, reason in built(todo, card).items() if reason}
    wrong, worst = [], 0.0
    with torch.no_grad():
        for key, (kernel, problem, config, axis) in todo.items():
            if key in unbuilt:
                print(f"cannot be built: {key}: {unbuilt[key]}", flush=True)
                continue
            if args.once:
                print(key, flush=True)  # a tool's messages stand below the name of what ran
            verdict = cases.prove_kernel(kernel, problem, config, card, device, axis, size)
            worst = max(worst, verdict.error or 0.0)
            if not verdict.passed:
                wrong.append(key)
                print(f"WRONG: {key}: {verdict.reason}", flush=True)
    print(
        f"{card.name} ({card.machine_code}), {args.dtype}, {args.size}: {len(todo)} kernels, "
        f"{len(unbuilt)} not built, {len(wrong)} wrong, largest error {worst:.1e}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
