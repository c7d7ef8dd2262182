"""What the registry checks, packs and the Manager installs, with their own programs on a copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.comfy import graphs
from tests.comfy.graphs import decode_and_compare, latent
from tests.comfy.provision import provision, provision_tools
from tests.comfy.server import PACK, REPOSITORY, Comfy, install_pack

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_the_managers_requirements_are_the_packages_dependencies():
    lines = (REPOSITORY / "requirements.txt").read_text().split()
    assert lines == PROJECT["project"]["dependencies"]
    assert not [line for line in lines if line.startswith("torch")]


def test_registry_metadata():
    comfy = PROJECT["tool"]["comfy"]
    assert comfy["DisplayName"]
    assert comfy["PublisherId"] == "", "the owner of the account fills it in"
    assert "web" not in comfy, "WEB_DIRECTORY says it"
    icon = comfy["Icon"].rpartition("/main/")[2]
    assert (REPOSITORY / icon).is_file()
    assert comfy["requires-comfyui"].count(".") == 2


def test_every_example_workflow_has_a_small_thumbnail():
    workflows = sorted((REPOSITORY / "example_workflows").glob("*.json"))
    assert len(workflows) == 7
    for workflow in workflows:
        picture = workflow.with_suffix(".jpg")
        assert picture.stat().st_size < 60_000
        assert Image.open(picture).width >= 400


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def tools() -> Path:
    return provision_tools()


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The pack as a git repository of its own, as a clone of it would be."""
    folder = install_pack(tmp_path_factory.mktemp("registry"))
    # The copy leaves tests out; what packs must leave them out by itself.
    (folder / "tests").mkdir()
    (folder / "tests" / "test_something.py").write_text("assert True\n")
    author = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    run("git", "init", "--quiet", cwd=folder)
    run("git", "add", "--all", cwd=folder)
    run("git", *author, "commit", "--quiet", "--message", "copy", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def packed(copy, tools) -> Path:
    """The archive that the registry would get."""
    run(tools / "comfy", "--skip-prompt", "node", "pack", cwd=copy)
    return copy / "node.zip"


@pytest.mark.comfy
def test_node_validate_is_clean(copy, tools):
    out = run(tools / "comfy", "--skip-prompt", "node", "validate", cwd=copy)
    assert "All validation checks passed" in out
    assert "warning" not in out.lower()


@pytest.mark.comfy
def test_node_pack_holds_what_runs_and_nothing_else(packed):
    names = zipfile.ZipFile(packed).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {"__init__.py", "nodes", "wan_vae", "js", "locales", "pyproject.toml"} <= tops
    assert {"LICENSE", "requirements.txt", "example_workflows"} <= tops
    unwanted = {"tests", ".ci", "benchmarks", ".gitignore", "Makefile"}
    assert not tops & unwanted
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    # All of it that templates need: the miniature VAE, which is most of the archive.
    assert [name for name in names if name.startswith("examples/") and name[-1] != "/"] == [
        "examples/wan_vae_mini.safetensors"
    ]
    assert packed.stat().st_size < 9_000_000


@pytest.mark.comfy
def test_the_packed_archive_decodes_in_comfyui(packed, tmp_path):
    """What was packed is complete: the server knows nothing of the repository."""

    def unpack(custom_nodes: Path) -> Path:
        zipfile.ZipFile(packed).extractall(custom_nodes / PACK)
        return custom_nodes / PACK

    server = Comfy(provision(), tmp_path / "comfy", install=unpack)
    graphs.write_vaes(server.base / "models" / "vae")
    server.install_probe()
    with server as comfy:
        done = comfy.run(decode_and_compare(latent(seed=1)))
        assert done.error is None, done.error
        assert done.outputs["5"]["difference"][0] < 1e-4
        assert "WanVAEDecodeToVideo" in comfy.get("/object_info/WanVAEDecodeToVideo")
        assert f"/extensions/{PACK}/main.js" in comfy.get("/extensions")


@pytest.mark.comfy
def test_the_manager_installs_it_and_leaves_the_folder_alone(copy, tools, tmp_path):
    """What the Manager does after its clone, by its own program: requirements, install scripts."""
    comfyui = tmp_path / "ComfyUI"
    shutil.copytree(provision().comfyui, comfyui, ignore=shutil.ignore_patterns(".git"))
    place = comfyui / "custom_nodes" / PACK
    run("git", "clone", "--quiet", copy, place, cwd=tmp_path)
    out = run(tools / "cm-cli", "post-install", place, cwd=comfyui, COMFYUI_PATH=str(comfyui))
    # It runs pip once a line, for what is there it says so; safetensors it never touches.
    for name in ("numpy", "av", "Pillow", "tqdm"):
        assert f"Requirement already satisfied: {name}" in out or f"'{name}'" in out.replace(
            "\n", " "
        ), out
    assert "torch==" not in out
    assert run("git", "status", "--porcelain", cwd=place) == ""
