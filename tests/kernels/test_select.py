"""The loop that chooses kernels, with families that exist only here; and choosing as for another
card than the one that runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import random_state
from wan_vae import WanVAE
from wan_vae.chunking import schedule
from wan_vae.config import wan21, wan22
from wan_vae.kernels import registry
from wan_vae.kernels.device import CARDS, CPU, INTERPRETER, Device
from wan_vae.kernels.kernel import BuildError, Requires
from wan_vae.kernels.proof import cases
from wan_vae.kernels.proof.cache import ProofCache
from wan_vae.kernels.select import SelectRequest, proof_key, select_kernels
from wan_vae.layout import LayoutCounter
from wan_vae.network.blocks import Step
from wan_vae.network.cache import FeatureCache
from wan_vae.network.model import WanVAEModel
from wan_vae.network.sites import decoder_sites, encoder_sites, layer_sites
from wan_vae.ops.opset import CallSize, OpSet, Workspace
from wan_vae.ops.problem import ConvProblem, LayerSite, LayerWeights, NormConvProblem, Operation
from wan_vae.options import Axis, Part

HOST = torch.device("cpu")
FP32 = torch.float32


@dataclass(frozen=True)
class FakeLayer:
    """The eager convolution, times `factor`: a wrong kernel, unless that is 1."""

    family: str
    kernel: str
    config: str
    weight: torch.Tensor
    factor: float
    operand_dtype: torch.dtype = FP32

    def run(
        self,
        x: torch.Tensor,
        bias: torch.Tensor,
        counter: LayoutCounter,
        padding: tuple[int, int],
        last_slice: bool,
    ) -> torch.Tensor:
        used = self.weight[:, :, -1:] if last_slice else self.weight
        return F.conv3d(x, used, bias, padding=(0, *padding)) * self.factor

    def workspace(self, size: CallSize) -> Workspace:
        return Workspace()


@dataclass
class FakeKernel:
    """A kernel for convolutions. factors: of each configuration. broken: what cannot be built."""

    family: str
    factors: Mapping[str, float]
    requires: Requires = field(
        default_factory=lambda: Requires(
            frozenset({"cpu"}), feature_dtypes=frozenset({FP32}), in_multiple=16
        )
    )
    broken: tuple[str, ...] = ()
    name: str = "fake"
    operation: Operation = "conv3d"
    build_failures: tuple[type[Exception], ...] = (BuildError,)
    built: list[tuple[str, str, int]] = field(default_factory=list)

    @property
    def used(self) -> Mapping[str, str]:
        return {"conv3d": self.family}

    def candidates(self, problem: ConvProblem, device: Device) -> Sequence[str]:
        return tuple(self.factors) if problem.out_channels % 16 == 0 else ()

    def build(self, problem: ConvProblem, config: str, device: Device) -> None:
        self.built.append((config, device.machine_code, threading.get_ident()))
        if config in self.broken:
            raise BuildError(f"no {config} here")

    def prepare(
        self, weights: LayerWeights, problem: ConvProblem, config: str, device: Device
    ) -> FakeLayer:
        return FakeLayer(self.family, self.name, config, weights.weight, self.factors[config])


@pytest.fixture
def proofs() -> ProofCache:
    return ProofCache({"device": "here"}, None)


def site(name: str, channels: int, out: int) -> LayerSite:
    problem = ConvProblem("latent", channels, out, (1, 1, 1), FP32, FP32)
    generator = torch.Generator().manual_seed(channels + out)
    weight = torch.randn(out, channels, 1, 1, 1, generator=generator)
    return LayerSite(name, problem, LayerWeights(weight, torch.zeros(out)))


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    kernels: Sequence[FakeKernel],
    sites: Sequence[LayerSite],
    proofs: ProofCache,
    axis: Axis | None = None,
) -> OpSet:
    def kernels_of(operation: Operation, families: tuple[str, ...]) -> Iterator[FakeKernel]:
        return (k for k in kernels if k.operation == operation and k.family in families)

    monkeypatch.setattr(registry, "kernels_of", kernels_of)
    families = tuple(dict.fromkeys(k.family for k in kernels))
    return select_kernels(SelectRequest(sites, families, CPU, HOST, proofs, axis))


def test_the_first_kernel_that_is_right_runs_a_layer(monkeypatch, proofs):
    fast, slow = FakeKernel("fast", {"a": 1.0}), FakeKernel("slow", {"a": 1.0})
    ops = chosen(monkeypatch, [fast, slow], [site("x", 16, 16)], proofs)
    assert ops.layers["x"].family == "fast" and ops.used["conv3d"] == "fast"
    assert ops.refusals == ()


def test_a_wrong_configuration_is_passed_over_and_reported(monkeypatch, proofs):
    kernel = FakeKernel("fast", {"a": 1.5, "b": 1.0})
    ops = chosen(monkeypatch, [kernel], [site("x", 16, 16), site("y", 16, 16)], proofs)
    layer: Any = ops.layers["x"]
    assert layer.config == "b"
    (refusal,) = ops.refusals
    assert (refusal.op, refusal.family, refusal.layers) == ("conv3d", "fast", ("x", "y"))
    assert refusal.reason.startswith("fast fake: conv3d of latent 16x16 1x1x1 fp32 to fp32: a: ")
    assert "relative error" in refusal.reason and refusal.text.endswith("(2 layers)")


def test_a_family_that_is_wrong_leaves_the_layer_to_the_next(monkeypatch, proofs):
    fast, slow = FakeKernel("fast", {"a": 0.9}), FakeKernel("slow", {"a": 1.0})
    ops = chosen(monkeypatch, [fast, slow], [site("x", 16, 16)], proofs)
    assert ops.layers["x"].family == ops.used["conv3d"] == "slow"
    assert [r.family for r in ops.refusals] == ["fast"]


def test_what_cannot_be_built_is_a_reason_and_no_verdict(monkeypatch, proofs):
    kernel = FakeKernel("fast", {"a": 1.0, "b": 1.0}, broken=("a",))
    ops = chosen(monkeypatch, [kernel], [site("x", 16, 16), site("y", 16, 16)], proofs)
    layer: Any = ops.layers["x"]
    assert layer.config == "b"
    assert "no a here" in ops.refusals[0].reason
    # Once, ahead, beside others; and for the machine that runs it.
    assert [entry[0] for entry in kernel.built] == ["a", "b"]
    assert kernel.built[0][2] != threading.get_ident()
    assert kernel.built[0][1] == Device.of(HOST).architecture
    assert len(proofs) == 1


def test_unmet_requirements_are_reported_for_layers_that_run_eager_only(monkeypatch, proofs):
    narrow = FakeKernel("narrow", {"a": 1.0})
    sites = [site("x", 16, 16), site("y", 24, 16), site("z", 16, 24)]
    ops = chosen(monkeypatch, [narrow], sites, proofs)
    assert ops.layers.keys() == {"x"}
    assert {(r.reason, r.layers) for r in ops.refusals} == {
        ("needs multiples of 16 input channels, the layer has 24", ("y",)),
        ("no configuration for 16 to 24 channels", ("z",)),
    }
    wide = FakeKernel("wide", {"a": 1.0}, Requires(frozenset({"cpu"}), feature_dtypes={FP32}))
    ops = chosen(monkeypatch, [narrow, wide], sites[:2], proofs)
    assert ops.refusals == () and ops.layers["y"].family == "wide"


def test_an_operand_that_is_too_large_stays_eager(monkeypatch, proofs):
    limited = Requires(
        frozenset({"cpu"}), feature_dtypes=frozenset({FP32}), largest_operand=65504.0
    )
    kernel = FakeKernel("fast", {"a": 1.0}, limited, operation="norm_conv3d")
    weight, bias = torch.zeros(16, 16, 3, 3, 3), torch.zeros(16)
    for gain in (1e5, float("nan")):
        weights = LayerWeights(weight, bias, torch.full((16,), gain))
        large = LayerSite("x", NormConvProblem(16, 16, FP32), weights)
        ops = chosen(monkeypatch, [kernel], [large], proofs)
        assert not ops.layers and "too large for float16" in ops.refusals[0].reason


def test_calls_reach_the_layer_of_their_weight(monkeypatch, proofs):
    known, unknown = site("x", 16, 16), site("y", 16, 16)
    kernel = FakeKernel("fast", {"a": 1.0})
    ops = chosen(monkeypatch, [kernel], [known], proofs)
    x, bias = torch.randn(1, 16, 1, 2, 2), torch.zeros(16)
    expected = F.conv3d(x, known.weights.weight)
    for weight in (known.weights.weight, unknown.weights.weight):
        assert torch.equal(ops.conv3d(x, weight, bias, LayoutCounter()), F.conv3d(x, weight))
    assert torch.equal(ops.layers["x"].run(x, bias, LayoutCounter(), (0, 0), False), expected)
    assert ops.backend_of(known.weights.weight) == "fast"
    assert ops.backend_of(unknown.weights.weight) == "eager"


def test_a_verdict_is_asked_for_once_by_its_key(monkeypatch, proofs):
    kernel = FakeKernel("fast", {"a": 1.0})
    chosen(monkeypatch, [kernel], [site("x", 16, 16)], proofs)
    assert len(proofs) == 1
    monkeypatch.setattr(cases, "prove", None)  # would fail if it were called
    ops = chosen(monkeypatch, [kernel], [site("y", 16, 16)], proofs)
    assert ops.layers.keys() == {"y"}


def test_proof_keys_tell_apart_what_one_proof_does_not_cover():
    cuda, triton = FakeKernel("cuda", {}), FakeKernel("triton", {})
    wide = NormConvProblem(96, 96, torch.bfloat16)
    keys = {
        proof_key(kernel, problem, config, axis)
        for kernel in (cuda, triton)
        for problem in (
            wide,
            NormConvProblem(96, 96, torch.float16),
            NormConvProblem(96, 192, torch.bfloat16),
            NormConvProblem(96, 96, torch.bfloat16, only_frame=True),
            ConvProblem("features", 96, 96, (3, 3, 3), torch.bfloat16, torch.bfloat16),
            ConvProblem("latent", 96, 96, (3, 3, 3), torch.bfloat16, torch.bfloat16),
        )
        for config in ("a", "b")
        for axis in (None, "height", "width")
    }
    assert len(keys) == 2 * 6 * 2 * 3
    # How many frames a chunk has guides the choice, and nothing that is proven.
    more = NormConvProblem(96, 96, torch.bfloat16, frames=4)
    assert proof_key(cuda, more, "a", None) == proof_key(cuda, wide, "a", None)
    # A pointwise layer of a shard reads no neighbour's row.
    pointwise = ConvProblem("features", 96, 96, (1, 1, 1), torch.bfloat16, torch.bfloat16)
    assert proof_key(cuda, pointwise, "a", "height") == proof_key(cuda, pointwise, "a", None)


@pytest.mark.parametrize("config", [wan21(), wan22()], ids=lambda c: c.family)
def test_sites_have_the_native_names_and_every_weight_once(config):
    with torch.device("meta"):
        model = WanVAEModel(config).to(torch.bfloat16)
    weights = {id(p): name for name, p in model.named_parameters() if p.ndim > 3}
    weights = {key: name for key, name in weights.items() if name.endswith("weight")}
    seen = []
    for part in ("decoder", "encoder"):
        for entry in layer_sites(model, part):
            used = [entry.weights.weight, entry.weights.projection]
            names = [weights[id(p)] for p in used if p is not None]
            seen += names
            assert all(name.startswith(f"{entry.name}.") for name in names)
            assert entry.problem.feature_dtype == torch.bfloat16
    assert sorted(seen) == sorted(weights.values())
    names = {entry.name for entry in decoder_sites(model)}
    assert {"conv2", "decoder.conv1", "decoder.middle.1", "decoder.head.2"} <= names
    assert {"conv1", "encoder.conv1", "encoder.middle.1"} <= {s.name for s in encoder_sites(model)}


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_frames_of_an_image_are_one(part: Part):
    with torch.device("meta"):
        model = WanVAEModel(wan21())
    video = {getattr(s.problem, "frames", 1) for s in layer_sites(model, part)}
    image = {getattr(s.problem, "frames", 1) for s in layer_sites(model, part, only_frame=True)}
    assert video == {1, 2, 4} and image == {1}


# -- choosing as for one card, running on another ----------------------------------------------


@pytest.mark.usefixtures("interpreted")
@pytest.mark.skipif(torch.cuda.is_available(), reason="about Triton's interpreter")
def test_a_decode_chosen_as_for_a_card_without_tma(proofs):
    """Partly covered: convolutions through pointers, the up-sampler and attention eager."""
    pytest.importorskip("triton", reason="triton is not installed here: pip install triton")
    state = random_state(wan21(dim=16))
    vae = WanVAE.from_state_dict(state, device="cpu", dtype="fp16")
    exact = WanVAE.from_state_dict(state, device="cpu", dtype="fp32")
    sites = tuple(layer_sites(vae.model, "decoder", only_frame=True))
    card = CARDS["RTX 3060"]
    ops = select_kernels(SelectRequest(sites, ("triton",), card, HOST, proofs))
    kernels = {s.problem.operation: getattr(ops.layers.get(s.name), "kernel", None) for s in sites}
    assert kernels == {
        "conv3d": "pointer",
        "norm_conv3d": "pointer",
        "head": "narrow",
        "upsample_conv2d": None,
        "attention": None,
    }
    assert {r.op for r in ops.refusals} == {"upsample_conv2d", "attention"}
    assert all("this card has 8.6" in r.reason for r in ops.refusals)
    assert ops.used["attention"] == ops.used["upsample_conv2d"] == "eager"
    z = torch.randn(1, 16, 1, 2, 1, generator=torch.Generator().manual_seed(0))
    expected = exact.decode(z, backend="eager")
    (chunk,) = schedule(1, 1)
    step = Step(FeatureCache(), chunk, ops=ops)
    with torch.inference_mode():
        y = vae.model.decode_chunk(z.half(), step)
    assert ((y - expected).norm() / expected.norm()).item() < 5e-3
    assert step.counter.mixed_calls == 0


def test_the_interpreter_is_a_device_of_its_own():
    assert INTERPRETER.vendor == "interpreter" and INTERPRETER.capability is None
