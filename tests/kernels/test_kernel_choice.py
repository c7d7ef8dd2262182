"""What a request gets where some of its families, or all, are missing; and cards that imitate."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import SMALL_CONFIGS, random_state
from tests.dist.two_ways import two_ways
from wan_vae import WanVAE
from wan_vae.errors import BackendError
from wan_vae.kernels import registry
from wan_vae.kernels.cuda import driver
from wan_vae.kernels.device import CARDS, IMITATE, Device, nvidia
from wan_vae.kernels.proof import cache
from wan_vae.kernels.proof.cache import ProofCache
from wan_vae.network.model import WanVAEModel
from wan_vae.ops.eager.forms import EagerForms
from wan_vae.ops.opset import OpSet
from wan_vae.runs import engine
from wan_vae.runs.engine import layer_records
from wan_vae.runs.kernel_choice import OpsRequest, may_prove, select_ops, unavailable_reason

HOST = torch.device("cpu")


@pytest.fixture
def missing(monkeypatch) -> dict[str, str]:
    """Families that cannot be used on this machine, which is an RTX 3060; and no kernels at all."""
    reasons: dict[str, str] = {}
    monkeypatch.setattr(Device, "of", lambda device: CARDS["RTX 3060"])
    monkeypatch.setattr(registry, "unavailable_reason", lambda name, *_: reasons.get(name))
    monkeypatch.setattr(registry, "kernels_of", lambda operation, families: iter(()))
    monkeypatch.setattr(registry, "_cannot_compile", reasons.__contains__)
    return reasons


@pytest.fixture
def model() -> WanVAEModel:
    return WanVAEModel(SMALL_CONFIGS["wan2.1"])


def ops_for(backend, model) -> OpSet:
    proofs = ProofCache({}, None)
    return select_ops(OpsRequest(backend, model, only_frame=True), lambda: proofs)


def test_one_missing_family_costs_no_other_one(missing, model):
    missing["cuda"] = "no NVRTC"
    ops = ops_for("auto", model)
    assert [(r.family, r.reason) for r in ops.refusals] == [("cuda", "no NVRTC")]
    assert any(key[:4] == ("auto", True, None, "decoder") for key in model.prepared)
    assert unavailable_reason("auto", HOST, torch.float32) is None
    assert not may_prove(OpsRequest("auto", model, only_frame=True), HOST)
    assert may_prove(OpsRequest("auto", model, only_frame=False), HOST)


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_where_cuda_compiles_nobody_asks_for_triton(missing, model, backend):
    missing["triton"] = "triton is not installed"
    assert ops_for(backend, model).refusals == ()


def test_without_any_family_auto_is_eager_and_an_explicit_request_an_error(missing, model):
    missing |= {"cuda": "no NVRTC", "triton": "triton is not installed"}
    ops = ops_for("auto", model)
    assert ops.used["conv3d"] == "eager"
    assert [(r.family, r.reason) for r in ops.refusals] == list(missing.items())
    both = "cuda: no NVRTC; triton: triton is not installed"
    assert unavailable_reason("auto", HOST, torch.float32) == both
    with pytest.raises(BackendError, match="backend 'cuda' cannot run: no NVRTC"):
        ops_for("cuda", model)
    with pytest.raises(BackendError, match="'triton' cannot run: triton is not installed"):
        ops_for("triton", model)


@pytest.mark.parametrize("nvrtc", [True, False], ids=["nvrtc", "no-nvrtc"])
def test_auto_is_by_vendor_capability_and_compiler(nvrtc, monkeypatch):
    def library() -> None:
        if not nvrtc:
            raise OSError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(driver, "_nvrtc", library)
    nvidia_s = ("cuda",) if nvrtc else ("cuda", "triton")
    families = {"nvidia": nvidia_s, "amd": ("triton", "kitchen")}
    for card in CARDS.values():
        assert registry.families_of("auto", card) == families.get(card.vendor, ())
    old = nvidia("GTX 1080", (6, 1), 20)
    assert registry.families_of("auto", old) == ()
    assert registry.auto_reason(old) == (
        "used by default on NVIDIA cards of compute capability 7.5 or later and on AMD's gfx942, "
        "gfx11, gfx120, this card has 6.1"
    )


@pytest.fixture
def a_4090(monkeypatch):
    """This machine has one."""
    properties = SimpleNamespace(major=8, minor=9, multi_processor_count=128)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(cache, "device_name", lambda device: "RTX 4090")
    monkeypatch.setattr(Device, "of", lambda device: CARDS["RTX 4090"])


def test_verdicts_of_an_imitation_are_not_those_of_the_card(a_4090, monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.delenv(IMITATE, raising=False)
    own = cache.environment(device)
    assert "imitates" not in own and Device.chosen_for(device).imitation is None
    monkeypatch.setenv(IMITATE, "8.9")
    assert cache.environment(device) == own
    monkeypatch.setenv(IMITATE, "8.6")
    assert cache.environment(device) == own | {"imitates": "8.6"}
    assert Device.chosen_for(device).imitation == "as compute capability 8.6 (WAN_VAE_CAPABILITY)"
    monkeypatch.setenv(IMITATE, "gfx1100")
    known = own | {"imitates": "gfx1100", "miopen": "True"}
    assert cache.environment(device) == known
    assert Device.chosen_for(device).imitation == "as gfx1100 (WAN_VAE_CAPABILITY)"
    monkeypatch.setenv(IMITATE, "sm_86")
    with pytest.raises(BackendError, match="WAN_VAE_CAPABILITY is 'sm_86': expected a capability"):
        cache.environment(device)


def test_another_imitation_chooses_again(missing, model, monkeypatch):
    first = ops_for("cuda", model)
    assert ops_for("cuda", model) is first
    monkeypatch.setitem(os.environ, IMITATE, "8.0")
    assert ops_for("cuda", model) is not first


def test_a_report_names_the_imitation(missing, monkeypatch):
    missing |= {"cuda": "no NVRTC", "triton": "not here"}
    monkeypatch.setenv(IMITATE, "8.0")
    vae = WanVAE.from_state_dict(random_state(SMALL_CONFIGS["wan2.1"]), device="cpu")
    vae.decode(torch.zeros(1, 16, 1, 2, 2), backend="eager")
    assert vae.last_report is not None
    assert vae.last_report.device_name == "CPU as compute capability 8.0 (WAN_VAE_CAPABILITY)"


def test_other_forms_of_eager_layers_are_another_choice_and_no_new_proof(missing, model):
    missing["cuda"] = "no NVRTC"
    proofs = ProofCache({}, None)

    def ops(forms: EagerForms) -> OpSet:
        request = OpsRequest("auto", model, only_frame=True, forms=forms)
        return select_ops(request, lambda: proofs)

    off = EagerForms("columns", "columns", conv_reason="cuDNN is off")
    plain, unfolded = ops(EagerForms()), ops(off)
    assert ops(off) is unfolded and plain.forms == EagerForms()
    assert unfolded.forms == off
    reasons = ["no NVRTC", "cuDNN is off"]
    assert [r.reason for r in unfolded.refusals] == reasons
    assert [r.reason for r in plain.refusals] == reasons[:1]
    assert not may_prove(OpsRequest("auto", model, only_frame=True), HOST)


def test_what_runs_each_layer_is_looked_up_once_for_the_same_kernels(monkeypatch, tmp_path):
    """For a plan and again for its run it took a node 1 ms; nothing of it keeps kernels alive."""
    monkeypatch.setenv("WAN_VAE_CACHE", str(tmp_path))
    vae = WanVAE.from_state_dict(random_state(SMALL_CONFIGS["wan2.1"]), device="cpu")
    looked = []
    monkeypatch.setattr(
        engine, "layer_records", lambda *given: looked.append(1) or layer_records(*given)
    )
    z = torch.zeros(1, 16, 1, 2, 2)

    def decoded():
        vae.decode(z, plan=vae.plan(z.shape, backend="cuda"))
        return vae.last_report.layers

    with two_ways():
        first = decoded()
        assert decoded() == first and len(looked) == 1
        assert any(layer.backend == "cuda" for layer in first)
        with torch.no_grad():
            vae.model.decoder.conv1.weight.mul_(1.0)  # other kernels: they read copies
        assert decoded() == first and len(looked) == 2
        vae.model.prepared.clear()
        gc.collect()
        assert vae.engine._choices[0]() is None
        vae.decode(z, backend="eager")
        assert {layer.backend for layer in vae.last_report.layers} == {"eager"}
