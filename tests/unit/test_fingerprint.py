"""When the weights of a VAE count as changed."""

import weakref
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import random_state
from wan_vae.config import wan21
from wan_vae.io.fingerprint import (
    PER_ROW,
    Look,
    _places,
    _places_on,
    _sampled,
    _taken,
    fingerprint,
    is_elsewhere,
)


@pytest.fixture
def state():
    return random_state(wan21(dim=16))


def test_moving_and_laying_out_changes_nothing(state):
    moved = {name: tensor.clone() for name, tensor in state.items()}
    last = torch.channels_last_3d
    packed = {
        name: tensor.contiguous(memory_format=last) if tensor.ndim == 5 else tensor
        for name, tensor in state.items()
    }
    assert fingerprint(moved) == fingerprint(packed) == fingerprint(state)


def test_the_order_of_names_does_not_count(state):
    """A patched module that was put back stands at the end of the state dict."""
    assert fingerprint(dict(reversed(state.items()))) == fingerprint(state)


def test_a_factor_on_any_one_tensor_is_seen(state):
    before = fingerprint(state)
    for name, tensor in state.items():
        assert fingerprint({**state, name: tensor * 1.01}) != before, name


def test_any_one_output_channel_is_seen(state):
    name = "decoder.middle.0.residual.2.weight"
    before = fingerprint(state)
    for channel in range(state[name].shape[0]):
        changed = state[name].clone()
        changed[channel] *= -1
        assert fingerprint({**state, name: changed}) != before, channel


def test_a_change_in_inference_mode_is_seen(state):
    """Tensors made there have no version counter."""
    with torch.inference_mode():
        made = {name: tensor.clone() for name, tensor in state.items()}
        before = fingerprint(made)
        made["decoder.conv1.weight"].mul_(2)
        assert fingerprint(made) != before


def test_names_dtypes_and_shapes_count(state):
    name = "conv2.bias"
    zero = torch.zeros(16)
    prints = [
        fingerprint({**state, name: zero}),
        fingerprint({**state, name: zero.int()}),
        fingerprint({**state, name: zero.view(4, 4)}),
        fingerprint({**state, name: zero.bfloat16()}),
        fingerprint({**{k: v for k, v in state.items() if k != name}, "other": zero}),
    ]
    assert len(set(prints)) == len(prints)


def test_nan_equals_itself(state):
    broken = {**state, "conv2.bias": torch.full((16,), torch.nan)}
    assert fingerprint(broken) == fingerprint(dict(broken)) != fingerprint(state)


def test_weights_that_are_nowhere_have_none(state):
    assert fingerprint({**state, "conv2.bias": torch.empty(16, device="meta")}) is None


def test_a_tensor_whose_sign_is_kept_apart_has_that_of_its_numbers(state):
    names = ("decoder.middle.0.residual.2.weight", "conv2.bias")
    negative = {**state, **{name: -state[name] for name in names}}
    lazy = {**state, **{name: torch._neg_view(state[name]) for name in names}}
    assert fingerprint(lazy) == fingerprint(negative) != fingerprint(state)
    assert Look.of(lazy) is None


def test_what_is_elsewhere_may_come_back(state):
    assert not is_elsewhere(state) and not is_elsewhere({**state, "none": None})
    for odd in (state["conv2.weight"].to_sparse(), torch.zeros(2, dtype=torch.complex128)):
        assert fingerprint({**state, "odd": odd}) is None and not is_elsewhere({"odd": odd})
    assert is_elsewhere({**state, "odd": torch.empty(2, device="meta")})
    given_back = torch.zeros(2)
    given_back.untyped_storage().resize_(0)
    assert is_elsewhere({**state, "odd": given_back})


def _odd(state):
    """`state` with weights in other formats and widths, one part of a larger tensor, one empty."""
    odd = dict(state)
    for number, (name, tensor) in enumerate(state.items()):
        if number % 3 == 0:
            odd[name] = tensor.bfloat16()
        elif tensor.ndim == 5 and number % 3 == 1:
            odd[name] = tensor.contiguous(memory_format=torch.channels_last_3d)
    odd["conv2.bias"] = torch.randn(3, 16)[1]
    odd["conv2.weight"] = torch.randn(16, 40).t()[3:19]
    odd["none"] = torch.empty(0, 3)
    return odd


