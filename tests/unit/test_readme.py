"""What the Markdown files promise: links that lead somewhere, and Python that runs as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "benchmarks/**/*.md", "examples/*.md", "js/docs/*.md")
    for page in REPOSITORY.glob(pattern)
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [t for t in targets if not t.startswith(("http://", "https://"))]
    assert [t for t in local if not (page.parent / t).exists()] == []


def test_there_are_links_to_check():
    assert len(PAGES) > 10
    assert "](docs/sharding.md)" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs_as_written(monkeypatch, capsys):
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(REPOSITORY)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["pixels"].shape == (1, 3, 13, 136, 200)
    assert names["latent"].shape == (1, 16, 4, 17, 25)
    assert "mixed_calls" in capsys.readouterr().out
