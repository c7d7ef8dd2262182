"""A device that is behind the host, as CUDA's are: for tests of who reads its marks, and when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

from wan_vae.clock import Mark


@dataclass
class Behind:
    """It passes a mark when somebody waits for it, and all of them in `catch_up`. Marks are a
    millisecond apart. read: the numbers of the marks at which spans began, in the order in which
    they were read. looks: how often somebody asked whether a mark is past.
    """

    marks: int = 0
    passed: int = 0
    waits: int = 0
    looks: int = 0
    read: list[int] = field(default_factory=list)

    def now(self, device) -> BehindMark:
        self.marks += 1
        return BehindMark(self, self.marks)

    def catch_up(self) -> None:
        self.passed = self.marks

    @property
    def spans(self) -> int:
        """Pairs of marks so far: all marks are one of a pair."""
        return self.marks // 2


@dataclass(frozen=True)
class BehindMark:
    """In place of a `Mark`."""

    device: Behind
    number: int

    def is_past(self) -> bool:
        self.device.looks += 1
        return self.number <= self.device.passed

    def wait(self) -> None:
        self.device.waits += 1
        self.device.passed = max(self.device.passed, self.number)

    def ms_until(self, later: BehindMark) -> float:
        assert self.number < later.number <= self.device.passed, "read before it was past"
        self.device.read.append(self.number)
        return float(later.number - self.number)


@contextmanager
def behind() -> Iterator[Behind]:
    """Inside, all marks are those of one such device."""
    device = Behind()
    with patch.object(Mark, "now", device.now):
        yield device
