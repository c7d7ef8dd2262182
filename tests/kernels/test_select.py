"""The loop that chooses kernels, with families that exist only here; and choosing as for another
card than the one that runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import random_state
from wan_vae import WanVAE
from wan_vae.chunking import schedule
from wan_vae.config import wan21, wan22
from wan_vae.device import numbers_of
from wan_vae.errors import BackendError
from wan_vae.kernels import registry, select
from wan_vae.kernels.bounds import (
    LARGEST_FLOAT16,
    Bound,
    float16_sums_bound,
    operand_bound,
    winograd_phases,
)
from wan_vae.kernels.contenders import Contenders
from wan_vae.kernels.device import CARDS, CPU, INTERPRETER, Device
from wan_vae.kernels.kernel import BuildError, Requires
from wan_vae.kernels.proof import cases
from wan_vae.kernels.proof.cache import ProofCache
from wan_vae.kernels.proof.cases import proof_size
from wan_vae.kernels.proof.choice import EAGER, Choice, worth_their_bits
from wan_vae.kernels.proof.prove import Verdict
from wan_vae.kernels.proof.timing import device_timer, timed_size
from wan_vae.kernels.select import SelectRequest, proof_key, select_kernels
from wan_vae.kernels.winograd import POINTS, grown_quad_phases, quad_phases
from wan_vae.layout import LayoutCounter
from wan_vae.network.blocks import Step
from wan_vae.network.cache import FeatureCache
from wan_vae.network.model import WanVAEModel
from wan_vae.network.sites import decoder_sites, encoder_sites, layer_sites
from wan_vae.ops.opset import CallSize, LayerChoice, OpSet, Workspace
from wan_vae.ops.problem import (
    AttentionProblem,
    ConvProblem,
    LayerSite,
    LayerWeights,
    NormConvProblem,
    Operation,
    StridedProblem,
)
from wan_vae.options import Axis, Part

HOST = torch.device("cpu")
FP32 = torch.float32


@dataclass(frozen=True)
class FakeLayer:
    """The eager convolution, times `factor`: a wrong kernel, unless that is 1. ran: notes every
    call."""

    family: str
    kernel: str
    config: str
    weight: torch.Tensor
    factor: float
    ran: list[str]
    operand_dtype: torch.dtype = FP32

    def run(
        self,
        x: torch.Tensor,
        bias: torch.Tensor,
        counter: LayoutCounter,
        padding: tuple[int, int],
        last_slice: bool,
    ) -> torch.Tensor:
        self.ran.append(f"{self.family} {self.config}")
        used = self.weight[:, :, -1:] if last_slice else self.weight
        return F.conv3d(x, used, bias, padding=(0, *padding)) * self.factor

    def workspace(self, size: CallSize) -> Workspace:
        return Workspace()


@dataclass
class FakeKernel:
    """A kernel for convolutions. factors: of each configuration. broken: what cannot be built.
    reach: the bound of a configuration, below 100."""

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
    sums_error: float = 0.0
    compiles_at_launch: bool = False
    reach: Mapping[str, float] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
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

    def bound(self, weights: LayerWeights, problem: ConvProblem, config: str) -> Bound | None:
        if config not in self.reach:
            return None
        return Bound((torch.tensor(self.reach[config]),), 100.0, "sums")

    def prepare(
        self, weights: LayerWeights, problem: ConvProblem, config: str, device: Device
    ) -> FakeLayer:
        return FakeLayer(
            self.family, self.name, config, weights.weight, self.factors[config], self.ran
        )


@dataclass
class FakeTimer:
    """A clock by the name "family configuration" of what ran, and EAGER; counts its calls."""

    times: Mapping[str, float]
    kernels: Sequence[FakeKernel]
    asked: list[str] = field(default_factory=list)

    def __call__(self, run: Callable[[], object]) -> float:
        for kernel in self.kernels:
            kernel.ran.clear()
        run()
        ran = [name for kernel in self.kernels for name in kernel.ran]
        assert len(ran) <= 1
        self.asked.append(ran[0] if ran else EAGER)
        return self.times[self.asked[-1]]


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
    timer: FakeTimer | None = None,
    prescribed: Mapping[str, LayerChoice] | None = None,
) -> OpSet:
    def kernels_of(operation: Operation, families: tuple[str, ...]) -> Iterator[FakeKernel]:
        return (k for k in kernels if k.operation == operation and k.family in families)

    monkeypatch.setattr(registry, "kernels_of", kernels_of)
    monkeypatch.setattr(registry, "is_timed_beside", lambda name: name == "beside")
    families = tuple(dict.fromkeys(k.family for k in kernels))
    request = SelectRequest(sites, families, CPU, HOST, proofs, axis, timer, prescribed)
    return select_kernels(request)


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


# -- choosing by time ---------------------------------------------------------------------------


def raced(
    monkeypatch: pytest.MonkeyPatch,
    kernels: Sequence[FakeKernel],
    times: Mapping[str, float],
    proofs: ProofCache,
    sites: Sequence[LayerSite] = (),
    axis: Axis | None = None,
) -> tuple[OpSet, list[str]]:
    """The operations, and what was timed."""
    timer = FakeTimer(times, kernels)
    return chosen(
        monkeypatch, kernels, sites or [site("x", 16, 16)], proofs, axis, timer
    ), timer.asked


def test_the_fastest_right_kernel_runs_a_layer_and_its_gain_is_known(monkeypatch, proofs):
    kernel, other = FakeKernel("one", {"a": 1.0, "b": 1.5, "c": 1.0}), FakeKernel("two", {"a": 1.0})
    times = {"one a": 2.0, "one c": 1.0, "two a": 1.5, EAGER: 3.0}
    ops, timed = raced(monkeypatch, [kernel, other], times, proofs)
    choice = ops.choices["x"]
    assert choice == LayerChoice("one", "fake", "c", 1.0, 3.0)
    assert choice.gain == 3.0 and choice.text == "one fake c"
    assert set(timed) == times.keys()
    # What is wrong is still said, what is slower is no fault.
    (refusal,) = ops.refusals
    assert ": b: relative error" in refusal.reason and refusal.family == "one"


@pytest.mark.parametrize("last", ["other", "beside"])
def test_a_family_may_be_timed_beside_those_that_are_enough(monkeypatch, proofs, last):
    """One configuration of it, the first that is right."""
    kernels = [
        FakeKernel("one", {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}),
        FakeKernel(last, {"wrong": 2.0, "e": 1.0, "f": 1.0}),
    ]
    times = {"one a": 4.0, "one b": 4.0, "one c": 4.0, "beside e": 1.0, EAGER: 9.0}
    ops, timed = raced(monkeypatch, kernels, times, proofs)
    assert set(timed) == (set(times) if last == "beside" else set(times) - {"beside e"})
    assert ops.choices["x"].text == ("beside fake e" if last == "beside" else "one fake a")


def test_a_choice_is_kept_for_the_next_process_and_for_other_layers(monkeypatch, proofs, tmp_path):
    kernel = FakeKernel("one", {"a": 1.0, "b": 1.0})
    kept = ProofCache({"device": "here"}, tmp_path)
    sites = [site("x", 16, 16), site("y", 16, 16)]
    first, timed = raced(
        monkeypatch, [kernel], {"one a": 2.0, "one b": 1.0, EAGER: 9.0}, kept, sites
    )
    # One class, two rounds, of which eager's was lost in the first.
    assert timed == ["one a", "one b", EAGER, "one a", "one b"]
    kernel.built.clear()
    # A clock that would now say otherwise is not asked, and what lost is not built.
    again = ProofCache({"device": "here"}, tmp_path)
    second, timed = raced(monkeypatch, [kernel], {}, again, sites)
    assert timed == [] and [entry[0] for entry in kernel.built] == ["b"]
    assert second.choices == first.choices and second.choices["y"].config == "b"
    # Another list of contenders is another question.
    more = FakeKernel("one", {"a": 1.0, "b": 1.0, "c": 1.0})
    times = {"one a": 2.0, "one b": 1.0, "one c": 3.0, EAGER: 9.0}
    _, timed = raced(monkeypatch, [more], times, again, sites)
    assert timed


def test_eager_wins_only_by_more_than_the_bits_are_worth(monkeypatch, proofs):
    kernel = FakeKernel("one", {"a": 1.0})
    ops, _ = raced(monkeypatch, [kernel], {"one a": 1.1, EAGER: 1.0}, proofs)
    assert ops.choices["x"].gain == pytest.approx(1 / 1.1) and ops.refusals == ()
    proofs = ProofCache({"device": "there"}, None)
    sites = [site("x", 16, 16), site("y", 16, 16)]
    ops, _ = raced(monkeypatch, [kernel], {"one a": 1.4, EAGER: 1.0}, proofs, sites)
    assert not ops.layers and ops.used["conv3d"] == "eager"
    (refusal,) = ops.refusals
    assert refusal.text == (
        "PyTorch is 1.4x faster here: the bits of these layers depend on the size of the picture "
        "(2 layers)"
    )


def test_a_small_layer_does_not_take_the_same_bits_from_a_picture():
    """Eager must save a fiftieth of the time of all layers, in all classes together."""
    big = Choice("big k", {"big k": 10.0, EAGER: 30.0})
    small = Choice(EAGER, {"small a": 0.5, "small b": 0.4, EAGER: 0.2})
    layers = {"big": 4, "small": 2, "wrong": 1}
    wrong = Choice(EAGER, {}, {"wrong k": "a race"})
    choices = {"big": big, "small": small, "wrong": wrong}
    assert worth_their_bits(choices, layers) == {"small": "small b"}
    assert worth_their_bits({**choices, "big": Choice("big k", {"big k": 4.0})}, layers) == {}
    two = {**choices, "other": Choice(EAGER, {"other k": 1.2, EAGER: 0.5})}
    assert worth_their_bits(two, {**layers, "other": 1}) == {"small": "small b"}


def test_a_small_layer_keeps_its_kernel(monkeypatch, proofs):
    kernel = FakeKernel("one", {"a": 1.0})
    sites = [site("small", 16, 16), *(site(f"big{i}", 32, 32) for i in range(3))]

    class BySize(FakeTimer):
        """Eager is twice as fast, but for the layers that matter."""

        def __call__(self, run: Callable[[], object]) -> float:
            super().__call__(run)
            is_small = len(self.asked) <= 4  # narrow layers are timed first
            return (
                {"one a": 0.2, EAGER: 0.1}[self.asked[-1]]
                if is_small
                else ({"one a": 9.0, EAGER: 20.0}[self.asked[-1]])
            )

    timer = BySize({"one a": 1.0, EAGER: 1.0}, [kernel])
    ops = chosen(monkeypatch, [kernel], sites, proofs, None, timer)
    assert set(ops.layers) == {"small", "big0", "big1", "big2"} and ops.refusals == ()
    assert sorted({choice.gain for choice in ops.choices.values()}) in (
        [pytest.approx(0.5), pytest.approx(20 / 9)],
    )


def test_a_kernel_that_is_slower_gets_its_turn_when_the_fastest_cannot_be_built(
    monkeypatch, tmp_path
):
    proofs = ProofCache({"device": "here"}, tmp_path)
    kernel = FakeKernel("one", {"a": 1.0, "b": 1.0})
    times = {"one a": 2.0, "one b": 1.0, EAGER: 9.0}
    assert raced(monkeypatch, [kernel], times, proofs)[0].choices["x"].config == "b"
    broken = FakeKernel("one", {"a": 1.0, "b": 1.0}, broken=("b",))
    ops, _ = raced(monkeypatch, [broken], times, proofs)
    assert ops.choices["x"] == LayerChoice("one", "fake", "a")


def test_a_shard_takes_the_choice_of_the_whole_picture(monkeypatch, proofs):
    """Else its bits were others. What wins is proven with halo rows too."""
    kernel = FakeKernel("one", {"a": 1.0, "b": 1.0})
    wide = [wide_site("x")]
    times = {"one a": 2.0, "one b": 1.0, EAGER: 9.0}
    shard, timed = raced(monkeypatch, [kernel], times, proofs, wide, "height")
    whole, again = raced(monkeypatch, [kernel], {}, proofs, wide)
    assert timed and not again and shard.choices == whole.choices
    assert len(proofs) == 3  # a, b, b with halo rows
    # And if only the halo rows are wrong, another kernel runs, and it is said.
    monkeypatch.setattr(select, "prove_kernel", wrong_with_halo_rows("b"))
    elsewhere = ProofCache({"device": "there"}, None)
    shard, _ = raced(monkeypatch, [kernel], times, elsewhere, wide, "height")
    assert shard.choices["x"].config == "a"


def wide_site(name: str) -> LayerSite:
    problem = ConvProblem("latent", 16, 16, (1, 3, 3), FP32, FP32)
    weight = torch.randn(16, 16, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    return LayerSite(name, problem, LayerWeights(weight, torch.zeros(16)))


def wrong_with_halo_rows(wrong: str) -> Callable[..., Verdict]:
    def prove(kernel, problem, config, device, runs_on, axis) -> Verdict:
        return Verdict(True) if axis is None or config != wrong else Verdict(False, "halo rows")

    return prove


def test_no_more_than_a_few_are_timed_and_nothing_more_when_time_is_up(monkeypatch, proofs):
    many = FakeKernel("one", dict.fromkeys("ab", 1.0))
    others = FakeKernel("two", dict.fromkeys("abcd", 1.0))
    times = dict.fromkeys(["one a", "one b", "two a", EAGER], 1.0)
    ops, timed = raced(monkeypatch, [many, others], times, proofs)
    assert set(timed) == times.keys() and ops.choices["x"].config == "a"
    assert len(proofs) == 3
    monkeypatch.setattr(select, "_BUDGET_S", 0.0)
    proofs = ProofCache({"device": "there"}, None)
    ops, timed = raced(monkeypatch, [many, others], times, proofs)
    assert set(timed) == {"one a", EAGER} and len(proofs) == 1


def test_what_fails_at_the_size_of_the_clock_is_refused(monkeypatch, proofs):
    kernel = FakeKernel("one", {"a": 1.0, "b": 1.0})

    class Failing(FakeTimer):
        def __call__(self, run: Callable[[], object]) -> float:
            ms = super().__call__(run)
            if self.asked[-1] == "one a":
                raise BuildError("too many programs")
            return ms

    timer = Failing({"one a": 1.0, "one b": 1.0, EAGER: 2.0}, [kernel])
    ops = chosen(monkeypatch, [kernel], [site("x", 16, 16)], proofs, None, timer)
    assert ops.choices["x"].config == "b"
    assert "BuildError: too many programs" in ops.refusals[0].reason


def test_the_choices_of_another_rank_are_taken_or_refused(monkeypatch, proofs):
    kernel = FakeKernel("one", {"a": 1.0, "b": 1.0, "c": 1.5})
    sites = [site("x", 16, 16), site("y", 16, 16)]
    theirs = {"x": LayerChoice("one", "fake", "b", 1.0, 2.0)}
    timer = FakeTimer({}, [kernel])
    ops = chosen(monkeypatch, [kernel], sites, proofs, None, timer, theirs)
    assert ops.choices == theirs and timer.asked == []
    assert [(r.reason, r.layers) for r in ops.refusals] == [("eager on rank 0", ("y",))]
    for config, reason in (("c", "relative error"), ("d", "not made for this device")):
        theirs = {"x": LayerChoice("one", "fake", config)}
        with pytest.raises(BackendError, match=f"x cannot run one fake {config}: .*{reason}"):
            chosen(monkeypatch, [kernel], sites, proofs, None, timer, theirs)


def test_layers_are_timed_where_they_are_about_as_much_work():
    device = torch.device("cuda")
    wide, narrow = NormConvProblem(384, 384, FP32), NormConvProblem(96, 96, FP32)
    assert timed_size(narrow, device, 28) == (4, 256, 256)
    assert timed_size(wide, device, 28) == (4, 64, 64)
    assert timed_size(NormConvProblem(16, 16, FP32), device, 28) == (4, 256, 256)
    assert timed_size(NormConvProblem(1024, 1024, FP32), device, 28) == (4, 24, 24)
    assert timed_size(AttentionProblem(384, FP32), device, 28) == (1, 96, 96)
    # A larger card has more programs at work.
    assert timed_size(narrow, device, 84) == (4, 440, 440)
    assert timed_size(narrow, device, 170) == (4, 512, 512)
    assert timed_size(wide, device, 170) == (4, 128, 128)
    assert timed_size(narrow, device, 14) == (4, 256, 256)
    assert device_timer(HOST) is None


@pytest.mark.parametrize("part", ["decoder", "encoder"])
@pytest.mark.parametrize("config", [wan21(), wan22()], ids=lambda c: c.family)
def test_a_proof_has_more_programs_than_a_card_multiprocessors_and_little_work(config, part):
    """Of the largest tiles that there are: 256 pixels, 128 channels."""
    with torch.device("meta"):
        model = WanVAEModel(config).to(torch.bfloat16)
    device = torch.device("cuda")
    problems = {site.problem.key(): site.problem for site in layer_sites(model, part)}.values()
    for problem in problems:
        frames, rows, cols = proof_size(problem, device)
        assert all(size % 2 for size in (frames, rows, cols))
        blocks = 1
        if not isinstance(problem, AttentionProblem):
            blocks = -(-problem.out_channels // 128)
            most = 5 * 131 * 179 * 96 * max(problem.in_channels, 96)
            # What sizes are rounded up to costs a tenth at most.
            used = frames * rows * cols * problem.out_channels * problem.in_channels
            assert used < 1.1 * most, problem
        if isinstance(problem, NormConvProblem) and problem.frames == 4:  # four in one program
            frames = 2
        if not isinstance(problem, StridedProblem):  # a quarter of the pixels, in smaller tiles
            pixels = rows * cols if isinstance(problem, AttentionProblem) else frames * rows * cols
            tile = 128 if isinstance(problem, AttentionProblem) else 256
            assert pixels // tile * blocks > 132, problem
        assert proof_size(problem, torch.device("meta")) == proof_size(problem, device)
        assert proof_size(problem, HOST) == (2, 5, 7)


# -- numbers that could overflow ----------------------------------------------------------------


def test_a_configuration_whose_sums_could_overflow_is_refused(monkeypatch, proofs):
    nan = float("nan")
    kernel = FakeKernel("one", dict.fromkeys("abc", 1.0), reach={"a": 100.0, "b": nan, "c": 99.0})
    ops = chosen(monkeypatch, [kernel], [site("x", 16, 16)], proofs)
    assert ops.choices["x"].config == "c" and len(proofs) == 1
    assert [r.reason for r in ops.refusals] == [
        "fake a: its sums in float16 may reach 1e+02, too large for float16",
        "fake b: its sums in float16 may reach nan, too large for float16",
    ]


def norm_weights(scale: float = 1.0, channels: int = 96) -> LayerWeights:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, channels, 3, 3, 3, generator=generator) / (27 * channels) ** 0.5
    gamma = 1 + 0.2 * torch.randn(channels, 1, 1, 1, generator=generator)
    return LayerWeights(scale * weight, None, gamma)


def float16_sums(weights: LayerWeights) -> Bound:
    assert weights.gamma is not None
    return float16_sums_bound(weights.gamma, winograd_phases(weights.weight), 2.0)


def value_of(bound: Bound | None) -> float:
    """As `Contenders` reads it."""
    assert bound is not None
    return bound.value(*numbers_of(bound.numbers))


def test_float16_sums_are_for_usual_weights():
    bound = float16_sums(norm_weights())
    assert bound.refusal(value_of(bound)) is None and value_of(bound) > 1
    assert value_of(float16_sums(norm_weights(3e4))) == pytest.approx(3e4 * value_of(bound))
    for scale in (3e4, float("nan"), float("inf")):
        bound = float16_sums(norm_weights(scale))
        refusal = bound.refusal(value_of(bound))
        assert refusal is not None and "too large for float16" in refusal


@pytest.mark.parametrize("channels", [96, 48])
def test_no_sum_exceeds_the_bound_and_the_worst_one_comes_close(channels):
    """The operand that points along the weights, at a norm's full length in one group."""
    weights = norm_weights(channels=channels)
    assert weights.gamma is not None
    phases = weights.weight.movedim(2, 0)  # direct: a temporal tap each
    bound = value_of(float16_sums_bound(weights.gamma, phases, 1.0))
    gain, worst = weights.gamma.flatten(), 0.0
    for start in range(0, channels, 32):
        rows = phases[:, :, start : start + 32]
        unit = torch.nn.functional.normalize(rows, dim=2)  # each tap has its own best pixel
        operand = unit * channels**0.5 * gain[start : start + 32].view(1, 1, -1, 1, 1)
        worst = max(worst, (operand * rows).sum((2, 3, 4)).abs().max().item())
    assert 0.6 * bound < worst <= bound * 1.0001


