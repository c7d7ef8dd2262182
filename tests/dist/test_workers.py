"""Worker processes: the picture, and every fault. Nothing hangs, nothing is left over.

Faults are real: signals to a worker's process, limits of the system on its memory or on files.
"""

from __future__ import annotations

import copy
import errno
import gc
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import PATIENCE_S, random_state
from tests.dist import jobs
from tests.dist.sockets import local_addresses
from wan_vae import WanVAE
from wan_vae.config import wan21
from wan_vae.errors import (
    DecodeCancelled,
    DecodeMemoryError,
    GeometryError,
    LatentError,
    ShardingError,
)
from wan_vae.hooks import Hooks
from wan_vae.io import pages
from wan_vae.io.image import ImageSink
from wan_vae.io.sink import TensorSink
from wan_vae.said import Said
from wan_vae.workers import WorkerPool, decode_sharded
from wan_vae.workers import pool as workers
from wan_vae.workers.devices import (
    all_devices,
    make_current,
    parse_devices,
    pick_transport,
    worth_sharing,
)
from wan_vae.workers.joining import WorkerSettings, join
from wan_vae.workers.launch import WorkerProcess, worker_environment
from wan_vae.workers.shared import SharedBuffer, view
from wan_vae.workers.watch import Failure, Watch, Watched, error_of, failure_of

SHAPE = (1, 16, 3, 6, 16)
# So long that the ranks cannot be done before a fault reaches them.
LONG = (1, 16, 40, 6, 16)
FULL = pytest.mark.full
# For tests in which a worker does not answer; the others must within this time.
SHORT_S = 3.0


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
    with WorkerPool(
        "cpu,cpu",
        timeout_s=PATIENCE_S,
        start_timeout_s=PATIENCE_S,
        shared_folders=[folder],
    ) as pool:
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
    assert seen == [(1, 9), (5, 9), (9, 9)]


@pytest.mark.parametrize("axis", ["height", "width"])
def test_a_doubled_picture_with_alpha(pool, latent, axis):
    config = replace(wan21(dim=8), colours=4, decoder_colours=4, decoder_patch_size=2)
    vae = WanVAE.from_state_dict(random_state(config), device="cpu")
    expected = vae.decode(latent, chunk_frames=1)
    assert expected.shape == (1, 4, 9, 96, 256)
    assert torch.equal(pool.decode(vae, latent, axis=axis, chunk_frames=1), expected)
    image = pool.decode(vae, latent, axis=axis, form="image", chunk_frames=1)
    assert torch.equal(image, expected.add(1).mul(0.5).movedim(1, -1))
    pixels = torch.rand(1, 4, 5, 48, 64) * 2 - 1
    assert torch.equal(pool.encode(vae, pixels, axis=axis), vae.encode(pixels))


def test_workers_stay_warm_and_take_other_weights(pool, vae, latent, expected):
    decode(pool, vae, latent)
    before = pool.pids
    other = jobs.model("wan2.2")
    z = jobs.noise((1, 48, 2, 5, 16))
    assert decode(pool, other, z).shape == (1, 3, 5, 80, 256)
    assert torch.equal(decode(pool, vae, latent), expected)
    assert pool.pids == before


def test_a_caller_in_inference_mode_can_send_weights(pool, latent):
    """As ComfyUI's nodes are: what is made there can be written by no other thread."""
    fresh = WanVAE.from_state_dict(random_state(wan21(dim=8), seed=5), device="cpu")
    expected = fresh.decode(latent, chunk_frames=1)
    with torch.inference_mode():
        pixels = decode(pool, fresh, latent)
    assert torch.equal(pixels, expected)


def test_a_late_sign_of_life_is_no_answer(pool, vae, latent, expected):
    decode(pool, vae, latent)
    for rank in pool._ranks:  # as if asked just before they were done
        rank.pipe.send(("ping", None))
    assert decode(pool, jobs.model("wan2.2"), jobs.noise((1, 48, 1, 5, 16))).shape[2] == 1
    assert torch.equal(decode(pool, vae, latent), expected)


def test_a_state_dict_without_a_pool(vae, latent, expected):
    pixels = decode_sharded(vae.model.state_dict(), latent, ["cpu"], chunk_frames=1)
    assert torch.equal(pixels, expected)


def test_workers_talk_over_the_loopback_interface_only(pool, vae, latent):
    decode(pool, vae, latent)
    for pid in pool.pids:
        found = local_addresses(pid)
        assert found, "the ranks of a group have sockets"
        assert all(address.is_loopback for address in found), found
        # Where the host name means this machine, Gloo would listen there without being told.
        assert b"GLOO_SOCKET_IFNAME=lo\0" in Path(f"/proc/{pid}/environ").read_bytes()
    with socket.socket(type=socket.SOCK_DGRAM) as outside:  # what to look for
        outside.bind(("0.0.0.0", 0))
        assert not all(address.is_loopback for address in local_addresses(os.getpid()))


