"""Times of passes: the sums are those of all marks, and each mark is read once, while the device is
busy and the host is not."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from tests.unit.behind import behind
from tests.unit.decodes import vae_of
from wan_vae import DecodeCancelled
from wan_vae.chunking import schedule
from wan_vae.clock import Mark, Spans
from wan_vae.io.image import HostWriter, ImageSink
from wan_vae.io.pixels import PixelSource
from wan_vae.report import ChunkRecord
from wan_vae.runs.clock import RunClock

CPU = torch.device("cpu")


def test_pairs_are_read_in_order_and_once():
    with behind() as device:
        spans = Spans()
        for what in "aabac":
            spans.add(what, device.now(CPU), device.now(CPU))
        spans.read_past()
        assert (device.read, spans.ms) == ([], {})
        device.passed = 5  # within the third
        for _ in range(3):
            spans.read_past()
        assert device.read == [1, 3] and spans.ms == {"a": 2.0}
        spans.read_all(but=1)
        assert device.read == [1, 3, 5, 7] and device.passed == 8
        spans.read_all(but=1)
        assert device.waits == 2
        spans.read_all()
        assert device.read == [1, 3, 5, 7, 9] and spans.ms == {"a": 3.0, "b": 1.0, "c": 1.0}


def test_records_are_the_sums_of_all_passes_to_the_bit(monkeypatch):
    numbers = random.Random(1)
    times = sorted(numbers.uniform(0.0, 1e3) for _ in range(400))
    marks = iter(Mark(None, s) for s in times)
    monkeypatch.setattr(Mark, "now", lambda device: next(marks))
    clock, chunks = RunClock(CPU), schedule(6, 2)
    expected: dict = {}
    for number in range(200):
        chunk = chunks[numbers.randrange(min(len(chunks), 1 + number))]
        with clock.measure(chunk, 8):
            pass
        ms = (times[2 * number + 1] - times[2 * number]) * 1e3
        expected[chunk] = ms + expected[chunk] if chunk in expected else ms
        if number % 7 == 0:
            clock.records(wait=False)
    assert clock.records(wait=True) == [
        ChunkRecord(c.start, c.stop, c.is_first, 8, ms) for c, ms in expected.items()
    ]
    clock.restart()
    assert clock.records(wait=True) == []


class Closes:
    """A sink that is told when it closes, and may have threads that copy."""

    needs_whole_frames = False

    def __init__(self, on_close, is_copying):
        self._on_close, self.is_copying = on_close, is_copying

    def write(self, pixels, start_frame, first_row):
        pass

    def close(self):
        self._on_close()

    def abort(self):
        pass


def latent(frames=5):
    return torch.randn(1, 16, frames, 3, 4, generator=torch.Generator().manual_seed(1))


def test_only_the_last_pass_is_unread_when_the_host_waits_for_copies():
    vae = vae_of("wan2.1")
    with behind() as device:

        def close():
            assert device.spans > 3 and len(device.read) == device.spans - 1
            device.catch_up()

        vae.decode(latent(), chunk_frames=1, sink=Closes(close, is_copying=True))
        assert len(device.read) == device.spans
    chunks = vae.last_report.chunks
    assert [(c.start, c.stop) for c in chunks] == [(n, n + 1) for n in range(5)]
    assert sum(c.duration_ms for c in chunks) == device.spans


def test_other_sinks_close_before_anybody_waits():
    """What they do then may be what the device waits for, or count the time that it takes."""
    vae = vae_of("wan2.1")
    with behind() as device:

        def close():
            assert (device.waits, device.read) == (0, [])
            device.catch_up()

        vae.decode(latent(), chunk_frames=1, sink=Closes(close, is_copying=False))
        assert len(device.read) == device.spans


@pytest.mark.parametrize("how", ["cancel", "error"])
def test_a_run_that_ends_early_waits_for_nothing(how):
    vae, asked = vae_of("wan2.1"), []
    with behind() as device:
        sink = Closes(lambda: None, is_copying=True)

        def should_stop():
            asked.append(None)
            device.passed = 3  # the first pass
            return how == "cancel" and len(asked) > 3

        def write(*_):
            if how == "error" and len(asked) > 2:
                raise OSError("planted")

        sink.write = write
        with pytest.raises(DecodeCancelled if how == "cancel" else OSError):
            vae.decode(latent(), chunk_frames=1, sink=sink, should_stop=should_stop)
        assert device.spans >= 3 and (device.waits, device.read) == (0, [1])
    assert [c.stop for c in vae.last_report.chunks] == [1]


def test_progress_reads_what_is_new():
    vae, reports = vae_of("wan2.1"), []
    with behind() as device:

        def on_progress(done, total, report):
            reports.append(report)
            device.passed = device.marks - 2  # one pass behind

        vae.decode(
            latent(9), chunk_frames=1, on_progress=on_progress, sink=Closes(device.catch_up, False)
        )
        assert device.read == list(range(1, device.marks, 2))
        assert device.looks <= device.spans + len(reports) + 1
    assert [len(r.chunks) for r in reports] == [0, *range(9 - 1)]


def test_an_encode_reads_while_the_device_is_busy(monkeypatch):
    vae, extremes = vae_of("wan2.1"), PixelSource.extremes
    with behind() as device:

        def waits(source):
            assert device.spans > 3 and len(device.read) == device.spans - 1
            device.catch_up()
            return extremes(source)

        monkeypatch.setattr(PixelSource, "extremes", waits)
        vae.encode(torch.rand(1, 3, 17, 16, 24), chunk_frames=1)
        assert len(device.read) == device.spans
    assert sum(c.duration_ms for c in vae.last_report.chunks) == device.spans


def test_an_image_is_copied_by_threads_until_one_of_them_fails():
    image = torch.zeros(1, 1, 4, 2, 3)

    def fails(_):
        raise OSError("planted")

    writer = HostWriter(1, lambda: fails)
    assert not writer.has_failed
    writer.put(SimpleNamespace(synchronize=lambda: None), image, image, image[:, :0])
    writer.stop()
    assert writer.has_failed
    sink = ImageSink(image)
    assert not sink.is_copying  # from the CPU, the caller copies
    sink._copier = SimpleNamespace(has_failed=False)
    assert sink.is_copying
    sink._copier.has_failed = True
    assert not sink.is_copying