def test_no_sum_of_quads_exceeds_its_bound():
    """Nor its operand, of frames that are as long as a norm leaves them, and of any signs."""
    weights = norm_weights()
    assert weights.gamma is not None
    bound = value_of(float16_sums_bound(weights.gamma, grown_quad_phases(weights.weight), 1.0))
    phases, gain, worst = quad_phases(weights.weight), weights.gamma.flatten().double(), 0.0
    for start in range(0, 96, 32):
        rows = phases[:, :, start : start + 32]
        frames = torch.nn.functional.normalize(rows, dim=2) * 96**0.5
        operand = frames * gain[start : start + 32].view(1, 1, -1, 1, 1)
        # The signs of the frames are those of the transform's row.
        operand = operand * POINTS.growth[:, None, None, None, None]
        worst = max(worst, (operand * rows).sum((2, 3, 4)).abs().max().item())
    assert 0.6 * bound < worst <= bound * 1.0001


def test_the_operand_bound_is_for_layers_behind_a_norm():
    assert operand_bound(LayerWeights(torch.ones(4, 4, 1, 1, 1)), 1.0) is None
    bound = operand_bound(LayerWeights(torch.ones(4, 4, 1, 1, 1), None, torch.full((4,), 3.0)), 9.0)
    assert value_of(bound) == 6.0


