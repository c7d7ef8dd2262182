"""The eager path on a card: without cuDNN, past PyTorch to cuDNN, with the plain path's bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.unit.decodes import relative_error
from tests.unit.test_planning_gpu import BF16_BOUND, latent_of, vae_of
from wan_vae import layout
from wan_vae.config import wan21, wan22
from wan_vae.layout import LayoutCounter
from wan_vae.libraries import Libraries
from wan_vae.ops.eager import unfolded
from wan_vae.ops.eager.attention import attention
from wan_vae.ops.eager.conv3d import conv3d
from wan_vae.ops.eager.forms import EagerForms, choose_forms
from wan_vae.ops.eager.norm import rms_norm_silu
from wan_vae.ops.eager.upsample import doubled, doubled_pixels

pytestmark = pytest.mark.gpu

FORMATS = ("contiguous", "channels_last_3d")


@contextmanager
def without_cudnn() -> Iterator[None]:
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def random(*shape: int, fmt: str, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return layout.to_format((torch.randn(shape, device="cuda") * scale).to(dtype), fmt)


@pytest.mark.parametrize("memory_format", ["auto", "contiguous"])
@pytest.mark.parametrize(
    "config, size",
    [(wan21(), (5, 60, 104)), (wan21(), (1, 128, 128)), (wan22(), (3, 30, 52))],
    ids=["2.1-480p", "2.1-image", "2.2-480p"],
)
def test_a_decode_without_cudnn_takes_its_plan_and_little_more_than_with_it(
    config, size, memory_format
):
    vae = vae_of(config)
    z = latent_of(vae, *size)
    out = torch.empty(1, 3, 4 * size[0] - 3, *(n * config.spatial_factor for n in size[1:]))

    def decode() -> tuple[int, int]:
        for _ in range(2):  # the first also allocates what the libraries keep for good
            vae.decode(z, out=out, backend="eager", memory_format=memory_format)
        found = vae.last_report.memory
        assert vae.last_report.fallbacks == ()
        return found.planned_bytes, found.peak_bytes

    with without_cudnn():
        planned, peak = decode()
        off = [one for one in vae.last_report.backends_off if one.backend == "PyTorch"]
        pixels = out.clone()
    assert off and "torch.backends.cudnn.enabled" in off[0].reason
    assert 0.85 < planned / peak < 1.15, f"{planned / 2**30:.2f} GiB planned, {peak / 2**30:.2f}"
    vae.decode(z, backend="eager", out=out)
    with_cudnn = vae.last_report.memory.peak_bytes
    print(f"peak without cuDNN {peak / 2**30:.2f} GiB, with it {with_cudnn / 2**30:.2f} GiB")
    assert peak < 1.3 * with_cudnn
    assert relative_error(pixels, out) < BF16_BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["columns", "taps", "planes"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_form_is_right_on_the_card(form, fmt, dtype, monkeypatch):
    monkeypatch.setattr(unfolded, "SLICE_BYTES", 1 << 20)
    x = random(2, 48, 5, 33, 29, fmt=fmt, dtype=dtype)
    weight = random(32, 48, 3, 3, 3, fmt=fmt, dtype=dtype, scale=(27 * 48) ** -0.5)
    bias = torch.randn(32, device="cuda").to(dtype)
    exact = F.conv3d(
        x.cpu().double(), weight.cpu().double(), bias.cpu().double(), padding=(0, 1, 1)
    )
    with without_cudnn():
        y = unfolded.conv(form, x, weight, bias, around=(1, 1, 1, 1))
        again = unfolded.conv(form, x, weight, bias, around=(1, 1, 1, 1))
    assert torch.equal(y, again)
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert relative_error(y.cpu().double(), exact) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS)
def test_cudnn_called_directly_has_the_bits_of_conv3d_where_it_is_not_skipped(fmt, dtype):
    libraries = Libraries.of(torch.device("cuda"))
    x = random(1, 96, 6, 60, 52, fmt=fmt, dtype=dtype)
    weight = random(96, 96, 3, 3, 3, fmt=fmt, dtype=dtype, scale=0.02)
    bias = torch.randn(96, device="cuda").to(dtype)
    with torch.no_grad():
        plain = conv3d(x, weight, bias, LayoutCounter(), padding=(1, 1))
        direct = conv3d(
            x, weight, bias, LayoutCounter(), padding=(1, 1), forms=EagerForms(conv3d="cudnn")
        )
    if libraries.skips_cudnn(dtype, fmt):
        assert relative_error(direct.float(), plain.float()) < 1e-2
        return
    assert torch.equal(direct, plain)
    assert layout.detect(direct) == fmt


@pytest.mark.parametrize("channels, side", [(384, 96), (1024, 44)])
def test_sliced_attention_is_the_fused_one(channels, side):
    q, k, v = (torch.randn(1, side * side, channels, device="cuda").bfloat16() for _ in range(3))
    fused, sliced = attention(q, k, v), attention(q, k, v, forms=EagerForms(sliced_attention=True))
    exact = attention(q.double().cpu(), k.double().cpu(), v.double().cpu())
    assert relative_error(sliced.double().cpu(), exact) < 1.5 * relative_error(
        fused.double().cpu(), exact
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_norm_in_an_operand_and_the_doubling_have_the_bits_of_the_plain_ones(fmt, dtype):
    x = random(1, 96, 3, 37, 41, fmt=fmt, dtype=dtype)
    gamma = torch.rand(96, 1, 1, 1, device="cuda").to(dtype)
    operand = torch.empty_like(torch.cat((x, x), 2), memory_format=torch.preserve_format)
    rms_norm_silu(x, gamma, out=operand[:, :, 3:])
    assert torch.equal(operand[:, :, 3:], rms_norm_silu(x, gamma))
    frames = x[0].transpose(0, 1).contiguous(memory_format=torch.channels_last)
    expected = F.interpolate(frames, scale_factor=2.0, mode="nearest-exact")
    assert torch.equal(doubled_pixels(frames), expected)
    assert torch.equal(doubled(frames), expected)


def test_the_libraries_of_this_card_are_what_is_chosen_for():
    libraries = Libraries.of(torch.device("cuda"))
    with without_cudnn():
        off = Libraries.of(torch.device("cuda"))
    assert off == replace(libraries, enabled=False) and off.missing
    forms = choose_forms(off, torch.bfloat16, "channels_last_3d")
    assert forms.conv3d == unfolded.UNFOLDED
