"""FeatureCache: the past frames that each causal convolution needs, in named slots.

The decoder takes a video chunk by chunk, and a convolution over three frames needs the last two
input frames of the previous chunk. Each convolution has a slot under its own name. Every run starts
with a fresh cache, so nothing is left over from the run before.
"""

from __future__ import annotations

from collections.abc import ItemsView

import torch


def may_overwrite(history: torch.Tensor) -> bool:
    """False if `history` was made in inference mode, because it is read-only outside of it."""
    return not history.is_inference() or torch.is_inference_mode_enabled()


class FeatureCache:
    """History frames by slot name, in the same memory from the first chunk to the last.

    A layer overwrites the history that it has read with the next one. History is the largest part
    of what a decode keeps; this way it exists only once and does not fragment the free memory. The
    old history is lost, so a decode that runs out of memory starts from the first frame with a
    fresh cache.
    """

    def __init__(self) -> None:
        self._slots: dict[str, torch.Tensor] = {}

    def take(self, slot: str, x: torch.Tensor, frames: int) -> torch.Tensor:
        """Remove and return the last `frames` input frames of `slot`, [B, C, frames, H, W].

        Before the first chunk they are zeros, with dtype and device of `x`, the convolution's input
        [B, C, T, H, W]. The caller stores the next history.
        """
        kept = self._slots.pop(slot, None)
        if kept is None:
            b, c, _, h, w = x.shape
            return x.new_zeros((b, c, frames, h, w))
        return kept

    def peek(self, slot: str) -> torch.Tensor | None:
        """The stored history of `slot`, or None before the first chunk."""
        return self._slots.get(slot)

    def pop(self, slot: str) -> torch.Tensor | None:
        """Remove and return what `peek` gives: in the last chunk, after which nobody reads it."""
        return self._slots.pop(slot, None)

    def store(self, slot: str, history: torch.Tensor) -> None:
        """Keep `history` for the next chunk. It must own its memory (no view of a chunk)."""
        self._slots[slot] = history

    def items(self) -> ItemsView[str, torch.Tensor]:
        """What is stored, in the order in which it was stored last."""
        return self._slots.items()

    def clear(self) -> None:
        """Remove all history and free its memory."""
        self._slots.clear()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(t.numel() * t.element_size() for t in self._slots.values())
