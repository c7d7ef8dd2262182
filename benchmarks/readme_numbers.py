"""Checks that every measured number in README.md comes from a results file.

    python -m benchmarks.readme_numbers        # prints what has no source, or a wrong one

The sources stand in the README itself, in HTML comments; benchmarks/README.md describes them.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"

# A number with a unit. A ratio has no space before its x, so that "1024 x 1024" is none.
NUMBER = re.compile(
    r"(?<![\w.,-])(?:\d+(?:\.\d+)?e-\d+|\d+(?:\.\d+)?(?:x(?!\w)|\s*%|\s(?:ms|s|GiB|MiB|times)\b))"
)
# Two numbers that share a unit: the first would go unchecked.
_SHARED_UNIT = re.compile(
    r"(?<![\w.,-])\d+(?:\.\d+)?(?:,| and| to| or|-|–| /)\s*"
    r"\d+(?:\.\d+)?(?:x(?!\w)|\s*%|\s(?:ms|s|GiB|MiB)\b)"
)
_BARE_CELL = re.compile(r"\W*\d+(?:\.\d+)?\W*")
_BLOCK = re.compile(r"<!--\s*measured\b(.*?)-->", re.DOTALL)
_NOT_MEASURED = "not measured:"
# Units of the texts, as multiples of what a field with this suffix holds.
_PER_UNIT = {
    ("ms", "ms"): 1.0,
    ("s", "ms"): 1e-3,
    ("ms", "s"): 1e3,
    ("s", "s"): 1.0,
    ("GiB", "bytes"): 2.0**-30,
    ("MiB", "bytes"): 2.0**-20,
    ("GiB", "gib"): 1.0,
}


class SourceError(Exception):
    """A source that cannot be read, in one line."""


@dataclass
class _Section:
    """The text that one block of sources covers, from line `line` on, and that block's lines."""

    line: int
    text: str = ""
    sources: list[tuple[str, str]] = field(default_factory=list)

    def at(self, position: int) -> str:
        """Where `position` in the text is, in words."""
        return f"README.md:{self.line + self.text.count(chr(10), 0, position)}"


def problems(readme: str, results: Path = RESULTS) -> list[str]:
    """What is wrong with the numbers of `readme` (its text), one line each; [] if nothing is."""
    found: list[str] = []
    for section in _sections(readme):
        found += [
            f"{section.at(match.start())}: give each number its unit: {_spaced(match.group())}"
            for match in _SHARED_UNIT.finditer(section.text)
        ]
        found += [
            f"{section.at(position)}: a cell without a unit: {cell}"
            for position, cell in _bare_cells(section.text)
        ]
        unused = Counter(text for text, _ in section.sources)
        for match in NUMBER.finditer(section.text):
            text = _spaced(match.group())
            if unused[text] > 0:
                unused[text] -= 1
            else:
                found.append(f"{section.at(match.start())}: no source for {text}")
        end = section.at(len(section.text))
        found += [f"{end}: a source for {text}, which is not there" for text in unused.elements()]
        for text, source in section.sources:
            try:
                found += [f"{end}: {said}" for said in _check(text, source, results)]
            except SourceError as error:
                found.append(f"{end}: {text}: {error}")
    return found


def _sections(readme: str) -> Iterator[_Section]:
    """What is to be checked, cut before every heading and after every block of sources."""
    text = re.sub(r"^(```|~~~).*?^\1", _blank, readme, flags=re.DOTALL | re.MULTILINE)
    position = 0
    for match in re.finditer(rf"{_BLOCK.pattern}|^(?=#+ )", text, re.DOTALL | re.MULTILINE):
        lines = [] if match.group(1) is None else _source_lines(match.group(1))
        yield _section(text, position, match.start(), lines)
        position = match.end()
    yield _section(text, position, len(text), [])


def _section(text: str, start: int, stop: int, sources: list[tuple[str, str]]) -> _Section:
    return _Section(text.count("\n", 0, start) + 1, _visible(text[start:stop]), sources)


def _blank(match: re.Match[str]) -> str:
    """Code as empty lines, so that line numbers stay."""
    return "\n" * match.group().count("\n")


def _source_lines(block: str) -> list[tuple[str, str]]:
    lines = [line.strip() for line in block.splitlines() if line.strip()]
    parts = (line.partition(" =") for line in lines)
    return [(_spaced(text), source.strip()) for text, _, source in parts]


