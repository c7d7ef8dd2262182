"""The 3x3x3 convolution by mma.sync: every form and tile, on a CPU by emulation, and on a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from wan_vae.kernels.cuda import conv3x3_mma, driver
from wan_vae.kernels.cuda.conv3x3_mma import Variant, conv3x3, pack, pack_doubled, upsample_conv3x3
from wan_vae.kernels.cuda.program import build
from wan_vae.kernels.device import CARDS, Device
from wan_vae.kernels.registry import kernels_of
from wan_vae.kernels.weights import fold_upsample
from wan_vae.kernels.winograd import DIRECT, PAIRS, POINTS, QUADS, Transform
from wan_vae.ops.eager.norm import rms_norm_silu
from wan_vae.ops.opset import CallSize, HaloRows, Workspace
from wan_vae.ops.problem import HeadProblem, LayerWeights, NormConvProblem

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
# Relative errors that rounding alone makes: of the result, of sums in float16.
ROUNDING = {HALF: 5e-4, BF16: 3e-3, FP32: 4e-4}
HALF_SUMS = 4e-4


def variant(
    cin: int, cout: int, config: str, out: torch.dtype = BF16, code: str = "sm_80"
) -> Variant:
    form, tile, half_sums = conv3x3_mma.parse(config)
    operand = out if form == "doubled" else HALF
    return Variant(cin, cout, form, tile, operand, out, code, half_sums)


# Every tile of every form; channels that are no multiple of a chunk or a block; several blocks.
BEHIND_NORM = [
    variant(96, 96, "winograd_8x96"),
    variant(32, 192, "winograd_8x96", HALF),
    variant(96, 96, "winograd_12x96"),
    variant(64, 96, "winograd_12x96_halfsums", HALF),
    variant(32, 128, "winograd_16x64"),
    variant(64, 64, "winograd_18x64_halfsums", HALF),
    variant(40, 80, "winograd_8x80"),
    variant(48, 48, "winograd_12x48"),
    variant(32, 32, "winograd_16x32", HALF),
    variant(24, 24, "winograd_16x24"),
    variant(16, 16, "winograd_16x16", HALF),
    variant(32, 96, "winograd2d_8x96", HALF),
    variant(96, 192, "winograd2d_12x96"),
    variant(64, 96, "winograd2d_12x96_halfsums", HALF),
    variant(64, 128, "winograd2d_12x64_halfsums", HALF),
    variant(24, 64, "winograd2d_12x64"),
    variant(96, 96, "winograd4_8x96"),
    variant(32, 192, "winograd4_4x96", HALF),
    variant(64, 128, "winograd4_8x64_halfsums", HALF),
    variant(32, 64, "winograd4_12x64"),
    variant(40, 80, "winograd4_8x80"),
    variant(48, 48, "winograd4_8x48"),
    variant(32, 32, "winograd4_8x32", HALF),
    variant(24, 24, "winograd4_16x24"),
    variant(16, 16, "winograd4_16x16", HALF),
    variant(64, 96, "direct3_16x96", HALF),
    variant(32, 128, "direct3_16x64"),
    variant(40, 80, "direct3_16x80"),
    variant(24, 48, "direct3_12x48", HALF),
    variant(32, 32, "direct1_16x32"),
    variant(16, 24, "direct1_16x24"),
    variant(16, 16, "direct3_16x16"),
    variant(96, 96, "direct1_16x96"),
    variant(32, 3, "direct3_16x8", FP32),
    variant(48, 12, "direct3_16x16", FP32),
    variant(16, 32, "direct1_16x32", FP32),
]
DOUBLED = [
    variant(32, 96, "doubled_8x96"),
    variant(32, 192, "doubled_8x96", HALF),
    variant(64, 64, "doubled_16x64"),
    variant(40, 80, "doubled_8x80"),
    variant(16, 48, "doubled_12x48"),
    variant(32, 32, "doubled_16x32", HALF),
    variant(24, 24, "doubled_16x24"),
    variant(16, 16, "doubled_16x16"),
]
# The widths of Wan 2.1 and 2.2, for a GPU.
WIDE = [
    *(variant(c, c, f"winograd_{t}x96") for c in (96, 192, 384) for t in (8, 12)),
    *(variant(256, 256, f"winograd_{t}x64{h}") for t in (16, 18) for h in ("", "_halfsums")),
    *(variant(c, c, f"winograd2d_{t}x96") for c in (96, 384) for t in (8, 12)),
    *(variant(c, c, f"winograd4_{t}x96") for c in (96, 192) for t in (4, 8)),
    *(variant(256, 256, f"winograd4_{t}x64") for t in (8, 12)),
    variant(256, 256, "winograd4_8x64_halfsums"),
    variant(160, 160, "winograd4_8x80"),
    variant(384, 384, "winograd_12x96_halfsums"),
    variant(384, 384, "winograd2d_12x96_halfsums", HALF),
    variant(512, 256, "winograd2d_12x64_halfsums"),
    variant(1024, 512, "winograd_16x64"),
    variant(320, 640, "winograd_8x80"),
    variant(384, 384, "direct3_16x96"),
    variant(1024, 1024, "direct1_16x64"),
    variant(640, 640, "direct3_16x80"),
    variant(96, 3, "direct3_16x8", FP32),
    variant(256, 12, "direct3_16x16", FP32),
    variant(384, 32, "direct3_16x32", FP32),
]
WIDE_DOUBLED = [
    variant(384, 192, "doubled_8x96"),
    variant(192, 96, "doubled_8x96", HALF),
    variant(1024, 512, "doubled_16x64"),
]
# Four frames d0 to d3 -> the operand of F(2,3).
PAIRS_INTO = torch.tensor(
    [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float64
)
SIZES = [(1, 1, 5, 7), (2, 2, 9, 18), (1, 3, 20, 5)]
PADDINGS = [(1, 1), (0, 1), (1, 0)]


def name(v: Variant) -> str:
    return f"{v.config}-{v.cin}x{v.cout}-{str(v.out)[6:]}"


def error_of(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected).norm() / expected.norm()).item()


def operand_of(joined: torch.Tensor, frames: int, transform: Transform) -> torch.Tensor:
    """[B, C, 2 + frames, H, W] float16 -> what a norm writes of it for a form of Winograd."""
    into = PAIRS_INTO if transform == PAIRS else POINTS.into
    # Frames of the past that no history reaches, in the first pair or quad.
    x = F.pad(joined.double(), (0, 0, 0, 0, -frames % transform.frames, 0))
    windows = [x[:, :, i : i + len(into)] for i in range(0, frames, transform.frames)]
    made = [torch.einsum("pf,bcfhw->bcphw", into.to(x.device), window) for window in windows]
    return torch.cat(made, 2).to(HALF).contiguous(memory_format=torch.channels_last_3d)


class Case:
    """Random inputs of one convolution behind a norm, and what should come out of it."""

    def __init__(self, v: Variant, size: tuple[int, ...], padding: tuple[int, int], device: str):
        generator = torch.Generator(device).manual_seed(0)
        b, t, h, w = size
        past = v.taps - 1

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        joined = F.silu(random(b, past + t, h, w, v.cin)).to(HALF).permute(0, 4, 1, 2, 3)
        weight = (random(v.cout, v.cin, 3, 3, 3) / (27 * v.cin) ** 0.5).to(HALF)
        self.v, self.frames, self.padding = v, t, padding
        self.operand = joined if v.transform == DIRECT else operand_of(joined, t, v.transform)
        self.bias, self.packed = random(v.cout), pack(weight, v)
        used = weight[:, :, 3 - v.taps :].float()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            self.expected = F.conv3d(joined.float(), used, self.bias, padding=(0, *padding))
        self.residual = None
        if v.out != FP32:
            o, _, rows, columns = self.expected.shape[1:]
            self.residual = random(b, t, rows, columns, o).to(v.out).permute(0, 4, 1, 2, 3)

    def run(self, with_residual: bool) -> torch.Tensor:
        """The kernel's result; its memory held NaN before."""
        poison = torch.full_like(self.expected, float("nan"), dtype=self.v.out)
        del poison
        residual = self.residual if with_residual else None
        return conv3x3(
            self.operand, self.packed, self.bias, residual, self.v, self.frames, self.padding
        )

    def check(self, got: torch.Tensor, with_residual: bool) -> None:
        expected = self.expected
        if with_residual and self.residual is not None:
            expected = expected + self.residual.float()
        assert got.shape == expected.shape
        # A pixel's last bit of float16 operands, and of their transforms.
        bound = ROUNDING[self.v.out] + ROUNDING[HALF] + HALF_SUMS * self.v.half_sums
        assert error_of(got, expected) < bound


