"""Fresh processes: their own caches, the same ones for the second, and failures in words."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks.suite import cold_start
from benchmarks.suite.cases import CASES
from benchmarks.suite.cold_start import CACHE_VARIABLES, ColdStart, cold_starts
from benchmarks.suite.decoders import Ours
from benchmarks.suite.measure import NoNumber, Setting
from tests.bench.conftest import CPU, Altered

CASE = CASES["wan2.1-narrow"]
TIMES = '{"start_ms": 1.0, "build_ms": 2.0, "first_decode_ms": 3.0, "next_decode_ms": 4.0'


def starts(decoder):
    return list(cold_starts(CASE, [decoder], Setting(CPU, torch.float32)))


def test_a_real_process_decodes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = starts(Ours("eager"))
    assert [row.caches for row in rows] == ["fresh", "warm"]
    for row in rows:
        assert isinstance(row, ColdStart)
        assert min(row.start_ms, row.build_ms, row.first_decode_ms, row.next_decode_ms) > 0


def test_caches_are_the_pairs_own(monkeypatch):
    seen = []

    def run(command, *, env, **_):
        seen.append({name: env[name] for name in CACHE_VARIABLES})
        return SimpleNamespace(returncode=0, stdout=f'chatter\n{TIMES}, "same": true}}\n')

    monkeypatch.setattr(subprocess, "run", run)
    rows = starts(Ours("eager")) + starts(Ours("auto"))
    assert [row.first_decode_ms for row in rows] == [3.0] * 4
    assert seen[0] == seen[1] and seen[2] == seen[3]
    assert not set(seen[0].values()) & set(seen[2].values())
    assert len(set(seen[0].values())) == len(CACHE_VARIABLES)


@pytest.mark.parametrize(
    ("outcome", "kind", "reason"),
    [
        (SimpleNamespace(returncode=1, stdout="", stderr="trace\nBoom: no"), "failed", "Boom: no"),
        (SimpleNamespace(returncode=-9, stdout="", stderr=""), "failed", "exit code -9"),
        (SimpleNamespace(returncode=0, stdout=f'{TIMES}, "same": false}}'), "refused", "differ"),
        (subprocess.TimeoutExpired("python", 1), "failed", "more than"),
    ],
    ids=["error", "killed", "differs", "hangs"],
)
def test_what_goes_wrong_is_one_row(monkeypatch, outcome, kind, reason):
    def run(*_, **__):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(cold_start.subprocess, "run", run)
    (row,) = starts(Ours("eager"))
    assert isinstance(row, NoNumber) and row.kind == kind and reason in row.reason


def test_who_is_unavailable_starts_no_process(monkeypatch):
    monkeypatch.setattr(cold_start.subprocess, "run", lambda *_, **__: pytest.fail("started"))
    absent = Altered("absent", lambda x: x)
    absent.unavailable_reason = lambda device, dtype: "not here"
    (row,) = starts(absent)
    assert (row.kind, row.reason) == ("unavailable", "not here")
