"""Reads which modules a source tree imports, without importing any of them."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One module that another one names in an import.

    `module` and `imported` are dotted names. `is_own` says that `imported` is a module of the tree
    that was read. `is_checked_only` marks an import below `if TYPE_CHECKING:`, which never runs.
    """

    module: str
    imported: str
    line: int
    is_own: bool
    is_checked_only: bool

    def __str__(self) -> str:
        return f"{self.module} -> {self.imported} (line {self.line})"


class UnreadableImport(ValueError):
    """A module's name is computed in a way that this reader does not follow."""


def modules_of(root: Path, packages: Collection[str]) -> dict[str, Path]:
    """The dotted name of every module of `packages`, folders below `root`, and its file."""
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join(parts)] = path
    return found


def imports_of(modules: Mapping[str, Path], unread: Collection[str] = ()) -> list[Import]:
    """Every import of every module: at the top, in a function, for type checkers, by name.

    `importlib.import_module` and `__import__` are followed where the name is a constant or is made
    of constants and of a table of constants in the same file. Raises UnreadableImport for another
    name, unless the module is in `unread`.
    """
    return [found for name in modules for found in _Reader(name, modules, unread).read()]


class _Reader(ast.NodeVisitor):
    def __init__(self, name: str, modules: Mapping[str, Path], unread: Collection[str]):
        self.name = name
        self.modules = modules
        self.unread = unread
        path = modules[name]
        # What a relative import starts from. The repository's root is a package too, without a
        # name of its own: its folder is called what the user called it.
        parts = name.split(".")
        self.package = parts if path.name == "__init__.py" else parts[:-1]
        self.tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        self.tables = _tables(self.tree)
        self.is_checked_only = False
        self.found: list[Import] = []

    def read(self) -> list[Import]:
        self.visit(self.tree)
        return self.found

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        before = self.is_checked_only
        self.is_checked_only = before or _is_type_checking(node.test)
        for child in node.body:
            self.visit(child)
        self.is_checked_only = before
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self._absolute("." * node.level + (node.module or ""))
        names = {f"{base}.{alias.name}" if base else alias.name for alias in node.names}
        for name in sorted(names & self.modules.keys()):
            self._add(name, node)
        # A name of a module of the tree: the module is what is imported. A name from elsewhere may
        # be a module of its own (`from torch import distributed`), so it is kept whole.
        rest = names - self.modules.keys()
        if base and rest:
            for name in [base] if base in self.modules else sorted(rest):
                self._add(name, node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        # `import torch` alone gives `torch.distributed`.
        if ast.unparse(node) == "torch.distributed":
            self._add("torch.distributed", node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
        if isinstance(called, ast.Name):
            called = called.id
        if called in ("import_module", "__import__") and node.args:
            for name in self._computed(node.args[0]):
                self._add(self._absolute(name), node)
        self.generic_visit(node)

    def _add(self, imported: str, node: ast.stmt | ast.expr) -> None:
        # A constant of the tree that looks like a module's child: `wan_vae.pipeline.load`.
        name = imported
        while name and name not in self.modules:
            name = name.rpartition(".")[0]
        is_own = bool(name)
        entry = Import(
            self.name, name if is_own else imported, node.lineno, is_own, self.is_checked_only
        )
        if entry.imported != self.name:
            self.found.append(entry)

    def _absolute(self, name: str) -> str:
        """`name`, relative or absolute, as an absolute one."""
        bare = name.lstrip(".")
        level = len(name) - len(bare)
        if not level:
            return bare
        kept = self.package[: len(self.package) - level + 1]
        return ".".join([*kept, *([bare] if bare else [])])

    def _computed(self, argument: ast.expr) -> list[str]:
        """The names that an argument of `import_module` may have."""
        found = _values(argument, self.tables)
        if found:
            return sorted(found)
        if self.name in self.unread:
            return []
        raise UnreadableImport(
            f"{self.name}, line {argument.lineno}: imports {ast.unparse(argument)}, whose values "
            "cannot be read; use a constant or a table of constants"
        )


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _tables(tree: ast.Module) -> dict[str, set[str]]:
    """What strings the names at the top of a module hold: a constant, or a table's values."""
    found: dict[str, set[str]] = {}
    for node in tree.body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        value = getattr(node, "value", None)
        values = value.values if isinstance(value, ast.Dict) else [value]
        texts = {text for part in values for text in _values(part, {})}
        if texts:
            found |= {name.id: texts for name in targets if isinstance(name, ast.Name)}
    return found


def _values(node: ast.expr | None, tables: Mapping[str, set[str]]) -> set[str]:
    """The strings that an expression may be; empty where that cannot be read."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.JoinedStr(values=parts):
            texts = {""}
            for part in parts:
                ends = _values(part.value if isinstance(part, ast.FormattedValue) else part, tables)
                texts = {start + end for start in texts for end in ends}
            return texts
        case ast.Name(id=name):
            return tables.get(name, set())
        case ast.Subscript(value=ast.Name(id=name)):
            return tables.get(name, set())
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="get"), args=[_, *default]):
            if name not in tables:
                return set()
            return tables[name].union(*(_values(part, tables) for part in default))
    return set()
