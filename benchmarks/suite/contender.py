"""The one interface behind which every decoder of the comparison stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks.suite.weights import Weights


def _nothing() -> None:
    """A contender that leaves nothing behind."""


def _no_note() -> str:
    """A contender with nothing to say about its last decode."""
    return ""


@dataclass(frozen=True)
class Built:
    """A contender with its weights in place.

    decode: latent [B, z, T, H, W] float32 on the device -> pixels [B, 3, T', H', W'] on it.
    image: latent float32 on the CPU -> [B, T', H', W', 3] float32 in [0, 1] on the CPU, freshly
    allocated. close: gives back what outlives the object. note: what to know about the last decode.
    """

    decode: Callable[[torch.Tensor], torch.Tensor]
    image: Callable[[torch.Tensor], torch.Tensor]
    close: Callable[[], None] = _nothing
    note: Callable[[], str] = _no_note


class Contender(Protocol):
    """`why_not` says why it cannot run here, or None; `build` may raise what the peer raises."""

    name: str

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None: ...

    def build(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> Built: ...
