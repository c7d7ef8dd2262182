"""FeatureCache: the past frames that each causal convolution keeps, in named slots.

The decoder sees a video chunk by chunk; a convolution of three frames needs the last two inputs
of the chunk before. Each convolution has a slot (its own name); a fresh cache starts a fresh
video, so nothing is ever left over from the last decode.
"""

from __future__ import annotations

import torch


def may_overwrite(history: torch.Tensor) -> bool:
    """False of a tensor that was made in inference mode, outside of which it is read-only."""
    return not history.is_inference() or torch.is_inference_mode_enabled()


class FeatureCache:
    """History frames by slot name, in the same memory from the first chunk to the last.

    A layer writes the next history over the one that it read: it is the largest part of what a
    decode holds, is then never held twice, and does not break up the memory that is free. So there
    is no way back: a decode that runs out of memory starts a fresh cache, from the first frame.
    """

    def __init__(self) -> None:
        self._slots: dict[str, torch.Tensor] = {}

    def take(self, slot: str, x: torch.Tensor, frames: int) -> torch.Tensor:
        """The last `frames` input frames of `slot`, [B, C, frames, H, W]; zeros before the first.

        Removed from the cache: the caller stores the next ones. Zeros take dtype and device from
        `x`, the convolution's input [B, C, T, H, W].
        """
        kept = self._slots.pop(slot, None)
        if kept is None:
            b, c, _, h, w = x.shape
            return x.new_zeros((b, c, frames, h, w))
        return kept

    def peek(self, slot: str) -> torch.Tensor | None:
        """The stored history of `slot`, or None before the first chunk."""
        return self._slots.get(slot)

    def store(self, slot: str, history: torch.Tensor) -> None:
        """Keep `history` for the next chunk. It must own its memory (no view of a chunk)."""
        self._slots[slot] = history

    def clear(self) -> None:
        """Forget everything; frees the memory of all slots."""
        self._slots.clear()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes held by all slots."""
        return sum(t.numel() * t.element_size() for t in self._slots.values())
