"""README.md's measured numbers come from results files, and the check notices when they do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import readme_numbers

ROWS = {
    "rows": [
        {"case": "720p", "decoder": "ours", "median_ms": 972.12, "peak_bytes": 7777150464},
        {"case": "720p", "decoder": "peer", "median_ms": 2271.51, "error": 0.01535},
        {"case": "480p", "decoder": "ours", "median_ms": 395.17, "ranks": 2, "efficiency": 0.9},
        {"decoder": "core, as it is", "median_ms": 411},
    ]
}
OURS = "run.json: 720p, ours, median_ms"


@pytest.fixture
def problems(tmp_path: Path):
    """Check a text against the one results file `run.json`."""
    (tmp_path / "run.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return lambda *lines: readme_numbers.problems("\n".join(lines), tmp_path)


def test_the_readme_s_numbers_have_sources_that_say_the_same():
    text = readme_numbers.README.read_text(encoding="utf-8")
    assert readme_numbers.NUMBER.search(text), "the README quotes no number: check the pattern"
    assert readme_numbers.problems(text) == []


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("972 ms", OURS),
        ("1.0 s", OURS),
        ("0.97 s", OURS),
        ("7.2 GiB", "run.json: 720p, ours, peak_bytes"),
        ("2.34x", "run.json: 720p, peer, median_ms / 720p, ours, median_ms"),
        ("2.3 times", "run.json: 720p, peer, median_ms / run.json: 720p, ours, median_ms"),
        ("134%", "run.json: 720p, peer, median_ms / 720p, ours, median_ms - 1"),
        ("57 %", "1 - run.json: 720p, ours, median_ms / 720p, peer, median_ms"),
        ("1299 ms", "run.json: peer, median_ms - 720p, ours, median_ms"),
        ("1.5e-2", "run.json: peer, error"),
        ("90%", "run.json: ranks=2, efficiency"),
        ("411 ms", 'run.json: "decoder=core, as it is", median_ms'),
        ("10 s", "not measured: the time-out that docs/sharding.md names"),
    ],
)
def test_a_number_with_its_source_passes(problems, text, source):
    assert problems(f"It takes {text}.", "", "<!-- measured", f"{text} = {source}", "-->") == []


@pytest.mark.parametrize(
    ("text", "source", "said"),
    [
        ("973 ms", OURS, "its source says 972.12"),
        ("972 ms", "run.json: ours, median_ms", "2 rows"),
        ("972 ms", "run.json: 720p, theirs, median_ms", "0 rows"),
        ("972 ms", "gone.json: ours, median_ms", "there is no benchmarks/results/gone.json"),
        ("972 GiB", OURS, "in ms"),
        ("972 ms", "run.json: 720p, peer, decoder", "expected a number"),
        ("972 ms", "", "expected TEXT = FILE"),
        ("972 ms", "not measured:", "expected the reason"),
    ],
)
def test_a_wrong_source_is_named(problems, text, source, said):
    (found,) = problems(text, "<!-- measured", f"{text} = {source}", "-->")
    assert said in found


def test_a_number_of_a_table_without_a_source_is_named_with_its_line(problems):
    lines = ["| video | time |", "|---|---|", "| 720p | **972 ms** |", "", "<!-- measured", "-->"]
    assert problems(*lines) == ["README.md:3: no source for 972 ms"]
    assert problems(*lines[:3]) == ["README.md:3: no source for 972 ms"]


def test_a_source_covers_what_stands_above_it_up_to_the_heading(problems):
    block = ["<!-- measured", f"972 ms = {OURS}", "-->"]
    assert problems("## One", "972 ms", "## Two", *block) == [
        "README.md:2: no source for 972 ms",
        "README.md:4: a source for 972 ms, which is not there",
    ]
    assert problems("972 ms", *block, "again 972 ms", *block) == []
    assert problems("972 ms", *block, "again 972 ms") == ["README.md:5: no source for 972 ms"]
    assert problems("972 ms and once more 972 ms", *block) == ["README.md:1: no source for 972 ms"]


def test_numbers_that_could_hide_are_named(problems):
    assert "give each number its unit: 558 and 324 ms" in problems("558 and 324 ms")[0]
    assert "give each number its unit: 1 to 2%" in problems("1 to 2% more")[0]
    table = ["| video | ms | x |", "|---|---:|---:|", "| 720p | 972 | 2.34x |"]
    assert "README.md:3: a cell without a unit: 972" in problems(*table)


def test_what_is_no_measurement_is_left_alone(problems):
    assert (
        problems(
            "81 frames of 1024 x 1024 on a 6 GB card, 3x3x3, fastvae 0.1.0, 2026-11-28,",
            "`--limit-s 175 s` and [a link](results/2.34x.md); in 4 steps",
            "```console",
            "wan-vae decode   # takes 972 ms",
            "```",
            "<!-- 972 ms -->",
        )
        == []
    )


def test_the_command_prints_problems_and_fails(problems, monkeypatch, tmp_path, capsys):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(readme_numbers, "README", readme)
    readme.write_text("972 ms", encoding="utf-8")
    assert readme_numbers.main() == 1
    assert capsys.readouterr().out == "README.md:1: no source for 972 ms\n"
    readme.write_text("No number.", encoding="utf-8")
    assert readme_numbers.main() == 0
