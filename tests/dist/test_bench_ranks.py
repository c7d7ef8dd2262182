"""`wan-vae bench --ranks` and the emulation: the very code that GPUs run, on the CPU with Gloo."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import emulated_scaling
from benchmarks.suite import emulation
from benchmarks.suite.cases import Case
from benchmarks.suite.emulation import EmulatedWire, emulate, wait
from benchmarks.suite.facts import Facts
from benchmarks.suite.ranks import at_once, command, faults, rounds
from benchmarks.suite.ranks.cases import Sizes
from benchmarks.suite.ranks.command import Budget, pick_ranks
from benchmarks.suite.ranks.correct import Reference
from benchmarks.suite.ranks.counted import Counted, Counts
from benchmarks.suite.ranks.results import (
    SCHEMA,
    Check,
    Fault,
    RanksResults,
    Timing,
    ranks_markdown,
)
from benchmarks.suite.ranks.timing import with_predictions
from benchmarks.suite.scaling import LINKS, Link, exchanged, planned
from benchmarks.suite.weights import random_vae
from wan_vae.chunking import Chunk
from wan_vae.commands.cli import main as cli
from wan_vae.config import wan21, wan22
from wan_vae.errors import ShardingError
from wan_vae.sharding.context import ShardContext
from wan_vae.sharding.plan import plan_shards
from wan_vae.sharding.transport import Incoming, Outgoing
from wan_vae.workers.pool import WorkerPool

CPU = torch.device("cpu")
NARROW = wan21(dim=8)


def no_results(*faults: Fault) -> RanksResults:
    return RanksResults(Facts(SCHEMA, "wan-vae bench ranks", "CPU"), 2, faults=list(faults))


def tiny_sizes() -> Sizes:
    small = Case("tiny", NARROW, (1, 16, 2, 4, 16))
    return Sizes(
        (small, Case("tiny odd", NARROW, (1, 16, 1, 5, 17))),
        (
            Case("tiny", NARROW, (1, 16, 3, 4, 16)),
            Case("tiny 2.2", wan22(dim=8, decoder_dim=8), (1, 48, 2, 3, 8)),
        ),
        Case("tiny", NARROW, (1, 16, 4, 4, 16)),
        2.0,
    )


@pytest.mark.full
def test_the_whole_bench_on_two_cpu_ranks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "small_sizes", tiny_sizes)
    monkeypatch.setattr(command, "exact_float32", lambda: None)  # this process goes on
    code = command.main(
        ["--ranks", "1,2", "--device", "cpu", "--repeats", "1", "--output", str(tmp_path)]
    )
    assert code == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "ranks.json").read_text())
    assert [(c["ranks"], c["passed"]) for c in found["checks"]] == [(1, True)] * 4 + [(2, True)] * 6
    names = [c["name"] for c in found["checks"]]
    assert names[:4] == [
        "decode tiny fp32",
        "encode tiny fp32",
        "decode tiny odd fp32",
        "encode tiny odd fp32",
    ]
    assert "0 mixed calls" in found["checks"][-2]["said"]
    assert [(t["case"], t["ranks"]) for t in found["timings"]] == [
        ("tiny", 1),
        ("tiny", 2),
        ("tiny 2.2", 1),
        ("tiny 2.2", 2),
    ]
    two = found["timings"][1]
    assert two["halo_bytes_a_chunk"] > 0 and two["wait_ms_a_chunk"] > 0
    assert all(
        two[k] > 0 for k in ("speed_up", "device_speed_up", "model_speed_up", "emulated_speed_up")
    )
    assert [f["passed"] for f in found["faults"]] == [True] * 5
    assert "died (exit code -9)" in found["faults"][0]["said"]
    assert found["skipped"] == [] and found["backends"]["2"] == "gloo"
    assert found["schema"] == SCHEMA and len(found["date"]) == 10 and found["devices"] == 2
    text = (tmp_path / "ranks.md").read_text()
    assert (
        text in capsys.readouterr().out and "| 2 | a rank is killed within a chunk | right" in text
    )


@pytest.mark.full
def test_ranks_that_share_devices_are_compared_and_broken_but_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(command, "small_sizes", tiny_sizes)
    monkeypatch.setattr(command, "exact_float32", lambda: None)
    monkeypatch.setattr(command, "_available", lambda _: 2)
    assert (
        command.main(["--ranks", "4", "--device", "cpu", "--repeats", "1", "--shared-devices"]) == 0
    )
    said = capsys.readouterr().out
    assert "- times on 4 ranks: they share 2 devices" in said and "| tiny | 4 |" not in said
    for name in ("two ranks are killed at once within a chunk", "a rank is slow: the others wait"):
        assert f"| 4 | {name} | right |" in said
    assert "**wrong**" not in said


class PoolOfOne:
    """Decodes to `result`; afterwards it has the workers `then`."""

    def __init__(self, result, then=(7,)):
        self.pids, self.result, self.then = [7], result, list(then)

    def decode(self, vae, z, *, chunk_frames, on_progress):
        for _ in range(2):
            on_progress(1, 2, None)
        self.pids = self.then
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_a_slow_rank_must_change_nothing(monkeypatch):
    done = []
    monkeypatch.setattr(faults, "stop", lambda pid: done.append(("stop", pid)))
    monkeypatch.setattr(faults, "resume", lambda pid: done.append(("resume", pid)))

    class Now:
        def __init__(self, _, act, arguments):
            self.start = lambda: act(*arguments)

    monkeypatch.setattr(faults.threading, "Timer", Now)
    ones = torch.ones(2)

    def slow(pool, pause_s=0.0):
        return faults.slow(pool, None, None, ones, pause_s)

    assert slow(PoolOfOne(torch.ones(2))).passed
    assert done == [("stop", 7), ("resume", 7)], "once, at the first chunk"
    assert not slow(PoolOfOne(torch.zeros(2))).passed
    assert not slow(PoolOfOne(torch.ones(2), then=(8,))).passed, "the workers are other ones"
    assert not slow(PoolOfOne(torch.ones(2)), pause_s=60.0).passed, "it did not wait"
    failed = slow(PoolOfOne(ShardingError("rank 0 does not answer")))
    assert not failed.passed and failed.said == "rank 0 does not answer"


def test_what_there_is_no_time_for_is_listed():
    results = no_results()
    command.run(Budget(0.0), results, [1, 2], CPU, tiny_sizes(), 1)
    assert results.checks == results.timings == results.faults == []
    assert results.skipped == ["correctness on 1 ranks, and all that follows: no time left"]
    assert "## Not run" in ranks_markdown(results)


@pytest.mark.parametrize(("damage", "passed"), [(0.0, True), (2e-6, True), (1e-3, False)])
def test_a_wrong_picture_is_not_passed(damage, passed):
    case, reference = tiny_sizes().correct[1], Reference(CPU)
    found = reference.pixels(case, "fp32").clone()
    found[0, 0, 0, 7, 9] += damage * found.abs().max()
    good, said = reference.judge("decode", case, "fp32", found)
    assert good is passed
    assert ("bit for bit" in said) == (damage == 0)


def test_half_precision_may_be_no_further_from_float32_than_one_device(monkeypatch):
    case, reference = tiny_sizes().correct[1], Reference(CPU)
    one = reference.pixels(case, "bf16")
    exact = reference.pixels(case, "fp32")
    assert reference.judge("decode", case, "bf16", one)[0]
    assert reference.judge("decode", case, "bf16", exact - (one - exact))[0]
    assert not reference.judge("decode", case, "bf16", exact + 1.2 * (one - exact))[0]


def test_nothing_is_timed_on_a_count_whose_picture_is_wrong(monkeypatch):
    monkeypatch.setattr(command, "check_correct", lambda *_: [Check(1, "planted", False, "")])
    results = no_results()
    command.run(Budget(300.0), results, [1], CPU, tiny_sizes(), 1)
    assert results.timings == [] and not results.all_good


def test_a_fault_that_goes_unnoticed_fails():
    fault = Fault(2, "planted", False, 0.1, "nothing")
    assert not no_results(fault).all_good
    assert no_results(replace(fault, passed=True)).all_good
    assert "**wrong**" in ranks_markdown(no_results(fault))


def test_speed_ups_are_over_one_rank():
    case = tiny_sizes().timed[0]
    one = Timing("tiny", 1, 3, 90.0, 90.0, 90.0, 60.0, 3, 0, 0.0, None)
    two = replace(one, ranks=2, image_ms=60.0, device_ms=30.0)
    found = with_predictions(case, [one, two], [])
    assert [t.speed_up for t in found] == [1.0, 1.5]
    assert [t.device_speed_up for t in found] == [1.0, 2.0]
    assert with_predictions(case, [two], []) == [two]


def test_nothing_runs_on_ranks_whose_pictures_were_not_compared(capsys):
    assert command.main(["--ranks", "1,2", "--device", "cpu", "--limit-s", "59"]) == 1
    said = capsys.readouterr()
    assert "correctness on 1 ranks, and all that follows" in said.out
    assert said.err == ""


def test_rank_counts():
    assert pick_ranks("all", 6) == [1, 2, 4]
    assert pick_ranks("4,1", 4) == [1, 4]
    assert pick_ranks("all", 2, share=True) == [1, 2, 4, 8]
    assert pick_ranks("all", 16, share=True) == [1, 2, 4, 8]
    with pytest.raises(ShardingError, match="from 1 to the 2 devices"):
        pick_ranks("1,3", 2)


def test_the_command_line_knows_ranks(capsys):
    assert cli(["bench", "--ranks", "1,4096", "--device", "cpu"]) == 1
    assert "--ranks 1,4096: expected counts from 1 to the" in capsys.readouterr().err


def test_an_emulated_wire_gives_what_was_asked_for():
    wire = EmulatedWire(ShardContext(0, 2), CPU)
    x = torch.ones(1, 2, 1, 3, 4)
    (found,) = wire.exchange("here", x.dtype, [Outgoing(1, x)], [Incoming(1, (1, 2, 1, 1, 4))])
    assert found.shape == (1, 2, 1, 1, 4) and not found.any()


def test_emulation_times_each_shard_and_adds_the_link():
    vae = random_vae(NARROW, CPU)
    found = emulate(vae, 3, 5, [2, 4], LINKS, repeats=1, clip_frames=2)
    assert [(e.ranks, e.axis, len(e.shard_ms)) for e in found] == [
        (2, "width", 2),
        (2, "width", 2),
        (4, "width", 4),
        (4, "width", 4),
    ]
    two = found[0]
    assert two.frames == 2
    plan, steady = plan_shards(3, 5, 2), Chunk(1, 3, False, False)
    _, passes = planned(NARROW, (1, 16, 2, 3, 5), plan)
    assert two.link_ms == exchanged(NARROW, plan, 3, LINKS[0], 4, steady, passes).link_ms > 4
    assert two.chunk_ms == max(two.shard_ms)
    assert two.efficiency == two.one_ms / (2 * two.chunk_ms)
    # On the CPU nothing is computed while rows travel.
    slow = replace(two, shard_ms=(9.0, 7.0), bare_ms=(6.0, 5.0), link_ms=4.0)
    assert slow.hidden == 0.25


def test_an_emulated_link_is_waited_for(monkeypatch):
    waits = []
    monkeypatch.setattr(emulation, "wait", lambda device, ms: waits.append((device, ms)))
    wire = EmulatedWire(ShardContext(0, 2), CPU, Link("slow", 1000.0, 8.0))
    x = torch.ones(1, 2, 1, 3, 4)
    for into in ([Incoming(1, (1, 2, 1, 1, 4))], []):
        wire.exchange("here", x.dtype, [Outgoing(1, x)], into)
    wire.exchange("nobody", x.dtype, [], [])
    assert waits == [(CPU, 1.0 + 4.0), (CPU, 1.0)]
    start = time.perf_counter()
    wait(CPU, 2.0)
    assert time.perf_counter() - start >= 2e-3


def test_the_emulation_command(tmp_path, monkeypatch, capsys):
    tiny = emulated_scaling.Picture("tiny", 2, 4, (2,))
    monkeypatch.setattr(emulated_scaling, "SMALL", (tiny,))
    arguments = ["bench", "scaling", "--device", "cpu", "--repeats", "1"]
    assert cli([*arguments, "--output", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "emulated.json").read_text())
    assert data["schema"] == emulated_scaling.SCHEMA and len(data["date"]) == 10
    assert data["command"] == "wan-vae bench scaling --device cpu --repeats 1"
    assert [(r["picture"], r["ranks"]) for r in data["rows"]] == [("tiny", 2)] * len(LINKS)
    assert (tmp_path / "emulated.md").read_text() in capsys.readouterr().out
    # On a GPU, a count below its goal is said.
    slow = replace(emulate(random_vae(NARROW, CPU), 2, 4, [2], LINKS, 1)[0], one_ms=0.1)
    assert "the goal is 90%" in emulated_scaling.missed({"tiny": [slow]})[0]


def test_the_calculated_table_is_printed(capsys):
    assert cli(["bench", "scaling", "--model"]) == 0
    assert "| 720p | 16 | width |" in capsys.readouterr().out


def test_where_there_are_no_signals_the_faults_are_left_out(monkeypatch):
    monkeypatch.setattr(faults, "unavailable_reason", lambda: "not on Windows")
    monkeypatch.setattr(command, "check_correct", lambda *_: [Check(2, "planted", True, "")])
    monkeypatch.setattr(command, "emulate", lambda *_: [])
    results = no_results()
    sizes = replace(tiny_sizes(), timed=())
    command.run(Budget(300.0), results, [2], CPU, sizes, 1)
    assert results.skipped == ["faults on 2 ranks: not on Windows"] and results.all_good


@pytest.mark.skipif(faults.unavailable_reason() is not None, reason="needs signals")
@pytest.mark.full
def test_faults_are_counted_and_leave_nothing(tmp_path, monkeypatch, capsys):
    """As GPUs run it, with the kinds that need no time-out; the others are in test_workers."""
    monkeypatch.setattr(rounds, "small_sizes", tiny_sizes)
    monkeypatch.setattr(rounds, "exact_float32", lambda: None)  # this process goes on
    words = ["--devices", "cpu,cpu", "--rounds", "1", "--only", "killed", "cancel", "room"]
    code = rounds.main([*words, "--output", str(tmp_path)])
    assert code == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "faults.json").read_text())
    assert [(f["rounds"], f["right"], f["wrong"]) for f in found["faults"]] == [(1, 1, [])] * 3
    assert "died (exit code -9)" in (tmp_path / "faults.md").read_text()
    assert found["transport"] == "gloo" and found["devices"] == 2 and found["is_done"]


@pytest.mark.skipif(faults.unavailable_reason() is not None, reason="needs signals")
@pytest.mark.full
def test_processes_share_the_rounds_of_faults(tmp_path, capsys):
    words = ["--devices", "cpu,cpu", "--rounds", "2", "--at-once", "2", "--only", "cancel"]
    code = rounds.main([*words, "--output", str(tmp_path)])
    said = capsys.readouterr()
    assert code == 0, said.out
    found = json.loads((tmp_path / "faults.json").read_text())
    (cancel,) = found["faults"]
    assert (cancel["kind"], cancel["rounds"], cancel["right"]) == ("cancel", 2, 2)
    assert (found["at_once"], found["timeout_s"]) == (2, rounds.DOCUMENTED_S)
    for number in (1, 2):
        assert f"process {number}: round 1, cancel: right" in said.err


def test_the_time_out_of_a_busy_machine_is_the_one_of_a_pool():
    with WorkerPool("cpu,cpu") as pool:
        assert pool.timeout_s == rounds.DOCUMENTED_S


def test_each_child_gets_its_part_of_the_rounds_and_begins_elsewhere():
    found = at_once.shares(["a", "b", "c"], 20, 8)
    assert [share.rounds for share in found] == [3, 3, 3, 3, 2, 2, 2, 2]
    assert ["".join(share.kinds) for share in found[:4]] == ["abc", "bca", "cab", "abc"]
    assert [share.rounds for share in at_once.shares(["a"], 2, 8)] == [1, 1]
    assert at_once.shares([], 20, 8) == []


# A child that counts one round of each of its kinds, and then does what `end` says.
CHILD = """
import json, os, signal, sys
from pathlib import Path
_, output, end, *kinds = sys.argv
assert os.environ["TMPDIR"] == str(Path(output) / "tmp")
data = {"transport": "gloo", "is_done": False, "faults": []}

