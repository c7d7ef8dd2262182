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
# What a picture with the same bits in any chunks, strips and shards is worth: this share of the
# time of all layers.
_WORTH_OF_BITS = 0.02


@dataclass(frozen=True)
class Choice:
    """What runs a class of layers. The keys of `times_ms` and `refused` are proof keys.

    winner: the proof key of a configuration, or EAGER. times_ms: of every right one that was timed,
    and of EAGER if it was; empty where nothing was timed. refused: why the others that were tried
    cannot run.
    """

    winner: str
    times_ms: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def fastest(times_ms: Mapping[str, float]) -> str:
    """The key that wins. `times_ms`: right kernels, the preferred one first, and EAGER, which only
    competes where it was timed."""
    if all(key == EAGER for key in times_ms):
        return EAGER
    best = best_kernel(times_ms)
    eager, own = times_ms.get(EAGER, float("inf")), times_ms[best]
    is_eager = eager * _FASTER_EAGER < own and own - eager > _LEAST_SAVED_MS
    return EAGER if is_eager else best


def best_kernel(times_ms: Mapping[str, float]) -> str:
    """The key of the best kernel, however fast eager is."""
    kernels = {key: ms for key, ms in times_ms.items() if key != EAGER}
    best = next(iter(kernels))
    for key, ms in kernels.items():
        if ms * _FASTER_KERNEL < kernels[best]:
            best = key
    return best


def worth_their_bits(choices: Mapping[str, Choice], layers: Mapping[str, int]) -> dict[str, str]:
    """Classes for which eager is faster, but by little of the whole; the best kernel of each.

    choices: of every class of a model; layers: how many there are of each. All together lose at
    most a fiftieth of the time of all layers: one class that runs eager takes the same bits from
    the whole picture.
    """
    whole, losses = 0.0, {}
    for key, choice in choices.items():
        times = choice.times_ms
        whole += layers[key] * times.get(choice.winner, 0.0)
        if choice.winner == EAGER and len(times) > 1:
            losses[key] = layers[key] * (times[best_kernel(times)] - times[EAGER])
    kept: dict[str, str] = {}
    lost = 0.0
    for key, loss in sorted(losses.items(), key=lambda entry: entry[1]):
        lost += loss
        if lost > _WORTH_OF_BITS * whole:
            break
        kept[key] = best_kernel(choices[key].times_ms)
    return kept
