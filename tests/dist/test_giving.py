"""A video that workers encode while their parent still copies it: they wait for what they read."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import PATIENCE_S
from tests.dist import jobs
from wan_vae import layout
from wan_vae.config import wan21
from wan_vae.errors import DecodeCancelled, LatentError, ShardingError
from wan_vae.io.image import HostWriter, bits, frames_view
from wan_vae.io.latents import check_latent, statistics_hint
from wan_vae.options import RunOptions
from wan_vae.workers import WorkerPool, worker
from wan_vae.workers.giving import Given, Giving, copy_on_host, frames_first
from wan_vae.workers.joining import WorkerSettings
from wan_vae.workers.shared import SharedBuffer, aligned, view

SHORT_S = 3.0


def image(frames: int, seed: int, rows: int = 48, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(frames, rows, columns, 3, generator=generator)


# -- the parent's side ---------------------------------------------------------------------------


class Late:
    """What threads copy with: the first piece of all comes only when `go` is set."""

    def __init__(self):
        self.go, self.is_first = threading.Event(), True
        self.lock = threading.Lock()

    def __call__(self, piece):
        with self.lock:
            first, self.is_first = self.is_first, False
        if first:
            assert self.go.wait(PATIENCE_S)
        return piece


@pytest.mark.parametrize("block_bytes", [1, 4 * 6 * 3 * 4 * 2, 10**9])
@pytest.mark.parametrize("videos", [1, 2])
def test_what_is_told_is_there(videos, block_bytes):
    """Also if a thread is late with the first frame, and the others are not."""
    source = torch.rand(videos, 9, 4, 6, 3)
    target, told, late = torch.full_like(source, float("nan")), [], Late()

    def tell(frames):
        assert torch.equal(target[:, :frames], source[:, :frames]), "it is not there"
        told.append(frames)

    writer = HostWriter(3, lambda: late)
    with Giving(source, target, tell, block_bytes=block_bytes, writer=writer) as giving:
        try:
            giving.step()
            if block_bytes < 10**9:
                giving.step()
            assert told == [], "the first frame is late"
        finally:
            late.go.set()
        while giving.step():
            pass
    assert told == sorted(set(told)) and told[-1] == 9
    assert told[0] == (1 if block_bytes < 10**9 else 9)


def test_an_error_of_a_copy_is_raised_and_told_to_nobody():
    source, told = torch.rand(1, 9, 4, 6, 3), []

    def fails(piece):
        raise OSError("planted")

    with (
        Giving(
            source, source.clone(), told.append, block_bytes=1, writer=HostWriter(2, lambda: fails)
        ) as giving,
        pytest.raises(OSError, match="planted"),
    ):
        while giving.step():
            pass
    assert told == []


def test_frames_come_one_after_another_where_they_lie_so():
    def order(x):
        return frames_first(layout.memory_order(x))

    video = torch.rand(1, 3, 5, 4, 6)
    assert not order(video)
    assert order(video.contiguous(memory_format=torch.channels_last_3d))
    assert order(frames_view(image(5, 0)))
    batch = torch.cat((frames_view(image(5, 0)), frames_view(image(5, 1))))
    assert not order(batch.contiguous()) and order(
        batch.contiguous(memory_format=torch.channels_last_3d)
    )


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 16, 3, 6, 16), (2, 1, 1, 1, 1), (3, 4, 500, 40, 30)])
def test_a_copy_on_the_host_has_the_numbers(source, shape):
    x = torch.rand(shape).to(source)
    target = torch.full(shape, float("nan"))
    copy_on_host(x, target)
    assert torch.equal(target, x.float())
    copy_on_host(x.movedim(2, 0), target.movedim(2, 0))
    assert np.array_equal(bits(target), bits(x.float()))


# -- a worker's side -----------------------------------------------------------------------------


def test_a_worker_waits_for_the_frames_that_it_reads():
    given, seen = Given(), []
    given.wait_for(0, 0.0)

    def read():
        for frames in (1, 5, 9):
            given.wait_for(frames, PATIENCE_S)
            seen.append(frames)

    reader = threading.Thread(target=read)
    reader.start()
    for frames in (1, 3, 9):
        assert seen == [n for n in (1, 5, 9) if n < frames][: len(seen)]
        given.give(frames)
    given.give(4)  # nothing is taken back
    reader.join(PATIENCE_S)
    assert seen == [1, 5, 9]
    with pytest.raises(ShardingError, match="gave it 9 of 10 frames and no other for 0 s"):
        given.wait_for(10, 0.0)


class Wire:
    """The worker's end of a pipe, with messages that are there already."""

    def __init__(self, *messages):
        self.messages, self.sent = list(messages), []

    def receive(self):
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)

    def send(self, kind, value):
        self.sent.append(kind)


