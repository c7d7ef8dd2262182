"""Encodes on a card: the planned peak against the allocator, a small card, pixels from the host."""

from __future__ import annotations

import functools
import gc
import math

import pytest
import torch

from benchmarks.suite.weights import random_vae
from tests.unit.test_planning_gpu import BF16_BOUND, CONTEXT_BYTES, relative
from wan_vae import WanVAE
from wan_vae.config import wan21, wan22
from wan_vae.io.image import frames_view

pytestmark = pytest.mark.gpu


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@functools.lru_cache(maxsize=1)
def vae_of(config) -> WanVAE:
    return random_vae(config, device())


def frames_of(frames: int, height: int, width: int) -> torch.Tensor:
    """An IMAGE [T, H, W, 3] in host memory."""
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def limit():
    """Cap this process's allocations at so many bytes, for one test."""

    def cap(n: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info(device())
        torch.cuda.set_per_process_memory_fraction(min(1.0, n / total), device())

    yield cap
    torch.cuda.set_per_process_memory_fraction(1.0, device())
    torch.cuda.empty_cache()


def uses_kernels(vae: WanVAE) -> bool:
    return "cuda" in vae.last_report.backends_used.values()


@pytest.mark.parametrize(
    "backend, memory_format",
    [("eager", "channels_last_3d"), ("eager", "contiguous"), ("auto", "auto")],
)
@pytest.mark.parametrize(
    "config, frames, height, width, strips",
    [
        (wan21(), 17, 480, 832, None),
        (wan21(), 17, 720, 1280, None),
        (wan21(), 17, 720, 1280, 3),
        (wan21(), 1, 1024, 1024, None),
        (wan22(), 17, 704, 1280, None),
    ],
    ids=["2.1-480p", "2.1-720p", "2.1-720p-3-strips", "2.1-image", "2.2-720p"],
)
def test_the_measured_peak_is_within_15_percent_of_the_plan(
    monkeypatch, config, frames, height, width, strips, backend, memory_format
):
    vae = vae_of(config)
    image = frames_view(frames_of(frames, height, width))
    options = {"backend": backend, "memory_format": memory_format, "strips": strips}
    # Twice: the first encode also allocates what cuDNN keeps for good.
    for _ in range(2):
        vae.encode(image, unit_range=True, **options)
    report = vae.last_report
    found = report.memory
    assert report.fallbacks == ()
    planned = [found.planned_bytes]
    if (frames, memory_format) == (1, "contiguous"):
        # For one frame in NCDHW cuDNN unfolds columns on some cards, nine operands for which the
        # plan allows. On others it converts operand and result, as for several frames: of a
        # 1024x1024 image that is 1.02 GiB in all (measured) instead of 2.4.
        monkeypatch.setattr("wan_vae.planning.peak._IMAGE_COLUMNS", 2)
        shape = report.latent_shape
        plan = vae.plan(shape, operation="encode", free_bytes=math.inf, **options)
        planned.append(plan.planned_bytes)
    assert any(0.85 < n / found.peak_bytes < 1.15 for n in planned), (
        f"planned {[round(n / 2**30, 2) for n in planned]} GiB, "
        f"measured {found.peak_bytes / 2**30:.2f}"
    )


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize(
    "card_bytes, height, width",
    [(6 * 10**9, 720, 1280), (8 * 10**9, 1080, 1920), (6 * 10**9, 1080, 1920)],
    ids=["6GB-720p", "8GB-1080p", "6GB-1080p"],
)
def test_a_small_card_encodes_81_frames_with_the_bits_of_a_large_one(
    limit, card_bytes, height, width, backend
):
    vae = vae_of(wan21())
    image = frames_view(frames_of(81, height, width))
    expected = vae.encode(image, unit_range=True, backend=backend).cpu()
    assert vae.last_report.strips == 1, "this card is itself too small to compare with"

    limit(card_bytes - CONTEXT_BYTES)
    # Told as well, because PyTorch before 2.8 does not say what limit it was given.
    free = card_bytes - CONTEXT_BYTES - torch.cuda.memory_allocated()
    got = vae.encode(image, unit_range=True, backend=backend, free_bytes=free).cpu()

    report = vae.last_report
    assert report.status == "done" and report.memory.peak_bytes < free
    assert len(report.fallbacks) == (report.strips > 1), f"the plan failed: {report.fallbacks}"
    if uses_kernels(vae):
        assert torch.equal(got, expected)
    else:
        assert relative(got, expected) < BF16_BOUND
    ms = sum(c.duration_ms for c in report.chunks)
    print(f"{ms:.0f} ms, {report.strips} strips, {report.memory.peak_bytes / 2**30:.2f} GiB")


def test_a_card_too_small_for_the_plan_starts_over(limit):
    """Nobody tells the plan of the limit."""
    vae = vae_of(wan21())
    image = frames_view(frames_of(17, 720, 1280))
    expected = vae.encode(image, unit_range=True).cpu()
    peak = vae.last_report.memory.peak_bytes
    limit(torch.cuda.memory_allocated() + peak // 2)
    got = vae.encode(image, unit_range=True, free_bytes=2 * peak).cpu()
    assert vae.last_report.fallbacks, "it fitted"
    assert torch.equal(got, expected) if uses_kernels(vae) else relative(got, expected) < BF16_BOUND


@pytest.mark.parametrize("config", [wan21(), wan22()], ids=lambda c: c.family)
def test_chunks_passes_and_strips_have_the_same_bits(config, monkeypatch):
    vae = vae_of(config)
    image = frames_view(frames_of(21, 24 * 16, 17 * 16))
    expected = vae.encode(image, unit_range=True, chunk_frames=6)
    if not uses_kernels(vae):
        pytest.skip("no kernels on this card: sums are the library's")
    for options in (
        {"chunk_frames": 1},
        {"chunk_frames": [2, 4]},
        {"strips": 2},
        {"strips": 5, "chunk_frames": 1},
        {"strips": 24, "chunk_frames": 6},
    ):
        assert torch.equal(vae.encode(image, unit_range=True, **options), expected), options
    for elements in (1, 40 * 10**6):
        monkeypatch.setattr("wan_vae.planning.choose.PASSES", (elements, elements))
        got = vae.encode(image, unit_range=True, chunk_frames=6)
        assert torch.equal(got, expected), f"passes of {elements} numbers"


@pytest.mark.parametrize("strips", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pixels_from_the_host_arrive_as_they_are(strips, dtype):
    """The copy of a pass runs beside the computation: twenty times, against pixels on the card."""
    vae = vae_of(wan21())
    frames = frames_of(33, 256, 320).to(dtype)
    image, dense = frames_view(frames), (frames.float() * 2 - 1).movedim(-1, 0).contiguous()
    options = {"strips": strips, "chunk_frames": 1}
    expected = vae.encode(dense.unsqueeze(0).cuda(), **options)
    for _ in range(20):
        assert torch.equal(vae.encode(image, unit_range=True, **options), expected)
    pinned = frames_view(frames.pin_memory())
    for _ in range(5):
        assert torch.equal(vae.encode(pinned, unit_range=True, **options), expected)
        assert torch.equal(vae.encode(dense.unsqueeze(0), **options), expected)


def test_the_clip_never_lies_on_the_card():
    """In chunks of one length: those that are planned for 81 frames are shorter, and take less."""
    vae = vae_of(wan21())
    image = frames_view(frames_of(161, 256, 256))
    for frames in (81, 161):
        vae.encode(image[:, :, :frames], unit_range=True, chunk_frames=8)
        found = vae.last_report.memory
        if frames == 81:
            first = found.peak_bytes
    assert abs(found.peak_bytes - first) < image.numel()  # a quarter of the clip in float32
