"""Gate, then time: one decoder at a time, on the device and all the way to a host picture.

Two routes. *device*: latent on the device to pixels on it. *image*: latent on the CPU to float32
IMAGE frames on the CPU, which is what a ComfyUI user waits for. The reference is this pack's eager
decode in float32 with TF32 off, itself held against diffusers in float32 where that is installed.
"""

from __future__ import annotations

import gc
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.suite.baseline import Baseline, Built
from benchmarks.suite.cases import Case
from benchmarks.suite.weights import Weights, diffusers_model
from wan_vae.device import dtype_name
from wan_vae.errors import WanVAEError
from wan_vae.io.image import frames_to_pixels
from wan_vae.options import MemoryFormat
from wan_vae.pipeline import WanVAE

Route = Literal["device", "image"]
ROUTES: tuple[Route, ...] = ("device", "image")
Kind = Literal["unavailable", "failed", "refused"]

# Relative error above which a picture counts as wrong. Half precision on random weights lies near
# 3.4e-2 (benchmarks/results/2026-11-24-h200-eager.md), a garbled or misplaced frame above 0.1.
HALF_GATE = 5e-2
FLOAT_GATE = 1e-3
# Float32 against float32 of another implementation.
REFERENCE_GATE = 1e-4
# Latent frames, rows and columns of the crop on which the reference is held against diffusers.
_CHECKED = (2, 8, 8)


@dataclass(frozen=True)
class Setting:
    """Where and how every decoder runs; `repeats`: timed decodes."""

    device: torch.device
    dtype: torch.dtype
    repeats: int = 5


@dataclass(frozen=True)
class Result:
    """One decoder on one route of one case. Times in ms. `peak_bytes`: device memory above
    weights and output, None where nobody counts it. `error`: relative to the reference."""

    case: str
    decoder: str
    route: Route
    dtype: str
    median_ms: float
    min_ms: float
    max_ms: float
    repeats: int
    peak_bytes: int | None
    error: float
    note: str = ""


@dataclass(frozen=True)
class NoNumber:
    """A decoder without a time: unavailable here, failed while it ran, or refused for a wrong
    picture. `reason` says more."""

    case: str
    decoder: str
    route: Route
    kind: Kind
    reason: str


Row = Result | NoNumber


def failures() -> tuple[type[Exception], ...]:
    """What a decoder may raise that becomes a row: the run goes on with the others.

    Wide, because other decoders are other people's code in versions that we do not choose; the row
    names the error, and one of ours makes the command fail.
    """
    known: tuple[type[Exception], ...] = (
        WanVAEError,
        RuntimeError,
        ImportError,
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        AssertionError,
    )
    try:
        triton = importlib.import_module("triton.errors")
    except ImportError:
        return known
    return (*known, triton.TritonError)


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a host clock sees its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give back what dropped decoders held, so that the next one starts from nothing."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def times_ms(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Wall-clock milliseconds of each of `repeats` calls, the device idle before and after."""
    times = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        result = work()
        synchronise(device)
        times.append((time.perf_counter() - start) * 1e3)
        del result  # within the loop: the next call must not find its memory taken
    return times


def relative_error(
    pixels: torch.Tensor, reference: torch.Tensor, device: torch.device | None = None
) -> float:
    """||a - b|| / ||b|| of [B, 3, T, H, W], frame by frame on `device`, or where `pixels` are.

    Pixels are clamped to [-1, 1] first, which not every decoder does itself. inf for another shape.
    """
    if pixels.shape != reference.shape:
        return float("inf")
    top = bottom = 0.0
    for t in range(reference.shape[2]):
        r = reference[:, :, t].to(device or pixels.device).double()
        p = pixels[:, :, t].to(r.device).double().clamp(-1, 1)
        top += (p - r).square().sum().item()
        bottom += r.square().sum().item()
    return math.sqrt(top / bottom)


def reference_pixels(case: Case, weights: Weights, device: torch.device) -> torch.Tensor:
    """The float32 decode of `case`, on the CPU. Raises SystemExit if diffusers disagrees with it:
    there is nothing to measure by then."""
    z = case.random_latent().to(device)
    vae = WanVAE.from_state_dict(weights.native, device=device, dtype="fp32")
    t, h, w = _CHECKED
    crop = z[:, :, :t, :h, :w].contiguous()
    try:
        other = diffusers_model(weights, device, torch.float32)
    except ImportError:
        other = None
    if other is not None:
        with torch.inference_mode():
            drift = relative_error(_eager(vae, crop, "auto"), other.decode(crop).sample)
        del other
        if not drift < REFERENCE_GATE:
            raise SystemExit(
                f"wan-vae bench: {case.name}: the float32 reference differs from diffusers by "
                f"{drift:.1e}: no numbers"
            )
    return _eager(vae, z, "contiguous").cpu()


