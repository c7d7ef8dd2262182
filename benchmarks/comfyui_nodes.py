"""The nodes in a running ComfyUI, through its API: time, and memory planned, asked for and taken.

    COMFYUI_PATH=../ComfyUI wan-vae bench nodes [--output FOLDER]
    COMFYUI_PATH=../ComfyUI python benchmarks/comfyui_nodes.py     # the same

Starts `main.py` of the checkout with this repository as a node pack, in a temporary base directory
and without a frontend. COMFYUI_PYTHON names the interpreter (default: this one). Prints Markdown; a
folder gets nodes.md and nodes.json. --cpu runs a narrow model on small videos, which says that the
command works. --peers measures what our nodes stand for beside them, with --kjnodes (a checkout of
ComfyUI-KJNodes) its Patch Triton VAE too.

--sharded measures the same work on one device and on several (--devices 0,1): decodes, the encode
inside image to video, an image, with --wan22 also Wan 2.2. It compares their bits and says where
the host's time goes.

--everywhere measures core's own nodes with the VAE of WanVAEAccelerate and with ComfyUI's own, and
compares their results; --flags does that under each flag for the VAE in turn, in a ComfyUI of its
own; --ballast GIB leaves so much device memory free, as a small card has it, and then ComfyUI's own
VAE runs once only (all of this needs --everywhere). What it cannot do then is a row with its error.

--faults lets things go wrong before our nodes run in 5 GB (or --ballast): another node runs out of
memory and its traceback is kept, a sampler's model is loaded, another process takes memory between
plan and run. Results must have the bits of a server with all memory.

--cold measures the first decode with empty caches, alone and after 20 seconds of a sampler's
stand-in while kernels are compiled; that of the next process; and what the node costs beside the
decode. For Wan 2.1, or with --model wan2.2.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import save_file

from benchmarks.suite.ballast import Ballast
from benchmarks.suite.cold_nodes import ColdCase, ColdRow, cold_lines, cold_rows
from benchmarks.suite.facts import Facts, repeatable, write_results
from benchmarks.suite.node_faults import fault_lines, rows_after_faults, rows_without_faults
from benchmarks.suite.node_runs import (
    ACCELERATE,
    FLAGS,
    KJNODES,
    VAE_FILE,
    VAE_FILE_22,
    NodeCase,
    NodeRow,
    Scale,
    cases,
    difference,
    everywhere_cases,
    failed,
    install_probes,
    link_pack,
    measure,
    peer_cases,
)
from benchmarks.suite.sharded_nodes import PairRows, measure_pair, pairs, pairs_markdown
from benchmarks.suite.weights import random_state
from tests.comfy.provision import without_frontend
from tests.comfy.server import Comfy
from wan_vae.config import wan21, wan22

SCHEMA = "wan_vae.bench.nodes/1"
# Free in a server to which faults happen: 5 GB.
_FAULTS_GIB = 5e9 / 2**30
MODELS = {"wan2.1": wan21, "wan2.2": wan22}


@dataclass(frozen=True)
class Setting:
    """A ComfyUI to measure in: its checkout and interpreter, flags, packs and free memory."""

    path: Path
    python: str
    on_cpu: bool
    kjnodes: Path | None = None
    flags: str = ""
    ballast_gib: float | None = None
    # Failures are rows, and our VAE is compared with ComfyUI's own.
    is_trial: bool = False
    wan22: bool = False


def run(setting: Setting, wanted: Sequence[NodeCase]) -> tuple[list[NodeRow], str]:
    """The rows of the `wanted` cases, and ComfyUI's version."""
    with running(setting) as (server, version):
        rows = [_measured(server, setting, case, 100 * i) for i, case in enumerate(wanted)]
    return rows, version


def run_faults(setting: Setting) -> Iterator[tuple[list[NodeRow], str]]:
    """Our nodes with all memory, and after each fault with little: all rows so far, after each of
    them; and ComfyUI's version."""
    rows: list[NodeRow] = []
    with running(replace(setting, ballast_gib=None)) as (server, version):
        for row in rows_without_faults(server):
            rows.append(row)
            yield rows, version
    digests = {row.node: row.digest for row in rows}
    with running(setting) as (server, version):
        for row in rows_after_faults(server, digests):
            rows.append(row)
            yield rows, version


