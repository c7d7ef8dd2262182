"""The convolution for Hopper: on a CPU by emulation, and the same on a Hopper GPU."""

import os
import sys

import pytest
import torch
import torch.nn.functional as F

from wan_vae.kernels.cuda import driver
from wan_vae.kernels.cuda import program as program_module
from wan_vae.kernels.cuda.conv3x3_wgmma import (
    Variant,
    conv3x3,
    pack,
    pack_doubled,
    program,
    upsample_conv3x3,
)
from wan_vae.kernels.cuda.norm import make_norm
from wan_vae.kernels.cuda.program import build
from wan_vae.kernels.device import CARDS
from wan_vae.kernels.kernel import BuildError, NormCall
from wan_vae.kernels.proof.cases import prove_kernel
from wan_vae.kernels.registry import kernels_of
from wan_vae.kernels.weights import fold_upsample, norm_scale
from wan_vae.kernels.winograd import DIRECT, POINTS, QUADS, quad_phases
from wan_vae.ops.eager.norm import rms_norm_silu
from wan_vae.ops.problem import NormConvProblem

HALF, BF16 = torch.float16, torch.bfloat16
NORM = make_norm("sm_90")
VARIANTS = [
    Variant(96, 96, True, 3, BF16),
    Variant(192, 384, True, 3, HALF),
    Variant(32, 96, False, 3, HALF),
    Variant(192, 192, False, 3, BF16),
    Variant(384, 384, False, 1, BF16),
    Variant(256, 256, True, 3, BF16),
    Variant(64, 128, False, 3, HALF),
    Variant(1024, 512, True, 3, BF16),
    Variant(160, 320, True, 3, BF16),
    Variant(320, 640, False, 3, BF16),
]
QUADRUPLES = [  # F(4,3)
    Variant(cin, cout, True, 3, out, quads=True)
    for cin, cout, out in ((96, 96, BF16), (192, 192, HALF), (96, 192, BF16), (256, 256, BF16))
]
DOUBLED = [
    Variant(192, 96, False, 1, BF16, doubled=True),
    Variant(384, 192, False, 1, HALF, doubled=True),
    Variant(32, 64, False, 1, BF16, doubled=True),
    Variant(1024, 512, False, 1, BF16, doubled=True),
]


def features(*shape: int, dtype=HALF, device="cpu") -> torch.Tensor:
    """[B, T, H, W, C] random numbers as [B, C, T, H, W] in channels_last_3d."""
    return torch.randn(shape, device=device).to(dtype).permute(0, 4, 1, 2, 3)


