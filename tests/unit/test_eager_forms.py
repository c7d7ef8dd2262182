"""The forms of the eager operations: chosen by a table, right to rounding, and in the plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.conftest import SMALL_CONFIGS, pass_elements
from tests.unit.counted import TensorCounter
from tests.unit.decodes import relative_error, vae_of
from tests.unit.test_planning_peak import model_without_data, within
from wan_vae import layout
from wan_vae.chunking import Chunk, schedule
from wan_vae.config import wan21, wan22
from wan_vae.device import dtype_of_amd, dtype_of_macos, dtype_of_nvidia
from wan_vae.kernels.proof.cache import ProofCache
from wan_vae.kernels.proof.formats import LAYER_SHAPES, wrong_formats
from wan_vae.layout import LayoutCounter
from wan_vae.libraries import Libraries, version_numbers
from wan_vae.network.blocks import CausalConv3d, RMSNorm, Step, norm_silu_conv
from wan_vae.network.cache import FeatureCache
from wan_vae.ops.eager import attention as attention_module
from wan_vae.ops.eager import unfolded
from wan_vae.ops.eager.attention import attention, slice_bytes, slice_queries
from wan_vae.ops.eager.conv3d import conv2d, conv3d
from wan_vae.ops.eager.forms import EagerForms, choose_forms
from wan_vae.ops.eager.norm import rms_norm_silu
from wan_vae.ops.eager.unfolded import ConvSize
from wan_vae.ops.eager.upsample import doubled_pixels
from wan_vae.ops.opset import eager_ops
from wan_vae.planning.passes import pass_frames
from wan_vae.planning.peak import DecodeMemory

FORMATS = ("contiguous", "channels_last_3d")
FORMS = ("columns", "taps", "planes")
CPU = torch.device("cpu")
# A card and PyTorch with nothing to get around.
HOPPER = Libraries(
    "cuda", torch_version=(2, 11, 0), cudnn=91900, capability=(9, 0), efficient_attention=True
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# -- the choice ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, dtype, fmt, expected",
    [
        ({}, BF16, "channels_last_3d", "library"),
        ({}, FP32, "contiguous", "library"),
        # PyTorch 2.9.0 skips cuDNN in any format, later ones for contiguous numbers alone.
        ({"torch_version": (2, 9, 0), "cudnn": 91002}, BF16, "channels_last_3d", "cudnn"),
        ({"torch_version": (2, 9, 0), "cudnn": 91002}, FP16, "contiguous", "cudnn"),
        ({"torch_version": (2, 9, 0), "cudnn": 91600}, FP16, "contiguous", "cudnn"),
        ({"torch_version": (2, 9, 0), "cudnn": 91002}, FP32, "contiguous", "library"),
        ({"torch_version": (2, 9, 0), "cudnn": 90701}, BF16, "contiguous", "library"),
        ({"torch_version": (2, 9, 1), "cudnn": 91002}, BF16, "contiguous", "cudnn"),
        ({"torch_version": (2, 9, 1), "cudnn": 91002}, BF16, "channels_last_3d", "library"),
        ({"torch_version": (2, 9, 1), "cudnn": 91500}, BF16, "contiguous", "library"),
        ({"torch_version": (2, 10, 0), "cudnn": 90800}, FP16, "contiguous", "cudnn"),
        ({"torch_version": (2, 10, 1), "cudnn": 91400}, BF16, "contiguous", "cudnn"),
        ({"torch_version": (2, 11, 0), "cudnn": 91002}, BF16, "contiguous", "library"),
        ({"torch_version": (2, 8, 0), "cudnn": 91002}, BF16, "contiguous", "library"),
        # ROCm has no cuDNN to skip.
        (
            {"torch_version": (2, 9, 0), "cudnn": None, "is_hip": True, "capability": None},
            BF16,
            "contiguous",
            "library",
        ),
        # Off, or not there.
        ({"enabled": False}, BF16, "channels_last_3d", "columns"),
        ({"enabled": False, "torch_version": (2, 9, 0)}, BF16, "contiguous", "columns"),
        ({"enabled": False, "is_hip": True, "cudnn": None}, FP32, "contiguous", "columns"),
        ({"cudnn": None}, BF16, "channels_last_3d", "columns"),
        ({"device_type": "cpu", "enabled": False}, FP32, "contiguous", "columns"),
        ({"device_type": "cpu", "cudnn": None}, FP32, "contiguous", "library"),
        ({"device_type": "mps", "cudnn": None}, BF16, "contiguous", "library"),
        ({"device_type": "xpu", "cudnn": None}, BF16, "contiguous", "library"),
        ({"device_type": "privateuseone", "cudnn": None}, FP32, "contiguous", "library"),
    ],
)
def test_the_form_of_conv3d_by_libraries(changes, dtype, fmt, expected):
    forms = choose_forms(replace(HOPPER, **changes), dtype, fmt)
    assert forms.conv3d == expected
    assert bool(forms.conv_reason) == (expected != "library")
    assert forms.conv2d == ("columns" if expected == "columns" else "library")


@pytest.mark.parametrize(
    "changes, dtype, sliced",
    [
        ({}, BF16, False),
        ({}, FP32, False),
        ({"capability": (7, 5)}, FP16, False),
        ({"capability": (7, 5)}, BF16, True),
        ({"efficient_attention": False}, BF16, True),
        ({"is_hip": True, "capability": None}, BF16, True),
        ({"device_type": "mps", "capability": None}, BF16, True),
        ({"device_type": "xpu", "capability": None}, BF16, True),
        ({"device_type": "privateuseone", "capability": None}, FP32, True),
        ({"device_type": "cpu", "capability": None}, FP32, False),
    ],
)
def test_where_attention_is_sliced(changes, dtype, sliced):
    forms = choose_forms(replace(HOPPER, **changes), dtype, "channels_last_3d")
    assert forms.sliced_attention == sliced == bool(forms.attention_reason)


def test_versions_of_pytorch_are_read():
    assert version_numbers("2.9.1+cu128") == (2, 9, 1)
    assert version_numbers("2.10.0a0+git1234") == (2, 10, 0)
    assert version_numbers("2.9") == (2, 9, 0)
    assert version_numbers("unknown") == (0, 0, 0)


def test_without_a_library_the_layout_is_ndhwc_and_a_request_is_kept():
    off = replace(HOPPER, enabled=False)
    for libraries in (off, replace(off, is_hip=True)):
        decision = layout.decide("auto", CPU, FP32, libraries)
        assert decision.chosen == "channels_last_3d" and "is off" in decision.reason
    assert layout.decide("contiguous", CPU, FP32, off).chosen == "contiguous"


def test_half_precision_by_card():
    assert dtype_of_nvidia((8, 0))[0] == dtype_of_nvidia((12, 0))[0] == BF16
    dtype, why = dtype_of_nvidia((7, 5))
    assert dtype == FP16 and "7.5" in why
    assert [dtype_of_amd(a)[0] for a in ("gfx1030", "gfx906", "gfx90a", "gfx1100", "gfx1201")] == [
        FP16,
        FP16,
        BF16,
        BF16,
        BF16,
    ]
    assert dtype_of_macos("13.6")[0] == dtype_of_macos("")[0] == FP32
    assert dtype_of_macos("14.0")[0] == dtype_of_macos("26.1")[0] == BF16


# -- convolutions ----------------------------------------------------------------------------------


@st.composite
def convolutions(draw):
    kernel = draw(st.sampled_from([(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)]))
    strides = {(3, 1, 1): (2, 1, 1), (1, 3, 3): (1, 2, 2)}
    stride = draw(st.sampled_from([(1, 1, 1), strides.get(kernel, (1, 1, 1))]))
    rows, cols = kernel[1] // 2, kernel[2] // 2
    around = draw(
        st.sampled_from(
            [(rows, rows, cols, cols), (0, 0, cols, cols), (0, rows, 0, cols), (0, 0, 0, 0)]
        )
    )
    return (
        kernel,
        stride,
        around,
        draw(st.sampled_from([1, 2])),
        draw(st.sampled_from([1, 3, 4, 8])),
        draw(st.sampled_from([1, 3, 8])),
        (draw(st.integers(kernel[0], 6)), draw(st.integers(3, 9)), draw(st.integers(3, 9))),
        draw(st.sampled_from(FORMATS)),
        draw(st.sampled_from(FORMATS)),
        draw(st.booleans()),
        draw(st.sampled_from([1, 3000, 20000, 1 << 27])),
    )


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60)
@given(case=convolutions())
def test_every_form_is_the_convolution(form, case):
    kernel, stride, around, b, c, o, size, x_format, weight_format, has_bias, slice_bytes = case
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = layout.to_format(random(b, c, *size), x_format)
    weight = layout.to_format(random(o, c, *kernel), weight_format)
    bias = random(o) if has_bias else None
    padded = F.pad(x, (around[2], around[3], around[0], around[1]))
    expected = F.conv3d(padded, weight, bias, stride=stride)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unfolded, "SLICE_BYTES", slice_bytes)
        y = unfolded.conv(form, x, weight, bias, stride=stride, around=around)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    wanted = layout.detect(weight)
    wanted = layout.detect(x) if wanted == "either" else wanted
    assert layout.detect(y) in (wanted, "either") or wanted == "either"


@pytest.mark.parametrize("form", ["columns", "taps"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_half_precision_columns_round_once(form, dtype):
    """As wide as a cuDNN kernel's sums; products added one by one round at each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 48, 4, 9, 11, generator=generator).to(dtype)
    weight = (torch.randn(32, 48, 3, 3, 3, generator=generator) / 36).to(dtype)
    x, weight = (layout.to_format(one, "channels_last_3d") for one in (x, weight))
    exact = F.conv3d(x.double(), weight.double(), padding=(0, 1, 1))
    error = relative_error(
        unfolded.conv(form, x, weight, None, around=(1, 1, 1, 1)).double(), exact
    )
    once = relative_error(exact.to(dtype).double(), exact)
    assert error < once * (1.2 if form == "columns" else 8)
    assert (error > 1.5 * once) == (form == "taps")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    "size",
    [
        ConvSize((1, 96, 6, 30, 52), (96, 96, 3, 3, 3), around=(1, 1, 1, 1)),
        ConvSize((1, 64, 1, 45, 83), (96, 64, 1, 3, 3), around=(1, 1, 1, 1)),
        ConvSize((1, 32, 5, 40, 40), (64, 32, 3, 1, 1)),
        ConvSize((1, 32, 5, 40, 40), (64, 32, 1, 1, 1)),
    ],
)
@pytest.mark.parametrize("limit", [1 << 20, 1 << 27])
def test_a_form_takes_the_bytes_that_it_says(form, fmt, size, limit, monkeypatch):
    monkeypatch.setattr(unfolded, "SLICE_BYTES", limit)
    x = layout.to_format(torch.empty(size.input, device="meta"), fmt)
    weight = layout.to_format(torch.empty(size.weight, device="meta"), fmt)
    with torch.inference_mode(), TensorCounter() as counter:
        y = unfolded.conv(form, x, weight, None, stride=size.stride, around=size.around)
    said = unfolded.hidden_bytes(form, size, 4, fmt == "channels_last_3d")
    # The slices of weights, and a convolution that the counter takes for cuDNN's, are not counted.
    small = 3 * weight.nbytes + 8192
    extra = counter.peak - y.nbytes
    if form == "planes":
        assert extra < 2 * said + small + x.nbytes
    else:
        assert said - 8192 <= extra <= said + small


