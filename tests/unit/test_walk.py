"""The walk over a network finds what `torch.nn.Module` finds, in the same order."""

import weakref

import pytest
import torch
from torch import nn

from wan_vae import walk
from wan_vae.config import wan21
from wan_vae.network.model import WanVAEModel


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return WanVAEModel(wan21(dim=8))


def test_modules_and_parameters(model):
    assert walk.named_modules(model) == list(model.named_modules())
    ours, theirs = walk.named_parameters(model), list(model.named_parameters())
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert all(a is b for (_, a), (_, b) in zip(ours, theirs, strict=True))
    some = walk.parameters(model.decoder, model.conv2)
    expected = [*model.decoder.parameters(), *model.conv2.parameters()]
    assert len(some) == len(expected) and all(map(lambda a, b: a is b, some, expected))


def test_parameters_are_those_of_now():
    """Which are replaced, taken away and given back, by `to` and by whoever moves a network."""
    with torch.device("meta"):
        network = WanVAEModel(wan21(dim=8))
    layer, before = network.conv2, walk.parameters(network)
    assert list(map(id, before)) == list(map(id, network.parameters()))
    layer.weight, layer.bias = nn.Parameter(torch.ones(2)), None
    after = walk.parameters(network)
    assert list(map(id, after)) == list(map(id, network.parameters()))
    assert len(after) == len(before) - 1
    assert any(p is layer.weight for p in after)
    network.to_empty(device="cpu").half()
    assert {(p.device.type, p.dtype) for p in walk.parameters(network)} == {("cpu", torch.float16)}
    gone = weakref.ref(network)
    del network, layer
    assert gone() is None


def test_state(model):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1, bias=False))
    network[1].register_buffer("kept", torch.ones(2))
    network[1].register_buffer("dropped", torch.ones(2), persistent=False)
    for root in (network, model):
        ours, theirs = walk.plain_state(root), root.state_dict()
        assert list(ours) == list(theirs)
        assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)


class _Renamed(nn.Linear):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "other"] = self.weight


def _hooked():
    layer = nn.Linear(2, 2)
    layer.register_state_dict_post_hook(lambda *_: None)
    return layer


def _replaced():
    layer = nn.Linear(2, 2)
    layer.state_dict = lambda *_, **__: {}
    return layer


def test_what_makes_another_state_dict_is_not_plain():
    for layer in (_Renamed(2, 2), _hooked(), _replaced()):
        assert walk.plain_state(layer) is None
        assert walk.plain_state(nn.Sequential(nn.Linear(2, 2), layer)) is None
