"""Which chunks, passes and strips are chosen for how much memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.unit.decodes import vae_of
from tests.unit.fake_layers import fake_layers
from wan_vae.config import wan21
from wan_vae.device import allocator_named
from wan_vae.io.sink import TensorSink
from wan_vae.planning import choose as choosing
from wan_vae.planning import peak
from wan_vae.planning.choose import PlanRequest, choose

GB = 10**9
# What a CUDA context takes, and Wan 2.1's weights in bfloat16.
CONTEXT, WEIGHTS = int(0.6 * GB), int(0.26 * GB)
LATENT = (1, 16, 21, 90, 160)  # 720p, 81 frames
EAGER = PlanRequest(wan21(), LATENT, torch.bfloat16, "channels_last_3d")
KERNELS = replace(EAGER, layers=fake_layers(wan21(), "cuda", torch.bfloat16))


@pytest.mark.parametrize(
    "card_gb, height, width, strips",
    [
        (6, 90, 160, True),
        (8, 135, 240, True),
        (12, 90, 160, False),
        (24, 90, 160, False),
        (24, 135, 240, False),
    ],
)
def test_small_cards_get_strips_and_large_ones_do_not(card_gb, height, width, strips):
    free = card_gb * GB - CONTEXT - WEIGHTS
    choice = choose(replace(EAGER, latent_shape=(1, 16, 21, height, width), free_bytes=free))
    assert choice.planned_bytes < free
    assert (choice.strips > 1) == strips
    if strips:
        assert choice.chunk_frames == 1
        assert 0 < choice.extra_work < 0.25
        assert f"planned {choice.strips} strips" in choice.note and "of the work" in choice.note
    else:
        assert choice.note is None


def test_the_share_of_work_done_twice_is_that_of_the_halo():
    """Of a two-strip decode: the strips' rows, halo included, over the picture's, is a bound."""
    choice = choose(replace(EAGER, strips=2))
    # 13 halo rows at the latent's size, 7 of 720 at the picture's, where most of the work is.
    assert 2 * 7 / 720 < choice.extra_work < 2 * 13 / 90


def test_less_memory_never_means_fewer_strips_or_larger_chunks():
    small, previous = replace(EAGER, latent_shape=(1, 16, 21, 60, 104)), (99, 1)
    for free in (40 * GB, 8 * GB, 6 * GB, 4 * GB, 3 * GB, 2 * GB, GB):
        choice = choose(replace(small, free_bytes=free))
        assert choice.chunk_frames <= previous[0] and choice.strips >= previous[1]
        previous = choice.chunk_frames, choice.strips


def test_less_memory_takes_smaller_passes_then_shorter_chunks_then_more_strips():
    """With our kernels, whose chunks are wide enough to shrink; the faster ways first."""
    ways, (full, half) = [], choosing.PASSES
    for tenths in range(100, 10, -1):
        free = tenths * GB // 10
        choice = choose(replace(KERNELS, memory_format="contiguous", free_bytes=free))
        assert choice.planned_bytes < free
        ways.append((choice.strips, -choice.chunk_frames, -choice.pass_elements))
    assert ways == sorted(ways)
    assert {(1, -2, -full), (1, -2, -half)} <= set(ways)
    # Each of these also in strips, in as many as take the least.
    for part, both in ((1, {-2, -1}), (2, {-full, -half})):
        assert any({w[part] for w in ways if w[0] == count} == both for count in (2, 3, 4))


def test_a_decode_with_one_eager_layer_among_the_large_ones_is_planned_as_an_eager_one():
    """In chunks and shares of the free memory; its peak is that of the layers which run."""
    (name, *_), free = [n for n in KERNELS.layers if n.startswith("decoder.upsamples")], 6 * GB
    layers = {n: layer for n, layer in KERNELS.layers.items() if n != name}
    mixed = replace(KERNELS, layers=layers)
    assert choose(mixed).chunk_frames == choose(EAGER).chunk_frames == 1
    assert choose(KERNELS).chunk_frames == 2
    found = choose(replace(mixed, free_bytes=free))
    assert found.strips > 1 and found.planned_bytes < 0.6 * free
    whole = {"memory_format": "contiguous", "chunk_frames": 1}
    wanted, kernels, all_eager = (
        choose(replace(request, **whole)).planned_bytes for request in (mixed, KERNELS, EAGER)
    )
    assert wanted == kernels != all_eager


def test_shards_take_long_passes_of_all_frames_as_long_as_they_fit():
    part = replace(KERNELS, latent_shape=(1, 16, 21, 90, 80), shards=True)
    full, half = choosing.PASSES
    plenty = choose(part)
    assert (plenty.lengths, plenty.pass_elements, plenty.strips) == ((21,), 2 * full, 1)
    ways = []
    for tenths in range(120, 10, -1):
        choice = choose(replace(part, free_bytes=tenths * GB // 10))
        assert choice.strips == 1 and choice.wanted_bytes >= plenty.planned_bytes
        ways.append((choice.chunk_frames, choice.pass_elements, choice.planned_bytes))
    # Smaller passes first: they save more, and cost less, than shorter chunks.
    assert [w[:2] for w in dict.fromkeys(ways)][:3] == [(21, 2 * full), (21, full), (21, half)]
    assert [w[2] for w in ways] == sorted((w[2] for w in ways), reverse=True)
    assert ways[-1][0] == 1  # tried, although it is short
    asked = choose(replace(part, free_bytes=GB, chunk_frames=[5, 16]))
    assert (asked.lengths, asked.strips, asked.pass_elements) == ((5, 16), 1, half)
    # Until the first pass is done nothing can be shown or stopped.
    assert choose(replace(part, latent_shape=(1, 16, 81, 90, 80))).lengths == (32, 32, 17)


def test_a_shard_encodes_whole_chunks_as_long_as_they_fit():
    part = replace(KERNELS, latent_shape=(1, 16, 21, 90, 80), shards=True, operation="encode")
    plenty = choose(part)
    assert (plenty.chunk_frames, plenty.pass_elements, plenty.strips) == (4, None, 1)
    for frames in (3, 2, 1):
        needed = choose(replace(part, chunk_frames=frames)).planned_bytes
        assert choose(replace(part, free_bytes=needed / 0.69)).chunk_frames == frames


@pytest.mark.parametrize("operation", ["decode", "encode"])
@pytest.mark.parametrize("shards", [True, False])
def test_where_nothing_fits_that_is_taken_which_takes_least(operation, shards):
    """Two latent frames in one chunk keep no history. Ranks that took one at a time, for lack of
    memory, had the others do so too, which had room for the plan that they had made."""
    few = replace(KERNELS, latent_shape=(1, 16, 2, 1, 80), shards=shards, operation=operation)
    asked = [choose(replace(few, chunk_frames=n)) for n in (1, 2)]
    assert asked[1].planned_bytes < asked[0].planned_bytes
    assert choose(replace(few, free_bytes=0)).planned_bytes == asked[1].planned_bytes


def test_a_choice_takes_few_walks(monkeypatch):
    """Each takes a fraction of a millisecond; a choice is made before every decode."""
    walks, real = [], peak.Walk.__init__

    def counted(self, *arguments):
        walks.append(1)
        real(self, *arguments)

    monkeypatch.setattr(peak.Walk, "__init__", counted)
    large = replace(EAGER, latent_shape=(1, 16, 81, 270, 480), free_bytes=GB)
    assert choose(large).strips > 12
    assert len(walks) < 400


@pytest.mark.parametrize("whole_frames", [False, True])
def test_strips_are_planned_before_the_first_chunk(whole_frames, monkeypatch):
    vae = vae_of("wan2.1")
    z = torch.randn(1, vae.config.z_dim, 3, 60, 2)
    expected = vae.decode(z, chunk_frames=1)
    whole = vae.last_report.memory.planned_bytes
    tall = []
    real = vae.model.decoder.passes
    monkeypatch.setattr(
        vae.model.decoder,
        "passes",
        lambda x, step, strip=None: tall.append(x.shape[3]) or real(x, step, strip),
    )
    got = torch.full_like(expected, float("nan"))
    sink = TensorSink(got)
    sink.needs_whole_frames = whole_frames
    vae.decode(z, sink=sink, free_bytes=whole)
    report = vae.last_report
    assert report.strips > 1 and max(tall) < 60, "the whole picture was tried"
    assert report.memory.planned_bytes < whole == report.memory.free_bytes
    assert f"planned {report.strips} strips" in report.fallbacks[0]
    assert len(report.fallbacks) == 1
    assert (got - expected).norm() / expected.norm() < 1e-5


def test_planned_strips_that_do_not_fit_become_more(monkeypatch):
    vae = vae_of("wan2.1")
    z = torch.randn(1, vae.config.z_dim, 3, 60, 2)
    expected = vae.decode(z, chunk_frames=1)
    free = vae.last_report.memory.planned_bytes
    real = vae.model.decoder.passes

    def passes(x, step, strip=None):
        if x.shape[3] > 38:
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        yield from real(x, step, strip)

    monkeypatch.setattr(vae.model.decoder, "passes", passes)
    got = vae.decode(z, free_bytes=free)
    report = vae.last_report
    assert "planned" in report.fallbacks[0] and "planted" in report.fallbacks[1]
    assert report.strips > int(report.fallbacks[0].split()[1])
    assert (got - expected).norm() / expected.norm() < 1e-5


def test_what_was_asked_for_is_kept():
    limited = replace(EAGER, free_bytes=4 * GB)
    assert choose(replace(limited, strips=5)).strips == 5
    assert choose(replace(limited, strips=1)).strips == 1
    small = replace(limited, latent_shape=(1, 16, 21, 30, 52))
    assert choose(replace(small, chunk_frames=2)).chunk_frames == 2
    # One frame fits, 21 do not, in the smallest passes: asked for, so they are tried.
    tight = replace(small, free_bytes=GB)
    choice = choose(replace(tight, chunk_frames=21))
    assert choice.planned_bytes > GB and (choice.lengths, choice.strips) == ((21,), 1)
    assert choice.pass_elements == min(choosing.PASSES)
    assert choose(replace(tight, chunk_frames=1)).planned_bytes < GB


@pytest.mark.parametrize("operation", ["decode", "encode"])
def test_a_shard_leaves_more_free_for_it_cannot_start_again(operation):
    """480p on two H200, of which one had 2501 MiB free: a plan of 1979 MiB ran out."""
    part = replace(KERNELS, latent_shape=(1, 16, 21, 60, 52), shards=True, operation=operation)
    least = choose(replace(part, free_bytes=0)).planned_bytes
    for free in range(500, 12000, 97):
        found = choose(replace(part, free_bytes=free * 2**20))
        if found.planned_bytes > least:
            assert found.planned_bytes <= 0.7 * free * 2**20
            assert found.needed_bytes <= free * 2**20
    assert least < 0.7 * 2501 * 2**20


@pytest.mark.parametrize(
    "settings, name",
    [
        ({}, "caching"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "caching"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "expandable_segments"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:1, backend:cudaMallocAsync"}, "cudaMallocAsync"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "caching"),
    ],
)
@pytest.mark.parametrize("together, strips", [(2, (3, 4)), (4, (4, 5))])
def test_each_allocator_has_its_margin(settings, name, together, strips):
    """ComfyUI's, in 7.2 GiB: three strips of 1080p ran out there, four held (with pairs)."""
    assert allocator_named(settings) == name
    layers = fake_layers(wan21(), "cuda", torch.bfloat16, most_together=together)
    wanted = replace(KERNELS, layers=layers, latent_shape=(1, 16, 21, 136, 240))
    wanted = replace(wanted, free_bytes=7.2 * 2**30, allocator=name)
    choice = choose(wanted)
    assert choice.strips == strips[name == "cudaMallocAsync"]
    assert choice.needed_bytes <= wanted.free_bytes < choice.wanted_bytes
