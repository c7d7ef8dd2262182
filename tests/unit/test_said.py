"""Sentences of reports: their keys and values travel with them, and Chinese has a text for each."""

from __future__ import annotations

import ast
import json
import pickle
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import wan_vae
from wan_vae.commands.report_text import report_rows
from wan_vae.config import detect_config, wan21
from wan_vae.errors import named
from wan_vae.io.latents import encode_notices, statistics_hint
from wan_vae.kernels.proof.cache import ProofCache
from wan_vae.kernels.proof.choice import Choice
from wan_vae.kernels.proof.prove import Verdict
from wan_vae.planning.plan import Plan
from wan_vae.report import DecodeReport, of_batch
from wan_vae.said import Said, said, worded
from wan_vae.workers.devices import parse_devices
from wan_vae.workers.joining import WorkerSettings
from wan_vae.workers.launch import WorkerProcess
from wan_vae.workers.sharded import fallback_note
from wan_vae.workers.shared import SharedBuffer
from wan_vae.workers.watch import Failure, error_of, failure_of
from wan_vae.workers.worker import _describe

ROOT = Path(__file__).resolve().parents[2]


def templates() -> dict[str, str]:
    """Key and English text of each `said(...)` in the code; a key is used for one text only."""
    found: dict[str, str] = {}
    for folder in ("wan_vae", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "said":
                    key, text = (ast.literal_eval(value) for value in call.args)
                    assert found.setdefault(key, text) == text, f"{key} has two texts"
                    assert {word.arg for word in call.keywords} == names(text), (path, key)
    return found


def names(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_chinese_has_every_sentence_with_the_same_values():
    english = templates()
    assert len(english) > 30
    words = json.loads((ROOT / "locales/zh/main.json").read_text(encoding="utf-8"))["wanVae"]
    chinese = {
        key.removeprefix("said."): text for key, text in words.items() if key.startswith("said.")
    }
    assert sorted(chinese) == sorted(english)
    for key, text in english.items():
        assert names(chinese[key]) == names(text), key


def is_plain(value: ast.expr) -> bool:
    """Whether `value` is a sentence in English alone: a text, or texts in a sum or a list."""
    match value:
        case ast.Constant(value=str(text)):
            return bool(text)
        case ast.JoinedStr():
            return True
        case ast.BinOp(left=left, right=right):
            return is_plain(left) or is_plain(right)
        case ast.IfExp(body=one, orelse=other):
            return is_plain(one) or is_plain(other)
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return any(map(is_plain, elements))
        case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element):
            return is_plain(element)
    return False


def sentences(tree: ast.AST) -> Iterator[ast.expr]:
    """What is added to warnings, fallbacks or notices, also as arguments of these names."""
    lists = ("warnings", "fallbacks", "notices", "NOTICES")
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=owner, attr="append" | "extend"), args=[value]):
                if getattr(owner, "attr", getattr(owner, "id", "")) in lists:
                    yield value
            case ast.AugAssign(target=owner, value=value):
                if getattr(owner, "attr", getattr(owner, "id", "")) in lists:
                    yield value
            case ast.keyword(arg="warnings" | "fallbacks", value=value):
                yield value


# What only the command line and programs in Python meet, both of which speak English: files that
# ComfyUI reads itself, files that its nodes do not write, and kernels compiled by hand.
ENGLISH_ALONE = {
    "wan_vae/io/tensors.py",
    "wan_vae/io/video_read.py",
    "wan_vae/io/video_write.py",
    "wan_vae/kernels/triton/ahead.py",
    "wan_vae/runs/ahead.py",
}
# And functions of files that nodes need too: they read files, or check `decode(out=...)`.
ENGLISH_FUNCTIONS = {
    "wan_vae/io/checkpoint.py": {
        "load_checkpoint",
        "_find_file",
        "_read_json",
        "_check_diffusers_config",
        "_read",
        "_read_shards",
        "_read_file",
    },
    "wan_vae/io/files.py": {"unreadable_reason"},
    "wan_vae/io/latents.py": {"read_latent", "_read", "_choose", "_read_numpy", "_from_numpy"},
    "wan_vae/io/sink.py": {"check_out"},
    "wan_vae/runs/decode.py": {"__init__"},
}
# Where a compiler's own message is passed on.
OTHERS_WORDS = {"wan_vae/kernels/cuda/driver.py": {"_compile"}}
OURS = {name for name in dir(wan_vae.errors) if name.endswith(("Error", "Cancelled"))}
OURS |= {"BuildError"}


