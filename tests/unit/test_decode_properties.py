"""Promise 2 on the eager backend: the pixels do not depend on schedule, formats, strips or batch.

Reference: the contiguous decode, one latent frame at a time. On the CPU backend a convolution may
choose another blocking for another size, so its sums can round differently: the bound is a
relative 1e-5 in float32, stated here, and what is equal bit for bit is asserted as such.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import SMALL_CONFIGS, in_pairs, quick_with, random_state
from tests.unit.decodes import relative_error, schedules, vae_of
from wan_vae import WanVAE
from wan_vae.errors import (
    BackendError,
    DecodeCancelled,
    DecodeMemoryError,
    GeometryError,
    LatentError,
    LayoutError,
    OutputError,
)

BOUND = 1e-5


def latent_of(vae, frames=4, height=5, width=3, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, vae.config.z_dim, frames, height, width, generator=generator)


def reformat(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in another memory format or as a view."""
    if how == "channels_last_3d":
        return x.contiguous(memory_format=torch.channels_last_3d)
    if how == "permuted":
        return x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    if how == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


@st.composite
def decodes(draw):
    lengths = draw(schedules())
    height = draw(st.integers(1, 6))
    return {
        "size": (sum(lengths), height, draw(st.integers(1, 6)), draw(st.integers(1, 2))),
        "chunk_frames": lengths,
        "memory_format": draw(st.sampled_from(["contiguous", "channels_last_3d"])),
        "latent_format": draw(
            st.sampled_from(["contiguous", "channels_last_3d", "permuted", "sliced"])
        ),
        "strips": draw(st.one_of(st.none(), st.integers(1, height))),
    }


@settings(max_examples=20, deadline=None)
@given(case=decodes())
@pytest.mark.parametrize("family", SMALL_CONFIGS)
def test_any_schedule_format_and_strip_count_gives_the_same_pixels(family, case):
    vae = vae_of(family)
    z = latent_of(vae, *case["size"])
    expected = vae.decode(z, chunk_frames=1, memory_format="contiguous")
    pixels = vae.decode(
        reformat(z, case["latent_format"]),
        chunk_frames=case["chunk_frames"],
        memory_format=case["memory_format"],
        strips=case["strips"],
    )
    assert relative_error(pixels, expected) < BOUND
    assert vae.last_report.layout.mixed_calls == 0


@pytest.mark.parametrize("how", ["channels_last_3d", "permuted", "sliced"])
def test_the_format_of_the_latent_changes_no_bit(small_vae, how):
    z = latent_of(small_vae)
    assert torch.equal(small_vae.decode(reformat(z, how)), small_vae.decode(z))


@pytest.mark.parametrize("how", ["channels_last_3d", "permuted", "sliced"])
def test_the_format_of_the_checkpoint_changes_no_bit(small_vae, how):
    state = small_vae.model.state_dict()
    odd = {k: reformat(v, how) if v.ndim == 5 else v for k, v in state.items()}
    other = WanVAE.from_state_dict(odd, device="cpu")
    z = latent_of(small_vae)
    assert torch.equal(other.decode(z), small_vae.decode(z, memory_format="contiguous"))
    found = other.last_report.layout.weights_found
    if how == "channels_last_3d":
        assert found["channels_last_3d"] > 0 and found["contiguous"] == 0
        assert found["either"] > 0, "1x1x1 kernels carry no information"
    else:
        assert found["other"] > 0


def test_repeats_are_equal_bit_for_bit(small_vae):
    z = latent_of(small_vae)
    assert torch.equal(small_vae.decode(z), small_vae.decode(z))


def test_switching_formats_back_and_forth_leaves_nothing_behind(small_vae):
    z = latent_of(small_vae)
    first = small_vae.decode(z, memory_format="contiguous")
    small_vae.decode(z, memory_format="channels_last_3d")
    assert torch.equal(small_vae.decode(z, memory_format="contiguous"), first)


def test_the_first_frames_do_not_depend_on_later_ones(small_vae):
    """Causality: the decode of a prefix is the prefix of the decode."""
    z = latent_of(small_vae, frames=5)
    whole = small_vae.decode(z, chunk_frames=1)
    assert relative_error(small_vae.decode(z[:, :, :3], chunk_frames=1), whole[:, :, :9]) < BOUND


def test_a_batch_is_its_samples(small_vae):
    z = latent_of(small_vae, batch=3)
    together = small_vae.decode(z)
    for i in range(3):
        assert relative_error(together[i : i + 1], small_vae.decode(z[i : i + 1])) < BOUND


def test_an_image_equals_the_first_frame_of_a_video(small_vae):
    """T = 1 takes the last temporal slice of each kernel; the result is that of zero history."""
    z = latent_of(small_vae, frames=2)
    image = small_vae.decode(z[:, :, :1])
    assert relative_error(image, small_vae.decode(z)[:, :, :1]) < BOUND


