"""Which of PyTorch's kernels a first decode makes a process load.

PyTorch loads each of its CUDA kernels when an operation first needs it, in each new process: 6 to
40 ms each (H200), of which a warm decode knows nothing. What gets the weights ready and looks at
numbers uses the kernels that every decode needs anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import random_state
from wan_vae import WanVAE
from wan_vae.config import wan21
from wan_vae.device import numbers_of
from wan_vae.io.pixels import PixelSource
from wan_vae.io.tensors import Extremes
from wan_vae.kernels.bounds import float16_sums_bound, operand_bound, winograd_phases
from wan_vae.kernels.contenders import Contenders
from wan_vae.kernels.cuda import conv, conv3x3_mma, conv3x3_wgmma
from wan_vae.kernels.device import CARDS
from wan_vae.kernels.weights import fold_upsample, in_tiles
from wan_vae.kernels.winograd import pair_phases
from wan_vae.network.sites import layer_sites
from wan_vae.network.weights import suspects_of
from wan_vae.ops.problem import LayerWeights

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
# By kernel on CUDA: `stack` is that of `cat`, `sub` that of `add`, `constant_pad_nd` a fill and a
# copy. Of the first two lines a decode needs all.
NEEDED = {
    *("copy_", "_to_copy", "clone", "cat", "stack", "new_zeros", "constant_pad_nd"),
    *("add", "sub", "mul", "sum", "aminmax"),
    *("empty", "new_empty", "empty_like", "_unsafe_view", "lift_fresh"),  # no kernel
}


class Operations(TorchDispatchMode):
    """Notes which operations are run, but for views, which run no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = [result.alias_info for result in func._schema.returns]
        if not results or not all(info and not info.is_write for info in results):
            self.found.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def others(self) -> set[str]:
        """Those that a decode does not need anyway."""
        return self.found - NEEDED


def rand(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


# -- which kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["decoder", "encoder"])
@pytest.mark.parametrize("only_frame", [False, True], ids=["video", "image"])
def test_layers_get_ready_with_kernels_that_a_decode_needs_anyway(only_frame, part):
    """All that may run on Hopper, whatever is chosen, once for each problem. Each other operation,
    at its first use in a process, makes a user wait for 6 to 40 ms."""
    model = WanVAE.from_state_dict(random_state(wan21(dim=32)), "cpu", BF16).model
    card = CARDS["H100"]
    sites = list({s.problem.key(): s for s in layer_sites(model, part, only_frame)}.values())
    prepared = []
    with Operations() as used:
        asked = Contenders(sites, ("cuda",), card).all()
        for site, contenders in zip(sites, asked, strict=True):
            for contender in contenders:
                if not contender.reason:
                    kernel, config = contender.kernel, contender.config
                    prepared.append(kernel.prepare(site.weights, site.problem, config, card))
    assert len(prepared) > len(sites)
    assert {"wgmma", "gemm"} <= {layer.kernel for layer in prepared}
    assert used.others == set()
    assert {"aminmax", "sum", "copy_"} <= used.found  # it sees what is run


def test_bounds_for_sums_need_one_kernel_more():
    """A root of each row. Other cards than Hopper have kernels with such sums."""
    weight, gamma = rand(8, 48, 3, 3, 3), rand(48, 1, 1, 1)
    with Operations() as used:
        bound = float16_sums_bound(gamma, winograd_phases(weight), 2)
        numbers_of(bound.numbers)
    assert used.others == {"sqrt"}


def test_numbers_are_looked_at_with_kernels_that_a_decode_needs_anyway():
    state = {"a": rand(5, 7), "b": rand(3, dtype=BF16), "c": rand(2).double()}
    with Operations() as used:
        assert suspects_of(state) == ()
    assert used.others == set()
    pixels = [rand(1, 3, 2, 4, 4, dtype=dtype) for dtype in (FP32, FP32, BF16)]
    with Operations() as used:
        extremes = Extremes()
        for x in pixels:
            extremes.see(x)
        assert extremes.are_finite()
    assert used.others == set()


# What asks each number whether it is finite, and what keeps extremes one by one.
QUESTIONS = {"isfinite", "isinf", "isnan", "abs", "eq", "ne", "all", "any", "bitwise_and"}
QUESTIONS |= {"minimum", "maximum", "min", "max", "amin", "amax"}


@pytest.mark.parametrize("strips", [None, 2])
def test_a_decode_and_an_encode_ask_no_number_whether_it_is_finite(strips):
    vae = WanVAE.from_state_dict(random_state(wan21(dim=8)), "cpu", FP32)
    z = rand(1, 16, 2, 4, 4) / 4
    with Operations() as used:
        pixels = vae.decode(z, strips=strips)
        assert vae.encode(pixels, strips=strips) is not None
    assert "aminmax" in used.found and not used.found & QUESTIONS


# -- what they find --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16, HALF])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 95])
def test_what_is_not_finite_is_found_in_any_tensor_and_stays_found(dtype, bad, place):
    for damaged in range(3):
        seen = Extremes()
        for i in range(3):
            x = rand(1, 3, 2, 4, 4, dtype=dtype)
            if i == damaged:
                x.view(-1)[place] = bad
            seen.see(x)
        assert not seen.are_finite()


def test_large_numbers_are_finite():
    seen = Extremes()
    for x in (3e38, -3e38):
        seen.see(torch.full((1, 3, 2, 2, 2), x))
        assert seen.are_finite()
    assert seen.read() == pytest.approx((-3e38, 3e38))
    seen.see(torch.full((2,), torch.finfo(BF16).max, dtype=BF16))
    assert seen.are_finite() and seen.read()[1] == torch.finfo(BF16).max


def test_no_number_is_finite_and_changes_nothing():
    seen = Extremes()
    seen.see(torch.empty(1, 3, 0, 2, 2))
    assert seen.read() is None and seen.are_finite()
    seen.see(torch.tensor(2.0))
    seen.see(torch.empty(0))
    assert seen.read() == (2.0, 2.0)


@pytest.mark.parametrize("view", ["dense", "turned", "cut", "expanded"])
def test_extremes_of_any_strides(view):
    x = rand(2, 3, 4, 5, 6)
    y = {
        "dense": x,
        "turned": x.permute(0, 4, 1, 3, 2),
        "cut": x[:, 1:, :, ::2, 3:],
        "expanded": x[:, :1].expand(2, 3, 4, 5, 6),
    }[view]
    seen = Extremes()
    seen.see(y)
    assert seen.read() == (y.min().item(), y.max().item())


def test_what_lies_in_another_order_is_looked_at_as_it_lies():
    """`aminmax` makes a dense copy of anything else."""
    dense = []

    class Looked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "aminmax":
                dense.append(args[0].is_contiguous())
            return func(*args, **(kwargs or {}))

    x = rand(1, 3, 2, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    with Looked():
        Extremes().see(x)
        Extremes().see(x.permute(0, 3, 4, 1, 2))
    assert dense == [True, True]


def test_the_extremes_of_all_that_was_fetched():
    pixels = rand(1, 3, 6, 4, 4)
    pixels[0, 0, 1, 0, 0], pixels[0, 2, 4, 1, 1] = 9.0, -8.0
    source = PixelSource(pixels, torch.device("cpu"), FP32)
    for first in range(0, 6, 2):
        source.fetch(first, first + 2)
    assert source.extremes() == (-8.0, 9.0)


# -- the same bits ---------------------------------------------------------------------------------


def by_gather(p: torch.Tensor) -> torch.Tensor:
    """`conv3x3_wgmma._swizzled` by an index: word r ^ j of a row to place j."""
    row = torch.arange(p.shape[-3])
    place = torch.arange(4)[None, :] ^ (row[:, None] // 2 % 4)
    return p.contiguous().gather(-2, place[:, :, None].expand(p.shape)).flatten()


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize("rows", [8, 16, 24, 64, 96])
@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3)], ids=str)
def test_words_are_swizzled_as_by_an_index(lead, rows, dtype):
    p = rand(*lead, rows, 4, 8, dtype=dtype)
    turned = rand(8, rows, 4, *lead, dtype=dtype).movedim((1, 2, 0), (-3, -2, -1))
    for x in (p, turned):
        assert torch.equal(bits(conv3x3_wgmma._swizzled(x)), bits(by_gather(x)))