def run_pairs(
    setting: Setting, devices: str, warm: int, only: str = ""
) -> tuple[list[PairRows], str]:
    """What one device and several take, of pairs with `only` in their name; ComfyUI's version."""
    rows = []
    wanted = [p for p in pairs(setting.on_cpu, devices, setting.wan22, warm) if only in p.name]
    with running(setting) as (server, version):
        for number, pair in enumerate(wanted):
            print(pair.name, file=sys.stderr, flush=True)
            try:
                row = measure_pair(server, pair, 100 * number, restart=number == 0)
            except RuntimeError:
                print(server.log_text()[-6000:], file=sys.stderr)
                raise
            rows.append(row)
            # At once, for who ends this before the pages are written.
            print(f"  {row.in_a_line()}", file=sys.stderr, flush=True)
    return rows, version


def _server(
    setting: Setting, folder: Path, name: str, variables: Mapping[str, str] | None = None
) -> Comfy:
    """A ComfyUI as `setting` says, not started, in `folder`/`name`, with our nodes and probes."""
    empty = folder / "frontend"
    empty.mkdir(exist_ok=True)
    server = Comfy(
        without_frontend(setting.python, setting.path, empty),
        folder / name,
        *("--front-end-root", str(empty), *setting.flags.split()),
        install=link_pack,
        on_cpu=setting.on_cpu,
        variables=variables,
    )
    install_probes(server)
    return server


@contextmanager
def running(setting: Setting) -> Iterator[tuple[Comfy, str]]:
    """A ComfyUI as `setting` says, with random VAEs, and its version."""
    with (
        tempfile.TemporaryDirectory(prefix="wan_vae_bench_") as folder,
        Ballast(setting.ballast_gib),
    ):
        server = _server(setting, Path(folder), "comfyui")
        if setting.kjnodes is not None:
            link = server.base / "custom_nodes" / KJNODES
            link.symlink_to(setting.kjnodes.resolve(), target_is_directory=True)
        config = wan21(dim=16) if setting.on_cpu else wan21()
        folder_of_vaes = server.base / "models" / "vae"
        save_file(random_state(config), folder_of_vaes / VAE_FILE)
        if setting.wan22:
            save_file(random_state(wan22()), folder_of_vaes / VAE_FILE_22)
        with server:
            yield server, str(server.get("/system_stats")["system"]["comfyui_version"])


def run_cold(
    setting: Setting, case: ColdCase
) -> Iterator[tuple[list[ColdRow], dict[str, Any], str]]:
    """The rows of `case` so far, after each of them; the report of its decode, and ComfyUI's
    version."""
    with tempfile.TemporaryDirectory(prefix="wan_vae_bench_") as folder:
        base, rows = Path(folder), list[ColdRow]()
        current: Comfy | None = None
        version = ""
        weights = base / VAE_FILE
        save_file(random_state(case.config), weights)

        @contextmanager
        def start(name: str, variables: Mapping[str, str]) -> Iterator[Comfy]:
            nonlocal current, version
            print(name, file=sys.stderr, flush=True)
            server = _server(setting, base, name, variables)
            (server.base / "models" / "vae" / VAE_FILE).symlink_to(weights)
            with server:
                try:
                    version = str(server.get("/system_stats")["system"]["comfyui_version"])
                    current = server
                    yield server
                except RuntimeError:
                    print(server.log_text()[-6000:], file=sys.stderr)
                    raise

        for row in cold_rows(case, base / "caches", start):
            rows.append(row)
            print(f"  {row.in_a_line()}", file=sys.stderr, flush=True)
            assert current is not None  # it gave the row
            yield rows, current.last_run.kept[-1]["report"], version