def test_workers_import_nothing_of_comfyui(vae, latent, expected, tmp_path, monkeypatch):
    marker = tmp_path / "imported"
    trap = f"from pathlib import Path\nPath({str(marker)!r}).open('a').write(__name__ + ' ')\n"
    for name in (
        "comfy",
        "comfy_api",
        "comfy_extras",
        "server",
        "folder_paths",
        "execution",
        "main",
        "aiohttp",
    ):
        (tmp_path / f"{name}.py").write_text(trap)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with WorkerPool(["cpu"]) as pool:
        assert torch.equal(pool.decode(vae, latent, chunk_frames=1), expected)
    assert not marker.exists(), marker.read_text()
    subprocess.run([sys.executable, "-c", "import comfy"], check=True)
    assert marker.read_text() == "comfy ", "the trap works"


def test_encode_in_the_workers(pool, vae):
    video = jobs.noise((1, 3, 5, 50, 130)).tanh()
    expected = vae.encode(video)
    # The stride-2 convolution: oneDNN chooses its kernel by size.
    error = (pool.encode(vae, video, axis="height") - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max()
    report = vae.last_report
    with pytest.raises(DecodeCancelled):
        pool.encode(vae, video, should_stop=lambda: True)
    assert report.operation == "encode" and vae.last_report.status == "cancelled"


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        pytest.param(torch.float16, marks=FULL),
        pytest.param(torch.float64, marks=FULL),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("-inf"), marks=FULL)])
@pytest.mark.parametrize("operation", ["decode", "image", "encode", "frames"])
def test_values_that_are_not_finite_are_refused_and_the_workers_stay(
    pool, vae, latent, expected, operation, value, dtype
):
    """With the sentence of one device; found by the ranks, of which one has rows with the value."""
    decode(pool, vae, latent)
    pids = pool.pids
    given = latent.clone().to(dtype) if operation in ("decode", "image") else video_of(dtype)
    given[0, 1, 2, -1, 3] = value
    if operation == "frames":
        given = given.contiguous(memory_format=torch.channels_last_3d)
    options = {"form": "image"} if operation == "image" else {}
    name = "decode" if operation == "image" else operation
    name = "encode" if operation == "frames" else name
    with pytest.raises(
        LatentError, match=r"the (latent|video) itself contains NaN or inf"
    ) as alone:
        getattr(vae, name)(given)
    status = None if vae.last_report is None else vae.last_report.status
    with pytest.raises(LatentError) as refused:
        getattr(pool, name)(vae, given, axis="height", **options)
    assert str(refused.value) == str(alone.value) and "(2)" in str(alone.value)
    assert refused.value.args[0].key == "latent.not_finite"
    assert (None if vae.last_report is None else vae.last_report.status) == status
    assert pool.pids == pids and pool._laps == {}
    assert torch.equal(decode(pool, vae, latent), expected)


def video_of(dtype):
    return jobs.noise((1, 3, 5, 48, 64)).tanh().to(dtype)


def test_one_device_looks_at_float64_as_workers_do(pool, vae, latent):
    """Computed in float32, where large numbers are inf."""
    large = video_of(torch.float64)
    large[0, 1, 2, -1, 3] = 1e300
    for encode in (vae.encode, partial(pool.encode, vae)):
        with pytest.raises(LatentError, match=r"1 of 5 frames \(2\)"):
            encode(large)


def test_a_latent_without_data_is_refused_before_the_workers_see_it(pool, vae):
    with pytest.raises(LatentError, match="meta tensor"):
        pool.decode(vae, torch.empty(SHAPE, device="meta"))


def test_what_some_ranks_refuse_and_others_take_is_a_failure_of_theirs():
    """They do not have the same input: nothing that they say can be trusted."""
    ranks = [SimpleNamespace(rank=n, name=f"rank {n}", pipe=n) for n in range(2)]
    watch = Watch(
        Watched(ranks, "gloo", PATIENCE_S, SimpleNamespace(raw=[0]), Hooks(), operation="encode")
    )
    refused = {"kind": "LatentError", "text": "NaN", "rank": None, "worded": {}}
    assert watch._refused_by_some({0: {"refused": refused}, 1: {"refused": refused}}) == []
    assert watch._refused_by_some({0: {"refused": None}, 1: {"refused": None}}) == []
    (failure,) = watch._refused_by_some({0: {"refused": None}, 1: {"refused": refused}})
    assert failure.rank is ranks[1] and failure.text == "NaN"


def test_a_video_goes_over_as_it_lies_in_memory_that_is_used_again(pool, vae):
    """Frames with channels last, as an IMAGE holds them; the latent does not keep the video."""
    video = jobs.noise((1, 3, 5, 48, 64)).tanh()
    first = pool.encode(vae, video, axis="height")
    assert vae.last_report.layout.latent_format == "contiguous"
    (path,) = pool._spares.paths[-1:]
    frames = video.contiguous(memory_format=torch.channels_last_3d)
    second = pool.encode(vae, frames, axis="height")
    assert vae.last_report.layout.latent_format == "channels_last_3d", "no copy in another order"
    assert torch.equal(first, second)
    assert pool._spares.paths[-1:] == [path], "both latents are held, and it was free"


