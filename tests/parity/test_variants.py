"""VAEs that share the blocks: alpha, doubled pictures, grey heads, images only, pruned decoders.

Each is compared with diffusers, an independent implementation, or with the published arithmetic
behind it, in float32 on the CPU.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import wan_vae
from tests.parity.test_diffusers import BOUND, SMALL_22, relative_error
from wan_vae.config import WanVAEConfig
from wan_vae.errors import LatentError
from wan_vae.io.checkpoint import canonical_state_dict, load_checkpoint

diffusers = pytest.importorskip("diffusers", reason="the parity reference (test extra) is absent")

QWEN21 = dict(base_dim=8, decoder_base_dim=16)


def reference(kind: str, options: dict):
    """A diffusers VAE of class `kind` whose gains and biases are random too."""
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**options).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gamma"):
                p.copy_(1 + 0.2 * torch.randn(p.shape))
            elif name.endswith("bias"):
                p.copy_(0.1 * torch.randn(p.shape))
    return model


def doubled(pixels: torch.Tensor) -> torch.Tensor:
    """[B, 4C, T, H, W] -> [B, C, T, 2H, 2W]: PyTorch's own pixel shuffle, frame by frame."""
    frames = [torch.nn.functional.pixel_shuffle(f, 2) for f in pixels.unbind(2)]
    return torch.stack(frames, dim=2)


