"""Parity with diffusers' AutoencoderKLWan, an independent implementation, in float32 on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import wan_vae
from tests.conftest import in_pairs
from wan_vae.config import wan21, wan22
from wan_vae.io.checkpoint import canonical_state_dict
from wan_vae.io.latents import load_latent
from wan_vae.network.model import expected_shapes

diffusers = pytest.importorskip("diffusers", reason="the parity reference (test extra) is absent")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL_21 = dict(base_dim=16, z_dim=16)
SMALL_22 = dict(
    base_dim=16,
    decoder_base_dim=32,
    z_dim=48,
    dim_mult=[1, 2, 4, 4],
    num_res_blocks=2,
    temperal_downsample=[False, True, True],
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
    latents_mean=[0.0] * 48,
    latents_std=[1.0] * 48,
)
# Relative error of the Frobenius norm; both sides sum the same products in another order.
BOUND = 1e-5


def random_reference(options: dict, seed: int = 0):
    """A diffusers VAE whose gains and biases are random too, so that none can be forgotten."""
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKLWan(**options).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("gamma"):
                p.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.1 * noise)
    return model


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module", params=[SMALL_21, SMALL_22], ids=["wan2.1", "wan2.2"])
def pair(request):
    reference = random_reference(request.param)
    return reference, wan_vae.WanVAE.from_state_dict(reference.state_dict(), device="cpu")


@pytest.mark.parametrize("frames, size", in_pairs([1, 2, 5], [(4, 6), (5, 3)]))
def test_decode_matches_diffusers(pair, frames, size):
    reference, vae = pair
    z = torch.randn(1, vae.config.z_dim, frames, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference.decode(z).sample
    assert relative_error(vae.decode(z), expected) < BOUND


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_encode_matches_diffusers(pair, frames):
    reference, vae = pair
    s = vae.config.spatial_factor
    x = torch.rand(1, 3, frames, 2 * s, 3 * s, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        expected = reference.encode(x).latent_dist.mean
    assert relative_error(vae.encode(x), expected) < BOUND


def test_batch_matches_diffusers(pair):
    reference, vae = pair
    z = torch.randn(2, vae.config.z_dim, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = reference.decode(z).sample
    assert relative_error(vae.decode(z), expected) < BOUND


def test_both_key_layouts_load_to_equal_tensors(pair):
    """Diffusers keys -> canonical keys, and canonical keys -> themselves."""
    reference, vae = pair
    from_diffusers = canonical_state_dict(reference.state_dict()).state
    again = canonical_state_dict(from_diffusers).state
    native = vae.model.state_dict()
    assert from_diffusers.keys() == again.keys() == native.keys()
    for key, value in native.items():
        assert torch.equal(from_diffusers[key], value), key
        assert torch.equal(again[key], value), key


def load_native(reference, native: dict[str, torch.Tensor]) -> None:
    """Copy canonical tensors into a diffusers model, over our own mapping of its keys.

    A wrong pair in that mapping cannot go unseen: the decodes are compared afterwards.
    """
    theirs = canonical_state_dict(reference.state_dict()).state  # references, not copies
    assert theirs.keys() == native.keys()
    with torch.no_grad():
        for key, tensor in theirs.items():
            tensor.copy_(native[key])


def test_the_miniature_matches_diffusers():
    vae = wan_vae.load(EXAMPLES / "wan_vae_mini.safetensors", device="cpu")
    reference = diffusers.AutoencoderKLWan(**SMALL_21).eval()
    load_native(reference, vae.model.state_dict())
    z = load_latent(EXAMPLES / "latents" / "shapes_200x136_13f.latent")[:, :, :3, :9, :7]
    with torch.no_grad():
        pixels = reference.decode(z).sample
        latent = reference.encode(pixels).latent_dist.mean
    assert relative_error(vae.decode(z), pixels) < BOUND
    assert relative_error(vae.encode(pixels), latent) < BOUND


def test_a_folder_that_diffusers_saved(pair, tmp_path):
    reference, vae = pair
    reference.save_pretrained(tmp_path)
    loaded = wan_vae.load(tmp_path, device="cpu").model.state_dict()
    for key, value in vae.model.state_dict().items():
        assert torch.equal(loaded[key], value), key


FULL_22 = SMALL_22 | {"base_dim": 160, "decoder_base_dim": 256}


@pytest.mark.parametrize(("options", "config"), [({}, wan21()), (FULL_22, wan22())])
def test_full_width_keys_and_shapes(options, config):
    """The published widths, on the meta device: every tensor has its place and its shape."""
    with torch.device("meta"):
        reference = diffusers.AutoencoderKLWan(**options)
    found = canonical_state_dict(reference.state_dict())
    assert {k: tuple(v.shape) for k, v in found.state.items()} == expected_shapes(config)
    assert (found.config.family, found.config.dim, found.config.decoder_dim) == (
        config.family,
        config.dim,
        config.decoder_dim,
    )
