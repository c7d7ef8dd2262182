"""Convolutions in CUDA C++: on a CPU by the emulation, and the same on an NVIDIA card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import in_pairs
from wan_vae.errors import LayoutError
from wan_vae.kernels.cuda.conv import BLOCKS, Call, Variant, conv, pack, program
from wan_vae.kernels.cuda.conv_layers import (
    CONV_KERNELS,
    blocks_for,
    pointwise,
    pointwise_program,
)
from wan_vae.kernels.cuda.driver import compile_source
from wan_vae.kernels.cuda.program import build
from wan_vae.kernels.device import CARDS, Device
from wan_vae.kernels.kernel import BuildError
from wan_vae.kernels.proof.cases import prove_kernel
from wan_vae.layout import LayoutCounter
from wan_vae.ops.eager.conv3d import conv3d
from wan_vae.ops.eager.norm import rms_norm_silu
from wan_vae.ops.opset import CallSize, Workspace
from wan_vae.ops.problem import ConvProblem, HeadProblem, LayerWeights, StridedProblem

HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
LAST = torch.channels_last_3d
POINT, TIME, CUBE = (1, 1, 1), (3, 1, 1), (3, 3, 3)
PIXELS, FRAMES = (1, 3, 3), (3, 1, 1)
# Half a unit in the last place, as in `proof.cases`; what sums in float32 leave.
BOUNDS = {BF16: 2e-3, HALF: 3e-4, SINGLE: 1e-6}
# Tensor cores cut the sum off after each 16 products, where the emulation rounds: 17280 products
# were off by 1.6e-5 on an NVIDIA H200.
CUT_OFF = 3e-5
# One pixel; less than a tile of 128; more than one, with an edge in it.
SIZES = ((1, 1, 1), (3, 5, 7), (2, 9, 31))

CONVS = [
    ConvProblem("features", 96, 192, POINT, BF16, BF16),
    ConvProblem("features", 32, 160, POINT, HALF, HALF),
    ConvProblem("features", 24, 40, POINT, BF16, BF16),
    ConvProblem("features", 64, 128, TIME, HALF, HALF),
    ConvProblem("features", 48, 96, TIME, BF16, BF16),
    ConvProblem("latent", 16, 16, POINT, BF16, BF16),
    ConvProblem("latent", 16, 96, CUBE, HALF, HALF),
    ConvProblem("latent", 40, 72, CUBE, BF16, BF16),
    ConvProblem("latent", 32, 32, POINT, BF16, SINGLE),
    ConvProblem("latent", 32, 3, POINT, HALF, SINGLE),
    ConvProblem("pixels", 3, 96, CUBE, BF16, BF16),
    ConvProblem("pixels", 12, 160, CUBE, HALF, HALF),
    ConvProblem("pixels", 3, 16, CUBE, BF16, BF16),
]
STRIDED = [
    StridedProblem(96, 96, PIXELS, BF16),
    StridedProblem(32, 160, PIXELS, HALF),
    StridedProblem(16, 32, PIXELS, HALF),
    StridedProblem(24, 24, PIXELS, BF16),
    StridedProblem(64, 64, FRAMES, BF16),
    StridedProblem(48, 48, FRAMES, HALF),
]
HEADS = [
    HeadProblem(96, 32, BF16),
    HeadProblem(32, 96, HALF),
    HeadProblem(48, 15, BF16),
]
PROBLEMS = [*CONVS, *STRIDED, *HEADS]
# What the networks have, for a GPU.
REAL = [
    ConvProblem("latent", 16, 384, CUBE, BF16, BF16),
    ConvProblem("latent", 48, 1024, CUBE, BF16, BF16),
    ConvProblem("latent", 96, 96, POINT, BF16, SINGLE),
    ConvProblem("features", 192, 384, POINT, BF16, BF16),
    ConvProblem("features", 384, 768, TIME, HALF, HALF),
    ConvProblem("features", 1024, 512, POINT, BF16, BF16),
    ConvProblem("features", 1024, 2048, TIME, BF16, BF16),
    ConvProblem("features", 160, 320, POINT, HALF, HALF),
    StridedProblem(192, 192, PIXELS, BF16),
    StridedProblem(384, 384, PIXELS, HALF),
    StridedProblem(160, 160, PIXELS, BF16),
    StridedProblem(640, 640, PIXELS, BF16),
    StridedProblem(384, 384, FRAMES, BF16),
    StridedProblem(640, 640, FRAMES, HALF),
    HeadProblem(384, 32, BF16),
    HeadProblem(640, 96, HALF),
]
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_86")


def name_of(value: Any) -> str:
    """Of a problem, or of a size."""
    return str(value) if isinstance(value, tuple) else value.key().replace(" ", "-")


every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
each_conv = pytest.mark.parametrize("problem", CONVS, ids=name_of)


class Place:
    """Where the kernels run. `run` checks in the emulation that no order of threads matters."""

    def __init__(self, device: torch.device, emulation: Any, card: Device | None = None):
        self.device = device
        own = CARDS["RTX 3090"] if device.type == "cpu" else Device.of(device)
        self.card = card or own
        self._emulation = emulation

    def run(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The result of `compute`, on the CPU."""
        if self._emulation is None:
            y, again = compute(), compute()
            assert torch.equal(y, again)
            return y.cpu()
        y = self._emulation.in_every_order(compute)
        assert self._emulation.conflicts == 0, "bank conflicts"
        return y


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request, poisoned_outputs) -> Place:
    """The emulation on the CPU, or the card."""
    emulation = request.getfixturevalue("emulated") if request.param == "cpu" else None
    return Place(torch.device(request.param), emulation)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = SINGLE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def features(channels: int, frames: int, h: int, w: int, dtype=BF16, batch: int = 2):
    """[B, C, T, H, W] in channels_last_3d."""
    return rand(batch, frames, h, w, channels, dtype=dtype).permute(0, 4, 1, 2, 3)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