@pytest.mark.parametrize("make", [dict, _odd])
def test_a_look_sees_each_change_of_bits_in_place(state, make):
    made = make(state)
    look = Look.of(made)
    assert look.is_still_true(made) and look.is_still_true(dict(reversed(made.items())))
    for name, tensor in made.items():
        if tensor.numel() and tensor.dtype.is_floating_point:
            before = tensor.clone()
            tensor.mul_(1.01)
            assert not look.is_still_true(made), name
            tensor.copy_(before)
            assert look.is_still_true(made), name


def test_a_look_sees_any_one_output_channel(state):
    weight = state["decoder.middle.0.residual.2.weight"]
    look = Look.of(state)
    for channel in range(weight.shape[0]):
        weight[channel].neg_()
        assert not look.is_still_true(state), channel
        weight[channel].neg_()
    assert look.is_still_true(state)


def test_a_look_sees_other_tensors(state):
    """Also such as lie where the old ones lay."""
    look, name = Look.of(state), "decoder.middle.0.residual.2.weight"
    weight = state[name]
    others = (
        weight.clone(),
        weight.view(torch.int32),
        weight.transpose(0, 1),
        weight[:-1],
        torch._neg_view(weight),
        weight.to("meta"),
        weight.to_sparse(),
        torch.nested.nested_tensor([weight]),
        None,
        weight.numpy(),
    )
    for other in others:
        assert not look.is_still_true({**state, name: other}), type(other)
    assert not look.is_still_true({k: v for k, v in state.items() if k != name})
    assert not look.is_still_true({**state, "other": weight})


def test_a_look_keeps_no_tensor_and_reads_no_memory_that_was_given_back(state):
    look, name = Look.of(state), "decoder.middle.0.residual.2.weight"
    gone = weakref.ref(state[name])
    state[name] = state[name].clone()
    assert gone() is None and not look.is_still_true(state)
    look = Look.of(state)
    state[name].untyped_storage().resize_(16)
    assert not look.is_still_true(state)
    state[name].untyped_storage().resize_(0)
    assert not look.is_still_true(state)


def test_no_look_at_what_is_not_in_host_memory_or_lies_at_odd_addresses(state):
    assert Look.of({**state, "conv2.bias": torch.empty(16, device="meta")}) is None
    odd = torch.frombuffer(bytearray(4 * 16 + 1), dtype=torch.float32, offset=1, count=16)
    assert fingerprint({**state, "conv2.bias": odd}) is not None
    assert Look.of({**state, "conv2.bias": odd}) is None


@pytest.mark.gpu
def test_a_device_gives_the_print_of_the_host(state):
    """Also where ComfyUI left a part of the weights behind, and dtypes differ."""
    state["conv2.bias"] = state["conv2.bias"].bfloat16()
    there = {name: tensor.cuda() for name, tensor in state.items()}
    partly = {
        name: tensor.cuda() if i % 3 else tensor for i, (name, tensor) in enumerate(state.items())
    }
    assert fingerprint(there) == fingerprint(partly) == fingerprint(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_of_a_device_are_those_of_the_host(dtype):
    """By an operation that every device has: MPS has no `take`."""

    class Names(TorchDispatchMode):
        seen: ClassVar[set[str]] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.add(func.name().partition(".")[0])
            return func(*args, **(kwargs or {}))

    weight = torch.randn(24, 16, 3, 3, 3).to(dtype)
    at = _places(weight.shape)
    host = weight.view(torch.int32 if dtype == torch.float32 else torch.int16).numpy()
    expected = host[tuple(at)].tobytes()
    assert len(expected) == 24 * PER_ROW * weight.element_size()
    for same in (weight, weight.contiguous(memory_format=torch.channels_last_3d)):
        bits = same.view(torch.int32 if dtype == torch.float32 else torch.int16)
        with Names() as names:
            sampled = _sampled(bits, _places_on(tuple(bits.shape), bits.device))
        assert sampled.numpy().tobytes() == expected
        assert "aten::index" in names.seen and "aten::take" not in names.seen
        assert _sampled(bits, None).numpy().tobytes() == weight.view(torch.uint8).numpy().tobytes()


def test_samples_are_at_their_places_in_every_memory_format():
    weight = torch.randn(16, 8, 3, 5, 7)
    at = _places(tuple(weight.shape))
    expected = weight.numpy()[tuple(at)]
    last = weight.contiguous(memory_format=torch.channels_last_3d)
    for same in (weight, last, torch.cat((weight, weight), 1)[:, :8], weight.mT.contiguous().mT):
        assert (_taken(same) == expected).all()
    assert not (_taken(-weight) == expected).any()
