"""The predicted peak against decodes whose tensors are counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.conftest import SMALL_CONFIGS, in_pairs, pass_elements, random_state
from tests.unit.counted import TensorCounter
from tests.unit.decodes import vae_of
from tests.unit.fake_layers import fake_layers, fake_ops
from wan_vae import WanVAE, geometry
from wan_vae.chunking import Chunk, PassEnds, schedule
from wan_vae.config import qwen21, wan21, wan22
from wan_vae.io.sink import CallbackSink
from wan_vae.layout import pack_weights
from wan_vae.network import architecture
from wan_vae.network.blocks import Step
from wan_vae.network.cache import FeatureCache
from wan_vae.network.model import WanVAEModel
from wan_vae.ops.eager.forms import EagerForms
from wan_vae.planning import choose, passes
from wan_vae.planning.choose import PlanRequest
from wan_vae.planning.passes import frames_together, pass_ends, pass_frames
from wan_vae.planning.peak import DecodeMemory

FORMATS = ("contiguous", "channels_last_3d")


def within(planned: int, measured: int, share: float = 0.15) -> None:
    assert abs(planned / measured - 1) < share, f"planned {planned}, measured {measured}"


# latent (B, T, H, W), chunk_frames, strips, whole_frames, frames of a pass in the last stage (None:
# of the whole chunk)
DECODES = [
    ((1, 4, 5, 6), 1, None, False, None),
    ((1, 5, 3, 5), 2, None, False, None),
    ((1, 7, 3, 4), 3, None, True, None),
    ((1, 7, 3, 5), 7, None, False, None),
    ((1, 8, 3, 4), 7, None, False, None),
    ((1, 5, 4, 5), [1, 1, 3], None, False, None),
    ((1, 1, 15, 9), 1, None, False, None),
    ((1, 2, 9, 11), 1, None, False, None),
    ((2, 3, 7, 5), 1, None, False, None),
    ((2, 3, 5, 7), 3, None, False, None),
    ((3, 1, 7, 10), 1, None, False, None),
    ((1, 3, 40, 3), 1, 2, False, None),
    ((1, 3, 43, 2), 1, 4, False, None),
    ((1, 3, 43, 2), 1, 4, True, None),
    ((2, 2, 30, 3), 1, 3, False, None),
    ((2, 2, 30, 3), 1, 3, True, None),
    ((1, 1, 40, 5), 1, 3, False, None),
    ((1, 3, 5, 6), 1, None, False, 2),
    ((1, 7, 4, 5), 7, None, False, 4),
    ((1, 7, 4, 5), 7, None, False, 12),
    ((1, 8, 3, 4), [1, 5, 2], None, True, 2),
    ((2, 5, 4, 3), 3, None, False, 2),
    ((2, 5, 3, 4), 5, None, False, 6),
    ((1, 6, 36, 2), 3, 2, False, 4),
    ((1, 6, 36, 2), 3, 2, True, 4),
    ((1, 8, 34, 3), 8, 3, True, 2),
    ((1, 8, 33, 3), 7, 3, True, 8),
    ((1, 13, 34, 2), [1, 6, 6], 2, True, 2),
    ((2, 3, 30, 2), 2, 2, False, 2),
    ((2, 3, 30, 2), 2, 2, True, 2),
]


# Both families and both formats of each decode in turn: the size decides what the peak is.
PAIRS = (
    (("wan2.1", "contiguous"), ("wan2.2", "channels_last_3d")),
    (("wan2.1", "channels_last_3d"), ("wan2.2", "contiguous")),
)


def one_family_first(i: int, decode: tuple) -> list:
    """Both families of a decode, of which `make test` takes one."""
    quick = i // 2 % 2
    return [
        pytest.param(*pair, *decode, marks=() if place == quick else pytest.mark.full)
        for place, pair in enumerate(PAIRS[i % 2])
    ]


@pytest.mark.parametrize(
    "family, memory_format, size, chunk_frames, strips, whole_frames, last",
    [one for i, decode in enumerate(DECODES) for one in one_family_first(i, decode)],
)
def test_the_plan_is_within_15_percent_of_the_counted_peak(
    family, memory_format, size, chunk_frames, strips, whole_frames, last, monkeypatch
):
    vae = vae_of(family)
    z = torch.randn(size[0], vae.config.z_dim, *size[1:])
    if last is not None:
        strip = geometry.strips(size[2], strips or 1, vae.config)[0]
        elements = pass_elements(vae.config, (*z.shape[:3], strip.halo_stop, size[3]), last)
        monkeypatch.setattr(choose, "PASSES", (elements, elements // 2))
    made = counted_passes(monkeypatch, vae)
    sink = CallbackSink(lambda *piece: None, needs_whole_frames=whole_frames)
    pack_weights(vae.model.decoder, memory_format)
    with TensorCounter() as counter:
        vae.decode(
            z, chunk_frames=chunk_frames, strips=strips, memory_format=memory_format, sink=sink
        )
    report = vae.last_report
    assert (len(made) > len(report.chunks) * report.strips) == (last is not None)
    within(report.memory.planned_bytes, counter.peak)


def counted_passes(monkeypatch, vae) -> list[int]:
    """A list that grows, by the frames of each, with the passes of the decodes to come."""
    made, real = [], vae.model.decoder.passes

    def passes(x, step, strip=None):
        # Nothing is held here that `real` lets go of.
        return map(lambda pixels: made.append(pixels.shape[2]) or pixels, real(x, step, strip))

    monkeypatch.setattr(vae.model.decoder, "passes", passes)
    return made


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("family", SMALL_CONFIGS)
def test_the_plan_counts_in_the_dtype_of_the_decode(family, precision):
    vae = vae_of(family)
    z = torch.randn(1, vae.config.z_dim, 3, 24, 20)
    vae.decode(z[..., :1, :1], precision=precision)  # casts the weights
    with TensorCounter() as counter:
        vae.decode(z, precision=precision, sink=CallbackSink(lambda *piece: None))
    within(vae.last_report.memory.planned_bytes, counter.peak)


def model_without_data(config, memory_format: str, dtype=torch.bfloat16) -> WanVAEModel:
    """On the meta device, where tensors have sizes only."""
    with torch.device("meta"):
        model = WanVAEModel(config).to(dtype).requires_grad_(False)
        pack_weights(model.decoder, memory_format)
    return model


# Architecture, latent, frames of a chunk, share of the numbers that a pass may hold.
FULL_SIZE_CHUNKS = [
    (wan21(), (1, 16, 21, 60, 104), 1, 1.0),
    (wan21(), (1, 16, 21, 90, 160), 1, 1.0),
    (wan21(), (1, 16, 21, 90, 160), 1, 0.5),
    (wan21(), (1, 16, 21, 90, 160), 2, 0.5),
    (wan21(), (2, 16, 21, 60, 104), 3, 1.0),
    (wan22(), (1, 48, 31, 44, 80), 1, 1.0),
    (wan22(), (1, 48, 31, 44, 80), 1, 0.5),
    (wan22(), (1, 48, 31, 44, 80), 4, 0.5),
    (replace(wan21(), decoder_patch_size=2), (1, 16, 21, 60, 104), 1, 1.0),
    (wan21(decoder_dim=24), (1, 16, 21, 60, 104), 1, 1.0),
]


@pytest.mark.parametrize("sizes, memory_format", in_pairs(FULL_SIZE_CHUNKS, FORMATS))
def test_a_full_size_chunk_without_data_takes_what_was_planned(sizes, memory_format, monkeypatch):
    """One chunk in the middle of a video."""
    config, latent, frames, share = sizes
    model = model_without_data(config, memory_format)
    z = torch.empty(*latent[:2], 3 * frames, *latent[3:], dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(choose, "PASSES", tuple(int(share * n) for n in choose.PASSES))
    plan = choose.choose(
        PlanRequest(config, latent, torch.bfloat16, memory_format, chunk_frames=frames)
    )
    limits = pass_frames(config, latent, plan.pass_elements)
    cache = FeatureCache()
    with torch.inference_mode(), TensorCounter() as counter:
        for i in range(2):
            start, stop = i * frames, (i + 1) * frames
            step = Step(cache, Chunk(start, stop, i == 0, False), pass_frames=limits)
            for pixels in model.decode_passes(z[:, :, start:stop], step):
                assert pixels.shape[2] <= limits[-1]
    within(plan.planned_bytes, counter.peak, 0.05)


@pytest.mark.parametrize(
    "change",
    [
        {"decoder_patch_size": 2},
        {"decoder_patch_size": 2, "decoder_colours": 4},
        {"decoder_colours": 1},
        {"colours": 4, "decoder_colours": 4},
    ],
    ids=str,
)
def test_other_heads_take_what_was_planned(change):
    """Narrow, so that the pixels are a good part of the peak."""
    config = replace(wan21(dim=4), **change)
    vae = WanVAE.from_state_dict(random_state(config), device="cpu")
    z = torch.randn(1, 16, 2, 14, 8)
    with TensorCounter() as counter:
        vae.decode(z, sink=CallbackSink(lambda *piece: None))
    within(vae.last_report.memory.planned_bytes, counter.peak)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_an_image_of_qwen_image_21_takes_what_was_planned(memory_format):
    config, latent = qwen21(), (1, 64, 1, 64, 64)
    model = model_without_data(config, memory_format)
    plan = choose.choose(PlanRequest(config, latent, torch.bfloat16, memory_format))
    z = torch.empty(latent, dtype=torch.bfloat16, device="meta")
    with torch.inference_mode(), TensorCounter() as counter:
        for _ in model.decode_passes(z, Step.whole_clip(1)):
            pass
    within(plan.planned_bytes, counter.peak, 0.05)


# Layers that have kernels where others have none.
COVERS = {
    "all": lambda name: True,
    "residual convolutions": lambda name: ".residual." in name,
    "all but residual convolutions": lambda name: ".residual." not in name,
    "all but up-samplers": lambda name: ".resample." not in name,
    "head": lambda name: ".head." in name,
}
# latent (B, T, H, W), chunk_frames, frames of a pass in the last stage (None: of the whole chunk)
COVERED_DECODES = [
    ((1, 5, 12, 10), 2, None),
    ((1, 1, 30, 20), 1, None),
    ((1, 7, 10, 8), 7, 4),
    ((2, 3, 7, 9), 1, 2),
]


@pytest.mark.parametrize(
    "covered, network",
    in_pairs(list(COVERS), [("wan2.1", "contiguous"), ("wan2.2", "channels_last_3d")]),
)
def test_kernels_for_some_layers_take_what_was_planned(covered, network):
    take_what_was_planned(COVERED_DECODES, covered, *network)


@pytest.mark.parametrize("family", ["wan2.1", "wan2.2"])
def test_passes_of_a_shard_take_what_was_planned(family, monkeypatch):
    """Without what ranks exchange; to the end of one latent frame."""
    monkeypatch.setattr(passes, "_LAST_BYTES", 0)
    cut = [case for case in COVERED_DECODES if case[2] is not None]
    take_what_was_planned(cut, "all", family, "channels_last_3d", shard=True)


def take_what_was_planned(cases, covered, family, memory_format, shard=False):
    config = SMALL_CONFIGS[family]
    model = model_without_data(config, memory_format)
    kernels = itertools.cycle(("cuda", "triton"))
    for (batch, *size), frames, last in cases:
        z = torch.empty(batch, config.z_dim, *size, dtype=torch.bfloat16, device="meta")
        layers = fake_layers(config, next(kernels), torch.bfloat16, COVERS[covered])
        elements = None if last is None else pass_elements(config, tuple(z.shape), last)
        limits, ends, together = (), PassEnds(), frames_together(layers)
        if elements is not None:
            limits = pass_frames(config, tuple(z.shape), elements, together)
            assert limits[-1] == last
            ends = pass_ends(config, tuple(z.shape), limits, together) if shard else ends
        ops, cache = fake_ops(model, layers), FeatureCache()
        chunks = schedule(size[0], frames)
        with torch.inference_mode(), TensorCounter() as counter:
            for chunk in chunks:
                step = Step(cache, chunk, ops=ops, pass_frames=limits, pass_ends=ends)
                for pixels in model.decode_passes(z[:, :, chunk.start : chunk.stop], step):
                    assert pixels.device.type == "meta"  # held until the next pass is done
        memory = DecodeMemory(
            config, tuple(z.shape), torch.bfloat16, memory_format, layers, shard=shard
        )
        within(memory.of_picture(chunks, elements), counter.peak, 0.1)


@pytest.mark.parametrize("family", ["triton", "cuda"])
@pytest.mark.parametrize(
    "config, latent",
    [
        (wan21(), (1, 16, 21, 90, 160)),
        (wan22(), (1, 48, 31, 44, 80)),
    ],
)
def test_a_plan_for_some_layers_lies_between_those_for_all_and_for_none(config, latent, family):
    """Of the same chunks and passes. Every stage that has kernels, from the first one on, saves."""
    stages = architecture.stages(config)
    elements = pass_elements(config, latent, 4)  # a latent frame of the last stage, with or without
    assert pass_frames(config, latent, elements, 2) == pass_frames(config, latent, elements, 4)
    covered: list[str] = []
    peaks = []
    for names in ([], *([b.name for b in stage.blocks] for stage in stages), ["decoder."]):
        covered += names
        layers = fake_layers(config, family, torch.bfloat16, starts_with(covered))
        memory = DecodeMemory(config, latent, torch.bfloat16, "contiguous", layers)
        peaks.append(memory.of_picture(schedule(latent[2], 1), elements))
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[-2] > peaks[-1]


def starts_with(prefixes: list[str]) -> Callable[[str], bool]:
    return lambda name: name.startswith(tuple(prefixes))


# Peaks that a GPU measured with our kernels, above weights and output, in GiB. With quads: an H200,
# 2026-11-29 (6.95 with the kernels that a decode chooses, 6.92 with those in CUDA C++ alone). With
# pairs, before there were quads: an H100, benchmarks/results/2026-11-28-h100x4-ranks.md (one rank).
@pytest.mark.parametrize(
    "config, latent, together, measured",
    [
        (wan21(), (1, 16, 21, 90, 160), 4, 6.95),
        (wan21(), (1, 16, 21, 90, 160), 4, 6.92),
        (wan21(), (1, 16, 21, 60, 104), 2, 4.37),
        (wan21(), (1, 16, 21, 90, 160), 2, 7.07),
        (wan22(), (1, 48, 31, 44, 80), 2, 4.79),
    ],
)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_plans_for_kernels_are_what_a_gpu_measured(
    config, latent, together, measured, memory_format
):
    layers = fake_layers(config, "cuda", torch.bfloat16, most_together=together)
    assert frames_together(layers) == together
    wanted = PlanRequest(config, latent, torch.bfloat16, memory_format, layers, staged=True)
    plan = choose.choose(wanted)
    within(plan.planned_bytes, round(measured * 2**30), 0.03)


# Peaks above weights and output of the eager backend on an NVIDIA H200, GiB, in
# benchmarks/results/2026-11-24-h200-eager.md. Taken before the decode freed the inputs of its
# operations: what it takes now must be less, and in NDHWC not by more than was freed then.
@pytest.mark.parametrize(
    "config, latent, memory_format, measured",
    [
        (wan21(), (1, 16, 21, 60, 104), "channels_last_3d", 6.43),
        (wan21(), (1, 16, 21, 60, 104), "contiguous", 7.71),
        (wan21(), (1, 16, 21, 90, 160), "channels_last_3d", 11.49),
        (wan21(), (1, 16, 21, 90, 160), "contiguous", 13.13),
        (wan21(), (1, 16, 1, 128, 128), "channels_last_3d", 0.86),
        (wan21(), (1, 16, 1, 128, 128), "contiguous", 2.40),
        (wan22(), (1, 48, 31, 30, 52), "channels_last_3d", 5.38),
        (wan22(), (1, 48, 31, 30, 52), "contiguous", 6.72),
        (wan22(), (1, 48, 31, 44, 80), "channels_last_3d", 9.08),
        (wan22(), (1, 48, 31, 44, 80), "contiguous", 10.37),
    ],
)
def test_full_size_plans_stay_below_what_was_measured_before(
    config, latent, memory_format, measured
):
    plan = choose.choose(PlanRequest(config, latent, torch.bfloat16, memory_format))
    assert plan.strips == 1
    assert 0.5 * measured < plan.planned_bytes / 2**30 < measured


def counted_as_core_decodes(config, latent, counter: TensorCounter) -> int:
    """Peak bytes of a decode in float32 in the order of ComfyUI's core, above weights and output.

    Core takes one latent frame at a time in NCDHW, all of it through each layer, and keeps the last
    two frames of each convolution. A norm's result is a tensor of its own.
    """
    model, cache = model_without_data(config, "contiguous", torch.float32), FeatureCache()
    frame = torch.empty(*latent[:2], 1, *latent[3:], device="meta")
    with torch.inference_mode(), counter:
        for i in range(2):
            model.decode_chunk(frame, Step(cache, Chunk(i, i + 1, i == 0, False)))
    return counter.peak


def planned_in_float32(config, latent, memory_format: str) -> int:
    forms = EagerForms(joined_norm=True)
    wanted = PlanRequest(config, latent, torch.float32, memory_format, forms=forms, staged=True)
    return choose.choose(wanted).planned_bytes


@pytest.mark.parametrize(
    "config, latent",
    [
        (wan21(), (1, 16, 5, 60, 104)),
        (wan21(), (1, 16, 21, 90, 160)),
        (wan22(), (1, 48, 31, 44, 80)),
    ],
)
def test_float32_takes_no_more_than_comfyui_core(config, latent):
    """With what cuDNN takes besides for NCDHW data, for both."""
    core = counted_as_core_decodes(config, latent, TensorCounter())
    for memory_format in FORMATS:
        assert planned_in_float32(config, latent, memory_format) < 0.85 * core


def test_float32_takes_no_more_than_what_was_measured_for_comfyui_core():
    """6.0 GiB for 480p x 17, on an H200 with ComfyUI 0.33: in TF32, for which cuDNN takes nothing
    besides. The plan counts what it may take for us."""
    latent, measured = (1, 16, 5, 60, 104), round(6.0 * 2**30)
    within(counted_as_core_decodes(wan21(), latent, TensorCounter(computes=True)), measured, 0.1)
    assert planned_in_float32(wan21(), latent, "contiguous") < measured


def test_small_videos_in_float32_take_no_more_than_a_frame_at_a_time():
    """They would have longer chunks otherwise, as in half precision."""
    latent, forms = (1, 16, 5, 30, 52), EagerForms(joined_norm=True)
    wanted = PlanRequest(wan21(), latent, torch.float32, "contiguous", forms=forms)
    memory = DecodeMemory(wan21(), latent, torch.float32, "contiguous", {}, forms)
    frame_by_frame = memory.of_picture(schedule(latent[2], 1), None)
    assert choose.choose(wanted).planned_bytes <= frame_by_frame
    assert memory.of_picture(schedule(latent[2], 4), choose.PASSES[0]) > 1.5 * frame_by_frame