def test_stream_gives_the_same_frames_as_decode(small_vae):
    z = latent_of(small_vae, frames=4)
    chunks = list(small_vae.decode_stream(z, chunk_frames=1))
    assert [c.shape[2] for c in chunks] == [1, 4, 4, 4]
    assert torch.equal(torch.cat(chunks, 2), small_vae.decode(z, chunk_frames=1))
    assert small_vae.last_report.status == "done"
    assert not torch.is_inference_mode_enabled()


def test_an_abandoned_stream_is_reported_as_cancelled(small_vae):
    stream = small_vae.decode_stream(latent_of(small_vae), chunk_frames=1)
    next(stream)
    stream.close()
    assert small_vae.last_report.status == "cancelled"
    assert small_vae.last_report.done_frames == 1


def test_out_is_written_in_place(small_vae):
    z = latent_of(small_vae)
    expected = small_vae.decode(z)
    for strips in (None, 2):
        out = torch.full_like(expected, float("nan"))
        assert small_vae.decode(z, out=out, strips=strips) is out
        assert relative_error(out, expected) < BOUND


def test_wrong_out_is_refused(small_vae):
    with pytest.raises(OutputError, match="expected"):
        small_vae.decode(latent_of(small_vae), out=torch.empty(1, 3, 4, 5, 6))


def test_progress_counts_frames_up_to_the_total(small_vae):
    seen = []
    small_vae.decode(
        latent_of(small_vae, frames=4),
        chunk_frames=1,
        on_progress=lambda done, total, report: seen.append((done, total, report.status)),
    )
    assert seen == [(n, 13, "running") for n in (1, 5, 9, 13)]


def test_stop_is_honoured_within_one_chunk(small_vae):
    done = []
    with pytest.raises(DecodeCancelled, match="9 of 17 frames"):
        small_vae.decode(
            latent_of(small_vae, frames=5),
            chunk_frames=1,
            on_progress=lambda n, total, report: done.append(n),
            should_stop=lambda: len(done) == 3,
        )
    assert small_vae.last_report.status == "cancelled"
    # Nothing is left behind: the next decode is right.
    z = latent_of(small_vae, frames=5)
    assert torch.equal(small_vae.decode(z), small_vae.decode(z))


def test_precision_is_honoured_and_leaves_the_weights_alone(small_vae):
    z = latent_of(small_vae)
    expected = small_vae.decode(z)
    half = small_vae.decode(z, precision="bf16")
    assert small_vae.last_report.dtype == "bfloat16"
    assert 0 < relative_error(half, expected) < 0.1
    assert torch.equal(small_vae.decode(z), expected)


def test_normalized_latents_are_denormalised():
    config = SMALL_CONFIGS["wan2.1"]
    vae = WanVAE.from_state_dict(random_state(config), device="cpu")
    z = latent_of(vae)
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    assert relative_error(vae.decode((z - mean) / std, normalized=True), vae.decode(z)) < BOUND
    pixels = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    latent = vae.encode(pixels)
    assert torch.allclose(vae.encode(pixels, normalized=True) * std + mean, latent, atol=1e-5)


@pytest.mark.parametrize("chunks", [2, 3, [1, 2], [3]])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last_3d"])
def test_encode_does_not_depend_on_schedule_or_format(small_vae, chunks, memory_format):
    s = small_vae.config.spatial_factor
    pixels = torch.rand(1, 3, 9, 2 * s, 3 * s, generator=torch.Generator().manual_seed(5)) * 2 - 1
    expected = small_vae.encode(pixels, chunk_frames=1, memory_format="contiguous")
    got = small_vae.encode(
        reformat(pixels, memory_format), chunk_frames=chunks, memory_format=memory_format
    )
    assert relative_error(got, expected) < BOUND
    assert small_vae.last_report.layout.mixed_calls == 0


def test_encode_crops_frames_and_rows_that_have_no_latent(small_vae):
    s = small_vae.config.spatial_factor
    pixels = torch.rand(1, 3, 7, 2 * s + 3, s + 2) * 2 - 1
    latent = small_vae.encode(pixels)
    assert latent.shape == (1, small_vae.config.z_dim, 2, 2, 1)
    assert torch.equal(latent, small_vae.encode(pixels[:, :, :5, 1 : 1 + 2 * s, 1 : 1 + s]))


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda v, z: v.decode(z[:, :7]), LatentError),
        (lambda v, z: v.decode(z[0, 0]), LatentError),
        (lambda v, z: v.decode(z[:, :, :0]), LatentError),
        (lambda v, z: v.decode(z * float("nan")), LatentError),
        (lambda v, z: v.decode(z, chunk_frames=0), GeometryError),
        (lambda v, z: v.decode(z, chunk_frames=[1]), GeometryError),
        (lambda v, z: v.decode(z, strips=99), GeometryError),
        (lambda v, z: v.decode(z, memory_format="nchw"), LayoutError),
        (lambda v, z: v.decode(z, precision="fp8"), BackendError),
        (lambda v, z: v.encode(z), LatentError),
        (lambda v, z: v.encode(torch.zeros(1, 3, 1, 2, 2)), GeometryError),
    ],
)
def test_wrong_arguments_are_refused_at_once(small_vae, call, error):
    with pytest.raises(error) as caught:
        call(small_vae, latent_of(small_vae))
    assert "\n" not in str(caught.value)


