"""benchmarks/results: an index without gaps, and files that say where their numbers come from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"
FILES = sorted(path for path in RESULTS.rglob("*") if path.is_file())
MARKDOWN = [path for path in FILES if path.suffix == ".md"]
JSON = [path for path in FILES if path.suffix == ".json"]
# One page was written by hand over three files; their tables are in it.
NOT_PAIRED = {
    "archive/2026-11-25-h100-kernels.md": "a summary of -720p, -image and -cold of the same day",
    "archive/2026-11-25-h100-720p.json": "its table is in archive/2026-11-25-h100-kernels.md",
    "archive/2026-11-25-h100-image.json": "its table is in archive/2026-11-25-h100-kernels.md",
    "archive/2026-11-25-h100-cold.json": "its times are in archive/2026-11-25-h100-kernels.md",
}


def name(path: Path) -> str:
    return path.relative_to(RESULTS).as_posix()


def test_files_are_named_by_date_and_card_and_nothing_else_lies_there():
    assert len(JSON) > 10
    pattern = re.compile(r"(archive/)?20\d\d-\d\d-\d\d-h[12]00(x\d)?-\w+\.(md|json)")
    assert [name(p) for p in FILES if not pattern.fullmatch(name(p))] == []


def test_the_index_lists_every_file_and_no_other():
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\(results/([^)#]+)\)", readme)
    assert sorted(listed) == [name(path) for path in FILES]


def test_the_index_says_date_and_card_of_each_file():
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for line in readme.splitlines():
        for listed in re.findall(r"\]\(results/([^)#]+\.json)\)", line):
            data = json.loads((RESULTS / listed).read_text(encoding="utf-8"))
            _, date, card, *_ = (cell.strip() for cell in line.split("|"))
            assert date == data["date"] and card.split(" x ")[-1] in data["device"], listed


def test_markdown_and_json_come_in_pairs():
    alone = [name(p) for p in MARKDOWN if not p.with_suffix(".json").exists()]
    alone += [name(p) for p in JSON if not p.with_suffix(".md").exists()]
    assert sorted(alone) == sorted(NOT_PAIRED)


@pytest.mark.parametrize("path", JSON, ids=name)
def test_json_says_what_was_measured_on_what(path):
    data = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch(r"wan_vae\.bench(\.\w+)?/\d", data["schema"])
    assert data["date"] == path.name[:10]
    assert re.match(r"NVIDIA H[12]00", data["device"])
    assert data["versions"]["torch"] and data["command"]
    if "converted_from" in data:
        assert data["converted_from"] == path.with_suffix(".md").name and data["notes"]


@pytest.mark.parametrize("path", MARKDOWN, ids=name)
def test_markdown_says_what_was_measured_on_what(path):
    text = path.read_text(encoding="utf-8")
    said = dict(re.findall(r"^- (date|device|versions|command): (.+)$", text, re.MULTILINE))
    assert set(said) == {"date", "device", "versions", "command"}
    assert said["date"] == path.name[:10]
    twin = path.with_suffix(".json")
    if twin.exists():
        data = json.loads(twin.read_text(encoding="utf-8"))
        assert said["command"].strip("`") == data["command"]
        assert said["device"].startswith(data["device"])
        assert f"torch {data['versions']['torch']}" in said["versions"]


def table_numbers(text: str) -> set[str]:
    """The numbers of the tables."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return set(re.findall(r"\d+(?:\.\d+)?", "\n".join(rows)))


def times_of(data: object) -> Iterator[tuple[str, float]]:
    """Every time and ratio of a results file."""
    if isinstance(data, dict):
        for key, value in data.items():
            if key in ("median_ms", "decode_ms", "image_ms", "device_ms", "first_decode_ms"):
                yield key, float(value)
    if isinstance(data, (dict, list)):
        for value in data.values() if isinstance(data, dict) else data:
            yield from times_of(value)


@pytest.mark.parametrize("path", [p for p in JSON if p.with_suffix(".md").exists()], ids=name)
def test_both_files_of_a_pair_hold_the_same_times(path):
    data = json.loads(path.read_text(encoding="utf-8"))
    shown = table_numbers(path.with_suffix(".md").read_text(encoding="utf-8"))
    absent = [
        (key, value)
        for key, value in times_of(data)
        if not {f"{value:.1f}", f"{value:.0f}"} & shown
    ]
    assert absent == []
