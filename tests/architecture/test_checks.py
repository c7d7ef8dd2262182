"""What `make check` runs: the same as pre-commit does, and it finds what it is for."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

from tests.architecture.check_files import LARGE, MARKERS, MAX_BYTES, faults, tracked

REPOSITORY = Path(__file__).parents[2]


def test_pre_commit_and_make_run_the_same():
    hooks = (REPOSITORY / ".pre-commit-config.yaml").read_text()
    makefile = (REPOSITORY / "Makefile").read_text()
    (recipe,) = re.findall(r"^check:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert re.findall(r"entry: python -m (.*)", hooks) == re.findall(r"\$\(RUN\) (.*)", recipe)


def test_the_tools_of_the_checks_are_pinned():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    tools = project["project"]["optional-dependencies"]["test"]
    pinned = {tool.split("==")[0] for tool in tools if "==" in tool}
    assert {"ruff", "mypy", "codespell"} <= pinned


def test_large_files_and_conflict_markers_are_found(tmp_path):
    for name in LARGE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(MAX_BYTES + 1))
    (tmp_path / "small.py").write_bytes(bytes(MAX_BYTES))
    assert list(faults(tmp_path, [*LARGE, "small.py", "deleted.py"])) == []

    (tmp_path / "large.bin").write_bytes(bytes(MAX_BYTES + 1))
    (tmp_path / "merged.py").write_bytes(b"a = 1\n" + MARKERS[0] + b"HEAD\n")
    found = list(faults(tmp_path, ["large.bin", "merged.py"]))
    assert len(found) == 2 + len(LARGE)
    assert "300001 bytes" in found[0]
    assert "conflict" in found[1]
    assert all("gone" in line for line in found[2:])


def test_the_repository_itself_has_no_such_file():
    assert list(faults(REPOSITORY, tracked(REPOSITORY))) == []


def test_only_kernels_of_triton_lack_annotations():
    """mypy is told to accept functions without types in these files, because of the kernels."""
    lacking = []
    for path in sorted((REPOSITORY / "wan_vae/kernels/triton").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not _is_kernel(node):
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                typed = node.returns and all(
                    one.annotation or one.arg in ("self", "cls") for one in parameters
                )
                if not typed:
                    lacking.append(f"{path.name} {node.name}")
    assert lacking == []


def _is_kernel(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