class Layer:
    """The layer of `problem` with random weights, and what it should make.

    Its input is the operand: for a head, what its norm makes.
    """

    def __init__(self, place: Place, problem: Any, block: int | None = None, batch: int = 2):
        self.problem, self.place, self.batch = problem, place, batch
        o, c = problem.out_channels, problem.in_channels
        self.operand = problem.operand_dtype if not self.is_strided else problem.feature_dtype
        weight = rand(o, c, *problem.kernel, seed=1)
        self.weight = (weight / weight[0].numel() ** 0.5).to(self.operand)
        self.bias = rand(o, seed=2, dtype=problem.feature_dtype)
        self.gamma = 1 + 0.2 * rand(c, seed=3)
        kernel = next(k for k in CONV_KERNELS if k.operation == problem.operation)
        config = kernel.candidates(problem, place.card)[0] if block is None else f"n{block}"
        given = (self.weight, self.bias, self.gamma)
        weights = LayerWeights(*(t.to(place.device) for t in given))
        self.layer = kernel.prepare(weights, problem, config, place.card)

    @property
    def is_strided(self) -> bool:
        return self.problem.operation == "strided_conv"

    @property
    def out_dtype(self) -> torch.dtype:
        return self.problem.feature_dtype if self.is_strided else self.problem.out_dtype

    @property
    def bound(self) -> float:
        """What its result may be off by."""
        on_card = self.place.device.type == "cuda"
        return CUT_OFF if on_card and self.out_dtype == SINGLE else BOUNDS[self.out_dtype]

    def input(self, size: tuple[int, int, int], last_slice: bool = False) -> torch.Tensor:
        frames, h, w = size
        frames += 0 if last_slice else self.problem.kernel[0] - 1
        return features(self.problem.in_channels, frames, h, w, self.operand, self.batch)

    def __call__(
        self,
        x: torch.Tensor,
        before: tuple[int, int] | None = None,
        after: tuple[int, int] | None = None,
        last_slice: bool = False,
    ) -> torch.Tensor:
        """before: zero rows and columns on each side; for a strided one `after` on one side."""
        before, after = self._padding(before, after)
        x = x.to(self.place.device)
        bias = self.bias.to(self.place.device)

        def compute() -> torch.Tensor:
            if self.is_strided:
                return self.layer.run(x, bias, LayoutCounter(), after)
            if self.problem.operation == "conv3d":
                return self.layer.run(x, bias, LayoutCounter(), before, last_slice)
            frames = x.shape[2] - (0 if last_slice else 2)
            return self.layer.convolve(x, frames, None, padding=before, only_frame=last_slice)

        y = self.place.run(compute)
        assert y.dtype == self.out_dtype and y.is_contiguous(memory_format=LAST)
        return y

    def expected(self, x: torch.Tensor, last_slice: bool = False) -> torch.Tensor:
        before, after = self._padding(None, None)
        stride = self.problem.stride if self.is_strided else POINT
        if self.is_strided:
            x = F.pad(x, (0, after[1], 0, after[0]))
        return conv3d(
            x.double(),
            self.weight.double(),
            self.bias.double(),
            LayoutCounter(),
            stride=stride,
            padding=(0, 0) if self.is_strided else before,
            last_slice=last_slice,
        )

    def _padding(self, before, after) -> tuple[tuple[int, int], tuple[int, int]]:
        rows, cols = (k // 2 for k in self.problem.kernel[1:])
        return before or (rows, cols), after or (rows, cols)


# -- right, at every size --------------------------------------------------------------------------


# Each problem with one size; `make test-all` takes all with all.
@pytest.mark.parametrize("problem, size", in_pairs(PROBLEMS, SIZES), ids=name_of)
def test_as_the_eager_twin(place, problem, size):
    if problem.operation == "strided_conv":
        size = (size[0], size[1] + 1, size[2] + 1)
    layer = Layer(place, problem)
    x = layer.input(size)
    assert relative(layer(x), layer.expected(x)) < layer.bound


@pytest.mark.parametrize("problem", [*CONVS, *HEADS], ids=name_of)
def test_one_frame_uses_the_last_slice(place, problem):
    layer = Layer(place, replace(problem, only_frame=True))
    x = layer.input((1, 5, 7), last_slice=True)
    y = layer(x, last_slice=True)
    assert relative(y, layer.expected(x, last_slice=True)) < layer.bound
    joined = F.pad(x, (0, 0, 0, 0, problem.kernel[0] - 1, 0)).contiguous(memory_format=LAST)
    assert torch.equal(y, layer(joined)), "the same as behind a history of zeros"


@pytest.mark.parametrize("frames", [3, 5, 9])
def test_every_second_frame(place, frames):
    layer = Layer(place, StridedProblem(32, 32, FRAMES, HALF))
    x = layer.input((frames - 2, 3, 7))
    y = layer(x)
    assert y.shape[2] == (frames - 1) // 2
    assert relative(y, layer.expected(x)) < BOUNDS[HALF]


@pytest.mark.parametrize("dtype", [HALF, BF16, SINGLE, None], ids=str)
def test_a_bias_of_any_dtype_or_none(place, dtype):
    layer = Layer(place, ConvProblem("features", 32, 24, POINT, BF16, BF16))
    x, bias = layer.input((2, 3, 5)), None if dtype is None else rand(24, dtype=dtype)
    given = None if bias is None else bias.to(place.device)
    y = place.run(
        lambda: layer.layer.run(x.to(place.device), given, LayoutCounter(), (0, 0), False)
    )
    expected = F.conv3d(x.float(), layer.weight.float(), None if bias is None else bias.float())
    assert relative(y, expected) < BOUNDS[BF16]


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize(
    "problem", [CONVS[3], CONVS[6], CONVS[11], STRIDED[1], HEADS[1]], ids=name_of
)
def test_turing_computes_the_same(emulated, problem):
    """Its copies are not asynchronous, its products half as deep."""
    ampere, turing = (
        Layer(Place(torch.device("cpu"), emulated, CARDS[name]), problem)
        for name in ("RTX 3090", "RTX 2060")
    )
    x = ampere.input((2, 8, 18))
    assert torch.equal(turing(x), ampere(x))


# -- the same bits ---------------------------------------------------------------------------------


@every_problem
def test_bits_do_not_depend_on_frames_or_clips(place, problem):
    layer = Layer(place, problem)
    x = layer.input((5, 4, 6))
    whole = layer(x)
    taps = problem.kernel[0]
    step = problem.stride[0] if layer.is_strided else 1
    for first, count in ((0, 2), (2, 1)):
        part = x[:, :, first * step : (first + count - 1) * step + taps]
        assert torch.equal(
            layer(part.contiguous(memory_format=LAST)), whole[:, :, first:][:, :, :count]
        )
    for clip in range(2):
        assert torch.equal(layer(x[clip : clip + 1]), whole[clip : clip + 1])


@every_problem
@pytest.mark.parametrize("axis", ["height", "width"])
def test_bits_do_not_depend_on_the_place(place, problem, axis):
    """A shard holds its neighbours' rows in the buffer, zeros at the edge of the picture."""
    layer = Layer(place, problem, batch=1)
    dim, is_height = (-2, True) if axis == "height" else (-1, False)
    x = layer.input((1, 12, 8) if is_height else (1, 8, 12))
    whole = layer(x)
    rows, cols = (k // 2 for k in problem.kernel[1:])
    around = rows if is_height else cols
    own = (0, cols) if is_height else (rows, 0)
    if layer.is_strided:
        padded = F.pad(x, (0, 0, 0, around) if is_height else (0, around))
        step = problem.stride[1]
    else:
        padded = F.pad(x, (0, 0, around, around) if is_height else (around, around))
        step = 1
    for start, count in ((0, 4), (4, 8)):
        size = count + around * (1 if layer.is_strided else 2)
        part = padded.narrow(dim, start, size).contiguous(memory_format=LAST)
        y = layer(part, own, own)
        assert torch.equal(y, whole.narrow(dim, start // step, count // step))


def test_every_configuration_has_the_same_bits(place):
    problem = ConvProblem("features", 48, 160, TIME, HALF, HALF)
    x = Layer(place, problem).input((1, 6, 6))
    results = [Layer(place, problem, block)(x) for block in BLOCKS]
    assert all(torch.equal(results[0], y) for y in results)


# -- the layers around the kernel ------------------------------------------------------------------


@pytest.mark.parametrize("out", [HALF, BF16], ids=str)
def test_pointwise_layers_of_attention(place, out):
    weight, bias = rand(144, 48, 1, 1, seed=1) / 48**0.5, rand(144, dtype=out)
    x = features(48, 1, 5, 7, HALF, batch=3)
    layer = pointwise(weight.to(place.device), out, place.card.machine_code)
    assert layer.operand_dtype == HALF
    on = x.to(place.device), bias.to(place.device)
    y = place.run(lambda: layer.run(*on, LayoutCounter(), (0, 0), False))
    expected = conv3d(x.float(), weight[:, :, None].half().float(), bias.float(), LayoutCounter())
    assert y.dtype == out and relative(y, expected) < BOUNDS[out]


@every_problem
@pytest.mark.parametrize("axis", [None, "height", "width"])
def test_passes_its_proof(place, problem, axis):
    kernel = next(k for k in CONV_KERNELS if k.operation == problem.operation)
    config = kernel.candidates(problem, place.card)[0]
    verdict = prove_kernel(kernel, problem, config, place.card, place.device, axis)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("problem", HEADS, ids=name_of)
def test_a_head_behind_its_norm(place, problem):
    layer = Layer(place, problem)
    x, past = features(problem.in_channels, 3, 4, 5), layer.input((0, 4, 5))
    operand, kept = layer.layer.operand(
        x.to(place.device), past.to(place.device), only_frame=False, keep=True
    )
    assert operand.shape == (2, problem.in_channels, 5, 4, 5)
    assert layer.layer.workspace(CallSize(2, 3, 4, 5)) == Workspace(
        operand.numel() * 2, kept.numel() * 2
    )
    y = layer(operand)
    normed = rms_norm_silu(x.float(), layer.gamma).half().float()
    joined = torch.cat([past.float(), normed], 2)
    expected = F.conv3d(joined, layer.weight.float(), layer.bias.float(), padding=(0, 1, 1))
    # Another neighbour at some roundings of the norm.
    assert relative(y, expected) < BOUNDS[HALF]
    added = layer.layer.convolve(
        operand, 3, torch.ones_like(y).to(place.device), padding=(1, 1), only_frame=False
    )
    assert torch.equal(added.cpu(), y + 1)


def test_an_input_in_another_format_is_converted_and_counted(place):
    layer = Layer(place, ConvProblem("features", 32, 48, TIME, HALF, HALF))
    x, bias = layer.input((2, 3, 5)).to(place.device), layer.bias.to(place.device)
    counter = LayoutCounter()
    y = layer.layer.run(x, bias, counter, (0, 0), False)
    assert counter.conversions == 0
    assert torch.equal(layer.layer.run(x.contiguous(), bias, counter, (0, 0), False), y)
    assert counter.conversions == 1


def test_a_frame_within_a_longer_tensor_is_read_where_it_is(place):
    layer = Layer(place, ConvProblem("features", 32, 48, TIME, HALF, HALF), batch=1)
    x = layer.input((4, 3, 5)).to(place.device)
    assert torch.equal(layer(x[:, :, 1:5]), layer(x)[:, :, 1:3])


@pytest.mark.parametrize("size", [CallSize(2, 3, 4, 5), CallSize(1, 1, 4, 5, only_frame=True)])
def test_the_workspace_is_the_copy_that_is_made(size):
    place = Place(torch.device("cpu"), None)
    pixels, past = size.batch * size.rows * size.cols, 0 if size.only_frame else 2
    frames = size.frames
    for problem, numbers in {
        ConvProblem("features", 32, 48, TIME, BF16, BF16): 0,
        ConvProblem("features", 24, 48, TIME, BF16, BF16): 32 * (frames + past) * 2,
        ConvProblem("latent", 16, 48, CUBE, BF16, BF16): 16 * (frames + past) * 4,
        ConvProblem("pixels", 3, 48, CUBE, HALF, HALF): 16 * (frames + past) * 2,
        StridedProblem(32, 32, PIXELS, BF16): 0,
        StridedProblem(24, 24, PIXELS, BF16): 32 * frames * 2,
    }.items():
        layer = Layer(place, problem).layer
        assert layer.workspace(size) == Workspace(hidden_bytes=numbers * pixels)
        assert layer.family == "cuda" and layer.kernel == "gemm"


def test_what_it_is_not_made_for_is_refused():
    variant = Variant(16, 16, POINT, POINT, HALF, HALF, 16)
    packed = pack(rand(16, 16, 1, 1, 1), variant)
    x = features(16, 1, 2, 3, HALF)
    for operand in (x.contiguous(), x.float(), features(32, 1, 2, 3, HALF)):
        with pytest.raises(LayoutError, match=r"expected 16 channels in torch\.float16"):
            conv(Call(operand, packed), variant, "sm_80")
    with pytest.raises(LayoutError, match="padding"):
        conv(Call(x, packed, padding=(1, 1)), variant, "sm_80")
    kernel, problem = CONV_KERNELS[0], CONVS[0]
    for config in ("n100", "96", "n", "n096", "m96"):
        with pytest.raises(ValueError, match="no configuration"):
            kernel.build(problem, config, CARDS["A100"])
    with pytest.raises(ValueError, match="gain"):
        CONV_KERNELS[2].prepare(LayerWeights(rand(32, 96, 3, 3, 3)), HEADS[0], "n32", CARDS["A100"])


# -- configurations and compilation ----------------------------------------------------------------


@pytest.mark.parametrize(
    "channels,blocks",
    [
        *((96, (96, 48)), (192, (96, 64)), (384, (128, 96)), (768, (128, 96))),
        *((1152, (128, 96)), (1024, (128, 64)), (2048, (128, 64))),
        *((160, (160, 32)), (320, (160, 64)), (640, (128, 160))),
        *(
            (48, (48, 16)),
            (144, (48, 16)),
            (24, (32, 16)),
            (32, (32, 16)),
            (16, (16,)),
            (15, (16,)),
        ),
    ],
)
def test_the_blocks_that_waste_least(channels, blocks):
    assert blocks_for(channels) == blocks


def compiles(variant: Variant, machine_code: str) -> bool:
    made = program(variant, machine_code)
    return bool(compile_source(made.source, dict(made.defines), machine_code, None))


@pytest.mark.parametrize("machine_code", TARGETS)
def test_compiles_for(machine_code):
    assert compiles(Variant(384, 768, TIME, POINT, BF16, BF16, 128), machine_code)


# The source tells cards before Ampere from later ones, and nothing else.
@pytest.mark.parametrize(
    "machine_code",
    [
        pytest.param(code, marks=() if code in ("sm_90", "compute_86") else pytest.mark.full)
        for code in TARGETS
    ],
)
def test_every_form_compiles_for(machine_code):
    assert compiles(Variant(160, 160, PIXELS, (1, 2, 2), BF16, BF16, 160), machine_code)
    assert compiles(Variant(16, 20, CUBE, POINT, HALF, SINGLE, 32), machine_code)
    assert compiles(Variant(16, 384, CUBE, POINT, SINGLE, BF16, 64), machine_code)


def test_compiles_for_turing_without_bfloat16():
    assert compiles(Variant(384, 768, TIME, POINT, HALF, HALF, 128), "sm_75")
    assert compiles(Variant(16, 384, CUBE, POINT, SINGLE, HALF, 64), "sm_75")
    with pytest.raises(BuildError, match="no bfloat16"):
        compiles(Variant(96, 96, POINT, POINT, BF16, BF16, 96), "sm_75")
    for kernel in CONV_KERNELS:
        assert kernel.requires.unmet_by_device(CARDS["RTX 2060"]) is None
        assert kernel.requires.unmet_by_dtype(CARDS["RTX 2060"], HALF) is None
        assert kernel.requires.unmet_by_dtype(CARDS["RTX 2060"], BF16) is not None


def test_kernels_build_for_a_card(tmp_path, monkeypatch):
    monkeypatch.setenv("WAN_VAE_CACHE", str(tmp_path))
    for kernel, problem in zip(CONV_KERNELS, (CONVS[0], STRIDED[0], HEADS[0]), strict=True):
        config = kernel.candidates(problem, CARDS["RTX 4090"])[0]
        kernel.build(problem, config, CARDS["RTX 4090"])
        made = {program.file for program in kernel.programs(problem, config, CARDS["RTX 4090"])}
        assert made == ({"conv.cu", "norm.cu"} if problem.operation == "head" else {"conv.cu"})
    build(pointwise_program(384, 1152, HALF, "sm_89"))


def test_shared_memory_fits_every_card():
    for block in BLOCKS:
        variant = Variant(96, block, POINT, POINT, HALF, HALF, block)
        assert variant.shared_bytes <= 64 << 10


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [*PROBLEMS, *REAL], ids=name_of)
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_ten_runs_have_the_same_bits(poisoned_outputs, problem, dtype):
    old = problem.feature_dtype
    problem = replace(problem, feature_dtype=dtype)
    if isinstance(problem, ConvProblem) and problem.out_dtype == old:
        problem = replace(problem, out_dtype=dtype)
    layer = Layer(Place(torch.device("cuda"), None), problem)
    for size in ((1, 2, 2), (3, 38, 52), (5, 18, 130)):
        x = layer.input(size)
        results = [layer(x) for _ in range(10)]
        assert all(torch.equal(results[0], y) for y in results)
        assert relative(results[0], layer.expected(x)) < layer.bound


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [CONVS[0], STRIDED[0]], ids=name_of)
def test_tensors_beyond_two_to_the_31_numbers(problem):
    """The last frame and the last rows of 2.2e9 numbers, where a card has room for it."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    layer = Layer(Place(torch.device("cuda"), None), problem, batch=1)
    x = torch.randn((1, 3, 2900, 2600, 96), device="cuda", dtype=BF16).permute(0, 4, 1, 2, 3)
    y = layer(x)
    assert x.numel() > 1 << 31
    frame = x[:, :, 2:].contiguous(memory_format=LAST)
    assert torch.equal(layer(frame), y[:, :, 2:])
    rows = frame[..., -8:, :].contiguous(memory_format=LAST)
    part = layer(rows)
    assert torch.equal(part, y[:, :, 2:, -part.shape[3] :])


@pytest.mark.gpu
@pytest.mark.parametrize("problem", REAL, ids=name_of)
def test_the_layers_of_the_networks_pass_their_proof(problem):
    device = torch.device("cuda")
    kernel = next(k for k in CONV_KERNELS if k.operation == problem.operation)
    for config in kernel.candidates(problem, Device.of(device)):
        verdict = prove_kernel(kernel, problem, config, Device.of(device), device, None)
        assert verdict.passed, verdict.reason
