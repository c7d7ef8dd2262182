"""Kernels as AMD's cards run them: their configurations in Triton's interpreter, and, on the GPU of
this machine, an imitation (`WAN_VAE_CAPABILITY=gfx1100`). Nothing here ran on an AMD card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")

from benchmarks.every_kernel import once, trials
from benchmarks.suite.weights import random_vae
from tests.conftest import random_state
from wan_vae import WanVAE
from wan_vae.config import wan21, wan22
from wan_vae.kernels.device import CARDS, IMITATE, Device
from wan_vae.kernels.kernel import BuildError
from wan_vae.kernels.proof import cases
from wan_vae.kernels.proof.choice import EAGER, Choice, fastest
from wan_vae.kernels.proof.timing import time_kernels
from wan_vae.kernels.registry import kernels_of
from wan_vae.kernels.triton import conv3d_pointer
from wan_vae.kernels.triton.configs import (
    AttentionConfig,
    ConvConfig,
    attention_candidates,
    pointer_table,
)
from wan_vae.kernels.triton.conv3d import ConvOperands, conv3d
from wan_vae.kernels.triton.kernels import BUILD_FAILURES
from wan_vae.kernels.triton.launch import launch_kernel
from wan_vae.ops.problem import NormConvProblem, Operation, UpsampleProblem
from wan_vae.report import BackendOff, DecodeReport

CUDA = torch.cuda.is_available()
HOST = torch.device("cpu")
LAST = torch.channels_last_3d
ARCHITECTURES = {"gfx942": "MI300X", "gfx1100": "RX 7900 XTX", "gfx1201": "RX 9070 XT"}
on_the_cpu = pytest.mark.skipif(CUDA, reason="in the interpreter; the GPU's tests are below")


def kernels_off(report: DecodeReport) -> list[BackendOff]:
    """What was refused, but for the optional package that stands behind Triton."""
    return [off for off in report.backends_off if off.backend != "kitchen"]


def tiles() -> Iterator[str]:
    """Every tile of a convolution that an AMD card may get."""
    found: dict[str, None] = {}
    for card in ARCHITECTURES.values():
        for operand in (torch.float16, torch.float32):
            table = pointer_table(CARDS[card], operand)
            for rows in (*table.wide.values(), *table.thin.values(), table.narrow):
                found |= dict.fromkeys(name for names in rows.values() for name in names)
    yield from found


def quick_first() -> Iterator[Any]:
    """All tiles. `make test` takes those that bring a size or a width that it has not had, for each
    depth of its products: warps and stages, say, are nothing to the interpreter."""
    seen: set[tuple[object, ...]] = set()
    for name in tiles():
        tile = ConvConfig.parse(name)
        pairs = {((tile.F, tile.PH, tile.PW), tile.BK), ((tile.N0, tile.N1), tile.BK)}
        yield pytest.param(name, marks=pytest.mark.full if pairs <= seen else ())
        seen |= pairs


@pytest.mark.usefixtures("interpreted", "poisoned_outputs")
@pytest.mark.parametrize("name", list(quick_first()))
def test_every_tile_is_right_and_gives_the_bits_of_the_whole_picture(name):
    tile = ConvConfig.parse(name)
    assert tile.F <= 2, "a program makes two frames at most"
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if CUDA else "cpu"
    channels, out = 2 * tile.BK, tile.N0 + tile.N1
    x = torch.randn(1, channels, 5, 7, 10, generator=generator).to(device, torch.float16)
    weight = torch.randn(out, channels, 3, 3, 3, generator=generator).to(device, torch.float16)
    x, weight = x.contiguous(memory_format=LAST), (weight / 30).contiguous(memory_format=LAST)
    whole = conv3d(ConvOperands(x, weight), tile, conv3d_pointer.launch)
    expected = F.conv3d(x.float(), weight.float(), padding=(0, 1, 1))
    assert ((whole.float() - expected).norm() / expected.norm()).item() < 4e-4
    crop = x[:, :, 1:4, 1:6, 2:9].contiguous(memory_format=LAST)
    part = conv3d(ConvOperands(crop, weight), tile, conv3d_pointer.launch)
    assert torch.equal(part[..., 1:-1, 1:-1], whole[:, :, 1:2, 2:5, 3:8])


@pytest.mark.parametrize("card", ARCHITECTURES.values())
def test_configurations_fit_their_layers(card):
    device = CARDS[card]
    for operand in (torch.float16, torch.float32):
        table = pointer_table(device, operand)
        for channels, out in ((96, 96), (160, 160), (384, 192), (256, 1024), (48, 1024), (16, 96)):
            for frames in (1, 2, 4):
                found = [ConvConfig.parse(n) for n in table.candidates(channels, out, frames)]
                assert found and all(channels % tile.BK == 0 for tile in found)
    for channels in (384, 640, 1024):
        for name in attention_candidates(channels, device, False):
            tile = AttentionConfig.parse(name)
            assert channels % (tile.DC * tile.NC) == 0


def small_vae(family: str) -> WanVAE:
    config = wan21(dim=16) if family == "wan2.1" else wan22(dim=16, decoder_dim=16)
    return WanVAE.from_state_dict(random_state(config), device=HOST, dtype="fp16")


@pytest.mark.full
@on_the_cpu
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "family,architecture",
    [
        ("wan2.1", "gfx1100"),
        pytest.param("wan2.1", "gfx942", marks=pytest.mark.full),
        pytest.param("wan2.1", "gfx1201", marks=pytest.mark.full),
        pytest.param("wan2.2", "gfx1100", marks=pytest.mark.full),
    ],
)
def test_decode_and_encode_ask_no_library_for_a_convolution(
    family, architecture, tmp_path, monkeypatch
):
    """Proofs included. By default, in the interpreter, against the reference in float32."""
    monkeypatch.setenv("WAN_VAE_CACHE", str(tmp_path))
    vae = small_vae(family)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(1, vae.config.z_dim, 2, 2, 1, generator=generator)
    exact = vae.decode(z, backend="eager", precision="fp32")
    pixels = exact.clamp(-1, 1)
    latent = vae.encode(pixels, backend="eager", precision="fp32")

    def searched(*arguments: object, **options: object) -> torch.Tensor:
        raise AssertionError("a convolution of the library")

    monkeypatch.setenv(IMITATE, architecture)
    for name in ("conv2d", "conv3d"):
        monkeypatch.setattr(F, name, searched)
    for run, source, expected in ((vae.decode, z, exact), (vae.encode, pixels, latent)):
        got = run(source)
        report = vae.last_report
        assert report is not None and not kernels_off(report)
        assert {layer.backend for layer in report.layers} == {"triton"}
        assert all("pointer" in layer.kernel or "narrow" in layer.kernel for layer in report.layers)
        assert report.device_name.endswith(f"as {architecture} (WAN_VAE_CAPABILITY)")
        assert ((got - expected).norm() / expected.norm()).item() < 4e-3


def test_the_interpreter_imitates_amd_alone(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(IMITATE, "8.6")
    assert Device.chosen_for(HOST).vendor == "interpreter"
    monkeypatch.setenv(IMITATE, "gfx1100")
    card = Device.chosen_for(HOST)
    assert (card.vendor, card.shared_bytes, card.features) == ("amd", 64 * 1024, {"wmma"})
    assert card.runs_on is not None and card.machine_code == "gfx1100"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert Device.chosen_for(HOST).vendor == "cpu"


# -- proofs and times without a library ------------------------------------------------------------


def inputs(by_products: bool, axis=None) -> cases.Inputs:
    return cases.Inputs(HOST, torch.float32, axis, (3, 6, 8), by_products)


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("last_slice", [False, True])
def test_the_reference_by_products_is_the_convolution(kernel, stride, last_slice):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, 4, 7, 9, generator=generator, dtype=torch.float32)
    weight = torch.randn(6, 5, *kernel, generator=generator)
    bias = torch.randn(6, generator=generator)
    padding = (kernel[1] // 2, 0)
    one, other = (
        inputs(by_products).exact_conv3d(x, weight, bias, padding, stride, last_slice)
        for by_products in (True, False)
    )
    assert one.shape == other.shape
    assert ((one - other).norm() / other.norm()).item() < 1e-6


@pytest.mark.parametrize("axis", [None, "height", "width"])
def test_the_reference_of_an_up_sampler_is_eager(axis):
    given = inputs(True, axis)
    problem = UpsampleProblem(16, 16, torch.float32)
    (kernel,) = (k for k in kernels_of("upsample_conv2d", ("triton",)) if k.name == "pointer")
    (config, *_) = kernel.candidates(problem, CARDS["RX 7900 XTX"])
    (check,) = cases.checks_of(kernel, problem, config, CARDS["RX 7900 XTX"], given)
    expected = check.eager()
    assert check.reference().shape == expected.shape
    assert ((check.reference() - expected).norm() / expected.norm()).item() < 1e-6


@pytest.mark.parametrize("miopen", [True, False])
def test_eager_is_timed_only_where_nothing_is_searched(miopen, monkeypatch):
    card, calls = CARDS["RX 7900 XTX"], []
    monkeypatch.setattr(torch.backends.cudnn, "enabled", miopen)
    problem = NormConvProblem(32, 32, torch.float16)
    (kernel,) = (k for k in kernels_of("norm_conv3d", ("triton",)) if k.name == "pointer")
    configs = kernel.candidates(problem, card)

    def timer(run: object) -> float:
        calls.append(run)
        return 1.0

    times = time_kernels([(kernel, c) for c in configs], problem, card, HOST, timer)
    assert len(times.kernels) == len(configs) == 2
    assert (times.eager_ms is None) == miopen
    assert len(calls) == 2 * (len(configs) + (not miopen))


def test_without_eager_the_best_kernel_wins():
    assert fastest({"a": 2.0, "b": 1.0}) == "b"
    assert fastest({"a": 2.0, "b": 1.0, EAGER: 0.1}) == EAGER
    assert fastest({EAGER: 1.0}) == EAGER and fastest({}) == EAGER
    assert Choice("b", {"b": 1.0}).winner in {"b": 1.0}


def test_a_compiler_that_fails_refuses_the_kernel():
    """Its passes raise a plain RuntimeError. No other one is taken for a refusal."""

    def launched(text: str) -> None:
        def start(*arguments: object, **options: object) -> None:
            raise RuntimeError(text)

        launch_kernel({(1, 2): start}, (1, 2), 3, M=4)

    with pytest.raises(BuildError, match="Triton cannot compile it: PassManager::run failed"):
        launched("PassManager::run failed\nmore")
    assert BuildError in BUILD_FAILURES
    with pytest.raises(RuntimeError, match="HIP error") as caught:
        launched("HIP error: an illegal memory access was encountered")
    assert not isinstance(caught.value, BuildError)


# -- on the GPU of this machine --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_right_in_amds_configurations(architecture, dtype):
    """Each configuration with its narrowest layer: two runs with the same bits, near float32."""
    device = torch.device("cuda", torch.cuda.current_device())
    card = Device.of(device).imitating(architecture)
    todo = once(trials(("triton",), card, dtype))
    assert {problem.operation for _, problem, _, _ in todo.values()} == set(get_args(Operation))
    for key, (kernel, problem, config, axis) in todo.items():
        verdict = cases.prove_kernel(kernel, problem, config, card, device, axis, (3, 21, 35))
        assert verdict.passed, f"{key}: {verdict.reason}"


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("config", [wan21(), wan22()], ids=lambda c: c.family)
def test_an_encode_in_amds_configurations(config, architecture, monkeypatch):
    """Right against float32, and the same bits in chunks and again; of a decode:
    test_same_bits_gpu."""
    device = torch.device("cuda", torch.cuda.current_device())
    vae = random_vae(config, device)
    vae.engine.timer_of = lambda device: None
    generator = torch.Generator().manual_seed(3)
    factor = config.spatial_factor
    for frames in (13, 1):
        pixels = torch.rand(1, 3, frames, 11 * factor, 19 * factor, generator=generator) * 2 - 1
        exact = vae.encode(pixels, backend="eager", precision="fp32")
        eager = vae.encode(pixels, backend="eager")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(IMITATE, architecture)
            whole = vae.encode(pixels, chunk_frames=(frames + 3) // 4)
            report = vae.last_report
            assert report is not None and not kernels_off(report)
            assert {layer.backend for layer in report.layers} == {"triton"}
            for chunks in (1, 2, 3):
                assert torch.equal(vae.encode(pixels, chunk_frames=chunks), whole)
        error, reference = ((x - exact).norm() / exact.norm() for x in (whole, eager))
        assert error < reference