def attention_weights(dtype: torch.dtype, scale: float = 1.0) -> LayerWeights:
    generator = torch.Generator().manual_seed(0)
    weight = scale * torch.randn(3 * 384, 384, 1, 1, generator=generator)
    gamma = torch.randn(384, 1, 1, generator=generator)
    projection = torch.zeros(384, 384, 1, 1)
    return LayerWeights(weight.to(dtype), None, gamma.to(dtype), projection.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.05])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_operand_bound_is_no_less_than_what_it_bounds(dtype, scale, sign):
    """By norms in float64; with attention and without, for gains of which the largest has any
    sign, for rows that are shorter than one and longer."""
    weights = attention_weights(dtype, scale)
    gamma = weights.gamma * sign
    peak = gamma.double().abs().max().item() * 384**0.5
    reach = weights.weight.double().flatten(1).norm(dim=1).max().item()
    alone = value_of(operand_bound(LayerWeights(weights.weight, None, gamma), 1.0))
    assert peak * (1 - 1e-15) <= alone <= peak * (1 + 1e-6)
    before_attention = LayerWeights(weights.weight, None, gamma, weights.projection)
    both = value_of(operand_bound(before_attention, 1.0))
    assert max(peak, peak * reach) * (1 - 1e-15) <= both <= max(peak, peak * reach) * (1 + 3e-5)


