"""Decode the same latents with this pack and its peers; gate, then time, then write the results.

Weights are random (seeded) and go to each contender through its own key layout. The reference is
this pack's eager decode in float32 with TF32 off, itself held against diffusers in float32.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..checkpoint import canonical_state_dict
from ..pipeline import WanVAE, pick_device
from ..report import device_name, versions

# Relative error above which a half-precision picture counts as wrong: bf16 decodes of random
# weights lie near 1.8e-2, a garbled or misplaced frame above 0.1.
GATE = 5e-2
# Float32 against float32 of another implementation.
REFERENCE_GATE = 1e-4


@dataclass(frozen=True)
class Case:
    """One latent shape of one model family."""

    name: str
    family: str
    latent: tuple[int, int, int, int, int]


CASES = {
    c.name: c
    for c in (
        Case("wan2.1-480p-81", "wan2.1", (1, 16, 21, 60, 104)),
        Case("wan2.1-720p-81", "wan2.1", (1, 16, 21, 90, 160)),
        Case("wan2.1-1024-image", "wan2.1", (1, 16, 1, 128, 128)),
        Case("wan2.2-480p-121", "wan2.2", (1, 48, 31, 30, 52)),
        Case("wan2.2-720p-121", "wan2.2", (1, 48, 31, 44, 80)),
        Case("wan2.1-tiny", "wan2.1", (1, 16, 3, 8, 8)),
        Case("wan2.2-tiny", "wan2.2", (1, 48, 3, 4, 4)),
    )
}
GPU_CASES = tuple(n for n in CASES if not n.endswith("tiny"))
CPU_CASES = ("wan2.1-tiny", "wan2.2-tiny")

_DIFFUSERS_OPTIONS: dict[str, dict] = {
    "wan2.1": {},
    "wan2.2": dict(
        base_dim=160,
        decoder_base_dim=256,
        z_dim=48,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
    ),
}


@dataclass(frozen=True)
class Result:
    """One contender on one case. Times in ms; bytes above what was allocated before; None where
    the device does not count them. `error`: relative, from the float32 reference."""

    case: str
    contender: str
    dtype: str
    median_ms: float
    min_ms: float
    max_ms: float
    repeats: int
    peak_bytes: int | None
    error: float


@dataclass(frozen=True)
class Refused:
    """A contender that got no number, and why."""

    case: str
    contender: str
    reason: str


def random_diffusers_vae(family: str, device: torch.device, seed: int = 0):
    """diffusers' AutoencoderKLWan with seeded random weights, gains and biases, in float32."""
    import diffusers

    torch.manual_seed(seed)
    with torch.device(device):
        model = diffusers.AutoencoderKLWan(**_DIFFUSERS_OPTIONS[family]).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator).to(device)
            if name.endswith("gamma"):
                p.copy_(1 + 0.1 * noise)
            elif name.endswith("bias"):
                p.copy_(0.02 * noise)
    return model.requires_grad_(False)


def contenders(family: str, device: torch.device, model) -> dict[str, tuple[str, Callable]]:
    """Name -> (dtype, function from a float32 latent to pixels), built one at a time."""
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    state = canonical_state_dict(model.state_dict()).state

    def ours(precision: str, memory_format: str):
        vae = WanVAE.from_state_dict(state, device=device, dtype=precision)

        def decode(z):
            return vae.decode(z, memory_format=memory_format)

        return decode

    def peer_diffusers():
        peer = random_diffusers_vae(family, device).to(half)
        return lambda z: peer.decode(z.to(half)).sample

    name = str(half).removeprefix("torch.")
    short = "bf16" if device.type == "cuda" else "fp32"
    return {
        "wan_vae": (name, lambda: ours(short, "auto")),
        "wan_vae (contiguous)": (name, lambda: ours(short, "contiguous")),
        "diffusers": (name, peer_diffusers),
    }


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a host clock sees its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative_error(pixels: torch.Tensor, reference: torch.Tensor) -> float:
    """||a - b|| / ||b||, frame by frame on the device so that no second clip is allocated."""
    if pixels.shape != reference.shape:
        return float("inf")
    top = bottom = 0.0
    for t in range(reference.shape[2]):
        r = reference[:, :, t].double()
        top += (pixels[:, :, t].double() - r).square().sum().item()
        bottom += r.square().sum().item()
    return (top / bottom) ** 0.5


