"""ShardContext: this process's place among the ranks of a picture. Passed, never ambient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..options import AxisRequest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ShardContext:
    """One rank's place among the shards of a picture.

    `rank` and `world_size` are those of `group`, which is None for the default group (or where
    there is one rank). `axis` is the picture axis to cut; "auto" takes the one that leaves less
    halo. `timeout_s` bounds each wait for another rank on a transport that can be waited for
    (Gloo); NCCL has the time-out with which its group was made. `same_input` promises that all
    ranks read their input from one place: then its contents are not compared first.
    """

    rank: int = 0
    world_size: int = 1
    axis: AxisRequest = "auto"
    group: ProcessGroup | None = None
    timeout_s: float = 30.0
    same_input: bool = False

    @property
    def is_single(self) -> bool:
        """True when this process holds the whole picture: no halo, no collective."""
        return self.world_size == 1


SINGLE = ShardContext()