def in_short(v: Variant):
    """Of the tiles that no layer is given, two are enough for a short run."""
    is_long = v.form == "winograd4" and v.tile.name not in ("8x96", "16x24")
    return pytest.param(v, marks=pytest.mark.full) if is_long else v


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("v", [in_short(v) for v in BEHIND_NORM], ids=name)
def test_behind_a_norm(v):
    for i, size in enumerate(SIZES[:2] if v.cout > 64 else SIZES):
        case = Case(v, size, PADDINGS[i], "cpu")
        case.check(case.run(i > 0), i > 0)


def doubled(v: Variant, size: tuple[int, ...], padding: tuple[int, int], device: str):
    """Input, packed weights and bias of an up-sampler, and what should come out."""
    generator = torch.Generator(device).manual_seed(0)
    n, h, w = size
    x = torch.randn(n, h, w, v.cin, generator=generator, device=device).to(v.out)
    weight = torch.randn(v.cout, v.cin, 3, 3, generator=generator, device=device)
    weight = (weight / (9 * v.cin) ** 0.5).to(v.out)
    bias = torch.randn(v.cout, generator=generator, device=device)
    x = x.permute(0, 3, 1, 2)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y = F.conv2d(F.interpolate(x.float(), scale_factor=2.0), weight.float(), bias, padding=1)
    # Without the outermost rows or columns where there is no padding.
    (top, left), (rows, columns) = (2 - 2 * p for p in padding), y.shape[2:]
    expected = y[..., top : rows - top, left : columns - left]
    return x, pack_doubled(fold_upsample(weight), v), bias, expected


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("v", DOUBLED, ids=name)
def test_behind_an_up_sampler(v):
    for padding, size in zip(PADDINGS, [(1, 5, 7), (2, 9, 18), (1, 18, 5)], strict=True):
        x, packed, bias, expected = doubled(v, size, padding, "cpu")
        got = upsample_conv3x3(x, packed, bias, v, padding)
        assert got.shape == expected.shape
        assert error_of(got, expected) < 2 * ROUNDING[v.out]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    "config", ["winograd_16x16", "winograd2d_8x96", "winograd4_16x16", "direct3_16x16"]
)
def test_bits_do_not_depend_on_the_place(config):
    """A part of the picture, and a part of the frames, have the bits of the whole."""
    v = variant(16, 16 if "16x16" in config else 96, config)
    frames = 5 if v.transform == QUADS else 4
    case = Case(v, (1, frames, 20, 21), (1, 1), "cpu")
    whole = case.run(True)
    operand, residual = case.operand, case.residual
    # Rows 4 to 15 with the rows around them in the operand: as a shard has them.
    case.operand = operand[:, :, :, 3:17].contiguous(memory_format=torch.channels_last_3d)
    case.residual, case.padding = residual[:, :, :, 4:16], (0, 1)
    case.expected = case.expected[:, :, :, 4:16]
    assert torch.equal(case.run(True), whole[:, :, :, 4:16])
    # The last two frames, or the last quad.
    kept = 4 if v.transform == QUADS else 2
    last = operand[:, :, -v.transform.operand_frames(kept, 2) :]
    case.operand = last.contiguous(memory_format=torch.channels_last_3d)
    case.residual, case.padding, case.frames = residual[:, :, -kept:], (1, 1), kept
    case.expected = torch.empty_like(whole[:, :, -kept:])
    assert torch.equal(case.run(True), whole[:, :, -kept:])


