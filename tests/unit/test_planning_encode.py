"""The predicted peak of encodes against encodes whose tensors are counted, and what is chosen."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests.conftest import SMALL_CONFIGS, in_pairs
from tests.unit.counted import TensorCounter
from tests.unit.decodes import vae_of
from tests.unit.fake_layers import fake_encoder_layers, fake_ops
from wan_vae import layout
from wan_vae.chunking import schedule
from wan_vae.config import wan21, wan22
from wan_vae.geometry import chunk_frames_slice
from wan_vae.io.pixels import PixelSource
from wan_vae.layout import pack_weights
from wan_vae.network import architecture
from wan_vae.network.blocks import Step
from wan_vae.network.cache import FeatureCache
from wan_vae.network.model import WanVAEModel
from wan_vae.ops.eager.forms import EagerForms
from wan_vae.ops.opset import eager_ops
from wan_vae.planning import choose as choosing
from wan_vae.planning.choose import PlanRequest, choose
from wan_vae.planning.encode_peak import EncodeMemory
from wan_vae.planning.passes import encoder_pass_frames, frames_together
from wan_vae.runs.encode import EncodeRun

GB = 10**9


def within(planned: int, measured: int, share: float = 0.15) -> None:
    assert abs(planned / measured - 1) < share, f"planned {planned}, measured {measured}"


def elements_for(config, latent_shape, frames: int, rows: int) -> int:
    """Numbers that a pass may hold, so that the first stage takes `frames` pixel frames at once."""
    b, _, _, _, w = latent_shape
    return frames * b * config.dim * rows * w * 64


# latent (B, T, H, W), chunk_frames, strips, pixel frames of a pass in the first stage (None: of the
# whole chunk)
ENCODES = [
    ((1, 4, 5, 6), 1, None, None),
    ((1, 8, 3, 4), 7, None, None),
    ((1, 5, 4, 5), [1, 1, 3], None, None),
    ((1, 1, 15, 9), 1, None, None),
    ((2, 3, 7, 5), 1, None, None),
    ((3, 1, 7, 10), 1, None, None),
    ((1, 3, 43, 2), 1, 4, None),
    ((2, 2, 30, 3), 1, 3, None),
    ((1, 1, 40, 5), 1, 3, None),
    ((1, 7, 4, 5), 7, None, 4),
    ((2, 5, 4, 3), 3, None, 2),
    ((1, 6, 36, 2), 3, 2, 4),
    ((2, 3, 30, 2), 2, 2, 2),
]
# Family, precision and memory format of each encode in turn.
KINDS = (
    ("wan2.1", "bf16", "contiguous"),
    ("wan2.2", "fp32", "channels_last_3d"),
    ("wan2.1", "fp32", "channels_last_3d"),
    ("wan2.2", "bf16", "contiguous"),
)


@pytest.mark.parametrize(
    "kind, encode",
    list(zip(itertools.cycle(KINDS), [e for e in ENCODES for _ in range(2)], strict=False)),
    ids=str,
)
def test_the_plan_is_within_15_percent_of_the_counted_peak(kind, encode, monkeypatch):
    (family, precision, memory_format), (size, chunks, strips, frames) = kind, encode
    vae = vae_of(family)
    batch, t, h, w = size
    shape = (batch, vae.config.z_dim, t, h, w)
    if frames is not None:
        rows = h if strips is None else h // strips + 9
        elements = elements_for(vae.config, shape, frames, rows)
        monkeypatch.setattr(choosing, "PASSES", (elements, elements // 2))
    fetched, real = [], PixelSource.fetch

    def fetch(source, first, last, rows):
        fetched.append(last - first)
        return real(source, first, last, rows)

    monkeypatch.setattr(PixelSource, "fetch", fetch)
    factor = vae.config.spatial_factor
    pixels = torch.rand(batch, 3, 4 * t - 3, h * factor, w * factor)
    options = {"precision": precision, "memory_format": memory_format}
    vae.encode(pixels[:, :, :1, :factor, :factor], **options)  # casts the weights
    fetched.clear()
    with TensorCounter() as counter:
        vae.encode(pixels, chunk_frames=chunks, strips=strips, **options)
    report = vae.last_report
    assert (len(fetched) > len(report.chunks) * report.strips) == (frames is not None)
    result = report.memory.output_bytes
    within(report.memory.planned_bytes, counter.peak - result, 0.03)


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2"])
def test_memory_that_stays_for_all_strips_is_taken_at_once(family, monkeypatch):
    """Between the passes of the first strip it would cut what they leave free into pieces."""
    vae, diary = vae_of(family), []
    real_room, real_part = layout.empty_like_format, EncodeRun._features

    def room(like, size):
        if size[3] == 30:  # latent rows of the whole picture
            diary.append(("room", size[2]))
        return real_room(like, size)

    def features(run, chunk, *others):
        diary.append(("part", chunk.frames))
        return real_part(run, chunk, *others)

    monkeypatch.setattr(layout, "empty_like_format", room)
    monkeypatch.setattr(EncodeRun, "_features", features)
    factor = vae.config.spatial_factor
    pixels = torch.rand(1, 3, 21, 30 * factor, factor)
    vae.encode(pixels, chunk_frames=[1, 3, 2], strips=3)
    assert diary[:6] == [("part", 1), *(("room", n) for n in (1, 3, 2)), ("part", 3), ("part", 2)]
    assert [what for what, _ in diary].count("room") == 3


def model_without_data(config, memory_format: str) -> WanVAEModel:
    """In bfloat16 on the meta device, where tensors have sizes only."""
    with torch.device("meta"):
        model = WanVAEModel(config).to(torch.bfloat16).requires_grad_(False)
        pack_weights(model.encoder, memory_format)
    return model


# Layers that have kernels where others have none.
COVERS = {
    "all": lambda name: True,
    "residual convolutions": lambda name: ".residual." in name,
    "all but residual convolutions": lambda name: ".residual." not in name,
    "all but down-samplers": lambda name: ".resample." not in name and "time_conv" not in name,
    "pixels and head": lambda name: name in (architecture.PIXEL_CONV, architecture.ENCODER_HEAD),
    "none": lambda name: False,
}
COVERED = [
    ((1, 5, 12, 10), 2, None),
    ((1, 1, 30, 20), 1, None),
    ((1, 7, 10, 8), 7, 4),
    ((2, 3, 7, 9), 1, 2),
]


@pytest.mark.parametrize("covered", COVERS)
@pytest.mark.parametrize(
    "family, memory_format",
    [("wan2.1", "contiguous"), ("wan2.1", "channels_last_3d"), ("wan2.2", "channels_last_3d")],
)
def test_kernels_for_some_layers_take_what_was_planned(family, covered, memory_format):
    config = SMALL_CONFIGS[family]
    model = model_without_data(config, memory_format)
    kernels = itertools.cycle(("cuda", "triton"))
    for (batch, *size), frames, first in COVERED:
        shape = (batch, config.z_dim, *size)
        layers = fake_encoder_layers(config, next(kernels), torch.bfloat16, COVERS[covered])
        elements = None if first is None else elements_for(config, shape, first, size[1])
        chunks, ops = schedule(size[0], frames), fake_ops(model, layers)
        peak = counted_peak(model, ops, shape, chunks, elements, first)
        memory = EncodeMemory(config, shape, torch.bfloat16, memory_format, layers)
        within(memory.of_picture(chunks, elements), peak, 0.08)


@pytest.mark.parametrize(
    "family, memory_format",
    in_pairs(["wan2.1", "wan2.2"], ["contiguous", "channels_last_3d"]),
)
def test_an_encode_without_a_library_takes_what_was_planned(family, memory_format):
    config = SMALL_CONFIGS[family]
    model = model_without_data(config, memory_format)
    forms = EagerForms("columns", "columns", joined_norm=True)
    for (batch, *size), frames, first in COVERED:
        shape = (batch, config.z_dim, *size)
        elements = None if first is None else elements_for(config, shape, first, size[1])
        chunks = schedule(size[0], frames)
        peak = counted_peak(model, eager_ops(forms), shape, chunks, elements, first)
        memory = EncodeMemory(config, shape, torch.bfloat16, memory_format, {}, forms)
        within(memory.of_picture(chunks, elements), peak, 0.08)


def counted_peak(model, ops, shape, chunks, elements, first) -> int:
    """Bytes at the peak of an encode of `chunks` without data, by the tensors that there are."""
    (batch, _, _, *size), config = shape, model.config
    limits = ()
    if elements is not None:
        limits = encoder_pass_frames(config, shape, elements, frames_together(ops.layers))
    assert first is None or limits[0] == first
    height, width = (n * config.spatial_factor for n in size)
    cache = FeatureCache()

    def pixels(a, b):
        size = (batch, b - a, height, width, 3)
        return torch.empty(size, dtype=torch.bfloat16, device="meta").movedim(-1, 1)

    with torch.inference_mode(), TensorCounter() as counter:
        for chunk in chunks:
            step = Step(cache, chunk, ops=ops, pass_frames=limits)
            start, stop = chunk_frames_slice(chunk.start, chunk.stop, config)
            features = run_to_the_end(model.encode_stages(pixels, stop - start, step))
            mean, _ = model.moments(features, step)
            assert mean.device.type == "meta"  # held until the next chunk is done
    return counter.peak


def run_to_the_end(stages) -> torch.Tensor:
    while True:
        try:
            next(stages)
        except StopIteration as stop:
            return stop.value


# -- what is chosen --------------------------------------------------------------------------------

CONTEXT, WEIGHTS = int(0.6 * GB), int(0.26 * GB)
LATENT = (1, 16, 21, 90, 160)  # 720p, 81 frames
EAGER = PlanRequest(
    wan21(), LATENT, torch.bfloat16, "channels_last_3d", operation="encode", staged=True
)
KERNELS = replace(EAGER, layers=fake_encoder_layers(wan21(), "cuda", torch.bfloat16))


@pytest.mark.parametrize("request_of", [EAGER, KERNELS], ids=["eager", "kernels"])
@pytest.mark.parametrize("card_gb, height, width", [(6, 90, 160), (8, 135, 240), (6, 135, 240)])
def test_small_cards_get_a_plan_that_fits(request_of, card_gb, height, width):
    free = card_gb * GB - CONTEXT - WEIGHTS
    choice = choose(replace(request_of, latent_shape=(1, 16, 21, height, width), free_bytes=free))
    assert choice.planned_bytes < free
    assert choice.note is None or "no number of strips" not in choice.note
    assert 0 <= choice.extra_work < 0.4


def test_less_memory_takes_smaller_passes_then_shorter_chunks_then_more_strips():
    ways, full = [], choosing.PASSES[0]
    for tenths in range(100, 8, -2):
        free = tenths * GB // 10
        choice = choose(replace(KERNELS, free_bytes=free))
        assert choice.planned_bytes < free
        ways.append((choice.strips, -choice.chunk_frames, -choice.pass_elements))
    assert ways == sorted(ways)
    assert (1, -2, -full) in ways and max(ways)[0] > 2


def test_kernels_take_longer_chunks_than_the_eager_backend():
    assert (choose(KERNELS).chunk_frames, choose(EAGER).chunk_frames) == (2, 1)
    one = next(n for n in KERNELS.layers if n.startswith("encoder.downsamples"))
    mixed = {name: layer for name, layer in KERNELS.layers.items() if name != one}
    assert choose(replace(KERNELS, layers=mixed)).chunk_frames == 1


def test_the_pixels_of_two_passes_are_counted_where_they_come_from_the_host():
    on_device = choose(replace(KERNELS, staged=False)).planned_bytes
    together = frames_together(KERNELS.layers)
    frames = encoder_pass_frames(wan21(), LATENT, choosing.PASSES[0], together)[0]
    assert frames == 4
    raw = 2 * 3 * frames * 720 * 1280 * 4
    assert choose(KERNELS).planned_bytes == on_device + raw


def test_wide_videos_of_wan22_are_planned_too():
    request = replace(EAGER, config=wan22(), latent_shape=(1, 48, 31, 44, 80), free_bytes=5 * GB)
    choice = choose(request)
    assert choice.planned_bytes < 5 * GB
