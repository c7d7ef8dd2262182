"""README: what a newcomer sees first stays short, and its commands exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def words(text: str) -> list[str]:
    return [word for word in text.split() if re.search(r"\w", word)]


def test_it_is_short_and_the_installation_is_on_the_first_screen():
    text = re.sub(r"<!--.*?-->", "", README, flags=re.DOTALL)
    assert len(words(text)) < 1000
    assert 50 < len(words(text.partition("## Install")[0])) < 180
    prose = [
        line for line in text.splitlines() if not line.startswith(("|", "![", "python_embeded"))
    ]
    assert [line for line in prose if len(line) > 100] == []


@pytest.mark.parametrize("script", ["make demo", "make bench"])
def test_make_targets_exist(script):
    assert script in README
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{script.removeprefix('make ')}:", makefile, re.MULTILINE)


def test_install_commands_name_files_and_addresses_that_exist():
    repository = PROJECT["project"]["urls"]["Repository"]
    assert README.count(f"git clone {repository}") == 2
    folder = repository.rpartition("/")[2]
    installed = re.findall(r"pip install -r (\S+)", README)
    assert installed == [
        f"{folder}/requirements.txt",
        f"ComfyUI\\custom_nodes\\{folder}\\requirements.txt",
    ]
    assert (REPOSITORY / "requirements.txt").is_file()
    assert f"comfy node install {PROJECT['project']['name']}" in README


def test_versions_are_those_of_the_project():
    assert f"ComfyUI {PROJECT['tool']['comfy']['requires-comfyui'].removeprefix('>=')}" in README
    assert f"Python {PROJECT['project']['requires-python'].removeprefix('>=')}" in README


def test_every_node_is_in_the_table():
    nodes = (REPOSITORY / "locales/en/nodeDefs.json").read_text(encoding="utf-8")
    names = re.findall(r'"display_name": "(Wan VAE [^"]+)"', nodes)
    assert len(names) == 6
    assert [name for name in names if f"| {name} |" not in README] == []
