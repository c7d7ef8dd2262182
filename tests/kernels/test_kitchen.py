"""Kernels of comfy-kitchen: why there are none, what they read, and a whole decode.

On a CPU the package computes with PyTorch, which shows that what we give it is right; its compiled
kernels run where there is a GPU.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import random_state
from wan_vae import WanVAE
from wan_vae.config import wan21
from wan_vae.device import numbers_of
from wan_vae.errors import BackendError
from wan_vae.kernels import registry
from wan_vae.kernels.bounds import Bound
from wan_vae.kernels.device import CARDS, INTERPRETER, Device, amd
from wan_vae.kernels.kernel import BuildError
from wan_vae.kernels.kitchen import layers, package
from wan_vae.kernels.kitchen.kernels import KitchenKernel, make_family
from wan_vae.kernels.kitchen.layers import KitchenNormConv
from wan_vae.kernels.proof.cases import prove_kernel
from wan_vae.layout import detect
from wan_vae.ops.eager.norm import rms_norm_silu
from wan_vae.ops.opset import CallSize, HaloRows
from wan_vae.ops.problem import LayerWeights, NormConvProblem

HALF, HOST = torch.float16, torch.device("cpu")
PROBLEM = NormConvProblem(16, 24, HALF)


def kernel_for(device: Device) -> KitchenKernel:
    """The one for cards of this vendor."""
    kernels = make_family().kernels
    return next(k for k in kernels if device.vendor in k.requires.vendors)


@pytest.fixture
def kitchen() -> str:
    """The release that is installed."""
    pytest.importorskip("comfy_kitchen", reason="not installed here: pip install comfy-kitchen")
    release = package.installed_version()
    assert release is not None
    return release


# -- reasons ---------------------------------------------------------------------------------------


def test_what_is_missing_is_a_reason():
    card = CARDS["RX 7900 XTX"]
    assert package.unavailable_reason(card, None) == "comfy-kitchen is not installed"
    assert package.unavailable_reason(card, "0.2.33") == (
        "comfy-kitchen 0.2.33 is installed: its convolution came with 0.2.34"
    )
    assert "imitates no other" in package.unavailable_reason(
        CARDS["H100"].imitating((8, 6)), "0.2.40"
    )
    assert "no compiled kernels" in package.unavailable_reason(CARDS["Apple M3"], "0.2.40")


@pytest.mark.parametrize(
    "code",
    [
        "import a_package_that_is_nowhere",
        "import torch; torch.an_attribute_of_a_later_torch",
        "raise OSError('libcudart.so.13: cannot open shared object file')",
    ],
)
def test_an_import_that_fails_is_a_reason(code, tmp_path, monkeypatch):
    (tmp_path / "comfy_kitchen.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "comfy_kitchen", raising=False)
    reason = package.unavailable_reason(CARDS["H100"], "0.2.40")
    assert reason.startswith("comfy-kitchen 0.2.40 cannot be imported: ")
    assert "comfy_kitchen" not in sys.modules


def test_the_package_says_why_it_has_no_kernels_here(kitchen):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, for which it has kernels")
    for card in (CARDS["H100"], CARDS["RX 7900 XTX"]):
        reason = package.unavailable_reason(card, kitchen)
        assert reason.startswith(f"comfy-kitchen {kitchen} cannot run here: ")
        with pytest.raises(BuildError, match="cannot run here"):
            kernel_for(card).build(PROBLEM, kitchen, card)
    assert package.unavailable_reason(INTERPRETER, kitchen) is None


@pytest.mark.parametrize(
    ("card", "dtype", "reason"),
    [
        ("RTX 4090", torch.bfloat16, "bfloat16 was asked for, the kernels read and write float16"),
        ("RX 7900 XTX", torch.bfloat16, "bfloat16 was asked for, the kernels read and write"),
        ("RX 7900 XTX", torch.float32, "float32 was asked for"),
        ("MI300X", HALF, "needs WMMA (RDNA 3 or later), this device is gfx942"),
        ("Apple M3", HALF, "written for NVIDIA cards, this device is mps"),
        ("Intel Arc", HALF, "written for NVIDIA cards, this device is xpu"),
        ("CPU", HALF, "no GPU"),
    ],
)
def test_cards_and_dtypes(card, dtype, reason):
    """Without an import: what a card or a dtype excludes is known before."""
    assert registry.unavailable_reason("kitchen", CARDS[card], dtype).startswith(reason)


def test_it_is_asked_for_by_name_and_on_amd_cards_beside_triton(monkeypatch):
    monkeypatch.setattr("wan_vae.kernels.cuda.driver._nvrtc", lambda: None)
    for name, card in CARDS.items():
        assert registry.families_of("kitchen", card) == ("kitchen",)
        wanted = {"amd": ("triton", "kitchen"), "nvidia": ("cuda",)}
        assert registry.families_of("auto", card) == wanted.get(card.vendor, ()), name
    assert registry.is_timed_beside("kitchen") and not registry.is_timed_beside("cuda")
    rdna2 = amd("RX 6800", "gfx1030", 60)
    assert "needs WMMA" in registry.unavailable_reason("kitchen", rdna2, HALF)


def test_a_request_that_cannot_run_is_an_error_with_its_reason():
    vae = WanVAE.from_state_dict(random_state(wan21(dim=8)), device="cpu")
    with pytest.raises(BackendError, match="backend 'kitchen' cannot run: no GPU"):
        vae.decode(torch.zeros(1, 16, 1, 2, 2), backend="kitchen")


# -- numbers ---------------------------------------------------------------------------------------


def value_of(bound: Bound | None) -> float:
    assert bound is not None
    return bound.value(*numbers_of(bound.numbers))


@pytest.mark.parametrize("only_frame", [False, True])
def test_no_sum_exceeds_the_bound_and_the_worst_comes_near(only_frame):
    """Every pixel as long as a norm lets it be, in the direction of its tap's weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 16, 3, 3, 3, generator=generator)
    gamma = torch.full((16,), 1.5)
    problem = NormConvProblem(16, 8, HALF, only_frame=only_frame)
    bound = KitchenKernel("wmma", make_family().kernels[1].requires, "0.2.40").bound(
        LayerWeights(weight, torch.zeros(8), gamma), problem, "0.2.40"
    )
    taps = weight[:, :, 2:] if only_frame else weight
    row = int(taps.flatten(2).norm(dim=1).sum(1).argmax())
    worst = F.normalize(taps[row], dim=0) * 16**0.5 * 1.5
    assert float((worst * taps[row]).sum()) == pytest.approx(value_of(bound), rel=1e-5)
    # Roundings, one for 8 products, of half a unit each.
    count = taps[0].numel() / 8
    assert bound.limit == pytest.approx(65504 / math.exp(count / 2**11))
    assert bound.refusal(bound.limit) and bound.refusal(float("nan"))
    assert bound.refusal(0.99 * bound.limit) is None