def unpack(packed: torch.Tensor, variant: Variant) -> torch.Tensor:
    """The weights [phase, O, C, 3, 3] behind `pack`, as the kernel reads them."""
    transform, n = variant.transform, variant.blocks
    phases = variant.taps if transform == DIRECT else transform.products
    p = packed.view(
        variant.cout // variant.block // n, phases, variant.cin // 32, 3, n, 3, variant.block, 4, 8
    )
    out = torch.empty_like(p)
    for chunk in range(4):  # 16 bytes of a row, swizzled by bits 1 and 2 of the row's number
        for r in range(variant.block):
            out[..., r, chunk, :] = p[..., r, chunk ^ (r // 2 % 4), :]
    # tile block, phase, 32 channels, ky, block, kx, row, 4, 8 -> phase, O, C, ky, kx
    return out.permute(1, 0, 4, 6, 2, 7, 8, 3, 5).reshape(phases, variant.cout, variant.cin, 3, 3)


def by_packed_weights(operand: torch.Tensor, packed: torch.Tensor, variant: Variant, frames: int):
    """What the kernel computes from its operand, frame by frame in float32."""
    phases = unpack(packed, variant).float()
    x = operand.float()

    def product(frame: int, phase: int) -> torch.Tensor:
        return F.conv2d(x[:, :, frame], phases[phase], padding=1)

    if variant.quads:
        made = []
        for quad in range(QUADS.groups(frames)):
            products = torch.stack([product(6 * quad + i, i) for i in range(6)])
            made += torch.einsum("fp,pbohw->fbohw", POINTS.out.float(), products).unbind()
        return torch.stack(made[len(made) - frames :], 2)
    if not variant.winograd:
        made = [sum(product(t + k, k) for k in range(variant.taps)) for t in range(frames)]
        return torch.stack(made, 2)
    made = []
    for pair in range((frames + 1) // 2):
        m1, m2, m0, m3 = (product(4 * pair + f, i) for i, f in enumerate((1, 2, 0, 3)))
        made += [m0 + m1 + m2, m1 - m2 + m3]  # the fourth weights are negated
    return torch.stack(made[len(made) - frames :], 2)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("width", [192, 128])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_operand_and_packed_weights_make_the_convolution(frames, width):
    torch.manual_seed(0)
    variant = Variant(32, width, True, 3, HALF)
    x, history = features(2, frames, 3, 5, 32), features(2, 2, 3, 5, 32)
    scale, weight = norm_scale(torch.randn(32)), torch.randn(width, 32, 3, 3, 3) / 30
    operand, kept = NORM.pairs(NormCall(x, scale, history, keep=True, dtype=HALF))
    joined, also_kept = NORM.join(NormCall(x, scale, history, keep=True, dtype=HALF))
    assert torch.equal(kept, also_kept)
    expected = F.conv3d(joined.float(), weight, padding=(0, 1, 1))
    got = by_packed_weights(operand, pack(weight, variant), variant, frames)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-3
    quads = Variant(32, width, True, 3, HALF, quads=True)
    operand, kept = NORM.quads(NormCall(x, scale, history, keep=True, dtype=HALF))
    assert torch.equal(kept, also_kept)
    got = by_packed_weights(operand, pack(weight, quads), quads, frames)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-3
    direct = Variant(32, width, False, 3, HALF)
    got = by_packed_weights(joined, pack(weight, direct), direct, frames)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-3


@pytest.mark.usefixtures("emulated")
def test_pairs_do_not_depend_on_the_chunks():
    x, scale = features(1, 9, 3, 5, 32), norm_scale(torch.randn(32))
    whole, _ = NORM.pairs(NormCall(x, scale, dtype=HALF))
    for cut in (1, 3, 5):  # the video's first frame stands alone: chunks end at odd numbers
        first, history = NORM.pairs(NormCall(x[:, :, :cut], scale, keep=True, dtype=HALF))
        rest, _ = NORM.pairs(NormCall(x[:, :, cut:], scale, history, dtype=HALF))
        assert torch.equal(torch.cat((first, rest), 2), whole)


class Case:
    """Random inputs of one convolution behind a norm, and what should come out of it."""

    def __init__(self, variant: Variant, size: tuple[int, ...], padding: tuple[int, int], device):
        torch.manual_seed(0)
        b, t, h, w = size
        x = features(b, t, h, w, variant.cin, dtype=BF16, device=device)
        history = features(b, 2, h, w, variant.cin, device=device)
        scale = norm_scale(torch.randn(variant.cin, device=device))
        self.variant, self.frames, self.padding = variant, t, padding
        self.bias = torch.randn(variant.cout, device=device)
        shape = (variant.cout, variant.cin, 3, 3, 3)
        weight = (torch.randn(shape, device=device) / 50).to(HALF)
        self.packed = pack(weight, variant)
        past = variant.taps - 1
        before = history if past else None
        joined, _ = NORM.join(NormCall(x, scale, before, past, dtype=HALF))
        self.operand = joined
        if variant.winograd:
            call = NormCall(x, scale, history, dtype=HALF)
            self.operand, _ = NORM.of(variant.transform)(call)
        rows, columns = h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            used = weight[:, :, 3 - variant.taps :].float()
            self.expected = F.conv3d(joined.float(), used, self.bias, padding=(0, *padding))
        made = (b, t, rows, columns, variant.cout)
        self.residual = features(*made, dtype=variant.out, device=device)

    def run(self, with_residual: bool) -> torch.Tensor:
        """The kernel's result; its memory held NaN before."""
        poison = torch.full_like(self.expected, float("nan"), dtype=self.variant.out)
        del poison
        residual = self.residual if with_residual else None
        return conv3x3(
            self.operand, self.packed, self.bias, residual, self.variant, self.frames, self.padding
        )

    def check(self, got: torch.Tensor, with_residual: bool) -> None:
        expected = self.expected + self.residual.float() if with_residual else self.expected
        error = ((got.float() - expected).norm() / expected.norm()).item()
        of_half = 1.2e-3 if self.variant.quads else 8e-4
        assert error < (3e-3 if self.variant.out == BF16 else of_half)


def label(variant: Variant) -> str:
    return f"{variant.name}-{variant.cin}x{variant.cout}"


# More tiles than programs, an odd number of them, frames of the past, several clips and blocks.
EMULATED = [
    (Variant(32, 96, True, 3, HALF), (1, 3, 5, 20), (1, 1)),
    (Variant(32, 192, False, 3, HALF), (1, 2, 5, 7), (1, 1)),
    (Variant(32, 96, True, 3, HALF, quads=True), (1, 5, 9, 18), (1, 0)),
    (Variant(32, 192, True, 3, BF16, quads=True), (2, 2, 5, 20), (0, 1)),
]
ALSO_EMULATED = [
    (Variant(64, 64, True, 3, BF16), (2, 2, 18, 5), (0, 1)),
    (Variant(32, 96, False, 1, BF16), (1, 3, 5, 7), (1, 0)),
    (Variant(64, 64, True, 3, BF16, quads=True), (1, 1, 5, 7), (1, 1)),
]


@pytest.mark.parametrize(
    "variant,size,padding",
    [*EMULATED, *(pytest.param(*case, marks=pytest.mark.full) for case in ALSO_EMULATED)],
    ids=lambda v: label(v) if isinstance(v, Variant) else "",
)
def test_the_kernel_on_a_cpu(emulated, poisoned_outputs, variant, size, padding):
    """Copies land and products are made as late as the waits allow."""
    case = Case(variant, size, padding, "cpu")
    case.check(case.run(False), False)
    case.check(emulated.in_every_order(lambda: case.run(True)), True)


@pytest.mark.usefixtures("emulated", "poisoned_outputs")
def test_the_kernel_of_an_up_sampler_on_a_cpu():
    torch.manual_seed(0)
    variant = Variant(32, 64, False, 1, BF16, doubled=True)
    x = torch.randn(3, 5, 20, 32).to(BF16).permute(0, 3, 1, 2)
    weight, bias = (torch.randn(64, 32, 3, 3) / 17).to(HALF), torch.randn(64)
    got = upsample_conv3x3(x, pack_doubled(fold_upsample(weight), variant), bias, variant)
    expected = upsampled(x, weight, bias)
    assert ((got - expected).norm() / expected.norm()).item() < 6e-3


def upsampled(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding=(1, 1)):
    """The float32 twin, without the outermost rows or columns where there is no padding."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y = F.conv2d(F.interpolate(x.float(), scale_factor=2.0), weight.float(), bias, padding=1)
    (top, left), (h, w) = (2 - 2 * p for p in padding), y.shape[2:]
    return y[..., top : h - top, left : w - left]


def test_packed_folded_weights_make_the_upsampled_convolution():
    """As the kernel reads them: for the parity of a row, then of a column, two by two taps."""
    torch.manual_seed(0)
    variant = Variant(64, 192, False, 1, HALF, doubled=True)
    x, bias = torch.randn(2, 64, 5, 7), torch.randn(192)
    weight = torch.randn(192, 64, 3, 3) / 24
    packed = pack_doubled(fold_upsample(weight), variant)
    p, block = packed.view(2, 2, 2, 2, 2, 2, 96, 4, 8), variant.block
    place = torch.arange(4)[None, :] ^ (torch.arange(block)[:, None] // 2 % 4)
    p = p.gather(-2, place[:, :, None].expand(p.shape)).float()  # the swizzle undoes itself
    # tile block, py, chunk, ky, px, kx, row, 4, 8 -> py, px, O, C, ky, kx
    p = p.permute(1, 4, 0, 6, 2, 7, 8, 3, 5).reshape(2, 2, 192, 64, 2, 2)
    got, padded = torch.empty(2, 192, 10, 14), F.pad(x, (1, 1, 1, 1))
    for py in (0, 1):
        for px in (0, 1):
            seen = padded[..., py : py + 6, px : px + 8]
            got[..., py::2, px::2] = F.conv2d(seen, p[py, px], bias)
    expected = upsampled(x, weight, bias)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-3


def test_widths_that_have_a_kernel():
    (kernel,) = (k for k in kernels_of("norm_conv3d", ("cuda",)) if k.name == "wgmma")

    def fits(channels: int, out: int) -> bool:
        problem = NormConvProblem(channels, out, BF16)
        return kernel.requires.unmet(CARDS["H100"], problem) is None

    assert fits(96, 96) and fits(192, 384) and fits(32, 96)
    assert fits(256, 256) and not fits(16, 96) and not fits(96, 3) and not fits(96, 80)


def test_quads_are_tried_first_by_layers_that_make_four_frames_of_a_latent_frame():
    (kernel,) = (k for k in kernels_of("norm_conv3d", ("cuda",)) if k.name == "wgmma")
    problem, card = NormConvProblem(96, 96, BF16, 4), CARDS["H100"]
    assert kernel.candidates(problem, card) == ("winograd4", "winograd")
    assert kernel.candidates(NormConvProblem(96, 96, BF16, 2), card) == ("winograd",)
    only = NormConvProblem(96, 96, BF16, 4, only_frame=True)
    assert kernel.candidates(only, card) == ("direct1",)
    for config in ("winograd", "winograd4"):
        conv, norm = kernel.programs(problem, config, card)
        assert dict(conv.defines)["QUADS"] == (config != "winograd")
        assert conv.shared_bytes <= card.shared_bytes
        assert norm.entry == ("norm_pairs" if config == "winograd" else "norm_quads")


@pytest.mark.usefixtures("emulated", "poisoned_outputs")
@pytest.mark.parametrize(
    "name,config,axis",
    [("wgmma", "winograd4", None), ("mma", "winograd4_4x96", "height")],
)
def test_quads_have_to_prove_themselves(name, config, axis, monkeypatch):
    """By the proof of every first use: with the first quad's past and a whole one behind it."""
    (kernel,) = (k for k in kernels_of("norm_conv3d", ("cuda",)) if k.name == name)
    problem, card, cpu = NormConvProblem(32, 96, BF16, 4), CARDS["H100"], torch.device("cpu")
    assert config in kernel.candidates(problem, card)
    size = (5, 5, 7)
    verdict = prove_kernel(kernel, problem, config, card, cpu, axis, size)
    assert verdict.passed and verdict.error is not None and verdict.error < 3e-3
    # Weights of another order of the products: wrong, and refused.
    module = sys.modules[f"wan_vae.kernels.cuda.conv3x3_{name}"]
    monkeypatch.setattr(module, "quad_phases", lambda weight: quad_phases(weight).flip(0))
    verdict = prove_kernel(kernel, problem, config, card, cpu, axis, size)
    assert not verdict.passed and verdict.reason

    def fails(*_: object) -> None:
        raise BuildError("planted")

    monkeypatch.setattr(program_module, "_queue", fails)
    verdict = prove_kernel(kernel, problem, config, card, cpu, axis, size)
    assert not verdict.passed and "planted" in verdict.reason


def test_it_is_not_built_for_a_card_that_cannot_run_it():
    """Chosen as for a Hopper card, in a test, but run on another one."""
    (kernel,) = (k for k in kernels_of("norm_conv3d", ("cuda",)) if k.name == "wgmma")
    with pytest.raises(BuildError, match=r"for compute capability 9\.0, this card has 8\.9"):
        kernel.build(NormConvProblem(96, 96, BF16), "direct3", CARDS["L40S"])
    imitated = CARDS["L40S"].imitating((9, 0))
    with pytest.raises(BuildError, match=r"for compute capability 9\.0"):
        kernel.build(NormConvProblem(96, 96, BF16), "direct3", imitated)


def first_of_each_kind(variants: list[Variant]) -> list:
    """`make test` compiles one variant of each form and each kind of block."""
    seen, made = set(), []
    for v in variants:
        kind = (v.name, v.block, v.blocks)
        made.append(pytest.param(v, marks=pytest.mark.full if kind in seen else ()))
        seen.add(kind)
    return made


@pytest.mark.parametrize(
    "variant", first_of_each_kind(VARIANTS + QUADRUPLES[1:2] + DOUBLED), ids=label
)
def test_compiles_for_hopper(variant, tmp_path, monkeypatch):
    """With NVRTC and without a GPU; the second time from the folder, unless the file is damaged."""
    try:
        driver.nvrtc_version()
    except OSError as error:
        pytest.skip(f"no NVRTC here (pip install nvidia-cuda-nvrtc): {error}")
    source = 'extern "C" __global__ void nothing() {}'
    made = driver.compile_source(source, {}, "sm_90a", tmp_path)
    (file,) = tmp_path.glob("*.cubin")
    monkeypatch.setattr(driver, "_compile", lambda *_: b"compiled again")
    assert driver.compile_source(source, {}, "sm_90a", tmp_path) == made
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert driver.compile_source(source, {}, "sm_90a", tmp_path) == b"compiled again"
    monkeypatch.undo()
    monkeypatch.setenv("WAN_VAE_CACHE", str(tmp_path / "own"))
    assert build.__wrapped__(program(variant)).startswith(b"\x7fELF")
    with pytest.raises(BuildError, match="NVRTC: "):
        driver.compile_source("nonsense", {}, "sm_90a", None)
    assert "WAN_VAE_CACHE" in os.environ


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(
    "variant", VARIANTS + QUADRUPLES, ids=lambda f: f"{f.name}-{f.cin}x{f.cout}"
)
@pytest.mark.parametrize("padding", [(1, 1), (0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize(
    "size", [(1, 1, 5, 7), (1, 5, 35, 53), (2, 4, 18, 33), (1, 6, 131, 179)], ids=str
)
def test_on_the_gpu_fifty_times(variant, padding, size):
    """Poisoned outputs, with and without a residual; equal bits in every run."""
    case = Case(variant, size, padding, "cuda")
    for with_residual in (False, True):
        runs = [case.run(with_residual) for _ in range(50)]
        assert all(torch.equal(run, runs[0]) for run in runs)
        case.check(runs[0], with_residual)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("variant", QUADRUPLES, ids=lambda f: f"{f.name}-{f.cin}x{f.cout}")
def test_quads_have_the_same_bits_in_parts_on_the_gpu(variant):
    """Of the picture, and of the frames."""
    torch.manual_seed(0)
    x = features(1, 9, 37, 50, variant.cin, dtype=BF16, device="cuda")
    scale = norm_scale(torch.randn(variant.cin, device="cuda"))
    bias = torch.randn(variant.cout, device="cuda")
    packed = pack(torch.randn(variant.cout, variant.cin, 3, 3, 3, device="cuda") / 50, variant)
    operand, _ = NORM.quads(NormCall(x, scale, dtype=HALF))
    whole = conv3x3(operand, packed, bias, None, variant, 9, (1, 1))
    rows = operand[:, :, :, 8:25].contiguous(memory_format=torch.channels_last_3d)
    part = conv3x3(rows, packed, bias, None, variant, 9, (0, 1))
    assert torch.equal(part, whole[:, :, :, 9:24])
    last = operand[:, :, -6:].contiguous(memory_format=torch.channels_last_3d)
    part = conv3x3(last, packed, bias, None, variant, 4, (1, 1))
    assert torch.equal(part, whole[:, :, -4:])


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("variant", DOUBLED, ids=lambda f: f"{f.name}-{f.cin}x{f.cout}")
@pytest.mark.parametrize("padding", [(1, 1), (0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("size", [(1, 5, 7), (5, 35, 53), (4, 18, 33)], ids=str)
def test_upsampled_on_the_gpu_fifty_times(variant, padding, size):
    """Poisoned outputs; equal bits in every run, and in a part of the picture."""
    torch.manual_seed(0)
    n, h, w = size
    x = torch.randn(n, h, w, variant.cin, device="cuda").to(variant.out).permute(0, 3, 1, 2)
    weight = (
        torch.randn(variant.cout, variant.cin, 3, 3, device="cuda") / (9 * variant.cin) ** 0.5
    ).to(HALF)
    bias = torch.randn(variant.cout, device="cuda")
    packed = pack_doubled(fold_upsample(weight), variant)
    expected = upsampled(x, weight, bias, padding)
    runs = []
    for _ in range(50):
        poison = torch.full_like(expected, float("nan"), dtype=variant.out)
        del poison
        runs.append(upsample_conv3x3(x, packed, bias, variant, padding))
    assert all(torch.equal(run, runs[0]) for run in runs)
    error = ((runs[0].float() - expected).norm() / expected.norm()).item()
    assert error < (6e-3 if variant.out == BF16 else 1e-3)
    whole = upsample_conv3x3(x, packed, bias, variant)
    (top, left), (rows, columns) = (2 - 2 * p for p in padding), whole.shape[2:]
    assert torch.equal(runs[0], whole[..., top : rows - top, left : columns - left])


@pytest.mark.gpu
@hopper
def test_the_norm_matches_the_reference_on_the_gpu():
    x, gamma = features(1, 4, 9, 7, 96, dtype=BF16, device="cuda"), torch.randn(96, device="cuda")
    joined, _ = NORM.join(NormCall(x, norm_scale(gamma), dtype=HALF))
    expected = rms_norm_silu(x.float(), gamma)
    assert ((joined[:, :, 2:].float() - expected).norm() / expected.norm()).item() < 5e-4
