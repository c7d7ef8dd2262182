"""A module knows its own floor and lower ones; the floors are in `floors.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture.floors import (
    FLOORS,
    circles,
    drawing,
    floor_of,
    homeless,
    is_in_any,
    module_edges,
    room_edges,
    violations,
)
from tests.architecture.imports import Import, UnreadableImport, imports_of, modules_of

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("wan_vae", "nodes", "benchmarks", "examples")

# Modules that import a package by a name which their caller gives: packages from elsewhere.
UNREAD = ("wan_vae.io.files",)

# Imports that break a rule, and the reason: a list that may get shorter. An entry without an import
# fails the test below, as does an import without an entry.
ALLOWED = {
    "wan_vae.commands.bench -> benchmarks.suite.command": (
        "finds the benchmarks of a clone by name, and says so where there are none"
    ),
}


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return imports_of(modules_of(REPOSITORY, PACKAGES), UNREAD)


def test_every_module_has_a_floor():
    assert homeless(modules_of(REPOSITORY, PACKAGES)) == []


def test_nothing_is_imported_from_above_or_from_a_sibling(imports):
    found = {f"{one.module} -> {one.imported}": one for one in violations(imports)}
    fresh = [str(one) for name, one in found.items() if name not in ALLOWED]
    stale = [name for name in ALLOWED if name not in found]
    assert not fresh, "imports that the floors forbid"
    assert not stale, "no longer true: take these entries out of ALLOWED"


def test_no_modules_import_each_other(imports):
    assert circles(module_edges(imports)) == []


def test_no_rooms_import_each_other(imports):
    assert circles(room_edges(imports)) == []


def test_every_room_of_the_drawing_exists():
    modules = modules_of(REPOSITORY, PACKAGES)
    rooms = [room for floor in FLOORS for room in floor.rooms]
    empty = [room for room in rooms if not any(is_in_any(name, [room]) for name in modules)]
    assert empty == []


def test_contributing_holds_the_drawing():
    """`python -m tests.architecture.floors` prints it."""
    assert f"```text\n{drawing()}```\n" in (REPOSITORY / "CONTRIBUTING.md").read_text()
    numbers = [line[:2].strip() for line in drawing().splitlines()[: len(FLOORS)]]
    assert numbers == [str(number) for number in reversed(range(len(FLOORS)))]


# The reader and the rules themselves, on trees with one fault each.


def plant(root: Path, files: dict[str, str]) -> list[Import]:
    """Write a tree of `wan_vae` and `nodes`, read its imports."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.relative_to(root).parents[:-1]:
            (root / folder / "__init__.py").touch()
        path.write_text(text)
    return imports_of(modules_of(root, [name for name in PACKAGES if (root / name).is_dir()]))


def faults(root: Path, files: dict[str, str]) -> list[str]:
    return [f"{one.module} -> {one.imported}" for one in violations(plant(root, files))]


ARROWS = {
    "at the top": "from .pipeline import load\n",
    "in a function": "def late():\n    from .pipeline import load\n",
    "of the package's name": "def late():\n    from . import pipeline\n",
    "absolute": "import wan_vae.pipeline\n",
    "for type checkers": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .pipeline import load\n"
    ),
    "by name": "import importlib\nload = importlib.import_module('wan_vae.pipeline').load\n",
    "by relative name": (
        "from importlib import import_module\nimport_module('.pipeline', __package__)\n"
    ),
    "by a table": (
        "from importlib import import_module\n"
        "HOMES = {'load': 'pipeline'}\n"
        "def __getattr__(name):\n"
        "    return getattr(import_module(f'wan_vae.{HOMES[name]}'), name)\n"
    ),
    "by a table's default": (
        "from importlib import import_module\n"
        "HOMES = {'load': 'errors'}\n"
        "def __getattr__(name):\n"
        "    return import_module(f'wan_vae.{HOMES.get(name, \"pipeline\")}')\n"
    ),
}


@pytest.mark.parametrize("text", ARROWS.values(), ids=ARROWS)
def test_an_arrow_up_is_found(tmp_path, text):
    files = {"wan_vae/geometry.py": text, "wan_vae/pipeline.py": "", "wan_vae/errors.py": ""}
    assert faults(tmp_path, files) == ["wan_vae.geometry -> wan_vae.pipeline"]