def write():
    (Path(output) / "new").write_text(json.dumps(data))
    os.replace(Path(output) / "new", Path(output) / "faults.json")  # it is read at any time

for kind in kinds:
    right = not (end == "wrong" and kind == "b")
    data["faults"].append({
        "kind": kind, "name": f"fault {kind}", "rounds": 1, "right": int(right),
        "seconds": [2.0 if end else 1.0], "next_s": [0.5], "said": {"said": 1},
        "wrong": [] if right else ["round 1: said"],
    })
    write()
    print(f"counted {kind}", file=sys.stderr, flush=True)
    if end == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "raises":
        raise ValueError("planted")
data["is_done"] = True
write()
raise SystemExit(end == "wrong")
"""


def shared(tmp_path, ends, kinds=("a", "b"), limit_s=600.0):
    """Two rounds of each kind by two children, which end as `ends` says; the counts, and what was
    started."""
    counts = Counts(no_results().facts, 2, dict.fromkeys(kinds, 2), 30.0, at_once=2)
    started = []

    def make(share, left_s, output, temporary):
        started.append((share, left_s))
        return [sys.executable, "-c", CHILD, str(output), ends.get(output.name, ""), *share.kinds]

    at_once.run_children(counts, make, tmp_path / "children", limit_s, tmp_path / "page")
    return counts, started


def test_the_page_has_the_numbers_of_all_children(tmp_path, capsys):
    counts, started = shared(tmp_path, {"2": "wrong"})
    one, other = counts.found["a"], counts.found["b"]
    assert (one.rounds, one.right, sorted(one.seconds)) == (2, 2, [1.0, 2.0])
    assert (other.rounds, other.right, other.said) == (2, 1, {"said": 2})
    assert other.wrong == ["process 2, round 1: said"]
    assert counts.failed == {} and not counts.is_right and counts.is_done
    page = (tmp_path / "page" / "faults.md").read_text()
    assert "| fault a | 2 | 2 | 1.5 (2.0) | 0.5 |" in page and "rounds not run" not in page
    assert page == counts.markdown() and "2 processes shared the rounds" in page
    assert [share.kinds for share, _ in started] == [["a", "b"], ["b", "a"]]
    assert "process 1: counted a" in capsys.readouterr().err


@pytest.mark.skipif(faults.unavailable_reason() is not None, reason="needs signals")
def test_a_child_that_dies_is_wrong_and_its_last_lines_are_said(tmp_path):
    counts, _ = shared(tmp_path, {"1": "dies", "2": "raises"})
    assert counts.failed["process 1"] == "ended with exit code -9: counted a"
    assert counts.failed["process 2"].startswith("ended with exit code 1: counted b / ")
    assert counts.failed["process 2"].endswith("ValueError: planted")
    assert not counts.is_right
    # What they had counted stays.
    assert all(one.rounds == one.right == 1 for one in counts.found.values())
    assert counts.not_run == {"a": 1, "b": 1}
    page = counts.markdown()
    assert "- **process 1**: ended with exit code -9" in page
    assert "- rounds not run: a 1, b 1\n" in page


def test_memory_is_counted_by_one_child_after_the_others(tmp_path):
    counts, started = shared(tmp_path, {}, ("a", "memory"))
    found = [(list(share.kinds), share.rounds) for share, _ in started]
    assert found == [(["a"], 1), (["a"], 1), (["memory"], 2)]
    assert 0 < started[2][1] < started[0][1] <= 600.0
    # These children count one round of each kind.
    assert counts.not_run == {"memory": 1}


def test_what_the_limit_leaves_is_said(tmp_path):
    counts, started = shared(tmp_path, {}, limit_s=0.0)
    assert started == [] and not counts.is_right
    found = json.loads((tmp_path / "page" / "faults.json").read_text())
    assert found["not_run"] == {"a": 2, "b": 2} and found["faults"] == []


def test_a_child_that_hangs_is_ended_and_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(at_once, "LATE_S", 0.0)
    counts = Counts(no_results().facts, 2, {"a": 1}, 30.0, at_once=2)
    waits = [sys.executable, "-c", "import threading; threading.Event().wait()"]
    at_once.run_children(counts, lambda *_: waits, tmp_path, 0.5)
    assert counts.failed == {"process 1": "did not end: it said nothing"}
    assert not counts.is_right and counts.not_run == {"a": 1}


def test_a_round_counts_only_if_nothing_stays_and_the_next_decode_is_right():
    counted = Counted("planted")
    good = Fault(2, "planted", True, 1.0, "said")
    counted.add(good, [], 0.5, True)
    counted.add(good, ["/dev/shm/wan_vae_x"], 0.5, True)
    counted.add(good, [], 0.5, False)
    counted.add(replace(good, passed=False, said="nothing"), [], 0.5, True)
    assert (counted.rounds, counted.right) == (4, 1)
    assert counted.wrong == [
        "round 2: left behind: /dev/shm/wan_vae_x",
        "round 3: the next decode was wrong",
        "round 4: nothing after 1.0 s",
    ]
    counts = Counts(no_results().facts, 2, {"kind": 6}, 10.0, found={"kind": counted})
    page = counts.markdown()
    assert page.endswith("\n- rounds not run: kind 2\n") and not counts.is_right
    assert "| planted | 4 | 1 | 1.0 (1.0) | 0.5 | said (3); nothing (1) |" in page
