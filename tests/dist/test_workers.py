"""Worker processes: the picture, and every fault. Nothing hangs, nothing is left over.

Faults are real: signals to a worker's process, limits of the system on its memory or on files.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.dist import jobs
from wan_vae.errors import DecodeCancelled, GeometryError, LatentError, ShardingError
from wan_vae.sharding import WorkerPool, decode_sharded
from wan_vae.sharding.shared import SharedBuffer
from wan_vae.sharding.workers import parse_devices

SHAPE = (1, 16, 5, 6, 16)


@pytest.fixture(scope="module")
def vae():
    return jobs.model("wan2.1")


@pytest.fixture(scope="module")
def latent():
    return jobs.noise(SHAPE)


@pytest.fixture(scope="module")
def expected(vae, latent):
    return vae.decode(latent, chunk_frames=1)


@pytest.fixture(scope="module")
def shared_pool(tmp_path_factory):
    """Two workers for all tests here; a fault ends them, the next test's decode starts new ones."""
    folder = tmp_path_factory.mktemp("shared")
    with WorkerPool("cpu,cpu", timeout_s=3, shared_folders=[folder]) as pool:
        yield pool


@pytest.fixture
def pool(shared_pool):
    yield shared_pool
    (folder,) = shared_pool.shared_folders
    assert list(folder.iterdir()) == [], "shared memory was left behind"


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def decode(pool, vae, latent, **options):
    return pool.decode(vae, latent, chunk_frames=1, axis="height", **options)


@pytest.mark.parametrize(
    ("gather", "axis"),
    [("shared", "height"), ("shared", "width"), ("rank0", "width"), ("all", "height")],
)
def test_pixels_are_those_of_one_process(pool, vae, latent, expected, gather, axis):
    pixels = pool.decode(vae, latent, gather=gather, axis=axis, chunk_frames=1)
    assert torch.equal(pixels, expected)
    report = vae.last_report
    assert report.layout.mixed_calls == 0
    assert [(s.rank, s.axis) for s in report.shards] == [(0, axis), (1, axis)]


def test_an_image_and_progress(pool, vae, latent, expected):
    seen = []
    image = decode(pool, vae, latent, form="image", on_progress=lambda *a: seen.append(a[:2]))
    assert torch.equal(image, expected.add(1).mul(0.5).movedim(1, -1))
    assert seen == [(1, 17), (5, 17), (9, 17), (13, 17), (17, 17)]


def test_workers_stay_warm_and_take_other_weights(pool, vae, latent, expected):
    decode(pool, vae, latent)
    before = pool.pids
    other = jobs.model("wan2.2")
    z = jobs.noise((1, 48, 2, 5, 16))
    assert decode(pool, other, z).shape == (1, 3, 5, 80, 256)
    assert torch.equal(decode(pool, vae, latent), expected)
    assert pool.pids == before


def test_a_state_dict_without_a_pool(vae, latent, expected):
    pixels = decode_sharded(vae.model.state_dict(), latent, ["cpu"], chunk_frames=1)
    assert torch.equal(pixels, expected)


def kill_at(pool, rank, frames):
    """A progress callback that kills `rank` once `frames` are done."""
    killed = []

    def on_progress(done, total, report):
        if done >= frames and not killed:
            killed.append(pool.pids[rank])
            os.kill(killed[0], signal.SIGKILL)

    return on_progress, killed


@pytest.mark.parametrize(("when", "rank"), [("before", 1), ("during", 0), ("after", 1)])
def test_a_killed_rank_is_named_and_the_next_decode_is_right(
    pool, vae, latent, expected, rank, when
):
    decode(pool, vae, latent)
    pids = pool.pids
    hooks = {}
    if when == "before":  # the first chunk: the workers have the command, none has progressed
        stopped = []

        def should_stop():
            if not stopped:
                stopped.append(True)
                os.kill(pids[rank], signal.SIGKILL)
            return False

        hooks["should_stop"] = should_stop
    else:
        # A first report comes while the other rank is in its next chunk; the last, after all.
        hooks["on_progress"] = kill_at(pool, rank, 5 if when == "during" else 13)[0]
    with pytest.raises(
        ShardingError, match=rf"rank {rank} \(cpu\) died \(exit code -9\)"
    ) as caught:
        decode(pool, vae, latent, **hooks)
    assert caught.value.rank == rank
    assert all(is_gone(pid) for pid in pids) and pool.pids == []
    assert torch.equal(decode(pool, vae, latent), expected)


def test_workers_that_are_gone_between_runs_are_started_again(pool, vae, latent, expected):
    decode(pool, vae, latent)
    before = pool.pids
    os.kill(before[1], signal.SIGKILL)
    pool._ranks[1].process.wait()
    assert torch.equal(decode(pool, vae, latent), expected)
    assert not set(before) & set(pool.pids)
    assert is_gone(before[0])


