"""Convolutions in CUDA C++ against float32 PyTorch: emulated on the CPU, or on a GPU."""

from __future__ import annotations

import pytest
import torch

from wan_vae.kernels.cuda.conv_layers import pointwise
from wan_vae.layout import LayoutCounter
from wan_vae.ops.eager.conv3d import conv3d

HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
# Half a unit in the last place, as in `proof.cases`, or what sums of float32 leave.
BOUNDS = {BF16: 2e-3, HALF: 3e-4, SINGLE: 2e-6}


def rand(*shape: int, seed: int = 0, dtype=SINGLE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("out", [HALF, BF16], ids=str)
def test_pointwise_layers_of_attention(emulated, out):
    x, bias = rand(3, 5, 7, 48, dtype=HALF).permute(0, 3, 1, 2)[:, :, None], rand(144, dtype=out)
    weight = rand(144, 48, 1, 1, seed=1) / 48**0.5
    layer = pointwise(weight, out, "sm_80")
    assert layer.operand_dtype == HALF
    y = emulated.in_every_order(lambda: layer.run(x, bias, LayoutCounter(), (0, 0), False))
    rounded = weight[:, :, None].half().float()
    expected = conv3d(x.float(), rounded, bias.float(), LayoutCounter())
    assert y.dtype == out and relative(y, expected) < BOUNDS[out]
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
