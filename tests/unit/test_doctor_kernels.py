"""What `wan-vae doctor` says of kernels: what runs each class of layers, its gain, what is off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.conftest import SMALL_CONFIGS
from wan_vae.commands import doctor
from wan_vae.kernels.device import CARDS, IMITATE, Device
from wan_vae.network.sites import layer_sites
from wan_vae.ops.opset import LayerChoice, OpSet, Refusal, eager_ops
from wan_vae.runs.kernel_choice import OpsRequest

HOST = torch.device("cpu")
FAST = LayerChoice("cuda", "mma", "winograd_halfsums", 1.25, 3.5)
PLAIN = LayerChoice("cuda", "norm", "direct")


def some_kernels(request: OpsRequest, proofs) -> OpSet:
    """As if the heads ran in one kernel, whose time is known, and the latents in another."""
    choices = {}
    for site in layer_sites(request.model, request.part, request.only_frame):
        if site.problem.operation == "head":
            choices[site.name] = FAST
        elif site.problem.operation == "conv3d":
            choices[site.name] = PLAIN
    refusal = Refusal("conv3d", "cuda", "cuda mma: a: relative error 1e-1", ("x", "y"))
    return replace(eager_ops(), choices=choices, refusals=(refusal,))


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    monkeypatch.setattr(doctor, "wan21", lambda: SMALL_CONFIGS["wan2.1"])
    monkeypatch.setattr(doctor, "wan22", lambda: SMALL_CONFIGS["wan2.2"])
    monkeypatch.setattr(doctor, "unavailable_reason", lambda *arguments: None)
    monkeypatch.setattr(doctor, "select_ops", some_kernels)
    return doctor.check_kernels(HOST)


def test_each_class_of_layers_has_a_line_with_what_it_gained(lines):
    heads = [line.split() for line in lines if " head " in line]
    assert len(heads) == 8  # two models, both parts, video and image
    for words in heads:
        assert words[0] == "1"
        told = "cuda mma winograd_halfsums 2.8x 1.250 ms, eager 3.500 ms"
        assert " ".join(words[-9:]) == told
    assert any(line.endswith("cuda norm direct") for line in lines)  # not timed
    assert any("norm_conv3d" in line and line.endswith(" eager") for line in lines)
    assert sum("conv3d off: cuda mma: a: relative error" in line for line in lines) == 8
    assert all(line == line.rstrip() and "\n" not in line for line in lines)


def test_sums_in_float16_are_explained_once(lines):
    (note,) = (line for line in lines if line.startswith("_halfsums: "))
    assert "cannot overflow" in note


def test_an_imitation_is_named(monkeypatch):
    monkeypatch.setattr(Device, "of", lambda device: CARDS["H100"])
    monkeypatch.setenv(IMITATE, "8.6")
    monkeypatch.setattr(doctor, "unavailable_reason", lambda *arguments: None)
    monkeypatch.setattr(doctor, "wan21", lambda: SMALL_CONFIGS["wan2.1"])
    monkeypatch.setattr(doctor, "wan22", lambda: SMALL_CONFIGS["wan2.2"])
    monkeypatch.setattr(doctor, "select_ops", lambda *arguments, **options: eager_ops())
    lines = doctor.check_kernels(HOST)
    assert lines[0] == "kernels: as compute capability 8.6 (WAN_VAE_CAPABILITY)"
    assert not any(line.startswith("_halfsums") for line in lines)
