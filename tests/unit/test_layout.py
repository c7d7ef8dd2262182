"""layout.py: detection, decision, conversion, the counter, and the bug that all this is for."""

from __future__ import annotations

import pytest
import torch

from wan_vae import layout
from wan_vae.errors import LayoutError
from wan_vae.layout import LayoutCounter

NDHWC = torch.channels_last_3d


def test_detects_plain_formats():
    x = torch.randn(2, 3, 4, 5, 6)
    assert layout.detect(x) == "contiguous"
    assert layout.detect(x.contiguous(memory_format=NDHWC)) == "channels_last_3d"
    assert layout.detect(x.transpose(2, 3)) == "other"
    assert layout.detect(x[:, :, 1:]) == "other"
    assert layout.detect(torch.randn(2, 3, 1, 5, 6).expand(2, 3, 4, 5, 6)) == "other"


@pytest.mark.parametrize("shape", [(8, 16, 1, 1, 1), (4, 1, 3, 3, 3), (1, 1, 1, 1, 1)])
def test_one_channel_or_one_pixel_says_nothing(shape):
    assert layout.detect(torch.randn(shape)) == "either"


def test_sees_through_strides_of_size_one_dimensions():
    """T = 1: the stride of that dimension is never used, so it must not decide anything."""
    x = torch.randn(1, 8, 1, 5, 6).contiguous(memory_format=NDHWC)
    stray = x.as_strided(x.shape, (x.stride(0), x.stride(1), 7, x.stride(3), x.stride(4)))
    assert layout.detect(stray) == "channels_last_3d"
    assert layout.to_format(stray, "channels_last_3d").stride() == x.stride()
    dense = torch.randn(1, 8, 1, 5, 6)
    stray = dense.as_strided(dense.shape, (7, 30, 99, 6, 1))
    assert layout.detect(stray) == "contiguous"
    assert torch.equal(layout.to_format(stray, "contiguous"), dense)


def test_a_temporal_slice_of_a_channels_last_weight_is_checked_anew():
    weight = torch.randn(4, 4, 3, 3, 3).contiguous(memory_format=NDHWC)
    last = weight[:, :, -1:]
    assert layout.detect(last) == "other"
    assert layout.detect(layout.to_format(last, "channels_last_3d")) == "channels_last_3d"


@pytest.mark.parametrize("fmt", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 3, 4, 5, 6),
        lambda: torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=NDHWC),
        lambda: torch.randn(6, 5, 4, 3, 2).permute(4, 3, 2, 1, 0),
        lambda: torch.randn(2, 1, 1, 1, 6).expand(2, 3, 4, 5, 6),
        lambda: torch.randn(2, 3, 5, 6),
    ],
)
def test_to_format_keeps_values_and_gives_canonical_strides(fmt, make):
    x = make()
    y = layout.to_format(x, fmt)
    assert torch.equal(x, y)
    expected = torch.empty(x.shape)
    if fmt == "channels_last_3d":
        expected = expected.contiguous(memory_format=torch.channels_last if x.ndim == 4 else NDHWC)
    assert y.stride() == expected.stride()
    assert layout.to_format(y, fmt) is y


def test_match_input_converts_once_and_counts():
    counter = LayoutCounter()
    weight = torch.randn(4, 4, 3, 3, 3).contiguous(memory_format=NDHWC)
    x = torch.randn(1, 4, 3, 5, 5)
    matched = layout.match_input(x, weight, counter)
    assert layout.detect(matched) == "channels_last_3d" and counter.conversions == 1
    assert layout.match_input(matched, weight, counter) is matched and counter.conversions == 1
    pointwise = torch.randn(4, 4, 1, 1, 1)
    assert layout.match_input(matched, pointwise, counter) is matched and counter.conversions == 1


def test_the_mixed_call_counter_counts_mixed_calls():
    """The counter that every decode asserts to be 0 must be able to become 1."""
    counter = LayoutCounter()
    weight = torch.randn(4, 4, 3, 3, 3).contiguous(memory_format=NDHWC)
    layout.record_call(torch.randn(1, 4, 3, 5, 5), weight, counter)
    assert counter.mixed_calls == 1
    layout.record_call(torch.randn(1, 4, 3, 5, 5).contiguous(memory_format=NDHWC), weight, counter)
    assert counter.mixed_calls == 1


def test_a_strided_weight_is_refused():
    with pytest.raises(LayoutError, match="pack_weights"):
        layout.match_input(
            torch.randn(1, 4, 3, 5, 5), torch.randn(4, 4, 6, 3, 3)[:, :, ::2], LayoutCounter()
        )


def test_unknown_request_is_refused():
    with pytest.raises(LayoutError, match="nhwc"):
        layout.decide("nhwc", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "device, dtype, chosen",
    [
        ("cpu", torch.float32, "contiguous"),
        ("mps", torch.float16, "contiguous"),
    ],
)
def test_auto_decision(device, dtype, chosen):
    decision = layout.decide("auto", torch.device(device), dtype)
    assert decision.chosen == chosen and decision.reason


# -- the seed bug ---------------------------------------------------------------------------


def raw_byte_gather(x: torch.Tensor) -> torch.Tensor:
    """What NCCL does with a tensor that it takes for dense: copies bytes in memory order, and the
    receiver reads them as NCDHW. (NCCL's own check passes a dense NDHWC tensor.)"""
    size = x.numel()
    raw = torch.as_strided(x, (size,), (1,), x.storage_offset()).clone()
    return raw.view(x.shape)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_raw_bytes_of_channels_last_are_garbage_and_the_guard_makes_them_right():
    x = torch.randn(1, 8, 3, 10, 12)
    last = x.contiguous(memory_format=NDHWC)
    assert torch.equal(raw_byte_gather(x), x)
    assert relative_error(raw_byte_gather(last), x) > 1.0
    assert torch.equal(raw_byte_gather(layout.contiguous_for_collective(last)), x)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.contiguous(memory_format=NDHWC),
        lambda x: x.permute(4, 3, 2, 1, 0),
        lambda x: x[:, :, :, 2:5],
        lambda x: x[:, :1].expand(-1, 4, -1, -1, -1),
    ],
)
def test_the_guard_is_right_for_any_view(make):
    x = make(torch.randn(2, 8, 3, 10, 12))
    safe = layout.contiguous_for_collective(x)
    assert torch.equal(raw_byte_gather(safe), x)


@pytest.mark.nccl
@pytest.mark.gpu
def test_real_nccl_garbles_without_the_guard_and_not_with_it(tmp_path):
    """NCCL, world_size 1: `all_gather_into_tensor` of a dense channels_last_3d tensor."""
    import torch.distributed as dist

    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        x = torch.randn(1, 8, 3, 10, 12, device="cuda")
        last = x.contiguous(memory_format=NDHWC)
        garbled = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_gather_into_tensor(garbled, last)
        right = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_gather_into_tensor(right, layout.contiguous_for_collective(last))
        torch.cuda.synchronize()
    finally:
        dist.destroy_process_group()
    print(f"unguarded relative error {relative_error(garbled, x):.2f}")
    assert relative_error(garbled, x) > 1.0, "NCCL changed: look whether the guard is still needed"
    assert torch.equal(right, x)
