"""Every way a right checkpoint can be stored gives the same tensors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import wan_vae
from tests.conftest import SMALL_CONFIGS, random_state
from wan_vae.errors import BackendError, CheckpointError
from wan_vae.io.checkpoint import load_checkpoint

FAMILIES = pytest.mark.parametrize("family", SMALL_CONFIGS)


def assert_same(found, state):
    assert found.state.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(found.state[key], value), key


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_safetensors_of_each_dtype(family, dtype, tmp_path):
    state = {k: v.to(dtype) for k, v in random_state(SMALL_CONFIGS[family]).items()}
    save_file(state, str(tmp_path / "v.safetensors"))
    found = load_checkpoint(tmp_path / "v.safetensors")
    assert_same(found, state)
    assert (found.key_layout, found.prefix, found.config.family) == ("native", "", family)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict"])
@pytest.mark.parametrize("name", ["v.pth", "v.ckpt", "v.safetensors"])
def test_pth_by_content_not_by_name(name, wrapper, legacy, tmp_path):
    state = random_state(SMALL_CONFIGS["wan2.1"])
    whole = state if wrapper is None else {wrapper: state, "epoch": 3}
    torch.save(whole, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    assert_same(load_checkpoint(tmp_path / name), state)


def test_safetensors_named_pth(tmp_path):
    state = random_state(SMALL_CONFIGS["wan2.1"])
    save_file(state, str(tmp_path / "v.pth"))
    assert_same(load_checkpoint(tmp_path / "v.pth"), state)


@FAMILIES
@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model.", "model.vae.", "module."])
def test_prefixed_keys_among_others(family, prefix, tmp_path):
    """A bundle: the VAE's tensors behind a prefix, beside those of other parts."""
    state = random_state(SMALL_CONFIGS[family])
    bundle = {prefix + k: v for k, v in state.items()} | {"text_encoder.weight": torch.ones(3)}
    save_file(bundle, str(tmp_path / "v.safetensors"))
    found = load_checkpoint(tmp_path / "v.safetensors")
    assert_same(found, state)
    assert found.prefix == prefix


@FAMILIES
def test_decoder_only_files_decode_and_refuse_to_encode(family, tmp_path):
    state = random_state(SMALL_CONFIGS[family])
    kept = {k: v for k, v in state.items() if not k.startswith(("encoder.", "conv1."))}
    save_file(kept, str(tmp_path / "v.safetensors"))
    vae = wan_vae.load(tmp_path / "v.safetensors", device="cpu")
    whole = wan_vae.WanVAE.from_state_dict(state, device="cpu")
    z = torch.randn(1, vae.config.z_dim, 2, 3, 4)
    assert torch.equal(vae.decode(z), whole.decode(z))
    with pytest.raises(CheckpointError, match="no encoder"):
        vae.encode(torch.zeros(1, 3, 1, 64, 64))


def test_a_diffusers_pipeline_folder(tmp_path):
    """The folder that holds `vae/`, with a config.json, finds the VAE in it."""
    state = random_state(SMALL_CONFIGS["wan2.1"])
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    save_file(state, str(folder / "diffusion_pytorch_model.safetensors"))
    assert_same(load_checkpoint(tmp_path), state)


def test_weights_of_any_memory_format_give_the_same_bits(tmp_path):
    state = random_state(SMALL_CONFIGS["wan2.1"])
    packed = {
        k: v.to(memory_format=torch.channels_last_3d) if v.ndim == 5 else v
        for k, v in state.items()
    }
    torch.save(packed, tmp_path / "v.pth")
    z = torch.randn(1, 16, 2, 3, 4)
    expected = wan_vae.WanVAE.from_state_dict(state, device="cpu").decode(z)
    vae = wan_vae.load(tmp_path / "v.pth", device="cpu")
    assert torch.equal(vae.decode(z), expected)
    assert vae.last_report.layout.weights_found["channels_last_3d"] > 20


@pytest.mark.parametrize("dtype", ["int8", "half", torch.float64, torch.int32], ids=str)
def test_an_impossible_compute_dtype(dtype, tmp_path):
    state = random_state(SMALL_CONFIGS["wan2.1"])
    with pytest.raises(BackendError, match="expected 'auto', 'fp32', 'bf16' or 'fp16'"):
        wan_vae.WanVAE.from_state_dict(state, device="cpu", dtype=dtype)


def test_the_loaded_vae_keeps_nothing_of_the_callers_tensors():
    state = random_state(SMALL_CONFIGS["wan2.1"])
    vae = wan_vae.WanVAE.from_state_dict(state, device="cpu")
    z = torch.randn(1, 16, 1, 3, 4)
    before = vae.decode(z)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(vae.decode(z), before)
