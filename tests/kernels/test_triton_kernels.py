"""The Triton kernels against float32 PyTorch: on the GPU, or on the CPU in Triton's interpreter.

Outputs are poisoned: deterministic mode fills every `torch.empty` with NaN, so an element that a
kernel does not write fails the comparison.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")

from tests.conftest import in_pairs
from wan_vae.kernels.kernel import NormCall, NormResult
from wan_vae.kernels.triton import attention as triton_attention
from wan_vae.kernels.triton import conv3d_pointer, conv3d_tma
from wan_vae.kernels.triton.configs import (
    AttentionConfig,
    ConvConfig,
    HeadConfig,
    StridedConfig,
)
from wan_vae.kernels.triton.conv3d import (
    ConvOperands,
    UpsampleOperands,
    conv3d,
    folded_upsample,
)
from wan_vae.kernels.triton.head import HeadOperands, head_conv, pack_head
from wan_vae.kernels.triton.norm import norm_silu_join, norm_silu_pairs
from wan_vae.kernels.weights import fold_upsample, norm_scale
from wan_vae.ops.eager.attention import attention
from wan_vae.ops.eager.norm import rms_norm, rms_norm_silu
from wan_vae.ops.opset import HaloRows

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned_outputs")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last_3d
# float16 against float32 on the same float16 inputs: one rounding of the result.
BOUND = 4e-4
NAMES = ["f4_p4x8_n32+16_k16_w4_s3", "f2_p8x8_n64+0_k32_w4_s2", "f1_p4x8_n32+16_k32_w4_s2"]
CONFIGS = [ConvConfig.parse(name) for name in NAMES]
# The ways to load; through pointers a program makes at most two frames.
LAUNCHES = {"tma": conv3d_tma.launch, "pointer": conv3d_pointer.launch}
KERNELS = [
    pytest.param(LAUNCHES[loads], config, id=f"{loads}-{config.name}")
    for loads in LAUNCHES
    for config in CONFIGS
    if config.F <= 2 or loads == "tma"
]


def rand(*shape, seed=0, dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def joined(x, scale, history=None, past=2, keep=False, **options) -> NormResult:
    return norm_silu_join(NormCall(x, scale, history, past, keep, **options))


def paired(x, scale, history=None, past=2, keep=False, **options) -> NormResult:
    return norm_silu_pairs(NormCall(x, scale, history, past, keep, **options))


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("with_history", [True, False])
@pytest.mark.parametrize("fmt", [torch.contiguous_format, LAST], ids=["ncdhw", "ndhwc"])
def test_norm_silu_behind_history(frames, with_history, fmt):
    x = rand(2, 24, frames, 5, 7).contiguous(memory_format=fmt)
    history = rand(2, 24, 2, 5, 7).contiguous(memory_format=fmt) if with_history else None
    gamma = 1 + 0.1 * rand(24, dtype=torch.float32)
    buffer, kept = joined(x, norm_scale(gamma), history, keep=True)
    past = torch.zeros_like(x[:, :, :1]).repeat(1, 1, 2, 1, 1) if history is None else history
    expected = torch.cat((past.float(), rms_norm_silu(x.float(), gamma)), 2)
    assert relative(buffer, expected) < BOUND
    assert torch.equal(kept, buffer[:, :, -2:])


@pytest.mark.parametrize("call", [joined, paired])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_history_in_its_old_place_is_the_same(call, frames):
    x = rand(2, 24, frames, 5, 7).contiguous(memory_format=LAST)
    scale = norm_scale(1 + 0.1 * rand(24, dtype=torch.float32))
    history = rand(2, 24, 2, 5, 7).contiguous(memory_format=LAST)
    operand, kept = call(x, scale, history.clone(), keep=True)
    again, over = call(x, scale, history, keep=True, overwrite=True)
    assert over.data_ptr() == history.data_ptr()
    assert torch.equal(operand, again) and torch.equal(kept, over)


@pytest.mark.parametrize(
    "call,axis,place,channels",
    in_pairs([joined, paired], ["height", "width"], ["first", "inner", "last"], [24, 96]),
)
def test_norm_with_a_shards_halo_gives_the_bits_of_the_whole_picture(call, axis, place, channels):
    """Its history too; at the picture's edge the halo is zero."""
    dim, size = (3, 11) if axis == "height" else (4, 7)
    start, stop = {"first": (0, 4), "inner": (2, 5), "last": (size - 3, size)}[place]
    x = rand(2, channels, 3, 11, 7).contiguous(memory_format=LAST)
    padded = F.pad(x, (0, 0, 1, 1) if axis == "height" else (1, 1))
    history = rand(2, channels, 2, 11, 7)
    history = F.pad(history, (0, 0, 1, 1) if axis == "height" else (1, 1))
    scale = norm_scale(1 + 0.1 * rand(channels, dtype=torch.float32))

    def edge(index: int) -> torch.Tensor | None:
        inside = 0 <= index < size
        return x.narrow(dim, index, 1).permute(0, 2, 3, 4, 1).contiguous() if inside else None

    halo = HaloRows(axis, edge(start - 1), edge(stop))
    own = x.narrow(dim, start, stop - start)
    past = history.narrow(dim, start, stop - start + 2)
    whole = call(padded, scale, history, keep=True)
    part = call(own, scale, past, keep=True, halo=halo)
    for got, expected in zip(part, whole, strict=True):
        assert torch.equal(got, expected.narrow(dim, start, stop - start + 2))