def test_a_gradient_goes_through_the_library():
    x = torch.randn(1, 4, 3, 5, 6, requires_grad=True)
    weight = torch.randn(4, 4, 3, 3, 3)
    forms = EagerForms("columns", "columns")
    conv3d(x, weight, None, LayoutCounter(), padding=(1, 1), forms=forms).sum().backward()
    conv2d(
        x[:, :, 0], weight[:, :, 0].contiguous(), None, LayoutCounter(), padding=(1, 1), forms=forms
    ).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


# -- attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [4 * 35, 4 * 35 * 7, 4 * 35 * 16, 1 << 28])
def test_sliced_attention_is_the_attention(bound, monkeypatch):
    monkeypatch.setattr(attention_module, "_SCORE_BYTES", bound)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 35, 24, generator=generator, dtype=torch.float64) for _ in range(3))
    y = attention(q, k, v, forms=EagerForms(sliced_attention=True))
    torch.testing.assert_close(y, attention(q, k, v), rtol=0, atol=1e-13)


@pytest.mark.parametrize("part", [slice(0, 3), slice(3, 20), slice(20, 35)])
def test_slices_give_chunks_and_ranks_the_bits_of_the_whole(part, monkeypatch):
    """Every call has one frame and one number of queries: kernels cannot differ."""
    monkeypatch.setattr(attention_module, "_SCORE_BYTES", 4 * 35 * 8)
    sizes = []
    real = attention_module._attend

    def seen(q, k, v):
        sizes.append((tuple(q.shape), tuple(k.shape)))
        return real(q, k, v)

    monkeypatch.setattr(attention_module, "_attend", seen)
    q, k, v = (torch.randn(3, 35, 24) for _ in range(3))
    forms = EagerForms(sliced_attention=True)
    whole = attention(q, k, v, forms=forms)
    assert torch.equal(attention(q[1:2], k[1:2], v[1:2], forms=forms), whole[1:2])
    assert torch.equal(attention(q[:, part], k, v, forms=forms), whole[:, part])
    assert set(sizes) == {((1, 8, 24), (1, 35, 24))}


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_slice_takes_at_most_what_the_plan_says(dtype, monkeypatch):
    monkeypatch.setattr(attention_module, "_SCORE_BYTES", 1 << 20)
    q, k, v = (torch.randn(2, 1000, 64).to(dtype) for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH), TensorCounter() as counter:
        y = attention(q, k, v, forms=EagerForms(sliced_attention=True))
    extra = counter.peak - y.nbytes
    said = slice_bytes(1000, 64, q.itemsize)
    assert slice_queries(1000) == 262
    assert 0.5 * said < extra < 1.02 * said, (extra, said)