# -- without a card --------------------------------------------------------------------------------


def test_every_tile_is_tried():
    tried = {("direct" if "direct" in v.form else v.form, v.tile) for v in (*BEHIND_NORM, *DOUBLED)}
    for form, tiles in conv3x3_mma._TILES.items():
        # The direct forms are the same kernels, with one phase or three.
        same = "direct" if "direct" in form else form
        assert {tile for f, tile in tried if f == same} == set(tiles.values()), form


def test_configurations_are_read_back():
    for v in (*BEHIND_NORM, *DOUBLED, *WIDE, *WIDE_DOUBLED):
        assert conv3x3_mma.parse(v.config) == (v.form, v.tile, v.half_sums)
    for wrong in ("winograd", "winograd_7x96", "direct2_16x96", "winograd_8x96_half"):
        with pytest.raises(ValueError, match="is no configuration"):
            conv3x3_mma.parse(wrong)


def test_quads_are_tried_first_by_layers_that_make_four_frames_of_a_latent_frame():
    (kernel,) = (k for k in kernels_of("norm_conv3d", ("cuda",)) if k.name == "mma")
    problem = NormConvProblem(192, 192, BF16, 4)
    for card, expected in (
        (CARDS["A100"], ["winograd4_4x96", "winograd4_8x96", "winograd_8x96"]),
        (
            CARDS["RTX 4090"],
            ["winograd4_8x96_halfsums", "winograd_12x96_halfsums", "winograd4_4x96"],
        ),
    ):
        assert kernel.candidates(problem, card)[: len(expected)] == expected
        for other in (
            NormConvProblem(192, 192, BF16, 2),
            NormConvProblem(192, 192, BF16, 4, only_frame=True),
        ):
            assert not any("winograd4" in name for name in kernel.candidates(other, card))
    (head,) = (k for k in kernels_of("head", ("cuda",)) if k.name == "mma")
    names = head.candidates(HeadProblem(96, 3, BF16, 4), CARDS["A100"])
    assert names and all(name.startswith("direct3") for name in names)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("cuts", [(1,), (5,), (1, 5)], ids=str)