def errors(tree: ast.Module, name: str) -> Iterator[ast.expr]:
    """The messages of our own errors that the module `name` makes."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in OURS:
            continue
        inside = {f.name for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)}
        free = ENGLISH_FUNCTIONS.get(name, set()) | OTHERS_WORDS.get(name, set())
        if node.args and not inside & free:
            yield node.args[0]


# Functions that say why something is not done or not there, and what keeps such a reason.
REASONS = re.compile("reason|refusal|unmet|missing|outdated|who_holds")
KEEPERS = ("Refusal", "refuse", "Verdict", "Contender")


def reasons(tree: ast.Module, name: str) -> Iterator[ast.expr]:
    """The reasons that the module `name` gives for what it does not do."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called)):
                if called in KEEPERS:
                    yield from (arg for arg in node.args if " " in ast.unparse(arg))
            case ast.FunctionDef(name=function) if REASONS.search(function):
                if function not in ENGLISH_FUNCTIONS.get(name, set()):
                    yield from (
                        n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value
                    )


def test_what_reports_and_nodes_say_has_a_key():
    """No warning, fallback, notice or error that a node may show is in English alone."""
    plain, seen = [], 0
    for folder in ("wan_vae", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if name in ENGLISH_ALONE or name.startswith("wan_vae/commands/"):
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found = [*sentences(tree), *errors(tree, name), *reasons(tree, name)]
            if folder == "nodes":
                calls = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise))
                found += [call.args[0] for call in calls if getattr(call, "args", None)]
            seen += len(found)
            plain += [f"{name}:{value.lineno}" for value in found if is_plain(value)]
    assert not plain, "\n".join(plain)
    assert seen > 200


@pytest.mark.parametrize(
    "sentence",
    [
        *encode_notices((1, 3, 7, 67, 90), 4, wan21(dim=8)),
        *encode_notices((1, 3, 5, 64, 64), 6, wan21(dim=8)),
        statistics_hint(torch.randn(1, 16, 3, 32, 32), wan21(dim=8), False),
    ],
)
def test_notices_of_latents_and_images_are_worded(sentence):
    assert isinstance(sentence, Said)
    for value in sentence.values.values():  # numbers and names; what is words has a key of its own
        assert isinstance(value, Said) or " " not in value, value


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(wan_vae.WanVAEError) as caught:
        call()
    return str(caught.value)


def test_errors_that_users_of_nodes_meet_are_worded(small_vae):
    config = small_vae.config
    nan = torch.full((1, config.z_dim, 1, 4, 4), float("nan"))
    calls = [
        lambda: small_vae.decode(torch.zeros(1, 4, 1, 4, 4)),
        lambda: small_vae.decode(nan),
        lambda: small_vae.encode(torch.zeros(1, 3, 1, 4, 4)),
        lambda: detect_config({"decoder.conv_in.weight": torch.zeros(1)}),
        lambda: parse_devices("tpu,tpu", torch.device("cpu")),
    ]
    for call in calls:
        assert isinstance(message_of(call), Said), message_of(call)


def assert_worded(sentence: str, *quoted: str) -> None:
    """`sentence` and all sentences in it have keys; `quoted` are the words of others in it."""
    assert isinstance(sentence, Said), sentence
    for value in sentence.values.values():
        if isinstance(value, Said):
            assert_worded(value, *quoted)
        else:
            assert value in quoted or not re.search("[a-z] [a-z]", value), value


def rank(number: int) -> WorkerProcess:
    process = SimpleNamespace(poll=lambda: None)
    return WorkerProcess(number, torch.device("cuda", number), process, None)


def of_worker(error: BaseException, number: int) -> Failure:
    """What the parent knows of an error of a worker: plain values came through a pipe."""
    settings = WorkerSettings(number, 2, f"cuda:{number}", "nccl", "", 1.0, 1.0, 1)
    plain = json.loads(json.dumps(_describe(error, settings)))
    return failure_of(rank(number), plain, "nccl")