# -- norm and doubling -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_norm_in_the_operand_has_the_bits_of_the_norm_apart(dtype):
    # As many channels as the CPU computes at once: see `choose_forms`.
    conv, norm = CausalConv3d(64, 8).to(dtype), RMSNorm(64).to(dtype)
    conv.slot = "slot"
    layout.pack_weights(conv, "channels_last_3d")
    x = layout.to_format(torch.randn(2, 64, 3, 5, 7).to(dtype), "channels_last_3d")
    past = torch.randn(2, 64, 2, 5, 7).to(dtype)
    results = []
    for joined in (True, False):
        ops = eager_ops(EagerForms(joined_norm=joined))
        step = Step(FeatureCache(), Chunk(3, 6, False, False), ops=ops)
        step.cache.store("slot", past.clone())
        with torch.no_grad():
            result = norm_silu_conv(x, norm, conv, step)
        results.append((result, step.cache.peek("slot")))
        assert step.counter.conversions == step.counter.mixed_calls == 0
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(results[0][1], past)


def test_where_a_norm_writes_into_the_operand():
    cpu = Libraries("cpu")
    assert choose_forms(HOPPER, FP32, "contiguous").joined_norm
    for fmt in FORMATS:
        assert not choose_forms(cpu, FP32, fmt).joined_norm
    assert not EagerForms().joined_norm