@pytest.mark.parametrize(
    ("module", "text", "imported"),
    [
        ("network/blocks", "from ..sharding.halo import Shard\n", "wan_vae.sharding.halo"),
        ("sharding/halo", "from ..network.blocks import Step\n", "wan_vae.network.blocks"),
        ("kernels/select", "from ..network import blocks\n", "wan_vae.network.blocks"),
        ("kernels/cuda/norm", "from ..triton import norm\n", "wan_vae.kernels.triton.norm"),
        ("kernels/triton/norm", "from ..cuda import norm\n", "wan_vae.kernels.cuda.norm"),
        ("planning/peak", "from ..network import blocks\n", "wan_vae.network.blocks"),
        ("workers/pool", "import comfy.utils\n", "comfy.utils"),
        ("commands/cli", "def bench():\n    from benchmarks import suite\n", "benchmarks.suite"),
        ("network/blocks", "import torch.distributed as dist\n", "torch.distributed"),
        ("network/blocks", "from torch import distributed\n", "torch.distributed"),
        ("network/blocks", "import torch\ntorch.distributed.barrier()\n", "torch.distributed"),
        (
            "runs/decode",
            "def f():\n    from torch.distributed import barrier\n",
            "torch.distributed.barrier",
        ),
        ("kernels/select", "import triton\n", "triton"),
        ("planning/peak", "from triton.tools import experimental\n", "triton.tools.experimental"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, module, text, imported):
    files = {
        "wan_vae/network/blocks.py": "",
        "wan_vae/sharding/halo.py": "",
        "wan_vae/kernels/cuda/norm.py": "",
        "wan_vae/kernels/triton/norm.py": "",
        "benchmarks/suite.py": "",
        f"wan_vae/{module}.py": text,
    }
    name = f"wan_vae.{module.replace('/', '.')}"
    assert faults(tmp_path, files) == [f"{name} -> {imported}"]


def test_a_name_may_be_imported_at_home_and_by_type_checkers_everywhere(tmp_path):
    checked = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
    files = {
        "wan_vae/sharding/transport.py": "import torch.distributed as dist\n",
        "wan_vae/sharding/context.py": f"{checked}    from torch.distributed import ProcessGroup\n",
        "wan_vae/kernels/triton/norm.py": "import triton.language as tl\n",
        "wan_vae/planning/peak.py": "from ..network.architecture import stages\n",
        "wan_vae/network/architecture.py": "stages = 4\n",
        "nodes/decode.py": "from ..wan_vae import pipeline\nimport comfy.utils\n",
        "wan_vae/pipeline.py": "",
    }
    assert faults(tmp_path, files) == []


def test_relative_imports_of_nodes_lead_to_the_library(tmp_path):
    files = {
        "nodes/bridge.py": "from ..wan_vae import WanVAE\nfrom ..wan_vae.io import image\n",
        "wan_vae/io/image.py": "",
    }
    found = {one.imported for one in plant(tmp_path, files) if one.module == "nodes.bridge"}
    assert found == {"wan_vae", "wan_vae.io.image"}


def test_a_circle_is_found_though_one_side_is_lazy(tmp_path):
    files = {
        "wan_vae/chunking.py": "from .geometry import size\n",
        "wan_vae/geometry.py": "def size():\n    from .layout import detect\n",
        "wan_vae/layout.py": "def detect():\n    from .chunking import Chunk\n",
        "wan_vae/errors.py": "",
        "wan_vae/config.py": "from .errors import CheckpointError\n",
    }
    imports = plant(tmp_path, files)
    assert violations(imports) == [], "they lie on one floor"
    circle = ["wan_vae.chunking", "wan_vae.geometry", "wan_vae.layout"]
    assert circles(module_edges(imports)) == [circle]


def test_a_circle_of_rooms_is_found_where_no_modules_form_one(tmp_path):
    files = {
        "wan_vae/io/checkpoint.py": "from ..network.model import expected_shapes\n",
        "wan_vae/network/model.py": "",
        "wan_vae/network/cache.py": "from ..io.files import first_line\n",
        "wan_vae/io/files.py": "",
    }
    imports = plant(tmp_path, files)
    assert circles(module_edges(imports)) == []
    assert circles(room_edges(imports)) == [["wan_vae.io.*", "wan_vae.network.*"]]


def test_two_circles_are_told_apart_and_a_chain_is_none():
    edges = {"a": ["b"], "b": ["a", "c"], "c": ["d"], "d": ["e"], "e": ["c"], "f": ["a"]}
    assert circles(edges) == [["a", "b"], ["c", "d", "e"]]


def test_a_module_without_a_floor_is_found(tmp_path):
    plant(tmp_path, {"wan_vae/cellar.py": "", "wan_vae/attic/dust.py": ""})
    assert homeless(modules_of(tmp_path, PACKAGES)) == [
        "wan_vae.attic",
        "wan_vae.attic.dust",
        "wan_vae.cellar",
    ]
    assert floor_of("wan_vae.ops.eager.norm") == floor_of("wan_vae.report")


def test_a_computed_name_is_refused_unless_it_is_listed(tmp_path):
    text = "import importlib\ndef load(name):\n    return importlib.import_module(name)\n"
    with pytest.raises(UnreadableImport, match=r"wan_vae\.layout, line 3: imports name"):
        plant(tmp_path, {"wan_vae/layout.py": text})
    listed = imports_of(modules_of(tmp_path, ["wan_vae"]), ["wan_vae.layout"])
    assert [one.imported for one in listed] == ["importlib"]


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_listed_as_unread_is_needed(name):
    with pytest.raises(UnreadableImport, match=name):
        imports_of(modules_of(REPOSITORY, PACKAGES), set(UNREAD) - {name})
