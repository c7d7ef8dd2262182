"""Shards on the Triton kernels: the bits of one process. In the interpreter, on the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")

from tests.dist import jobs

# The interpreter takes a second for a small convolution.
FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1, 16, 1, 1, 2), "width"),
        pytest.param((1, 16, 1, 1, 3), "width", marks=FULL),
        pytest.param((1, 16, 2, 2, 1), "height", marks=FULL),
    ],
)
def test_shards_give_the_bits_of_one_process(
    interpreted, ranks, tmp_path, monkeypatch, shape, axis
):
    """Halo rows go around the features before the norm; residual and head take their own rows."""
    monkeypatch.setenv("WAN_VAE_CACHE", str(tmp_path))
    options = {"backend": "triton", "memory_format": "channels_last_3d"}
    whole = jobs.model("kernels").decode(jobs.noise(shape), **options)
    arguments = {"name": "kernels", "shape": shape, "axis": axis, "cache": str(tmp_path), **options}
    for pixels, report in ranks.run("decode_with_kernels", 2, **arguments):
        assert torch.equal(torch.from_numpy(pixels), whole)
        assert {layer["backend"] for layer in report["layers"]} == {"triton"}
        assert report["layout"]["mixed_calls"] == 0


@pytest.mark.parametrize(
    ("name", "axis", "count", "size"),
    [
        ("kernels", "height", 2, (1, 2, 1)),
        pytest.param("kernels", "height", 2, (5, 3, 1), marks=FULL),
        pytest.param("kernels 2.2", "width", 3, (5, 1, 3), marks=FULL),
    ],
)
def test_shards_encode_with_the_bits_of_one_process(
    interpreted, ranks, tmp_path, monkeypatch, name, axis, count, size
):
    """The stride of two meets the neighbour's row, or the zeros past the picture."""
    monkeypatch.setenv("WAN_VAE_CACHE", str(tmp_path))
    options = {"backend": "triton", "memory_format": "channels_last_3d"}
    vae = jobs.model(name)
    frames, *sides = size
    shape = (1, 3, frames, *(n * vae.config.spatial_factor for n in sides))
    whole = vae.encode(jobs.noise(shape).tanh(), **options)
    arguments = {"name": name, "shape": shape, "axis": axis, "cache": str(tmp_path), **options}
    for latent, report in ranks.run("encode_with_kernels", count, **arguments):
        assert torch.equal(torch.from_numpy(latent), whole)
        assert {layer["backend"] for layer in report["layers"]} == {"triton"}
        assert report["layout"]["mixed_calls"] == 0
