"""What differs where several ranks share a picture: an own part, an agreement before each chunk,
and a gather after it. `WholePicture` is the case of one process; see `shard_ranks` for the others.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ..chunking import Chunk
from ..errors import DecodeMemoryError
from ..layout import LayoutCounter
from ..ops.opset import HaloExchange
from ..planning.plan import Pace, Plan
from ..report import ReportBuilder


class Ranks(Protocol):
    """This process's part of a run. With several ranks every method but `read_waits` is a
    collective."""

    @property
    def exchange(self) -> HaloExchange | None:
        """The neighbours of this part; None where it is the whole picture."""
        ...

    @property
    def has_rows(self) -> bool:
        """False on an idle rank: there are more ranks than rows."""
        ...

    @property
    def receives(self) -> bool:
        """Whether this rank gets a result."""
        ...

    def own_part(self, x: torch.Tensor, factor: int = 1) -> torch.Tensor:
        """This rank's part of `x` [..., H, W], `factor` times the latent's size; a view."""
        ...

    def part_shape(self, shape: tuple[int, ...], factor: int = 1) -> tuple[int, ...]:
        """`shape` [..., H, W] of the whole picture -> that of this rank's part."""
        ...

    def result_shape(self, shape: tuple[int, ...], factor: int = 1) -> tuple[int, ...]:
        """`shape` of the whole picture -> that of the result that this rank gets."""
        ...

    def agree_on(self, plan: Plan) -> Pace:
        """The shortest chunks and the smallest passes that any rank planned."""
        ...

    def agree_to_stop(self, chunk: Chunk, stop: bool) -> bool:
        """Whether any rank wants to stop before `chunk`. Raises ShardingError out of step."""
        ...

    def gather(self, part: torch.Tensor, factor: int, site: str) -> torch.Tensor | None:
        """The result from every rank's `part`; None on a rank that gets none."""
        ...

    def read_waits(self, wait: bool) -> None:
        """Read how long exchanges took that are over; with `wait` all but the last one, as the
        device comes to their ends."""
        ...

    def complete(self, builder: ReportBuilder, counter: LayoutCounter, finite: bool) -> bool:
        """Put every rank's share into the report; whether all ranks' results were finite."""
        ...

    def out_of_memory(self, reason: str) -> DecodeMemoryError | None:
        """The error of this rank; None where the run itself knows what to say."""
        ...


class WholePicture:
    """One process has the whole picture: nobody to agree with, nothing to gather."""

    exchange: HaloExchange | None = None
    has_rows = True
    receives = True

    def own_part(self, x: torch.Tensor, factor: int = 1) -> torch.Tensor:
        return x

    def part_shape(self, shape: tuple[int, ...], factor: int = 1) -> tuple[int, ...]:
        return shape

    def result_shape(self, shape: tuple[int, ...], factor: int = 1) -> tuple[int, ...]:
        return shape

    def agree_on(self, plan: Plan) -> Pace:
        return plan.pace

    def agree_to_stop(self, chunk: Chunk, stop: bool) -> bool:
        return stop

    def gather(self, part: torch.Tensor, factor: int, site: str) -> torch.Tensor | None:
        return part

    def read_waits(self, wait: bool) -> None:
        """Nothing: there are no exchanges."""

    def complete(self, builder: ReportBuilder, counter: LayoutCounter, finite: bool) -> bool:
        return finite

    def out_of_memory(self, reason: str) -> DecodeMemoryError | None:
        return None
