"""Normalised or as ComfyUI holds it: the hint; and what an encode says that it does not use."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import SMALL_CONFIGS
from wan_vae.config import wan21, wan22
from wan_vae.errors import GeometryError
from wan_vae.io.latents import _sample, encode_notices, mismatch, statistics_hint
from wan_vae.report import DecodeReport

CONFIGS = {"wan2.1": wan21(), "wan2.2": wan22()}


def kinds(config, seed: int, contrast: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A normalised latent of one picture, whose channels are not those of all; and the other."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, config.z_dim, 1, 1, 1)
    spread = (torch.randn(shape, generator=generator) * 0.2).exp() * contrast
    middle = torch.randn(shape, generator=generator) * 0.4
    noise = torch.randn((1, config.z_dim, 3, 8, 12), generator=generator)
    normalised = noise * spread + middle
    mean, std = (torch.tensor(x).view(shape) for x in (config.latents_mean, config.latents_std))
    return normalised, normalised * std + mean


@pytest.mark.parametrize("family", CONFIGS)
def test_nobody_is_told_of_what_is_right(family):
    config = CONFIGS[family]
    for seed in range(40):
        for contrast in (1.0, 0.5, 0.2):
            normalised, raw = kinds(config, seed, contrast)
            assert statistics_hint(normalised, config, normalized=True) is None
            assert statistics_hint(raw, config) is None


@pytest.mark.parametrize("family", CONFIGS)
def test_the_wrong_kind_is_told_with_numbers(family):
    config = CONFIGS[family]
    told = [
        (
            statistics_hint(kinds(config, seed)[0], config),
            statistics_hint(kinds(config, seed)[1], config, normalized=True),
        )
        for seed in range(40)
    ]
    as_normalised = [text for text, _ in told if text]
    as_raw = [text for _, text in told if text]
    # One that lies in between gets no hint.
    assert len(as_normalised) > 25 and len(as_raw) > 25
    least, most = min(config.latents_std), max(config.latents_std)
    for text in (*as_normalised, *as_raw):
        assert f"those of this VAE {least:.2f} to {most:.2f}" in text
        assert "\n" not in text
    assert as_normalised[0].startswith("the latent looks normalised")
    assert as_normalised[0].endswith("should `normalized` be on?")
    assert as_raw[0].endswith("should `normalized` be off?")


def test_what_says_nothing_gets_no_hint():
    config = CONFIGS["wan2.1"]
    assert statistics_hint(torch.zeros(1, 16, 3, 4, 4), config) is None
    one = kinds(config, 0)[0]
    one[:, 3] = 0.5  # a channel without contrast
    assert statistics_hint(one, config) is None
    unknown = wan21(z_dim=8)
    assert unknown.latents_std is None
    assert statistics_hint(torch.randn(1, 8, 2, 4, 4), unknown) is None


@pytest.mark.parametrize(
    "shape", [(1, 48, 2, 4, 4), (16, 2, 4, 4), (1, 16, 0, 4, 4), (0, 16, 1, 4, 4)]
)
def test_a_latent_of_another_vae_gets_no_hint_and_no_error(shape):
    assert statistics_hint(torch.randn(shape), CONFIGS["wan2.1"]) is None


def test_strides_and_dtype_of_the_latent_do_not_matter():
    config = CONFIGS["wan2.1"]
    normalised = kinds(config, 1)[0]
    text = statistics_hint(normalised, config)
    assert text is not None
    last = normalised.contiguous(memory_format=torch.channels_last_3d)
    assert statistics_hint(last, config) == text
    assert statistics_hint(normalised.half(), config) is not None


class Computes(TorchDispatchMode):
    """Which operations PyTorch computes: those that are no views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(21, 90, 160), (1, 512, 512), (400, 3, 3), (1, 1, 30000)])
