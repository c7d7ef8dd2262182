"""The floors of the project: which modules lie on each, and what no module may import."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from tests.architecture.imports import Import


@dataclass(frozen=True)
class Floor:
    """One floor: its rooms, and what they are for in a few words.

    A room is a module ("wan_vae.errors") or a package with all that it holds ("wan_vae.ops.*").
    Rooms of one floor may import each other, without a circle, unless SIBLINGS forbids it.
    """

    rooms: tuple[str, ...]
    purpose: str


# From the ground up. A module imports modules of its own floor and of lower ones.
FLOORS = (
    Floor(("wan_vae.errors", "wan_vae.said", "wan_vae.version"), "typed errors, sentences"),
    Floor(
        ("wan_vae.options", "wan_vae.config", "wan_vae.other_models"),
        "what a caller may ask for; which VAE it is",
    ),
    Floor(
        (
            "wan_vae.chunking",
            "wan_vae.geometry",
            "wan_vae.layout",
            "wan_vae.libraries",
            "wan_vae.arithmetic",
            "wan_vae.device",
            "wan_vae.clock",
            "wan_vae.walk",
        ),
        "sizes, strides, number formats, devices",
    ),
    Floor(
        ("wan_vae.ops.*", "wan_vae.report", "wan_vae.hooks"),
        "what a layer computes; what a run reports, and to whom",
    ),
    Floor(
        ("wan_vae.network.*", "wan_vae.sharding.*", "wan_vae.io.*"),
        "the VAE; one picture over ranks; files",
    ),
    Floor(
        ("wan_vae.kernels.*", "wan_vae.planning.*"),
        "how a layer is computed on a device; bytes before the first chunk",
    ),
    Floor(("wan_vae.runs.*",), "one way through a decode or an encode"),
    Floor(("wan_vae.pipeline",), "one VAE on one device: load, WanVAE"),
    Floor(("wan_vae.workers.*", "wan_vae"), "worker processes, one a device; the public names"),
    Floor(("wan_vae.commands.*", "wan_vae.__main__"), "the command line"),
    Floor(("nodes.*", "benchmarks.*", "examples.*"), "ComfyUI's nodes; measurements; the demo"),
)

# Packages that lie side by side: neither imports the other.
SIBLINGS = (
    ("wan_vae.network.*", "wan_vae.sharding.*"),
    ("wan_vae.kernels.triton.*", "wan_vae.kernels.cuda.*"),
    ("wan_vae.kernels.triton.*", "wan_vae.kernels.kitchen.*"),
    ("wan_vae.kernels.cuda.*", "wan_vae.kernels.kitchen.*"),
    ("nodes.*", "benchmarks.*"),
    ("nodes.*", "examples.*"),
)


@dataclass(frozen=True)
class Ban:
    """`rooms` may not import `names` (and what these hold), except the modules in `but`."""

    rooms: tuple[str, ...]
    names: tuple[str, ...]
    but: tuple[str, ...] = ()


BANS = (
    # Kernels get problems and weights; they do not know whose layers these are.
    Ban(("wan_vae.kernels.*",), ("wan_vae.network.*",)),
    Ban(("wan_vae.planning.*",), ("wan_vae.network.*",), but=("wan_vae.network.architecture",)),
    # The library knows nothing of ComfyUI, and is installed without the rest of the repository.
    Ban(
        ("wan_vae.*",),
        ("nodes.*", "benchmarks.*", "examples.*", "tests.*", "comfy.*", "comfy_api.*"),
    ),
    # ... and so are the nodes.
    Ban(("nodes.*",), ("tests.*",)),
)


@dataclass(frozen=True)
class Home:
    """The only modules of the package that may import `name`: not every torch comes with it."""

    name: str
    rooms: tuple[str, ...]


HOMES = (
    Home(
        "torch.distributed.*",
        (
            "wan_vae.sharding.transport",
            "wan_vae.sharding.proof",
            "wan_vae.workers.*",
            "wan_vae.commands.torchrun",
        ),
    ),
    Home("triton.*", ("wan_vae.kernels.triton.*", "wan_vae.kernels.proof.*")),
    Home("comfy_kitchen.*", ("wan_vae.kernels.kitchen.*",)),
)


def is_in(module: str, room: str) -> bool:
    """True if `module` is `room`, or lies in it."""
    package = room.removesuffix(".*")
    return module == package or (package != room and module.startswith(f"{package}."))


def is_in_any(module: str, rooms: Iterable[str]) -> bool:
    """True if `module` lies in one of `rooms`."""
    return any(is_in(module, room) for room in rooms)


def floor_of(module: str) -> int | None:
    """The number of the floor that `module` lies on, from 0; None for a module without one."""
    for number, floor in enumerate(FLOORS):
        if is_in_any(module, floor.rooms):
            return number
    return None


def homeless(modules: Collection[str]) -> list[str]:
    """Modules that lie on no floor."""
    return [module for module in modules if floor_of(module) is None]


def violations(imports: Iterable[Import]) -> list[Import]:
    """The imports that go up, to a sibling, against a ban, or out of a name's home."""
    return [found for found in imports if _is_wrong(found)]


