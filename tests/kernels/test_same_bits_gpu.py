"""Promise 2 on the fast path, at the sizes that people decode: the same bits whatever the chunks,
passes, strips and memory formats are, and below the reference's error. On the card of this machine,
and on those that it imitates (`WAN_VAE_CAPABILITY`)."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.suite.weights import random_vae
from wan_vae import WanVAE
from wan_vae.commands.demo import MINI_VAE
from wan_vae.config import wan21, wan22
from wan_vae.io.checkpoint import load_checkpoint
from wan_vae.kernels.device import IMITATE, Device
from wan_vae.planning import choose

pytestmark = pytest.mark.gpu

FRAMES = 8
# Latent rows and columns. The odd ones fill no tile and meet strips of uneven heights.
SIZES = {
    "2.1-480p": ("wan2.1", 60, 104),
    "2.1-720p": ("wan2.1", 90, 160),
    "2.1-odd": ("wan2.1", 47, 83),
    "2.2-480p": ("wan2.2", 30, 52),
    "2.2-720p": ("wan2.2", 44, 80),
    "2.2-odd": ("wan2.2", 23, 37),
    "mini-480p": ("mini", 60, 104),
    "mini-odd": ("mini", 47, 83),
}
# Cards to imitate: with all their shared memory, with 99 KiB, with TMA but no wgmma, and AMD's.
IMITATED = {
    **{"8.0": ("2.1-480p", "2.2-odd"), "8.9": ("2.1-odd", "mini-odd"), "12.0": ("2.1-odd",)},
    **{"gfx942": ("2.1-odd",), "gfx1100": ("2.1-odd", "2.2-odd"), "gfx1201": ("2.1-480p",)},
}
CASES = [(size, None) for size in SIZES]
CASES += [(size, capability) for capability, sizes in IMITATED.items() for size in sizes]


@functools.lru_cache(maxsize=1)
def vae_of(family: str, capability: str | None) -> WanVAE:
    device = torch.device("cuda", torch.cuda.current_device())
    if family == "mini":
        state = load_checkpoint(MINI_VAE).state
        vae = WanVAE.from_state_dict(state, device=device, dtype="bf16")
    else:
        vae = random_vae(wan21() if family == "wan2.1" else wan22(), device)
    # Without a clock: each layer gets the first kernel that is right. With one, eager may win a
    # layer on a busy card, and its bits depend on the size.
    vae.engine.timer_of = lambda device: None
    return vae


@pytest.fixture(
    params=CASES, ids=lambda c: c[0] if c[1] is None else f"{c[0]} as {c[1]}", scope="module"
)
def case(request):
    """A VAE, a latent, and its picture."""
    size, capability = request.param
    with pytest.MonkeyPatch.context() as patch:
        if capability is not None:
            patch.setenv(IMITATE, capability)
        yield _case(size, capability)


def _case(size, capability):
    family, height, width = SIZES[size]
    vae = vae_of(family, capability)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(1, vae.config.z_dim, FRAMES, height, width, generator=generator)
    expected = vae.decode(z)
    report = vae.last_report
    family = "triton" if Device.chosen_for(vae.device).vendor == "amd" else "cuda"
    if report.backends_off and family not in report.backends_used.values():
        pytest.skip(f"no kernels on this card: {report.backends_off[0].reason}")
    assert all(layer.backend != "eager" for layer in report.layers), "a layer has no kernel"
    return vae, z, expected


@pytest.mark.parametrize("chunk_frames", [1, 2, 3, 7, FRAMES, [2, 1, 4, 1]], ids=str)
def test_chunks(case, chunk_frames):
    vae, z, expected = case
    assert torch.equal(vae.decode(z, chunk_frames=chunk_frames), expected)


@pytest.mark.parametrize("strips", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("chunk_frames", [1, 3])
def test_strips(case, strips, chunk_frames):
    vae, z, expected = case
    assert torch.equal(vae.decode(z, strips=strips, chunk_frames=chunk_frames), expected)


@pytest.mark.parametrize("share", [1, 3, 40, 10**9])
def test_passes(case, share, monkeypatch):
    """From whole chunks down to single pairs of frames."""
    vae, z, expected = case
    limit = max(1, 4 * 720 * 1280 * 96 // share) if share < 10**9 else 10**12
    monkeypatch.setattr(choose, "PASSES", (limit, limit))
    assert torch.equal(vae.decode(z, chunk_frames=4), expected)


@pytest.mark.parametrize("weights", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("latent", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_formats(case, weights, latent):
    vae, z, expected = case
    got = vae.decode(z.contiguous(memory_format=latent), memory_format=weights)
    assert torch.equal(got, expected)


def test_the_same_again(case):
    vae, z, expected = case
    for _ in range(3):
        assert torch.equal(vae.decode(z), expected)


def test_nearer_to_float32_than_the_reference_in_the_same_precision(case):
    vae, z, expected = case
    z = z[:, :, :2]
    exact = vae.decode(z, precision="fp32", backend="eager")
    eager = vae.decode(z, backend="eager")
    error, reference = ((x - exact).norm() / exact.norm() for x in (expected[:, :, :5], eager))
    assert error < reference
