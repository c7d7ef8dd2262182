"""A worker page-locks the latent's place in memory that it may be given again, between runs."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.dist import jobs
from tests.unit.cudart import FakeCudart, Launches, is_mapped
from wan_vae import layout
from wan_vae.io.pages import LockedPages
from wan_vae.options import RunOptions
from wan_vae.workers import worker
from wan_vae.workers.joining import WorkerSettings
from wan_vae.workers.shared import SharedBuffer, aligned, view

LATENT_AT = 4096
SHAPE, LARGER = (1, 16, 3, 4, 5), (1, 16, 3, 5, 5)


@pytest.fixture(scope="module")
def vae():
    return jobs.model("wan2.1")


@pytest.fixture
def cudart():
    return FakeCudart()


@pytest.fixture
def one(vae, cudart):
    """A worker of a pool of one, in this process."""
    pipe = SimpleNamespace(send=lambda *_: None)
    settings = WorkerSettings(0, 1, "cpu", "gloo", "", 1.0, 1.0, torch.get_num_threads())
    alone = worker._Worker(settings, pipe, cudart)
    alone._vae = vae
    yield alone
    alone.close()
    assert cudart.registered == [], "locked memory was left behind"


@pytest.fixture
def buffer(tmp_path):
    made = SharedBuffer.create(1 << 21, [tmp_path])
    yield made
    made.unlink()


def pixel_shape(shape):
    return (shape[0], 3, 4 * shape[2] - 3, 8 * shape[3], 8 * shape[4])


def job(buffer, fresh, kept, tensor, input_at, output_at, output):
    view(buffer.raw, input_at, tensor.shape, torch.float32).copy_(tensor)
    return {
        "path": str(buffer.path),
        "size": buffer.size,
        "kept": kept,
        "input": (input_at, tuple(tensor.shape)),
        "order": layout.memory_order(tensor),
        "output": (output_at, output),
        "fresh": fresh,
        "sent_s": time.monotonic(),
        "axis": "auto",
        "wait_s": 1.0,
        "normalized": False,
        "options": asdict(RunOptions()),
    }


def decode(one, buffer, shape=SHAPE, *, fresh=False, kept=()):
    """Decode in `buffer`, as a pool has it done, and look at the pixels."""
    latent = jobs.noise(shape)
    output, output_at = pixel_shape(shape), LATENT_AT + aligned(latent.numel() * 4)
    one.on_decode(
        **job(buffer, fresh, list(kept), latent, LATENT_AT, output_at, output),
        form="pixels",
        gather="shared",
    )
    found = view(buffer.raw, output_at, output, torch.float32)
    assert torch.equal(found, one.vae.decode(latent))


def encode(one, buffer, shape=SHAPE, *, fresh=False):
    pixels = jobs.noise(pixel_shape(shape)).tanh()
    pixels_at = LATENT_AT + aligned(torch.Size(shape).numel() * 4)
    one.on_encode(**job(buffer, fresh, [], pixels, pixels_at, LATENT_AT, shape), unit_range=False)
    assert torch.equal(view(buffer.raw, LATENT_AT, shape, torch.float32), one.vae.encode(pixels))


def lies_in(address, buffer):
    """Whether `address` is where a worker has mapped `buffer`'s first latent."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    starts = [int(line.split("-")[0], 16) for line in maps if str(buffer.path) in line]
    return address - LATENT_AT in starts


def test_the_latents_place_is_locked_after_a_run_once(one, buffer, cudart):
    decode(one, buffer, fresh=True)
    assert cudart.registered == [], "within the run"
    one.forget()
    ((address, size),) = cudart.registered
    assert lies_in(address, buffer) and size == aligned(4 * 16 * 3 * 4 * 5)
    for _ in range(2):
        decode(one, buffer)
        one.forget()
    encode(one, buffer)  # whose latent lies in the same place
    one.forget()
    assert cudart.registered == [(address, size)] and cudart.calls == 1


@pytest.mark.parametrize("operation", [decode, encode])
def test_a_run_of_another_size_begins_with_nothing_locked(one, buffer, cudart, operation):
    """Its tensors would lie across the bounds of what is locked, where CUDA's copies fail."""
    decode(one, buffer, fresh=True)
    one.forget()
    before, seen = list(cudart.registered), []
    send, one.pipe.send = one.pipe.send, lambda *_: seen.append(list(cudart.registered))
    operation(one, buffer, LARGER)
    one.pipe.send = send
    assert seen[0] == [] and cudart.before == before
    one.forget()
    sizes = [size for _, size in cudart.registered]
    assert sizes == ([aligned(4 * 16 * 3 * 5 * 5)] if operation is decode else [])


def test_memory_is_unlocked_before_it_is_let_go_of(one, buffer, cudart, tmp_path):
    decode(one, buffer, fresh=True)
    one.forget()
    (place,) = cudart.registered
    other = SharedBuffer.create(buffer.size, [tmp_path])
    decode(one, other, fresh=True, kept=[str(buffer.path)])
    one.forget()
    assert len(cudart.registered) == 2
    decode(one, other)  # the first is not kept any more
    assert place in cudart.registered and is_mapped(*place)
    one.forget()
    # That it was there until then, the runtime looks at.
    assert cudart.before == [place] and not lies_in(place[0], buffer)
    one.close()
    assert cudart.registered == [] and len(cudart.before) == 2
    other.unlink()


def test_an_encode_locks_nothing_nor_does_a_decode_that_was_cancelled(one, buffer, cudart):
    encode(one, buffer, fresh=True)
    one.forget()
    buffer.raw[0] = 1
    latent = jobs.noise(SHAPE)
    output_at = LATENT_AT + aligned(latent.numel() * 4)
    one.on_decode(
        **job(buffer, False, [], latent, LATENT_AT, output_at, pixel_shape(SHAPE)),
        form="pixels",
        gather="shared",
    )
    assert one.vae.last_report.status == "cancelled"
    one.forget()
    assert cudart.calls == 0


def test_large_latents_are_not_locked(one, buffer, cudart, monkeypatch):
    monkeypatch.setattr(worker, "_MOST_LOCKED_BYTES", 4095)
    decode(one, buffer, fresh=True)
    one.forget()
    assert cudart.calls == 0
    monkeypatch.setattr(worker, "_MOST_LOCKED_BYTES", 4096)
    decode(one, buffer)
    one.forget()
    assert cudart.calls == 1


def test_where_locking_is_refused_runs_go_on_and_nobody_asks_again(one, buffer, cudart):
    cudart.refuses = True
    with Launches(cudart):
        decode(one, buffer, fresh=True)
        one.forget()
        for _ in range(2):
            decode(one, buffer)
            one.forget()
    assert cudart.calls == 1 and cudart.registered == []


def test_a_buffer_locks_one_place_at_a_time(buffer, cudart):
    device = torch.device("cpu")
    for place in ((4096, 8192), (4096, 8192), (4096, 4096)):
        buffer.lock(*place, device, cudart)
        assert [size for _, size in cudart.registered] == [place[1]]
    assert cudart.calls == 2
    buffer.unlock(unless=(4096, 4096))
    assert len(cudart.registered) == 1
    buffer.unlock()
    buffer.unlock()
    assert cudart.registered == []
    buffer.lock(4096, 4096, device)  # of another device than CUDA's
    assert isinstance(buffer._locked[0], LockedPages) and not buffer._locked[0].is_locked
