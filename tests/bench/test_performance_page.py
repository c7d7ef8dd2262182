"""docs/performance.md: each section with numbers says where they come from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.suite.parts import OTHER_PARTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
MEASURED = re.compile(r"\d\s?(?:ms|GiB|TFLOP/s|%)|\dx\b")


@pytest.mark.parametrize(
    "section", [s for s in SECTIONS if MEASURED.search(s)], ids=lambda s: s.partition("\n")[0]
)
def test_each_section_with_numbers_names_its_sources(section):
    (sources,) = re.findall(r"^Source: (.+(?:\n.+)*)", section, re.MULTILINE)
    assert re.search(r"`results/|`wan-vae bench ", sources)


def test_sources_exist():
    named = re.findall(r"`results/([\w./-]+)`", PAGE)
    assert len(named) > 10
    assert [n for n in named if not (ROOT / "benchmarks" / "results" / n).is_file()] == []
    parts = set(re.findall(r"`wan-vae bench (\w+)", PAGE))
    assert parts <= {*OTHER_PARTS, "decode", "layers", "cold"}
