"""ShardContext: the place of this process among the ranks of a picture. Passed explicitly."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from zlib import crc32

from ..options import AxisRequest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# Kinds of runs whose messages a group remembers: a workflow has one or two.
_KINDS_OF_RUNS = 16


@dataclass
class Headers:
    """The messages of one kind of run whose headers the ranks have compared.

    `digest` is equal on all ranks that took part in the same exchanges.
    """

    keys: set[Hashable] = field(default_factory=set)
    digest: int = 0

    def add(self, key: Hashable, place: str) -> None:
        """Note that the message `key` at `place` is known; the order of the notes counts."""
        self.keys.add(key)
        self.digest = crc32(place.encode(), self.digest)

    def clear(self) -> None:
        """Forget everything: headers are compared again."""
        self.keys.clear()
        self.digest = 0


class Agreed:
    """What the ranks of one group have compared so far, for each kind of run."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, Headers] = {}

    def headers(self, kind: Hashable) -> Headers:
        """The headers of runs of this kind; those that were not used for longest are dropped."""
        found = self._kinds.pop(kind, None) or Headers()
        self._kinds[kind] = found
        while len(self._kinds) > _KINDS_OF_RUNS:
            del self._kinds[next(iter(self._kinds))]
        return found


@dataclass(frozen=True)
class ShardContext:
    """The place of one rank among the shards of a picture.

    `rank` and `world_size` are those of `group`; None means the default group. `axis` is the axis
    of the picture to divide; "auto" takes the one with less halo. `timeout_s` limits each wait for
    another rank with Gloo; NCCL uses the time-out of its group. `same_input` promises that all
    ranks read their input from the same place, so its contents are not compared. `agreed` is of the
    group: a caller that keeps one for all its runs has each header compared once, not in each run.
    """

    rank: int = 0
    world_size: int = 1
    axis: AxisRequest = "auto"
    group: ProcessGroup | None = None
    timeout_s: float = 30.0
    same_input: bool = False
    agreed: Agreed | None = field(default=None, compare=False, repr=False)

    @property
    def is_single(self) -> bool:
        """True when this process holds the whole picture: no halo, no collective."""
        return self.world_size == 1


SINGLE = ShardContext()