def test_frames_count_for_the_run_whose_command_came_before_them():
    """The run before may have been left with more of them."""
    commands = queue.SimpleQueue()
    pipe = Wire(
        ("encode", {"given": 0}),
        ("given", 1),
        ("ping", None),
        ("given", 9),
        ("decode", {}),
        ("encode", {"given": 0}),
        ("given", 3),
    )
    with pytest.raises(EOFError):
        worker._receive_all(pipe, commands)
    first, between, second = (commands.get()[1] for _ in range(3))
    assert pipe.sent == ["pong"] and between == {}
    first["given"].wait_for(9, 0.0)
    second["given"].wait_for(3, 0.0)
    with pytest.raises(ShardingError, match="gave it 3 of 4 frames"):
        second["given"].wait_for(4, 0.0)


class WrittenWhenAwaited(Given):
    """Frames lie in memory only when somebody waits for them."""

    def __init__(self, video, place):
        super().__init__()
        self.video, self.place, self.awaited = video, place, []

    def wait_for(self, frames, seconds):
        self.awaited.append(frames)
        self.place[:frames] = self.video[:frames]


def alone(vae):
    """A worker of a pool of one, in this process."""
    one = worker._Worker(
        WorkerSettings(0, 1, "cpu", "gloo", "", 1.0, 1.0, torch.get_num_threads()), Wire()
    )
    one._vae = vae
    return one


def test_a_worker_reads_no_frame_before_it_has_waited_for_it(vae, tmp_path):
    video = image(13, 1)
    expected = vae.encode(frames_view(video), unit_range=True, chunk_frames=1)
    input_at, output_at = 4096, 4096 + aligned(video.numel() * 4)
    buffer = SharedBuffer.create(output_at + aligned(expected.numel() * 4), [tmp_path])
    place = view(buffer.raw, input_at, video.shape, torch.float32)
    place.fill_(float("nan"))
    given = WrittenWhenAwaited(video, place)
    one = alone(vae)
    # In the order in which it lies: T, H, W, C; its dimensions are those of [B, C, T, H, W].
    one.on_encode(
        unit_range=True,
        given=given,
        path=str(buffer.path),
        size=buffer.size,
        kept=[],
        input=(input_at, (13, 48, 1, 64, 3)),
        order=layout.memory_order(frames_view(video)),
        output=(output_at, tuple(expected.shape)),
        fresh=True,
        sent_s=time.monotonic(),
        axis="auto",
        wait_s=1.0,
        normalized=False,
        options=asdict(RunOptions(chunk_frames=1)),
    )
    assert torch.equal(view(buffer.raw, output_at, expected.shape, torch.float32), expected)
    assert given.awaited == [1, 5, 9, 13]
    buffer.unlink()


class CopiedWhenAwaited(Given):
    """A latent lies in memory only when somebody has waited for all of it."""

    def __init__(self, latent, place):
        super().__init__()
        self.latent, self.place, self.awaited = latent, place, []

    def wait_for(self, parts, seconds):
        self.awaited.append(parts)
        self.place.copy_(self.latent)