def _is_wrong(found: Import) -> bool:
    module, imported = found.module, found.imported
    here, there = floor_of(module), floor_of(imported)
    if found.is_own and here is not None and there is not None and there > here:
        return True
    for pair in SIBLINGS:
        for one, other in (pair, pair[::-1]):
            if is_in(module, one) and is_in(imported, other):
                return True
    for ban in BANS:
        if (
            is_in_any(module, ban.rooms)
            and is_in_any(imported, ban.names)
            and not is_in_any(imported, ban.but)
        ):
            return True
    for home in HOMES:
        if (
            is_in(imported, home.name)
            and is_in_any(module, ("wan_vae.*", "nodes.*"))
            and not is_in_any(module, home.rooms)
            and not found.is_checked_only
        ):
            return True
    return False


def circles(edges: Mapping[str, Collection[str]]) -> list[list[str]]:
    """The groups of nodes of which each one leads to each other one, sorted (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in edges.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            group = sorted(stack[at:])
            del stack[at:]
            if len(group) > 1:
                found.append(group)

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return sorted(found)


def module_edges(imports: Iterable[Import]) -> dict[str, set[str]]:
    """Which module of the tree imports which, for `circles`."""
    edges: dict[str, set[str]] = {}
    for found in imports:
        if found.is_own:
            edges.setdefault(found.module, set()).add(found.imported)
    return edges


def room_edges(imports: Iterable[Import]) -> dict[str, set[str]]:
    """Which room of FLOORS imports which, for `circles`."""
    edges: dict[str, set[str]] = {}
    for found in imports:
        here, there = _room_of(found.module), _room_of(found.imported)
        if here and there and here != there:
            edges.setdefault(here, set()).add(there)
    return edges


def _room_of(module: str) -> str | None:
    for floor in FLOORS:
        for room in floor.rooms:
            if is_in(module, room):
                return room
    return None


def drawing() -> str:
    """The floors as text, the highest first; CONTRIBUTING.md holds it."""
    rows = [
        (str(number), ", ".join(_label(room) for room in floor.rooms), floor.purpose)
        for number, floor in reversed(list(enumerate(FLOORS)))
    ]
    width = max(len(rooms) for _, rooms, _ in rows)
    lines = [f"{number:>2}  {rooms:<{width}}  {purpose}" for number, rooms, purpose in rows]
    apart = [f"{_label(one)} | {_label(other)}" for one, other in SIBLINGS]
    return "\n".join([*lines, "", "Neither imports the other: " + ", ".join(apart)]) + "\n"


def _label(room: str) -> str:
    if room == "wan_vae":
        return "wan_vae/__init__"
    name = room.removeprefix("wan_vae.")
    return name.removesuffix(".*").replace(".", "/") + ("/" if name.endswith(".*") else "")


if __name__ == "__main__":
    print(drawing(), end="")