def test_ranks_with_their_own_memory_formats_agree(pool, vae, latent, expected):
    pixels = decode(pool, vae, latent, memory_formats=["contiguous", "channels_last_3d"])
    assert (pixels - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert [r.layout.chosen for r in pool.last_reports] == ["contiguous", "channels_last_3d"]
    assert vae.last_report.layout.mixed_calls == 0
    with pytest.raises(ShardingError, match="memory_formats has 1 entries for 2 ranks"):
        decode(pool, vae, latent, memory_formats=["contiguous"])


def test_messages_prove_themselves(pool):
    for answer in pool.check_wire():
        assert answer["gather"] and answer["exchange"]
    with pytest.raises(ShardingError, match="nothing to prove"):
        WorkerPool(["cpu"]).check_wire()


def test_progress_is_what_every_rank_has_done(vae):
    seen = []
    ranks = [SimpleNamespace(rank=r) for r in range(3)]
    hooks = Hooks(on_progress=lambda *a: seen.append(a))
    watch = Watch(Watched(ranks, "gloo", 1.0, None, hooks, "decode"))
    report = vae.inspect().as_dict()
    told_after = []
    messages = [(1, 1), (0, 1), (0, 5), (2, 1), (1, 5), (1, 9), (2, 5), (2, 9), (0, 9)]
    for number, (rank, done) in enumerate(messages, 1):
        watch._progress(ranks[rank], done, 9, report if rank == 0 else None)
        told_after += [number] * (len(seen) - len(told_after))
    assert [(done, total) for done, total, _ in seen] == [(1, 9), (5, 9), (9, 9)]
    assert [told.done_frames for _, _, told in seen] == [1, 5, 9]
    assert told_after == [4, 7, 9], "when the slowest rank had them"


def kill_at(pool, rank, frames):
    """A progress callback that kills `rank` once `frames` are done."""
    killed = []

    def on_progress(done, total, report):
        if done >= frames and not killed:
            killed.append(pool.pids[rank])
            os.kill(killed[0], signal.SIGKILL)

    return on_progress, killed


@pytest.mark.parametrize(
    ("when", "rank"),
    [pytest.param("before", 1, marks=FULL), ("first", 0), pytest.param("later", 1, marks=FULL)],
)
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
        # At a report, while the ranks go on.
        hooks["on_progress"] = kill_at(pool, rank, 1 if when == "first" else 13)[0]
    with pytest.raises(
        ShardingError, match=rf"rank {rank} \(cpu\) died \(exit code -9\)"
    ) as caught:
        decode(pool, vae, jobs.noise(LONG), **hooks)
    assert caught.value.rank == rank
    assert isinstance(str(caught.value), Said)
    assert all(is_gone(pid) for pid in pids) and pool.pids == []
    assert torch.equal(decode(pool, vae, latent), expected)


def test_workers_that_are_gone_between_runs_are_started_again(pool, vae, latent, expected):
    decode(pool, vae, latent)
    before = pool.pids
    os.kill(before[1], signal.SIGKILL)
    os.waitid(os.P_PID, before[1], os.WEXITED | os.WNOWAIT)  # it is gone; the pool does not know
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

    large = jobs.noise((1, 16, 9, 32, 48))
    with pytest.raises(ShardingError, match=r"rank 1 \(cpu\) is out of memory") as caught:
        decode(pool, vae, large, on_progress=starve)
    assert caught.value.rank == 1
    assert all(is_gone(pid) for pid in pids)
    assert torch.equal(decode(pool, vae, latent), expected)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=FULL)])
def test_a_stuck_rank_is_named_after_the_time_out(pool, vae, latent, expected, monkeypatch, rank):
    decode(pool, vae, latent)
    pids = pool.pids

    def stop(done, total, report):
        os.kill(pids[rank], signal.SIGSTOP)

    with monkeypatch.context() as patch:
        patch.setattr(pool, "timeout_s", SHORT_S)  # of workers that are warm already
        with pytest.raises(ShardingError, match=rf"rank {rank} \(cpu\) does not answer") as caught:
            decode(pool, vae, jobs.noise(LONG), on_progress=stop)
    assert caught.value.rank == rank
    assert all(is_gone(pid) for pid in pids)
    assert torch.equal(decode(pool, vae, latent), expected)


def test_a_worker_that_stops_alone_is_found(vae, latent):
    with WorkerPool(["cpu"], timeout_s=SHORT_S, start_timeout_s=PATIENCE_S) as pool:
        pool.decode(vae, latent)
        (pid,) = pool.pids
        stop = {"on_progress": lambda *_: os.kill(pid, signal.SIGSTOP)}
        with pytest.raises(ShardingError, match=r"rank 0 \(cpu\) does not answer .*sign of life"):
            decode(pool, vae, jobs.noise(LONG), **stop)
        assert is_gone(pid) and pool.pids == []


class AbsentRank(WorkerPool):
    """Its last worker is never told to decode: alive, but the others wait for it."""

    def _send_all(self, command, by_rank=None, **arguments):
        everyone = self._ranks
        if command == "decode":
            self._ranks = everyone[:-1]
        super()._send_all(command, by_rank, **arguments)
        self._ranks = everyone


def test_a_rank_that_never_joins_is_named_after_the_time_out_of_this_decode(vae, latent):
    with AbsentRank("cpu,cpu", timeout_s=PATIENCE_S, start_timeout_s=PATIENCE_S) as pool:
        pool.check_wire()
        pids = pool.pids
        pool.timeout_s = SHORT_S
        with pytest.raises(ShardingError, match=r"rank 1 \(cpu\) does not .*at most 3 s"):
            decode(pool, vae, latent)
        assert all(is_gone(pid) for pid in pids)


