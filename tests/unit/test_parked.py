"""Strips of whole frames whose frames and history wait on the host."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from tests.conftest import pass_elements, random_state
from tests.unit.counted import TensorCounter
from tests.unit.decodes import relative_error, vae_of
from tests.unit.fake_layers import fake_layers
from wan_vae import CallbackSink, DecodeCancelled, WanVAE, geometry
from wan_vae.chunking import chunk_lengths
from wan_vae.config import wan21
from wan_vae.planning.choose import PlanRequest, choose
from wan_vae.runs import decode as decoding
from wan_vae.runs import engine
from wan_vae.runs.parked import HostFrames, StripHistories

GIB = 2**30


class Frames:
    """A sink that collects whole frames, each of them once and in order."""

    needs_whole_frames = True

    def __init__(self):
        self.parts = []

    def write(self, pixels, start_frame, first_row):
        assert (start_frame, first_row) == (sum(p.shape[2] for p in self.parts), 0)
        self.parts.append(pixels.clone())

    def close(self):
        pass

    abort = close

    @property
    def pixels(self):
        return torch.cat(self.parts, 2)


def plan_of(vae, z, strips, chunk_frames, last=None, parked=True, parts=None, features_wait=False):
    """A plan for whole frames in strips; `last`: frames of a pass in the last stage. parts: latent
    frames of each part of the video; None: each chunk is one."""
    plan = vae.plan(z.shape, whole_frames=True, strips=strips, chunk_frames=chunk_frames)
    if last is not None:
        strip = geometry.strips(z.shape[3], strips, vae.config)[0]
        shape = (*z.shape[:3], strip.halo_stop, z.shape[4])
        plan = replace(plan, pass_elements=pass_elements(vae.config, shape, last))
    parts = tuple(plan.lengths if parts is None else parts) if parked else ()
    return replace(plan, parked=parked, parts=parts, features_wait=features_wait)


def planned(plan):
    """`plan` as if nobody had asked for its strips: a new start may take more of them."""
    return replace(plan, options=replace(plan.options, strips=None, chunk_frames=None))


# latent (B, T, H, W), strips, chunk_frames, frames of a pass in the last stage
CASES = [
    ((1, 3, 30, 3), 2, 3, None),
    ((1, 5, 31, 2), 3, 2, None),
    ((1, 5, 29, 1), 4, [1, 3, 1], 2),
    ((2, 3, 30, 2), 2, 1, None),
    ((1, 6, 29, 1), 3, [3, 3], 4),
    ((1, 1, 31, 3), 3, 1, None),
    ((1, 2, 7, 3), 7, 1, None),
]


# Parts of several chunks, and features that wait: latent, strips, chunk_frames, frames of a pass,
# parts.
PARTED = [
    ((1, 5, 30, 2), 2, 1, None, (5,), False),
    ((2, 5, 29, 1), 3, 2, 2, (4, 1), False),
    ((1, 6, 31, 2), 2, 2, None, (6,), True),
    ((1, 4, 29, 1), 4, [1, 1, 2], None, (2, 2), True),
]


FAMILIES = ("wan2.1", "wan2.2")


@pytest.mark.parametrize(
    "family, size, strips, chunk_frames, last, parts, features_wait",
    [
        (FAMILIES[i % 2], *case)
        for i, case in enumerate([*((*case, None, False) for case in CASES), *PARTED])
    ],
)
def test_the_bits_are_those_of_strips_that_stay_on_the_device(
    family, size, strips, chunk_frames, last, parts, features_wait
):
    vae = vae_of(family)
    z = torch.randn(size[0], vae.config.z_dim, *size[1:])
    got, expected = Frames(), Frames()
    vae.decode(z, plan=plan_of(vae, z, strips, chunk_frames, last, parked=False), sink=expected)
    plan = plan_of(vae, z, strips, chunk_frames, last, True, parts, features_wait)
    vae.decode(z, plan=plan, sink=got)
    report = vae.last_report
    assert torch.equal(got.pixels, expected.pixels)
    assert relative_error(got.pixels, vae.decode(z)) < 1e-5
    assert (report.strips, report.plan["parked"], report.restarts) == (strips, True, 0)
    assert report.plan["parts"] == list(plan.parts)
    # Those of all videos of the batch.
    assert report.done_frames == report.total_frames == size[0] * got.pixels.shape[2]
    # Handed out a few at a time, not a part at a time.
    assert max(part.shape[2] for part in got.parts) <= vae.config.temporal_factor


@pytest.mark.parametrize(
    "changes",
    [
        {"colours": 4, "decoder_colours": 4},
        {"decoder_colours": 1},
        {"decoder_patch_size": 2},
        {"colours": 4, "decoder_colours": 4, "decoder_patch_size": 2},
    ],
    ids=["alpha", "grey", "doubled", "alpha, doubled"],
)
def test_pictures_of_other_colours_and_sizes_wait_too(changes):
    config = replace(wan21(dim=8), **changes)
    vae = WanVAE.from_state_dict(random_state(config), device="cpu")
    z = torch.randn(1, 16, 3, 30, 2)
    got = Frames()
    vae.decode(z, plan=plan_of(vae, z, 2, 2), sink=got)
    assert vae.last_report.plan["parked"]
    assert relative_error(got.pixels, vae.decode(z)) < 1e-5


def test_an_ordinary_caller_may_leave_inference_mode_between_frames():
    vae = vae_of("wan2.1")
    z = torch.randn(1, vae.config.z_dim, 5, 30, 2)
    run = decoding.DecodeRun(vae.engine, decoding.DecodeRequest(z, plan=plan_of(vae, z, 2, 2)))
    run.begin(True, plan_of(vae, z, 2, 2))
    with torch.inference_mode():
        stream = run.stream()
        first = next(stream)
    rest = list(stream)
    assert relative_error(torch.cat([first, *rest], 2), vae.decode(z)) < 1e-5


class Watched:
    """Keeps weak references to all that waits on the host."""

    def __init__(self, monkeypatch):
        self.histories, self.frames = [], []

        def watching(kind, found):
            def make(*arguments):
                made = kind(*arguments)
                found.append(weakref.ref(made))
                return made

            return make

        monkeypatch.setattr(decoding, "StripHistories", watching(StripHistories, self.histories))
        monkeypatch.setattr(decoding, "HostFrames", watching(HostFrames, self.frames))

    @property
    def alive(self):
        return [ref() for ref in (*self.histories, *self.frames) if ref() is not None]


@pytest.mark.parametrize("questions", [1, 6])
def test_a_cancel_frees_what_waits_on_the_host_although_somebody_keeps_the_error(
    questions, monkeypatch
):
    vae, watched = vae_of("wan2.1"), Watched(monkeypatch)
    z = torch.randn(1, vae.config.z_dim, 5, 30, 2)
    answers = iter([False] * questions)
    gc.disable()
    try:
        with pytest.raises(DecodeCancelled) as kept:
            vae.decode(
                z,
                plan=plan_of(vae, z, 2, 2),
                sink=Frames(),
                should_stop=lambda: next(answers, True),
            )
        assert kept.value.__traceback__ is not None
        assert watched.histories and watched.alive == []
    finally:
        gc.enable()
    assert vae.last_report.status == "cancelled"


def test_a_stream_that_is_left_frees_what_waits_on_the_host(monkeypatch):
    vae, watched = vae_of("wan2.1"), Watched(monkeypatch)
    z = torch.randn(1, vae.config.z_dim, 5, 30, 2)
    plan = plan_of(vae, z, 2, 2)
    run = decoding.DecodeRun(vae.engine, decoding.DecodeRequest(z, plan=plan))
    run.begin(True, plan)
    stream = run.stream()
    next(stream)
    (histories,) = [ref() for ref in watched.histories]
    assert histories is not None and histories._places
    stream.close()
    assert not histories._places and not any(strip.memories for strip in histories._strips)
    assert run.report.plan["parked"] and run.report.status == "cancelled"


def test_memory_that_runs_out_on_the_way_gives_each_frame_once(monkeypatch):
    """In the second strip of the second chunk, when the frames of the first were taken."""
    vae = vae_of("wan2.1")
    z = torch.randn(1, vae.config.z_dim, 6, 30, 2)
    expected, sink = vae.decode(z), Frames()
    real, calls = vae.model.decoder.passes, []

    def passes(x, step, strip=None):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        return real(x, step, strip)

    monkeypatch.setattr(vae.model.decoder, "passes", passes)
    vae.decode(z, plan=planned(plan_of(vae, z, 2, 3)), sink=sink)
    report = vae.last_report
    assert relative_error(sink.pixels, expected) < 1e-5
    assert report.restarts == 1 and report.strips == 4 and "planted" in report.fallbacks[-1]
    assert report.plan["parked"]


# -- what is planned -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, size, strips, chunk_frames, last, parts, features_wait",
    [
        (FAMILIES[(i + 1) % 2], *case)
        for i, case in enumerate([*((*case, None, False) for case in CASES[:5]), *PARTED])
    ],
)
def test_the_plan_is_within_15_percent_of_the_counted_peak(
    family, size, strips, chunk_frames, last, parts, features_wait
):
    """Memory of the host is NumPy's here: what is counted is the device's."""
    case = family, size, strips, chunk_frames, last, True, parts, features_wait
    planned, counted = planned_and_counted(*case)
    assert abs(planned / counted - 1) < 0.15, (planned, counted)


def planned_and_counted(
    family, size, strips, chunk_frames, last, parked=True, parts=None, features_wait=False
):
    vae = vae_of(family)
    z = torch.randn(size[0], vae.config.z_dim, *size[1:])
    plan = plan_of(vae, z, strips, chunk_frames, last, parked, parts, features_wait)
    setup = vae.engine.setup(engine.SetupRequest("decode", tuple(z.shape), plan.options))
    plan = vae.engine.counted(setup, plan)
    with TensorCounter() as counter:
        vae.decode(z, plan=plan, sink=CallbackSink(lambda *piece: None))
    return plan.planned_bytes, counter.peak


def test_features_that_wait_on_the_host_leave_room_on_the_device():
    """Eight latent frames of a decoder whose trunk is wide and whose last stage is not."""
    case = ("wan2.2", (1, 8, 30, 2), 5, 1, 2, True, (8,))
    planned, counted = planned_and_counted(*case, False)
    less_planned, less_counted = planned_and_counted(*case, True)
    assert less_counted < counted and less_planned < planned


def test_a_device_without_the_other_strips_history_has_much_more_room():
    """Five strips: the history of one is there, and that of all without the host."""
    case = ("wan2.1", (1, 4, 40, 2), 5, 1, None)
    planned, counted = planned_and_counted(*case)
    _, whole = planned_and_counted(*case, parked=False)
    assert counted < 0.4 * whole
    assert abs(planned / counted - 1) < 0.1, (planned, counted)


def request(frames=21, height=90, width=160, **changes):
    layers = fake_layers(wan21(), "cuda", torch.bfloat16)
    latent = (1, 16, frames, height, width)
    wanted = PlanRequest(wan21(), latent, torch.bfloat16, "channels_last_3d", layers)
    return replace(wanted, whole_frames=True, staged=True, **changes)


def test_a_host_without_room_keeps_it_all_on_the_device():
    needed = choose(request(free_bytes=5 * GIB)).host_bytes
    tight = choose(request(free_bytes=5 * GIB, host_free_bytes=needed))
    assert not tight.parked and "no number of strips is sure to fit" in tight.note
    assert choose(request(free_bytes=5 * GIB, host_free_bytes=2 * needed)).parked


def test_chunks_that_were_asked_for_are_kept():
    choice = choose(request(free_bytes=5 * GIB, chunk_frames=4))
    assert choice.parked and choice.lengths == chunk_lengths(21, 4)
    assert choose(request(strips=3)).strips == 3
    assert choose(request(strips=3)).parked


def test_devices_without_memory_of_their_own_do_not_park():
    assert not choose(replace(request(free_bytes=5 * GIB), staged=False)).parked
    assert not choose(replace(request(free_bytes=5 * GIB), whole_frames=False)).parked
