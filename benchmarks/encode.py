"""The encoder beside those of diffusers and ComfyUI's core: right first, then timed.

    wan-vae bench encode [--case wan2.1-720p-81] [--backend auto] [--layers] [--output FILE.json]
    python benchmarks/encode.py               # the same

Two routes. *device*: pixels in [-1, 1] on the device to a latent on it. *image*: float32 IMAGE
frames on the CPU to a latent on the CPU, which is what a ComfyUI user waits for. The reference is
this pack's eager encode in float32. `--layers` adds the time of each layer of one encode.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.suite.cases import CASES, Case
from benchmarks.suite.comfyui import ComfyUICore
from benchmarks.suite.measure import (
    NoNumber,
    Result,
    Route,
    Row,
    Setting,
    failures,
    free_memory,
    gated,
    one_line,
)
from benchmarks.suite.weights import Weights, diffusers_model, random_vae
from wan_vae.clock import Mark
from wan_vae.device import pick_device
from wan_vae.io.image import frames_view
from wan_vae.network.blocks import (
    Attention,
    AverageShortcut,
    CausalConv3d,
    Downsample,
    ResidualBlock,
)
from wan_vae.options import BACKENDS, Backend
from wan_vae.pipeline import WanVAE
from wan_vae.runs.kernel_choice import unavailable_reason

_GPU_CASES = ("wan2.1-480p-81", "wan2.1-720p-81")
_CPU_CASES = ("wan2.1-narrow",)
_LAYERS = (CausalConv3d, ResidualBlock, Downsample, Attention, AverageShortcut)
_ROUTES: tuple[Route, ...] = ("device", "image")


@dataclass(frozen=True)
class Encoder:
    """An encoder with its weights in place.

    encode: pixels [1, 3, T, H, W] float32 in [-1, 1] on the device -> latent on it. image: frames
    [T, H, W, 3] float32 in [0, 1] on the CPU -> latent on the CPU. close: gives back what outlives
    the object. note: what to know about the last encode.
    """

    encode: Callable[[torch.Tensor], torch.Tensor]
    image: Callable[[torch.Tensor], torch.Tensor]
    close: Callable[[], None] = lambda: None
    note: Callable[[], str] = lambda: ""


@dataclass(frozen=True)
class Candidate:
    """An encoder to compare. unavailable: why it cannot run here, or None."""

    name: str
    unavailable: Callable[[torch.device, torch.dtype], str | None]
    build: Callable[[Weights, torch.device, torch.dtype], Encoder]


def candidates(backends: Sequence[Backend]) -> list[Candidate]:
    """Ours, one for each of `backends`, then the others."""
    core = ComfyUICore()
    return [
        *(_ours(backend) for backend in backends),
        Candidate("fastvae", lambda *_: "it has a decoder only", _no_encoder),
        Candidate("diffusers", _diffusers_missing, _diffusers),
        Candidate(core.name, core.unavailable_reason, lambda *where: _core(core, *where)),
    ]


def _ours(backend: Backend) -> Candidate:
    def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
        return None if backend in ("auto", "eager") else unavailable_reason(backend, device, dtype)

    def build(weights: Weights, device: torch.device, dtype: torch.dtype) -> Encoder:
        vae = WanVAE.from_state_dict(weights.native, device=device, dtype=dtype)

        def encode(pixels: torch.Tensor) -> torch.Tensor:
            return _latent(vae.encode(pixels, backend=backend))

        def image(frames: torch.Tensor) -> torch.Tensor:
            view = frames_view(frames)
            return _latent(vae.encode(view, unit_range=True, backend=backend)).cpu()

        def note() -> str:
            report = vae.last_report
            if report is None:
                return ""
            fast = sum(layer.backend != "eager" for layer in report.layers)
            said = [f"{fast} of {len(report.layers)} layers on kernels"] if fast else []
            return "; ".join((*said, *report.fallbacks))

        return Encoder(encode, image, note=note)

    return Candidate(f"wan_vae ({backend})", unavailable, build)


def _latent(found: torch.Tensor | None) -> torch.Tensor:
    assert found is not None  # None only on some ranks of a sharded encode
    return found


def _no_encoder(*_: object) -> Encoder:
    raise RuntimeError("it has a decoder only")


def _diffusers_missing(*_: object) -> str | None:
    return None if importlib.util.find_spec("diffusers") else "not installed: diffusers"


def _diffusers(weights: Weights, device: torch.device, dtype: torch.dtype) -> Encoder:
    model: Any = diffusers_model(weights, device, dtype)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        latent: torch.Tensor = model.encode(pixels.to(dtype)).latent_dist.mode()
        return latent

    def image(frames: torch.Tensor) -> torch.Tensor:
        return encode(frames_view(frames.to(device)) * 2 - 1).float().cpu()

    return Encoder(encode, image)


def _core(core: ComfyUICore, weights: Weights, device: torch.device, dtype: torch.dtype) -> Encoder:
    vae, close = core.load(weights, dtype)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        latent: torch.Tensor = vae.first_stage_model.encode(pixels.to(vae.vae_dtype))
        return latent

    def image(frames: torch.Tensor) -> torch.Tensor:
        latent: torch.Tensor = vae.encode(frames)
        return latent.cpu()

    return Encoder(encode, image, close=close)


# -- measuring -------------------------------------------------------------------------------------


def video(case: Case) -> torch.Tensor:
    """The frames [T, H, W, 3] float32 in [0, 1] on the CPU that every encoder gets: seeded."""
    _, _, t, h, w = case.pixels
    return torch.rand((t, h, w, 3), generator=torch.Generator().manual_seed(2))


def relative_error(latent: torch.Tensor, reference: torch.Tensor) -> float:
    """||a - b|| / ||b||; inf for another shape."""
    if latent.shape != reference.shape:
        return float("inf")
    difference = latent.double().cpu() - reference.double().cpu()
    return float(difference.norm() / reference.double().norm().cpu())


def measure(
    case: Case, found: Sequence[Candidate], device: torch.device, dtype: torch.dtype, repeats: int
) -> Iterator[Row]:
    """Two rows of each encoder, one encoder in memory at a time."""
    weights, frames = Weights.random(case.config), video(case)
    exact = WanVAE.from_state_dict(weights.native, device=device, dtype="fp32")
    reference = _latent(exact.encode(frames_view(frames), unit_range=True, backend="eager")).cpu()
    del exact
    for candidate in found:
        free_memory(device)
        reason, kind = candidate.unavailable(device, dtype), "unavailable"
        built: Encoder | None = None
        if reason is None:
            try:
                built = candidate.build(weights, device, dtype)
            except failures() as error:
                reason, kind = one_line(error), "failed"
        for route in _ROUTES:
            if built is None:
                assert reason is not None
                yield NoNumber(
                    case.name,
                    candidate.name,
                    route,
                    "failed" if kind == "failed" else "unavailable",
                    reason,
                )
                continue
            yield _measure_route(
                case, candidate.name, route, built, frames, reference, device, dtype, repeats
            )
        if built is not None:
            built.close()
        del built


def _measure_route(
    case: Case,
    name: str,
    route: Route,
    built: Encoder,
    frames: torch.Tensor,
    reference: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> Row:
    """Encode once for the gate and the memory, then `repeats` times for the clock."""
    run, source = built.image, frames
    if route == "device":
        run, source = built.encode, (frames_view(frames.to(device)) * 2 - 1).contiguous()
    setting = Setting(device, dtype, repeats)

    def drift(latent: torch.Tensor) -> float:
        return relative_error(latent, reference)

    return gated(case, name, route, lambda: run(source), drift, built.note, setting, warm_up=True)


def layer_times(case: Case, device: torch.device, backend: Backend) -> list[tuple[str, float]]:
    """Milliseconds of each layer of one encode, and of all, from pixels on the device."""
    vae = random_vae(case.config, device)
    pixels = (frames_view(video(case).to(device)) * 2 - 1).contiguous()
    vae.encode(pixels, backend=backend)
    assert vae.encoder is not None
    marks: dict[str, list[tuple[Mark, Mark]]] = {}
    handles, open_marks = [], list[Mark]()

    def enter(*_: object) -> None:
        open_marks.append(Mark.now(device))

    def leave(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            marks.setdefault(name, []).append((open_marks.pop(), Mark.now(device)))

        return hook

    for name, layer in _layers(vae.encoder):
        handles.append(layer.register_forward_pre_hook(enter))
        handles.append(layer.register_forward_hook(leave(name)))
    start = Mark.now(device)
    vae.encode(pixels, backend=backend)
    stop = Mark.now(device)
    for handle in handles:
        handle.remove()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    found = [(name, sum(a.ms_until(b) for a, b in pairs)) for name, pairs in marks.items()]
    whole = start.ms_until(stop)
    return [*found, ("the rest", whole - sum(ms for _, ms in found)), ("all", whole)]


def _layers(encoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of the encoder that a chunk runs through as modules, in order, with their names.

    The head runs as functions and is part of the rest.
    """
    inside: tuple[str, ...] = ("head",)
    for name, module in encoder.named_modules():
        if isinstance(module, _LAYERS) and not name.startswith(inside):
            inside = (*inside, f"{name}.")
            yield name, module


