"""What the Markdown files promise: links lead somewhere, examples run, messages exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import wan_vae
from tests.architecture.floors import drawing
from wan_vae.commands.cli import main
from wan_vae.io.latents import save_latent

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "benchmarks/**/*.md", "examples/*.md", "js/docs/*.md")
    for page in REPOSITORY.glob(pattern)
)
DOCS = REPOSITORY / "docs"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of `page` in `language`, in order."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text_of(page), re.DOTALL | re.MULTILINE)


# -- links ----------------------------------------------------------------------------------------


def local_links(page: Path) -> list[tuple[str, str]]:
    """(path, anchor) of the links of `page` that lead into the repository."""
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", without_code(text_of(page)))
    local = [t for t in targets if not t.startswith(("http://", "https://"))]
    return [(path, anchor) for path, _, anchor in (t.partition("#") for t in local)]


def anchors(page: Path) -> set[str]:
    """What the headings of `page` are called in links: as GitHub makes them."""
    headings = re.findall(
        r"^#+ +(.+)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_links_to_check():
    links = [link for page in PAGES for link in local_links(page)]
    assert len(PAGES) > 15
    assert len(links) > 40
    assert [anchor for _, anchor in links if anchor]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    wrong = []
    for path, anchor in local_links(page):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(f"{path}#{anchor}" if anchor else path)
    assert wrong == []


def test_every_page_is_in_the_index():
    linked = {path for path, _ in local_links(DOCS / "README.md")}
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= linked


def test_pictures_are_pictures():
    shown = {
        (page.parent / path).resolve()
        for page in PAGES
        for path, _ in local_links(page)
        if path.endswith((".png", ".jpg"))
    }
    for path in shown:
        with Image.open(path) as picture:
            picture.verify()
            assert picture.width >= 400, path
        assert path.stat().st_size < 400_000, path


# -- examples -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the files that the examples name: the miniature VAE and tiny latents."""
    shutil.copy(
        REPOSITORY / "examples/wan_vae_mini.safetensors", tmp_path / "wan_2.1_vae.safetensors"
    )
    generator = torch.Generator().manual_seed(0)
    for name in ("my", "other"):
        save_latent(tmp_path / f"{name}.latent", torch.randn(1, 16, 2, 2, 4, generator=generator))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ["python.md", "sharding.md"])
def test_the_python_of_a_page_runs_as_written(page, folder, capsys):
    names: dict[str, object] = {"__name__": "__main__"}
    found = blocks(DOCS / page, "python")
    assert found
    for block in found:
        exec(compile(block, page, "exec"), names)
    assert names["pixels"].shape == (1, 3, 5, 16, 32)
    assert names["latent"].shape == (1, 16, 2, 2, 4)
    assert capsys.readouterr().out


# Run elsewhere: tests/dist/test_torchrun.py, test_demo.py, tests/bench and test_cli.py.
RUN_ELSEWHERE = ("torchrun", "wan-vae demo", "wan-vae bench", "wan-vae doctor", "wan-vae warm")


def test_the_commands_of_the_command_line_page_run_as_written(folder, capsys):
    lines = [line for block in blocks(DOCS / "cli.md", "console") for line in block.splitlines()]
    commands = [line for line in lines if not line.startswith(RUN_ELSEWHERE)]
    assert len(commands) > 7
    for line in commands:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "wan-vae"
        assert main(arguments) == 0, (line, capsys.readouterr().err)
    made = {path.name for path in folder.iterdir()}
    assert {"out.mp4", "frames", "pixels.safetensors", "videos", "encoded.latent"} <= made
    assert len(list((folder / "frames").glob("*.png"))) == 5


@pytest.mark.parametrize(
    "command", ["decode", "encode", "inspect", "demo", "doctor", "warm", "bench"]
)
def test_every_command_has_its_place(command):
    assert f"wan-vae {command}" in text_of(DOCS / "cli.md")


def test_the_options_of_decode_are_those_of_the_page():
    section = (
        text_of(DOCS / "python.md").partition("## Options of `decode`")[2].partition("\n## ")[0]
    )
    named = {
        name
        for line in re.findall(r"^\| (`.+?`) \|", section, re.MULTILINE)
        for cell in line.split(", ")
        for name in re.findall(r"`(\w+)`", cell)
    }
    code = wan_vae.WanVAE.decode.__kwdefaults__
    assert named == set(code)