# kind, options, what is done to the pixels of diffusers, colours in and out, pixels on a side of a
# latent pixel
VARIANTS = {
    "alpha": ("AutoencoderKLQwenImage", dict(base_dim=8, input_channels=4), None, (4, 4), 8),
    "doubled": ("AutoencoderKLWan", dict(base_dim=8, out_channels=12), doubled, (3, 3), 16),
    "grey head": ("AutoencoderKLWan", dict(base_dim=8, out_channels=1), None, (3, 1), 8),
    "pruned decoder": (
        "AutoencoderKLWan", dict(base_dim=16, decoder_base_dim=8), None, (3, 3), 8
    ),
    "pruned 2.2 decoder": (
        "AutoencoderKLWan", SMALL_22 | {"decoder_base_dim": 8}, None, (3, 3), 16
    ),
    "2.2 with alpha": (
        "AutoencoderKLWan", SMALL_22 | {"in_channels": 16, "out_channels": 16}, None, (4, 4), 16
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    kind, options, after, colours, factor = VARIANTS[request.param]
    theirs = reference(kind, options)
    ours = wan_vae.WanVAE.from_state_dict(theirs.state_dict(), device="cpu")
    return theirs, ours, after, colours, factor


def latent_of(vae, frames: int) -> torch.Tensor:
    return torch.randn(
        1, vae.config.z_dim, frames, 4, 3, generator=torch.Generator().manual_seed(1)
    )


def test_decode_matches(variant):
    theirs, ours, after, (_, colours), factor = variant
    z = latent_of(ours, 3)
    with torch.no_grad():
        expected = theirs.decode(z).sample
    expected = expected if after is None else after(expected)
    assert ours.decode(z).shape == (1, colours, 9, 4 * factor, 3 * factor)
    assert relative_error(ours.decode(z), expected) < BOUND
    # In strips, whole frames and one strip after another.
    assert relative_error(ours.decode(z, strips=2), ours.decode(z)) < BOUND
    frames = torch.cat(list(ours.decode_stream(z, strips=2)), dim=2)
    assert relative_error(frames, ours.decode(z)) < BOUND
    plan = ours.plan(tuple(z.shape))
    assert plan.pixel_shape == tuple(expected.shape)


def test_encode_matches(variant):
    theirs, ours, _, (colours, _), _ = variant
    s = ours.config.spatial_factor
    x = torch.rand(1, colours, 5, 2 * s, 3 * s, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist.mean
    assert relative_error(ours.encode(x), expected) < BOUND


def test_both_layouts(variant):
    _, ours, *_ = variant
    native = ours.model.state_dict()
    again = wan_vae.WanVAE.from_state_dict(native, device="cpu")
    assert again.config == ours.config
    z = latent_of(ours, 1)
    assert torch.equal(again.decode(z), ours.decode(z))


# -- VAEs of images --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen21():
    theirs = reference("AutoencoderKLQwenImage21", QWEN21)
    return theirs, wan_vae.WanVAE.from_state_dict(theirs.state_dict(), device="cpu")


def test_qwen_image_21_matches_diffusers(qwen21):
    theirs, ours = qwen21
    assert ours.config.family == "qwen-image-2.1"
    assert ours.config.latents_mean == tuple(theirs.config.latents_mean)
    assert ours.config.latents_std == tuple(theirs.config.latents_std)
    z = latent_of(ours, 1)
    x = torch.rand(2, 4, 1, 32, 48) * 2 - 1
    with torch.no_grad():
        pixels, latent = theirs.decode(z).sample, theirs.encode(x).latent_dist.mean
    assert ours.decode(z).shape == (1, 4, 1, 64, 48)
    assert relative_error(ours.decode(z), pixels) < BOUND
    assert relative_error(ours.encode(x), latent) < BOUND
    assert relative_error(ours.decode(z, strips=2), ours.decode(z)) < BOUND


def test_published_widths_of_qwen_image_21():
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLQwenImage21()
    found = canonical_state_dict(theirs.state_dict())
    config = found.config
    assert (config.family, config.dim, config.decoder_dim) == ("qwen-image-2.1", 96, 144)
    assert (config.z_dim, config.spatial_factor, config.decoded_factor) == (64, 16, 16)
    assert config.image_only


def last_slices(state: dict[str, torch.Tensor], flat: bool) -> dict[str, torch.Tensor]:
    """What a tool that folds time away writes: each kernel's last slice, no layers over time."""
    made = {}
    for key, value in state.items():
        if ".time_conv." in key:
            continue
        if value.ndim == 5:
            value = value[:, :, -1] if flat else value[:, :, -1:]
        elif flat and value.ndim == 4 and key.endswith("gamma"):
            value = value[..., 0]
        made[key] = value
    return made


@pytest.mark.parametrize("flat", [True, False], ids=["4-D", "kT 1"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "diffusers"])
def test_a_two_dimensional_qwen_vae_is_exact_for_one_frame(flat, native):
    theirs = reference("AutoencoderKLQwenImage", dict(base_dim=8))
    full = wan_vae.WanVAE.from_state_dict(theirs.state_dict(), device="cpu")
    state = full.model.state_dict() if native else theirs.state_dict()
    ours = wan_vae.WanVAE.from_state_dict(last_slices(state, flat), device="cpu")
    z = latent_of(full, 1)
    assert ours.config.image_only
    assert torch.equal(ours.decode(z), full.decode(z))
    x = torch.rand(2, 3, 1, 32, 24) * 2 - 1
    assert torch.equal(ours.encode(x), full.encode(x))
    with torch.no_grad():
        assert relative_error(ours.decode(z), theirs.decode(z).sample) < BOUND


def test_a_vae_of_images_refuses_videos(qwen21):
    _, ours = qwen21
    with pytest.raises(LatentError, match="images only"):
        ours.decode(torch.zeros(1, 64, 2, 4, 4))
    with pytest.raises(LatentError, match="images only"):
        ours.encode(torch.zeros(1, 4, 5, 32, 32))


# -- formats x dtypes x layouts x names ------------------------------------------------------------


@functools.cache
def stored(variant: str, layout: str) -> tuple[dict[str, torch.Tensor], WanVAEConfig]:
    """The tensors of a variant under diffusers' keys or native ones, and what they are."""
    kind, options, *_ = VARIANTS[variant]
    theirs = reference(kind, options).state_dict()
    found = canonical_state_dict(theirs)
    return (found.state if layout == "native" else theirs), found.config


def write(state: dict[str, torch.Tensor], path: Path, container: str) -> None:
    if container == "safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, str(path))
    else:
        is_zip = container == "zip"
        torch.save(state, path, _use_new_zipfile_serialization=is_zip)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    layout=st.sampled_from(["native", "diffusers"]),
    container=st.sampled_from(["safetensors", "zip", "legacy"]),
    dtype=st.sampled_from([
        torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn
    ]),
    prefix=st.sampled_from(["", "vae.", "first_stage_model.", "ema."]),
    nesting=st.sampled_from([None, "state_dict", "weights"]),
    name=st.sampled_from(["v.safetensors", "v.pth", "v", "my vae ü.bin", "V.CKPT", "v.gguf"]),
)  # fmt: skip
def test_a_vae_is_read_for_what_it_is(
    variant, layout, container, dtype, prefix, nesting, name, tmp_path
):
    if container == "legacy" and dtype == torch.float8_e4m3fn:
        container = "zip"  # PyTorch itself cannot read such a file back
    state, config = stored(variant, layout)
    state = {prefix + key: value.to(dtype) for key, value in state.items()}
    whole = {nesting: state, "step": 3} if nesting and container != "safetensors" else state
    write(whole, tmp_path / name, container)
    found = load_checkpoint(tmp_path / name)
    assert found.config == config
    expected = stored(variant, "native")[0]
    assert found.state.keys() == expected.keys()
    # Bits, as float8 knows no comparison.
    for key, value in expected.items():
        assert found.state[key].dtype == dtype
        assert torch.equal(found.state[key].float(), value.to(dtype).float()), key
