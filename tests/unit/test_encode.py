"""Encodes: the same latent from any chunks, passes and strips, and from memory that runs out."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from tests.conftest import SMALL_CONFIGS, in_pairs, quick_with, random_state
from tests.unit.decodes import relative_error, vae_of
from wan_vae import WanVAE, geometry
from wan_vae.chunking import Chunk, Pass
from wan_vae.config import wan21
from wan_vae.errors import DecodeCancelled, DecodeMemoryError, GeometryError, LatentError
from wan_vae.geometry import Strip
from wan_vae.io.image import frames_to_pixels, frames_view
from wan_vae.io.pixels import PixelSource
from wan_vae.network import encoder
from wan_vae.network.blocks import Step
from wan_vae.network.model import WanVAEModel, result_of
from wan_vae.planning import choose

# As for decodes: on the CPU a convolution of another size may add in another order.
BOUND = 1e-5


def video(vae, frames=9, height=5, width=3, batch=1, seed=0) -> torch.Tensor:
    """height, width: in latent pixels."""
    factor = vae.config.spatial_factor
    generator = torch.Generator().manual_seed(seed)
    size = (batch, 3, frames, height * factor, width * factor)
    return torch.rand(size, generator=generator) * 2 - 1


def small_passes(monkeypatch, vae, pixels, frames: int) -> None:
    """Let the first stage of an encode take `frames` pixel frames at once."""
    b, _, _, h, w = geometry.latent_shape(tuple(pixels.shape), vae.config)
    elements = frames * b * vae.config.dim * h * w * 64
    monkeypatch.setattr(choose, "PASSES", (elements, elements // 2))


@pytest.fixture
def fetched(monkeypatch) -> list[tuple[int, int, int]]:
    """First frame, frames and rows of all pixels that are fetched from here on."""
    found, real = [], PixelSource.fetch

    def fetch(source, first, last, rows):
        x = real(source, first, last, rows)
        found.append((first, x.shape[2], x.shape[3]))
        return x

    monkeypatch.setattr(PixelSource, "fetch", fetch)
    return found


@pytest.mark.parametrize(
    "size, family", in_pairs([(1, 13, 11), (2, 5, 9), (1, 1, 7)], list(SMALL_CONFIGS))
)
def test_strips_give_the_latent_of_the_whole_picture(family, size, fetched):
    batch, frames, height = size
    vae = vae_of(family)
    pixels = video(vae, frames, height, 2, batch)
    expected = vae.encode(pixels, chunk_frames=1)
    fetched.clear()
    for strips in (1, 2, 5, height):
        got = vae.encode(pixels, strips=strips, chunk_frames=2)
        assert relative_error(got, expected) < BOUND
        assert vae.last_report.strips == strips
    # A strip of one latent row reads no more than it and its halo.
    halo = geometry.encoder_halos(vae.config)[0]
    most = (halo.before + halo.after) * vae.config.patch_size + vae.config.spatial_factor
    assert min(rows for *_, rows in fetched) < most
    assert max(rows for *_, rows in fetched[-height:]) <= most


@pytest.mark.parametrize("family", SMALL_CONFIGS)
@pytest.mark.parametrize("frames", [2, 4, 8])
@pytest.mark.parametrize("chunks", [1, 3, [1, 3], [4]])
def test_passes_give_the_latent_of_whole_chunks(family, frames, chunks, fetched, monkeypatch):
    vae = vae_of(family)
    pixels = video(vae, 13, 4, 3)
    expected = vae.encode(pixels, chunk_frames=1)
    small_passes(monkeypatch, vae, pixels, frames)
    fetched.clear()
    assert relative_error(vae.encode(pixels, chunk_frames=chunks), expected) < BOUND
    assert sum(n for _, n, _ in fetched) == 13 and max(n for _, n, _ in fetched) <= frames
    assert [first for first, *_ in fetched] == sorted(first for first, *_ in fetched)


def test_the_first_frame_of_a_video_goes_alone_and_the_rest_in_even_passes():
    config = wan21()
    whole = Pass(0, 21, Chunk(0, 6, True, True))
    assert [whole.at_stage(i, config) for i in range(4)] == [21, 21, 11, 6]
    assert whole.split(0, (), config) == whole.split(0, (21, 2, 2), config) == [whole]
    parts = whole.split(0, (8, 8, 8), config)
    assert [(p.first, p.last) for p in parts] == [(0, 1), (1, 9), (9, 17), (17, 21)]
    assert [p.chunk.is_first for p in parts] == [True, False, False, False]
    assert [p.chunk.is_last for p in parts] == [False, False, False, True]
    assert not any(p.chunk.is_only_frame for p in parts)
    # The third stage has half as many frames: its passes are twice as long in pixel frames.
    assert [(p.first, p.last) for p in whole.split(2, (2, 2, 4), config)] == [
        (0, 1),
        (1, 9),
        (9, 17),
        (17, 21),
    ]
    later = Pass(0, 8, Chunk(6, 8, False, False))
    assert [(p.first, p.last) for p in later.split(0, (2, 4, 4), config)] == [
        (0, 2),
        (2, 4),
        (4, 6),
        (6, 8),
    ]


@pytest.mark.parametrize("family", SMALL_CONFIGS)
def test_strips_are_exact_and_no_row_of_their_halo_can_be_left_out(family, monkeypatch):
    """In double precision, where rounding hides nothing."""
    config = SMALL_CONFIGS[family]
    model = WanVAEModel(config).requires_grad_(False).double()
    model.load_state_dict({k: v.double() for k, v in random_state(config).items()})
    factor, latent_rows = config.spatial_factor, 14
    generator = torch.Generator().manual_seed(1)
    size = (1, 3, 1, latent_rows * factor, factor)
    pixels = torch.rand(size, generator=generator, dtype=torch.float64)
    step = Step.whole_clip(1)

    def strips() -> torch.Tensor:
        found = []
        for strip in geometry.strips(latent_rows, 2, config):
            halo = encoder.encoder_halos(config)[0]
            top, bottom = strip.bounds(factor // config.patch_size, halo)
            rows = pixels[:, :, :, top * config.patch_size : bottom * config.patch_size]
            found.append(result_of(model.encode_stages(lambda *_, x=rows: x, 1, step, strip)))
        return torch.cat(found, 3)

    expected = result_of(model.encode_stages(lambda *_: pixels, 1, step))
    assert relative_error(strips(), expected) < 1e-14
    right = geometry.encoder_halos(config)
    assert right == ((30, 36), (12, 16), (4, 6))
    for i, side in itertools.product(range(3), range(2)):
        less = [list(halo) for halo in right]
        less[i][side] -= 2
        wrong = tuple(geometry.Halo(*halo) for halo in less)
        monkeypatch.setattr(encoder, "encoder_halos", lambda _, wrong=wrong: wrong)
        assert relative_error(strips(), expected) > 1e-12, f"stage {i}, side {side}"


def test_a_strip_at_the_edge_reads_nothing_beyond_it():
    top, bottom = Strip(0, 2, 20, 0), Strip(18, 20, 20, 0)
    assert top.bounds(8, geometry.Halo(30, 36)) == (0, 52)
    assert bottom.bounds(8, geometry.Halo(30, 36)) == (114, 160)


@pytest.mark.parametrize("how", ["contiguous", "channels_last_3d", "image", "sliced"])
def test_the_format_of_the_pixels_changes_no_bit(small_vae, how):
    pixels = video(small_vae)
    other = pixels
    if how == "channels_last_3d":
        other = pixels.contiguous(memory_format=torch.channels_last_3d)
    elif how == "image":
        other = pixels[0].permute(1, 2, 3, 0).contiguous().movedim(-1, 0).unsqueeze(0)
    elif how == "sliced":
        wide = torch.full((*pixels.shape[:-1], 2 * pixels.shape[-1]), float("nan"))
        wide[..., ::2] = pixels
        other = wide[..., ::2]
    for strips in (None, 2):
        expected = small_vae.encode(pixels, strips=strips)
        assert torch.equal(small_vae.encode(other, strips=strips), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frames_of_an_image_are_scaled_on_the_way_to_the_bits_of_before(small_vae, precision):
    factor = small_vae.config.spatial_factor
    image = torch.rand(6, 2 * factor + 3, factor + 1, 4)  # cropped, and with an alpha channel
    view = frames_view(image)
    assert view.data_ptr() == image.data_ptr(), "the clip was copied"
    expected = small_vae.encode(frames_to_pixels(image), precision=precision)
    got = small_vae.encode(view, unit_range=True, precision=precision)
    assert torch.equal(got, expected)
    assert small_vae.last_report.warnings == ()


# -- values of the pixels --------------------------------------------------------------------------


@pytest.mark.parametrize("strips", [None, 2])
def test_pixels_that_are_not_finite_are_refused_by_frame(small_vae, strips):
    pixels = video(small_vae, 9)
    pixels[0, 1, 3, 0, 0], pixels[0, 2, 7, -1, 5] = float("nan"), float("inf")
    with pytest.raises(LatentError, match=r"2 of 9 frames \(3, 7\)"):
        small_vae.encode(pixels, strips=strips)
    assert small_vae.last_report.status == "failed"


@pytest.mark.parametrize("unit_range, value", [(False, 255.0), (True, 128.0)])
def test_pixels_far_out_of_range_are_warned_about(small_vae, unit_range, value):
    pixels = video(small_vae, 5)
    pixels[0, 0, 4, 0, 0] = value
    small_vae.encode(pixels, unit_range=unit_range)
    (warning,) = small_vae.last_report.warnings
    assert "values reach 255" in warning


@pytest.mark.parametrize("strips", [None, 2])
@pytest.mark.parametrize(
    "precision, advice", [("fp32", "damaged checkpoint"), ("fp16", "precision='fp32'")]
)
def test_a_latent_that_overflows_is_warned_about(precision, advice, strips):
    """As a decode warns of its pixels: a sampler would only make black frames of it."""
    state = random_state(SMALL_CONFIGS["wan2.1"])
    large = 3e38 if precision == "fp32" else 6e4
    state["conv1.weight"] = torch.full_like(state["conv1.weight"], large)
    vae = WanVAE.from_state_dict(state, device="cpu")
    latent = vae.encode(torch.rand(1, 3, 5, 32, 32), strips=strips, precision=precision)
    assert not latent.isfinite().all()
    (warning,) = (w for w in vae.last_report.warnings if "NaN" in w)
    assert warning.startswith("the encoded latent holds NaN or inf") and advice in warning
    assert vae.last_report.status == "done"


# -- cancel ----------------------------------------------------------------------------------------


def test_an_encode_of_one_pass_asks_before_each_stage_and_the_trunk(small_vae, monkeypatch):
    """On the CPU, where each takes its time, a cancel need not wait for all of them."""
    trunks, asked, pixels = [], [], video(small_vae, 5)
    trunk = encoder.Encoder.trunk
    monkeypatch.setattr(encoder.Encoder, "trunk", lambda *a: trunks.append(1) or trunk(*a))
    small_vae.encode(pixels, should_stop=lambda: asked.append(1) or False)
    # Before each stage but the last one, which is the trunk's; behind them; before the trunk.
    assert len(asked) == len(small_vae.config.dim_mult) + 1 and len(trunks) == 1
    for calls in (2, len(asked)):
        answers = [False] * (calls - 1) + [True]
        with pytest.raises(DecodeCancelled, match="after 0 of 5"):
            small_vae.encode(pixels, should_stop=partial(answers.pop, 0))
        assert answers == [] and len(trunks) == 1


# -- memory ----------------------------------------------------------------------------------------


def plant_out_of_memory(monkeypatch, owner, name: str, fails) -> None:
    """Let the method `name` of `owner` raise as CUDA would when `fails(x)` says so."""
    real = getattr(owner, name)

    def method(x, *arguments):
        if fails(x):
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        return real(x, *arguments)

    monkeypatch.setattr(owner, name, method)


@quick_with("wan2.2")
def test_out_of_memory_starts_again_with_half_the_chunk(small_vae, monkeypatch):
    pixels = video(small_vae, 25, 2, 2)
    expected = small_vae.encode(pixels, chunk_frames=2)
    plant_out_of_memory(monkeypatch, small_vae.encoder.conv1, "forward", lambda x: x.shape[2] > 8)
    assert torch.equal(small_vae.encode(pixels, chunk_frames=7), expected)
    report = small_vae.last_report
    assert [c.stop - c.start for c in report.chunks] == [2, 2, 2, 1]
    assert report.fallbacks == (
        "chunk of 7 latent frames: CUDA out of memory (planted); started again with 4",
        "chunk of 4 latent frames: CUDA out of memory (planted); started again with 2",
    )


@pytest.mark.parametrize(
    "small_vae, layer",
    in_pairs(list(SMALL_CONFIGS), ["conv1", "downsamples.0"]),
    indirect=["small_vae"],
)
def test_out_of_memory_at_one_frame_goes_on_in_strips(small_vae, monkeypatch, layer):
    pixels = video(small_vae, 9, 20, 1)
    expected = small_vae.encode(pixels, strips=4, chunk_frames=1)
    module, rows = small_vae.encoder.get_submodule(layer), []
    plant_out_of_memory(
        monkeypatch, module, "forward", lambda x: rows.append(x.shape[3]) or x.shape[3] > 110
    )
    assert relative_error(small_vae.encode(pixels), expected) < BOUND
    report = small_vae.last_report
    assert report.strips == 4 and report.status == "done"
    assert "chunk of 1 latent frame: CUDA out of memory (planted)" in report.fallbacks
    assert report.fallbacks[-1].startswith("2 strips: strip of")
    assert rows[-1] <= 110


@quick_with("wan2.1")
def test_out_of_memory_in_a_later_chunk_or_in_the_trunk_starts_again_too(small_vae, monkeypatch):
    pixels = video(small_vae, 17, 6, 1)
    expected = small_vae.encode(pixels, strips=4, chunk_frames=1)
    calls: list[int] = []

    def third_in_whole_frames(x):
        calls.append(x.shape[3])
        return len(calls) == 5 or (len(calls) == 20)

    plant_out_of_memory(monkeypatch, small_vae.encoder.head["2"], "operand", third_in_whole_frames)
    got = small_vae.encode(pixels, chunk_frames=1)
    report = small_vae.last_report
    assert report.strips > 1 and report.status == "done" and len(report.fallbacks) >= 1
    assert relative_error(got, expected) < BOUND


@quick_with("wan2.2")
def test_strips_that_were_asked_for_are_kept(small_vae, monkeypatch):
    pixels = video(small_vae, 17, 6, 1)
    expected = small_vae.encode(pixels, strips=2, chunk_frames=2)
    plant_out_of_memory(monkeypatch, small_vae.encoder.conv1, "forward", lambda x: x.shape[2] > 8)
    got = small_vae.encode(pixels, strips=2, chunk_frames=5)
    assert relative_error(got, expected) < BOUND
    assert small_vae.last_report.strips == 2
    assert [c.stop - c.start for c in small_vae.last_report.chunks] == [2, 1, 2]


@quick_with("wan2.1")
def test_out_of_memory_everywhere_is_one_error_that_says_what_was_tried(small_vae, monkeypatch):
    plant_out_of_memory(monkeypatch, small_vae.encoder.conv1, "forward", lambda x: True)
    with pytest.raises(
        DecodeMemoryError, match=r"encoding 5 frames of .*one latent frame a chunk and 5 strip"
    ):
        small_vae.encode(video(small_vae, 5))
    report = small_vae.last_report
    assert report.status == "failed" and len(report.fallbacks) == 5


@pytest.mark.parametrize("family", SMALL_CONFIGS)
def test_little_memory_plans_strips_whose_pixels_alone_are_fetched(family, fetched):
    vae = vae_of(family)
    pixels = video(vae, 9, 30, 1)
    expected = vae.encode(pixels, chunk_frames=1)
    whole = vae.last_report.memory.planned_bytes
    fetched.clear()
    got = vae.encode(pixels, free_bytes=whole)
    report = vae.last_report
    assert report.strips > 1 and report.memory.planned_bytes < whole == report.memory.free_bytes
    assert len(report.fallbacks) == 1 and f"planned {report.strips} strips" in report.fallbacks[0]
    assert max(rows for *_, rows in fetched) < pixels.shape[3]
    assert relative_error(got, expected) < BOUND


def test_impossible_strips_are_refused_at_once(small_vae):
    for strips in (0, 6, 1.5):
        with pytest.raises(GeometryError):
            small_vae.encode(video(small_vae, 1), strips=strips)


# -- progress and cancel ---------------------------------------------------------------------------


def test_progress_goes_by_chunk_and_by_strip(small_vae):
    pixels, seen = video(small_vae, 9, 4, 1), []

    def on_progress(done, total, report):
        seen.append((done, total, report.status))

    small_vae.encode(pixels, chunk_frames=1, on_progress=on_progress)
    assert seen == [(n, 9, "running") for n in (1, 5, 9)]
    seen.clear()
    small_vae.encode(pixels, chunk_frames=1, strips=2, on_progress=on_progress)
    assert [done for done, *_ in seen] == [0, 2, 4, 5, 7, 9, 9, 9, 9]


def test_an_encode_stops_between_passes(small_vae, fetched, monkeypatch):
    pixels = video(small_vae, 13, 4, 1)
    small_passes(monkeypatch, small_vae, pixels, 2)
    with pytest.raises(DecodeCancelled, match="after 0 of 13"):
        small_vae.encode(pixels, chunk_frames=4, should_stop=lambda: len(fetched) == 3)
    assert len(fetched) == 3 and small_vae.last_report.status == "cancelled"
