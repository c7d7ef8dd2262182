"""The choice between right kernels, by their time on this card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

EAGER = "eager"
# How many times faster than the kernel in front of it a later one must be. Noise stays below it, so
# that the same card chooses the same kernel.
_FASTER_KERNEL = 1.05
# How many times faster eager must be than the best kernel: within that, a kernel's bits, which do
# not depend on the size of the picture, are worth more.
_FASTER_EAGER = 1.15
# What eager must save at least: a shorter time says more of the launch than of the layer.
_LEAST_SAVED_MS = 0.05


@dataclass(frozen=True)
class Choice:
    """What runs a class of layers. The keys of `times_ms` and `refused` are proof keys.

    winner: the proof key of a configuration, or EAGER. times_ms: of every right one that was timed,
    and of EAGER; empty where nothing was timed. refused: why the others that were tried cannot run.
    """

    winner: str
    times_ms: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def fastest(times_ms: Mapping[str, float]) -> str:
    """The key that wins. `times_ms`: right kernels, the preferred one first, and EAGER."""
    kernels = {key: ms for key, ms in times_ms.items() if key != EAGER}
    best = next(iter(kernels))
    for key, ms in kernels.items():
        if ms * _FASTER_KERNEL < kernels[best]:
            best = key
    eager, own = times_ms[EAGER], kernels[best]
    is_eager = eager * _FASTER_EAGER < own and own - eager > _LEAST_SAVED_MS
    return EAGER if is_eager else best
