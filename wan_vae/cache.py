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
    """History frames by slot name. Chunks of several latent frames never write them in place.

    That makes `snapshot` / `restore` cheap (references, no copies): when such a chunk runs out of
    memory halfway, the cache goes back to the state before it and a smaller chunk starts over. A
    chunk of one latent frame has no smaller one and writes over what it takes: where memory is
    short, long-lived tensors then stay where they are, and do not break up what is free.
    """

    def __init__(self) -> None:
        self._slots: dict[str, torch.Tensor] = {}

    def take(self, slot: str, x: torch.Tensor, frames: int) -> torch.Tensor:
        """The last `frames` input frames of `slot`, [B, C, frames, H, W]; zeros before the first.

        Removed from the cache: the caller stores the next ones, and frees these before it makes
        them. Zeros take dtype and device from `x`, the convolution's input [B, C, T, H, W].
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

    def snapshot(self) -> dict[str, torch.Tensor]:
        """The current references; see `restore`."""
        return dict(self._slots)

    def restore(self, snapshot: dict[str, torch.Tensor]) -> None:
        """Go back to `snapshot`, dropping what was stored since."""
        self._slots = dict(snapshot)

    def clear(self) -> None:
        """Forget everything; frees the memory of all slots."""
        self._slots.clear()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes held by all slots."""
        return sum(t.numel() * t.element_size() for t in self._slots.values())
