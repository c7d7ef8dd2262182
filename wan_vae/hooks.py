"""What a run calls while it is under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .report import DecodeReport

# Frames done, frames in all, and the report of this moment.
OnProgress = Callable[[int, int, DecodeReport], None]
# Asked before each pass; true ends the run with DecodeCancelled.
ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class Hooks:
    """`on_progress` is called after each pass, `should_stop` before each."""

    on_progress: OnProgress | None = None
    should_stop: ShouldStop | None = None