def test_a_process_that_nccl_ended_is_not_the_culprit():
    def rank(number, code):
        process = SimpleNamespace(poll=lambda: code)
        return WorkerProcess(number, torch.device("cuda", number), process, None)

    ranks = [rank(0, -signal.SIGABRT), rank(1, None), rank(2, -signal.SIGABRT)]
    died = {"kind": "died", "text": "exit code -6", "rank": 0}
    failures = [failure_of(r, {**died, "rank": r.rank}, "nccl") for r in (ranks[0], ranks[2])]
    error = error_of(failures, ranks, "failed while decoding")
    assert error.rank == 1 and "rank 1 (cuda:1) does not answer" in str(error)
    # A rank that was killed before the others were ended is.
    killed = Failure(ranks[1], "died", "exit code -9", 1)
    error = error_of([*failures, killed], ranks, "failed while decoding")
    assert error.rank == 1 and "died (exit code -9)" in str(error)
    # With Gloo, SIGABRT is a death like any other.
    gloo = failure_of(ranks[0], died, "gloo")
    assert error_of([gloo], ranks, "failed while decoding").rank == 0


def test_cancel_stops_within_a_chunk_and_keeps_the_workers(pool, vae, latent, expected):
    decode(pool, vae, latent)
    before, seen = pool.pids, []
    with pytest.raises(DecodeCancelled):
        decode(
            pool,
            vae,
            jobs.noise(LONG),
            on_progress=lambda done, *_: seen.append(done),
            should_stop=lambda: bool(seen),
        )
    assert vae.last_report.status == "cancelled"
    assert seen[-1] < 157
    assert torch.equal(decode(pool, vae, latent), expected)
    assert pool.pids == before


def test_cancel_while_a_rank_waits_for_halo_rows(pool, vae, latent, expected):
    decode(pool, vae, latent)
    pids = pool.pids
    held, asked = threading.Event(), threading.Event()

    def hold(done, total, report):
        if not held.is_set():  # rank 0 now waits for rows of a rank that does not run
            os.kill(pids[1], signal.SIGSTOP)
            held.set()

    def should_stop():
        if held.is_set():
            asked.set()
        return held.is_set()

    def resume():
        assert asked.wait(PATIENCE_S)
        os.kill(pids[1], signal.SIGCONT)

    helper = threading.Thread(target=resume)
    helper.start()
    with pytest.raises(DecodeCancelled):
        decode(pool, vae, jobs.noise(LONG), on_progress=hold, should_stop=should_stop)
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
        t.join()
    assert torch.equal(results[0], expected) and torch.equal(results[1], expected)


def test_idle_workers_end_by_themselves(vae, latent, expected):
    ends = []

    def look(done, total, report):
        if done == total:  # while they are busy: they may be gone soon after
            (pid,) = pool.pids
            ends.append(os.pidfd_open(pid))

    with WorkerPool(["cpu"], idle_s=0.1, start_timeout_s=PATIENCE_S) as pool:
        for _ in range(2):
            assert torch.equal(decode(pool, vae, latent, on_progress=look), expected)
            assert select.select(ends[-1:], [], [], PATIENCE_S)[0], "an idle worker is still there"
    assert len(ends) == 2
    for end in ends:
        os.close(end)


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


@pytest.mark.parametrize("can_map", [True, False])
@pytest.mark.parametrize("sink", [ImageSink, TensorSink])
def test_no_rank_writes_where_there_is_no_room(sink, can_map, tmp_path, monkeypatch):
    """Memory is reserved part by part; a full folder is an error there, not a killed process."""
    shape = (1, 5, 4, 6, 3) if sink is ImageSink else (1, 3, 5, 4, 6)
    buffer = SharedBuffer.create(4096 + 360 * 4, [tmp_path], reserved=4096)
    out = view(buffer.raw, 4096, shape, torch.float32)
    reserved = []

    def fallocate(descriptor: int, start: int, length: int) -> None:
        reserved.append((start - 4096, length))
        if len(reserved) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")

    def populate(part: torch.Tensor) -> bool:
        for start, length in pages.stretches(part):
            fallocate(0, start, length)
        return True

    monkeypatch.setattr("wan_vae.workers.shared._fallocate", fallocate)
    # Where the system can map pages, nothing is reserved beside that.
    monkeypatch.setattr(pages, "populate", populate if can_map else lambda part: False)
    pixels = torch.full((1, 3, 2, 2, 6), 0.5)
    sink(out, buffer.reserve).write(pixels, 1, 2)  # frames 1 and 2, rows 2 and 3
    if sink is ImageSink:  # rows of 18 numbers, frames of 72
        assert reserved == [(4 * (72 * t + 36), 4 * 36) for t in (1, 2)]
    else:  # planes of 24 numbers, channels of 120
        assert reserved == [(4 * (120 * c + 24 + 12), 4 * (24 + 12)) for c in range(3)]
    written = out.count_nonzero()
    reserved += [None] * 6
    with pytest.raises(ShardingError, match=rf"no room for 0 MiB .* in {tmp_path}: No space left"):
        sink(out, buffer.reserve).write(pixels, 3, 0)
    assert out.count_nonzero() == written == 72
    buffer.unlink()