SMALL, LARGE = (1, 3, 5), (3, 5, 9)
# A size, whether only the last slice is used, whether there is more than weights.
CALLS = [(SMALL, False, True), (LARGE, True, True), (SMALL, True, False), (LARGE, False, False)]
OTHER_CALLS = [(size, last_slice, not extras) for size, last_slice, extras in CALLS]


def two_calls_for_each() -> list[Any]:
    """Every kernel with every call; `make test` takes two calls of each kernel, in turn."""
    made = []
    for place, kernel in enumerate(KERNELS):
        quick = CALLS[:2] if place % 2 else CALLS[2:]
        for call in (*CALLS, *OTHER_CALLS):
            name = f"{kernel.id}-{'-'.join(map(str, call))}"
            marks = () if call in quick else pytest.mark.full
            made.append(pytest.param(*kernel.values, *call, id=name, marks=marks))
    return made


@pytest.mark.parametrize("launch,config,size,last_slice,extras", two_calls_for_each())
def test_conv3d(launch, config, last_slice, extras, size):
    frames, height, width = size
    past = 0 if last_slice else 2
    x = rand(2, 32, frames + past, height, width).contiguous(memory_format=LAST)
    weight = (rand(48, 32, 3, 3, 3) / 30).contiguous(memory_format=LAST)
    bias = rand(48) if extras else None
    residual = rand(2, 48, frames, height, width).contiguous(memory_format=LAST) if extras else None
    operands = ConvOperands(x, weight, bias, residual, last_slice=last_slice)
    y = conv3d(operands, config, launch)
    used = weight[:, :, -1:] if last_slice else weight
    b = None if bias is None else bias.float()
    expected = F.conv3d(x.float(), used.float(), b, padding=(0, 1, 1))
    if residual is not None:
        expected = expected + residual
    assert relative(y, expected) < BOUND
    assert torch.equal(y, conv3d(operands, config, launch))


def test_both_ways_to_load_give_the_same_bits():
    """In the interpreter, which multiplies alike: they add in the same order."""
    if torch.cuda.is_available():
        pytest.skip("tensor cores of different generations round differently")
    x = rand(1, 32, 4, 5, 7).contiguous(memory_format=LAST)
    weight = (rand(48, 32, 3, 3, 3) / 30).contiguous(memory_format=LAST)
    results = [conv3d(ConvOperands(x, weight), CONFIGS[2], f) for f in LAUNCHES.values()]
    assert torch.equal(*results)


@pytest.mark.parametrize("launch,config", KERNELS[1:4:2])
def test_conv3d_bits_do_not_depend_on_chunk_or_place(launch, config):
    """The same pixel from another chunk length and from a crop of the picture: equal bits."""
    x = rand(1, 32, 7, 12, 19).contiguous(memory_format=LAST)
    weight = (rand(48, 32, 3, 3, 3) / 30).contiguous(memory_format=LAST)
    whole = conv3d(ConvOperands(x, weight), config, launch)
    crop = x[:, :, 1:4, 3:11, 2:17].contiguous(memory_format=LAST)
    part = conv3d(ConvOperands(crop, weight), config, launch)
    assert torch.equal(part[:, :, :, 1:-1, 1:-1], whole[:, :, 1:2, 4:10, 3:16])


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("padding", [(0, 1), (1, 0), (0, 0)])
def test_conv3d_with_halo_rows_gives_the_bits_of_the_whole_picture(launch, padding):
    """Halo rows (or columns) in the buffer instead of padding, as a shard has them."""
    x = rand(1, 32, 3, 8, 9).contiguous(memory_format=LAST)
    weight = (rand(48, 32, 3, 3, 3) / 30).contiguous(memory_format=LAST)
    residual = rand(1, 48, 1, 8, 9).contiguous(memory_format=LAST)
    whole = conv3d(ConvOperands(x, weight, None, residual), CONFIGS[2], launch)
    rows = slice(2, 6) if padding[0] == 0 else slice(None)
    columns = slice(1, 7) if padding[1] == 0 else slice(None)
    halo_rows = slice(1, 7) if padding[0] == 0 else slice(None)
    halo_columns = slice(0, 8) if padding[1] == 0 else slice(None)
    part = x[..., halo_rows, halo_columns].contiguous(memory_format=LAST)
    own = residual[..., rows, columns]
    y = conv3d(ConvOperands(part, weight, None, own, padding), CONFIGS[2], launch)
    assert torch.equal(y, whole[..., rows, columns])