@dataclass(frozen=True)
class Order:
    """Which of a warp's channels is each column of its tiles, by an index."""

    tiles: int

    @property
    def channels(self) -> torch.Tensor:
        order: list[int] = []
        n = self.tiles
        for t in range(n):
            for q in range(4):
                if t < n // 4 * 4:
                    first = t // 4 * 32 + q * 8 + t % 4 * 2
                elif t < n // 2 * 2:
                    first = n // 4 * 32 + q * 4 + t % 2 * 2
                else:
                    first = n // 2 * 16 + q * 2
                order += [first, first + 1]
        return torch.tensor(order)

    def of(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.index_select(dim, self.channels).unflatten(dim, (self.tiles, 8))


@pytest.mark.parametrize("tiles", range(1, 13))
def test_channels_are_in_tiles_as_by_an_index(tiles):
    for shape, dim in (((tiles * 8,), 0), ((2, 3, tiles * 8, 5, 2), 2), ((3, tiles * 8, 4), 1)):
        x = rand(*shape, dtype=HALF)
        for y in (x, x.movedim(0, -1).contiguous().movedim(-1, 0)):
            got = in_tiles(y, dim)
            assert got.is_contiguous() and torch.equal(bits(got), bits(Order(tiles).of(x, dim)))


SPECIAL = [0.0, -0.0, 1e-45, 3e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, 65504.0, float("inf"), 1 / 3]


@pytest.mark.parametrize("dtype", [FP32, torch.float64, HALF, BF16])
def test_pairs_have_the_bits_of_a_quotient_and_a_sign(dtype):
    """Signs of zeros, numbers that are rounded when they are halved, and those that overflow."""
    a, b, c = torch.tensor(SPECIAL).to(dtype), rand(11).to(dtype), rand(12)[1:].to(dtype)
    for g0, g1, g2 in ((a, b, c), (b, c, a), (c, a, b), (a, a * 0, a * 0), (a, a, a.flip(0))):
        expected = (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g0, -g2
        for got, wanted in zip(pair_phases(g0, g1, g2), expected, strict=True):
            number = ~wanted.isnan()
            assert torch.equal(got.isnan(), wanted.isnan())
            assert torch.equal(bits(got[number]), bits(wanted[number]))


def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack by quotients, signs, gathers and indices."""

    def pairs(a, b, c):
        return (a + b + c) / 2, (a - b + c) / 2, a, -c

    def tiled(x: torch.Tensor, dim: int) -> torch.Tensor:
        return Order(x.shape[dim] // 8).of(x, dim).contiguous()

    for module in (conv, conv3x3_mma):
        monkeypatch.setattr(module, "in_tiles", tiled)
    for module in (conv3x3_mma, conv3x3_wgmma):
        monkeypatch.setattr(module, "pair_phases", pairs)
    monkeypatch.setattr(conv3x3_wgmma, "_swizzled", by_gather)


def packings() -> dict[str, Any]:
    """Weights of all kernels of the CUDA family, packed."""
    wide, made = rand(192, 64, 3, 3, 3) / 30, {}
    wgmma = conv3x3_wgmma.Variant(64, 192, True, 3, BF16)
    variants = [wgmma, replace(wgmma, quads=True), replace(wgmma, cout=128)]
    variants += [replace(wgmma, winograd=False, taps=taps) for taps in (1, 3)]
    for variant in variants:
        made[f"wgmma {variant}"] = conv3x3_wgmma.pack(wide[: variant.cout], variant)
    doubled = conv3x3_wgmma.Variant(64, 96, False, 1, BF16, doubled=True)
    folded = fold_upsample(rand(96, 64, 3, 3))
    made["doubled"] = conv3x3_wgmma.pack_doubled(folded, doubled)
    for form in ("direct1", "direct3", "winograd", "winograd4", "winograd2d"):
        for name in conv3x3_mma.configs(form, 96) + conv3x3_mma.configs(form, 24):
            _, tile, _ = conv3x3_mma.parse(name)
            for out in (BF16, FP32) if form.startswith("direct") else (BF16,):
                v = conv3x3_mma.Variant(64, 96, form, tile, HALF, out, "sm_80")
                made[f"mma {name} {out}"] = conv3x3_mma.pack(wide[:96], v)
    for block in conv.BLOCKS:
        for operand in (HALF, BF16):
            v = conv.Variant(64, 192, (3, 3, 3), (1, 1, 1), operand, BF16, block)
            made[f"conv {block} {operand}"] = conv.pack(wide, v)
    return made


def test_packed_weights_have_the_bits_of_packing_by_indices(monkeypatch):
    got = packings()
    as_before(monkeypatch)
    expected = packings()
    assert len(got) > 30
    differing = [name for name in got if not torch.equal(bits(got[name]), bits(expected[name]))]
    assert not differing


# -- bounds ----------------------------------------------------------------------------------------


def by_norms(weights: LayerWeights) -> float:
    """`operand_bound` by the kernels of a norm and of a maximum."""
    peak = weights.gamma.abs().max().float() * weights.weight.shape[1] ** 0.5
    if weights.projection is not None:
        reach = weights.weight.float().flatten(1).norm(dim=1).max()
        peak = torch.maximum(peak, peak * reach)
    return peak.item()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("scale", [1e-3, 0.05, 1.0])
@pytest.mark.parametrize("projection", [None, torch.ones(1)], ids=["norm", "attention"])
def test_bounds_are_no_less_than_by_norms(dtype, scale, projection):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        weight = scale * torch.randn(288, 96, 1, 1, generator=generator)
        gamma = torch.randn(96, 1, 1, generator=generator)
        weights = LayerWeights(weight.to(dtype), None, gamma.to(dtype), projection)
        bound = operand_bound(weights, 1.0)
        value, before = bound.value(*numbers_of(bound.numbers)), by_norms(weights)
        assert before * (1 - 1e-6) <= value <= before * (1 + 1e-5)


def sums_by_norms(gamma: torch.Tensor, phases: torch.Tensor, growth: float) -> float:
    """`float16_sums_bound`, for groups of 32 channels, by the kernels of norms and maxima."""
    c = phases.shape[2]
    gains = F.pad(gamma.float().flatten().abs(), (0, -c % 32)).view(-1, 32)
    rows = F.pad(phases.float(), (0, 0, 0, 0, 0, -c % 32)).unflatten(2, (-1, 32))
    lengths = rows.norm(dim=3).sum((-2, -1))
    return (lengths * gains.amax(1) * (growth * c**0.5)).max().item()


@pytest.mark.parametrize("channels", [32, 48, 96])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bounds_for_sums_are_those_by_norms(channels, sign):
    phases = winograd_phases(rand(8, channels, 3, 3, 3))
    gamma = sign * rand(channels, 1, 1, 1).abs()
    bound = float16_sums_bound(gamma, phases, 2)
    expected = sums_by_norms(gamma, phases, 2)
    assert bound.value(*numbers_of(bound.numbers)) == pytest.approx(expected, rel=1e-6)