def test_a_layer_that_could_overflow_is_refused():
    kernel = kernel_for(INTERPRETER)
    weights = LayerWeights(torch.ones(8, 64, 3, 3, 3), torch.zeros(8), torch.full((64,), 10.0))
    bound = kernel.bound(weights, NormConvProblem(64, 8, HALF), "0.2.40")
    # 27 taps, rows of length 8, pixels of length 80
    assert value_of(bound) == 27 * 8 * 80
    assert bound.refusal(value_of(bound)) is None
    large = LayerWeights(weights.weight * 4, weights.bias, weights.gamma)
    value = value_of(kernel.bound(large, NormConvProblem(64, 8, HALF), "0.2.40"))
    assert "too large for float16" in bound.refusal(value)


# -- the layer -------------------------------------------------------------------------------------


def weights_of(c: int, o: int) -> LayerWeights:
    generator = torch.Generator().manual_seed(c + o)
    weight = torch.randn(o, c, 3, 3, 3, generator=generator) / (27 * c) ** 0.5
    gamma = 1 + 0.2 * torch.randn(c, 1, 1, 1, generator=generator)
    return LayerWeights(weight.half(), torch.randn(o, generator=generator).half(), gamma.half())


def prepared(weights: LayerWeights, only_frame: bool = False) -> KitchenNormConv:
    o, c = weights.weight.shape[:2]
    problem = NormConvProblem(c, o, HALF, only_frame=only_frame)
    return kernel_for(INTERPRETER).prepare(weights, problem, "here", INTERPRETER)


