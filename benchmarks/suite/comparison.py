"""Everything that one comparison found, as it grows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from benchmarks.suite.cold_start import ColdStart
from benchmarks.suite.decoders import is_ours
from benchmarks.suite.facts import Facts
from benchmarks.suite.measure import ROUTES, NoNumber, Result, Route, Row
from benchmarks.suite.roofline import Ceilings, Roofline

SCHEMA = "wan_vae.bench/2"


@dataclass
class Comparison:
    """Facts about the run and its rows, in the order in which they were measured."""

    facts: Facts
    rows: list[Row] = field(default_factory=list)
    cold: list[ColdStart | NoNumber] = field(default_factory=list)
    ceilings: Ceilings | None = None
    rooflines: list[Roofline | NoNumber] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def find(self, case: str, decoder: str, route: Route) -> Row | None:
        """The row of `decoder` on `route` of `case`."""
        wanted = (case, decoder, route)
        return next((r for r in self.rows if (r.case, r.decoder, r.route) == wanted), None)

    def wrong(self, case: str, decoder: str) -> bool:
        """True if `decoder` drew a wrong picture of `case` or failed: it gets no other number."""
        return any(
            isinstance(row, NoNumber) and row.kind != "unavailable"
            for row in (self.find(case, decoder, route) for route in ROUTES)
        )

    def times_faster(self, case: str, ours: str, other: str, route: Route) -> float | None:
        """The other decoder's time over ours, or None if either has no number."""
        a, b = self.find(case, ours, route), self.find(case, other, route)
        if isinstance(a, Result) and isinstance(b, Result):
            return b.median_ms / a.median_ms
        return None

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(row.case for row in self.rows))

    @property
    def decoders(self) -> list[str]:
        return list(dict.fromkeys(row.decoder for row in self.rows))

    @property
    def our_failures(self) -> list[NoNumber]:
        """Rows of this pack that should have had a number: a wrong picture or an error."""
        return [
            row
            for row in (*self.rows, *self.cold, *self.rooflines)
            if isinstance(row, NoNumber) and row.kind != "unavailable" and is_ours(row.decoder)
        ]

    def as_dict(self) -> dict[str, object]:
        """JSON-ready; every row says its `kind` or, with a number, `result`."""
        return {
            **self.facts.as_dict(),
            "notes": self.notes,
            "rows": [_plain(r) for r in self.rows],
            "cold_starts": [_plain(r) for r in self.cold],
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "rooflines": [_plain(r) for r in self.rooflines],
        }


def _plain(row: Row | ColdStart | Roofline) -> dict[str, object]:
    # A row without a number has a `kind` of its own, which wins.
    return {"kind": "result", **asdict(row)}
