"""Pixels that threads bring while a run is busy: the right ones, in few buffers, and none after it.

A device is imagined: memory on the host, where a buffer that is filled too early or read too early
is an error at once.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import pytest
import torch

from tests.conftest import PATIENCE_S, SMALL_CONFIGS
from tests.unit.decodes import relative_error, vae_of
from tests.unit.test_encode import BOUND, plant_out_of_memory, small_passes, video
from wan_vae import geometry
from wan_vae.errors import DecodeCancelled, DecodeMemoryError, LatentError
from wan_vae.io.pixels import STAGING_BUFFERS, PixelSource, ReadWindow

CPU = torch.device("cpu")


@dataclass(eq=False)
class Memory:
    """A buffer, and what may happen to it next: filled, read, and filled again."""

    memory: torch.Tensor
    state: str = "free"


class Imagined:
    """A `Staging` that keeps count, for one source."""

    def __init__(self, before_fill=lambda number: None):
        self.before_fill = before_fill
        self.buffers: list[Memory] = []
        self.filled = []
        self.threads: set[int] = set()
        self.is_filling = threading.Lock()

    def allocate(self, count, dtype):
        buffer = Memory(torch.full((count,), float("nan")).to(dtype))
        self.buffers.append(buffer)
        return buffer

    def enter(self):
        self.threads.add(threading.get_ident())

    def fill(self, buffer, source):
        assert self.is_filling.acquire(blocking=False), "two threads fill"
        try:
            self.before_fill(len(self.filled))
            assert buffer.state == "free", "filled before the device has read it"
            target = buffer.memory[: source.numel()].view(source.shape)
            assert source.dtype == target.dtype
            target.copy_(source)
            buffer.state = "full"
            self.filled.append((threading.get_ident(), tuple(source.shape)))
        finally:
            self.is_filling.release()

    def begin_reading(self, buffer):
        assert buffer.state == "full", "read before it was filled"
        buffer.state = "reading"

    def end_reading(self, buffer):
        assert buffer.state == "reading"
        buffer.memory.view(torch.uint8).fill_(255)  # NaN for whoever reads it later
        buffer.state = "free"

    def close(self):
        assert self.is_filling.acquire(blocking=False), "a thread still fills"
        self.is_filling.release()
        self.filled.append("closed")


PARTS = [(0, 1), (1, 5), (5, 9), (9, 13), (13, 14)]


def image(frames=14, rows=6, columns=4, dtype=torch.float32):
    """As frames of an IMAGE lie: [1, 3, T, H, W] with channels last."""
    numbers = torch.arange(frames * rows * columns * 3, dtype=torch.float32)
    return (numbers / numbers.numel()).to(dtype).view(1, frames, rows, columns, 3).movedim(-1, 1)


def fetch_all(source, parts=PARTS, rows=slice(None)):
    return [source.fetch(first, last, rows) for first, last in parts]


def expected_of(pixels, parts=PARTS, rows=slice(None)):
    plain = PixelSource(pixels, CPU, torch.float32)
    return [plain.fetch(first, last, rows) for first, last in parts]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("rows", [slice(None), slice(2, 5)])
@pytest.mark.parametrize("lies", ["image", "contiguous", "columns"])
def test_what_threads_bring_is_what_was_asked_for(lies, rows, told):
    pixels = image()
    if lies == "contiguous":
        pixels = pixels.contiguous()
    if lies == "columns":
        pixels = image(columns=9)[..., 3:7]
    staging = Imagined()
    source = PixelSource(pixels, CPU, torch.float32, staging=staging)
    if told:
        source.expect([(first, last, rows) for first, last in PARTS])
    got = fetch_all(source, rows=rows)
    for x, y in zip(got, expected_of(pixels, rows=rows), strict=True):
        assert torch.equal(x, y)
    assert source.extremes() == (
        float(pixels[:, :, :, rows].min()),
        float(pixels[:, :, :, rows].max()),
    )
    source.release()
    assert {thread for thread, _ in staging.filled[:-1]} == staging.threads
    assert threading.get_ident() not in staging.threads


def test_pixels_come_while_the_caller_is_busy_and_no_more_than_there_are_buffers():
    """Each pass is copied before it is asked for; the third one waits until the first was read."""
    filled = [threading.Event() for _ in PARTS]
    staging = Imagined()
    real, numbers = staging.fill, iter(filled)

    def fill(buffer, source):
        try:
            real(buffer, source)
        finally:
            next(numbers).set()

    staging.fill = fill
    source = PixelSource(image(), CPU, torch.float32, staging=staging)
    source.expect([(*part, slice(None)) for part in PARTS])
    for number, part in enumerate(PARTS):
        source.fetch(*part)
        for ahead in filled[: number + 1 + STAGING_BUFFERS]:
            assert ahead.wait(PATIENCE_S), "nobody brings the next pass"
        assert not any(later.is_set() for later in filled[number + 1 + STAGING_BUFFERS :])
    # The first frame's buffer was too small for what came after.
    assert [b.memory.numel() for b in staging.buffers] == [72, 288, 288]
    source.release()


def test_a_buffer_that_is_too_small_is_freed_before_the_larger_one_is_made():
    staging = Imagined()
    real, alive = staging.allocate, []

    def allocate(count, dtype):
        assert sum(x() is not None for x in alive) < STAGING_BUFFERS
        buffer = real(count, dtype)
        staging.buffers.clear()
        alive.append(weakref.ref(buffer))
        return buffer

    staging.allocate = allocate
    source = PixelSource(image(), CPU, torch.float32, staging=staging)
    parts = [(0, 1), (1, 3), (3, 6), (6, 10), (10, 14)]
    source.expect([(*part, slice(None)) for part in parts])
    fetch_all(source, parts)
    source.release()
    assert len(alive) == 5 and not any(x() is not None for x in alive)


@pytest.mark.parametrize("staging", [None, Imagined()])
def test_a_part_that_is_not_expected_is_refused(staging):
    source = PixelSource(image(), CPU, torch.float32, staging=staging)
    source.expect([(0, 1, slice(None)), (1, 5, slice(None)), (5, 9, slice(None))])
    source.fetch(0, 1)
    with pytest.raises(RuntimeError, match=r"\(5, 9, .* are fetched where \(1, 5, "):
        source.fetch(5, 9)
    source.release()
    source.expect([(0, 1, slice(None))])
    source.fetch(0, 1)
    with pytest.raises(RuntimeError, match="where None were expected"):
        source.fetch(1, 5)
    source.release()
    assert torch.equal(source.fetch(1, 5), image()[:, :, 1:5]), "nothing is expected any more"
    source.release()


def test_an_error_of_a_thread_reaches_the_fetch_of_its_pass():
    def before_fill(number):
        if number == 2:
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")

    staging = Imagined(before_fill)
    source = PixelSource(image(), CPU, torch.float32, staging=staging)
    source.expect([(*part, slice(None)) for part in PARTS])
    fetch_all(source, PARTS[:2])
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        source.fetch(*PARTS[2])
    source.release()


def test_a_run_that_ends_early_leaves_no_thread_and_begins_again():
    """Its thread is in the middle of a copy; what comes behind it is not begun."""
    begun, go = threading.Event(), threading.Event()

    def before_fill(number):
        if number == 1:
            begun.set()
            assert go.wait(PATIENCE_S)

    staging = Imagined(before_fill)
    source = PixelSource(image(), CPU, torch.float32, staging=staging)
    source.expect([(*part, slice(None)) for part in PARTS])
    source.fetch(*PARTS[0])
    assert begun.wait(PATIENCE_S)
    helper = threading.Timer(0, go.set)
    helper.start()
    source.release()
    helper.join()
    assert len(staging.filled) in (3, 4) and staging.filled[-1] == "closed"
    assert not any(t.name.startswith("wan_vae_ahead") for t in threading.enumerate())
    staging.before_fill = lambda number: None
    source.expect([(*part, slice(None)) for part in PARTS])
    for x, y in zip(fetch_all(source), expected_of(image()), strict=True):
        assert torch.equal(x, y)
    source.release()


# -- files ---------------------------------------------------------------------------------------


class Film:
    """A `FrameReader` that is read in order by one thread at a time, and says by which."""

    white = 255

    def __init__(self, frames=14, fails_at=None):
        numbers = torch.arange(frames * 6 * 4 * 3) % 251
        self.frames = numbers.to(torch.uint8).view(1, frames, 6, 4, 3).movedim(-1, 1)
        self.shape, self.fails_at = tuple(self.frames.shape), fails_at
        self.reads, self.at, self.is_open = [], 0, True
        self.is_reading = threading.Lock()
        self.read_some = threading.Semaphore(0)

    def read(self, first, last):
        assert self.is_reading.acquire(blocking=False), "two threads read"
        try:
            assert self.is_open and first in (0, self.at), "not in order, or after the run"
            if self.fails_at is not None and last > self.fails_at:
                raise LatentError("film: ended: it changed")
            self.at = last
            self.reads.append((first, last, threading.get_ident()))
            return self.frames[:, :, first:last]
        finally:
            self.is_reading.release()
            self.read_some.release()


def window_of(film):
    _, _, t, h, w = film.shape
    return ReadWindow(film, geometry.Window(t, slice(0, h), slice(0, w)))


def test_a_file_is_read_one_pass_ahead_in_order():
    film, staging = Film(), Imagined()
    source = PixelSource(window_of(film), CPU, torch.float32, staging=staging)
    source.expect([(*part, slice(None)) for part in PARTS])
    plain = PixelSource(window_of(Film()), CPU, torch.float32)
    for number, part in enumerate(PARTS):
        x = source.fetch(*part)
        assert torch.equal(x, plain.fetch(*part))
        for _ in range(2 if number == 0 else 1 if number + 1 < len(PARTS) else 0):
            assert film.read_some.acquire(timeout=PATIENCE_S)
        assert [read[:2] for read in film.reads] == PARTS[: number + 2]
    assert len({thread for *_, thread in film.reads}) == 1
    assert threading.get_ident() not in {thread for *_, thread in film.reads}
    source.release()


def test_the_error_of_a_file_comes_with_the_frames_that_it_lacks():
    film, staging = Film(fails_at=9), Imagined()
    source = PixelSource(window_of(film), CPU, torch.float32, staging=staging)
    source.expect([(*part, slice(None)) for part in PARTS])
    fetch_all(source, PARTS[:3])
    with pytest.raises(LatentError, match="it changed"):
        source.fetch(*PARTS[3])
    source.release()


def test_nobody_reads_a_file_after_the_run_and_another_attempt_begins_anew():
    film, staging = Film(), Imagined()
    source = PixelSource(window_of(film), CPU, torch.float32, staging=staging)
    for _ in range(3):
        source.expect([(*part, slice(None)) for part in PARTS])
        fetch_all(source, PARTS[:3])
        source.release()
        count = len(film.reads)
        film.is_open = False
        assert not any(t.name.startswith("wan_vae_ahead") for t in threading.enumerate())
        assert len(film.reads) == count
        film.is_open = True


# -- encodes -------------------------------------------------------------------------------------


@pytest.fixture
def staged(monkeypatch):
    """All encodes from here on bring their pixels to an imagined device."""
    made = []

    class Source(PixelSource):
        def __init__(self, *arguments, **options):
            made.append(Imagined())
            super().__init__(*arguments, **options, staging=made[-1])

    monkeypatch.setattr("wan_vae.runs.encode.PixelSource", Source)
    return made


@pytest.mark.parametrize("family", SMALL_CONFIGS)
@pytest.mark.parametrize(
    "strips, chunks, frames",
    [(None, 1, None), (None, [1, 2], 4), (None, 3, 2), (2, 3, 2), (3, [2, 1], 4)],
)
def test_a_run_expects_what_it_fetches(family, strips, chunks, frames, staged, monkeypatch):
    """Of any chunks, passes and strips: a part that is not expected is an error."""
    vae = vae_of(family)
    pixels = video(vae, 9, 3, 1)
    if frames is not None:
        small_passes(monkeypatch, vae, pixels, frames)
    with monkeypatch.context() as patch:
        patch.setattr("wan_vae.runs.encode.PixelSource", PixelSource)
        expected = vae.encode(pixels, strips=strips, chunk_frames=chunks)
    assert torch.equal(vae.encode(pixels, strips=strips, chunk_frames=chunks), expected)
    (staging,) = staged
    assert staging.filled[-1] == "closed" and len(staging.filled) > 1


def test_a_run_that_starts_over_expects_its_new_passes(small_vae, staged, monkeypatch):
    pixels = video(small_vae, 25, 2, 2)
    expected = small_vae.encode(pixels, chunk_frames=2)
    plant_out_of_memory(monkeypatch, small_vae.encoder.conv1, "forward", lambda x: x.shape[2] > 8)
    assert torch.equal(small_vae.encode(pixels, chunk_frames=7), expected)
    assert small_vae.last_report.restarts == 2
    assert staged[-1].filled.count("closed") == 3


def test_memory_that_runs_out_ahead_of_a_pass_starts_over(small_vae, staged, monkeypatch):
    pixels = video(small_vae, 25, 2, 2)
    expected = small_vae.encode(pixels, chunk_frames=2)
    real = Imagined.allocate

    def allocate(staging, count, dtype):
        if count > 8 * pixels[:, :, 0].numel():
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        return real(staging, count, dtype)

    monkeypatch.setattr(Imagined, "allocate", allocate)
    got = small_vae.encode(pixels, chunk_frames=[1, 6])
    assert relative_error(got, expected) < BOUND
    assert "chunk of 1 latent frame: CUDA out of memory" in small_vae.last_report.fallbacks[0]


def test_a_run_without_any_room_for_pixels_is_one_error(small_vae, staged, monkeypatch):
    def allocate(staging, count, dtype):
        raise torch.OutOfMemoryError("CUDA out of memory (planted)")

    monkeypatch.setattr(Imagined, "allocate", allocate)
    with pytest.raises(DecodeMemoryError, match="planted"):
        small_vae.encode(video(small_vae, 9, 2, 2))
    assert not any(t.name.startswith("wan_vae_ahead") for t in threading.enumerate())


def test_a_run_that_is_cancelled_leaves_no_thread(small_vae, staged):
    asked = []

    def should_stop():
        asked.append(True)
        return len(asked) > 2

    with pytest.raises(DecodeCancelled):
        small_vae.encode(video(small_vae, 25, 2, 2), chunk_frames=1, should_stop=should_stop)
    assert staged[-1].filled[-1] == "closed"
    assert not any(t.name.startswith("wan_vae_ahead") for t in threading.enumerate())


def test_frames_that_others_write_are_awaited_before_they_are_read():
    pixels, awaited = image(), []
    written = torch.full_like(pixels, float("nan"))

    def await_frames(count):
        awaited.append(count)
        written[:, :, :count] = pixels[:, :, :count]

    for staging in (None, Imagined()):
        source = PixelSource(
            written, CPU, torch.float32, await_frames=await_frames, staging=staging
        )
        for x, y in zip(fetch_all(source), expected_of(pixels), strict=True):
            assert torch.equal(x, y)
        source.release()
        assert awaited == [1, 5, 9, 13, 14]
        awaited.clear()
        written.fill_(float("nan"))