def _eager(vae: WanVAE, z: torch.Tensor, memory_format: MemoryFormat) -> torch.Tensor:
    pixels = vae.decode(z, memory_format=memory_format, backend="eager")
    assert pixels is not None  # None only with a sink
    return pixels


def measure_case(
    case: Case, decoders: Sequence[Baseline], weights: Weights, setting: Setting
) -> Iterator[Row]:
    """Two rows of each decoder, one decoder in memory at a time."""
    reference = reference_pixels(case, weights, setting.device)
    for decoder in decoders:
        free_memory(setting.device)
        yield from _measure_decoder(case, decoder, weights, reference, setting)
    free_memory(setting.device)


def _measure_decoder(
    case: Case, decoder: Baseline, weights: Weights, reference: torch.Tensor, setting: Setting
) -> Iterator[Row]:
    def without(kind: Kind, reason: str) -> list[Row]:
        return [NoNumber(case.name, decoder.name, route, kind, reason) for route in ROUTES]

    reason = decoder.unavailable_reason(setting.device, setting.dtype)
    if reason is not None:
        yield from without("unavailable", reason)
        return
    try:
        built = decoder.build(weights, setting.device, setting.dtype)
    except failures() as error:
        yield from without("failed", one_line(error))
        return
    try:
        for route in ROUTES:
            yield measure_route(case, decoder.name, route, built, reference, setting)
    finally:
        built.close()


def measure_route(
    case: Case, name: str, route: Route, built: Built, reference: torch.Tensor, setting: Setting
) -> Row:
    """Decode once for the gate and the memory, then `setting.repeats` times for the clock."""
    z = case.random_latent()
    run = built.image if route == "image" else built.decode
    if route == "device":
        z = z.to(setting.device)

    def drift(pixels: torch.Tensor) -> float:
        return relative_error(_as_pixels(pixels, route), reference, setting.device)

    return gated(case, name, route, lambda: run(z), drift, built.note, setting)


def gated(
    case: Case,
    name: str,
    route: Route,
    work: Callable[[], torch.Tensor],
    drift_of: Callable[[torch.Tensor], float],
    note: Callable[[], str],
    setting: Setting,
    warm_up: bool = False,
) -> Row:
    """Run `work` once for the gate and the memory, then `setting.repeats` times for the clock.

    drift_of: the relative error of its result. warm_up: run it once before, for what compiles.
    """
    device, dtype = setting.device, setting.dtype
    try:
        with torch.inference_mode():
            if warm_up:
                work()
            result, peak = with_peak(work, device)
            drift = drift_of(result)
            del result
            gate = FLOAT_GATE if dtype == torch.float32 else HALF_GATE
            if not drift < gate:
                reason = f"relative error {drift:.2e} is above the gate {gate:.0e}"
                return NoNumber(case.name, name, route, "refused", reason)
            times = times_ms(work, device, setting.repeats)
    except failures() as error:
        return NoNumber(case.name, name, route, "failed", one_line(error))
    return Result(
        case=case.name,
        decoder=name,
        route=route,
        dtype=dtype_name(dtype),
        median_ms=statistics.median(times),
        min_ms=min(times),
        max_ms=max(times),
        repeats=setting.repeats,
        peak_bytes=peak,
        error=drift,
        note=note(),
    )


def _as_pixels(result: torch.Tensor, route: Route) -> torch.Tensor:
    """What a route returned, as pixels [B, 3, T, H, W] in [-1, 1]."""
    if route == "device":
        return result
    frames = result.reshape(-1, *result.shape[-3:])
    return frames_to_pixels(frames)


def with_peak(
    work: Callable[[], torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, int | None]:
    """The result of `work`, and the device memory it took at most besides the result itself."""
    if device.type != "cuda":
        return work(), None
    synchronise(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = work()
    synchronise(device)
    # The clip itself is the same for all and is not counted.
    own = result.numel() * result.element_size() if result.device == device else 0
    return result, torch.cuda.max_memory_allocated(device) - before - own


def one_line(error: BaseException) -> str:
    """An error as text of one line for a table."""
    text = " ".join(str(error).split())[:240]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