QUOTED = "CUDA error: an illegal memory access was encountered"
FAILURES = {
    "rank 1 (cuda:1) died (exit code -9); it failed while decoding": Failure(
        rank(1), "died", said("worker.exit_code", "exit code {code}", code=-9), 1
    ),
    "rank 1 (cuda:1) is out of memory: run: 5 GiB; it failed while decoding": of_worker(
        wan_vae.DecodeMemoryError(
            said("run.no_memory", "{what}: {failure}", what="run", failure="5 GiB")
        ),
        1,
    ),
    "rank 0 (cuda:0) does not answer (stuck or overloaded): a worker got a command before the "
    "weights": of_worker(
        wan_vae.ShardingError(
            said("worker.no_weights", "a worker got a command before the weights")
        ),
        1,
    ),
    f"rank 1 (cuda:1) failed while decoding: RuntimeError: {QUOTED}": of_worker(
        RuntimeError(QUOTED), 1
    ),
}


@pytest.mark.parametrize("text", FAILURES)
def test_what_a_worker_died_of_is_worded(text):
    what = said("worker.while_decoding", "failed while decoding")
    error = error_of([FAILURES[text]], [rank(0), rank(1)], what)
    assert str(error) == text
    assert_worded(str(error), QUOTED)
    # As the line and the panel get it, where one device did the work instead.
    note = fallback_note(torch.device("cpu"), error)
    told = worded([note])
    assert told[note]["values"]["error"] == text
    assert told[text.partition(")")[0] + ")"]["key"] == "worker.name"


def test_no_room_in_shared_memory_is_worded(tmp_path):
    with pytest.raises(wan_vae.ShardingError) as caught:
        SharedBuffer.create(1 << 62, [tmp_path, tmp_path])
    assert_worded(str(caught.value))
    with pytest.raises(wan_vae.ShardingError, match="no folder for it") as caught:
        SharedBuffer.create(1, [tmp_path / "none"])
    assert_worded(str(caught.value))


def test_a_plan_keeps_the_words_on_its_way_through_another_process(small_vae):
    plan = small_vae.plan((1, small_vae.config.z_dim, 3, 32, 32), free_bytes=1)
    again = Plan.from_dict(json.loads(json.dumps(plan.as_dict())))
    assert again == plan and plan.notes
    for made, kept in (
        (plan.notes, again.notes),
        ([plan.layout.reason], [again.layout.reason]),
        ([r.text for r in plan.choices.refusals], [r.text for r in again.choices.refusals]),
    ):
        assert worded(kept) == worded(made) and len(worded(made)) >= len(set(made))


def test_verdicts_keep_the_words_in_their_file(tmp_path):
    reason = said("proof.error", "relative error {error}, allowed {bound}", error=1.0, bound=0.1)
    refused = named(RuntimeError("no kernel image"))
    cache = ProofCache({"device": "test"}, tmp_path)
    cache.verdict("a", lambda: Verdict(False, reason, 1.0))
    cache.keep_choice("b", Choice("eager", {"eager": 1.0}, {"c": refused}))
    again = ProofCache({"device": "test"}, tmp_path)
    assert worded([again.known("a").reason]) == worded([reason])
    assert worded(again.choice("b").refused.values()) == worded([refused])
    # A file of before has none, and one with others is damaged.
    content = json.loads(again.path.read_text())
    loop = {str(reason): {"key": "x", "values": {"y": str(reason)}}}
    for words, damaged in ((None, False), (loop, True), ({"a": 1}, True), ([], True)):
        kept = {k: v for k, v in content.items() if k != "worded"}
        again.path.write_text(json.dumps(kept if words is None else kept | {"worded": words}))
        read = ProofCache({"device": "test"}, tmp_path)
        assert bool(read.notes) == damaged
        assert (read.known("a") is None) == damaged


def test_an_inspection_is_worded_row_by_row(small_vae):
    rows = report_rows(small_vae.inspect(), dtypes={"float32": 194}, all_layers=True)
    assert len(rows) > 30
    for label, text in rows:
        assert isinstance(label, Said) or not label  # one that goes on
        if not re.fullmatch(r"eager: [\w, ]+", text):  # names alone
            assert_worded(text)


def test_a_sentence_is_a_string_with_key_and_values():
    inner = said("a", "no room for {what}", what="it")
    outer = said("b", "{count} strips: {reason}", count=3, reason=inner)
    assert outer == "3 strips: no room for it"
    assert worded([outer, "plain", None]) == {
        "3 strips: no room for it": {
            "key": "b",
            "values": {"count": "3", "reason": "no room for it"},
        },
        "no room for it": {"key": "a", "values": {"what": "it"}},
    }
    # What goes to another process has no class of ours, which has another name there.
    assert type(pickle.loads(pickle.dumps(outer))) is str
    # An error that is raised with it says it.
    assert isinstance(str(wan_vae.LatentError(outer)), Said)


