"""What was counted of faults, in one process (`rounds.py`) or several (`at_once.py`); its page."""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.suite.facts import Facts
from benchmarks.suite.ranks.results import Fault

NAME = "faults"


@dataclass
class Counted:
    """All rounds of one kind of fault. said: what was said, and how often."""

    name: str
    rounds: int = 0
    right: int = 0
    seconds: list[float] = field(default_factory=list)
    next_s: list[float] = field(default_factory=list)
    said: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, fault: Fault, left: Sequence[str], next_s: float, is_right: bool) -> bool:
        """Count one round; whether it was right. left: what stayed behind. next_s, is_right: of the
        next decode."""
        self.rounds += 1
        self.seconds.append(fault.seconds)
        self.next_s.append(next_s)
        self.said[fault.said] = self.said.get(fault.said, 0) + 1
        if not fault.passed:
            self.wrong.append(f"round {self.rounds}: {fault.said} after {fault.seconds:.1f} s")
        if left:
            self.wrong.append(f"round {self.rounds}: left behind: {', '.join(left)}")
        if not is_right:
            self.wrong.append(f"round {self.rounds}: the next decode was wrong")
        is_good = fault.passed and not left and is_right
        self.right += is_good
        return is_good

    def take(self, other: Counted, who: str) -> None:
        """Add the rounds of the same kind that the process `who` counted."""
        self.rounds += other.rounds
        self.right += other.right
        self.seconds += other.seconds
        self.next_s += other.next_s
        self.said = dict(Counter(self.said) + Counter(other.said))
        self.wrong += [f"{who}, {text}" for text in other.wrong]


@dataclass
class Counts:
    """All kinds of faults, by the short name of the kind, of a run that may still go on.

    not_run: rounds of each kind that are missing. failed: what is said of each process that did not
    end as it should. is_done: whether the run came to its end, for which a limit is one.
    """

    facts: Facts
    devices: int
    wanted: dict[str, int]
    timeout_s: float
    at_once: int = 1
    transport: str = ""
    found: dict[str, Counted] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    is_done: bool = False

    @property
    def not_run(self) -> dict[str, int]:
        run = {kind: one.rounds for kind, one in self.found.items()}
        missing = {kind: rounds - run.get(kind, 0) for kind, rounds in self.wanted.items()}
        return {kind: rounds for kind, rounds in missing.items() if rounds > 0}

    @property
    def is_right(self) -> bool:
        """Whether something was counted, and nothing of it was wrong."""
        all_right = all(one.right == one.rounds for one in self.found.values())
        return bool(self.found) and all_right and not self.failed

    def take(self, data: Mapping[str, Any], who: str) -> None:
        """Add what the process `who` wrote with `as_dict`."""
        self.transport = data["transport"]
        for plain in data["faults"]:
            other = Counted(**{name: value for name, value in plain.items() if name != "kind"})
            self.found.setdefault(plain["kind"], Counted(other.name)).take(other, who)

    def as_dict(self) -> dict[str, Any]:
        """The counts for a JSON file."""
        return {
            **self.facts.as_dict(),
            "devices": self.devices,
            "transport": self.transport,
            "at_once": self.at_once,
            "timeout_s": self.timeout_s,
            "is_done": self.is_done,
            "faults": [{"kind": kind, **asdict(one)} for kind, one in self._in_order()],
            "not_run": self.not_run,
            "failed": self.failed,
        }

    def markdown(self) -> str:
        """The counts as Markdown."""
        lines = [
            "# Faults in decodes over several devices, counted",
            "",
            *self.facts.lines(),
            f"- devices: {self.devices}, transport {self.transport}, time-out {self.timeout_s:g} s",
        ]
        if self.at_once > 1:
            lines += [
                f"- {self.at_once} processes shared the rounds and the devices: their times are of",
                "  a busy machine; no other one ran beside `memory`",
            ]
        lines += [
            "- right: it ended as documented and in time, nothing was left behind (no process,",
            "  file or shared memory), and the next decode had the bits of the first",
            "- seconds: until the error (or the end); next decode: with the start of workers",
            "",
            "| fault | rounds | right | seconds, median (longest) | next decode, s | said |",
            "|---|---:|---:|---:|---:|---|",
        ]
        for _, one in self._in_order():
            often = sorted(one.said, key=one.said.__getitem__, reverse=True)
            said = "; ".join(f"{text} ({one.said[text]})" for text in often[:2])
            lines.append(
                f"| {one.name} | {one.rounds} | {one.right} | {statistics.median(one.seconds):.1f} "
                f"({max(one.seconds):.1f}) | {statistics.median(one.next_s):.1f} | {said} |"
            )
        lines += [f"- **{one.name}**: {text}" for _, one in self._in_order() for text in one.wrong]
        lines += [f"- **{who}**: {text}" for who, text in self.failed.items()]
        if self.not_run:
            missing = ", ".join(f"{kind} {rounds}" for kind, rounds in self.not_run.items())
            lines.append(f"- rounds not run: {missing}")
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """Write faults.md and faults.json, each of which is there as a whole at any time."""
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / f"{NAME}.md", self.markdown())
        _replace(folder / f"{NAME}.json", json.dumps(self.as_dict(), indent=1) + "\n")

    def _in_order(self) -> Iterable[tuple[str, Counted]]:
        """In the order in which the kinds were named, whichever ended first."""
        return [(kind, self.found[kind]) for kind in self.wanted if kind in self.found]


def read(folder: Path) -> dict[str, Any] | None:
    """What `write` left in `folder`; None if that is nothing yet."""
    file = folder / f"{NAME}.json"
    if not file.is_file():
        return None
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


def _replace(file: Path, text: str) -> None:
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, file)
