"""Weights on their way to a device, with a CUDA that only notes what it is asked: which threads
copy what, in which order, and what is waited for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest
import torch

from wan_vae.io import image, staging
from wan_vae.io.staging import CudaUpload, PieceThreads, _ToDevice
from wan_vae.network import weights
from wan_vae.network.weights import uploaded

CPU = torch.device("cpu")


@dataclass
class FakeCuda:
    """What `torch.cuda` is asked for, by thread."""

    said: list[tuple[int, str, object]] = field(default_factory=list)

    def note(self, what: str, of: object = None) -> None:
        self.said.append((threading.get_ident(), what, of))

    def of(self, what: str) -> list[tuple[int, object]]:
        return [(thread, of) for thread, said, of in self.said if said == what]

    def stream(self, device: object) -> FakeStream:
        return FakeStream(self)


@dataclass(eq=False)
class FakeStream:
    cuda: FakeCuda
    device: torch.device = CPU

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.note("wait", (self, other))


@dataclass(eq=False)
class FakeEvent:
    cuda: FakeCuda

    def record(self, stream: FakeStream) -> None:
        self.cuda.note("record", self)

    def synchronize(self) -> None:
        self.cuda.note("synchronize", self)


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda()
    current = fake.stream(CPU)

    def event(blocking: bool) -> FakeEvent:
        assert blocking  # threads that spin take cores from others
        made = FakeEvent(fake)
        fake.note("event", made)
        return made

    monkeypatch.setattr(torch.cuda, "Stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: fake.note("device"))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: fake.note("stream", stream))
    monkeypatch.setattr(image, "_locked", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(staging, "_UPLOADED", 1000)
    return fake


def groups_of(count: int) -> list[dict[str, torch.Tensor]]:
    """Tensors of some pieces and a rest, of one number, of none, and that lie in any order."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for i in range(count):
        large = torch.randn(3, 1234, generator=generator)
        group = {"large": large, "one": large[0, :1], "none": large[:0], "turned": large.t()}
        groups.append({f"{i} {name}": x for name, x in group.items()})
        groups[-1][f"{i} half"] = large.bfloat16()
    return groups


def test_groups_arrive_as_they_are_and_in_order(cuda):
    groups = groups_of(4)
    with CudaUpload(CPU) as upload:
        arrived = list(upload(groups))
    assert [list(group) for group in arrived] == [list(group) for group in groups]
    for group, sources in zip(arrived, groups, strict=True):
        for name, copy in group.items():
            assert copy.is_contiguous() and torch.equal(copy, sources[name])
            assert copy.dtype == sources[name].dtype
    with CudaUpload(CPU) as upload:
        assert list(upload([])) == []


def test_the_next_group_is_on_its_way_before_the_last_is_read(cuda):
    groups, started = groups_of(5), 0

    def drawn() -> Iterator[Mapping[str, torch.Tensor]]:
        nonlocal started
        for group in groups:
            started += 1
            yield group

    with CudaUpload(CPU) as upload:
        seen = [started for _ in upload(drawn())]
    # Never more than two: their memory on the device.
    assert seen == [2, 3, 4, 5, 5]


def test_a_group_waits_for_its_memory_and_its_reader_for_the_group(cuda):
    groups = groups_of(3)
    with CudaUpload(CPU) as upload:
        own, current = upload._stream, torch.cuda.current_stream(CPU)
        for _ in upload(groups):
            cuda.note("read")
    order = [
        {(own, current): "start", (current, own): "finish"}[of] if what == "wait" else what
        for _, what, of in cuda.said
        if what in ("wait", "read")
    ]
    first, later = ["start", "start", "finish", "read"], ["start", "finish", "read"]
    assert order == [*first, *later, "finish", "read"]


def test_a_thread_enters_the_stream_once_and_makes_two_events(cuda):
    threads = PieceThreads(2, _ToDevice(FakeStream(cuda)))
    source, target = torch.randn(20, 3, 5), torch.zeros(20, 3, 5)
    try:
        for i in range(10):
            threads.copy(source[2 * i : 2 * i + 2], target[2 * i : 2 * i + 2])
    finally:
        threads.close()
    assert torch.equal(source, target)
    ids = {thread for thread, *_ in cuda.said}
    assert len(cuda.of("record")) == 20 and 1 <= len(ids) <= 2
    for own in ids:
        said = [(what, of) for thread, what, of in cuda.said if thread == own]
        assert [what for what, _ in said[:4]] == ["device", "stream", "event", "event"]
        one, other = said[2][1], said[3][1]
        # Each in turn, and the memory of a piece is written when the one before it was read.
        expected = []
        for i in range((len(said) - 4) // 2):
            event = (one, other)[i % 2]
            expected += [("synchronize", event), ("record", event)]
        assert said[4:] == expected


def test_an_error_of_a_thread_is_raised_when_nothing_is_under_way(cuda, monkeypatch):
    groups, done = groups_of(4), []
    move = _ToDevice.__call__
    wrong = groups[1]["1 large"].reshape(-1)[1000:2000]

    def failing(self, source, target):
        if torch.equal(source, wrong):
            raise RuntimeError("planted")
        move(self, source, target)
        done.append(len(source))

    monkeypatch.setattr(_ToDevice, "__call__", failing)
    with CudaUpload(CPU) as upload:
        arriving = upload(groups)
        assert list(next(arriving)) == list(groups[0])
        with pytest.raises(RuntimeError, match="planted"):
            next(arriving)
        # All of the third group too, whose memory goes next; nothing of the fourth.
        moved = sum(x.numel() for group in groups[:3] for x in group.values())
        assert sum(done) == moved - len(wrong)
        own, current = upload._stream, torch.cuda.current_stream(CPU)
        assert cuda.said[-1][1:] == ("wait", (current, own))
        assert list(arriving) == []


def test_who_stops_to_read_waits_for_what_is_under_way(cuda):
    groups = groups_of(3)
    with CudaUpload(CPU) as upload:
        arriving = upload(groups)
        next(arriving)
        before = len(cuda.of("wait"))
        arriving.close()
        own, current = upload._stream, torch.cuda.current_stream(CPU)
        assert [of for _, of in cuda.of("wait")[before:]] == [(current, own)]
    pieces = sum(-(-x.numel() // 1000) for group in groups[:2] for x in group.values())
    assert len(cuda.of("record")) == pieces


def test_weights_are_cast_where_they_arrive(cuda, monkeypatch):
    monkeypatch.setattr(weights, "_GROUP_BYTES", 20_000)
    state = {name: x for group in groups_of(4) for name, x in group.items()}
    with CudaUpload(CPU) as upload:
        own = uploaded(state, CPU, torch.bfloat16, upload)
    assert list(own) == list(state)
    assert all(torch.equal(own[name], x.bfloat16()) for name, x in state.items())
