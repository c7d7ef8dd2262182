"""Everything that one run of the benchmark found, as it grows."""

from __future__ import annotations

import datetime
import importlib.metadata
from dataclasses import asdict, dataclass, field

import torch

from benchmarks.suite.cold_start import ColdStart
from benchmarks.suite.measure import ROUTES, NoNumber, Result, Row
from benchmarks.suite.roofline import Ceilings, Roofline
from wan_vae.device import device_name, versions

SCHEMA = "wan_vae.bench/1"
_PEERS = ("diffusers", "fastvae")


@dataclass
class Results:
    """Facts about the run and its rows, in the order in which they were measured."""

    command: str
    device: str
    versions: dict[str, str]
    date: str
    rows: list[Row] = field(default_factory=list)
    cold: list[ColdStart | NoNumber] = field(default_factory=list)
    ceilings: Ceilings | None = None
    rooflines: list[Roofline | NoNumber] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, command: str, device: torch.device) -> Results:
        """An empty run, with the versions of what is installed."""
        found = {k: v for k, v in versions().items() if v}
        for peer in _PEERS:
            try:
                found[peer] = importlib.metadata.version(peer)
            except importlib.metadata.PackageNotFoundError:
                continue  # its rows say that it is absent
        return cls(command, device_name(device), found, datetime.date.today().isoformat())

    def find(self, case: str, contender: str, route: str) -> Row | None:
        """The row of `contender` on `route` of `case`."""
        wanted = (case, contender, route)
        return next((r for r in self.rows if (r.case, r.contender, r.route) == wanted), None)

    def wrong(self, case: str, contender: str) -> bool:
        """True if `contender` drew a wrong picture of `case` or failed: it gets no other number."""
        return any(
            isinstance(row, NoNumber) and row.kind != "unavailable"
            for row in (self.find(case, contender, route) for route in ROUTES)
        )

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(row.case for row in self.rows))

    @property
    def contenders(self) -> list[str]:
        return list(dict.fromkeys(row.contender for row in self.rows))

    @property
    def our_failures(self) -> list[NoNumber]:
        """Rows of this pack that should have had a number: a wrong picture or an error."""
        return [
            row
            for row in (*self.rows, *self.cold, *self.rooflines)
            if isinstance(row, NoNumber) and row.kind != "unavailable" and is_ours(row.contender)
        ]

    def as_dict(self) -> dict[str, object]:
        """JSON-ready; every row says its `kind` or, with a number, `result`."""
        return {
            "schema": SCHEMA,
            "date": self.date,
            "device": self.device,
            "versions": self.versions,
            "command": self.command,
            "notes": self.notes,
            "rows": [_plain(r) for r in self.rows],
            "cold_starts": [_plain(r) for r in self.cold],
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "rooflines": [_plain(r) for r in self.rooflines],
        }


def is_ours(contender: str) -> bool:
    """True for this pack, whatever its backend."""
    return contender.startswith("wan_vae")


def times_faster(results: Results, case: str, ours: str, peer: str, route: str) -> float | None:
    """The peer's time over ours, or None if either has no number."""
    a, b = results.find(case, ours, route), results.find(case, peer, route)
    if isinstance(a, Result) and isinstance(b, Result):
        return b.median_ms / a.median_ms
    return None


def _plain(row) -> dict[str, object]:
    # A row without a number has a `kind` of its own, which wins.
    return {"kind": "result", **asdict(row)}


def repeatable(argv: list[str]) -> str:
    """The command for the results file: without --output, whose folder is one machine's own."""
    kept = [
        word
        for before, word in zip(["", *argv], argv, strict=False)
        if before != "--output" and word.partition("=")[0] != "--output"
    ]
    return " ".join(["wan-vae bench", *kept])
