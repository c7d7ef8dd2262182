"""The Triton kernels against float32 PyTorch: on the GPU, or on the CPU in Triton's interpreter.

Outputs are poisoned: deterministic mode fills every `torch.empty` with NaN, so an element that a
kernel does not write fails the comparison.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")

from wan_vae.kernels.triton import attention as triton_attention
from wan_vae.kernels.triton import conv3d as triton_conv3d
from wan_vae.kernels.triton import head as triton_head
from wan_vae.kernels.triton import norm as triton_norm
from wan_vae.ops.eager.attention import attention
from wan_vae.ops.eager.norm import rms_norm, rms_norm_silu
from wan_vae.ops.opset import HaloRows

pytestmark = pytest.mark.usefixtures("interpreted", "poisoned_outputs")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last_3d
# float16 against float32 on the same float16 inputs: one rounding of the result.
BOUND = 4e-4
CONFIGS = [
    triton_conv3d.Config(4, 4, 8, 32, 16, 16, 4, 3),
    triton_conv3d.Config(2, 8, 8, 64, 0, 32, 4, 2),
    triton_conv3d.Config(1, 4, 8, 32, 16, 32, 4, 2),
]


def rand(*shape, seed=0, dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("with_history", [True, False])
@pytest.mark.parametrize("fmt", [torch.contiguous_format, LAST], ids=["ncdhw", "ndhwc"])
def test_norm_silu_behind_history(frames, with_history, fmt):
    x = rand(2, 24, frames, 5, 7).contiguous(memory_format=fmt)
    history = rand(2, 24, 2, 5, 7).contiguous(memory_format=fmt) if with_history else None
    gamma = 1 + 0.1 * rand(24, dtype=torch.float32)
    buffer, kept = triton_norm.norm_silu_join(
        x, triton_norm.norm_scale(gamma), history, 2, keep=True
    )
    past = torch.zeros_like(x[:, :, :1]).repeat(1, 1, 2, 1, 1) if history is None else history
    expected = torch.cat((past.float(), rms_norm_silu(x.float(), gamma)), 2)
    assert relative(buffer, expected) < BOUND
    assert torch.equal(kept, buffer[:, :, -2:])


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_history_in_its_old_place_is_the_same(frames):
    x = rand(2, 24, frames, 5, 7).contiguous(memory_format=LAST)
    scale = triton_norm.norm_scale(1 + 0.1 * rand(24, dtype=torch.float32))
    for call in (
        lambda history, **options: triton_norm.norm_silu_join(
            x, scale, history, 2, True, torch.float16, **options
        ),
        lambda history, **options: triton_norm.norm_silu_pairs(
            x, scale, history, True, torch.float16, **options
        ),
    ):
        history = rand(2, 24, 2, 5, 7).contiguous(memory_format=LAST)
        operand, kept = call(history.clone())
        again, over = call(history, overwrite=True)
        assert over.data_ptr() == history.data_ptr()
        assert torch.equal(operand, again) and torch.equal(kept, over)


@pytest.mark.parametrize("axis", ["height", "width"])
@pytest.mark.parametrize("place", ["first", "inner", "last"])
@pytest.mark.parametrize("channels", [24, 96])
def test_norm_with_a_shards_halo_gives_the_bits_of_the_whole_picture(axis, place, channels):
    """Of both forms, their history too; at the picture's edge the halo is zero."""
    dim, size = (3, 11) if axis == "height" else (4, 7)
    start, stop = {"first": (0, 4), "inner": (2, 5), "last": (size - 3, size)}[place]
    x = rand(2, channels, 3, 11, 7).contiguous(memory_format=LAST)
    padded = F.pad(x, (0, 0, 1, 1) if axis == "height" else (1, 1))
    history = rand(2, channels, 2, 11, 7)
    history = F.pad(history, (0, 0, 1, 1) if axis == "height" else (1, 1))
    scale = triton_norm.norm_scale(1 + 0.1 * rand(channels, dtype=torch.float32))

    def edge(index: int) -> torch.Tensor | None:
        inside = 0 <= index < size
        return x.narrow(dim, index, 1).permute(0, 2, 3, 4, 1).contiguous() if inside else None

    halo = HaloRows(axis, edge(start - 1), edge(stop))
    own = x.narrow(dim, start, stop - start)
    past = history.narrow(dim, start, stop - start + 2)
    for call in (
        lambda x, history, **halo: triton_norm.norm_silu_join(
            x, scale, history, 2, True, torch.float16, **halo
        ),
        lambda x, history, **halo: triton_norm.norm_silu_pairs(
            x, scale, history, True, torch.float16, **halo
        ),
    ):
        whole = call(padded, history)
        part = call(own, past, halo=halo)
        for found, expected in zip(part, whole, strict=True):
            assert torch.equal(found, expected.narrow(dim, start, stop - start + 2))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize("last_slice", [False, True])
