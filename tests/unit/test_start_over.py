"""Runs that are out of memory, on a device of a given size: what is given back, and what is tried.

The device is this CPU, whose tensors are counted, with a limit (`TensorCounter`).
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace

import pytest
import torch

from tests.unit.counted import TensorCounter
from tests.unit.decodes import relative_error, vae_of
from wan_vae import DecodeMemoryError
from wan_vae.geometry import pixel_shape
from wan_vae.runs import engine, run
from wan_vae.runs.holders import who_holds

MIB = 2**20
SIZE = (1, 16, 2, 40, 1)
# What a small device has beside one decode at its fastest.
SLACK = 1


class Device(TensorCounter):
    """A device of so many bytes, and the `DeviceMemory` of a program that manages it.

    models: what the program can move away. others: bytes of other processes.
    """

    def __init__(self, size: float):
        super().__init__(computes=True)
        self.size, self.others, self.models = size, 0, {}
        self.asked: list[int] = []

    @property
    def limit(self):
        return self.size - self.others

    @limit.setter
    def limit(self, value):
        """Set by the base class, which has one that does not change."""

    def free_bytes(self) -> int:
        return int(max(0, self.limit - self.live))

    def give_back(self, wanted_bytes: int) -> None:
        self.asked.append(wanted_bytes)
        gc.collect()
        while self.models and self.free_bytes() < wanted_bytes:
            self.models.popitem()

    def held(self):
        return {name: tensor.nbytes for name, tensor in self.models.items()}


def of(nbytes: float) -> torch.Tensor:
    return torch.empty(int(nbytes), dtype=torch.uint8)


def fail_in_a_cycle(nbytes: float) -> None:
    """Run out of memory as a node does whose frame keeps its own error: garbage, till collected."""

    def node():
        tensor = of(nbytes)
        try:
            raise torch.OutOfMemoryError(f"out of memory beside {tensor.nbytes}")
        except torch.OutOfMemoryError as error:
            kept = error
        return kept.args

    node()


def fail_and_be_kept(nbytes: float) -> BaseException:
    """The error of a node that ran out of memory; with its traceback, its tensors are kept."""

    def node():
        tensor = of(nbytes)
        raise torch.OutOfMemoryError(f"out of memory beside {tensor.nbytes}")

    try:
        node()
    except torch.OutOfMemoryError as error:
        return error
    raise AssertionError


def decode(vae, z, **options):
    return vae.decode(z, **options)


def stream(vae, z, **options):
    return torch.cat(list(vae.decode_stream(z, **options)), 2)


def encode(vae, x, **options):
    return vae.encode(x, **options)


def ways(*quick):
    """All operations; `make test` takes those that are named."""
    return pytest.mark.parametrize(
        "way",
        [
            pytest.param(one, id=one.__name__, marks=() if one in quick else pytest.mark.full)
            for one in (decode, stream, encode)
        ],
        indirect=True,
    )


@pytest.fixture
def way(request, monkeypatch):
    """An operation, its input, its expected result, and the bytes that it takes at its fastest."""
    monkeypatch.setattr(engine, "has_own_memory", lambda device: True)
    vae, operate = vae_of("wan2.1"), request.param
    shape = pixel_shape(SIZE, vae.config) if operate is encode else SIZE
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    expected = operate(vae, x)
    plan = vae.plan(SIZE, operation="encode" if operate is encode else "decode")
    return vae, operate, x, expected, plan.needed_bytes + expected.nbytes + x.nbytes + SLACK * MIB


def right(got, expected):
    assert relative_error(got, expected) < 1e-5


@ways(stream, encode)
def test_garbage_is_collected_before_a_run_takes_less_at_a_time(way):
    vae, operate, x, expected, size = way
    gc.disable()  # as long as nobody collects it, it is there
    try:
        with Device(size) as device:
            fail_in_a_cycle(0.8 * size)
            right(operate(vae, x, memory=device), expected)
    finally:
        gc.enable()
    report = vae.last_report
    assert (report.strips, report.restarts, report.fallbacks) == (1, 0, ())
    assert len(device.asked) == 1


@ways(decode, encode)
def test_other_models_are_moved_away_before_a_run_takes_less_at_a_time(way):
    vae, operate, x, expected, size = way
    with Device(size) as device:
        device.models = {"a sampler's model": of(0.5 * size), "a text encoder": of(0.2 * size)}
        right(operate(vae, x, memory=device), expected)
        report = vae.last_report
        assert (report.strips, report.restarts, device.models) == (1, 0, {})
        # Now that it has what it wants, nobody is asked.
        device.asked.clear()
        device.models = {"a small one": of(1)}
        operate(vae, x, memory=device)
    assert device.asked == [] and device.models


@ways(stream, encode)
def test_what_a_kept_traceback_holds_is_not_there_and_the_rest_is_enough(way):
    """Nobody can free it: the run is planned in what is left."""
    vae, operate, x, expected, size = way
    with Device(size) as device:
        error = fail_and_be_kept(0.6 * size)
        right(operate(vae, x, memory=device), expected)
        assert error.__traceback__ is not None
    report = vae.last_report
    assert report.strips > 1 and report.restarts == 0 and len(device.asked) == 1
    assert report.memory.planned_bytes < 0.4 * size


@ways(decode, stream)
def test_memory_that_another_process_takes_between_plan_and_run_gives_a_new_plan(way, monkeypatch):
    vae, operate, x, expected, size = way
    device = Device(size)
    real = run.Run._attempt

    def attempt(self):
        if self.builder.restarts == 0:
            device.others = 0.65 * size
        return real(self)

    monkeypatch.setattr(run.Run, "_attempt", attempt)
    with device:
        right(operate(vae, x, memory=device), expected)
    report = vae.last_report
    assert report.strips > 1 and report.restarts >= 1 and len(device.asked) >= 1
    assert "planned again for" in report.fallbacks[0] and "planted" in report.fallbacks[0]


@ways(decode, encode)
def test_memory_that_comes_back_is_used_before_less_is_taken_at_a_time(way, monkeypatch):
    """Another process has it for a moment: the same plan is tried once more, and holds."""
    vae, operate, x, expected, size = way
    device = Device(size)
    real = run.Run._attempt

    def attempt(self):
        device.others = 0.7 * size if self.builder.restarts == 0 else 0
        return real(self)

    def give_back(wanted):
        device.asked.append(wanted)
        device.others = 0

    monkeypatch.setattr(run.Run, "_attempt", attempt)
    device.give_back = give_back
    with device:
        right(operate(vae, x, memory=device), expected)
    report = vae.last_report
    assert (report.strips, report.restarts, len(device.asked)) == (1, 1, 1)
    assert "tried once more" in report.fallbacks[0]


def test_the_same_plan_is_tried_once_more_and_not_again(monkeypatch):
    """Memory that is said to be free, but is not: a plan that knows too little."""
    vae = vae_of("wan2.1")
    z = torch.randn(SIZE)
    expected = vae.decode(z)
    plan = vae.plan(SIZE)
    device = Device(0.3 * plan.planned_bytes + z.nbytes + expected.nbytes)
    device.free_bytes = lambda: 10 * plan.needed_bytes
    with device:
        right(vae.decode(z, memory=device), expected)
    report = vae.last_report
    again = [text for text in report.fallbacks if "tried once more" in text]
    assert len(again) == 1 and report.fallbacks[0] == again[0]
    assert report.restarts == len(device.asked) == len(report.fallbacks) > 1
    assert report.memory.planned_bytes < plan.planned_bytes


@ways(decode, encode)
def test_the_final_failure_says_what_is_free_who_has_the_rest_and_what_to_do(way):
    vae, operate, x, expected, _ = way
    # Input and result fit, and next to nothing else.
    device = Device(0.1 * MIB + x.nbytes + expected.nbytes)
    device.held = lambda: {"ComfyUI's Flux": 11 * 2**30}
    with device, pytest.raises(DecodeMemoryError) as failure:
        operate(vae, x, memory=device)
    text = str(failure.value)
    assert "\n" not in text and "GiB are free, at least " in text
    assert (
        "the rest is held by ComfyUI's Flux 11.00" in text and "or" in text.split("free device")[1]
    )
    assert device.asked
    report = vae.last_report
    assert report is None or report.status == "failed"


@ways(stream, encode)
def test_a_kept_error_of_a_failed_run_keeps_none_of_its_tensors(way):
    """So that our own failures do not do what we suffer from."""
    vae, operate, x, expected, _ = way
    device = Device(0.1 * MIB + x.nbytes + expected.nbytes)
    gc.disable()
    try:
        with device:
            with pytest.raises(DecodeMemoryError) as kept:
                operate(vae, x, memory=device)
            assert kept.value.__traceback__ is not None and sys.exc_info() == (None, None, None)
            # The latent, and a few numbers.
            assert device.live <= min(x.nbytes, expected.nbytes) + 2048
    finally:
        gc.enable()


class Refusing:
    """A sink that has no memory for some of what it gets."""

    def __init__(self, shape, refused, needs_whole_frames):
        self.pixels, self.left = torch.full(shape, float("nan")), iter(refused)
        self.needs_whole_frames = needs_whole_frames

    def write(self, pixels, start, row):
        if next(self.left, False):
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        self.pixels[:, :, start : start + pixels.shape[2], row : row + pixels.shape[3]] = pixels

    def close(self):
        pass

    abort = close


def test_an_output_without_memory_is_tried_again_where_it_may_be():
    vae = vae_of("wan2.1")
    z = torch.randn(1, 16, 5, 4, 4)
    expected = vae.decode(z)
    sink = Refusing(expected.shape, [False, True, False, False, True], False)
    vae.decode(z, chunk_frames=2, sink=sink)
    assert relative_error(sink.pixels, expected) < 1e-5 and vae.last_report.restarts == 2
    # Whole frames in order: a file may hold a part of them already.
    sink = Refusing(expected.shape, [False, True], True)
    with pytest.raises(DecodeMemoryError, match="while its output was written"):
        vae.decode(z, chunk_frames=1, sink=sink)


def test_the_words_name_what_the_driver_says(monkeypatch):
    from wan_vae.device import Holders
    from wan_vae.runs import holders

    total = Holders(80 * 2**30, 2**30, 30 * 2**30, 4 * 2**30)
    monkeypatch.setattr(holders, "holders", lambda device: total)

    class Memory:
        free_bytes, give_back = (lambda self: 5 * 2**30), None

        def held(self):
            return {"ComfyUI's WAN21": 26 * 2**30, "ComfyUI's T5": 0}

    text = who_holds(torch.device("cuda", 0), Memory(), 6 * 2**30)
    assert text == (
        "5.00 GiB are free, at least 6.00 are needed; the rest of 80.00 GiB is held by "
        "ComfyUI's WAN21 26.00, other tensors of this process 4.00, PyTorch's cache 4.00, "
        "other processes and CUDA itself 45.00; "
    )


def test_a_plan_that_was_made_before_is_kept_where_memory_comes_back():
    """As a node makes it: for all that it asked for, which garbage still occupies."""
    vae = vae_of("wan2.1")
    z = torch.randn(SIZE)
    plan = vae.plan(SIZE, free_bytes=float("inf"))
    gc.disable()
    try:
        with Device(plan.needed_bytes + 2 * z.nbytes + MIB) as device:
            fail_in_a_cycle(0.8 * plan.needed_bytes)
            out = torch.empty(plan.pixel_shape)
            vae.decode(z, plan=plan, memory=device, out=out)
    finally:
        gc.enable()
    report = vae.last_report
    assert report.restarts == 0 and report.fallbacks == () and report.plan["notes"] == []
    assert replace(plan, free_bytes=None).summary() == {**report.plan, "free_bytes": None}
    assert device.asked == [plan.needed_bytes]
