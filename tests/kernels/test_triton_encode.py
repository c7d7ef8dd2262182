"""A whole encode on the Triton backend against the eager one: interpreter on the CPU, or a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")

from tests.conftest import random_state
from wan_vae import WanVAE
from wan_vae.chunking import schedule
from wan_vae.config import wan21, wan22
from wan_vae.errors import BackendError
from wan_vae.kernels.triton import layers as kernel_layers
from wan_vae.kernels.weights import fit_channels
from wan_vae.network.blocks import Step
from wan_vae.network.cache import FeatureCache
from wan_vae.network.sites import encoder_sites
from wan_vae.ops.opset import eager_ops

pytestmark = pytest.mark.usefixtures("own_proofs")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = "bf16" if CUDA else "fp32"
# As in `test_triton_decode`.
BOUND = 2e-2 if CUDA else 2e-3
CONFIGS = {"wan2.1": wan21(dim=16), "wan2.2": wan22(dim=16, decoder_dim=16)}


# Tests of what both families share take one of them; `make test-all` takes both.
either_family = pytest.mark.parametrize(
    "vae", ["wan2.1", pytest.param("wan2.2", marks=pytest.mark.full)], indirect=True
)


@pytest.fixture(scope="module", params=CONFIGS)
def vae(request, own_proofs) -> WanVAE:
    return WanVAE.from_state_dict(random_state(CONFIGS[request.param]), device=DEVICE, dtype=DTYPE)


def video(vae: WanVAE, frames: int, height: int = 2, width: int = 1) -> torch.Tensor:
    """Tiny, in latent pixels: the interpreter runs every program of every kernel in Python."""
    generator = torch.Generator().manual_seed(frames)
    factor = vae.config.spatial_factor
    return torch.rand(1, 3, frames, height * factor, width * factor, generator=generator) * 2 - 1


def encode(vae: WanVAE, pixels: torch.Tensor, **options) -> torch.Tensor:
    return vae.encode(pixels, backend="triton", memory_format="channels_last_3d", **options).cpu()


def reference(vae: WanVAE, pixels: torch.Tensor) -> torch.Tensor:
    return vae.encode(pixels, backend="eager", precision="fp32").cpu()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_an_image_matches_the_reference(vae):
    pixels = video(vae, 1)
    assert relative(encode(vae, pixels), reference(vae, pixels)) < BOUND


@pytest.mark.full
def test_a_video_matches_the_reference_with_the_same_bits_in_any_schedule_and_format(vae):
    pixels = video(vae, 9)
    whole = encode(vae, pixels, chunk_frames=3)
    report = vae.last_report
    assert relative(whole, reference(vae, pixels)) < BOUND
    assert {layer.backend for layer in report.layers} == {"triton"}, "every layer has a kernel"
    assert not report.backends_off and report.layout.mixed_calls == 0
    for op in ("conv3d", "conv2d", "norm", "norm_silu", "attention"):
        assert report.backends_used[op] == "triton"
    other = vae.encode(pixels, backend="triton", memory_format="contiguous", chunk_frames=[1, 2])
    assert torch.equal(other.cpu(), whole)


@either_family
@pytest.mark.parametrize("kernel", ["strided_conv3d", "conv3d"])
def test_a_kernel_that_fails_its_proof_is_off_and_the_latent_is_right(
    vae, tmp_path, monkeypatch, kernel
):
    """Planted: a kernel that is wrong in one tile."""
    monkeypatch.setenv("WAN_VAE_CACHE", str(tmp_path))
    real = getattr(kernel_layers, kernel)

    def wrong(*arguments, **options):
        y = real(*arguments, **options)
        y[:, :, :, :2, :2] *= 0.5
        return y

    monkeypatch.setattr(kernel_layers, kernel, wrong)
    vae.model.prepared.clear()
    fresh = WanVAE(vae.model)
    # A second frame of the latent has the strided kernels for time.
    pixels = video(vae, 5 if kernel == "strided_conv3d" else 1, 1)
    try:
        assert relative(encode(fresh, pixels), reference(vae, pixels)) < BOUND
    finally:
        vae.model.prepared.clear()
    report = fresh.last_report
    # Attention runs in kernels as a whole, its pointwise convolutions too, or not at all.
    off = {"conv3d", "conv2d" if kernel == "strided_conv3d" else "attention"}
    assert {o.op for o in report.backends_off} == off
    assert any("relative error" in o.reason for o in report.backends_off)
    backends = {layer.name: layer.backend for layer in report.layers}
    down = {name: backend for name, backend in backends.items() if "resample" in name}
    assert set(down.values()) == {"eager" if kernel == "strided_conv3d" else "triton"}
    first = "triton" if kernel == "strided_conv3d" else "eager"
    assert backends["encoder.conv1"] == backends["encoder.head.2"] == first


@either_family
def test_decodes_and_encodes_keep_their_kernels_side_by_side(vae):
    vae.model.prepared.clear()
    pixels, z = video(vae, 1, 1), torch.zeros(1, vae.config.z_dim, 1, 1, 1)
    encode(vae, pixels)
    kept = dict(vae.model.prepared)
    # The first decode packs the decoder's weights, which must not cost the encoder its own.
    vae.decode(z, backend="triton", memory_format="channels_last_3d")
    assert len(vae.model.prepared) == 2
    encode(vae, pixels)
    assert all(vae.model.prepared[key] is value for key, value in kept.items())
    with torch.inference_mode(False), torch.no_grad():
        vae.model.conv1.weight.mul_(1.0)  # changed in place
    encode(vae, pixels)
    assert all(vae.model.prepared[key] is not value for key, value in kept.items())


def test_sites_are_every_convolution_once_with_its_frames():
    """Frames of a steady chunk of one latent frame, as the layers make them."""
    for config in CONFIGS.values():
        vae = WanVAE.from_state_dict(random_state(config), device="cpu")
        made, eager = {}, eager_ops()

        def conv3d(x, weight, *arguments, made=made, eager=eager, **options):
            y = eager.conv3d(x, weight, *arguments, **options)
            made[id(weight)] = y.shape[2]
            return y

        def conv2d(x, weight, *arguments, made=made, eager=eager, **options):
            y = eager.conv2d(x, weight, *arguments, **options)
            made[id(weight)] = y.shape[0]
            return y

        ops, cache = replace(eager, conv3d=conv3d, conv2d=conv2d), FeatureCache()
        with torch.no_grad():
            for chunk in schedule(2, 1):
                x = torch.zeros(1, 3, 1 if chunk.is_first else 4, 16, 16)
                vae.model.encode_chunk(x, Step(cache, chunk, ops=ops))
        sites = list(encoder_sites(vae.model))
        frames = {id(s.weights.weight): getattr(s.problem, "frames", None) for s in sites}
        both = {key: n for key, n in frames.items() if n is not None}
        assert both == {key: n for key, n in made.items() if key in both}
        used = {id(s.weights.projection) for s in sites if s.weights.projection is not None}
        weights = [p for n, p in vae.encoder.named_parameters() if n.endswith("weight")]
        assert {id(p) for p in weights} | {id(vae.model.conv1.weight)} == frames.keys() | used
        assert Counter(s.problem.operation for s in sites)["strided_conv"] == 5


def test_channels_are_filled_up_with_zeros():
    x = torch.randn(2, 3, 1, 4, 5, dtype=torch.bfloat16)
    y = fit_channels(x, torch.float16)
    assert y.shape == (2, 16, 1, 4, 5) and y.dtype == torch.float16 and y.stride(1) == 1
    assert torch.equal(y[:, :3], x.half()) and not y[:, 3:].any()
    full = torch.randn(2, 16, 1, 4, 5)
    assert fit_channels(full) is full


@pytest.mark.skipif(CUDA, reason="about machines without a GPU")
def test_auto_stays_with_the_reference_and_says_so(vae):
    pixels = video(vae, 1, 1)
    assert torch.equal(vae.encode(pixels), vae.encode(pixels, backend="eager"))
    vae.encode(pixels)
    assert vae.last_report.backends_used["conv3d"] == "eager"
    assert vae.last_report.backends_off[0].backend == "cuda"
    with pytest.raises(BackendError, match="'cuda' cannot run: no GPU"):
        vae.encode(pixels, backend="cuda")
    with pytest.raises(BackendError, match="expected one of 'auto', 'eager', 'triton'"):
        vae.encode(pixels, backend="tensorrt")


@pytest.mark.gpu
@pytest.mark.skipif(
    not CUDA or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("config", [wan21(), wan22()], ids=lambda c: c.family)
def test_the_full_width_on_the_gpu(config):
    """Convolutions in CUDA C++ too; frames, rows and columns that fill no tile."""
    vae = WanVAE.from_state_dict(random_state(config), device="cuda", dtype="bf16")
    vae.engine.timer_of = lambda device: None  # no layer goes to cuDNN because the card is busy
    for frames in (13, 1):
        pixels = video(vae, frames, 11, 19)
        eager = relative(vae.encode(pixels, backend="eager").cpu(), reference(vae, pixels))
        whole = vae.encode(pixels, backend="cuda", chunk_frames=(frames + 3) // 4).cpu()
        report = vae.last_report
        assert not report.backends_off
        assert {layer.backend for layer in report.layers} == {"cuda"}
        assert relative(whole, reference(vae, pixels)) < eager
        for chunks in (1, 2, 3):
            assert torch.equal(vae.encode(pixels, chunk_frames=chunks).cpu(), whole)