def test_the_norm_keeps_its_gradient():
    conv, norm = CausalConv3d(4, 4), RMSNorm(4)
    x = torch.randn(1, 4, 3, 5, 7)
    step = replace(Step.whole_clip(3), ops=eager_ops(EagerForms(joined_norm=True)))
    norm_silu_conv(x, norm, conv, step).sum().backward()
    assert norm.gamma.grad is not None and norm.gamma.grad.abs().sum() > 0


def test_the_norm_writes_nothing_but_its_frames():
    out = torch.full((1, 8, 4, 3, 5), 7.0)
    x, gamma = torch.randn(1, 8, 2, 3, 5), torch.rand(8)
    rms_norm_silu(x, gamma, out=out[:, :, 1:3])
    torch.testing.assert_close(out[:, :, 1:3], rms_norm_silu(x, gamma))
    assert (out[:, :, ::3] == 7.0).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (1, 3, 4, 7), (3, 1, 2, 2), (1, 4, 1, 1)])
def test_doubled_pixels_are_the_interpolation(shape, dtype):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    y = doubled_pixels(x)
    assert torch.equal(y, F.interpolate(x, scale_factor=2.0, mode="nearest-exact"))
    assert layout.detect(y) in ("channels_last_3d", "either")


# -- whole decodes and their plans -----------------------------------------------------------------