def test_the_operand_bound_allows_for_sums_that_are_rounded_down(monkeypatch):
    """Rows of 2 ** 24 and many small numbers, of which a float32 that adds one after the other
    takes in none."""
    rows = torch.cat([torch.full((2, 1), 2.0**12), torch.ones(2, 1023)], 1)
    weights = LayerWeights(rows[..., None, None], None, torch.ones(1024), torch.ones(1))

    def in_turn(x, dim):
        total = torch.zeros(len(x))
        for column in x.unbind(dim):
            total = total + column
        return total

    monkeypatch.setattr(torch.Tensor, "sum", in_turn)
    bound = value_of(operand_bound(weights, 1.0))
    assert bound >= 32 * rows.double().square().numpy().sum(1).max() ** 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["gamma", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_operand_of_what_is_not_finite_is_refused(bad, where, dtype):
    weights = attention_weights(dtype)
    for place in (0, -1):
        damaged = getattr(weights, where).clone()
        damaged.view(-1)[place] = bad
        bound = operand_bound(replace(weights, **{where: damaged}), LARGEST_FLOAT16)
        assert "too large for float16" in bound.refusal(value_of(bound))
    # A gain of zero makes no number of it.
    none = replace(weights, gamma=torch.zeros_like(weights.gamma), weight=weights.weight * bad)
    bound = operand_bound(none, LARGEST_FLOAT16)
    assert bound.refusal(value_of(bound))


def test_all_bounds_come_in_their_order(monkeypatch):
    """Those of operands of one number and of several, and those of sums."""
    kernel = FakeKernel("one", dict.fromkeys("ab", 1.0), reach={"a": 200.0, "b": 50.0})
    kernel.requires = replace(kernel.requires, largest_operand=100.0)
    monkeypatch.setattr(registry, "kernels_of", lambda *_: iter([kernel]))
    alone = site("x", 16, 16)
    gains = [torch.full((16,), gain) for gain in (-20.0, -30.0)]
    sites = [replace(alone, weights=replace(alone.weights, gamma=gamma)) for gamma in gains]
    asked = Contenders([*sites, alone], ("one",), CPU).all()
    sums = "fake a: its sums in float16 may reach 2e+02, too large for float16"
    operand = "its operand may reach 1e+02, too large for float16"
    reasons = [[contender.reason for contender in own] for own in asked]
    assert reasons == [[sums, ""], [operand, operand], [sums, ""]]


# -- choosing as for one card, running on another ----------------------------------------------


@pytest.mark.usefixtures("interpreted")
@pytest.mark.skipif(torch.cuda.is_available(), reason="about Triton's interpreter")
@pytest.mark.parametrize(
    "eager",
    [
        pytest.param((), id="all"),
        pytest.param(("upsample_conv2d", "attention"), id="partly", marks=pytest.mark.full),
    ],
)
def test_a_decode_chosen_as_for_a_card_without_tma(eager, proofs):
    """All layers through pointers; and partly covered, beside eager ones."""
    pytest.importorskip("triton", reason="triton is not installed here: pip install triton")
    state = random_state(wan21(dim=16))
    vae = WanVAE.from_state_dict(state, device="cpu", dtype="fp16")
    exact = WanVAE.from_state_dict(state, device="cpu", dtype="fp32")
    sites = tuple(layer_sites(vae.model, "decoder", only_frame=True))
    asked = tuple(site for site in sites if site.problem.operation not in eager)
    card = CARDS["RTX 3060"]
    ops = select_kernels(SelectRequest(asked, ("triton",), card, HOST, proofs))
    kernels = {s.problem.operation: getattr(ops.layers.get(s.name), "kernel", None) for s in sites}
    expected_kernels = {
        **dict.fromkeys(("conv3d", "norm_conv3d", "upsample_conv2d", "attention"), "pointer"),
        "head": "narrow",
    }
    assert kernels == expected_kernels | dict.fromkeys(eager)
    assert ops.refusals == ()
    used = "eager" if eager else "triton"
    assert ops.used["attention"] == ops.used["upsample_conv2d"] == used
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
