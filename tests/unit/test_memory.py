"""The memory plan against decodes whose tensors are counted, and full-size plans for small cards.

The counter sees every tensor of a real decode on the CPU. Two things are as on CUDA and not as on
the CPU, see `TensorCounter`: the memory format of a convolution's result, and what cuDNN takes.
"""

from __future__ import annotations

import time
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import SMALL_CONFIGS, pass_elements
from tests.unit.decodes import vae_of
from wan_vae import geometry
from wan_vae.chunking import Chunk
from wan_vae.config import wan21, wan22
from wan_vae.io.sink import CallbackSink, TensorSink
from wan_vae.layout import detect, pack_weights, to_format
from wan_vae.network.blocks import Step
from wan_vae.network.cache import FeatureCache
from wan_vae.network.model import WanVAEModel
from wan_vae.planning import memory

GB = 10**9
# What a CUDA context takes, and Wan 2.1's weights in bfloat16.
CONTEXT, WEIGHTS = int(0.6 * GB), int(0.26 * GB)
FORMATS = ("contiguous", "channels_last_3d")
CONVOLUTIONS = ("conv2d", "conv3d", "convolution")


class TensorCounter(TorchDispatchMode):
    """Counts the bytes of all storages made under it that are still alive, and their peak.

    A convolution's result takes the memory format of its weight, as cuDNN gives it. For NCDHW
    data it takes, for as long as it runs, what was measured for cuDNN (`memory._IMAGE_COLUMNS`).
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):  # what was there before, such as weights
                self._seen.add(tensor.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in CONVOLUTIONS:
            x, weight = args[:2]
            if detect(weight) == "channels_last_3d":
                result = to_format(result, "channels_last_3d")
            elif max(weight.shape[2:]) > 1:
                one_frame = weight.ndim == 5 and weight.shape[2] == 1
                taken = x.nbytes * 9 if one_frame else x.nbytes + result.nbytes
                self._count(result)
                self.peak = max(self.peak, self.live + taken)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            n = -(-storage.nbytes() // 512) * 512
            self._seen.add(key)
            self.live += n
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, n)

    def _free(self, key, n):
        self._seen.discard(key)
        self.live -= n


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


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("size, chunk_frames, strips, whole_frames, last", DECODES)
@pytest.mark.parametrize("family", SMALL_CONFIGS)
def test_the_plan_is_within_15_percent_of_the_counted_peak(
    family, size, chunk_frames, strips, whole_frames, last, memory_format, monkeypatch
):
    vae = vae_of(family)
    z = torch.randn(size[0], vae.config.z_dim, *size[1:])
    if last is not None:
        band = geometry.strips(size[2], strips or 1, vae.config)[0]
        elements = pass_elements(vae.config, (*z.shape[:3], band.halo_stop, size[3]), last)
        monkeypatch.setattr(memory, "_PASSES", (elements, elements // 2))
    made = counted_passes(monkeypatch, vae)
    sink = CallbackSink(lambda *piece: None, needs_whole_frames=whole_frames)
    pack_weights(vae.model.decoder, memory_format)
    # oneDNN compiles for each new shape, which is most of the time that tiny decodes take.
    with torch.backends.mkldnn.flags(enabled=False), TensorCounter() as counter:
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
    vae.decode(z, precision=precision, sink=CallbackSink(lambda *piece: None))  # casts the weights
    with TensorCounter() as counter:
        vae.decode(z, precision=precision, sink=CallbackSink(lambda *piece: None))
    within(vae.last_report.memory.planned_bytes, counter.peak)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("config, latent, frames, share", [
    (wan21(), (1, 16, 21, 60, 104), 1, 1.0),
    (wan21(), (1, 16, 21, 90, 160), 1, 1.0),
    (wan21(), (1, 16, 21, 90, 160), 1, 0.5),
    (wan21(), (1, 16, 21, 90, 160), 2, 0.5),
    (wan21(), (2, 16, 21, 60, 104), 3, 1.0),
    (wan22(), (1, 48, 31, 44, 80), 1, 1.0),
    (wan22(), (1, 48, 31, 44, 80), 1, 0.5),
    (wan22(), (1, 48, 31, 44, 80), 4, 0.5),
])  # fmt: skip
def test_a_full_size_chunk_without_data_takes_what_was_planned(
    config, latent, frames, share, memory_format, monkeypatch
):
    """On the meta device, where tensors have sizes only: one chunk in the middle of a video.

    share: of the numbers that a pass may hold.
    """
    with torch.device("meta"):
        model = WanVAEModel(config).to(torch.bfloat16).requires_grad_(False)
        pack_weights(model.decoder, memory_format)
        z = torch.empty(*latent[:2], 3 * frames, *latent[3:], dtype=torch.bfloat16)
    monkeypatch.setattr(memory, "_PASSES", tuple(int(share * n) for n in memory._PASSES))
    plan = memory.plan_decode(
        config, latent, torch.bfloat16, memory_format, None, chunk_frames=frames
    )
    limits = memory.pass_frames(config, latent, plan.pass_elements)
    cache = FeatureCache()
    with torch.inference_mode(), TensorCounter() as counter:
        for i in range(2):
            start, stop = i * frames, (i + 1) * frames
            step = Step(cache, Chunk(start, stop, i == 0, False), pass_frames=limits)
            for pixels in model.decode_passes(z[:, :, start:stop], step):
                assert pixels.shape[2] <= limits[-1]
    within(plan.planned_bytes, counter.peak, 0.05)


# Peaks that an NVIDIA H100 measured with our kernels, above weights and output, in GiB:
# benchmarks/results/2026-11-28-h100x4-ranks.md (one rank).
@pytest.mark.parametrize("config, latent, measured", [
    (wan21(), (1, 16, 21, 60, 104), 4.37),
    (wan21(), (1, 16, 21, 90, 160), 7.07),
    (wan22(), (1, 48, 31, 44, 80), 4.79),
])  # fmt: skip
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last_3d"])
def test_plans_for_kernels_are_what_a_gpu_measured(config, latent, measured, memory_format):
    plan = memory.plan_decode(config, latent, torch.bfloat16, memory_format, None, backend="cuda")
    within(plan.planned_bytes, round(measured * 2**30), 0.03)


# Peaks above weights and output of the eager backend on an NVIDIA H200, GiB, in
# benchmarks/results/2026-11-24-h200-eager.md. Taken before the decode freed the inputs of its
# operations: what it takes now must be less, and in NDHWC not by more than was freed then.
@pytest.mark.parametrize("config, latent, memory_format, measured", [
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
])  # fmt: skip
def test_full_size_plans_stay_below_what_was_measured_before(
    config, latent, memory_format, measured
):
    plan = memory.plan_decode(config, latent, torch.bfloat16, memory_format, None)
    assert plan.strips == 1
    assert 0.5 * measured < plan.planned_bytes / 2**30 < measured


@pytest.mark.parametrize("card_gb, height, width, strips", [
    (6, 90, 160, True),
    (8, 135, 240, True),
    (12, 90, 160, False),
    (24, 90, 160, False),
    (24, 135, 240, False),
])  # fmt: skip
def test_small_cards_get_strips_and_large_ones_do_not(card_gb, height, width, strips):
    free = card_gb * GB - CONTEXT - WEIGHTS
    latent = (1, 16, 21, height, width)
    plan = memory.plan_decode(wan21(), latent, torch.bfloat16, "channels_last_3d", free)
    assert plan.planned_bytes < free
    assert (plan.strips > 1) == strips
    if strips:
        assert plan.chunk_frames == 1
        assert 0 < plan.extra_work < 0.25
        assert f"planned {plan.strips} strips" in plan.note and "of the work" in plan.note
    else:
        assert plan.note is None


def test_the_share_of_work_done_twice_is_that_of_the_halo():
    """Of a two-strip decode: the strips' rows, halo included, over the picture's, is a bound."""
    latent = (1, 16, 21, 90, 160)
    plan = memory.plan_decode(wan21(), latent, torch.bfloat16, "channels_last_3d", None, strips=2)
    # 13 halo rows at the latent's size, 7 of 720 at the picture's, where most of the work is.
    assert 2 * 7 / 720 < plan.extra_work < 2 * 13 / 90


def test_less_memory_never_means_fewer_strips_or_larger_chunks():
    latent, previous = (1, 16, 21, 60, 104), (99, 1)
    for free in (40 * GB, 8 * GB, 6 * GB, 4 * GB, 3 * GB, 2 * GB, GB):
        plan = memory.plan_decode(wan21(), latent, torch.bfloat16, "channels_last_3d", free)
        assert plan.chunk_frames <= previous[0] and plan.strips >= previous[1]
        previous = plan.chunk_frames, plan.strips


def test_less_memory_takes_smaller_passes_then_shorter_chunks_then_more_strips():
    """With our kernels, whose chunks are wide enough to shrink; the faster ways first."""
    ways, (full, half) = [], memory._PASSES
    for tenths in range(100, 10, -1):
        free = tenths * GB // 10
        plan = memory.plan_decode(
            wan21(), (1, 16, 21, 90, 160), torch.bfloat16, "contiguous", free, backend="cuda"
        )
        assert plan.planned_bytes < free
        ways.append((plan.strips, -plan.chunk_frames, -plan.pass_elements))
    assert ways == sorted(ways)
    assert {(1, -2, -full), (1, -2, -half)} <= set(ways)
    # Each of these also in strips, in as many as take the least.
    for part, both in ((1, {-2, -1}), (2, {-full, -half})):
        assert any({w[part] for w in ways if w[0] == count} == both for count in (2, 3, 4))


def test_a_plan_takes_no_time():
    started = time.process_time()
    memory.plan_decode(wan21(), (1, 16, 81, 270, 480), torch.bfloat16, "contiguous", GB)
    assert time.process_time() - started < 0.25  # 15 ms on an ordinary core


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
    latent, arguments = (1, 16, 21, 90, 160), (torch.bfloat16, "channels_last_3d", 4 * GB)
    assert memory.plan_decode(wan21(), latent, *arguments, strips=5).strips == 5
    assert memory.plan_decode(wan21(), latent, *arguments, strips=1).strips == 1
    small = (1, 16, 21, 30, 52)
    assert memory.plan_decode(wan21(), small, *arguments, chunk_frames=2).chunk_frames == 2
    # One frame fits, 21 do not, in the smallest passes: asked for, so they are tried.
    tight = (*arguments[:2], GB)
    plan = memory.plan_decode(wan21(), small, *tight, chunk_frames=21)
    assert plan.planned_bytes > GB and (plan.lengths, plan.strips) == ((21,), 1)
    assert plan.pass_elements == min(memory._PASSES)
    assert memory.plan_decode(wan21(), small, *tight, chunk_frames=1).planned_bytes < GB
