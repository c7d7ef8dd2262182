"""`wan-vae bench nodes`: the clock, the rows and the page. A run needs a ComfyUI and minutes."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import comfyui_nodes
from benchmarks.suite import node_faults, sharded_nodes
from benchmarks.suite.cold_nodes import cold_lines, cold_rows
from benchmarks.suite.cold_start import CACHE_VARIABLES
from benchmarks.suite.facts import Facts
from benchmarks.suite.node_runs import (
    SIZES,
    NodeClock,
    NodeRow,
    cases,
    everywhere_cases,
    failed,
    peer_cases,
)
from wan_vae.runs.engine import PROOF_BYTES

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/2026-11-28-h200-nodes.json"


@pytest.fixture
def rows() -> list[NodeRow]:
    """The rows of a run on a GPU."""
    made = []
    for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]:
        tuples = {name: tuple(row[name]) for name in ("warm_ms", "asked_bytes")}
        made.append(NodeRow(**{**row, **tuples}))
    return made


def heard(*messages: tuple[str, str | None]) -> NodeClock:
    clock = NodeClock("3")
    for kind, node in messages:
        data: dict[str, Any] = {} if kind == "status" else {"node": node}
        clock.hear({"type": kind, "data": data})
    return clock


@pytest.mark.parametrize("end", [("executed", "3"), ("executing", "4"), ("executing", None)])
def test_the_clock_runs_from_the_start_of_the_node_to_its_end(end):
    start = (("status", None), ("executing", "2"), ("executing", "3"), ("status", None))
    assert heard(*start, end).ms > 0
    clock = heard(*start, end)
    first = clock.ms
    clock.hear({"type": "executed", "data": {"node": "3"}})
    assert clock.ms == first


@pytest.mark.parametrize(
    "messages", [[("executing", "2"), ("executed", "4")], [("executing", "3"), ("executed", "4")]]
)
def test_a_node_without_start_or_end_has_no_time(messages):
    with pytest.raises(RuntimeError, match="node 3 was not executed"):
        _ = heard(*messages).ms


def test_each_run_of_a_case_has_its_own_numbers():
    for case in (*cases(on_cpu=False), *cases(on_cpu=True)):
        one, other = case.prompt(0), case.prompt(1)
        assert one["3"] == other["3"] and one["3"]["class_type"] == case.node
        assert one["2"] != other["2"]


def test_a_peer_may_change_the_vae_first():
    for case in peer_cases(on_cpu=True, kjnodes=True):
        prompt = case.prompt(0)
        first = "1" if case.patch is None else "5"
        assert prompt["3"]["inputs"]["vae"] == [first, 0]
        assert ("5" in prompt) == (case.patch is not None)
    patches = [case.patch for case in peer_cases(False, True)]
    assert patches.count("PatchTritonVAE") == 1 and patches[-1] == "PatchTritonVAE"
    assert not any(case.patch for case in peer_cases(False, kjnodes=False))


@pytest.mark.parametrize("scale", list(SIZES))
def test_our_vae_is_measured_before_comfyuis_own_in_the_same_nodes(scale):
    found = everywhere_cases(scale)
    ours = [case for case in found if case.patch == "WanVAEAccelerate"]
    core = [case for case in found if case.patch is None and not case.node.startswith("WanVAE")]
    assert [(case.node, case.video) for case in ours] == [(case.node, case.video) for case in core]
    assert found.index(ours[-1]) < found.index(core[0])
    for case in (*ours, *everywhere_cases(scale, kjnodes=True)[-2:]):
        prompt = case.comparison(3)
        assert prompt["3"]["inputs"]["vae"] == ["5", 0] and prompt["7"]["inputs"]["vae"] == ["1", 0]
        both = [{**prompt[name]["inputs"], "vae": None} for name in ("3", "7")]
        assert both[0] == both[1]
        linked = {
            v[0] for node in prompt.values() for v in node["inputs"].values() if type(v) is list
        }
        assert linked <= set(prompt)


def test_comfyuis_own_runs_once_where_a_run_takes_a_minute(rows, monkeypatch, tmp_path):
    found = everywhere_cases("large", own_warm=0)
    assert {case.warm for case in found if "ComfyUI's own" in case.title} == {0}
    assert {case.warm for case in found if "our VAE" in case.title} == {3}
    (tmp_path / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    warm = []

    def run(setting, wanted):
        warm.append({case.warm for case in wanted if "ComfyUI's own" in case.title})
        return rows, "0.33"

    monkeypatch.setattr(comfyui_nodes, "run", run)
    for words in ([], ["--ballast", "8"]):
        comfyui_nodes.main(["--everywhere", *words])
    assert warm == [{1}, {0}]


def test_a_row_without_warm_runs_shows_the_first(rows):
    once = replace(rows[0], first_ms=45678.9, warm_ms=(), median_ms=45678.9)
    facts = Facts("schema", "command", "device", "2026-01-01", {})
    assert "| 45679 | 45678.9 (first run) |" in comfyui_nodes.nodes_markdown([once], facts)
    assert once.in_a_line() == "45679 ms"
    assert replace(once, warm_ms=(7.0,), median_ms=7.0).in_a_line() == "45679 ms, then 7.0 ms"
    pair = sharded_nodes.PairRows("a decode", once, replace(rows[0], difference=0.0))
    (line,) = (one for one in sharded_nodes.pairs_markdown([pair]) if "| a decode | 4" in one)
    assert line.startswith("| a decode | 45678.9 (first run) |")
    assert f"| {45678.9 / rows[0].median_ms:.2f}x |" in line


def test_kjnodes_patch_comes_before_ours():
    found = [case for case in everywhere_cases("usual", kjnodes=True) if case.before]
    assert [case.node for case in found] == ["WanImageToVideo", "VAEDecode"]
    prompt = found[0].prompt(0)
    assert prompt["9"]["class_type"] == "PatchTritonVAE"
    assert prompt["9"]["inputs"]["vae"] == ["1", 0] and prompt["9"]["inputs"]["int8_conv"] is False
    assert prompt["5"]["inputs"]["vae"] == ["9", 0] and prompt["3"]["inputs"]["vae"] == ["5", 0]


def test_a_failure_of_ours_is_a_fault_and_one_of_comfyui_a_row(rows):
    ours, *_, core = everywhere_cases("tiny")
    made = [failed(case, RuntimeError("out of memory\nmore")) for case in (ours, core)]
    assert made[0].faults() == ["image to video, our VAE : out of memory"]
    assert made[1].faults() == []
    facts = Facts("schema", "command", "device", "2026-01-01", {})
    page = comfyui_nodes.nodes_markdown([*rows, *made], facts)
    assert page.count("| out of memory |") == 2 and "| flags | difference |" in page


def test_flags_and_ballast_are_for_everywhere(monkeypatch, capsys, tmp_path):
    (tmp_path / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    for words in (["--flags"], ["--ballast", "8"]):
        with pytest.raises(SystemExit):
            comfyui_nodes.main(words)
        assert "need --everywhere" in capsys.readouterr().err


def test_a_run_on_a_gpu_asked_comfyui_for_what_was_planned(rows):
    assert [row.faults() for row in rows] == [[]] * len(rows)
    ours = [row for row in rows if row.report is not None]
    assert len(ours) == 4
    assert all(row.asked_bytes[-1] == row.report["memory"]["planned_bytes"] for row in ours)


class FaultyServer:
    """What `node_faults` asks of a server: what was run, and a result that may be another one."""

    def __init__(self):
        self.prompts, self.freed = [], 0

    def run(self, prompt, on_message=None):
        self.prompts.append(prompt)
        (first, *_) = prompt.values()
        raises = first["class_type"] == "WanVAEBenchRunOut"
        return type("Run", (), {"error": {"exception_message": "out"} if raises else None})

    def post(self, *_):
        self.freed += 1


def test_a_fault_happens_before_each_node_and_results_are_compared(rows, monkeypatch, capsys):
    titles = [case.title for case in node_faults.fault_cases()]
    other = rows[0].node == titles[0] and titles[1]
    monkeypatch.setattr(
        node_faults,
        "measure",
        lambda server, case, seed: replace(rows[0], node=case.title, digest=7),
    )
    server, digests = FaultyServer(), {title: 7 for title in titles} | {other: 8}
    found = list(node_faults.rows_after_faults(server, digests))
    assert len(found) == 9 == server.freed and {row.node for row in found} == set(titles)
    wrong = [row for row in found if row.error]
    assert {(row.node, row.error) for row in wrong} == {
        (titles[1], "other bits than with all memory")
    }
    said = capsys.readouterr().err.splitlines()
    first = f"after {node_faults.FAULTS[0].title}: {titles[0]}, 1280 x 720, 81 frames"
    assert said[:2] == [first, f"  {found[0].in_a_line()}"] and len(said) == 18
    happened = [prompt["1"]["class_type"] for prompt in server.prompts]
    assert happened[:2] == ["WanVAEBenchRelease", "WanVAEBenchRunOut"]
    assert happened[-1] == "WanVAEBenchRelease" and len(happened) == 19
    lines = node_faults.fault_lines(found)
    assert len(lines) == 11 and sum("other bits" in line for line in lines) == 3


def test_the_rows_so_far_are_written_when_something_ends_the_run(rows, monkeypatch, tmp_path):
    (tmp_path / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    settings = []

    @contextmanager
    def running(setting):
        settings.append(setting.ballast_gib)
        yield FaultyServer(), "0.33"

    def ends(server, digests):
        assert digests == {rows[0].node: rows[0].digest}
        yield replace(rows[1], after="a fault")
        raise RuntimeError("planted")

    monkeypatch.setattr(comfyui_nodes, "running", running)
    monkeypatch.setattr(comfyui_nodes, "rows_without_faults", lambda server: iter(rows[:1]))
    monkeypatch.setattr(comfyui_nodes, "rows_after_faults", ends)
    with pytest.raises(RuntimeError, match="planted"):
        comfyui_nodes.main(["--faults", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "faults.json").read_text())["rows"]
    assert [row["after"] for row in found] == ["", "a fault"]
    assert "| a fault |" in (tmp_path / "faults.md").read_text()
    assert settings == [None, pytest.approx(5e9 / 2**30)]


def test_videos_after_faults_cost_little_beside_their_memory():
    decode, encode, video = node_faults.fault_cases()
    assert decode.video == encode.video == video.video == "1280 x 720, 81 frames"
    assert video.prompt(1)["3"]["inputs"]["crf"] == 45.0


def test_a_fault_that_does_not_happen_is_an_error():
    fault = replace(node_faults.FAULTS[1], raises=True)
    with pytest.raises(RuntimeError, match="sampler"):
        fault.happen(FaultyServer(), 1)


def test_a_run_that_started_over_is_a_fault_unless_it_came_after_one(rows):
    report = {**rows[0].report, "restarts": 1, "fallbacks": ["chunk: out of memory"]}
    assert "memory ran out" in replace(rows[0], report=report).faults()[0]
    assert replace(rows[0], report=report, after="a fault").faults() == []


def test_faults_are_named(rows):
    row = rows[0]
    assert "ComfyUI was asked for 5" in replace(row, asked_bytes=(0, 5)).faults()[0]
    # Nothing was asked where enough was free; nor beside bringing the weights, and proving kernels.
    for asked in ((), (0,), (PROOF_BYTES,)):
        assert replace(row, asked_bytes=asked).faults() == []
    failed = {**row.report, "status": "failed"}
    assert replace(row, report=failed).faults() == ["Wan VAE Decode: the report says failed"]


def test_the_page_is_that_of_the_results(rows):
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    facts = Facts(*(data[name] for name in ("schema", "command", "device", "date", "versions")))
    page = comfyui_nodes.nodes_markdown(rows, facts)
    assert page == RESULTS.with_suffix(".md").read_text(encoding="utf-8").rstrip("\n") + "\n"


def test_without_a_comfyui_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    with pytest.raises(SystemExit) as stopped:
        comfyui_nodes.main(["--cpu"])
    assert stopped.value.code == 2
    assert "COMFYUI_PATH must name a ComfyUI checkout" in capsys.readouterr().err


def test_waiting_is_measured_in_three_comfyuis_of_which_one_has_the_caches_of_another(tmp_path):
    started: list[tuple[str, dict[str, str]]] = []
    prompts: list[tuple[str, dict[str, Any]]] = []

    class Server:
        """Answers a prompt at once: a node of 50 ms with a decode of 40."""

        def run(self, prompt, on_message):
            prompts.append((started[-1][0], prompt))
            on_message({"type": "executing", "data": {"node": "4"}})
            on_message({"type": "executed", "data": {"node": "4"}})
            speed = 2.0 if started[-1][0] == "alone" else 1.99
            return SimpleNamespace(
                error=None,
                report=lambda node: {"duration_ms": 40.0, "host_ms": {"node: plan": 2.5}},
                outputs={"3": {"speed": [speed]}},
            )

        def log_text(self) -> str:
            return "Wan VAE: 39 kernels are compiled ahead (9 s)" if len(started) == 3 else ""

    @contextmanager
    def start(name, variables):
        started.append((name, dict(variables)))
        yield Server()

    case = comfyui_nodes.cold_case("wan2.2", on_cpu=False)
    assert case.video == (1, 48, 31, 45, 80) and case.images[1] == (1, 48, 1, 64, 64)
    rows = list(cold_rows(case, tmp_path, start))
    (alone, first), (_, second), (meanwhile, third) = started
    assert (alone, meanwhile) == ("alone", "meanwhile")
    assert first == second and first["WAN_VAE_AHEAD"] == "0" and "WAN_VAE_AHEAD" not in third
    assert set(CACHE_VARIABLES) <= set(first)
    assert not set(first.values()) & set(third.values())
    sampled = [(name, "3" in prompt) for name, prompt in prompts]
    assert sampled.count(("alone", True)) == 1 and sampled.count(("next", True)) == 0
    assert sampled[-4] == ("meanwhile", True)
    for _, prompt in prompts:
        source = "3" if "3" in prompt else "2"
        assert prompt["4"]["inputs"]["samples"] == [source, 0]
    page = "\n".join(cold_lines(rows))
    assert "The sampler's speed while kernels are compiled: -0.5%." in page
    assert page.count("39 kernels are compiled ahead") == 1
    assert [row.decode_ms for row in rows] == [40.0] * 10
    assert "| milliseconds of the host | node: plan |" in page
    assert page.count("| 2.5 |") == 10


def test_a_server_to_measure_in_is_ready_to_start(tmp_path):
    setting = comfyui_nodes.Setting(tmp_path / "ComfyUI", "python", on_cpu=True, flags="--lowvram")
    server = comfyui_nodes._server(setting, tmp_path, "comfyui")
    assert (server.base / "custom_nodes" / "wan_vae_bench_probe.py").is_file()
    assert "--lowvram" in server._command


def test_several_devices_do_the_work_of_one():
    found = sharded_nodes.pairs(False, "0,1", wan22=True, warm=5)
    assert [pair.name.split(" video")[0] for pair in found[:2]] == [
        "decode 1280 x 720",
        "decode 832 x 480",
    ]
    for pair in found:
        prompt = pair.several.comparison_with(pair.one, 3)
        one, several = prompt["7"], prompt["3"]
        assert one["inputs"].keys() - {"vae"} == several["inputs"].keys() - {"vae", "devices"}
        assert prompt["2"] == pair.one.prompt(3)["2"], "the same numbers"
        assert prompt["8"]["inputs"] == {"core": ["7", 0], "ours": ["3", 0]}
        linked = {
            v[0] for node in prompt.values() for v in node["inputs"].values() if type(v) is list
        }
        assert linked <= set(prompt)
    for pair in found[2:4]:
        encode = pair.several.comparison_with(pair.one, 3)
        assert encode["5"]["inputs"]["devices"] == "0,1" and "devices" not in encode["10"]["inputs"]
    assert found[5].several.inputs["devices"] == "all", "which may choose one device"
    wan22 = found[-1].several.prompt(0)
    assert wan22["1"]["inputs"]["vae_name"].startswith("wan2.2")
    assert [wan22["2"]["inputs"][name] for name in ("channels", "height", "width")] == [48, 44, 80]


def test_several_devices_must_have_the_bits_of_one(rows):
    one, several = rows[0], replace(rows[1], difference=0.0, host_ms={"run": 400.0})
    pair = sharded_nodes.PairRows("a decode", one, several)
    assert pair.faults(on_cpu=False) == []
    assert pair.speed_up == one.median_ms / several.median_ms
    wrong = replace(pair, several=replace(several, difference=1e-5))
    assert wrong.faults(on_cpu=True) == []
    assert wrong.faults(on_cpu=False) == ["a decode: differs from one device by 1e-05"]
    fell = replace(several, report={**several.report, "fallbacks": ["rank 1 died"]})
    assert replace(pair, several=fell).faults(on_cpu=False) == ["a decode: rank 1 died"]
    again = replace(pair.several, restart_ms=2e3, restart_host_ms={"workers: import": 1900.0})
    lines = sharded_nodes.pairs_markdown([replace(pair, several=again)])
    assert f"| {pair.speed_up:.2f}x |" in lines[2] and "| run | - / 400.0 |" in lines
    assert lines[-3:] == ["| workers: import |", "|---:|", "| 1900.0 |"]


def test_a_page_with_rows_of_the_cpu_is_about_the_card(rows):
    """`--flags cpu-vae` comes first where it is named first."""
    on_cpu = replace(rows[0], report={**rows[0].report, "device_name": "CPU"})
    assert comfyui_nodes.facts_of([on_cpu, *rows], "0.33.0", []).device == "NVIDIA H200"
    assert comfyui_nodes.facts_of([on_cpu], "0.33.0", []).device == "CPU"
