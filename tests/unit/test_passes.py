"""A chunk passes the trunk whole and each later stage in passes: the pixels do not depend on it.

Nor do history, progress, cancel and what happens where memory runs out, which all go by passes.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import SMALL_CONFIGS, pass_elements, random_state
from tests.unit.decodes import relative_error, schedules, vae_of
from tests.unit.fake_layers import fake_encoder_layers, fake_layers, fake_ops
from wan_vae import WanVAE
from wan_vae.chunking import Chunk, PassEnds, schedule
from wan_vae.config import wan21, wan22
from wan_vae.errors import DecodeCancelled, GeometryError
from wan_vae.io.sink import TensorSink
from wan_vae.kernels.device import CARDS
from wan_vae.kernels.registry import kernels_of
from wan_vae.network.blocks import ResidualBlock, Step, Upsample, _interleave
from wan_vae.network.cache import FeatureCache
from wan_vae.network.decoder import UpStage
from wan_vae.ops.problem import LayerWeights, NormConvProblem
from wan_vae.planning import choose
from wan_vae.planning.passes import (
    encoder_pass_frames,
    frames_of_passes,
    frames_together,
    pass_ends,
    pass_frames,
)
from wan_vae.runs import decode

# Of float32 on the CPU, where a convolution may choose another blocking for another size.
BOUND = 1e-5
# More frames than any stage of these tests gets.
WHOLE = (99, 99, 99, 99)


def latent_of(vae, frames, height=3, width=2, batch=1):
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, vae.config.z_dim, frames, height, width, generator=generator)


def limit_passes(patch: pytest.MonkeyPatch, limits: tuple[int, ...]) -> None:
    """Let decodes take at most so many frames at once in each stage."""
    patch.setattr(decode, "pass_frames", lambda *_: limits)


def passes_of(patch: pytest.MonkeyPatch, vae: WanVAE, frames: int, size: tuple[int, ...]) -> None:
    """Let passes of decodes of a latent of `size` (H, W) have so many frames in the last stage."""
    elements = pass_elements(vae.config, (1, vae.config.z_dim, 1, *size), frames)
    patch.setattr(choose, "PASSES", (elements, elements))


class Once:
    """A sink that counts how often each pixel is written, and keeps the frames of each piece."""

    def __init__(self, shape, needs_whole_frames=True):
        self.pixels, self.times = torch.full(shape, float("nan")), torch.zeros(shape)
        self.needs_whole_frames = needs_whole_frames
        self.pieces = []

    def write(self, pixels, start_frame, first_row):
        t, rows = pixels.shape[2], pixels.shape[3]
        place = (..., slice(start_frame, start_frame + t), slice(first_row, first_row + rows))
        self.pixels[(*place, slice(None))] = pixels
        self.times[(*place, slice(None))] += 1
        self.pieces.append((start_frame, start_frame + t))

    def close(self):
        assert (self.times == 1).all()

    abort = close


# -- the pixels ----------------------------------------------------------------------------------


@st.composite
def decodes(draw):
    lengths = draw(schedules())
    height = draw(st.integers(1, 5))
    pairs = st.integers(1, 6).map(lambda n: 2 * n)
    return {
        "size": (sum(lengths), height, draw(st.integers(1, 4)), draw(st.integers(1, 2))),
        "chunk_frames": lengths,
        "memory_format": draw(st.sampled_from(["contiguous", "channels_last_3d"])),
        "strips": draw(st.one_of(st.none(), st.integers(1, height))),
        "whole_frames": draw(st.booleans()),
        # A latent frame is one frame in the first stage, several in the others.
        "limits": (draw(st.integers(1, 6)), draw(pairs), draw(pairs), draw(pairs)),
    }


@settings(max_examples=12, deadline=None)
@given(case=decodes())
@pytest.mark.parametrize("family", SMALL_CONFIGS)
def test_any_passes_give_the_pixels_of_whole_chunks(family, case):
    vae = vae_of(family)
    z = latent_of(vae, *case["size"])
    options = {name: case[name] for name in ("chunk_frames", "memory_format", "strips")}
    limits = case["limits"]
    with pytest.MonkeyPatch.context() as patch:
        limit_passes(patch, WHOLE)
        expected = vae.decode(z, **options)
        limit_passes(patch, limits)
        sink = Once(expected.shape, case["whole_frames"])
        vae.decode(z, sink=sink, **options)
    assert relative_error(sink.pixels, expected) < BOUND
    assert vae.last_report.layout.mixed_calls == 0
    if not (case["strips"] and case["whole_frames"]):
        assert max(stop - start for start, stop in sink.pieces) <= limits[-1]


def stage_inputs(vae: WanVAE, operation: str = "decode"):
    """Lists, one for each stage that has passes, that grow by the frames of features that enter."""
    if operation == "decode":
        parts, starts = vae.model.decoder.upsamples, vae.model.decoder._stage_starts[:-1]
    else:
        parts, starts = vae.model.encoder.downsamples, vae.model.encoder._stage_starts[:-2]
    seen = [[] for _ in starts]
    hooks = [
        parts[first].register_forward_pre_hook(
            lambda layer, arguments, found=found: found.append(arguments[0].shape[2])
        )
        for first, found in zip(starts, seen, strict=True)
    ]
    return seen, hooks


@pytest.mark.parametrize(
    "limits, lengths, expected",
    [
        # All at once: the video's first frame goes with the others, an odd number together.
        (WHOLE, [5], [[5], [9], [17], [17]]),
        (WHOLE, [2, 3], [[2, 3], [3, 6], [5, 12], [5, 12]]),
        # Else it goes alone, and the others by as many as may go at once.
        ((2, 4, 8, 8), [5], [[1, 2, 2], [1, 4, 4], [1, 8, 8], [1, 8, 8]]),
        ((3, 4, 4, 2), [5], [[1, 3, 1], [1, 4, 2, 2], [1, 4, 4, 4, 4], [1] + [2] * 8]),
        ((99, 99, 6, 99), [4], [[4], [7], [1, 6, 6], [1, 6, 6]]),
        ((1, 2, 2, 2), [1, 2], [[1, 1, 1], [1, 2, 2], [1, 2, 2, 2, 2], [1, 2, 2, 2, 2]]),
        # A chunk that is not the first has no frame that goes alone.
        ((2, 4, 6, 4), [1, 3], [[1, 2, 1], [1, 4, 2], [1, 6, 2, 4], [1, 4, 2, 2, 4]]),
    ],
)
def test_each_stage_takes_so_many_frames_at_once(small_vae, monkeypatch, limits, lengths, expected):
    z = latent_of(small_vae, sum(lengths))
    limit_passes(monkeypatch, limits)
    seen, hooks = stage_inputs(small_vae)
    pieces = [pixels.shape[2] for pixels in small_vae.decode_stream(z, chunk_frames=lengths)]
    for hook in hooks:
        hook.remove()
    assert seen == expected
    assert pieces == seen[-1]
    assert [c.stop - c.start for c in small_vae.last_report.chunks] == lengths


@settings(max_examples=25, deadline=None)
@given(case=decodes())
def test_frames_behind_the_first_enter_later_stages_in_pairs(case):
    """Kernels work on pairs of frames wherever a latent frame is several."""
    vae = vae_of("wan2.1")
    z = latent_of(vae, case["size"][0], 1, 1)
    seen, hooks = stage_inputs(vae)
    with pytest.MonkeyPatch.context() as patch:
        limit_passes(patch, case["limits"])
        vae.decode(z, chunk_frames=case["chunk_frames"])
    for hook in hooks:
        hook.remove()
    for (first, *others), limit in zip(seen[1:], case["limits"][1:], strict=True):
        assert first % 2 == 1 and all(n % 2 == 0 for n in others)
        assert max([first, *others]) <= limit


@settings(max_examples=10, deadline=None)
@given(case=decodes(), quarters=st.integers(1, 40))
@pytest.mark.parametrize("family", SMALL_CONFIGS)
def test_passes_of_a_shard_give_the_same_pixels_and_the_frames_that_all_ranks_expect(
    family, case, quarters
):
    vae = vae_of(family)
    z, lengths = latent_of(vae, *case["size"]), case["chunk_frames"]
    elements = pass_elements(vae.config, tuple(z.shape), 2) * quarters // 4
    limits = pass_frames(vae.config, tuple(z.shape), elements)
    ends = PassEnds(pass_ends(vae.config, tuple(z.shape), limits).first, vae.config.temporal_factor)
    found, frames = {}, []
    for passes, options in (("whole", {}), ("cut", {"pass_frames": limits, "pass_ends": ends})):
        cache, found[passes] = FeatureCache(), []
        for chunk in schedule(z.shape[2], lengths):
            step = Step(cache, chunk, **options)
            with torch.inference_mode():
                pixels = list(vae.model.decode_passes(z[:, :, chunk.start : chunk.stop], step))
            found[passes] += pixels
            if passes == "cut":
                own = list(frames_of_passes(vae.config, chunk, limits, ends))
                assert own == [p.shape[2] for p in pixels]
                frames += own
    assert relative_error(torch.cat(found["cut"], 2), torch.cat(found["whole"], 2)) < BOUND
    assert max(frames) <= limits[-1]
    # A latent frame is left for the end, or what a pass may have of it.
    assert frames[-1] == (1 if len(frames) == 1 else min(vae.config.temporal_factor, limits[-1]))


def test_the_first_pass_of_a_shard_takes_as_many_frames_as_fit():
    limits, shape = (64, 16, 16, 16), (1, 16, 21, 90, 80)
    elements = 2 * choose.PASSES[0]
    assert pass_frames(wan21(), shape, elements, 4) == limits
    ends = pass_ends(wan21(), (1, 16, 21, 90, 160), limits, 4)
    assert ends == PassEnds((64, 15, 13, 13), 4)
    (chunk,) = schedule(21, 21)
    assert list(frames_of_passes(wan21(), chunk, limits, ends)) == [13, 16, 16, 12, 12, 8, 4]
    # Where a pass is a latent frame, the first one is the video's first frame.
    limits = (16, 4, 4, 4)
    ends = pass_ends(wan21(), (1, 16, 21, 135, 240), limits, 4)
    # Of small frames more are left for the last pass.
    assert [pass_ends(wan21(), (1, 16, 21, n, n), limits).last for n in (60, 32, 16)] == [
        4,
        24,
        104,
    ]
    assert list(frames_of_passes(wan21(), chunk, limits, ends)) == [1, *[4] * 20]


def test_the_model_joins_the_passes_of_a_chunk(small_vae):
    z = latent_of(small_vae, 4)
    model = small_vae.model

    def step(limits=()):
        return Step(FeatureCache(), Chunk(0, 4, True, True), pass_frames=limits)

    with torch.inference_mode():
        whole = model.decode_chunk(z, step())
        parts = list(model.decode_passes(z, step((2, 4, 4, 4))))
        joined = model.decode_chunk(z, step((2, 4, 4, 4)))
        features = model.trunk(z, step())
        stages = model.decoder.stages(features, step((2, 4, 4, 4)))
        finished = model.finish(features, step((2, 4, 4, 4)))
    assert [p.shape[2] for p in parts] == [1, 4, 4, 4]
    assert torch.equal(joined, torch.cat(parts, 2))
    assert torch.equal(finished, joined) and torch.equal(stages.clamp(-1, 1), joined)
    assert relative_error(joined, whole) < BOUND


@pytest.mark.full
@pytest.mark.usefixtures("interpreted")
def test_passes_change_no_bit_of_what_our_kernels_make(tmp_path, monkeypatch):
    """On a GPU, or as small as the interpreter needs it."""
    pytest.importorskip("triton", reason="triton is not installed here: pip install triton")
    monkeypatch.setenv("WAN_VAE_CACHE", str(tmp_path))
    where = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")
    vae = WanVAE.from_state_dict(random_state(wan21(dim=16)), *where)
    z = latent_of(vae, 2, 1, 1)
    found = []
    for limits in (WHOLE, (1, 2, 2, 2)):
        limit_passes(monkeypatch, limits)
        found.append(list(vae.decode_stream(z, chunk_frames=2, backend="triton")))
    assert [len(pieces) for pieces in found] == [1, 3]
    assert torch.equal(torch.cat(found[1], 2), found[0][0])
    assert {layer.backend for layer in vae.last_report.layers} == {"triton"}


def test_a_chunk_in_two_is_the_first_once_and_the_last_once():
    for first in (True, False):
        for last in (True, False):
            now, later = Chunk(3, 7, first, last).split()
            assert (now.is_first, now.is_last) == (first, False)
            assert (later.is_first, later.is_last) == (False, last)
            assert (now.start, now.stop) == (later.start, later.stop) == (3, 7)


# -- how many frames a pass has ------------------------------------------------------------------


# Of decoder and encoder, by how many frames of a latent frame stay together.
LEAST = {2: ((1, 2, 2, 2), (2, 2, 2)), 4: ((1, 2, 4, 4), (4, 4, 2))}


@pytest.mark.parametrize("together", LEAST)
@pytest.mark.parametrize("config", [wan21(), wan22(), *SMALL_CONFIGS.values()])
@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 300), st.integers(1, 500)),
    elements=st.lists(st.integers(1, 10**11), min_size=2, max_size=6),
)
def test_limits_are_multiples_of_the_least_and_grow_with_what_may_be_held(
    config, together, size, elements
):
    b, h, w = size
    shape = (b, config.z_dim, 21, h, w)
    for limits_of, least in zip((pass_frames, encoder_pass_frames), LEAST[together], strict=True):
        found = [limits_of(config, shape, n, together) for n in (1, *sorted(elements))]
        assert found[0] == least
        for fewer, more in pairwise(found):
            assert all(a <= b for a, b in zip(fewer, more, strict=True))
        for limits in found:
            assert all(n % of == 0 for n, of in zip(limits, least, strict=True))
        # Of a strip: at least as many.
        strip = limits_of(config, (*shape[:3], -(-h // 2), w), max(elements), together)
        assert all(a >= b for a, b in zip(strip, found[-1], strict=True))


@pytest.mark.parametrize("card", ["H100", "A100", "RTX 4090"])
def test_four_frames_stay_together_exactly_where_a_layer_makes_quads(card):
    """Layers as our kernels prepare them."""
    torch.manual_seed(0)
    weights = LayerWeights(torch.randn(96, 96, 3, 3, 3), torch.randn(96), torch.ones(96, 1, 1, 1))
    others = fake_layers(wan21(), "triton", torch.bfloat16)
    found: set[tuple[str, int]] = set()
    for frames, only_frame in ((1, False), (2, False), (4, False), (4, True)):
        problem = NormConvProblem(96, 96, torch.bfloat16, frames, only_frame=only_frame)
        for kernel in kernels_of("norm_conv3d", ("cuda",)):
            if kernel.requires.unmet(CARDS[card], problem) is not None:
                continue
            for config in kernel.candidates(problem, CARDS[card]):
                layer = kernel.prepare(weights, problem, config, CARDS[card])
                together = frames_together({"one": layer, **others})
                assert (together == 4) == config.startswith("winograd4")
                assert (layer.frames_together == 1) == config.startswith("direct")
                found.add((config.split("_")[0], together))
    assert found == {("direct1", 2), ("direct3", 2), ("winograd", 2), ("winograd4", 4)}
    assert frames_together({}) == 2, "down-samplers halve them"


@settings(max_examples=12, deadline=None)
@given(lengths=schedules(), height=st.integers(1, 3), quarters=st.integers(1, 40))
@pytest.mark.parametrize("operation", ["decode", "encode"])
@pytest.mark.parametrize("family", SMALL_CONFIGS)
def test_frames_behind_the_first_enter_each_stage_by_whole_latent_frames(
    family, operation, lengths, height, quarters
):
    """Where a layer makes quads, however little a pass may hold."""
    vae = vae_of(family)
    z, factor = latent_of(vae, sum(lengths), height, 1), vae.config.spatial_factor
    elements = pass_elements(vae.config, tuple(z.shape), 2) * quarters // 8
    make = fake_layers if operation == "decode" else fake_encoder_layers
    ops = fake_ops(vae.model, make(vae.config, "cuda", torch.float32))
    setup = vae.engine.setup
    seen, hooks = stage_inputs(vae, operation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "PASSES", (elements, elements))
        patch.setattr(vae.engine, "setup", lambda request: replace(setup(request), ops=ops))
        if operation == "decode":
            vae.decode(z, chunk_frames=lengths)
        else:
            pixels = torch.rand(1, 3, 4 * sum(lengths) - 3, height * factor, factor)
            vae.encode(pixels, chunk_frames=lengths)
    for hook in hooks:
        hook.remove()
    wholes = (1, 2, 4, 4) if operation == "decode" else (4, 4, 2)
    for (first, *others), whole in zip(seen, wholes, strict=True):
        assert first % whole == 1 % whole and all(n % whole == 0 for n in others)
        assert sum((first, *others)) == whole * (sum(lengths) - 1) + 1


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("last", [2, 4, 8])
@pytest.mark.parametrize("family", SMALL_CONFIGS)
def test_features_of_a_pass_hold_what_they_may(family, last, batch, monkeypatch):
    """Counted at every block and up-sampler of a decode; a pass of the least frames may hold more.

    And no more passes than that takes: one frame (or pair) more would be too much in some layer.
    """
    vae = vae_of(family)
    z = latent_of(vae, 6, 3, 2, batch)
    elements = pass_elements(vae.config, tuple(z.shape), last)
    monkeypatch.setattr(choose, "PASSES", (elements, elements))
    limits = pass_frames(vae.config, tuple(z.shape), elements)
    starts = vae.model.decoder._stage_starts
    held = [{} for _ in limits]  # of each stage: numbers by frames that entered it

    def watch(stage):
        def hook(layer, arguments, result):
            x = arguments[0]
            entered = x.shape[2]
            numbers = max(x.numel(), result.numel())
            held[stage][entered] = max(held[stage].get(entered, 0), numbers)

        return hook

    hooks = [
        layer.register_forward_hook(watch(stage))
        for stage, (start, stop) in enumerate(pairwise(starts))
        for part in vae.model.decoder.upsamples[start:stop]
        for layer in part.modules()
        if isinstance(layer, (ResidualBlock, Upsample, UpStage))
    ]
    vae.decode(z, chunk_frames=[1, 5])
    for hook in hooks:
        hook.remove()
    for stage, (limit, numbers) in enumerate(zip(limits, held, strict=True)):
        least = 1 if stage == 0 else 2
        assert max(numbers) <= limit
        assert limit == least or max(numbers.values()) <= elements
        # Of the largest layer; the video's first frame alone is not doubled.
        per_frame = max(n / t for t, n in numbers.items())
        assert (limit + least) * per_frame > elements


@pytest.mark.parametrize("strips, whole_frames", [(None, True), (2, True), (2, False)])
def test_limits_are_those_of_the_rows_that_go_through_the_stages(
    small_vae, monkeypatch, strips, whole_frames
):
    shape = (2, small_vae.config.z_dim, 2, 40, 2)
    elements = pass_elements(small_vae.config, shape, 4)
    monkeypatch.setattr(choose, "PASSES", (elements, elements))
    rows, real = [], small_vae.model.decoder.passes

    def passes(x, step, strip=None):
        rows.append(x.shape[3])
        of_rows = (*shape[:3], x.shape[3], shape[4])
        assert step.pass_frames == pass_frames(small_vae.config, of_rows, elements)
        return real(x, step, strip)

    monkeypatch.setattr(small_vae.model.decoder, "passes", passes)
    factor = small_vae.config.spatial_factor
    sink = Once((2, 3, 5, 40 * factor, 2 * factor), whole_frames)
    small_vae.decode(torch.randn(shape), strips=strips, chunk_frames=2, sink=sink)
    assert rows == ([40] if strips is None else [33, 33])


# -- history -------------------------------------------------------------------------------------


def history_of(vae: WanVAE, cache: FeatureCache) -> dict[str, int]:
    """Where in memory each slot lies."""
    slots = [m.slot for m in vae.model.decoder.modules() if hasattr(m, "slot")]
    return {slot: cache.peek(slot).data_ptr() for slot in slots if cache.peek(slot) is not None}


@pytest.mark.parametrize("limits", [(), WHOLE, (1, 2, 2, 2), (2, 2, 8, 4)])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [2, 3, 1, 2], [1, 4, 2]])
def test_history_stays_in_its_place(small_vae, limits, memory_format, lengths):
    """Not made anew among tensors of a chunk, whose memory it would break up."""
    z = latent_of(small_vae, sum(lengths), batch=2)
    vae = WanVAE(small_vae.model)
    vae.decode(z, memory_format=memory_format)  # gives the weights this format
    cache, places, chunk_ends = FeatureCache(), [], []
    with torch.inference_mode():
        for chunk in schedule(z.shape[2] + 1, [*lengths, 1])[:-1]:
            step = Step(cache, chunk, pass_frames=limits)
            for _ in vae.model.decode_passes(z[:, :, chunk.start : chunk.stop], step):
                places.append(history_of(vae, cache))
            chunk_ends.append(len(places) - 1)
    assert len(places[-1]) == len(cache) > 25
    # The temporal convolutions of up-samplers see nothing of the video's first frame; else each
    # slot is made in the first chunk.
    assert all(before.items() <= after.items() for before, after in pairwise(places))
    second = places[chunk_ends[0] + 1 :]
    assert all(later == second[0] for later in second)
    if lengths[0] > 1:
        assert places[chunk_ends[0]] == second[0]


def test_after_the_last_pass_no_history_is_kept(small_vae):
    z, cache = latent_of(small_vae, 3), FeatureCache()
    with torch.inference_mode():
        for chunk in schedule(3, 3):
            step = Step(cache, chunk, pass_frames=(1, 2, 2, 2))
            counts = [len(cache) for _ in small_vae.model.decode_passes(z, step)]
    assert len(counts) == 5 and min(counts[:-1]) > 0 and counts[-1] == 0


# -- progress and cancel -------------------------------------------------------------------------


def test_progress_follows_each_pass(small_vae, monkeypatch):
    z = latent_of(small_vae, 5)
    passes_of(monkeypatch, small_vae, 4, (3, 2))
    seen = []
    small_vae.decode(z, chunk_frames=[3, 2], on_progress=lambda *state: seen.append(state))
    assert [done for done, *_ in seen] == [1, 5, 9, 13, 17]
    assert {(total, report.status) for _, total, report in seen} == {(17, "running")}
    assert [report.done_frames for *_, report in seen] == [1, 5, 9, 13, 17]
    spans = [[(c.start, c.stop, c.frames) for c in report.chunks] for *_, report in seen]
    assert spans == [[(0, 3, 9)]] * 3 + [[(0, 3, 9), (3, 5, 8)]] * 2
    times = [report.chunks[0].duration_ms for *_, report in seen]
    assert 0 < times[0] < times[1] < times[2] == times[3], "of its passes, summed"
    assert spans[-1] == [(c.start, c.stop, c.frames) for c in small_vae.last_report.chunks]


@pytest.mark.parametrize("whole_frames", [False, True])
def test_strips_have_one_record_a_chunk_and_progress_up_to_the_total(
    small_vae, monkeypatch, whole_frames
):
    z = latent_of(small_vae, 5, height=4)
    limit_passes(monkeypatch, (2, 4, 4, 4))
    seen = []
    small_vae.decode(
        z,
        chunk_frames=[3, 2],
        strips=2,
        sink=Once(
            (1, 3, 17, 4 * small_vae.config.spatial_factor, 2 * small_vae.config.spatial_factor),
            whole_frames,
        ),
        on_progress=lambda done, total, report: seen.append(done),
    )
    if whole_frames:
        assert seen == [9, 17]
    else:  # half of the rows of each frame, pass after pass, and then the other half
        assert seen == [n // 2 for n in (1, 5, 9, 13, 17, 18, 22, 26, 30, 34)]
    assert [(c.start, c.stop, c.frames) for c in small_vae.last_report.chunks] == [
        (0, 3, 9),
        (3, 5, 8),
    ]


@pytest.mark.parametrize("asked", range(6))
def test_a_cancel_stops_before_the_next_pass(small_vae, monkeypatch, asked):
    """In the middle of a chunk, and the report says how far it came."""
    z = latent_of(small_vae, 5)
    expected = small_vae.decode(z)
    passes_of(monkeypatch, small_vae, 4, (3, 2))
    answers = []

    def should_stop():
        answers.append(len(answers) == asked)
        return answers[-1]

    done = [0, 1, 5, 9, 13, 17][asked]
    out = torch.full_like(expected, float("nan"))
    if asked == 5:  # one question a pass, none after the last
        small_vae.decode(z, chunk_frames=5, out=out, should_stop=should_stop)
    else:
        with pytest.raises(DecodeCancelled, match=f"after {done} of 17 frames"):
            small_vae.decode(z, chunk_frames=5, out=out, should_stop=should_stop)
    assert len(answers) == min(asked + 1, 5)
    report = small_vae.last_report
    assert report.status == ("done" if asked == 5 else "cancelled")
    assert report.done_frames == done
    assert not done or relative_error(out[:, :, :done], expected[:, :, :done]) < BOUND
    assert out[:, :, done:].isnan().all()


def test_strips_can_be_cancelled_before_each_pass(small_vae, monkeypatch):
    z = latent_of(small_vae, 3, height=4)
    limit_passes(monkeypatch, (2, 4, 4, 4))
    for whole_frames, questions in ((True, 1 + 2 * 3), (False, 1 + 2 * 3)):
        answers = []
        out = torch.empty(1, 3, 9, *(n * small_vae.config.spatial_factor for n in (4, 2)))
        sink = TensorSink(out)
        sink.needs_whole_frames = whole_frames
        options = {"sink": sink, "chunk_frames": 3, "strips": 2}
        small_vae.decode(z, should_stop=lambda a=answers: a.append(1), **options)
        # The trunk, and three passes of each strip.
        assert len(answers) == questions
        left = iter([False] * 5)
        with pytest.raises(DecodeCancelled):
            small_vae.decode(z, should_stop=lambda i=left: next(i, True), **options)
        # Half of the rows of nine frames and of one more frame; whole frames come all at once.
        assert small_vae.last_report.done_frames == (0 if whole_frames else (9 + 1) // 2)


# -- out of memory -------------------------------------------------------------------------------


def plant(monkeypatch, vae, start, number, times=1):
    """Let pass `number` of the chunk at latent frame `start` run out of memory, `times` times.

    Returns weak references to the features and the history of each chunk (of each strip).
    """
    real, used = vae.model.decoder.passes, []
    left = iter(range(times))

    def passes(x, step, strip=None):
        used.extend((weakref.ref(x), weakref.ref(step.cache)))
        made = real(x, step, strip)
        del x
        done = 0
        while True:
            failing = (step.chunk.start, done) == (start, number)
            if failing and next(left, None) is not None:
                raise torch.OutOfMemoryError("CUDA out of memory (planted)")
            yield next(made)
            done += 1

    monkeypatch.setattr(vae.model.decoder, "passes", passes)
    return used


@pytest.mark.parametrize(
    "frames, chunk_frames, last, start, number, pieces, lengths",
    [
        # The second pass of the third chunk: 17 frames were given out.
        (7, 2, 4, 4, 1, [1, 4, 4, 4, 4] + [2] * 4, [1] * 7),
        # Its first.
        (7, 2, 4, 4, 0, [1, 4, 4, 4] + [2] * 6, [1] * 7),
        # The first pass of all.
        (5, 5, 8, 0, 0, [1, 4, 4, 4, 4], [3, 2]),
        # 9 + 10 frames were given out; of the passes of 4 that come next two frames are new,
        # behind two that are not.
        (8, 3, 10, 3, 1, [9, 10, 2] + [4] * 2, [2, 1, 2, 1, 2]),
    ],
)
def test_out_of_memory_in_a_pass_gives_each_frame_out_once(
    small_vae, monkeypatch, frames, chunk_frames, last, start, number, pieces, lengths
):
    z = latent_of(small_vae, frames)
    expected = small_vae.decode(z, chunk_frames=1)
    passes_of(monkeypatch, small_vae, last, (3, 2))
    plant(monkeypatch, small_vae, start, number)
    stream = list(small_vae.decode_stream(z, chunk_frames=chunk_frames))
    assert [pixels.shape[2] for pixels in stream] == pieces
    assert relative_error(torch.cat(stream, 2), expected) < BOUND
    report = small_vae.last_report
    assert report.fallbacks == (
        f"chunk of {chunk_frames} latent frames: CUDA out of memory (planted); "
        f"started again with {max(lengths)}",
    )
    assert [c.stop - c.start for c in report.chunks] == lengths, "of the last attempt"
    assert sum(c.frames for c in report.chunks) == report.done_frames == 4 * frames - 3


def test_a_sink_gets_each_frame_once_and_progress_does_not_go_back(small_vae, monkeypatch):
    z = latent_of(small_vae, 7)
    expected = small_vae.decode(z, chunk_frames=1)
    passes_of(monkeypatch, small_vae, 4, (3, 2))
    plant(monkeypatch, small_vae, 4, 1)
    sink, seen = Once(expected.shape), []
    small_vae.decode(z, chunk_frames=2, sink=sink, on_progress=lambda done, *_: seen.append(done))
    assert relative_error(sink.pixels, expected) < BOUND
    assert sink.pieces == sorted(sink.pieces)
    assert seen == [stop for _, stop in sink.pieces] == sorted(set(seen))


def test_a_second_attempt_that_fails_too_halves_again_and_then_goes_on_in_strips(
    small_vae, monkeypatch
):
    z = latent_of(small_vae, 5, height=4)
    expected = small_vae.decode(z, chunk_frames=1)
    passes_of(monkeypatch, small_vae, 4, (4, 2))
    plant(monkeypatch, small_vae, 4, 0, times=3)
    stream = list(small_vae.decode_stream(z, chunk_frames=[4, 1]))
    assert relative_error(torch.cat(stream, 2), expected) < BOUND
    report = small_vae.last_report
    planted = "chunk of 1 latent frame: CUDA out of memory (planted)"
    assert report.fallbacks == (
        f"{planted}; started again with 2",
        f"{planted}; started again with 1",
        planted,
    )
    assert report.strips == 2
    assert [c.stop - c.start for c in report.chunks] == [1] * 5


def test_a_cancel_while_frames_are_made_again_says_how_many_were_given_out(small_vae, monkeypatch):
    z = latent_of(small_vae, 7)
    passes_of(monkeypatch, small_vae, 4, (3, 2))
    plant(monkeypatch, small_vae, 4, 1)
    answers = iter([False] * 9)
    with pytest.raises(DecodeCancelled, match="after 17 of 25 frames"):
        list(small_vae.decode_stream(z, chunk_frames=2, should_stop=lambda: next(answers, True)))
    assert small_vae.last_report.done_frames == 17


@pytest.mark.parametrize("strips", [None, 2])
def test_nothing_of_a_failed_attempt_is_held_in_the_next(small_vae, monkeypatch, strips):
    z = latent_of(small_vae, 4, height=4)
    limit_passes(monkeypatch, (2, 4, 4, 4))
    used = plant(monkeypatch, small_vae, 0, 1)
    held = []
    real = small_vae.model.trunk

    def trunk(*arguments):
        held.append((len(used), [x for x in used if x() is not None]))
        return real(*arguments)

    monkeypatch.setattr(small_vae.model, "trunk", trunk)
    list(small_vae.decode_stream(z, chunk_frames=4, strips=strips))
    # Asked at the first chunk of the first attempt, and at those two of the second.
    assert len(held) == 3 and held[0] == (0, []) and held[1] == (2, [])


def test_frames_of_half_a_chunk_are_not_given_out_again_by_strips(small_vae, monkeypatch):
    """Strips of a stream make whole chunks: of the first one, what comes after the failure."""
    z = latent_of(small_vae, 3, height=4)
    expected = small_vae.decode(z, chunk_frames=1)
    limit_passes(monkeypatch, (1, 2, 2, 2))
    plant(monkeypatch, small_vae, 1, 1)
    stream = list(small_vae.decode_stream(z, chunk_frames=1))
    assert small_vae.last_report.strips == 2
    assert [pixels.shape[2] for pixels in stream] == [1, 2, 2, 4]
    assert relative_error(torch.cat(stream, 2), expected) < BOUND


def test_whole_frames_that_do_not_fit_are_halved_too(small_vae, monkeypatch):
    """The buffer in which strips are put together is not part of a pass."""
    z = latent_of(small_vae, 5, height=4)
    expected = small_vae.decode(z)
    real, asked = torch.Tensor.new_empty, []

    def new_empty(tensor, size, **options):
        if options.get("dtype") is torch.float32 and len(size) == 5:
            asked.append(size[2])
            if size[2] > 4:
                raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        return real(tensor, size, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    got = torch.cat(list(small_vae.decode_stream(z, strips=2, chunk_frames=2)), 2)
    assert relative_error(got, expected) < 1e-5 and max(asked) > 4
    assert "5 whole frames: CUDA out of memory" in small_vae.last_report.fallbacks[0]


@pytest.mark.parametrize("free", [float("nan"), float("-inf"), "much", [1]], ids=str)
def test_free_bytes_that_are_no_number_are_refused_in_words(small_vae, free):
    with pytest.raises(GeometryError, match="free_bytes is"):
        small_vae.decode(latent_of(small_vae, 2), free_bytes=free)


def test_frames_side_by_side_with_stray_strides_are_put_in_order():
    """A size-1 dimension may have any stride, which a view in words of eight bytes refuses."""
    pairs = torch.randn(64).bfloat16().as_strided((1, 16, 1, 2, 1), (32, 1, 3, 16, 5))
    first, second = pairs.chunk(2, dim=1)
    assert torch.equal(_interleave(pairs), torch.cat((first, second), dim=2))