@pytest.mark.parametrize("family", SMALL_CONFIGS)
@pytest.mark.parametrize("memory_format", ["auto", "contiguous"])
def test_a_decode_without_onednn_says_so_and_gives_the_picture(family, memory_format):
    vae = vae_of(family)
    z = torch.randn(1, vae.config.z_dim, 3, 7, 5)
    expected = vae.decode(z)
    assert all(off.backend != "PyTorch" for off in vae.last_report.backends_off)
    with torch.backends.mkldnn.flags(enabled=False):
        pixels = vae.decode(z, memory_format=memory_format)
        encoded = vae.encode(expected)
    assert relative_error(pixels, expected) < 1e-5
    assert relative_error(encoded, vae.encode(expected)) < 1e-4
    report = vae.last_report
    assert report.operation == "encode"
    pixels_report = [off for off in report.backends_off if off.backend == "PyTorch"]
    assert pixels_report == []  # the last encode had oneDNN again


def test_a_report_names_what_is_missing():
    vae = vae_of("wan2.1")
    with torch.backends.mkldnn.flags(enabled=False):
        vae.decode(torch.randn(1, vae.config.z_dim, 1, 5, 6))
    report = vae.last_report
    assert report.layout.chosen == "channels_last_3d" and "oneDNN" in report.layout.reason
    off = [off for off in report.backends_off if off.backend == "PyTorch"]
    assert [one.op for one in off] == ["conv3d"] and "oneDNN is off" in off[0].reason


@pytest.mark.parametrize("form", ["columns", "cudnn"])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    "family, size, frames, last",
    [
        ("wan2.1", (1, 5, 12, 10), 2, None),
        ("wan2.2", (1, 4, 7, 9), 2, 2),
        ("wan2.1", (1, 1, 20, 30), 1, None),
    ],
)
def test_the_plan_counts_the_form_that_runs(family, size, frames, last, fmt, form, monkeypatch):
    """One slice a convolution: as large against the features as it can be."""
    monkeypatch.setattr(
        torch,
        "cudnn_convolution",
        lambda x, weight, padding, stride, *_: F.conv3d(x, weight, None, stride, padding),
    )
    config = SMALL_CONFIGS[family]
    model = model_without_data(config, fmt)
    forms = EagerForms(form, "library" if form == "cudnn" else form, joined_norm=True)
    batch, *rest = size
    z = torch.empty(batch, config.z_dim, *rest, dtype=BF16, device="meta")
    elements = None if last is None else pass_elements(config, tuple(z.shape), last)
    limits = () if elements is None else pass_frames(config, tuple(z.shape), elements)
    ops, cache, chunks = eager_ops(forms), FeatureCache(), schedule(rest[0], frames)
    with torch.inference_mode(), TensorCounter() as counter:
        for chunk in chunks:
            step = Step(cache, chunk, ops=ops, pass_frames=limits)
            for pixels in model.decode_passes(z[:, :, chunk.start : chunk.stop], step):
                assert pixels.device.type == "meta"
    memory = DecodeMemory(config, tuple(z.shape), BF16, fmt, {}, forms)
    within(memory.of_picture(chunks, elements), counter.peak, 0.1)