# -- the command -----------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown; the last column says how many times faster than core ours is."""
    lines = [
        "| case | encoder | route | median ms | peak GiB | error | times core | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    core = {
        (r.case, r.route): r.median_ms
        for r in rows
        if isinstance(r, Result) and r.decoder == ComfyUICore.name
    }
    for row in rows:
        if isinstance(row, NoNumber):
            cells = [row.case, row.decoder, row.route, row.kind, "", "", "", row.reason]
        else:
            other = core.get((row.case, row.route))
            cells = [
                row.case,
                row.decoder,
                row.route,
                f"{row.median_ms:.0f} ({row.min_ms:.0f} to {row.max_ms:.0f})",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}",
                f"{row.error:.1e}",
                "" if other is None else f"{other / row.median_ms:.2f}",
                row.note,
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if one of ours failed or was wrong."""
    parser = argparse.ArgumentParser(
        prog="wan-vae bench encode",
        description="Time the encoder beside those of diffusers and ComfyUI's core.",
    )
    parser.add_argument("--device", help="cuda:0, cpu (default: the best one here)")
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", action="store_true", help="also the time of each layer")
    parser.add_argument("--output", type=Path, help="write the rows to this JSON file, too")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    backends: list[Backend] = args.backend or ["auto", "eager"]
    rows: list[Row] = []
    layers: dict[str, list[tuple[str, float]]] = {}
    for name in args.case or (_GPU_CASES if is_cuda else _CPU_CASES):
        found = measure(CASES[name], candidates(backends), device, dtype, args.repeats)
        for row in found:
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
        if args.layers:
            free_memory(device)
            layers[name] = layer_times(CASES[name], device, backends[0])
    device_name = torch.cuda.get_device_name(device) if is_cuda else str(device)
    print(f"\n{device_name}, torch {torch.__version__}\n\n{table(rows)}")
    for name, times in layers.items():
        print(f"\n{name}, milliseconds of each layer ({backends[0]}):")
        print("\n".join(f"{ms:9.2f}  {layer}" for layer, ms in times))
    if args.output is not None:
        plain = {
            "device": device_name,
            "torch": torch.__version__,
            "rows": [asdict(row) for row in rows],
            "layers": layers,
        }
        args.output.write_text(json.dumps(plain, indent=1), encoding="utf-8")
    ours = [row for row in rows if row.decoder.startswith("wan_vae")]
    return int(any(isinstance(row, NoNumber) and row.kind != "unavailable" for row in ours))


if __name__ == "__main__":
    raise SystemExit(main())
