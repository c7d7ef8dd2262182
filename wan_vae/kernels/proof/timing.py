"""Times right kernels against each other and against eager, on this card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch

from ...clock import Mark
from ...errors import named
from ...ops.problem import AttentionProblem, Problem
from ..device import Device
from ..kernel import Kernel
from .cases import Inputs, Size, checks_of, proof_size

# Milliseconds of one call of a function, which may be called several times.
Timer = Callable[[Callable[[], object]], float]

# Rounds over all that is compared, so that a card that changes its clock changes it for all, and
# calls in a row in each. The fastest round counts. What takes so many times as long as the fastest
# in one round cannot win in another.
_ROUNDS = 2
_CALLS = 2
_LOST = 2.0
# Rows and columns of a layer with 96 channels on a card of so many multiprocessors, and frames of
# every layer: 0.13 Tflop of a 3x3x3 convolution, which a small card does in 5 ms. A larger card
# gets up to four times as much: with few tiles for each multiprocessor the largest tile would lose.
_SIDE_OF_96, _MULTIPROCESSORS = 256, 28
_FRAMES = 4


@dataclass(frozen=True)
class Times:
    """Milliseconds of each configuration, or why it does not run at this size; and of eager, None
    where it was not timed."""

    kernels: tuple[float | str, ...]
    eager_ms: float | None


def device_timer(device: torch.device) -> Timer | None:
    """A timer by the events of a CUDA device; None elsewhere: the interpreter's times mean nothing.

    The call in front of those that are timed keeps the device busy while they are queued, so that
    the time is the device's and not the host's.
    """
    if device.type != "cuda":
        return None

    def measure(run: Callable[[], object]) -> float:
        run()
        start = Mark.now(device)
        for _ in range(_CALLS):
            run()
        stop = Mark.now(device)
        stop.wait()
        return start.ms_until(stop) / _CALLS

    return measure


def timed_size(problem: Problem, device: torch.device, multiprocessors: int) -> Size:
    """Frames, rows and columns on which a layer is timed: the wider, the smaller, as in a network.

    All layers with the same taps then have about the same work, and few of them seconds.
    """
    if device.type != "cuda":
        return proof_size(problem, device)
    if isinstance(problem, AttentionProblem):
        side = 96 if problem.channels <= 512 else 64
        return (1, side, side)
    widest = max(problem.in_channels, problem.out_channels)
    most = _SIDE_OF_96 * min(2.0, max(1.0, (multiprocessors / _MULTIPROCESSORS) ** 0.5))
    side = round(min(most, most * 96 / widest) / 8) * 8
    return (_FRAMES, max(side, 24), max(side, 24))


def time_kernels(
    contenders: Sequence[tuple[Kernel[Any, Any], str]],
    problem: Problem,
    device: Device,
    runs_on: torch.device,
    timer: Timer,
) -> Times:
    """Time configurations that are right, built for `device`, on `runs_on`, and what eager runs.

    Not eager where that would let a library search: it would do so for each class of layers, and
    again in a decode for each size that eager gets.
    """
    # All share their inputs.
    size = timed_size(problem, runs_on, device.multiprocessors)
    inputs = Inputs(runs_on, problem.feature_dtype, None, size, device.vendor == "amd")
    runs: list[Callable[[], object]] = []
    for kernel, config in contenders:
        checks = checks_of(kernel, problem, config, device, inputs)
        runs.append(_in_turn([check.kernel for check in checks]))
    if not device.tunes_by_search:
        runs.append(_in_turn([check.eager for check in checks]))
    best: list[float | str] = [inf] * len(runs)
    for _ in range(_ROUNDS):
        for i, run in enumerate(runs):
            known = best[i]
            if isinstance(known, str) or (known < inf and known > _LOST * _least(best)):
                continue
            failures = contenders[i][0].build_failures if i < len(contenders) else ()
            try:
                best[i] = min(known, timer(run))
            except torch.OutOfMemoryError:
                raise
            except failures as failure:
                best[i] = named(failure)
    eager = None if device.tunes_by_search else best.pop()
    assert not isinstance(eager, str)
    return Times(tuple(best), eager)


def _least(times: Sequence[float | str]) -> float:
    return min(ms for ms in times if not isinstance(ms, str))


def _in_turn(functions: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Run the parts of a layer one after another."""

    def run() -> None:
        for function in functions:
            function()

    return run
