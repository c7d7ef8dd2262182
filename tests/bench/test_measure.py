"""The gate: a wrong picture gets no number, and who cannot run gets a row that says why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.suite.baseline import Built
from benchmarks.suite.cases import CASES
from benchmarks.suite.decoders import Diffusers, FastVAE, Ours
from benchmarks.suite.measure import (
    FLOAT_GATE,
    NoNumber,
    Result,
    Setting,
    measure_case,
    measure_route,
    reference_pixels,
    relative_error,
    times_ms,
)
from benchmarks.suite.weights import Weights
from tests.bench.conftest import CPU, Altered

CASE = CASES["wan2.1-narrow"]
ONCE = Setting(CPU, torch.float32, 1)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights.random(CASE.config)


@pytest.fixture(scope="module")
def reference(weights) -> torch.Tensor:
    return reference_pixels(CASE, weights, CPU)


def rows_of(decoder, weights, repeats=1):
    return list(measure_case(CASE, [decoder], weights, Setting(CPU, torch.float32, repeats)))


def test_both_routes_are_gated_and_timed(weights):
    device, image = rows_of(Ours("eager"), weights, repeats=2)
    assert (device.route, image.route) == ("device", "image")
    for row in (device, image):
        assert isinstance(row, Result) and row.error < 1e-6 and row.repeats == 2
        assert 0 < row.min_ms <= row.median_ms <= row.max_ms
        assert row.peak_bytes is None  # the CPU does not count


@pytest.mark.parametrize(
    "alter",
    [
        lambda x: x.flip(3),
        lambda x: x.roll(1, 2),
        lambda x: x * float("nan"),
        lambda x: x[:, :, :-1],
        lambda x: x + 0.01,
    ],
    ids=["upside down", "a frame late", "NaN", "a frame short", "brighter"],
)
def test_a_wrong_picture_is_refused(weights, reference, alter):
    built = Altered("wrong", alter).build(weights, CPU, torch.float32)
    row = measure_route(CASE, "wrong", "device", built, reference, ONCE)
    assert isinstance(row, NoNumber) and row.kind == "refused" and "gate" in row.reason
    right = measure_route(CASE, "wrong", "image", built, reference, ONCE)
    assert isinstance(right, Result)  # altered on the device only: each route has its own gate


def test_a_wrong_host_image_is_refused(weights, reference):
    ours = Ours("eager").build(weights, CPU, torch.float32)
    pixel_range = Built(ours.decode, lambda z: ours.image(z) * 2 - 1)  # [-1, 1] is no IMAGE
    row = measure_route(CASE, "wrong", "image", pixel_range, reference, ONCE)
    assert isinstance(row, NoNumber) and row.kind == "refused"


def test_a_failure_is_a_row_and_the_decoder_is_closed(weights):
    def fail(pixels):
        raise RuntimeError("first line\nsecond line")

    decoder = Altered("fails", fail)
    device, _ = rows_of(decoder, weights)
    assert device.kind == "failed"
    assert device.reason == "RuntimeError: first line second line"
    assert decoder.closed


@pytest.mark.skipif(torch.cuda.is_available(), reason="the Triton kernels run on this machine")
def test_triton_without_a_gpu_says_why(weights, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = rows_of(Ours("triton"), weights)
    assert [(r.kind, r.route) for r in rows] == [("unavailable", r) for r in ("device", "image")]
    assert rows[0].reason == "no GPU"


@pytest.mark.parametrize("name", ["wan2.1-narrow", "wan2.2-narrow"])
@pytest.mark.parametrize("other", [Diffusers(), FastVAE()], ids=lambda p: p.name)
def test_other_decoders_get_the_same_weights(name, other):
    """Another implementation, fed through its own keys, passes the float32 gate."""
    if reason := other.unavailable_reason(CPU, torch.float32):
        pytest.skip(reason)
    case = CASES[name]
    weights = Weights.random(case.config)
    rows = list(measure_case(case, [other], weights, ONCE))
    assert all(isinstance(row, Result) and row.error < 1e-4 for row in rows), rows


def test_a_reference_that_diffusers_contradicts_stops_the_run(monkeypatch):
    pytest.importorskip("diffusers", reason="diffusers (test extra) is absent")
    weights = Weights.random(CASE.config)
    key = "decoder.head.2.bias"
    other = replace(weights, native=weights.native | {key: weights.native[key] + 0.1})
    from benchmarks.suite import measure

    genuine = measure.diffusers_model
    monkeypatch.setattr(measure, "diffusers_model", lambda _, *rest: genuine(other, *rest))
    with pytest.raises(SystemExit, match="no numbers"):
        reference_pixels(CASE, weights, CPU)


def test_error_is_relative_and_of_clamped_pixels():
    reference = torch.full((1, 3, 2, 4, 4), 0.5)
    assert relative_error(reference * 1.1, reference) == pytest.approx(0.1, rel=1e-5)
    ones = torch.ones_like(reference)
    assert relative_error(ones * 3, ones) == 0
    assert relative_error(reference[:, :, :1], reference) == float("inf")
    assert not relative_error(reference * float("nan"), reference) < FLOAT_GATE


def test_every_call_is_timed():
    calls = []
    assert len(times_ms(lambda: calls.append(1), CPU, 3)) == len(calls) == 3
