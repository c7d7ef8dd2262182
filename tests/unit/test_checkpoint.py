"""Every way a right checkpoint can be stored gives the same tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import wan_vae
from tests.conftest import SMALL_CONFIGS, random_state
from wan_vae.commands.cli import main
from wan_vae.config import wan21, wan22
from wan_vae.errors import BackendError, CheckpointError
from wan_vae.io.checkpoint import CAST_DTYPES, canonical_state_dict, load_checkpoint
from wan_vae.io.latents import save_latent

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


@pytest.mark.parametrize("dtype", CAST_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["v.safetensors", "v.pth"])
def test_stored_dtypes_are_cast_to_the_compute_dtype(dtype, name, tmp_path):
    state = {k: v.to(dtype) for k, v in random_state(SMALL_CONFIGS["wan2.1"]).items()}
    path = tmp_path / name
    if name == "v.pth":
        torch.save(state, path)
    elif "fnuz" in str(dtype):
        pytest.skip("safetensors has no such dtype")
    else:
        save_file(state, str(path))
    cast = {k: v.to(torch.bfloat16) for k, v in state.items()}
    ours = wan_vae.load(path, device="cpu", dtype="bf16").model.state_dict()
    for key, value in cast.items():
        assert torch.equal(ours[key], value), key
    z = torch.randn(1, 16, 1, 4, 4)
    right = wan_vae.WanVAE.from_state_dict(cast, device="cpu", dtype="bf16").decode(z)
    assert torch.equal(wan_vae.load(path, device="cpu", dtype="bf16").decode(z), right)


def test_numbers_are_added_up_and_not_asked_one_by_one(monkeypatch):
    asked = []
    ask = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda x: asked.append(tuple(x.shape)) or ask(x))
    state = {k: v.half() for k, v in random_state(SMALL_CONFIGS["wan2.1"]).items()}
    assert_same(canonical_state_dict(state), state)
    assert asked == []
    # The sum of these is inf in float16: the answer is that of each number.
    state["decoder.conv1.bias"] = torch.full_like(state["decoder.conv1.bias"], 6e4)
    assert_same(canonical_state_dict(state), state)
    assert asked == [tuple(state["decoder.conv1.bias"].shape)]
    # The sum of these is NaN.
    for key, at in (("decoder.conv1.bias", 0), ("encoder.conv1.weight", (0, 0, 0, 0, 0))):
        state[key][at] = float("inf")
    state["encoder.conv1.weight"][0, 1, 0, 0, 0] = -float("inf")
    wanted = r"NaN or inf in (?=.*decoder\.conv1\.bias)(?=.*encoder\.conv1\.weight)"
    with pytest.raises(CheckpointError, match=wanted):
        canonical_state_dict(state)


@pytest.mark.parametrize("nesting", [["gen_model"], ["generator", "module"], ["state_dict", "vae"]])
def test_a_trainers_file_with_projection_heads(nesting, tmp_path, capfd):
    """As MG-LightVAE.pth: a pruned decoder, the weights nested, heads of a distillation beside."""
    state = random_state(wan22(dim=8, decoder_dim=4))
    heads = {f"dynamic_feature_projection_heads.{i}.weight": torch.ones(4, 8) for i in range(2)}
    whole = state | heads
    for name in reversed(nesting):
        whole = {name: whole, "step": 7}
    path = tmp_path / "MG-LightVAE.pth"
    torch.save({**whole, "discriminator": {"weight": torch.ones(3)}}, path)
    found = load_checkpoint(path)
    assert_same(found, state)
    assert found.config == wan22(dim=8, decoder_dim=4)
    assert "dynamic_feature_projection_heads.0.weight" in found.notes[0]
    assert wan_vae.load(path, device="cpu").notes == found.notes
    assert main(["inspect", str(path)]) == 0
    assert "projection heads" in capfd.readouterr().out


@pytest.mark.parametrize("prefix", ["ema.", "pipeline.vae.", "student.net."])
def test_an_unknown_prefix_and_an_unknown_nesting_are_taken_if_only_one_holds_a_vae(
    prefix, tmp_path
):
    state = random_state(wan21(dim=8))
    save_file({prefix + k: v for k, v in state.items()}, str(tmp_path / "v.safetensors"))
    found = load_checkpoint(tmp_path / "v.safetensors")
    assert_same(found, state)
    assert found.prefix == prefix
    torch.save({"weights": state, "step": 3, "optimizer": {"w": torch.ones(1)}}, tmp_path / "v.pth")
    assert_same(load_checkpoint(tmp_path / "v.pth"), state)
    torch.save({"a": state, "b": state}, tmp_path / "v.pth")
    with pytest.raises(CheckpointError, match="not a state dict of tensors: a, b"):
        load_checkpoint(tmp_path / "v.pth")


def test_of_a_model_and_its_average_the_model_is_taken(tmp_path):
    state, other = random_state(wan21(dim=8)), random_state(wan21(dim=8), seed=1)
    both = {f"model.{k}": v for k, v in state.items()} | {f"ema.{k}": v for k, v in other.items()}
    save_file(both, str(tmp_path / "v.safetensors"))
    assert_same(load_checkpoint(tmp_path / "v.safetensors"), state)


def test_weights_that_are_nothing_but_zeros_are_said(tmp_path, capfd):
    """A download that reserved its space first and broke off has the right size."""
    state = random_state(wan21(dim=8))
    zeros = sorted(k for k in state if k.endswith(".weight"))[-9:]
    save_file({k: v * (k not in zeros) for k, v in state.items()}, str(tmp_path / "v.safetensors"))
    found = load_checkpoint(tmp_path / "v.safetensors")
    assert zeros[0] in found.notes[0] and "(9 in all): nothing but zeros" in found.notes[0]
    save_latent(tmp_path / "z.latent", torch.zeros(1, 16, 1, 2, 2))
    argv = ["decode", str(tmp_path / "z.latent"), "--vae", str(tmp_path / "v.safetensors")]
    assert main([*argv, "-o", str(tmp_path / "o.png"), "--device", "cpu"]) == 0
    assert "nothing but zeros" in capfd.readouterr().err


def test_a_flat_trainers_file(tmp_path):
    state = random_state(wan21(dim=8))
    flat = {f"generator.{k}": v for k, v in state.items()} | {"discriminator.w": torch.ones(2)}
    save_file(flat, str(tmp_path / "v.safetensors"))
    assert_same(load_checkpoint(tmp_path / "v.safetensors"), state)


def sharded(folder, state, suffix=".safetensors", names=None) -> Path:
    """A folder as diffusers writes it with a small `max_shard_size`."""
    keys, files = sorted(state), {}
    for i, part in enumerate((keys[::2], keys[1::2])):
        name = f"diffusion_pytorch_model-0000{i + 1}-of-00002{suffix}"
        write = torch.save if suffix == ".bin" else save_file
        write({k: state[k] for k in part}, str(folder / name))
        files |= {k: (names or {}).get(i, name) for k in part}
    index = folder / f"diffusion_pytorch_model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_sharded_checkpoint(suffix, tmp_path):
    state = random_state(wan21(dim=8))
    index = sharded(tmp_path, state, suffix)
    assert_same(load_checkpoint(index), state)
    assert_same(load_checkpoint(tmp_path), state)
    with pytest.raises(CheckpointError, match="part 1 of a checkpoint of 2 files: pass diffusion"):
        load_checkpoint(tmp_path / f"diffusion_pytorch_model-00001-of-00002{suffix}")


def test_a_folder_with_an_index_of_any_name(tmp_path):
    """The error of a part says that its folder can be passed."""
    state = random_state(wan21(dim=8))
    index = sharded(tmp_path, state)
    index.rename(index.with_name("model.safetensors.index.json"))
    assert_same(load_checkpoint(tmp_path), state)


def test_an_index_of_a_variant(tmp_path):
    """diffusers writes diffusion_pytorch_model.safetensors.index.fp16.json."""
    state = random_state(wan21(dim=8))
    index = sharded(tmp_path, state)
    variant = index.rename(index.with_name("diffusion_pytorch_model.safetensors.index.fp16.json"))
    assert_same(load_checkpoint(variant), state)
    assert_same(load_checkpoint(tmp_path), state)


def test_an_index_is_not_believed(tmp_path):
    state = random_state(wan21(dim=8))
    index = sharded(tmp_path, state, names={1: "../secret-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match="expected files beside it"):
        load_checkpoint(index)
    sharded(tmp_path, state)
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"its part .*00002.*: no such file"):
        load_checkpoint(index)
    index.write_text("[1]")
    with pytest.raises(CheckpointError, match=r"without a .weight_map."):
        load_checkpoint(index)
    index.write_text('{"weight_map": ' * 100_000)
    with pytest.raises(CheckpointError, match="JSON"):
        load_checkpoint(index)


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.bin", "Wan2.1_VAE.pth", "vae/diffusion_pytorch_model.bin"]
)
def test_a_folder_with_a_pytorch_file(name, tmp_path):
    state = random_state(wan21(dim=8))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    torch.save(state, tmp_path / name)
    assert_same(load_checkpoint(tmp_path), state)


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


@pytest.mark.parametrize("last", ["native", "diffusers"])
def test_a_tensor_under_two_names_is_refused(last, tmp_path):
    """Two files merged into one: else the last of the two would be taken in silence."""
    native = random_state(SMALL_CONFIGS["wan2.1"])
    other = native["decoder.middle.0.residual.0.gamma"] * 9
    diffusers = {"decoder.mid_block.resnets.0.norm1.gamma": other}
    both = {**diffusers, **native} if last == "native" else {**native, **diffusers}
    torch.save(both, tmp_path / "v.pth")
    with pytest.raises(CheckpointError, match=r"holds tensors twice, .*norm1\.gamma") as caught:
        load_checkpoint(tmp_path / "v.pth")
    assert "decoder.middle.0.residual.0.gamma" in str(caught.value)


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
    with pytest.raises(BackendError, match="expected one of 'auto', 'fp32', 'bf16', 'fp16'"):
        wan_vae.WanVAE.from_state_dict(state, device="cpu", dtype=dtype)


def test_the_loaded_vae_keeps_nothing_of_the_callers_tensors():
    state = random_state(SMALL_CONFIGS["wan2.1"])
    vae = wan_vae.WanVAE.from_state_dict(state, device="cpu")
    z = torch.randn(1, 16, 1, 3, 4)
    before = vae.decode(z)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(vae.decode(z), before)