def reference(
    x: torch.Tensor, weights: LayerWeights, residual: torch.Tensor | None, only_frame: bool
) -> torch.Tensor:
    """The whole video at once, in float64; `x` with its halo, which is then cut off."""
    y = rms_norm_silu(x.double(), weights.gamma.double())
    y = F.pad(y, (1, 1, 1, 1, 2, 0))
    y = F.conv3d(y, weights.weight.double(), weights.bias.double())
    return y if residual is None else y + residual.double()


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    b, c, t, h, w = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, t, h, w, c, generator=generator).half().permute(0, 4, 1, 2, 3)


def error_of(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.usefixtures("kitchen", "poisoned_outputs")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("lengths", [(5,), (1, 1, 1, 2), (1, 4), (2, 3)], ids=str)
@pytest.mark.parametrize("size", [(1, 7, 5), (2, 3, 1)], ids=str)
def test_chunks_with_history_are_the_whole_video(size, lengths, overwrite):
    batch, h, w = size
    weights = weights_of(16, 24)
    x, residual = features(batch, 16, 5, h, w), features(batch, 24, 5, h, w, seed=1)
    layer, history, made, at = prepared(weights), None, [], 0
    for n in lengths:
        part = x[:, :, at : at + n]
        before = history
        operand, history = layer.operand(
            part, history, only_frame=False, keep=True, overwrite=overwrite
        )
        assert history.shape == (batch, 16, 2, h, w) and detect(history) != "contiguous"
        assert (history is before) == (overwrite and before is not None)
        added = residual[:, :, at : at + n]
        y = layer.convolve(operand, n, added, padding=(1, 1), only_frame=False)
        assert y.dtype == HALF and detect(y) in ("channels_last_3d", "either")
        made.append(y)
        at += n
    expected = reference(x, weights, residual, False)
    assert error_of(torch.cat(made, 2), expected) < 1e-3


@pytest.mark.usefixtures("kitchen", "poisoned_outputs")
def test_one_frame_and_any_memory_format():
    weights = weights_of(8, 8)
    x = features(1, 8, 1, 6, 3)
    layer = prepared(weights, only_frame=True)
    for same in (x, x.contiguous()):
        operand, history = layer.operand(same, None, only_frame=True, keep=True)
        assert history is None
        y = layer.convolve(operand, 1, None, padding=(1, 1), only_frame=True)
        assert error_of(y, reference(x, weights, None, True)) < 1e-3


@pytest.mark.usefixtures("kitchen", "poisoned_outputs")
@pytest.mark.parametrize("axis", ["height", "width"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_halo_rows_are_the_neighbours(axis, place):
    """Beyond the edge of the picture there are zeros."""
    weights = weights_of(8, 16)
    whole = features(1, 8, 3, 9, 9)
    dim = 3 if axis == "height" else 4
    start, stop = {"first": (0, 4), "middle": (3, 6), "last": (5, 9)}[place]
    own = whole.narrow(dim, start, stop - start)

    def edge(i: int) -> torch.Tensor | None:
        if not 0 <= i < 9:
            return None
        return whole.narrow(dim, i, 1).permute(0, 2, 3, 4, 1).contiguous()

    halo = HaloRows(axis, edge(start - 1), edge(stop))
    layer, padding = prepared(weights), (0, 1) if axis == "height" else (1, 0)
    made, history = [], None
    for i in range(3):
        rows = [None if e is None else e[:, i : i + 1] for e in (halo.before, halo.after)]
        part = HaloRows(axis, *rows)
        operand, history = layer.operand(
            own[:, :, i : i + 1], history, only_frame=False, keep=True, halo=part
        )
        made.append(layer.convolve(operand, 1, None, padding=padding, only_frame=False))
    expected = reference(whole, weights, None, False).narrow(dim, start, stop - start)
    assert error_of(torch.cat(made, 2), expected) < 1e-3


@pytest.mark.usefixtures("kitchen")
def test_more_than_one_call_can_count_goes_in_parts(monkeypatch):
    weights = weights_of(8, 8)
    x, residual = features(2, 8, 5, 4, 3), features(2, 8, 5, 4, 3, seed=1)
    layer = prepared(weights)
    operand, _ = layer.operand(x, None, only_frame=False, keep=False)
    whole = layer.convolve(operand, 5, residual, padding=(1, 1), only_frame=False)
    frame = operand[0, :, 0].numel()
    for frames in (1, 5, 6):
        monkeypatch.setattr(layers, "_COUNTABLE", frames * frame)
        parts = layer.convolve(operand, 5, residual, padding=(1, 1), only_frame=False)
        assert parts.shape == whole.shape and error_of(parts, whole.double()) < 1e-3


@pytest.mark.usefixtures("kitchen")
@pytest.mark.parametrize("only_frame", [False, True])
def test_the_workspace_covers_what_a_call_makes(only_frame):
    size = CallSize(2, 1 if only_frame else 3, 5, 7, only_frame)
    layer = prepared(weights_of(16, 8), only_frame)
    x = features(2, 16, size.frames, 5, 7)
    operand, history = layer.operand(x, None, only_frame=only_frame, keep=True)
    workspace = layer.workspace(size)
    assert workspace.operand_bytes == operand.numel() * 2
    assert workspace.history_bytes == (0 if history is None else history.numel() * 2)
    assert workspace.hidden_bytes >= 2 * 4 * x[:, :, 0].numel()


# -- the proof -------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, "height", "width"])
@pytest.mark.parametrize("only_frame", [False, True])
def test_the_proof_takes_what_is_right(kitchen, only_frame, axis):
    problem = NormConvProblem(16, 24, HALF, only_frame=only_frame)
    kernel = kernel_for(INTERPRETER)
    assert kernel.candidates(problem, INTERPRETER) == (kitchen,)
    verdict = prove_kernel(kernel, problem, kitchen, INTERPRETER, HOST, axis)
    assert verdict.passed and verdict.error < 1e-3


@pytest.mark.parametrize(("factor", "passes"), [(1.003, True), (1.01, False)])
def test_the_proof_allows_sums_in_float16_and_no_more(kitchen, monkeypatch, factor, passes):
    conv = package.convolution(INTERPRETER)
    monkeypatch.setattr(package, "convolution", lambda device: lambda *a: conv(*a) * factor)
    verdict = prove_kernel(kernel_for(INTERPRETER), PROBLEM, kitchen, INTERPRETER, HOST, None)
    assert verdict.passed == passes
    assert passes or "relative error" in verdict.reason


def test_a_layer_that_pytorch_computes_is_not_one_of_its_kernels(kitchen, monkeypatch):
    """Its functions call PyTorch, without a word, for what their kernel does not take."""
    weights = weights_of(16, 24)
    conv = package.convolution(INTERPRETER)
    with pytest.raises(BuildError, match="hands 16 to 24 channels over to PyTorch"):
        package.check_own_kernel(conv, weights.weight, weights.bias, (2, 5, 7))
    # ... also where gradients are off, and under a proof, where it is a verdict.
    with torch.inference_mode(), pytest.raises(BuildError, match="hands 16"):
        package.check_own_kernel(conv, weights.weight, weights.bias, (2, 5, 7))
    monkeypatch.setattr(package, "convolution", lambda device: conv)
    card = CARDS["RX 7900 XTX"]
    verdict = prove_kernel(kernel_for(card), PROBLEM, kitchen, card, HOST, None)
    assert not verdict.passed and "hands 16 to 24 channels over to PyTorch" in verdict.reason


def test_a_kernel_that_computes_by_itself_passes_that_check():
    def products(x, weight, bias, residual, stride):
        return torch.einsum("bcthw,oc->bothw", x.float(), weight.float().mean((2, 3, 4)))

    weights = weights_of(16, 24)
    package.check_own_kernel(products, weights.weight, weights.bias, (2, 5, 7))


# -- a decode --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kitchen", "own_proofs")
def test_a_decode_in_float16_matches_the_reference():
    config = wan21(dim=16)
    vae = WanVAE.from_state_dict(random_state(config), device="cpu", dtype="fp16")
    z = torch.randn(1, 16, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(z, backend="eager", precision="fp32")
    for options in ({}, {"chunk_frames": 1}, {"strips": 2}):
        pixels = vae.decode(z, backend="kitchen", memory_format="channels_last_3d", **options)
        assert error_of(pixels, expected.double()) < 1e-2, options
    report = vae.last_report
    assert report.backends_used["conv3d"] == "kitchen"
    assert report.backends_used["norm_silu"] == "eager"
    layers = {layer.name for layer in report.layers if layer.backend == "kitchen"}
    assert "decoder.middle.0.residual.2" in layers
    assert "decoder.head.2" not in layers and "decoder.conv1" not in layers


@pytest.mark.usefixtures("kitchen", "own_proofs")
def test_bfloat16_and_float32_are_left_to_others():
    vae = WanVAE.from_state_dict(random_state(wan21(dim=8)), device="cpu")
    z = torch.zeros(1, 16, 1, 2, 2)
    vae.decode(z, backend="kitchen", memory_format="channels_last_3d")
    assert set(vae.last_report.backends_used.values()) == {"eager"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels", [(96, 96), (192, 192), (384, 384), (192, 96), (1024, 1024)])
@pytest.mark.parametrize("axis", [None, "height", "width"])
def test_compiled_kernels_are_right_on_this_card(kitchen, channels, axis):
    device = torch.device("cuda", torch.cuda.current_device())
    card = Device.of(device)
    reason = package.unavailable_reason(card, kitchen)
    if reason is not None:
        pytest.skip(reason)
    kernel = kernel_for(card)
    for only_frame in (False, True):
        problem = NormConvProblem(*channels, HALF, only_frame=only_frame)
        verdict = prove_kernel(kernel, problem, kitchen, card, device, axis)
        if verdict.reason and "over to PyTorch" in verdict.reason:
            pytest.skip(verdict.reason)  # 0.2.40, 1024 channels on an H200
        assert verdict.passed, verdict.reason
        print(f"{problem.key()}: error {verdict.error:.1e}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_decode_on_this_card_runs_them(kitchen):
    card = Device.of(torch.device("cuda", 0))
    reason = package.unavailable_reason(card, kitchen)
    if reason is not None:
        pytest.skip(reason)
    vae = WanVAE.from_state_dict(random_state(wan21()), device="cuda", dtype="fp16")
    z = torch.randn(1, 16, 3, 30, 52)
    expected = vae.decode(z, backend="eager", precision="fp32")
    pixels = vae.decode(z, backend="kitchen", memory_format="channels_last_3d")
    assert error_of(pixels, expected.double()) < 2e-2
    print({layer.name: (layer.kernel, layer.gain) for layer in vae.last_report.layers})