def measure(case: Case, device: torch.device, repeats: int) -> list[Result | Refused]:
    """Gate and time every contender on one case; one contender in memory at a time."""
    model = random_diffusers_vae(case.family, device)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(case.latent, generator=generator).to(device)

    reference_vae = WanVAE.from_state_dict(model.state_dict(), device=device, dtype="fp32")
    small = z[:, :, :2, :8, :8].contiguous()
    with torch.inference_mode():
        drift = relative_error(reference_vae.decode(small), model.decode(small).sample)
    if not drift < REFERENCE_GATE:
        raise SystemExit(
            f"{case.name}: the float32 reference differs from diffusers by {drift:.1e}: no numbers"
        )
    reference = reference_vae.decode(z, memory_format="contiguous").cpu()
    builders = contenders(case.family, device, model)
    del reference_vae, model
    rows: list[Result | Refused] = []
    for name, (dtype, build) in builders.items():
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        decode = build()
        with torch.inference_mode():
            rows.append(_measure_one(case, name, dtype, decode, z, reference, device, repeats))
        del decode
    return rows


def _measure_one(case, name, dtype, decode, z, reference, device, repeats) -> Result | Refused:
    synchronise(device)
    base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    pixels = decode(z)
    synchronise(device)
    output = pixels.numel() * pixels.element_size()
    peak = None
    if device.type == "cuda":
        # The clip itself is the same for all and is not counted.
        peak = torch.cuda.max_memory_allocated(device) - base - output
    error = relative_error(pixels.cpu().float(), reference)
    del pixels
    if not error < GATE:
        return Refused(case.name, name, f"relative error {error:.2e} is above the gate {GATE:.0e}")
    times = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        pixels = decode(z)
        synchronise(device)
        times.append((time.perf_counter() - start) * 1e3)
        del pixels
    return Result(
        case.name, name, dtype, statistics.median(times), min(times), max(times), repeats, peak,
        error,
    )  # fmt: skip


def markdown(rows: list[Result | Refused], device: torch.device, command: str) -> str:
    """The results file: what ran where, then a table."""
    facts = {k: v for k, v in versions().items() if v}
    for peer in ("diffusers", "fastvae"):
        if importlib.util.find_spec(peer) is not None:
            facts[peer] = importlib.metadata.version(peer)
    lines = [
        f"- date: {datetime.date.today().isoformat()}",
        f"- device: {device_name(device)}",
        f"- versions: {', '.join(f'{k} {v}' for k, v in facts.items())}",
        f"- command: `{command}`",
        "- weights random (seed 0), latents random (seed 1); latent on the device to pixels on it;",
        "  error is relative, from a float32 decode; peak is memory above weights and output",
        "",
        "| case | decoder | dtype | median ms | min to max | peak GiB | error |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        if isinstance(r, Refused):
            lines.append(f"| {r.case} | {r.contender} | | refused: {r.reason} | | | |")
            continue
        peak = "" if r.peak_bytes is None else f"{r.peak_bytes / 2**30:.2f}"
        lines.append(
            f"| {r.case} | {r.contender} | {r.dtype} | {r.median_ms:.1f} "
            f"| {r.min_ms:.1f} to {r.max_ms:.1f} | {peak} | {r.error:.2e} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns 0, or 1 if a contender of ours was refused."""
    parser = argparse.ArgumentParser(
        prog="wan-vae bench", description="Compare this pack with diffusers on random weights."
    )
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="repeatable")
    parser.add_argument("--device", help="cuda:0, cpu, ... (default: the best one)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder for results.md and results.json")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("diffusers") is None:
        print("wan-vae bench: diffusers is not installed: pip install diffusers", file=sys.stderr)
        return 1
    device = pick_device(args.device)
    # float32 means float32: the reference must not be rounded to TF32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    names = args.case or (GPU_CASES if device.type == "cuda" else CPU_CASES)
    rows: list[Result | Refused] = []
    for name in names:
        rows += measure(CASES[name], device, args.repeats)
        print(f"{name}: done", file=sys.stderr, flush=True)
    command = "wan-vae bench " + " ".join(argv if argv is not None else sys.argv[2:])
    text = markdown(rows, device, command.strip())
    print(text)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "results.md").write_text(text, encoding="utf-8")
        data = {"versions": versions(), "device": device_name(device), "command": command,
                "rows": [{"kind": type(r).__name__, **asdict(r)} for r in rows]}  # fmt: skip
        (args.output / "results.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    refused = [r for r in rows if isinstance(r, Refused) and r.contender.startswith("wan_vae")]
    return 1 if refused else 0