@pytest.mark.parametrize("free", [None, 10**12, 1000])
def test_an_image_is_copied_out_of_shared_memory_where_there_is_room(
    pool, vae, latent, free, monkeypatch
):
    expected = decode(pool, vae, latent, form="image").clone()
    monkeypatch.setattr("wan_vae.workers.pool.host_free_bytes", lambda: free)
    for _ in range(3):  # fresh memory and that of a run before
        image = decode(pool, vae, latent, form="image")
        assert torch.equal(image, expected)
        shared = any(buffer.in_use for buffer in pool._spares._buffers)
        assert shared == (free == 1000)


def test_without_memory_for_a_copy_the_image_lies_in_shared_memory(pool, vae, latent, monkeypatch):
    expected = decode(pool, vae, latent, form="image").clone()
    video = latent.new_zeros(1, 3, 5, 48, 32)
    encoded = pool.encode(vae, video)

    def none(*_):
        raise DecodeMemoryError("planted")

    monkeypatch.setattr("wan_vae.workers.pool.FollowingCopy", none)
    assert torch.equal(decode(pool, vae, latent, form="image"), expected)
    # A latent must not keep a whole video: it is copied once there is memory again.
    assert torch.equal(pool.encode(vae, video), encoded)
    assert not any(buffer.in_use for buffer in pool._spares._buffers[-1:])


@pytest.mark.parametrize("is_given", [True, False])
def test_an_encodes_latent_comes_into_memory_that_was_made_ready(pool, vae, is_given, monkeypatch):
    """When all frames are handed over, whose threads would have been hindered."""
    video = jobs.noise((1, 3, 9, 48, 32)).tanh()
    if is_given:  # frame after frame
        video = video.contiguous(memory_format=torch.channels_last_3d)
    expected, seen = pool.encode(vae, video), []

    class Copy(workers.FollowingCopy):
        def prepare(self):
            assert self._mapped_frames == self.image.shape[1] == 16
            seen.append("prepare")
            super().prepare()

        def finish(self):
            seen.append(super().finish().data_ptr())
            return self.image

    class Steps(workers.Giving):
        def step(self):
            more = super().step()
            seen.append("more" if more else "all")
            return more

    def fails(*_):
        raise AssertionError("memory is taken at the end")

    monkeypatch.setattr(workers, "FollowingCopy", Copy)
    monkeypatch.setattr(workers, "Giving", Steps)
    monkeypatch.setattr(workers, "host_empty", fails)
    latent = pool.encode(vae, video)
    assert torch.equal(latent, expected)
    *before, prepared, finished = seen
    assert (prepared, finished) == ("prepare", latent.data_ptr())
    assert before == (["more"] * (len(before) - 1) + ["all"] if is_given else [])
    assert len(before) > 1 or not is_given


