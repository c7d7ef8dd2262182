"""ShardContext: which part of the picture this process decodes. Passed, never ambient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ShardContext:
    """One rank's place among the shards of a picture.

    `axis` is the picture axis that is cut. `group` is None exactly when there is one rank.
    """

    rank: int = 0
    world_size: int = 1
    axis: Literal["height", "width"] = "height"
    group: ProcessGroup | None = None

    @property
    def is_single(self) -> bool:
        """True when this process holds the whole picture: no halo, no collective."""
        return self.world_size == 1


SINGLE = ShardContext()
