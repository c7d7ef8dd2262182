"""How much of the free device memory a plan may use, for each allocator.

The rest is what a plan does not know: free memory in pieces that no tensor fits into, the modules
of kernels that CUDA loads at their first call, and the workspaces of its libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..device import Allocator


@dataclass(frozen=True)
class Margin:
    """Shares of the free bytes that a plan may use, and why.

    whole: of whole pictures. shards: of a rank's part of them, which cannot start again with less
    where memory runs out. strips: of strips of our kernels. eager_strips: of strips of the eager
    backend.
    """

    whole: float
    shards: float
    strips: float
    eager_strips: float
    reason: str

    def of(self, strips: int, is_eager: bool, is_shard: bool) -> float:
        """The share for a plan of `strips` strips (1 is the whole picture), or of a shard."""
        if is_shard:
            return self.shards
        if strips == 1:
            return self.whole
        return self.eager_strips if is_eager else self.strips


MARGINS: Mapping[Allocator, Margin] = MappingProxyType(
    {
        # NVIDIA H100, allocator capped to 8 GB, 1080p in three strips: our kernels ran out at 0.82;
        # capped to 6 GB, 720p in two, the eager backend did at 0.73. More strips cost it little.
        # Two NVIDIA H200 of which one had 2.4 GiB free: 480p ran out at 0.79, where 770 MiB of the
        # allocator's memory lay in pieces too small for the next tensor.
        "caching": Margin(0.85, 0.7, 0.75, 0.6, "free memory lies in pieces between tensors"),
        # As the caching allocator, until somebody measures that less is enough: its pieces are
        # pages, but it frees them only when it runs out.
        "expandable_segments": Margin(
            0.85, 0.7, 0.75, 0.6, "pages are freed only when it runs out"
        ),
        # NVIDIA H200 with 8 GB free, ComfyUI 0.33: 1080p in three strips planned 5.0 GiB of 7.2
        # (0.70) and ran out, four strips planned 4.0 (0.56) and held.
        "cudaMallocAsync": Margin(
            0.8, 0.6, 0.6, 0.5, "CUDA's pool frees in the order of streams, and joins no pieces"
        ),
    }
)