def test_a_layer_of_quads_has_the_same_bits_for_every_cut_into_latent_frames(cuts):
    """Norm and convolution together, with halo rows too, and the bytes that it says it takes."""
    (kernel,) = (k for k in kernels_of("norm_conv3d", ("cuda",)) if k.name == "mma")
    problem, card = NormConvProblem(16, 16, HALF, 4), CARDS["A100"]
    config, *_ = kernel.candidates(problem, card)
    assert config == "winograd4_16x16"
    torch.manual_seed(0)
    weights = LayerWeights(
        torch.randn(16, 16, 3, 3, 3) / 20, torch.randn(16), 1 + torch.randn(16, 1, 1, 1) / 5
    )
    layer = kernel.prepare(weights, problem, config, card)
    x = torch.randn(1, 9, 5, 7, 16).to(HALF).permute(0, 4, 1, 2, 3)

    def run(cuts: tuple[int, ...], rows: slice, halo: bool) -> torch.Tensor:
        history, made = None, []
        for start, stop in pairwise((0, *cuts, 9)):
            part, around = x[:, :, start:stop], None
            if halo:
                frames = part.permute(0, 2, 3, 4, 1)
                edges = (
                    frames[:, :, rows.start - 1 : rows.start],
                    frames[:, :, rows.stop :][:, :, :1],
                )
                around = HaloRows("height", *(edge.contiguous() for edge in edges))
            own = part[:, :, :, rows]
            operand, history = layer.operand(
                own, history, only_frame=False, keep=True, overwrite=True, halo=around
            )
            if not halo:
                size = CallSize(1, stop - start, own.shape[3], 7)
                taken = (t.numel() * t.element_size() for t in (operand, history))
                assert layer.workspace(size) == Workspace(*taken)
            padding = (0, 1) if halo else (1, 1)
            made.append(
                layer.convolve(operand, stop - start, None, padding=padding, only_frame=False)
            )
        return torch.cat(made, 2)

    whole = run((), slice(0, 5), False)
    expected = F.conv3d(
        F.pad(rms_norm_silu(x.float(), weights.gamma), (0, 0, 0, 0, 2, 0)),
        weights.weight,
        weights.bias,
        padding=(0, 1, 1),
    )
    assert error_of(whole, expected) < 1e-3
    assert torch.equal(run(cuts, slice(0, 5), False), whole)
    assert torch.equal(run(cuts, slice(1, 4), True), whole[:, :, :, 1:4])


