"""ShardContext: the place of this process among the ranks of a picture. Passed explicitly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..options import AxisRequest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ShardContext:
    """The place of one rank among the shards of a picture.

    `rank` and `world_size` are those of `group`; None means the default group. `axis` is the axis
    of the picture to divide; "auto" takes the one with less halo. `timeout_s` limits each wait for
    another rank with Gloo; NCCL uses the time-out of its group. `same_input` promises that all
    ranks read their input from the same place, so its contents are not compared.
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