def cold_case(model: str, on_cpu: bool) -> ColdCase:
    """720p, and images of 256 x 256 and 1024 x 1024; on a CPU a narrow model and little of it."""
    if on_cpu:
        config = MODELS[model](dim=16)
        sizes, frames, sample_s = ((32, 32),), 2, 1.0
        height, width = 2 * config.spatial_factor, 3 * config.spatial_factor
    else:
        config, sizes, sample_s = MODELS[model](), ((256, 256), (1024, 1024)), 20.0
        frames, height, width = (21 if model == "wan2.1" else 31), 720, 1280
    factor = config.spatial_factor
    images = tuple((1, config.z_dim, 1, h // factor, w // factor) for h, w in sizes)
    video = (1, config.z_dim, frames, height // factor, width // factor)
    return ColdCase(config, video, images, sample_s)


def _cold_main(setting: Setting, model: str, output: Path | None, argv: Sequence[str]) -> int:
    """`--cold`: measure, and write after each row, for who ends this before the last one."""
    text = ""
    for rows, report, version in run_cold(setting, cold_case(model, setting.on_cpu)):
        facts = _facts(report, version, argv)
        lines = ["# Waiting in a running ComfyUI", "", *facts.lines(), *_COLD_NOTES, ""]
        text = "\n".join([*lines, *cold_lines(rows)]) + "\n"
        if output is not None:
            data = {**facts.as_dict(), "rows": [row.as_dict() for row in rows]}
            write_results(output, "cold", text, data)
    print(text)
    return 0


_COLD_NOTES = (
    "- default flags of ComfyUI, random weights and latents, LATENT and IMAGE on the CPU",
    "- cache folders of our kernels, Triton, Inductor and CUDA of their own; warm: the median",
)


def _measured(server: Comfy, setting: Setting, case: NodeCase, seed: int) -> NodeRow:
    """The row of one case. Raises RuntimeError if it fails and this is no trial."""
    print(f"{case.title}, {case.video} {setting.flags}", file=sys.stderr, flush=True)
    try:
        row = replace(measure(server, case, seed), flags=setting.flags)
        print(f"  {row.in_a_line()}", file=sys.stderr, flush=True)
        if setting.is_trial and setting.ballast_gib is None and case.patch == ACCELERATE:
            apart = difference(server, case, case.comparison(seed + 90))
            row = replace(row, difference=apart)
        return row
    except RuntimeError as error:
        if setting.is_trial:
            row = replace(failed(case, error), flags=setting.flags)
            print(f"  {row.in_a_line()}", file=sys.stderr, flush=True)
            return row
        print(server.log_text()[-6000:], file=sys.stderr)
        raise


def facts_of(rows: Sequence[NodeRow], comfyui: str, argv: Sequence[str]) -> Facts:
    """Device and versions as the nodes report them: of ComfyUI's process, not of this one."""
    reports = [row.report for row in rows if row.report is not None]
    # Under --cpu-vae a row is of the CPU, of a run that is about the card.
    on_card = [report for report in reports if report["device_name"] != "CPU"]
    return _facts((on_card or reports)[0], comfyui, argv)


def _facts(report: Mapping[str, Any], comfyui: str, argv: Sequence[str]) -> Facts:
    versions = {name: found for name, found in report["versions"].items() if found}
    command = repeatable(["nodes", *argv])
    return Facts(SCHEMA, command, report["device_name"], versions={**versions, "comfyui": comfyui})


def nodes_markdown(rows: Sequence[NodeRow], facts: Facts) -> str:
    """The results as Markdown."""
    trial = any(row.flags or row.error or row.difference is not None for row in rows)
    head = (
        "| node | video | first, ms | warm, ms | free GiB | planned GiB | asked GiB | peak GiB "
        "| allocator GiB | layout | kernels |" + (" flags | difference |" if trial else "")
    )
    lines = [
        "# The nodes in a running ComfyUI",
        "",
        *facts.lines(),
        f"- {'named' if trial else 'default'} flags of ComfyUI, random weights and inputs, LATENT "
        "and IMAGE on the CPU",
        "- node time by ComfyUI's messages, new numbers in each run; first: the first run of that",
        "  node in the process; warm: median of the runs after it, smallest to largest in brackets",
        "- memory of the last run. planned: by the plan; asked: what ComfyUI was asked to free;",
        "  peak: by the node's report; allocator: peak of ComfyUI's process above what it held",
        "  before the run",
        "",
        head,
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|---|" + ("---|---:|" if trial else ""),
    ]
    return "\n".join([*lines, *(_line(row, trial) for row in rows)]) + "\n"


def sharded_markdown(rows: Sequence[PairRows], facts: Facts) -> str:
    """What one device and several took, as Markdown."""
    lines = [
        "# One device and several in a running ComfyUI",
        "",
        *facts.lines(),
        "- default flags of ComfyUI, random weights and inputs, LATENT and IMAGE on the CPU",
        "- node time by ComfyUI's messages, new numbers in each run; first: the first run of that",
        "  node in the process; else the median of the runs after it, smallest to largest in",
        "  brackets; difference: the largest one to one device, of the same numbers",
        "",
    ]
    return "\n".join([*lines, *pairs_markdown(rows)]) + "\n"


def _line(row: NodeRow, trial: bool) -> str:
    report = row.report or {"memory": {}, "layout": {}, "backends": {"used": {}}}
    memory = report["memory"]
    used = report["backends"]["used"]
    asked = row.asked_bytes[-1] if row.asked_bytes else None
    cells = [
        row.node,
        row.video,
        *(("", row.error) if row.error else (f"{row.first_ms:.0f}", row.warm)),
        _gib(memory.get("free_bytes")),
        _gib(memory.get("planned_bytes")),
        _gib(asked),
        _gib(memory.get("peak_bytes")),
        _gib(row.peak_bytes),
        report["layout"].get("chosen", ""),
        ", ".join(f"{op} {backend}" for op, backend in used.items()),
    ]
    if trial:
        cells += [row.flags, "" if row.difference is None else f"{row.difference:.1e}"]
    return "| " + " | ".join(cells) + " |"


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.3f}"


def _scale(on_cpu: bool, flags: list[str] | None, ballast: float | None, name: str) -> Scale:
    """How much is measured: on a CPU little, under many flags less, in little memory more."""
    if on_cpu or name == "cpu-vae":
        return "tiny"
    if flags is not None:
        return "small"
    return "usual" if ballast is None else "large"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; 1 if a node of ours did not do what it planned."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="wan-vae bench nodes",
        description="The nodes in a running ComfyUI (COMFYUI_PATH): time and memory.",
    )
    parser.add_argument("--cpu", action="store_true", help="a narrow model and small videos")
    parser.add_argument("--peers", action="store_true", help="ComfyUI's own nodes beside ours")
    parser.add_argument("--kjnodes", type=Path, help="a checkout of ComfyUI-KJNodes")
    parser.add_argument(
        "--everywhere", action="store_true", help="core's nodes with our VAE and ComfyUI's own"
    )
    parser.add_argument(
        "--flags",
        nargs="*",
        choices=FLAGS,
        help="under each of these flags, or under all of them; `default` is none",
    )
    parser.add_argument("--faults", action="store_true", help="our nodes after things went wrong")
    parser.add_argument("--sharded", action="store_true", help="one device and several")
    parser.add_argument("--devices", help="which several (default: 0,1; with --cpu: cpu,cpu)")
    parser.add_argument("--wan22", action="store_true", help="with --sharded: Wan 2.2 too")
    parser.add_argument("--warm", type=int, default=5, help="warm runs of each with --sharded")
    parser.add_argument("--only", default="", help="with --sharded: rows with this in their name")
    parser.add_argument("--ballast", type=float, metavar="GIB", help="leave so much memory free")
    parser.add_argument("--cold", action="store_true", help="what a user waits for, empty caches")
    parser.add_argument("--model", choices=MODELS, default="wan2.1", help="of --cold")
    parser.add_argument("--output", type=Path, help="folder for nodes.md and nodes.json")
    args = parser.parse_args(argv)
    path = os.environ.get("COMFYUI_PATH")
    if not path or not (Path(path) / "main.py").is_file():
        parser.error("COMFYUI_PATH must name a ComfyUI checkout: a folder with main.py")
    if args.kjnodes is not None and not args.kjnodes.is_dir():
        parser.error("--kjnodes must name a folder")
    if args.kjnodes is not None and not (args.peers or args.everywhere):
        parser.error("--kjnodes needs --peers or --everywhere")
    if (args.flags is not None or args.ballast is not None) and not (
        args.everywhere or (args.faults and args.flags is None)
    ):
        parser.error("--flags and --ballast need --everywhere")
    if args.cold and (args.peers or args.everywhere):
        parser.error("--cold goes with neither --peers nor --everywhere")
    if args.wan22 and (args.cpu or not args.sharded):
        parser.error("--wan22 needs --sharded and a GPU: ComfyUI loads no narrow Wan 2.2")
    setting = Setting(
        Path(path),
        os.environ.get("COMFYUI_PYTHON") or sys.executable,
        args.cpu,
        args.kjnodes,
        ballast_gib=args.ballast,
        is_trial=args.everywhere,
        wan22=args.wan22,
    )
    if args.sharded:
        return _main_sharded(setting, args, argv)
    if args.cold:
        return _cold_main(setting, args.model, args.output, argv)
    if args.faults:
        return _main_faults(setting, args.output, argv)
    rows, version = [], ""
    for name in ["default"] if args.flags is None else args.flags or FLAGS:
        if args.everywhere:
            scale = _scale(args.cpu, args.flags, args.ballast, name)
            own_warm = 1 if args.ballast is None else 0
            wanted = everywhere_cases(scale, args.kjnodes is not None, own_warm)
        elif args.peers:
            wanted = peer_cases(args.cpu, args.kjnodes is not None)
        else:
            wanted = cases(args.cpu)
        flags = "" if name == "default" else f"--{name}"
        more, version = run(replace(setting, flags=flags), wanted)
        rows += more
        if args.output is not None:  # after each flag, for who ends this before the last one
            write_results(args.output, "nodes", *_page(rows, version, argv))
    print(_page(rows, version, argv)[0])
    return _said([fault for row in rows for fault in row.faults()])


def _page(
    rows: Sequence[NodeRow], version: str, argv: Sequence[str]
) -> tuple[str, dict[str, object]]:
    """The Markdown and the data of `rows`."""
    facts = facts_of(rows, version, argv)
    return nodes_markdown(rows, facts), {
        **facts.as_dict(),
        "rows": [row.as_dict() for row in rows],
    }


def _main_faults(setting: Setting, output: Path | None, argv: Sequence[str]) -> int:
    """`--faults`: measure, and write after each row; 1 if a node of ours was wrong."""
    if setting.ballast_gib is None:
        setting = replace(setting, ballast_gib=_FAULTS_GIB)
    rows: list[NodeRow] = []
    text = ""
    for rows, version in run_faults(setting):
        facts = facts_of(rows, version, argv)
        lines = ["# Our nodes after things went wrong", "", *facts.lines(), "", *fault_lines(rows)]
        text = "\n".join(lines) + "\n"
        if output is not None:  # for who ends this before the last row
            data = {**facts.as_dict(), "rows": [row.as_dict() for row in rows]}
            write_results(output, "faults", text, data)
    print(text)
    return _said([fault for row in rows for fault in row.faults()])


def _main_sharded(setting: Setting, args: argparse.Namespace, argv: Sequence[str]) -> int:
    """`--sharded`: measure and write; 1 if several devices did not do what one did."""
    devices = args.devices or ("cpu,cpu" if args.cpu else "0,1")
    rows, version = run_pairs(setting, devices, args.warm, args.only)
    facts = facts_of([row.several for row in rows], version, argv)
    found = [
        {"name": row.name, "speed_up": row.speed_up}
        | {"one": row.one.as_dict(), "several": row.several.as_dict()}
        for row in rows
    ]
    _show(
        args.output, "sharded", sharded_markdown(rows, facts), {**facts.as_dict(), "pairs": found}
    )
    return _said([fault for row in rows for fault in row.faults(setting.on_cpu)])


def _show(folder: Path | None, name: str, text: str, data: Mapping[str, object]) -> None:
    """Print the page; if there is a `folder`, put it and the data there."""
    print(text)
    if folder is not None:
        write_results(folder, name, text, data)


def _said(faults: Sequence[str]) -> int:
    """Print what is wrong; the exit code."""
    for fault in faults:
        print(f"nodes: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