@pytest.mark.parametrize("extras", [True, False], ids=["bias+residual", "bare"])
@pytest.mark.parametrize("frames,height,width", [(1, 3, 5), (5, 9, 11)])
def test_conv3d(config, last_slice, extras, frames, height, width):
    past = 0 if last_slice else 2
    x = rand(2, 32, frames + past, height, width).contiguous(memory_format=LAST)
    weight = (rand(48, 32, 3, 3, 3) / 30).contiguous(memory_format=LAST)
    bias = rand(48) if extras else None
    residual = rand(2, 48, frames, height, width).contiguous(memory_format=LAST) if extras else None
    y = triton_conv3d.conv3d(x, weight, bias, residual, config, last_slice=last_slice)
    used = weight[:, :, -1:] if last_slice else weight
    b = None if bias is None else bias.float()
    expected = F.conv3d(x.float(), used.float(), b, padding=(0, 1, 1))
    if residual is not None:
        expected = expected + residual
    assert relative(y, expected) < BOUND
    again = triton_conv3d.conv3d(x, weight, bias, residual, config, last_slice=last_slice)
    assert torch.equal(y, again)


def test_conv3d_bits_do_not_depend_on_chunk_or_place():
    """The same pixel from another chunk length and from a crop of the picture: equal bits."""
    config = CONFIGS[0]
    x = rand(1, 32, 7, 12, 19).contiguous(memory_format=LAST)
    weight = (rand(48, 32, 3, 3, 3) / 30).contiguous(memory_format=LAST)
    whole = triton_conv3d.conv3d(x, weight, None, None, config)
    crop = x[:, :, 1:4, 3:11, 2:17].contiguous(memory_format=LAST)
    part = triton_conv3d.conv3d(crop, weight, None, None, config)
    assert torch.equal(part[:, :, :, 1:-1, 1:-1], whole[:, :, 1:2, 4:10, 3:16])


@pytest.mark.parametrize("padding", [(0, 1), (1, 0), (0, 0)])
def test_conv3d_with_halo_rows_gives_the_bits_of_the_whole_picture(padding):
    """Halo rows (or columns) in the buffer instead of padding, as a shard has them."""
    x = rand(1, 32, 3, 8, 9).contiguous(memory_format=LAST)
    weight = (rand(48, 32, 3, 3, 3) / 30).contiguous(memory_format=LAST)
    residual = rand(1, 48, 1, 8, 9).contiguous(memory_format=LAST)
    whole = triton_conv3d.conv3d(x, weight, None, residual, CONFIGS[2])
    rows = slice(2, 6) if padding[0] == 0 else slice(None)
    columns = slice(1, 7) if padding[1] == 0 else slice(None)
    halo_rows = slice(1, 7) if padding[0] == 0 else slice(None)
    halo_columns = slice(0, 8) if padding[1] == 0 else slice(None)
    part = x[..., halo_rows, halo_columns].contiguous(memory_format=LAST)
    own = residual[..., rows, columns]
    y = triton_conv3d.conv3d(part, weight, None, own, CONFIGS[2], padding=padding)
    assert torch.equal(y, whole[..., rows, columns])


