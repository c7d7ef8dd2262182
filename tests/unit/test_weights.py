"""Copies of weights: what they are, and what is found while they are made."""

from __future__ import annotations

import os
import weakref

import pytest
import torch
from safetensors.torch import save_file

import wan_vae
from tests.conftest import random_state
from wan_vae.config import wan21
from wan_vae.device import host_empty
from wan_vae.errors import CheckpointError
from wan_vae.io.checkpoint import CAST_DTYPES, FLOAT_DTYPES
from wan_vae.io.staging import CudaUpload
from wan_vae.network import weights
from wan_vae.network.weights import copied, copy_weights, suspects_of, uploaded

CPU = torch.device("cpu")
# Pieces of 32000 numbers: several of them and a rest, exactly two, one, and none. And of 1 << 19.
SIZES = [(5, 20001), (2, 32000), (3, 4, 3, 3, 3), (1,), (0, 7), (3, 200_003), (1, 1 << 19)]


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {str(s): torch.randn(s, generator=generator).to(dtype) for s in SIZES}


@pytest.mark.parametrize("source", [*FLOAT_DTYPES, *CAST_DTYPES], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_copies_are_what_a_cast_gives(source, dtype):
    state = tensors(source)
    copies = copied(state, CPU, dtype)
    assert copies.state.keys() == state.keys() and copies.suspects == ()
    for key, value in state.items():
        assert torch.equal(copies.state[key], value.to(dtype)), key
        assert copies.state[key].data_ptr() != value.data_ptr() or not value.numel()


@pytest.mark.parametrize("source", [*FLOAT_DTYPES, *CAST_DTYPES], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_uploads_are_cast_group_by_group(source, dtype, monkeypatch):
    """Without a device: what is sent there, and what becomes of it."""
    monkeypatch.setattr(weights, "_GROUP_BYTES", 100_000)
    sent = []

    def upload(groups):
        for group in groups:
            assert all(x.dtype in (*FLOAT_DTYPES, dtype) for x in group.values())
            sent.append(list(group))
            raw = {key: x.clone() for key, x in group.items()}
            made = [weakref.ref(x.untyped_storage()) for x in raw.values()]
            yield raw
            # The memory of the next but one.
            assert not raw and not any(x() for x in made)

    state = tensors(source)
    own = uploaded(state, CPU, dtype, upload)
    assert len(sent) > 2 and [key for group in sent for key in group] == list(state) == list(own)
    for key, value in state.items():
        assert own[key].dtype == dtype and torch.equal(own[key], value.to(dtype)), key
    assert uploaded({}, CPU, dtype, upload) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("source", [*FLOAT_DTYPES, *CAST_DTYPES], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_copies_on_a_device_have_the_bits_of_those_on_the_host(source, dtype):
    """Of memory that is used again and again, and of tensors that lie in any way."""
    state = {**tensors(source), "large": torch.randn(33, 700_001).to(source)}
    state |= {"turned": state["large"].t(), "some": state["large"][::3, ::2]}
    state["parameter"] = torch.nn.Parameter(state["(5, 20001)"].clone(), requires_grad=False)
    state["there"] = state["(5, 20001)"].cuda()
    device = torch.device("cuda", 0)
    expected = copied(state, CPU, dtype).state
    for _ in range(3):
        with torch.inference_mode(), CudaUpload(device) as upload:
            copies = copied(state, device, dtype, upload)
        assert copies.suspects == () and set(copies.state) == set(state)
        for key, value in copies.state.items():
            assert value.device == device and value.is_contiguous() and not value.is_inference()
            assert torch.equal(value.cpu(), expected[key]), key


@pytest.mark.gpu
def test_uploads_leave_no_holes_in_the_memory_of_a_device():
    """What they took beside the copies can be given back to others."""
    state = {str(i): torch.randn(3 << 20) for i in range(40)}  # 12 MiB each, 6 as bfloat16
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    with CudaUpload(device) as upload:
        copies = copied(state, device, torch.bfloat16, upload)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(device) - before
    assert held <= 1.1 * sum(x.nbytes for x in copies.state.values()) + (20 << 20)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_suspected_on_a_device(bad):
    state = tensors()
    state["(2, 32000)"][1, 31999] = bad
    with CudaUpload(torch.device("cuda")) as upload:
        copies = copied(state, torch.device("cuda"), torch.bfloat16, upload)
    assert copies.suspects == ("(2, 32000)",)


def test_float32_is_rounded_as_pytorch_rounds_it():
    bits = torch.randint(0, 0x7F7FFFFF, (1 << 20,), generator=torch.Generator().manual_seed(1))
    bits = bits.to(torch.int32)
    # Halfway between two numbers, and next to it.
    halves = (bits & ~0xFFFF) | 0x8000
    x = torch.cat([bits, halves, halves - 1, halves + 1]).view(torch.float32)
    x = torch.cat([x, -x])
    copies = copied({"x": x}, CPU, torch.bfloat16)
    assert torch.equal(copies.state["x"].view(torch.int16), x.to(torch.bfloat16).view(torch.int16))
    assert copies.suspects == ()


def test_copies_are_contiguous_and_ordinary_whatever_the_source_is():
    x = torch.randn(6, 8, 3, 5, 5)
    with torch.inference_mode():
        made_there = x + 1
    state = {
        "channels last": x.contiguous(memory_format=torch.channels_last_3d),
        "expanded": x[:, :1].expand(6, 8, 3, 5, 5),
        "every second": x[::2],
        "parameter": torch.nn.Parameter(x.clone()),
        "inference": made_there,
    }
    with torch.inference_mode():
        copies = copied(state, CPU, torch.float32).state
    for key, value in state.items():
        own = copies[key]
        assert torch.equal(own, value) and own.is_contiguous(), key
        assert not own.is_inference() and not own.requires_grad and own.is_leaf, key
        own.add_(1)  # outside of inference mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_source_whose_sign_is_kept_apart_is_copied_with_it(dtype):
    source = torch.randn(3, 70)
    (copy,) = copied({"x": torch._neg_view(source)}, torch.device("cpu"), dtype).state.values()
    assert torch.equal(copy, (-source).to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 31999, 32000, -1])
def test_what_is_not_finite_is_suspected_wherever_it_is(bad, place):
    state = tensors()
    state["(5, 20001)"].view(-1)[place] = bad
    assert copied(state, CPU, torch.bfloat16).suspects == ("(5, 20001)",)
    assert suspects_of(state) == ("(5, 20001)",)
    state["(1,)"][0] = -bad
    assert set(copied(state, CPU, torch.float16).suspects) == {"(5, 20001)", "(1,)"}


def test_infinities_that_cancel_are_found():
    state = tensors()
    flat = state["(5, 20001)"].view(-1)
    flat[0], flat[-1] = float("inf"), -float("inf")
    assert copied(state, CPU, torch.float32).suspects == ("(5, 20001)",)


@pytest.mark.parametrize("name", ["v.safetensors", None])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_damaged_checkpoint_is_refused_with_its_path(name, dtype, tmp_path):
    state = random_state(wan21(dim=8))
    state["decoder.head.2.weight"][0, 0, 0, 0, 0] = float("nan")
    wanted = "not a complete wan2.1 VAE (z 16, width 8): NaN or inf in decoder.head.2.weight: "
    with pytest.raises(CheckpointError) as error:
        if name is None:
            wan_vae.WanVAE.from_state_dict(state, device="cpu", dtype=dtype)
        else:
            save_file(state, str(tmp_path / name))
            wan_vae.load(tmp_path / name, device="cpu", dtype=dtype)
    where = "" if name is None else f"{tmp_path / name}: "
    assert str(error.value).startswith(where + wanted)


def test_numbers_that_only_the_compute_dtype_has_no_room_for_are_no_damage():
    state = random_state(wan21(dim=8))
    state["decoder.conv1.bias"][0] = 1e6
    ours = wan_vae.WanVAE.from_state_dict(state, device="cpu", dtype="fp16").model.state_dict()
    assert ours["decoder.conv1.bias"].isinf().sum() == 1
    # What float64 holds and float32 does not is what it was before: nothing computes with it.
    state["decoder.conv1.bias"] = state["decoder.conv1.bias"].double()
    state["decoder.conv1.bias"][0] = 1e300
    with pytest.raises(CheckpointError, match=r"NaN or inf in decoder\.conv1\.bias"):
        wan_vae.WanVAE.from_state_dict(state, device="cpu", dtype="bf16")


def test_room_is_made_for_each_tensor_before_it_is_written_and_its_error_is_raised():
    state, made = tensors(), []
    targets = {key: torch.full_like(value, 7.0) for key, value in state.items()}

    def before(target: torch.Tensor) -> None:
        assert bool((target == 7).all())
        made.append(tuple(target.shape))

    assert copy_weights(state, targets, before) == ()
    assert sorted(made) == sorted(SIZES)
    assert all(torch.equal(targets[key], value) for key, value in state.items())

    def refuse(target: torch.Tensor) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match="No space left"):
        copy_weights(state, targets, refuse)


@pytest.mark.parametrize("size", [1, 4 << 20, (4 << 20) + 3, 9 << 20])
def test_host_memory_is_aligned_as_that_of_pytorch(size):
    made = host_empty((size,), torch.uint8)
    assert made.data_ptr() % 64 == 0 and made.shape == (size,)
    made.fill_(255)
    assert made.untyped_storage().nbytes() == size
