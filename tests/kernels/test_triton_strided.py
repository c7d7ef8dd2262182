"""The encoder's strided convolutions against float32 PyTorch: on the GPU or in the interpreter.

Outputs are poisoned, as in `test_triton_kernels`.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")

from wan_vae.kernels.device import CARDS
from wan_vae.kernels.triton.configs import StridedConfig, strided_candidates
from wan_vae.kernels.triton.strided import StridedOperands, strided_conv3d

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned_outputs")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last_3d
# As in `test_triton_kernels`.
BOUND = 4e-4
# Two column blocks and two products each; one block of a narrow layer.
CONFIGS = [StridedConfig(16, 32, 16, 32, 4, 2), StridedConfig(32, 32, 0, 16, 4, 2)]
PIXELS, FRAMES = (1, 2, 2), (2, 1, 1)


def rand(*shape, seed=0, dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def features(*shape, dtype=torch.float16):
    return rand(*shape, dtype=dtype).contiguous(memory_format=LAST)


def weights(o, c, *kernel, dtype=torch.float16):
    noise = (
        rand(o, c, *kernel, dtype=torch.float32) / (c * kernel[0] * kernel[1] * kernel[2]) ** 0.5
    )
    return noise.to(dtype).contiguous(memory_format=LAST)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# The smallest and the odd size without a bias, the others with one; `make test-all` takes all.
PLANES = [
    pytest.param(
        size, with_bias, marks=pytest.mark.full if with_bias == (size in ((2, 2), (7, 9))) else ()
    )
    for size in ((2, 2), (4, 18), (10, 6), (7, 9))
    for with_bias in (True, False)
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("size,with_bias", PLANES)
def test_every_second_pixel(config, with_bias, size):
    height, width = size
    x, weight = features(2, 64, 3, height, width), weights(96, 64, 1, 3, 3)
    bias = rand(96) if with_bias else None
    y = strided_conv3d(StridedOperands(x, weight, bias, PIXELS, (1, 1)), config)
    padded = F.pad(x.float(), (0, 1, 0, 1))
    b = None if bias is None else bias.float()
    assert relative(y, F.conv3d(padded, weight.float(), b, stride=PIXELS)) < BOUND
    again = strided_conv3d(StridedOperands(x, weight, bias, PIXELS, (1, 1)), config)
    assert torch.equal(y, again)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("frames", [3, 5, 9])
def test_every_second_frame(config, frames):
    x, weight, bias = features(2, 64, frames, 3, 7), weights(96, 64, 3, 1, 1), rand(96)
    y = strided_conv3d(StridedOperands(x, weight, bias, FRAMES), config)
    expected = F.conv3d(x.float(), weight.float(), bias.float(), stride=FRAMES)
    assert relative(y, expected) < BOUND
    if frames > 3:
        later = x[:, :, 2:].contiguous(memory_format=LAST)
        part = strided_conv3d(StridedOperands(later, weight, bias, FRAMES), config)
        assert torch.equal(part, y[:, :, 1:]), "the bits do not depend on the chunk"


@pytest.mark.parametrize("axis", ["height", "width"])
@pytest.mark.parametrize("last", [False, True], ids=["first shard", "last shard"])
def test_a_shard_gives_the_bits_of_the_whole_picture(axis, last):
    """It holds its neighbour's row (or column) in the buffer; zeros at the edge of the picture."""
    x, weight, bias = features(1, 64, 2, 12, 12), weights(96, 64, 1, 3, 3), rand(96)
    whole = strided_conv3d(StridedOperands(x, weight, bias, PIXELS, (1, 1)), CONFIGS[0])
    dim = -2 if axis == "height" else -1
    surrounded = F.pad(x, (0, 0, 0, 1) if axis == "height" else (0, 1))
    start, rows = (8, 4) if last else (0, 8)
    part = surrounded.narrow(dim, start, rows + 1).contiguous(memory_format=LAST)
    after = (0, 1) if axis == "height" else (1, 0)
    y = strided_conv3d(StridedOperands(part, weight, bias, PIXELS, after), CONFIGS[0])
    assert torch.equal(y, whole.narrow(dim, start // 2, rows // 2))


@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
def test_float32_operands_keep_float32(precision):
    x = features(1, 32, 3, 6, 10, dtype=torch.float32)
    for kernel, stride in (((1, 3, 3), PIXELS), ((3, 1, 1), FRAMES)):
        weight = weights(48, 32, *kernel, dtype=torch.float32)
        operands = StridedOperands(x, weight, None, stride, precision=precision)
        y = strided_conv3d(operands, CONFIGS[0])
        assert relative(y, F.conv3d(x.double(), weight.double(), stride=stride)) < 1e-5


@pytest.mark.parametrize("card", ["H100", "MI300X", "RX 7900 XTX", "RX 9070 XT"])
def test_widths_that_have_a_kernel(card):
    device = CARDS[card]
    for width in (96, 192, 384, 160, 320, 640, 16, 48):
        found = strided_candidates(width, width, device)
        for config in map(StridedConfig.parse, found):
            assert width % (config.N0 + config.N1) == 0 and width % config.BK == 0
        assert found
    assert strided_candidates(24, 32, device) == () and strided_candidates(32, 24, device) == ()