def test_a_report_keeps_the_words_on_its_way_through_another_process():
    warning = said("c", "{n} frames", n=5)
    report = DecodeReport("decode", "done", {}, warnings=(warning,), fallbacks=("as it was",))
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["warnings"] == ["5 frames"]
    assert plain["worded"]["5 frames"] == {"key": "c", "values": {"n": "5"}}
    again = DecodeReport.from_dict(plain)
    assert again == report
    assert worded(again.warnings) == worded((warning,))


def test_the_reason_of_the_layout_is_worded(small_vae):
    small_vae.decode(torch.zeros(1, small_vae.config.z_dim, 1, 4, 4))
    plain = small_vae.last_report.as_dict()
    reason = plain["worded"][plain["layout"]["reason"]]
    assert reason["key"] == "layout.no_gain"
    assert reason["values"] == {"device": "cpu"}
    assert all(type(value) is str for value in (plain["layout"]["reason"], *plain["worded"]))


@pytest.mark.parametrize("name", ["LatentError", "NotAWanVAEError", "ShardingError", "WanVAEError"])
def test_errors_name_the_package_and_not_a_folder(name):
    assert getattr(wan_vae, name).__module__ == "wan_vae"


def test_frames_of_a_batch_count_together(small_vae):
    told = []
    small_vae.decode(
        torch.zeros(2, small_vae.config.z_dim, 3, 4, 4),
        chunk_frames=1,
        on_progress=lambda done, total, report: told.append((done, total, report.left_ms)),
    )
    assert [(done, total) for done, total, _ in told] == [(2, 18), (10, 18), (18, 18)]
    first, second, last = (left for *_, left in told)
    # How long a pass takes depends on who else computes.
    assert first is None and second > 0 == last
    report = small_vae.last_report
    assert (report.done_frames, report.total_frames, report.left_ms) == (18, 18, None)


def running(builder: wan_vae.report.ReportBuilder, done: int) -> DecodeReport:
    builder.done_frames = done
    return builder.build("running")


@pytest.fixture
def of_81_frames() -> wan_vae.report.ReportBuilder:
    builder = wan_vae.report.ReportBuilder(
        "decode", wan_vae.config.wan21(dim=8), torch.device("cpu"), torch.float32
    )
    builder.latent_shape, builder.total_frames = (1, 16, 21, 4, 4), 81
    return builder


def test_the_time_left_is_counted_at_the_pace_behind_the_first_pass(of_81_frames):
    """A cold first frame takes long and a warm one little: neither says how long others take."""
    first = running(of_81_frames, 1)
    assert first.left_ms is None
    for done in (5, 41, 81):
        later = running(of_81_frames, done)
        pace_ms = (later.duration_ms - first.duration_ms) / (done - 1)
        assert later.left_ms == pytest.approx((81 - done) * pace_ms)


def test_the_time_left_after_a_long_first_pass_and_after_a_new_start(of_81_frames):
    before = running(of_81_frames, 41)
    assert before.left_ms == pytest.approx(40 / 41 * before.duration_ms)
    again = running(of_81_frames, 5)  # memory ran out
    assert again.left_ms == pytest.approx(76 / 5 * again.duration_ms)
    later = running(of_81_frames, 9)
    assert later.left_ms == pytest.approx((later.duration_ms - again.duration_ms) / 4 * 72)


def test_clips_one_after_another_make_one_report():
    clip = DecodeReport(
        "decode",
        "done",
        {},
        latent_shape=(1, 16, 3, 4, 4),
        pixel_shape=(1, 3, 9, 32, 32),
        done_frames=9,
        total_frames=9,
        duration_ms=1000.0,
        warnings=("NaN",),
        memory=wan_vae.report.MemoryRecord(peak_bytes=5, output_bytes=7),
    )
    second = replace(
        clip,
        status="running",
        done_frames=5,
        duration_ms=500.0,
        left_ms=250.0,
        memory=replace(clip.memory, peak_bytes=4),
    )
    both = of_batch([clip, second], 3)
    assert (both.done_frames, both.total_frames, both.status) == (14, 27, "running")
    assert both.pixel_shape == (3, 3, 9, 32, 32)
    assert both.duration_ms == 1500.0
    assert both.left_ms == 250.0 + 750.0, "the rest of this one, and one like it"
    assert both.frames_per_s == pytest.approx(14 / 1.5)
    assert both.warnings == ("NaN",)
    assert (both.memory.peak_bytes, both.memory.output_bytes) == (5, 14)
