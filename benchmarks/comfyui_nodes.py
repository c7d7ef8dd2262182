"""The nodes in a running ComfyUI, through its API: time, and memory planned, asked for and taken.

    COMFYUI_PATH=../ComfyUI wan-vae bench nodes [--output FOLDER]
    COMFYUI_PATH=../ComfyUI python benchmarks/comfyui_nodes.py     # the same

Starts `main.py` of the checkout with this repository as a node pack, in a temporary base directory
and without a frontend. COMFYUI_PYTHON names the interpreter (default: this one). Prints Markdown; a
folder gets nodes.md and nodes.json. --cpu runs a narrow model on small videos, which says that the
command works. --peers measures what our nodes stand for beside them, with --kjnodes (a checkout of
ComfyUI-KJNodes) its Patch Triton VAE too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import save_file

from benchmarks.suite.facts import Facts, repeatable
from benchmarks.suite.node_runs import (
    KJNODES,
    VAE_FILE,
    NodeCase,
    NodeRow,
    cases,
    install_probes,
    link_pack,
    measure,
    peer_cases,
)
from benchmarks.suite.weights import random_state
from tests.comfy.provision import ComfyEnvironment
from tests.comfy.server import Comfy
from wan_vae.config import wan21

SCHEMA = "wan_vae.bench.nodes/1"


def run(
    path: Path, python: str, on_cpu: bool, wanted: Sequence[NodeCase], kjnodes: Path | None
) -> tuple[list[NodeRow], str]:
    """The rows of the `wanted` cases, and ComfyUI's version. `path`: its checkout."""
    with tempfile.TemporaryDirectory(prefix="wan_vae_bench_") as folder:
        base = Path(folder)
        empty = base / "frontend"
        empty.mkdir()
        environment = ComfyEnvironment(python, str(path), str(empty), str(empty))
        server = Comfy(
            environment,
            base / "comfyui",
            "--front-end-root",
            str(empty),
            install=link_pack,
            on_cpu=on_cpu,
        )
        install_probes(server)
        if kjnodes is not None:
            link = server.base / "custom_nodes" / KJNODES
            link.symlink_to(kjnodes.resolve(), target_is_directory=True)
        config = wan21(dim=16) if on_cpu else wan21()
        save_file(random_state(config), server.base / "models" / "vae" / VAE_FILE)
        rows = []
        with server:
            version = str(server.get("/system_stats")["system"]["comfyui_version"])
            for number, case in enumerate(wanted):
                print(f"{case.title}, {case.video}", file=sys.stderr, flush=True)
                try:
                    rows.append(measure(server, case, seed=100 * number))
                except RuntimeError:
                    print(server.log_text()[-6000:], file=sys.stderr)
                    raise
    return rows, version


def facts_of(rows: Sequence[NodeRow], comfyui: str, argv: Sequence[str]) -> Facts:
    """Device and versions as the nodes report them: of ComfyUI's process, not of this one."""
    report = next(row.report for row in rows if row.report is not None)
    versions = {name: found for name, found in report["versions"].items() if found}
    command = repeatable(["nodes", *argv])
    return Facts(SCHEMA, command, report["device_name"], versions={**versions, "comfyui": comfyui})


def nodes_markdown(rows: Sequence[NodeRow], facts: Facts) -> str:
    """The results as Markdown."""
    lines = [
        "# The nodes in a running ComfyUI",
        "",
        *facts.lines(),
        "- default flags of ComfyUI, random weights and inputs, LATENT and IMAGE on the CPU",
        "- node time by ComfyUI's messages, new numbers in each run; first: the first run of that",
        "  node in the process; warm: median of the runs after it, smallest to largest in brackets",
        "- memory of the last run. planned: by the plan; asked: what ComfyUI was asked to free;",
        "  peak: by the node's report; allocator: peak of ComfyUI's process above what it held",
        "  before the run",
        "",
        "| node | video | first, ms | warm, ms | free GiB | planned GiB | asked GiB | peak GiB "
        "| allocator GiB | layout | kernels |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    return "\n".join([*lines, *map(_line, rows)]) + "\n"


def _line(row: NodeRow) -> str:
    report = row.report or {"memory": {}, "layout": {}, "backends": {"used": {}}}
    memory = report["memory"]
    used = report["backends"]["used"]
    asked = row.asked_bytes[-1] if row.asked_bytes else None
    warm = f"{row.median_ms:.1f}"
    if len(row.warm_ms) > 1:
        warm += f" ({min(row.warm_ms):.1f} to {max(row.warm_ms):.1f})"
    cells = [
        row.node,
        row.video,
        f"{row.first_ms:.0f}",
        warm,
        _gib(memory.get("free_bytes")),
        _gib(memory.get("planned_bytes")),
        _gib(asked),
        _gib(memory.get("peak_bytes")),
        _gib(row.peak_bytes),
        report["layout"].get("chosen", ""),
        ", ".join(f"{op} {backend}" for op, backend in used.items()),
    ]
    return "| " + " | ".join(cells) + " |"


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; 1 if a node of ours did not do what it planned."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="wan-vae bench nodes",
        description="The nodes in a running ComfyUI (COMFYUI_PATH): time and memory.",
    )
    parser.add_argument("--cpu", action="store_true", help="a narrow model and small videos")
    parser.add_argument("--peers", action="store_true", help="ComfyUI's own nodes beside ours")
    parser.add_argument("--kjnodes", type=Path, help="a checkout of ComfyUI-KJNodes, for --peers")
    parser.add_argument("--output", type=Path, help="folder for nodes.md and nodes.json")
    args = parser.parse_args(argv)
    path = os.environ.get("COMFYUI_PATH")
    if not path or not (Path(path) / "main.py").is_file():
        parser.error("COMFYUI_PATH must name a ComfyUI checkout: a folder with main.py")
    if args.kjnodes is not None and not (args.peers and args.kjnodes.is_dir()):
        parser.error("--kjnodes must name a folder, and needs --peers")
    wanted = peer_cases(args.cpu, args.kjnodes is not None) if args.peers else cases(args.cpu)
    python = os.environ.get("COMFYUI_PYTHON") or sys.executable
    rows, version = run(Path(path), python, args.cpu, wanted, args.kjnodes)
    facts = facts_of(rows, version, argv)
    text = nodes_markdown(rows, facts)
    print(text)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "nodes.md").write_text(text, encoding="utf-8")
        data = {**facts.as_dict(), "rows": [row.as_dict() for row in rows]}
        text = json.dumps(data, indent=1) + "\n"
        (args.output / "nodes.json").write_text(text, encoding="utf-8")
    faults = [fault for row in rows for fault in row.faults()]
    for fault in faults:
        print(f"nodes: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
