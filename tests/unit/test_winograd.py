"""The matrices of Winograd F(4,3) along time."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import winograd_error
from wan_vae.kernels.winograd import DIRECT, PAIRS, POINTS, QUADS, Points, quad_phases


@pytest.mark.parametrize("points", winograd_error.TRIED, ids=lambda p: f"{p.p:.3g}-{p.q:.3g}")
def test_the_matrices_make_a_convolution(points):
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(6, 50, generator=generator, dtype=torch.float64)
    taps = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    made = points.out @ ((points.weights @ taps) * (points.into @ frames))
    expected = torch.stack([(frames[t : t + 3] * taps).sum(0) for t in range(4)])
    assert (made - expected).abs().max() < 1e-13


def test_the_constants_are_exact_in_float32_and_the_operand_stays_in_range():
    for exact in (POINTS.into, POINTS.out):
        assert torch.equal(exact.float().double(), exact)
    # The kernels refuse operands above a quarter of float16's range.
    assert float(POINTS.growth.max()) <= 4
    assert float(Points(POINTS.p, POINTS.q).growth.max()) > 4  # the scales are needed


def test_phases_of_a_weight():
    weight = torch.randn(2, 3, 3, 3, 3)
    phases = quad_phases(weight)
    assert phases.shape == (6, 2, 3, 3, 3) and phases.dtype == torch.float64
    taps = weight[1, 2, :, 0, 1].double()
    assert torch.allclose(phases[:, 1, 2, 0, 1], POINTS.weights @ taps, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_phases_start_no_library_of_products_and_round_as_one(dtype):
    """On a card, the first matrix product of a process loads and starts cuBLAS."""
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    weight = torch.randn(48, 32, 3, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    with Seen():
        phases = quad_phases(weight)
    assert "mul" in seen and not {"bmm", "mm", "addmm", "baddbmm"} & set(seen)
    product = torch.einsum("pt,octhw->pochw", POINTS.weights, weight.double())
    assert torch.equal(phases.half(), product.half())


@pytest.mark.parametrize("frames,groups", [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_quads_of_a_call(frames, groups):
    assert QUADS.groups(frames) == groups and QUADS.operand_frames(frames, 2) == 6 * groups
    assert DIRECT.groups(frames) == frames and DIRECT.operand_frames(frames, 2) == frames + 2
    assert PAIRS.operand_frames(frames, 2) == (frames + 1) // 2 * 4


def test_the_error_stays_under_the_rounding_of_bfloat16(capsys):
    """The command itself, on random frames and on the miniature's layers."""
    assert winograd_error.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    errors = {
        cells[0]: [float(cell) for cell in cells[1:]]
        for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines[4:])
    }
    chosen, rounding = errors["F(4,3), 0, 0.6875, 1.375, scaled"], errors["result in bfloat16"]
    assert all(ours < other / 2 for ours, other in zip(chosen[:4], rounding[:4], strict=True))
    others = [row[0] for name, row in errors.items() if name.startswith("F(4,3)")]
    assert chosen[0] == min(others)
    assert "layers: 12" in lines[0]