def test_out_of_memory_on_one_rank(pool, vae, expected, latent):
    decode(pool, vae, latent)
    pids = pool.pids

    def starve(done, total, report):
        # From here on this rank gets little further memory from the system.
        pages = int(Path(f"/proc/{pids[1]}/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (16 << 20)
        resource.prlimit(pids[1], resource.RLIMIT_AS, (limit, limit))

    large = jobs.noise((1, 16, 3, 32, 48))
    with pytest.raises(ShardingError, match=r"rank 1 \(cpu\) is out of memory") as caught:
        decode(pool, vae, large, on_progress=starve)
    assert caught.value.rank == 1
    assert all(is_gone(pid) for pid in pids)
    assert torch.equal(decode(pool, vae, latent), expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stuck_rank_is_named_after_the_time_out(pool, vae, latent, expected, rank):
    decode(pool, vae, latent)
    pids = pool.pids

    def stop(done, total, report):
        os.kill(pids[rank], signal.SIGSTOP)

    start = time.monotonic()
    with pytest.raises(ShardingError, match=rf"rank {rank} \(cpu\) does not answer") as caught:
        decode(pool, vae, latent, on_progress=stop)
    assert caught.value.rank == rank
    assert time.monotonic() - start < 3 * pool.timeout_s
    assert all(is_gone(pid) for pid in pids)
    assert torch.equal(decode(pool, vae, latent), expected)


def test_cancel_stops_within_a_chunk_and_keeps_the_workers(pool, vae, latent, expected):
    decode(pool, vae, latent)
    before, seen = pool.pids, []
    with pytest.raises(DecodeCancelled):
        decode(
            pool, vae, jobs.noise((1, 16, 40, 6, 16)),
            on_progress=lambda done, *_: seen.append(done), should_stop=lambda: bool(seen),
        )  # fmt: skip
    assert vae.last_report.status == "cancelled"
    assert seen[-1] < 157
    assert torch.equal(decode(pool, vae, latent), expected)
    assert pool.pids == before


def test_cancel_while_a_rank_waits_for_halo_rows(pool, vae, latent, expected):
    decode(pool, vae, latent)
    pids, events = pool.pids, []

    def hold(done, total, report):
        if not events:  # rank 0 now waits for rows of a rank that does not run
            os.kill(pids[1], signal.SIGSTOP)
            events.append("held")

    def should_stop():
        if events == ["held"]:
            events.append("asked")
            return True
        return False

    def resume():
        while "asked" not in events and threading.main_thread().is_alive():
            threading.Event().wait(0.01)
        os.kill(pids[1], signal.SIGCONT)

    helper = threading.Thread(target=resume)
    helper.start()
    with pytest.raises(DecodeCancelled):
        decode(pool, vae, jobs.noise((1, 16, 40, 6, 16)), on_progress=hold, should_stop=should_stop)
    helper.join()
    assert torch.equal(decode(pool, vae, latent), expected)


def test_two_decodes_queue_up(pool, vae, latent, expected):
    results = {}

    def work(name):
        results[name] = decode(pool, vae, latent)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert torch.equal(results[0], expected) and torch.equal(results[1], expected)


def test_idle_workers_end_by_themselves(vae, latent, expected):
    with WorkerPool("cpu,cpu", idle_s=0.5) as pool:
        pool.decode(vae, latent, chunk_frames=1)
        processes = [r.process for r in pool._ranks]
        assert [p.wait(20) for p in processes] == [0, 0]
        assert torch.equal(pool.decode(vae, latent, chunk_frames=1), expected)
        pids = pool.pids
    assert all(is_gone(pid) for pid in pids)


def test_shared_memory_too_small(pool, vae, latent, expected):
    decode(pool, vae, latent)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(ShardingError, match=r"no room for .* MiB .*shared between the ranks"):
            decode(pool, vae, jobs.noise((1, 16, 5, 24, 32)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(decode(pool, vae, latent), expected)


def test_more_than_the_disk_holds_is_refused_with_the_numbers(tmp_path):
    with pytest.raises(ShardingError, match=rf"{tmp_path} has \d+ MiB"):
        SharedBuffer.create(1 << 60, [tmp_path])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("devices", "match"),
    [
        (["cpu", "cuda:63"], "rank 1 cannot start: device cuda:63"),
        ("cpu,warp", "rank 1 cannot start: device 'warp'"),
        ("", "no device was named"),
    ],
)
def test_a_missing_device_is_named(devices, match):
    with pytest.raises(ShardingError, match=match):
        WorkerPool(devices)


def test_devices_are_read_from_text():
    assert parse_devices("cpu, cpu") == [torch.device("cpu")] * 2
    if not torch.cuda.is_available():
        assert parse_devices("all") == [torch.device("cpu")]


def test_fallback_to_one_device_is_in_the_report(vae, latent, expected):
    start = jobs.noise(SHAPE)
    pixels = decode_sharded(vae, start, ["cpu", "cuda:63"], fallback=True, chunk_frames=1)
    assert torch.equal(pixels, expected)
    assert "decoded on cpu alone" in vae.last_report.fallbacks[0]
    assert "rank 1 cannot start" in vae.last_report.fallbacks[0]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"gather": "raw"}, ShardingError),
        ({"form": "tiles"}, ShardingError),
        ({"axis": "time"}, (GeometryError, ShardingError)),
        ({"latent": torch.zeros(1, 5, 1, 4, 4)}, LatentError),
    ],
)
def test_wrong_arguments_are_refused(pool, vae, latent, change, error):
    arguments = {"latent": latent, **change}
    with pytest.raises(error):
        pool.decode(vae, **arguments)


def test_workers_end_when_their_parent_is_killed(tmp_path):
    import subprocess
    import sys

    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, torch\n"
        "from wan_vae.sharding import WorkerPool\n"
        "from tests.dist import jobs\n"
        "pool = WorkerPool('cpu,cpu')\n"
        "pool.decode(jobs.model('wan2.1'), jobs.noise((1, 16, 1, 4, 16)))\n"
        "print(*pool.pids, flush=True)\n"
        "pool.decode(jobs.model('wan2.1'), jobs.noise((1, 16, 400, 8, 16)), chunk_frames=1)\n"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    pids = [int(p) for p in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while not all(is_gone(pid) for pid in pids):
        assert time.monotonic() < until, "workers outlived their parent"
        threading.Event().wait(0.05)