@pytest.mark.parametrize(
    "config, latent",
    [
        (wan21(), (1, 16, 21, 60, 104)),
        (wan21(), (1, 16, 1, 128, 128)),
        (wan22(), (1, 48, 31, 44, 80)),
    ],
)
def test_the_default_form_takes_at_most_a_third_more_than_cudnn(config, latent):
    chunks = schedule(latent[2], 1)

    def peak(forms):
        memory = DecodeMemory(config, latent, BF16, "channels_last_3d", {}, forms)
        return memory.of_picture(chunks, None)

    off = choose_forms(replace(HOPPER, enabled=False), BF16, "channels_last_3d")
    on = choose_forms(HOPPER, BF16, "channels_last_3d")
    assert peak(on) < peak(off) < 1.3 * peak(on)


# -- both formats on MPS ---------------------------------------------------------------------------


def wrong_in(*formats):
    """A convolution that is wrong in some memory formats, and the formats of its calls."""
    calls = []

    def convolution(x, weight, padding):
        fmt = layout.detect(x)
        calls.append(fmt)
        y = F.conv3d(x.float(), weight.float(), padding=padding).to(x.dtype)
        if fmt in formats:
            y[:, :, -1] = y[:, :, 0]
        return y

    return convolution, calls


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(
    "planted, chosen, form",
    [
        ((), "contiguous", "library"),
        (("channels_last_3d",), "contiguous", "library"),
        (("contiguous",), "channels_last_3d", "library"),
        (FORMATS, "contiguous", "planes"),
    ],
)
def test_a_wrong_memory_format_is_never_chosen(planted, chosen, form, dtype):
    convolution, calls = wrong_in(*planted)
    proofs = ProofCache({"device": "an Apple GPU"}, None)
    wrong = wrong_formats(CPU, dtype, proofs, convolution)
    assert set(wrong) == set(planted)
    apple = Libraries("mps", torch_version=(2, 9, 0))
    for requested in ("auto", *FORMATS):
        decision = layout.decide(requested, torch.device("mps"), dtype, apple, wrong)
        if requested in ("auto", chosen) or requested in planted:
            assert decision.chosen == chosen
        asked = "contiguous" if requested == "auto" else requested
        if asked in planted:
            assert "wrong on this device" in decision.reason
        forms = choose_forms(apple, dtype, decision.chosen, decision.is_wrong)
        assert forms.conv3d == form
    before = len(calls)
    assert before >= 2 and wrong_formats(CPU, dtype, proofs, convolution) == wrong
    assert len(calls) == before, "kept"


def test_a_device_that_cannot_compute_a_format_is_wrong_in_it():
    def convolution(x, weight, padding):
        if layout.detect(x) == "channels_last_3d" and weight.shape[2:] == (3, 1, 1):
            raise RuntimeError("Conv3D is only supported on MPS for macOS_13_2 or newer")
        return F.conv3d(x, weight, padding=padding)

    wrong = wrong_formats(CPU, FP32, ProofCache({}, None), convolution)
    assert set(wrong) == {"channels_last_3d"} and "macOS_13_2" in wrong["channels_last_3d"]
    assert len(LAYER_SHAPES) > 1