def test_contributing_shows_the_floors():
    assert f"```text\n{drawing()}```" in text_of(REPOSITORY / "CONTRIBUTING.md")


def test_every_public_name_is_explained_and_no_other():
    page = text_of(DOCS / "python.md")
    tables = page.partition("## Errors")[2]
    named = {
        name
        for cell in re.findall(r"^\| (`.+?) \|", tables, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", cell)
    }
    assert named | {"WanVAEError"} == set(wan_vae.__all__)
    assert [name for name in wan_vae.__all__ if not hasattr(wan_vae, name)] == []


# -- messages -------------------------------------------------------------------------------------


def texts_of_the_code() -> str:
    """Every string of the library, the nodes and the panel; values are left out."""
    texts = []
    for folder in ("wan_vae", "nodes"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(text_of(path))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    texts.append(text_of(REPOSITORY / "js/strings.js"))
    return "\n".join(texts)


def test_troubleshooting_quotes_messages_that_exist():
    """Each quoted message, word for word between its values: `...`, N, "latent" and "video"."""
    page = text_of(DOCS / "troubleshooting.md")
    cells = re.findall(r"^\| (`.+?) \| ", page, re.MULTILINE)
    bold = re.findall(r"^\*\*(`.+?)\*\*", page, re.MULTILINE)
    quoted = [quote for text in (*cells, *bold) for quote in re.findall(r"`(.+?)`", text)]
    assert len(quoted) > 30
    known = texts_of_the_code()
    missing = [
        (quote, part)
        for quote in quoted
        for part in re.split(r"\.\.\.|\b[A-Z]\b|\bHxW\b|^the (?:latent|video) itself", quote)
        if len(part.strip(" ():,")) > 2 and part.strip(" ():,") not in known
    ]
    assert missing == []


# What people type into ComfyUI's search box, and one node that they must find.
SEARCHES = {
    "tiled": "WanVAEDecode",
    "seamless": "WanVAEDecode",
    "qwen vae": "WanVAEDecode",
    "vae encode tiled": "WanVAEEncode",
    "vhs": "WanVAEDecodeToVideo",
    "video combine": "WanVAEDecodeToVideo",
    "latent to video": "WanVAECreateVideo",
    "image to video": "WanVAEAccelerate",
    "two gpus": "WanVAEDecodeSharded",
    "out of memory": "WanVAEDecode",
    "memory format": "WanVAEInspect",
}


def test_the_search_finds_the_nodes_by_what_people_type():
    aliases: dict[str, list[str]] = {}
    for path in (REPOSITORY / "nodes").glob("*.py"):
        for call in ast.walk(ast.parse(text_of(path))):
            if isinstance(call, ast.Call):
                named = {word.arg: word.value for word in call.keywords}
                if "search_aliases" in named:
                    node = ast.literal_eval(named["node_id"])
                    aliases[node] = ast.literal_eval(named["search_aliases"])
    assert len(aliases) == 7
    assert [text for text, node in SEARCHES.items() if text not in aliases[node]] == []


def test_each_input_has_words_in_both_languages():
    english, chinese = (
        json.loads(text_of(REPOSITORY / f"locales/{language}/nodeDefs.json"))
        for language in ("en", "zh")
    )
    for node, entry in english.items():
        for part in ("inputs", "outputs"):
            assert set(entry[part]) == set(chinese[node][part]), node
            for name, words in chinese[node][part].items():
                assert set(words) == set(entry[part][name]), f"{node}: {name}"


def test_the_english_locale_says_what_the_nodes_say():
    nodes = json.loads(text_of(REPOSITORY / "locales/en/nodeDefs.json"))
    texts = [
        entry["tooltip"]
        for node in nodes.values()
        for part in ("inputs", "outputs")
        for entry in node[part].values()
    ]
    texts += [node["description"] for node in nodes.values()]
    known = {
        node.value
        for path in (REPOSITORY / "nodes").glob("*.py")
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.Constant)
    }
    assert len(texts) > 30
    assert sorted(set(texts) - known) == []