@pytest.mark.parametrize("v", [*WIDE[::4], *WIDE_DOUBLED, *BEHIND_NORM[::5]], ids=name)
def test_compiles(v):
    try:
        driver.nvrtc_version()
    except OSError as error:
        pytest.skip(f"no NVRTC here (pip install nvidia-cuda-nvrtc): {error}")
    program = conv3x3_mma.program(v)
    assert program.shared_bytes <= CARDS["RTX 4090"].shared_bytes
    assert build.__wrapped__(program).startswith(b"\x7fELF")


# -- on a GPU --------------------------------------------------------------------------------------


def on_this_card(v: Variant, capability: tuple[int, int] | None) -> Variant:
    device = Device.of(torch.device("cuda", 0))
    code = (device if capability is None else device.imitating(capability)).machine_code
    return Variant(v.cin, v.cout, v.form, v.tile, v.operand, v.out, code, v.half_sums)


@pytest.mark.gpu
@pytest.mark.parametrize("v", [*WIDE, *BEHIND_NORM], ids=name)
@pytest.mark.parametrize("capability", [None, (8, 0)], ids=["own", "8.0"])
def test_behind_a_norm_on_the_gpu_fifty_times(v, capability):
    v = on_this_card(v, capability)
    sizes = [(1, 1, 5, 7), (1, 5, 35, 53), (2, 4, 18, 33), (1, 4, 131, 179)]
    for i, size in enumerate(sizes):
        case = Case(v, size, PADDINGS[i % 3], "cuda")
        runs = [case.run(i > 0) for _ in range(50 if capability is None else 3)]
        assert all(torch.equal(run, runs[0]) for run in runs), size
        case.check(runs[0], i > 0)


@pytest.mark.gpu
@pytest.mark.parametrize("v", [*WIDE_DOUBLED, *DOUBLED], ids=name)
@pytest.mark.parametrize("capability", [None, (8, 0)], ids=["own", "8.0"])
def test_behind_an_up_sampler_on_the_gpu_fifty_times(v, capability):
    v = on_this_card(v, capability)
    for i, size in enumerate([(1, 5, 7), (5, 35, 53), (4, 18, 33), (3, 66, 90)]):
        x, packed, bias, expected = doubled(v, size, PADDINGS[i % 3], "cuda")
        runs = []
        for _ in range(50 if capability is None else 3):
            poison = torch.full_like(expected, float("nan"), dtype=v.out)
            del poison
            runs.append(upsample_conv3x3(x, packed, bias, v, PADDINGS[i % 3]))
        assert all(torch.equal(run, runs[0]) for run in runs), size
        assert error_of(runs[0], expected) < 2 * ROUNDING[v.out]
