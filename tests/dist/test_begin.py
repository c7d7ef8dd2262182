"""How workers begin: what they do before they know their rank, and which wait for a run."""

from __future__ import annotations

import ctypes
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.conftest import PATIENCE_S
from tests.dist import jobs
from wan_vae.errors import ShardingError
from wan_vae.workers import WorkerPool, begin, joining, launch, worker
from wan_vae.workers import pool as workers
from wan_vae.workers.joining import Joined, WorkerSettings
from wan_vae.workers.pipe import Commands

ROOT = Path(__file__).parents[2]
SHAPE = (1, 16, 3, 6, 16)
CPU = torch.device("cpu")
SETTINGS = WorkerSettings(0, 1, "cpu", "gloo", "", 1.0, 1.0, threads=1)
# Of a module that is imported: never ends.
FOREVER = "import threading\nthreading.Event().wait()\n"


@pytest.fixture(scope="module")
def vae():
    return jobs.model("wan2.1")


def ended(process: subprocess.Popen[bytes]) -> int:
    end = os.pidfd_open(process.pid)
    assert select.select([end], [], [], PATIENCE_S)[0], "it is still there"
    os.close(end)
    return process.wait()


# -- before the rank is known ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stop", "parent gone"])
def test_who_is_not_wanted_ends_in_the_middle_of_its_imports(how, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text(FOREVER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = launch.spawn(0, CPU)
    if how == "stop":
        started.pipe.send(("stop", {}))
    else:
        started.pipe.close()
    assert ended(started.process) == 0


def test_a_worker_that_stops_does_not_wait_for_python(vae, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, threading\natexit.register(threading.Event().wait)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with WorkerPool(["cpu"], timeout_s=PATIENCE_S, start_timeout_s=PATIENCE_S) as pool:
        pool.decode(vae, jobs.noise(SHAPE))
        (rank,) = pool._ranks
    assert rank.process.returncode == 0, "told to stop, not killed"


def test_nobody_looks_for_garbage_among_modules():
    code = (
        "import gc, multiprocessing\n"
        "from wan_vae.workers import begin\n"
        "import sys; assert 'torch' not in sys.modules\n"
        "ours, theirs = multiprocessing.Pipe()\n"
        "import wan_vae.workers.worker as worker\n"
        "def look(*_):\n"
        "    print(gc.isenabled(), gc.get_freeze_count() > 100_000, flush=True)\n"
        "worker.serve = look\n"
        "begin.main(theirs.fileno())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


class Driver:
    """NVIDIA's driver: each call answers 0, but `failing`."""

    def __init__(self, failing=None):
        self.calls, self.failing = [], failing

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *(a for a in arguments if isinstance(a, int))))
            return 100 if name == self.failing else 0

        return call


@pytest.mark.parametrize(
    ("failing", "calls"),
    [
        (None, [("cuInit", 0), ("cuDeviceGet", 3), ("cuDevicePrimaryCtxRetain",)]),
        ("cuInit", [("cuInit", 0)]),
        ("cuDeviceGet", [("cuInit", 0), ("cuDeviceGet", 3)]),
    ],
)
def test_the_driver_makes_the_context_of_the_device(failing, calls, monkeypatch):
    driver = Driver(failing)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    begin.take_context("cuda:3")
    assert driver.calls == calls


def test_without_a_driver_pytorch_says_what_is_wrong(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    begin.take_context("cuda:0")


class Pipe:
    """A parent that hears, and says nothing after `first`."""

    def __init__(self, first=None):
        self.heard, self._first = queue.SimpleQueue(), first

    def send(self, message):
        self.heard.put(message)

    def recv(self):
        if self._first is None:
            threading.Event().wait()
        message, self._first = self._first, None
        return message


@pytest.mark.parametrize("has_driver", [True, False])
def test_the_device_is_touched_when_the_rank_is_known_and_before_pytorch_is_there(
    has_driver, monkeypatch
):
    taken: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(begin, "take_context", taken.put)
    monkeypatch.setattr(joining, "join", lambda settings: Joined())
    settings = asdict(WorkerSettings(**{**asdict(SETTINGS), "has_nvidia_driver": has_driver}))
    pipe, commands, imported = Pipe(("settings", settings)), queue.SimpleQueue(), begin.Future()
    hearing = threading.Thread(target=begin._hear, args=(pipe, commands, imported), daemon=True)
    hearing.start()
    if has_driver:
        assert taken.get(timeout=PATIENCE_S) == "cpu"
    assert pipe.heard.empty() and commands.empty()
    imported.set_result(12.5)
    hearing.join(PATIENCE_S)
    assert pipe.heard.get_nowait() == ("began", 12.5)
    assert commands.get_nowait() == ("settings", settings)
    assert commands.get_nowait() == ("joined", Joined()) and taken.empty()


# -- weights while the ranks meet -----------------------------------------------------------------


class Told(WorkerPool):
    """Tells its workers nothing, and remembers it."""

    def _send_all(self, command, by_rank=None, **arguments):
        self.told = command, arguments


def serving(pipe: Pipe, commands: Commands) -> threading.Thread:
    commands.put(("settings", asdict(SETTINGS)))
    thread = threading.Thread(target=worker.serve, args=(pipe, commands), daemon=True)
    thread.start()
    return thread


def test_weights_are_read_before_the_ranks_have_joined_and_answered_after(vae, monkeypatch):
    loaded = threading.Event()

    def on_load(self, **arguments):
        on_load_before(self, **arguments)
        loaded.set()

    on_load_before = worker._Worker.on_load
    monkeypatch.setattr(worker._Worker, "on_load", on_load)
    pipe, commands, pool = Pipe(), queue.SimpleQueue(), Told(["cpu"])
    thread = serving(pipe, commands)
    with pool._given_weights(vae):
        commands.put(pool.told)
        assert loaded.wait(PATIENCE_S)
    assert pipe.heard.empty(), "the parent waits for ready first"
    commands.put(("joined", Joined()))
    kinds = [pipe.heard.get(timeout=PATIENCE_S) for _ in range(2)]
    assert kinds[0][0] == "ready" and kinds[0][1] <= time.monotonic()
    assert kinds[1] == ("done", None)
    commands.put(("stop", {}))
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


# Weights in a file that is not there.
UNREADABLE = (
    "load",
    {
        "path": "/nowhere",
        "size": 1,
        "table": [],
        "config": {},
        "dtype": "float32",
        "weights_found": {},
    },
)


def test_a_rank_that_cannot_join_says_that_and_not_what_became_of_the_weights():
    pipe, commands = Pipe(), queue.SimpleQueue()
    thread = serving(pipe, commands)
    commands.put(UNREADABLE)
    commands.put(("joined", Joined(RuntimeError("no such interface"))))
    thread.join(PATIENCE_S)
    kind, said = pipe.heard.get_nowait()
    assert (kind, said["text"]) == ("error", "no such interface") and pipe.heard.empty()


def test_weights_that_cannot_be_read_are_an_error_after_the_ranks_have_joined():
    pipe, commands = Pipe(), queue.SimpleQueue()
    serving(pipe, commands)
    commands.put(UNREADABLE)
    commands.put(("joined", Joined()))
    assert pipe.heard.get(timeout=PATIENCE_S)[0] == "ready"
    kind, said = pipe.heard.get(timeout=PATIENCE_S)
    assert (kind, said["kind"]) == ("error", "FileNotFoundError")
    commands.put(("stop", {}))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_fails_while_joining_ends_the_worker():
    pipe, commands = Pipe(), queue.SimpleQueue()
    thread = serving(pipe, commands)
    commands.put(("joined", None))
    thread.join(PATIENCE_S)
    assert not thread.is_alive() and pipe.heard.empty()


def test_ranks_that_have_joined_have_sent_each_other_a_message(ranks):
    for count in (2, 4):
        assert ranks.run("greet", count) == [(1, count - 1)] * count


def test_joining_ends_with_the_greeting(monkeypatch, tmp_path):
    """A pool whose ranks cannot greet does not start."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, importlib.machinery, sys\n"
        "class Loader(importlib.machinery.SourceFileLoader):\n"
        "    def exec_module(self, module):\n"
        "        super().exec_module(module)\n"
        "        def refuse(self):\n"
        "            raise RuntimeError('refused to greet')\n"
        "        module.Wire.greet = refuse\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if not name.endswith('sharding.transport'):\n"
        "            return None\n"
        "        spec = importlib.machinery.PathFinder.find_spec(name, path)\n"
        "        spec.loader = Loader(name, spec.origin)\n"
        "        return spec\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with WorkerPool("cpu,cpu", start_timeout_s=PATIENCE_S) as pool:
        with pytest.raises(ShardingError, match="could not start: RuntimeError: refused to greet"):
            pool.check_wire()
        assert pool._ranks == [], "no run was announced"


# -- which wait for a run -------------------------------------------------------------------------


def waiting(pool: WorkerPool) -> list[int]:
    """The processes that wait to be told their rank."""
    assert pool.pids == []
    return [rank.process.pid for rank in pool._ranks]


@pytest.fixture
def pool():
    with WorkerPool("cpu,cpu", timeout_s=PATIENCE_S, start_timeout_s=PATIENCE_S) as pool:
        yield pool


def test_after_a_failure_new_processes_wait_for_the_run_that_was_announced(pool, vae):
    latent, killed = jobs.noise((1, 16, 40, 6, 16)), []
    expected = vae.decode(jobs.noise(SHAPE), chunk_frames=1)
    pool.start_ahead()

    def kill(*_):
        if not killed:
            killed.extend(pool.pids)
            os.kill(killed[1], signal.SIGKILL)

    with pytest.raises(ShardingError, match=r"rank 1 \(cpu\) died"):
        pool.decode(vae, latent, chunk_frames=1, on_progress=kill)
    new = waiting(pool)
    assert len(new) == 2 and not set(new) & set(killed)
    pixels = pool.decode(vae, jobs.noise(SHAPE), chunk_frames=1, axis="height")
    assert torch.equal(pixels, expected)
    assert pool.pids == new, "the next run takes them"
    # That run has been done: whatever ends the workers now, nobody waits for another.
    pool.free_devices()
    assert waiting(pool) == []


@pytest.mark.parametrize("end", ["idle", "free_devices", "close"])
def test_workers_that_end_before_the_run_that_was_announced_are_replaced(pool, end):
    pool.check_wire()
    before = pool.pids
    pool.start_ahead()
    assert pool.pids == before, "they are there already"
    if end == "idle":
        workers._end_idle(weakref.ref(pool), pool._uses)
    else:
        getattr(pool, end)()
    new = waiting(pool)
    assert len(new) == (0 if end == "close" else 2) and not set(new) & set(before)
    pool.free_devices()
    assert waiting(pool) == new, "they hold none"


def test_nobody_waits_for_a_run_longer_than_was_announced(pool, monkeypatch):
    monkeypatch.setattr(workers, "_AHEAD_S", 0.0)
    pool.check_wire()
    pool.start_ahead()
    pool.free_devices()
    assert waiting(pool) == []


def test_nobody_waits_where_host_memory_is_short(pool, monkeypatch):
    pool.check_wire()
    pool.start_ahead()
    monkeypatch.setattr(workers, "host_free_bytes", lambda: (2 << 30) - 1)
    pool.free_devices()
    assert waiting(pool) == []


def test_the_end_of_the_program_starts_no_processes(pool, vae):
    def interrupt(*_):
        raise KeyboardInterrupt

    pool.start_ahead()
    with pytest.raises(KeyboardInterrupt):
        pool.decode(vae, jobs.noise(SHAPE), chunk_frames=1, on_progress=interrupt)
    assert waiting(pool) == []


def test_all_processes_start_or_none(pool, monkeypatch):
    first = []

    def spawn(rank, device):
        if rank == 1:
            raise ShardingError("planted", rank=1)
        first.append(launch.spawn(rank, device))
        return first[0]

    monkeypatch.setattr(workers, "spawn", spawn)
    with pytest.raises(ShardingError, match="planted"):
        pool.start_ahead()
    assert waiting(pool) == [] and first[0].process.returncode == -signal.SIGKILL