def _visible(text: str) -> str:
    """Without other comments, code and the targets of links."""
    text = re.sub(r"<!--.*?-->", _blank, text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def _bare_cells(text: str) -> Iterator[tuple[int, str]]:
    """Cells that are only a number, in tables that have a number with a unit; with positions."""
    for table in re.finditer(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        if NUMBER.search(table.group()):
            for cell in re.finditer(r"(?<=\|)[^|\n]*(?=\|)", table.group()):
                if _BARE_CELL.fullmatch(cell.group()):
                    yield table.start() + cell.start(), cell.group().strip()


def _spaced(text: str) -> str:
    return " ".join(text.replace("%", " %").split()).replace(" %", "%")


def _check(text: str, source: str, results: Path) -> list[str]:
    """[] if `source` gives the number `text`, rounded to its digits."""
    if not source:
        raise SourceError("expected TEXT = FILE: SOURCE")
    if source.startswith(_NOT_MEASURED):
        if not source.removeprefix(_NOT_MEASURED).strip():
            raise SourceError("not measured: expected the reason behind it")
        return []
    match = re.match(r"(\d+(?:\.\d+)?(?:e-\d+)?)\s*(.*)", text)
    if match is None:
        raise SourceError("expected a number and its unit first")
    shown, unit = match.groups()
    value, kind = _evaluate(source, results)
    value *= _factor(unit, kind)
    # Half a unit of the last digit that is shown; a tie may go either way.
    if abs(value - float(shown)) > 0.5 * 10.0 ** -_digits(shown) * (1 + 1e-9):
        return [f"{text}: its source says {value:.5g}"]
    return []


def _factor(unit: str, kind: str) -> float:
    """What turns a value of `kind` (a field's suffix, or "ratio") into `unit`."""
    if (unit, kind) in _PER_UNIT:
        return _PER_UNIT[unit, kind]
    if unit == "%" and kind == "ratio":
        return 100.0
    if unit in ("x", "times", "") and kind == "ratio":
        return 1.0
    raise SourceError(f"its source is in {kind}, which is not a unit for this number")


def _digits(shown: str) -> int:
    """Digits after the point, of "1.5e-2" as of "0.015"."""
    mantissa, _, exponent = shown.partition("e")
    return len(mantissa.partition(".")[2]) - int(exponent or 0)


def _evaluate(source: str, results: Path) -> tuple[float, str]:
    """Value and kind of `A`, `A / B`, `A - B`, `A / B - 1` or `1 - A / B`."""
    name = ""
    total, total_kind = 0.0, ""
    for i, term in enumerate(re.split(r"\s-\s", source)):
        value, kind = 1.0, "ratio"
        for j, factor in enumerate(re.split(r"\s/\s", term)):
            if factor.strip() == "1":
                continue
            file, colon, path = factor.partition(": ")
            name, path = (file.strip(), path) if colon else (name, factor)
            if not name:
                raise SourceError("expected the name of a results file, a colon and a source")
            one, one_kind = _look_up(name, path, results)
            value, kind = (value / one, "ratio") if j else (one, one_kind)
        if i and kind != total_kind:
            raise SourceError(f"{total_kind} minus {kind}")
        total, total_kind = (total - value if i else value), kind
    return total, total_kind


def _look_up(name: str, path: str, results: Path) -> tuple[float, str]:
    """A field of the one row of a file that has all of the given values, and its kind."""
    file = results / name
    if not file.is_file():
        raise SourceError(f"there is no benchmarks/results/{name}")
    # In quotes, a value may have commas.
    *conditions, wanted = next(csv.reader([path.strip()], skipinitialspace=True))
    rows = [
        row
        for row in _rows(json.loads(file.read_text(encoding="utf-8")))
        if wanted in row and all(_matches(row, condition) for condition in conditions)
    ]
    if len(rows) != 1:
        raise SourceError(f"{name}: {len(rows)} rows have {', '.join(conditions)}: expected one")
    value = rows[0][wanted]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SourceError(f"{name}: {wanted} is {value!r}: expected a number")
    suffix = wanted.rpartition("_")[2]
    return float(value), suffix if suffix in ("ms", "s", "bytes", "gib") else "ratio"


def _rows(data: object) -> Iterator[dict[str, object]]:
    """Every object of the file, at any depth."""
    if isinstance(data, dict):
        yield data
    if isinstance(data, (dict, list)):
        for value in data.values() if isinstance(data, dict) else data:
            yield from _rows(value)


def _matches(row: dict[str, object], condition: str) -> bool:
    name, equals, value = condition.partition("=")
    if equals:
        return str(row.get(name.strip())) == value.strip()
    return condition in (str(x) for x in row.values())


def main() -> int:
    """Print the problems of README.md; 1 if there are any."""
    found = problems(README.read_text(encoding="utf-8"))
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