def test_the_latent_lies_in_the_same_place_in_both_directions(pool, vae, latent, monkeypatch):
    """Workers keep it page-locked, also where decodes and encodes take turns."""
    pool._spares.clear()
    sent, send = [], pool._send_all

    def note(command, *by_rank, **arguments):
        sent.append((command, arguments))
        send(command, *by_rank, **arguments)

    monkeypatch.setattr(pool, "_send_all", note)
    for _ in range(2):
        video = decode(pool, vae, latent).clone()
        assert pool.encode(vae, video).shape == latent.shape
    runs = [(command, given) for command, given in sent if command in ("decode", "encode")]
    assert len(runs) == 4
    for command, given in runs:
        names = ("input", "output") if command == "decode" else ("output", "input")
        (first, shape), (second, _) = (given[name] for name in names)
        assert shape == latent.shape and first == 4096
        assert second == 4096 + -(-latent.numel() * 4 // 4096) * 4096
    assert len({given["path"] for _, given in runs}) == 1


@pytest.mark.parametrize("form", ["pixels", "image"])
def test_the_memory_of_a_result_is_used_again_when_nobody_holds_it(pool, vae, latent, form):
    first = decode(pool, vae, latent, form=form)
    before, place = first.clone(), first.data_ptr()
    other = decode(pool, vae, latent * 0.5, form=form)
    assert other.data_ptr() != place
    assert torch.equal(first, before), "a result that is held was written over"
    part = other[0, 0]  # a view holds it as well
    del other
    kept = part.clone()
    again = decode(pool, vae, latent, form=form)
    assert torch.equal(part, kept)
    place = again.data_ptr()
    del again
    last = decode(pool, vae, latent, form=form)
    assert last.data_ptr() == place
    assert torch.equal(last, before)


def test_an_encode_between_decodes(pool, vae, latent, expected):
    """It gets memory of its own, and leaves the last decode's for the next."""
    first = decode(pool, vae, latent)
    place, video = first.data_ptr(), first.clone()
    del first
    found = pool.encode(vae, video, axis="height")
    assert (found - vae.encode(video)).abs().max() < 1e-4
    again = decode(pool, vae, latent)
    assert again.data_ptr() == place and torch.equal(again, expected)


def test_two_threads_never_get_the_same_memory(pool, vae, latent, expected, monkeypatch):
    """The first is held up between the end of its decode and its result."""
    made, second = threading.Event(), {}
    whole = workers.replace

    def slowly(*arguments, **changes):
        if not made.is_set():
            made.set()
            other.join(timeout=5)  # it can only end if it gets memory of its own
        return whole(*arguments, **changes)

    def work():
        made.wait()
        second["pixels"] = decode(pool, vae, latent * 0.5)

    other = threading.Thread(target=work)
    decode(pool, vae, latent)  # its memory is the first's
    monkeypatch.setattr(workers, "replace", slowly)
    other.start()
    first = decode(pool, vae, latent)
    other.join()
    assert torch.equal(first, expected)
    assert not torch.equal(second["pixels"], expected)


def test_a_result_that_a_forked_process_has_is_not_written_over(pool, vae, latent):
    result = decode(pool, vae, latent)
    before = result.clone()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:  # no thread of torch's is here: plain reads only
        os.read(told, 1)
        os._exit(0 if result.numpy().tobytes() == before.numpy().tobytes() else 1)
    del result
    decode(pool, vae, latent * 0.5)
    os.write(tell, b"x")
    assert os.waitpid(child, 0)[1] == 0


def test_weights_that_were_changed_in_place_reach_the_workers(pool, vae, latent):
    own = WanVAE(copy.deepcopy(vae.model))  # other tests decode with `vae`
    before = decode(pool, own, latent)
    with torch.no_grad():
        own.model.conv2.weight.mul_(0.5)
    after = decode(pool, own, latent)
    assert not torch.equal(after, before)
    assert torch.equal(after, own.decode(latent, chunk_frames=1))


def _given_in_place_of(own):
    own.model.conv2.weight.data = own.model.conv2.weight.data * 0.5


def _rounded(own):
    own.model.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize("change", [_given_in_place_of, _rounded])
def test_weights_that_lie_elsewhere_reach_the_workers_if_they_are_others(pool, vae, latent, change):
    own = WanVAE(copy.deepcopy(vae.model))
    before = decode(pool, own, latent)
    change(own)
    after = decode(pool, own, latent)
    assert not torch.equal(after, before)
    assert torch.equal(after, own.decode(latent, chunk_frames=1))


def test_weights_that_only_moved_are_not_sent_again(pool, vae, latent):
    own = WanVAE(copy.deepcopy(vae.model))
    before = decode(pool, own, latent)
    for weight in own.model.parameters():
        weight.data = weight.data.clone()  # as a move to a device and back leaves them
    assert torch.equal(decode(pool, own, latent), before)
    assert "workers: weights" not in own.last_report.host_ms


def test_a_stored_result_holds_nothing_else(pool, vae, latent, tmp_path):
    torch.save(decode(pool, vae, latent), tmp_path / "pixels.pt")
    size = (tmp_path / "pixels.pt").stat().st_size
    assert size < 4 * 3 * 9 * 48 * 128 + 10_000


def test_more_than_the_disk_holds_is_refused_with_the_numbers(tmp_path):
    with pytest.raises(ShardingError, match=rf"{tmp_path} has \d+ MiB"):
        SharedBuffer.create(1 << 60, [tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_memory_that_cannot_be_mapped_is_refused_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), limits[1]))
    try:
        with pytest.raises(ShardingError, match=r"no room for 256 MiB .*Cannot allocate memory"):
            SharedBuffer.create(256 << 20, [tmp_path], reserved=0)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_which_nobody_may_write_is_passed_over(tmp_path, monkeypatch):
    locked, usable = tmp_path / "locked", tmp_path / "usable"
    for folder in (locked, usable):
        folder.mkdir()

    def made_in(dir, **names):  # for root no folder is locked
        if dir == locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        return mkstemp(dir=dir, **names)

    mkstemp = tempfile.mkstemp
    monkeypatch.setattr(tempfile, "mkstemp", made_in)
    buffer = SharedBuffer.create(4096, [locked, usable])
    assert buffer.path.parent == usable
    with pytest.raises(ShardingError, match="locked: Permission denied"):
        SharedBuffer.create(4096, [locked])