@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("kernel", [(1, 1, 1), (3, 1, 1), (3, 3, 3)], ids=str)
def test_float32_operands_keep_float32(launch, kernel, precision):
    kt, kh, kw = kernel
    x = rand(1, 16, 1 + kt, 5, 6, dtype=torch.float32).contiguous(memory_format=LAST)
    weight = rand(32, 16, kt, kh, kw, dtype=torch.float32).contiguous(memory_format=LAST) / 8
    config = ConvConfig.parse("f2_p4x8_n16+0_k16_w4_s2")
    padding = (kh // 2, kw // 2)
    y = conv3d(ConvOperands(x, weight, padding=padding, precision=precision), config, launch)
    assert relative(y, F.conv3d(x.double(), weight.double(), padding=(0, *padding))) < 1e-5


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_results_in_bfloat16(launch):
    x = rand(1, 32, 3, 5, 7).contiguous(memory_format=LAST)
    weight = (rand(32, 32, 3, 3, 3) / 30).contiguous(memory_format=LAST)
    residual = rand(1, 32, 1, 5, 7, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    operands = ConvOperands(x, weight, None, residual, out_dtype=torch.bfloat16)
    y = conv3d(operands, CONFIGS[2], launch)
    expected = F.conv3d(x.float(), weight.float(), padding=(0, 1, 1)) + residual.float()
    # The interpreter cuts the last bits off, where a card rounds.
    assert y.dtype == torch.bfloat16 and relative(y, expected) < 6e-3


def test_norm_without_silu():
    x = rand(2, 24, 1, 5, 7).contiguous(memory_format=LAST)
    gamma = 1 + 0.1 * rand(24, dtype=torch.float32)
    y, kept = joined(x, norm_scale(gamma), past=0, silu=False)
    assert kept is None
    assert relative(y, rms_norm(x.float(), gamma)) < BOUND


@pytest.mark.parametrize("loads", LAUNCHES)
@pytest.mark.parametrize("channels,width,made", [(48, 16, 3), (64, 32, 2), (32, 32, 1)])
def test_attention_rows_do_not_depend_on_their_neighbours(channels, width, made, loads):
    config = AttentionConfig(16, 16, width, made, 4, 2)
    q, k, v = rand(2, 37, 3 * channels).split(channels, dim=2)
    y = triton_attention.attention(q, k, v, config, loads == "tma")
    expected = attention(q.float(), k.float(), v.float())
    assert relative(y, expected) < 2e-3
    part = triton_attention.attention(q[:, 5:30], k, v, config, loads == "tma")
    assert torch.equal(part, y[:, 5:30])


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("padding", [(1, 1), (0, 1), (1, 0), (0, 0)])
def test_folded_upsample(launch, padding):
    """With halo rows instead of padding: the bits of the whole picture."""
    x = rand(3, 32, 6, 7).contiguous(memory_format=torch.channels_last)
    weight, bias = rand(48, 32, 3, 3) / 17, rand(48)
    folded = fold_upsample(weight)
    whole = folded_upsample(UpsampleOperands(x, folded, bias), CONFIGS[1], launch)
    doubled = F.interpolate(x.float(), scale_factor=2.0, mode="nearest-exact")
    # Summed taps are rounded to float16 once more than the reference's.
    assert relative(whole, F.conv2d(doubled, weight.float(), bias.float(), padding=1)) < 2 * BOUND
    if padding != (1, 1):
        part = folded_upsample(UpsampleOperands(x, folded, bias, padding), CONFIGS[1], launch)
        top, left = (2 - 2 * p for p in padding)
        assert torch.equal(part, whole[:, :, top : 12 - top, left : 14 - left])


@pytest.mark.parametrize(
    "padding,channels_out,last_slice",
    in_pairs([(1, 1), (0, 1), (1, 0)], [3, 12], [False, True]),
)
def test_head(channels_out, last_slice, padding):
    x = rand(2, 32, 3, 9, 11).contiguous(memory_format=LAST)
    weight, bias = rand(channels_out, 32, 3, 3, 3) / 30, rand(channels_out)
    packed = pack_head(weight, x.dtype)
    operands = HeadOperands(x, packed, bias, channels_out, padding, last_slice)
    y = head_conv(operands, HeadConfig(128, 4))
    assert torch.equal(y, head_conv(operands, HeadConfig(64, 4))) or DEVICE == "cuda"
    used = weight[:, :, -1:] if last_slice else weight
    expected = F.conv3d(x.float(), used.float(), bias.float(), padding=(0, *padding))
    assert relative(y, expected) < 1e-5


@pytest.mark.parametrize("kind", [ConvConfig, AttentionConfig, StridedConfig, HeadConfig])
def test_configurations_are_what_their_names_say(kind):
    config = kind(*range(1, 1 + len(fields(kind))))
    assert kind.parse(config.name) == config
    for wrong in ("", "f2", config.name + "_x", config.name.replace("w", "v")):
        with pytest.raises(ValueError, match="is no configuration"):
            kind.parse(wrong)
