"""A whole decode on the Triton backend against the eager one: interpreter on the CPU, or a GPU.

Kernels must be proven before they run, and be off, with a reason, where they are not.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")

from tests.conftest import random_state
from wan_vae import WanVAE
from wan_vae.config import wan21, wan22
from wan_vae.errors import BackendError
from wan_vae.kernels.triton import layers as kernel_layers

pytestmark = pytest.mark.usefixtures("own_proofs")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = "bf16" if CUDA else "fp32"
# Relative error from float32. The stream between layers is bfloat16 on a GPU, float32 here;
# operands are float16 in both.
BOUND = 2e-2 if CUDA else 2e-3
CONFIGS = {"wan2.1": wan21(dim=16), "wan2.2": wan22(dim=16, decoder_dim=16)}
VARIANTS = {
    "grey": replace(wan21(dim=16), decoder_colours=1),
    "alpha, doubled": replace(wan21(dim=16), colours=4, decoder_colours=4, decoder_patch_size=2),
}


@pytest.fixture(scope="module")
def vae(own_proofs) -> WanVAE:
    return WanVAE.from_state_dict(random_state(CONFIGS["wan2.1"]), device=DEVICE, dtype=DTYPE)


def latent(vae: WanVAE, frames: int, height: int = 2, width: int = 1) -> torch.Tensor:
    """Tiny: the interpreter runs every program of every kernel in Python."""
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(1, vae.config.z_dim, frames, height, width, generator=generator)


def decode(vae: WanVAE, z: torch.Tensor, **options) -> torch.Tensor:
    return vae.decode(z, backend="triton", memory_format="channels_last_3d", **options).cpu()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def reference(vae: WanVAE, z: torch.Tensor) -> torch.Tensor:
    return vae.decode(z, backend="eager", precision="fp32").cpu()


@pytest.mark.parametrize(
    "family", [*CONFIGS, pytest.param("grey", marks=pytest.mark.full), "alpha, doubled"]
)
def test_an_image_matches_the_reference(family):
    state = random_state({**CONFIGS, **VARIANTS}[family])
    vae = WanVAE.from_state_dict(state, device=DEVICE, dtype=DTYPE)
    z = latent(vae, 1)
    expected = reference(vae, z)
    assert relative(decode(vae, z), expected) < BOUND
    report = vae.last_report
    assert report.backends_used["conv3d"] == "triton"
    on = {layer.name for layer in report.layers if layer.backend == "triton"}
    assert "decoder.head.2" in on
    assert "decoder.middle.0.residual.2" in on
    assert any("resample" in name for name in on)
    assert on == {layer.name for layer in report.layers}, "every layer has a kernel"
    assert report.backends_used["attention"] == "triton"


@pytest.mark.full
def test_a_video_matches_the_reference_with_the_same_bits_in_any_schedule_and_strips(vae):
    z = latent(vae, 2)
    whole = decode(vae, z, chunk_frames=2)
    assert relative(whole, reference(vae, z)) < BOUND
    assert torch.equal(decode(vae, z, chunk_frames=1), whole)
    assert torch.equal(decode(vae, z, strips=2), whole)


@pytest.mark.parametrize("family", ["wan2.1", pytest.param("wan2.2", marks=pytest.mark.full)])
def test_bits_do_not_depend_on_the_formats_of_latent_and_checkpoint(family):
    state = random_state(CONFIGS[family])
    z = latent(WanVAE.from_state_dict(state, device=DEVICE, dtype=DTYPE), 1, height=1)
    last = {
        k: v.contiguous(memory_format=torch.channels_last_3d) if v.ndim == 5 else v
        for k, v in state.items()
    }
    a = decode(WanVAE.from_state_dict(state, device=DEVICE, dtype=DTYPE), z)
    z_last = z.contiguous(memory_format=torch.channels_last_3d)
    b = decode(WanVAE.from_state_dict(last, device=DEVICE, dtype=DTYPE), z_last)
    assert torch.equal(a, b)


def test_a_kernel_that_fails_its_proof_is_off_and_the_picture_is_right(vae, tmp_path, monkeypatch):
    """Planted: a convolution that drops its residual in one tile."""
    monkeypatch.setenv("WAN_VAE_CACHE", str(tmp_path))
    real = kernel_layers.conv3d

    def wrong(*arguments, **options):
        y = real(*arguments, **options)
        y[:, :, :, :2, :2] *= 0.5
        return y

    monkeypatch.setattr(kernel_layers, "conv3d", wrong)
    fresh = WanVAE(vae.model)
    z = latent(vae, 1, height=1)
    assert relative(decode(fresh, z), reference(vae, z)) < BOUND
    report = fresh.last_report
    off = [o for o in report.backends_off if o.op == "conv3d"]
    assert off and all(o.backend == "triton" and "relative error" in o.reason for o in off)
    assert "layer" in off[0].reason
    on = {layer.name for layer in report.layers if layer.backend == "triton"}
    assert "decoder.middle.0.residual.2" not in on


def test_what_was_proven_is_not_proven_again(vae, monkeypatch):
    z = latent(vae, 1, height=1)
    first = decode(WanVAE(vae.model), z)

    def never(*arguments):
        raise AssertionError("proven before, in the cache of an equal environment")

    monkeypatch.setattr("wan_vae.kernels.proof.cases.prove", never)
    assert torch.equal(decode(WanVAE(vae.model), z), first)


def test_a_gain_too_large_for_float16_keeps_the_reference(vae):
    state = {k: v.clone() for k, v in vae.model.state_dict().items()}
    state["decoder.middle.0.residual.0.gamma"] *= 1e5
    state["decoder.middle.0.residual.2.weight"] *= 1e-5
    large = WanVAE.from_state_dict(state, device=DEVICE, dtype=DTYPE)
    decode(large, latent(vae, 1, height=1))
    assert any("too large for float16" in o.reason for o in large.last_report.backends_off)


@pytest.mark.parametrize("family", ["wan2.1", pytest.param("wan2.2", marks=pytest.mark.full)])
def test_the_format_of_the_weights_does_not_change_a_bit(family):
    vae = WanVAE.from_state_dict(random_state(CONFIGS[family]), device=DEVICE, dtype=DTYPE)
    z = latent(vae, 2, height=1)
    other = vae.decode(z, backend="triton", memory_format="contiguous").cpu()
    assert vae.last_report.layout.chosen == "contiguous"
    assert {layer.backend for layer in vae.last_report.layers} == {"triton"}
    assert torch.equal(decode(vae, z), other)


def test_requests_that_cannot_be_met_are_refused(vae):
    z = latent(vae, 1)
    with pytest.raises(BackendError, match="expected one of 'auto', 'eager', 'triton'"):
        vae.decode(z, backend="tensorrt")


def test_kernels_are_kept_for_the_next_decode_and_leave_with_the_weights(vae):
    z = latent(vae, 1, height=1)
    vae.model.prepared.clear()
    decode(vae, z)
    kept = next(iter(vae.model.prepared.values()))
    decode(vae, z)
    assert next(iter(vae.model.prepared.values())) is kept
    assert copy.deepcopy(vae.model).prepared == {}
    with torch.inference_mode(False), torch.no_grad():
        vae.model.conv2.weight.mul_(1.0)  # changed in place
    decode(vae, z)
    assert next(iter(vae.model.prepared.values())) is not kept
    vae.model.to(DEVICE)
    assert vae.model.prepared == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_auto_stays_with_the_reference_and_says_so(vae):
    z = latent(vae, 1)
    assert torch.equal(vae.decode(z).cpu(), vae.decode(z, backend="eager").cpu())
    vae.decode(z)
    assert vae.last_report.backends_used["conv3d"] == "eager"
    assert vae.last_report.backends_off[0].backend == "cuda"