def test_a_worker_decodes_no_latent_before_it_has_waited_for_all_of_it(vae, tmp_path):
    latent = torch.randn(1, 16, 3, 4, 5, generator=torch.Generator().manual_seed(4))
    expected = vae.decode(latent)
    input_at, output_at = 4096, 4096 + aligned(latent.numel() * 4)
    buffer = SharedBuffer.create(output_at + aligned(expected.numel() * 4), [tmp_path])
    place = view(buffer.raw, input_at, latent.shape, torch.float32)
    place.fill_(float("nan"))
    given = CopiedWhenAwaited(latent, place)
    one = alone(vae)
    one.on_decode(
        given=given,
        path=str(buffer.path),
        size=buffer.size,
        kept=[],
        input=(input_at, tuple(latent.shape)),
        order=layout.memory_order(latent),
        output=(output_at, tuple(expected.shape)),
        fresh=True,
        sent_s=time.monotonic(),
        axis="auto",
        wait_s=1.0,
        normalized=False,
        options=asdict(RunOptions()),
        form="pixels",
        gather="shared",
    )
    assert torch.equal(view(buffer.raw, output_at, expected.shape, torch.float32), expected)
    assert given.awaited == [16]
    buffer.unlink()


# -- both ----------------------------------------------------------------------------------------


class Held(Giving):
    """Copies a frame at a time, and only so many as it was let; or fails at the fifth."""

    limit, fails = 0, False

    def step(self):
        if self.fails and self._queued == 4:
            raise OSError("planted")
        return super().step() if self._queued < self.limit else True


class Holding(WorkerPool):
    """Hands its videos over by a `Held`."""

    held: Held | None = None
    first_limit, fails = 0, False

    def _giving(self, job, dense, target, order):
        plain = super()._giving(job, dense, target, order)
        if plain is None:
            return None
        self.held = Held(plain._source, plain._target, plain._tell, block_bytes=1)
        self.held.limit, self.held.fails = self.first_limit, self.fails
        return self.held


@pytest.fixture(scope="module")
def vae():
    return jobs.model("wan2.1")


@pytest.fixture(scope="module")
def holding_pool():
    with Holding("cpu,cpu", timeout_s=PATIENCE_S, start_timeout_s=PATIENCE_S) as pool:
        yield pool


@pytest.fixture
def pool(holding_pool):
    holding_pool.first_limit, holding_pool.fails = 10**9, False
    holding_pool.timeout_s = PATIENCE_S
    return holding_pool


def encode(pool, vae, video, **options):
    return pool.encode(vae, video, axis="height", unit_range=True, chunk_frames=1, **options)


def test_workers_encode_what_is_there_while_the_rest_is_withheld(pool, vae):
    """Each chunk is done before the frames of the one after the next are there."""
    video, other = frames_view(image(13, 1)), frames_view(image(13, 2))
    expected = encode(pool, vae, video)
    assert not torch.equal(encode(pool, vae, other), expected)
    seen = []

    def on_progress(done, total, report):
        assert pool.held._queued < 13 or done > 5, "nothing was withheld"
        seen.append(done)
        pool.held.limit = done + 4 + 2  # the next chunk; what is told is two blocks behind

    pool.first_limit = 1 + 2
    assert torch.equal(encode(pool, vae, video, on_progress=on_progress), expected)
    assert seen == [1, 5, 9, 13]


def test_a_cancel_while_frames_are_withheld_keeps_the_workers(pool, vae):
    """They hear of it when they have the frames for which they wait; the rest is never given."""
    video, other = frames_view(image(41, 1)), frames_view(image(41, 2))
    expected = encode(pool, vae, video)
    pids, seen = pool.pids, []

    def should_stop():
        if seen:
            pool.held.limit = 10**9
        return bool(seen)

    pool.first_limit = 1 + 2
    with pytest.raises(DecodeCancelled):
        encode(
            pool,
            vae,
            other,
            on_progress=lambda done, *_: seen.append(done),
            should_stop=should_stop,
        )
    pool.first_limit = 10**9
    assert torch.equal(encode(pool, vae, video), expected)
    assert pool.pids == pids


def test_a_parent_that_gives_nothing_is_an_error_after_the_time_out(pool, vae):
    video = frames_view(image(13, 1))
    expected = encode(pool, vae, video)
    pool.timeout_s, pool.first_limit = SHORT_S, 1 + 2
    with pytest.raises(ShardingError, match=r"gave it \d of 5 frames and no other for 3 s"):
        encode(pool, vae, video)
    assert pool.pids == []
    pool.timeout_s, pool.first_limit = PATIENCE_S, 10**9
    assert torch.equal(encode(pool, vae, video), expected)


CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.mark.parametrize("videos", [1, 2])
def test_workers_get_ready_while_the_latent_is_withheld(pool, vae, videos):
    """All of it is awaited; no number of the run before, whose memory is used again, is taken."""
    generator = torch.Generator().manual_seed(videos)
    latents = [torch.randn(videos, 16, 3, 5, 4, generator=generator) for _ in range(2)]
    # One of them lies with its channels last: handed over in the order of its memory.
    latents[1] = latents[1].contiguous(memory_format=torch.channels_last_3d)
    for latent in (*latents, *latents):
        # Convolutions of other sizes add in another order on a CPU.
        torch.testing.assert_close(pool.decode(vae, latent), vae.decode(latent), **CLOSE)
        assert pool.held._queued == pool.held._frames


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_latents_of_other_dtypes_are_cast_before_the_run(pool, vae, dtype):
    latent = torch.randn(1, 16, 2, 4, 5, generator=torch.Generator().manual_seed(9)).to(dtype)
    torch.testing.assert_close(pool.decode(vae, latent), vae.decode(latent), **CLOSE)


def test_an_error_of_the_copy_ends_the_run(pool, vae):
    video = frames_view(image(13, 1))
    expected = encode(pool, vae, video)
    pool.fails = True
    with pytest.raises(OSError, match="planted"):
        encode(pool, vae, video)
    assert pool.pids == []
    pool.fails = False
    assert torch.equal(encode(pool, vae, video), expected)


@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("axis", ["height", "width"])
def test_the_latent_of_an_image_is_that_of_one_process(pool, vae, videos, axis):
    clips = [frames_view(image(6, seed, 53, 70)) for seed in range(videos)]
    video = torch.cat(clips).contiguous(memory_format=torch.channels_last_3d)
    expected = vae.encode(video, unit_range=True)
    got = pool.encode(vae, video, axis=axis, unit_range=True)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


class Computed(TorchDispatchMode):
    """Keeps the names of operations that compute or copy more than 32768 numbers on the CPU: for
    those PyTorch wakes a thread for each core. Views are none."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1]
        results = result if isinstance(result, tuple) else (result,)
        tensors = [x for x in (*args, *results) if isinstance(x, torch.Tensor)]
        places = {x.untyped_storage().data_ptr() for x in tensors}
        is_view = not name.endswith("_") and len(places) < 2
        is_large = any(x.numel() > 32768 and x.device.type == "cpu" for x in tensors)
        if is_large and not is_view and name != "empty":
            self.found.append(name)
        return result


def test_operations_that_wake_threads_are_seen():
    x = torch.rand(40000)
    with Computed() as computed:
        x.view(200, 200).t()[3:].numpy()
        assert computed.found == []
        x.clone(), x.copy_(x), x.add(1), x.sum(), x.aminmax()
    assert computed.found == ["clone", "copy_", "add", "sum", "aminmax"]


def test_the_parent_of_a_run_wakes_no_threads_of_pytorch(pool, vae):
    """It leaves its cores to the workers, whose launches they would delay."""
    latent, video = jobs.noise((1, 16, 3, 32, 32)), frames_view(image(9, 1, 256, 256))
    planar = video.contiguous()
    with Computed() as computed:
        pool.decode(vae, latent, form="image")
        encode(pool, vae, video)
        encode(pool, vae, planar)
    assert computed.found == []


def test_the_statistics_of_a_latent_wake_no_threads_of_pytorch():
    """A node looks at each latent before its decode."""
    latent = jobs.noise((1, 16, 21, 90, 160))
    with Computed() as computed:
        check_latent(latent, wan21())
        statistics_hint(latent, wan21())
    assert computed.found == []
    latent[0, 3, 7, 5, 1] = float("nan")
    with pytest.raises(LatentError, match=r"1 of 21 frames \(7\)"):
        check_latent(latent, wan21())
    # The sum of these is no number, and they are numbers.
    large = torch.full((1, 16, 1, 8, 8), 3e38)
    check_latent(large, wan21())
    check_latent(-large.double() * 1e200, wan21())