def test_without_a_folder_to_meet_one_device_decodes(vae, latent, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(ShardingError, match="no folder can be made where the ranks meet"):
        decode_sharded(vae, latent, "cpu,cpu")
    pixels = decode_sharded(vae, latent, "cpu,cpu", fallback=True, chunk_frames=1)
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize(
    "call",
    [
        WorkerPool.close,
        WorkerPool.free_devices,
        WorkerPool.start_ahead,
        lambda pool: pool.decode(jobs.model("wan2.1"), jobs.noise(SHAPE)),
    ],
)
def test_a_callback_cannot_call_the_workers_that_wait_for_it(pool, vae, latent, expected, call):
    with pytest.raises(ShardingError, match="called from within a run of theirs"):
        decode(pool, vae, latent, on_progress=lambda *_: call(pool))
    assert torch.equal(decode(pool, vae, latent), expected)


def test_a_pool_that_is_let_go_of_leaves_no_folder(vae, latent, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pool = WorkerPool("cpu,cpu", start_timeout_s=PATIENCE_S)
    decode(pool, vae, latent)
    assert len(list(tmp_path.glob("wan_vae_ranks_*"))) == 1
    del pool
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_plans_are_kept_before_another_thread_may_send_other_weights(pool, vae, monkeypatch):
    from_dict, served = workers.Plan.from_dict, []

    def read(plain):
        served.append(pool._lock.is_taken)
        return from_dict(plain)

    monkeypatch.setattr(workers.Plan, "from_dict", read)
    pool.plan(vae, SHAPE)
    assert served == [True, True]


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


def test_devices_are_read_from_text(monkeypatch):
    assert parse_devices("cpu, cpu") == [torch.device("cpu")] * 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert parse_devices("all") == [torch.device("cpu")]
    # A machine with four GPUs.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert parse_devices("all") == [torch.device("cuda", i) for i in range(4)]
    found = parse_devices("0,1, 3")
    assert found == [torch.device("cuda", i) for i in (0, 1, 3)]
    assert parse_devices("cuda:2,cpu") == [torch.device("cuda", 2), torch.device("cpu")]
    with pytest.raises(ShardingError, match="rank 1 cannot start: device cuda:4"):
        parse_devices("0,4")
    assert pick_transport(found) == "nccl"
    assert pick_transport(parse_devices("0,0")) == "gloo", "two ranks of one card: NCCL refuses"
    assert pick_transport(parse_devices("0,cpu")) == "gloo"
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert pick_transport(found) == "gloo", "Windows"


def test_all_is_every_device_of_the_first_kind():
    cpu = torch.device("cpu")
    assert all_devices(0, 0, False) == [cpu]
    assert all_devices(0, 0, True) == [torch.device("mps")]
    assert all_devices(0, 2, False) == [torch.device("xpu", 0), torch.device("xpu", 1)]
    assert all_devices(1, 2, True) == [torch.device("cuda", 0)]


def test_all_is_every_device_of_the_kind_of_the_vae(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for own in (torch.device("privateuseone", 0), torch.device("mps"), torch.device("cpu")):
        assert parse_devices("all", own) == [own], "also a CPU beside GPUs: --cpu-vae"
        assert parse_devices("cpu,cpu", own) == [torch.device("cpu")] * 2, "named, so it is meant"
    first = torch.device("cuda", 0)
    assert parse_devices("all", first) == [first, torch.device("cuda", 1)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert parse_devices("all", torch.device("cuda")) == [torch.device("cuda")]


def test_small_pictures_are_for_one_device():
    assert not worth_sharing((1, 3, 1, 1536, 2048))
    assert worth_sharing((2, 3, 1, 1536, 2048)) and worth_sharing((1, 3, 17, 480, 832))
    assert worth_sharing((1, 3, 1, 2048, 2048)), "1.45 times as fast on two H200"


@pytest.mark.parametrize("gone", ["module", "nccl"])
def test_a_torch_without_distributed_or_nccl_has_a_transport(gone, monkeypatch):
    """AMD's wheels for Windows: `torch.distributed` is there, and nothing in it."""
    if gone == "module":
        monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
        monkeypatch.delattr(torch.distributed, "is_nccl_available")
    else:
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert pick_transport([torch.device("cuda", 0), torch.device("cuda", 1)]) == "gloo"


def test_workers_have_an_allocator_of_their_own():
    """ComfyUI's cudaMallocAsync is not for workers; what the user has set is."""
    both = "expandable_segments:True, backend:cudaMallocAsync"
    ours = {"PYTORCH_CUDA_ALLOC_CONF": both, "A": "b"}
    found = worker_environment(ours)
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True" and found["A"] == "b"
    alone = worker_environment({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"})
    assert "PYTORCH_ALLOC_CONF" not in alone and alone["NCCL_NVLS_ENABLE"] == "0"


def test_processes_that_were_started_ahead_are_those_of_the_first_run(vae, latent, expected):
    with WorkerPool("cpu,cpu", start_timeout_s=PATIENCE_S) as pool:
        pool.start_ahead()
        waiting = [rank.process.pid for rank in pool._ranks]
        assert len(waiting) == 2 and pool.pids == [], "they have joined nobody"
        pool.start_ahead()
        assert [rank.process.pid for rank in pool._ranks] == waiting
        assert torch.equal(decode(pool, vae, latent), expected)
        assert pool.pids == waiting
        phases = vae.last_report.host_ms
        start = ["workers: import", "workers: join", "workers: weights"]
        assert list(phases)[:7] == [*start, "workers", "hand over", "run", "collect"]
        assert list(phases)[7:10] == ["rank: wake", "rank: open", "rank: set up"]
        within = sum(phases[name] for name in start[1:])
        assert phases["workers: import"] > 0.0 and within <= phases["workers"]
        of_rank = sum(ms for name, ms in phases.items() if name.startswith("rank: "))
        assert 0.5 * phases["run"] < of_rank < 1.1 * phases["run"], phases
        decode(pool, vae, latent)
        assert not any(name.startswith("workers: ") for name in vae.last_report.host_ms)


def test_a_report_has_no_time_of_a_run_that_failed(vae, latent):
    def fail():
        raise ValueError("asked")

    with WorkerPool("cpu,cpu", start_timeout_s=PATIENCE_S) as pool:
        with pytest.raises(ValueError, match="asked"):
            pool.decode(vae, latent, should_stop=fail)
        assert pool._laps == {}


def test_processes_that_wait_end_with_their_pool_and_are_replaced_when_gone(vae, latent, expected):
    pool = WorkerPool("cpu,cpu", start_timeout_s=PATIENCE_S)
    pool.start_ahead()
    waiting = [rank.process.pid for rank in pool._ranks]
    os.kill(waiting[0], signal.SIGKILL)
    os.waitid(os.P_PID, waiting[0], os.WEXITED | os.WNOWAIT)
    assert torch.equal(decode(pool, vae, latent), expected)
    assert not set(waiting) & set(pool.pids) and is_gone(waiting[1])
    pool.close()
    pool.start_ahead()
    (first, second) = [rank.process for rank in pool._ranks]
    pool.close()
    assert first.returncode == second.returncode == 0, "told to stop, not killed"


def test_plans_of_an_earlier_call_will_do(pool, vae, latent):
    plans = pool.plan(vae, latent.shape)
    assert pool.plan(vae, latent.shape, earlier=True) is pool.plan(vae, latent.shape, earlier=True)
    assert pool.plan(vae, latent.shape, earlier=True) == plans
    other = pool.plan(vae, latent.shape, earlier=True, axis="height")
    assert other[0].shards.axis == "height" != plans[0].shards.axis
    wan22 = jobs.model("wan2.2")
    assert pool.plan(wan22, (1, 48, 2, 5, 16), earlier=True)[0].latent_shape[1] == 48
    again = pool.plan(vae, latent.shape, earlier=True)
    assert again == plans and again is not plans, "other weights were there in between"


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_a_device_of_which_there_is_one_is_current(kind):
    """`torch.mps` has no `set_device`, and `torch.cuda` may not be initialised there."""
    make_current(torch.device(kind))
    assert not hasattr(torch.mps, "set_device")


@pytest.mark.parametrize(
    "name",
    ["ümlaut #1", *(pytest.param(n, marks=pytest.mark.full) for n in ("with a space", "a%20b"))],
)
def test_ranks_meet_in_any_temporary_folder(name, vae, latent, expected, tmp_path, monkeypatch):
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with WorkerPool("cpu,cpu", start_timeout_s=PATIENCE_S, shared_folders=[tmp_path]) as pool:
        assert torch.equal(decode(pool, vae, latent), expected)
    assert list(folder.iterdir()) == []


def test_a_torch_without_distributed_says_so(monkeypatch):
    """AMD's wheels for Windows."""
    settings = WorkerSettings(1, 2, "cpu", "gloo", "nowhere", 1.0, 1.0, torch.get_num_threads())
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    error = join(settings).error
    assert isinstance(error, ShardingError) and error.rank == 1
    assert "without torch.distributed: name one device" in str(error)


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
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, torch\n"
        "from wan_vae.workers import WorkerPool\n"
        "from tests.dist import jobs\n"
        "pool = WorkerPool('cpu,cpu')\n"
        "pool.decode(jobs.model('wan2.1'), jobs.noise((1, 16, 1, 4, 16)))\n"
        "print(*pool.pids, flush=True)\n"
        "pool.decode(jobs.model('wan2.1'), jobs.noise((1, 16, 400, 8, 16)), chunk_frames=1)\n"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(tmp_path)},
    )
    pids = [int(p) for p in parent.stdout.readline().split()]
    assert len(pids) == 2
    ends = [os.pidfd_open(pid) for pid in pids]
    parent.kill()
    parent.wait()
    for end in ends:
        assert select.select([end], [], [], PATIENCE_S)[0], "a worker outlived its parent"
        os.close(end)
    assert list(tmp_path.glob("wan_vae_ranks_*")) == []


@pytest.mark.parametrize("text", ["gpu", "cuda:0,tpu", "0;1"])
def test_a_device_of_no_kind_is_refused_with_what_is_expected(text):
    with pytest.raises(ShardingError, match="is unknown: expected 'all', '0,1' or 'cpu,cpu'"):
        parse_devices(text.replace("cuda:0,", "cpu,"))


def test_the_pool_plans_and_each_rank_executes_its_plan(pool, vae, latent, expected):
    plans = pool.plan(vae, latent.shape, axis="height", chunk_frames=1)
    assert [plan.device for plan in plans] == ["cpu", "cpu"]
    assert plans[0].shards == plans[1].shards and plans[0].lengths == (1,) * latent.shape[2]
    assert torch.equal(pool.decode(vae, latent, axis="height", plans=plans), expected)
    assert [report.plan for report in pool.last_reports] == [plan.summary() for plan in plans]
    # What the plans decide cannot be asked for again, and a plan is for its own cut.
    with pytest.raises(GeometryError, match="give the options to plan"):
        pool.decode(vae, latent, plans=plans, chunk_frames=2)
    with pytest.raises(ShardingError, match="plans has 1 entries for 2 ranks"):
        pool.decode(vae, latent, plans=plans[:1])
    with pytest.raises(ShardingError, match="over 2 ranks by height: this is"):
        pool.decode(vae, latent, axis="width", plans=plans)
    assert vae.last_report is None
    # Strips are for one device: ranks would not see their neighbours' rows.
    alone = vae.plan(latent.shape, strips=2)
    with pytest.raises(ShardingError, match=r"not possible with a shard|this is a decode of"):
        pool.decode(vae, latent, axis="height", plans=[alone, alone])
    # What is wrong without asking the ranks costs no worker.
    assert torch.equal(decode(pool, vae, latent), expected)
    pids = pool.pids
    for wrong in ((1, 16, 0, 4, 4), (1, 16, 3, 4), (1, 4, 3, 4, 4)):
        with pytest.raises((GeometryError, LatentError)):
            pool.plan(vae, wrong)
    with pytest.raises(GeometryError, match="this is a decode of"):
        pool.decode(vae, latent[:, :, :1], plans=plans)
    with pytest.raises(GeometryError, match="expected a Plan"):
        pool.decode(vae, latent, plans=[plan.as_dict() for plan in plans])
    assert pool.pids == pids
