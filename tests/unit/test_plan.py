"""One plan, a value: what it says, that runs execute it, and what happens when it does not fit."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch

from tests.conftest import SMALL_CONFIGS, random_state
from wan_vae import (
    BackendError,
    CheckpointError,
    DecodeMemoryError,
    GeometryError,
    LatentError,
    Plan,
    TensorSink,
    WanVAE,
)


def latent_of(vae: WanVAE, frames: int = 3, height: int = 5, width: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(1, vae.config.z_dim, frames, height, width, generator=generator)


def test_a_plan_says_what_the_report_says_later(small_vae):
    z = latent_of(small_vae)
    plan = small_vae.plan(tuple(z.shape), chunk_frames=2)
    small_vae.decode(z, plan=plan)
    report = small_vae.last_report
    assert report.plan == plan.summary()
    assert report.plan["lengths"] == [2, 1] == [c.stop - c.start for c in report.chunks]
    assert report.layers == plan.choices.layers and report.backends_used == plan.choices.used
    assert report.memory.planned_bytes == plan.planned_bytes
    assert report.memory.weights_bytes == plan.weights_bytes
    assert (report.layout.chosen, report.layout.reason) == (plan.layout.chosen, plan.layout.reason)
    assert report.pixel_shape == plan.pixel_shape and report.latent_shape == plan.latent_shape
    assert report.fallbacks == ()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_frames": 1},
        {"chunk_frames": [1, 2], "precision": "bf16"},
        {"strips": 2, "memory_format": "channels_last_3d"},
        {"strips": 1, "chunk_frames": 3},
    ],
    ids=str,
)
def test_a_decode_by_plan_gives_the_bits_of_a_decode_by_options(small_vae, options):
    z = latent_of(small_vae)
    expected = small_vae.decode(z, **options)
    by_options = small_vae.last_report
    assert torch.equal(small_vae.decode(z, plan=small_vae.plan(z.shape, **options)), expected)
    by_plan = small_vae.last_report
    assert (by_plan.plan, by_plan.strips) == (by_options.plan, by_options.strips)
    assert by_plan.dtype == by_options.dtype and by_plan.layout == by_options.layout


def test_an_encode_by_plan_gives_the_bits_of_an_encode_by_options(small_vae):
    factor = small_vae.config.spatial_factor
    pixels = torch.randn(1, 3, 9, 3 * factor, 2 * factor).clamp(-1, 1)
    expected = small_vae.encode(pixels, chunk_frames=2, precision="bf16")
    shape = (1, small_vae.config.z_dim, 3, 3, 2)
    plan = small_vae.plan(shape, operation="encode", chunk_frames=2, precision="bf16")
    assert plan.lengths == (2, 1) and plan.planned_bytes > 0
    assert torch.equal(small_vae.encode(pixels, plan=plan), expected)
    assert small_vae.last_report.plan == plan.summary()


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_frames": [2, 1], "free_bytes": 10**9},
        {"chunk_frames": np.int64(2), "strips": np.int64(2), "free_bytes": np.float32(1e9)},
        {"free_bytes": 10**400},
        {"strips": 3, "whole_frames": True, "backend": "eager"},
        {"ranks": 2, "axis": "width"},
        {"operation": "encode", "precision": "fp16", "free_bytes": math.inf},
    ],
    ids=str,
)
def test_a_plan_travels_as_plain_values(small_vae, options):
    plan = small_vae.plan((1, small_vae.config.z_dim, 3, 5, 4), **options)
    text = json.dumps(plan.as_dict(), allow_nan=False)
    assert Plan.from_dict(json.loads(text)) == plan
    assert hash(plan) == hash(Plan.from_dict(json.loads(text)))
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_memory_that_has_gone_since_is_planned_again_and_said(small_vae):
    z = latent_of(small_vae, 3, 40, 1)
    expected = small_vae.decode(z)
    plan = small_vae.plan(z.shape, free_bytes=math.inf)
    assert plan.free_bytes is None and plan.strips is None
    # As much as fits is executed as it is.
    small_vae.decode(z, plan=plan, free_bytes=2 * plan.planned_bytes)
    report = small_vae.last_report
    assert report.plan["notes"] == [] and report.plan["lengths"] == list(plan.lengths)
    assert report.memory.free_bytes == 2 * plan.planned_bytes
    # Less is not.
    got = small_vae.decode(z, plan=plan, free_bytes=plan.planned_bytes // 3)
    report = small_vae.last_report
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert report.memory.planned_bytes < plan.planned_bytes
    assert "planned again" in report.plan["notes"][0] and "are free now" in report.plan["notes"][0]


class Counted:
    """A `DeviceMemory` that counts how often it is asked."""

    def __init__(self, free: int):
        self.free, self.asked = free, 0

    def free_bytes(self) -> int:
        self.asked += 1
        return self.free

    def give_back(self, wanted_bytes: int) -> None:
        """Nothing can be given back."""

    def held(self) -> dict[str, int]:
        return {}


def test_a_plan_that_fits_is_not_made_again(small_vae, monkeypatch):
    z = latent_of(small_vae, 3, 40, 1)
    plan = small_vae.plan(z.shape, free_bytes=math.inf)
    made, real = [], type(small_vae.engine).plan

    def counted(engine, setup, **more):
        made.append(real(engine, setup, **more))
        return made[-1]

    monkeypatch.setattr(type(small_vae.engine), "plan", counted)
    enough, short = Counted(plan.needed_bytes), Counted(plan.needed_bytes - 2)
    small_vae.decode(z, plan=plan, memory=enough)
    report = small_vae.last_report
    assert (enough.asked, made) == (1, [])
    assert report.memory.free_bytes == plan.needed_bytes and report.plan["notes"] == []
    # What is missing is two bytes, which a plan for what is free now does without.
    small_vae.decode(z, plan=plan, memory=short)
    assert short.asked > 1 and made
    assert small_vae.last_report.memory.planned_bytes == made[-1].planned_bytes
    assert made[-1].planned_bytes < plan.planned_bytes


def test_a_plan_with_strips_is_made_again_for_a_sink_that_needs_whole_frames(small_vae):
    z = latent_of(small_vae)
    plan = small_vae.plan(z.shape, strips=2, chunk_frames=1)
    out = torch.empty(plan.pixel_shape)
    sink = TensorSink(out)
    sink.needs_whole_frames = True
    small_vae.decode(z, plan=plan, sink=sink)
    report = small_vae.last_report
    assert report.plan["whole_frames"] and report.strips == 2
    assert report.plan["notes"] == ["planned again: the output needs whole frames"]
    expected = small_vae.decode(z, strips=2, chunk_frames=1)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_plan_for_another_model_is_made_again():
    own, other = (
        WanVAE.from_state_dict(random_state(SMALL_CONFIGS["wan2.1"]), device="cpu", dtype=dtype)
        for dtype in ("fp32", "bf16")
    )
    z = latent_of(own)
    other.decode(z, plan=own.plan(z.shape))
    assert other.last_report.dtype == "bfloat16"
    assert "dtype" in other.last_report.plan["notes"][0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda vae, z: vae.plan((1, vae.config.z_dim, 2, 5, 4)),
            "the plan is for a decode of a latent .1, .., 2, 5, 4.: this is",
        ),
        (lambda vae, z: vae.plan(z.shape, operation="encode"), "the plan is for an encode of"),
        (lambda vae, z: vae.plan(z.shape, ranks=2), "over 2 ranks by"),
    ],
    ids=["another size", "another operation", "a rank"],
)
def test_the_plan_of_another_run_is_refused(small_vae, make, text):
    z = latent_of(small_vae)
    with pytest.raises(GeometryError, match=text):
        small_vae.decode(z, plan=make(small_vae, z))


def test_options_beside_a_plan_are_refused(small_vae):
    z = latent_of(small_vae)
    plan = small_vae.plan(z.shape)
    for options in ({"chunk_frames": 1}, {"strips": 2}, {"precision": "bf16"}):
        with pytest.raises(GeometryError, match="give the options to plan"):
            small_vae.decode(z, plan=plan, **options)
    with pytest.raises(GeometryError, match="give the options to plan"):
        small_vae.encode(torch.zeros(1, 3, 1, 64, 64), plan=plan, backend="eager")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"latent_shape": (1, 16, 3, 5)}, GeometryError),
        ({"latent_shape": (1, 16, 3, 5, 0)}, GeometryError),
        ({"latent_shape": (1, 16, 3, 5, 2.5)}, GeometryError),
        ({"latent_shape": (1, 5, 3, 5, 4)}, LatentError),
        ({"chunk_frames": 0}, GeometryError),
        ({"chunk_frames": [1, 1]}, GeometryError),
        ({"strips": 9}, GeometryError),
        ({"strips": 2, "ranks": 2}, GeometryError),
        ({"latent_shape": (1, 16, -1, 5, 4)}, GeometryError),
        ({"latent_shape": (True, 16, 3, 5, 4)}, GeometryError),
        ({"latent_shape": (1, 16, "3", 5, 4)}, GeometryError),
        ({"latent_shape": 5}, GeometryError),
        ({"operation": "encode", "strips": 6}, GeometryError),
        ({"axis": "time"}, GeometryError),
        ({"ranks": 1.5}, GeometryError),
        ({"free_bytes": -1}, GeometryError),
        ({"free_bytes": True}, GeometryError),
        ({"ranks": 0}, GeometryError),
        ({"operation": "decrypt"}, GeometryError),
        ({"free_bytes": -math.inf}, GeometryError),
        ({"precision": "int8"}, BackendError),
        ({"backend": "metal"}, BackendError),
    ],
    ids=str,
)
def test_an_impossible_plan_is_refused_in_words(arguments, error):
    vae = WanVAE.from_state_dict(random_state(SMALL_CONFIGS["wan2.1"]), device="cpu")
    with pytest.raises(error):
        vae.plan(**{"latent_shape": (1, 16, 3, 5, 4), **arguments})


def test_an_encode_of_a_decoder_alone_has_no_plan():
    state = random_state(SMALL_CONFIGS["wan2.1"])
    decoder = {k: v for k, v in state.items() if k.startswith(("decoder.", "conv2."))}
    vae = WanVAE.from_state_dict(decoder, device="cpu")
    with pytest.raises(CheckpointError, match="no encoder"):
        vae.plan((1, 16, 1, 4, 4), operation="encode")


def test_halved_takes_half_at_a_time_until_one_frame():
    vae = WanVAE.from_state_dict(random_state(SMALL_CONFIGS["wan2.1"]), device="cpu")
    plan = vae.plan((1, 16, 7, 5, 4), chunk_frames=[5, 2])
    halves = plan.halved()
    assert halves.lengths == (3, 2, 2) and halves.pass_elements == plan.pass_elements // 2
    while plan.chunk_frames > 1:
        plan = plan.halved()
    assert plan.lengths == (1,) * 7 == plan.halved().lengths


class Recorder:
    """A sink that needs whole frames, and remembers what it was told."""

    needs_whole_frames = True

    def __init__(self, shape):
        self.pixels, self.pieces, self.ended = torch.full(shape, float("nan")), [], []

    def write(self, pixels, start_frame, first_row):
        self.pieces.append((start_frame, first_row, tuple(pixels.shape)))
        self.pixels[:, :, start_frame : start_frame + pixels.shape[2]] = pixels

    def close(self):
        self.ended.append("close")

    def abort(self):
        self.ended.append("abort")


def test_memory_that_runs_out_on_the_way_still_gives_whole_frames(small_vae, monkeypatch):
    """The plan knew of no whole frames: the fallback to strips must."""
    z = latent_of(small_vae)
    expected = small_vae.decode(z)
    plan = small_vae.plan(z.shape, chunk_frames=1)
    passes, rows = small_vae.model.decoder.passes, z.shape[3]

    def starved(x, step, strip=None):
        if x.shape[3] == rows and strip is None:
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        return passes(x, step, strip)

    monkeypatch.setattr(small_vae.model.decoder, "passes", starved)
    sink = Recorder(plan.pixel_shape)
    small_vae.decode(z, plan=plan, sink=sink)
    assert small_vae.last_report.strips > 1 and sink.ended == ["close"]
    assert {(row, shape[3]) for _, row, shape in sink.pieces} == {(0, plan.pixel_shape[3])}
    assert (sink.pixels - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        ("no plan", {}),
        (lambda vae, z: vae.plan(z.shape).as_dict(), {}),
        (lambda vae, z: vae.plan(z.shape), {"chunk_frames": 1}),
        (lambda vae, z: vae.plan(z.shape, ranks=2), {}),
    ],
    ids=["a string", "a dictionary", "options beside it", "of a rank"],
)
def test_a_refused_plan_aborts_the_sink_and_leaves_no_report_of_another_run(
    small_vae, plan, options
):
    z = latent_of(small_vae)
    plan = plan(small_vae, z) if callable(plan) else plan
    small_vae.decode(z)
    sink = Recorder((1, 3, 9, 8, 8))
    with pytest.raises(GeometryError):
        small_vae.decode(z, plan=plan, sink=sink, **options)
    assert sink.ended == ["abort"] and sink.pieces == []
    report = small_vae.last_report  # of the run that was refused, if it had begun
    assert report is None or (report.status == "failed" and report.plan is None)


def test_memory_that_runs_out_in_a_hook_of_an_encode_is_said_in_words(small_vae):
    def starve(*_):
        raise torch.OutOfMemoryError("CUDA out of memory (planted)")

    with pytest.raises(DecodeMemoryError, match="while encoding 1 frames"):
        small_vae.encode(torch.zeros(1, 3, 1, 64, 64), on_progress=starve)
    assert small_vae.last_report.status == "failed"