@pytest.mark.parametrize("kernel", [(1, 1, 1), (3, 1, 1), (3, 3, 3)], ids=str)
def test_float32_operands_keep_float32(kernel):
    kt, kh, kw = kernel
    x = rand(1, 16, 1 + kt, 5, 6, dtype=torch.float32).contiguous(memory_format=LAST)
    weight = rand(32, 16, kt, kh, kw, dtype=torch.float32).contiguous(memory_format=LAST) / 8
    config = triton_conv3d.Config(2, 4, 8, 16, 0, 16, 4, 2)
    padding = (kh // 2, kw // 2)
    y = triton_conv3d.conv3d(x, weight, None, None, config, padding=padding)
    assert relative(y, F.conv3d(x.double(), weight.double(), padding=(0, *padding))) < 1e-5


def test_norm_without_silu():
    x = rand(2, 24, 1, 5, 7).contiguous(memory_format=LAST)
    gamma = 1 + 0.1 * rand(24, dtype=torch.float32)
    y, kept = triton_norm.norm_silu_join(
        x, triton_norm.norm_scale(gamma), None, 0, keep=False, silu=False
    )
    assert kept is None
    assert relative(y, rms_norm(x.float(), gamma)) < BOUND


@pytest.mark.parametrize("channels,width,made", [(48, 16, 3), (64, 32, 2), (32, 32, 1)])
def test_attention_rows_do_not_depend_on_their_neighbours(channels, width, made):
    config = triton_attention.AttentionConfig(16, 16, width, made, 4, 2)
    q, k, v = rand(2, 37, 3 * channels).split(channels, dim=2)
    y = triton_attention.attention(q, k, v, config)
    expected = attention(q.float(), k.float(), v.float())
    assert relative(y, expected) < 2e-3
    part = triton_attention.attention(q[:, 5:30], k, v, config)
    assert torch.equal(part, y[:, 5:30])


def test_folded_upsample():
    x = rand(3, 32, 5, 7).contiguous(memory_format=torch.channels_last)
    weight, bias = rand(48, 32, 3, 3) / 17, rand(48)
    folded = triton_conv3d.fold_upsample(weight)
    y = triton_conv3d.folded_upsample(x, folded, bias, CONFIGS[0])
    doubled = F.interpolate(x.float(), scale_factor=2.0, mode="nearest-exact")
    # Summed taps are rounded to float16 once more than the reference's.
    assert relative(y, F.conv2d(doubled, weight.float(), bias.float(), padding=1)) < 2 * BOUND


@pytest.mark.parametrize("padding", [(0, 1), (1, 0), (0, 0)])
def test_folded_upsample_with_halo_rows_gives_the_bits_of_the_whole_picture(padding):
    x = rand(3, 32, 6, 7).contiguous(memory_format=torch.channels_last)
    weight, bias = rand(48, 32, 3, 3) / 17, rand(48)
    folded = triton_conv3d.fold_upsample(weight)
    whole = triton_conv3d.folded_upsample(x, folded, bias, CONFIGS[0])
    part = triton_conv3d.folded_upsample(x, folded, bias, CONFIGS[0], padding)
    top, left = (2 - 2 * p for p in padding)
    assert torch.equal(part, whole[:, :, top : 12 - top, left : 14 - left])


@pytest.mark.parametrize("channels_out", [3, 12])
@pytest.mark.parametrize("last_slice", [False, True])
@pytest.mark.parametrize("padding", [(1, 1), (0, 1), (1, 0)])
def test_head(channels_out, last_slice, padding):
    x = rand(2, 32, 5, 9, 11).contiguous(memory_format=LAST)
    weight, bias = rand(channels_out, 32, 3, 3, 3) / 30, rand(channels_out)
    y = triton_head.head_conv(x, weight, bias, padding=padding, last_slice=last_slice)
    used = weight[:, :, -1:] if last_slice else weight
    expected = F.conv3d(x.float(), used.float(), bias.float(), padding=(0, *padding))
    assert relative(y, expected) < 1e-5