def test_a_large_latent_is_sampled(shape):
    """It lies on a device or is some hundred MB, and this is a hint: no copy of it is made."""
    config = CONFIGS["wan2.1"]
    noise = torch.randn((2, config.z_dim, *shape), generator=torch.Generator().manual_seed(0))
    assert 1024 * config.z_dim <= _sample(noise).numel() <= 4096 * config.z_dim
    assert statistics_hint(noise, config) is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(21, 90, 160), (1, 128, 128), (3, 8, 12)])
def test_no_thread_of_pytorch_is_woken_for_a_hint(shape, dtype):
    """Its threads sleep between runs, and need longer to wake than the numbers need."""
    config = CONFIGS["wan2.1"]
    noise = torch.randn((1, config.z_dim, *shape), generator=torch.Generator().manual_seed(0))
    noise = noise.to(dtype)
    with Computes() as computes:
        found = mismatch(noise, config)
    assert computes.names == []
    # What torch says of the same numbers.
    sample = _sample(noise).double().transpose(0, 1).flatten(1)
    own = [(channel.mean, channel.deviation) for channel in found.channels]
    expected = torch.stack((sample.mean(dim=1), sample.std(dim=1, correction=0)), dim=1)
    torch.testing.assert_close(torch.tensor(own).double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_numbers_of_all_channels_come_with_the_sentence(family):
    config = CONFIGS[family]
    found = mismatch(kinds(config, 1)[0], config)
    assert len(found.sentence) < 450 and len(found.channels) == config.z_dim
    assert tuple(c.vae_deviation for c in found.channels) == config.latents_std
    assert tuple(c.vae_mean for c in found.channels) == config.latents_mean
    report = DecodeReport("decode", "done", {}, latent_channels=found.channels)
    plain = json.loads(json.dumps(report.as_dict()))
    assert DecodeReport.from_dict(plain) == report
    del plain["latent_channels"]  # of a version that did not have them
    assert DecodeReport.from_dict(plain).latent_channels == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_gets_no_hint_and_no_warning_of_numpy(value):
    config = CONFIGS["wan2.1"]
    broken = kinds(config, 1)[0]
    broken[0, 3, 0, 0, 0] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mismatch(broken, config) is None
        assert mismatch(torch.full_like(broken, value), config) is None


@pytest.mark.parametrize("dim", [0, 2, 3, 4])
def test_the_sample_is_of_all_of_it(dim):
    """A latent whose first half looks like the other kind is none."""
    config = CONFIGS["wan2.1"]
    first, second = (one.repeat(2, 1, 10, 12, 12) for one in kinds(config, 0))
    assert statistics_hint(first, config) is not None
    assert statistics_hint(torch.cat((first, second), dim), config) is None


def test_a_latent_of_another_vae_is_for_others_to_refuse():
    assert statistics_hint(torch.randn(1, 48, 2, 4, 4), CONFIGS["wan2.1"]) is None


@pytest.mark.parametrize(
    ("family", "shape", "channels", "said"),
    [
        ("wan2.1", (1, 3, 5, 64, 96), 3, []),
        ("wan2.1", (1, 3, 1, 64, 96), 3, []),
        ("wan2.1", (1, 3, 8, 64, 96), 3, ["5 of 8 frames", "last 3"]),
        ("wan2.1", (1, 3, 5, 71, 96), 3, ["cropped from 96x71 to 96x64", "multiples of 8"]),
        ("wan2.2", (1, 3, 5, 72, 96), 3, ["cropped from 96x72 to 96x64", "multiples of 16"]),
        ("wan2.1", (1, 3, 5, 64, 96), 4, ["4 channels", "alpha is ignored"]),
        ("wan2.1", (1, 3, 5, 64, 96), 6, ["6 channels", "3 channels are ignored"]),
    ],
)
def test_an_encode_says_what_it_does_not_use(family, shape, channels, said):
    notices = encode_notices(shape, channels, SMALL_CONFIGS[family])
    assert len(notices) == (1 if said else 0)
    assert all(words in notices[0] for words in said)


def test_what_is_too_small_is_an_error_and_no_notice():
    with pytest.raises(GeometryError, match="too small"):
        encode_notices((1, 3, 5, 4, 96), 3, SMALL_CONFIGS["wan2.1"])
