"""Who runs what: for each card that people have, each request and each operation, the kernel that
is tried first, or why there is none. Needs no card: kernels are chosen by capability."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")

from wan_vae.config import wan21, wan22
from wan_vae.kernels import registry
from wan_vae.kernels.device import CARDS, Device, amd
from wan_vae.network.model import WanVAEModel
from wan_vae.network.sites import layer_sites
from wan_vae.ops.problem import (
    AttentionProblem,
    ConvProblem,
    HeadProblem,
    NormConvProblem,
    Operation,
    Problem,
    StridedProblem,
    UpsampleProblem,
)
from wan_vae.options import Backend

BF16 = torch.bfloat16
# A layer of Wan 2.1 for each operation.
PROBLEMS: dict[Operation, Problem] = {
    "conv3d": ConvProblem("features", 384, 768, (3, 1, 1), BF16, BF16, frames=2),
    "norm_conv3d": NormConvProblem(192, 192, BF16, frames=4),
    "head": HeadProblem(96, 3, BF16, frames=4),
    "upsample_conv2d": UpsampleProblem(384, 192, BF16, frames=2),
    "strided_conv": StridedProblem(192, 192, (1, 3, 3), BF16),
    "attention": AttentionProblem(384, BF16),
}
EAGER = dict.fromkeys(PROBLEMS, "eager")
POINTERS = EAGER | {
    "conv3d": "triton pointer",
    "norm_conv3d": "triton pointer",
    "head": "triton narrow",
    "upsample_conv2d": "triton pointer",
    "strided_conv": "triton pointer",
    "attention": "triton pointer",
}
TMA = POINTERS | {
    "conv3d": "triton tma",
    "norm_conv3d": "triton tma",
    "upsample_conv2d": "triton tma",
    "attention": "triton tma",
}
MMA = {
    "conv3d": "cuda gemm",
    "norm_conv3d": "cuda mma",
    "head": "cuda mma",
    "upsample_conv2d": "cuda mma",
    "strided_conv": "cuda gemm",
    "attention": "cuda mma",
}
HOPPER = MMA | {"norm_conv3d": "cuda wgmma", "upsample_conv2d": "cuda wgmma"}
# By card: auto, triton, cuda. The first family of a request is refused, with a reason, where it has
# no kernel at all.
EXPECTED = {
    "RTX 2060": (EAGER, "needs compute capability 8.0, this card has 7.5", "bfloat16"),
    "RTX 3060": (MMA, POINTERS, MMA),
    "RTX 3090": (MMA, POINTERS, MMA),
    "A100": (MMA, POINTERS, MMA),
    "RTX 4060": (MMA, POINTERS, MMA),
    "RTX 4090": (MMA, POINTERS, MMA),
    "L40S": (MMA, POINTERS, MMA),
    "RTX 5060 Ti": (MMA, TMA, MMA),
    "RTX 5090": (MMA, TMA, MMA),
    "H100": (HOPPER, TMA, HOPPER),
    "H200": (HOPPER, TMA, HOPPER),
    "B200": (MMA, TMA, MMA),
    "RX 7900 XTX": (POINTERS, POINTERS, "NVIDIA cards"),
    "RX 9070 XT": (POINTERS, POINTERS, "NVIDIA cards"),
    "MI300X": (POINTERS, POINTERS, "NVIDIA cards"),
    "Apple M3": (EAGER, "cards, this device is mps", "NVIDIA cards"),
    "Intel Arc": (EAGER, "cards, this device is xpu", "NVIDIA cards"),
    "CPU": (EAGER, "no GPU", "no GPU"),
}
REQUESTS: tuple[Backend, ...] = ("auto", "triton", "cuda")


@pytest.fixture(autouse=True)
def a_driver(monkeypatch):
    """This machine need not be able to load a kernel."""
    monkeypatch.setattr("wan_vae.kernels.cuda.driver._nvrtc", lambda: None)
    monkeypatch.setattr("wan_vae.kernels.cuda.driver._driver", lambda: None)


def first_kernels(request: Backend, card: Device) -> dict[str, str]:
    """For each operation the kernel that is tried first, and its reasons otherwise."""
    chosen = {}
    for operation, problem in PROBLEMS.items():
        kernels = registry.kernels_of(operation, registry.families_of(request, card))
        chosen[operation] = next(
            (f"{k.family} {k.name}" for k in kernels if fits(k, problem, card)), "eager"
        )
    return chosen


def fits(kernel: Any, problem: Problem, card: Device) -> bool:
    return kernel.requires.unmet(card, problem) is None and bool(kernel.candidates(problem, card))


def test_there_is_a_problem_for_each_operation():
    assert tuple(PROBLEMS) == get_args(Operation)
    assert [p.operation for p in PROBLEMS.values()] == list(PROBLEMS)
    assert EXPECTED.keys() == CARDS.keys()


@pytest.mark.parametrize("name", CARDS)
def test_who_runs_what(name):
    card = CARDS[name]
    for request, expected in zip(REQUESTS, EXPECTED[name], strict=True):
        if isinstance(expected, str):
            (family, *_) = registry.families_of(request, card)
            reason = registry.unavailable_reason(family, card, BF16)
            print(f"{name}, {request}: refused, {reason}")
            assert reason is not None and expected in reason
            continue
        found = first_kernels(request, card)
        print(f"{name}, {request}: {', '.join(f'{op}: {k}' for op, k in found.items())}")
        assert found == expected
    if EXPECTED[name][0] is EAGER and card.capability is None:
        reason = registry.auto_reason(card)
        print(f"{name}, auto: {reason}")
        assert reason is not None
    else:
        assert registry.auto_reason(card) is None


@pytest.mark.parametrize("name", CARDS)
def test_every_kernel_that_is_not_taken_has_a_reason(name):
    card = CARDS[name]
    for operation, problem in PROBLEMS.items():
        for kernel in registry.kernels_of(operation, registry.FAMILIES):
            reason = kernel.requires.unmet(card, problem)
            print(f"{name}: {operation} {kernel.family} {kernel.name}: {reason or 'met'}")
            if reason is not None:
                assert "\n" not in reason and len(reason) < 120
            else:
                assert kernel.candidates(problem, card)


@pytest.mark.parametrize("name", ["RX 7900 XTX", "RX 9070 XT", "MI300X"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("config", [wan21(), wan22(), wan21(dim=32)], ids=lambda c: f"{c.dim}")
def test_every_layer_has_a_kernel_on_amd(name, dtype, config):
    """Of a decode and an encode, of videos and of images (Qwen's VAE is that of Wan 2.1): no
    convolution is left to a library that would search."""
    with torch.device("meta"):
        model = WanVAEModel(config).to(dtype)
    families = registry.families_of("auto", CARDS[name])
    for only_frame in (False, True):
        for part in ("decoder", "encoder"):
            for site in layer_sites(model, part, only_frame):
                kernels = registry.kernels_of(site.problem.operation, families)
                assert any(fits(k, site.problem, CARDS[name]) for k in kernels), site.name
            own = model.decoder if part == "decoder" else model.encoder
            convolutions = [m for m in own.modules() if hasattr(m, "weight") and m.weight.ndim > 3]
            sites = layer_sites(model, part)
            named = {id(w) for site in sites for w in vars(site.weights).values()}
            assert all(id(conv.weight) in named for conv in convolutions)


def test_amd_cards_without_matrix_units_run_eager():
    """RDNA 2 and Vega; other kinds of their generations run what is compiled for one of them."""
    for architecture in ("gfx1030", "gfx906", "gfx1250"):
        card = amd("a card", architecture, 40)
        assert registry.families_of("auto", card) == ()
        assert registry.unavailable_reason("triton", card, BF16) == (
            f"needs MFMA (CDNA) or WMMA (RDNA 3 or later), this device is {architecture}"
        )
    for architecture in ("gfx1101", "gfx1151", "gfx1200"):
        card = amd("a card", architecture, 40)
        assert registry.families_of("auto", card) == ("triton", "kitchen")
    older = amd("MI250", "gfx90a", 110)
    assert registry.families_of("auto", older) == ()
    assert registry.unavailable_reason("triton", older, BF16) is None


def test_turing_runs_all_in_float16():
    """Its tensor cores read no bfloat16. Its 64 KiB of shared memory leave out some tiles."""
    card = CARDS["RTX 2060"]
    assert registry.unavailable_reason("cuda", card, torch.float16) is None
    reason = registry.unavailable_reason("cuda", card, BF16)
    assert reason == "bfloat16 was asked for, of which tensor cores need 8.0, this card has 7.5"
    problems = {
        "conv3d": ConvProblem("features", 384, 768, (3, 1, 1), torch.float16, torch.float16, 2),
        "norm_conv3d": NormConvProblem(192, 192, torch.float16, frames=4),
        "head": HeadProblem(96, 3, torch.float16, frames=4),
        "upsample_conv2d": UpsampleProblem(384, 192, torch.float16, frames=2),
        "strided_conv": StridedProblem(192, 192, (1, 3, 3), torch.float16),
        "attention": AttentionProblem(384, torch.float16),
    }
    for operation, problem in problems.items():
        kernels = registry.kernels_of(operation, ("cuda",))
        assert [k.name for k in kernels if fits(k, problem, card)], operation
    (mma,) = (k for k in registry.kernels_of("norm_conv3d", ("cuda",)) if k.name == "mma")
    tried = {
        name: mma.candidates(problems["norm_conv3d"], CARDS[name])
        for name in ("RTX 2060", "RTX 4090", "A100")
    }
    assert "winograd_8x96" in tried["RTX 2060"]
    assert not any("12x96" in config for config in tried["RTX 2060"])
    assert "winograd_12x96_halfsums" in tried["RTX 4090"]
    assert not any("halfsums" in config for config in tried["A100"])


def test_shared_memory_is_that_of_the_cards():
    assert CARDS["RTX 3060"].shared_bytes == CARDS["RTX 5090"].shared_bytes == 99 * 1024
    assert CARDS["H100"].shared_bytes == 227 * 1024
    assert CARDS["A100"].shared_bytes == 163 * 1024


@pytest.mark.gpu
def test_the_card_of_this_machine_is_read():
    properties = torch.cuda.get_device_properties(0)
    card = Device.of(torch.device("cuda", 0))
    assert card.capability == (properties.major, properties.minor)
    assert card.multiprocessors == properties.multi_processor_count
    optin = getattr(properties, "shared_memory_per_block_optin", card.shared_bytes)
    assert card.shared_bytes == optin
