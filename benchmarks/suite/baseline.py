"""The one interface behind which every decoder of the comparison stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks.suite.weights import Weights


def _nothing() -> None:
    """A decoder that leaves nothing behind."""


def _no_note() -> str:
    """A decoder with nothing to say about its last decode."""
    return ""


@dataclass(frozen=True)
class Built:
    """A decoder with its weights in place.

    decode: latent [B, z, T, H, W] float32 on the device -> pixels [B, 3, T', H', W'] on it.
    image: latent float32 on the CPU -> [B, T', H', W', 3] float32 in [0, 1] on the CPU, freshly
    allocated. close: gives back what outlives the object. note: what to know about the last decode.
    """

    decode: Callable[[torch.Tensor], torch.Tensor]
    image: Callable[[torch.Tensor], torch.Tensor]
    close: Callable[[], None] = _nothing
    note: Callable[[], str] = _no_note


class Baseline(Protocol):
    """A decoder to compare: this pack with one backend, or somebody else's."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run here, or None."""
        ...

    def build(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> Built:
        """Put `weights` on `device`. Raises what its own code raises."""
        ...
