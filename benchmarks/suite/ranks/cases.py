"""What several ranks decode: the published models on GPUs, narrow ones on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.suite.cases import Case
from wan_vae.config import wan21, wan22


@dataclass(frozen=True)
class Sizes:
    """What is run: for correctness (two pictures), for time, for faults."""

    correct: tuple[Case, ...]
    timed: tuple[Case, ...]
    faults: Case
    timeout_s: float


def full_sizes() -> Sizes:
    """For GPUs: the published models and pictures."""
    a, b = wan21(), wan22()
    return Sizes(
        (
            Case("wan2.1 480p", a, (1, 16, 2, 60, 104)),
            Case("wan2.1 odd", a, (1, 16, 3, 47, 83)),
        ),
        (
            Case("wan2.1 480p x 81", a, (1, 16, 21, 60, 104)),
            Case("wan2.1 720p x 81", a, (1, 16, 21, 90, 160)),
            Case("wan2.2 720p x 121", b, (1, 48, 31, 44, 80)),
            Case("wan2.1 1080p x 81", a, (1, 16, 21, 135, 240)),
        ),
        Case("wan2.1 480p x 81", a, (1, 16, 21, 60, 104)),
        10.0,
    )


def small_sizes() -> Sizes:
    """For the CPU: narrow models, small pictures."""
    a, b = wan21(dim=8), wan22(dim=8, decoder_dim=16)
    return Sizes(
        (Case("small", a, (1, 16, 2, 6, 16)), Case("small odd", a, (1, 16, 3, 7, 17))),
        (Case("small", a, (1, 16, 5, 6, 16)), Case("small wan2.2", b, (1, 48, 2, 5, 16))),
        Case("small", a, (1, 16, 9, 6, 16)),
        3.0,
    )