# -- out of memory: planted, because the CPU has no such limit ----------------------------------


def plant_out_of_memory(monkeypatch, vae, fails):
    """Let passes of the decoder raise as CUDA would when `fails(rows, frames)` says so.

    Asked before each pass, with the latent rows and frames that it is a part of.
    """
    real = vae.model.decoder.passes

    def passes(x, step, strip=None):
        rows, frames = x.shape[3], x.shape[2]
        made = real(x, step, strip)
        del x
        while True:
            if fails(rows, frames):
                raise torch.OutOfMemoryError("CUDA out of memory (planted)")
            yield next(made)

    monkeypatch.setattr(vae.model.decoder, "passes", passes)


@quick_with("wan2.1")
def test_out_of_memory_starts_again_with_half_the_chunk(small_vae, monkeypatch):
    z = latent_of(small_vae, frames=7)
    expected = small_vae.decode(z, chunk_frames=1)
    plant_out_of_memory(monkeypatch, small_vae, lambda rows, frames: frames > 2)
    assert relative_error(small_vae.decode(z, chunk_frames=7), expected) < BOUND
    report = small_vae.last_report
    assert [c.stop - c.start for c in report.chunks] == [2, 2, 2, 1]
    assert report.fallbacks == (
        "chunk of 7 latent frames: CUDA out of memory (planted); started again with 4",
        "chunk of 4 latent frames: CUDA out of memory (planted); started again with 2",
    )


# Each family with one of the two; `make test-all` takes both with both.
one_of_two_ways = pytest.mark.parametrize(
    "small_vae, whole_frames",
    in_pairs(list(SMALL_CONFIGS), [False, True]),
    indirect=["small_vae"],
)


@one_of_two_ways
def test_out_of_memory_at_one_frame_goes_on_in_strips(small_vae, monkeypatch, whole_frames):
    z = latent_of(small_vae, frames=3, height=60, width=2)
    expected = small_vae.decode(z, chunk_frames=1)
    plant_out_of_memory(monkeypatch, small_vae, lambda rows, frames: rows > 42)
    got = torch.cat(list(small_vae.decode_stream(z)), 2) if whole_frames else small_vae.decode(z)
    assert relative_error(got, expected) < BOUND
    report = small_vae.last_report
    assert report.strips == 4
    assert "chunk of 1 latent frame: CUDA out of memory (planted)" in report.fallbacks
    assert report.fallbacks[-1] == "2 strips: strip of 43 latent rows: CUDA out of memory (planted)"


@one_of_two_ways
def test_strips_that_were_asked_for_start_again_with_half_the_chunk(
    small_vae, monkeypatch, whole_frames
):
    z = latent_of(small_vae, frames=5, height=6, width=2)
    expected = small_vae.decode(z, chunk_frames=1)
    plant_out_of_memory(monkeypatch, small_vae, lambda rows, frames: frames > 2)
    options = {"strips": 2, "chunk_frames": 5}
    if whole_frames:
        got = torch.cat(list(small_vae.decode_stream(z, **options)), 2)
    else:
        got = small_vae.decode(z, **options)
    assert relative_error(got, expected) < BOUND
    report = small_vae.last_report
    assert report.strips == 2
    assert [c.stop - c.start for c in report.chunks] == [2, 1, 2]
    assert report.fallbacks == (
        "2 strips: strip of 6 latent rows: CUDA out of memory (planted); started again with 3",
        "2 strips: strip of 6 latent rows: CUDA out of memory (planted); started again with 2",
    )


@quick_with("wan2.2")
def test_out_of_memory_in_the_middle_of_a_stream_repeats_no_frame(small_vae, monkeypatch):
    z = latent_of(small_vae, frames=3, height=60, width=2)
    expected = small_vae.decode(z, chunk_frames=1)
    calls = []

    def fails(rows, frames):
        calls.append(rows)
        return rows == 60 and len(calls) > 2

    plant_out_of_memory(monkeypatch, small_vae, fails)
    chunks = list(small_vae.decode_stream(z, chunk_frames=1))
    assert sum(c.shape[2] for c in chunks) == 9
    assert relative_error(torch.cat(chunks, 2), expected) < BOUND


@quick_with("wan2.1")
def test_out_of_memory_everywhere_is_one_error_with_numbers(small_vae, monkeypatch):
    plant_out_of_memory(monkeypatch, small_vae, lambda rows, frames: True)
    with pytest.raises(DecodeMemoryError, match=r"strip.*free device memory"):
        small_vae.decode(latent_of(small_vae))
    assert small_vae.last_report.status == "failed"


def test_overflow_is_reported_and_not_passed_over(monkeypatch):
    vae = vae_of("wan2.1")
    real = vae.model.decoder.passes
    monkeypatch.setattr(
        vae.model.decoder,
        "passes",
        lambda x, step, strip=None: (pixels * float("nan") for pixels in real(x, step, strip)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vae.decode(latent_of(vae))
    assert "NaN" in vae.last_report.warnings[0]
