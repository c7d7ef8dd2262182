"""The layer list: complete, counted right, and a clock that changes nothing."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

from benchmarks.suite.cases import CASES, Case
from benchmarks.suite.recorder import Recorder
from benchmarks.suite.roofline import Ceilings, measure_ceilings, measure_roofline
from benchmarks.suite.weights import Weights
from tests.bench.conftest import CPU
from tests.conftest import pass_elements
from wan_vae import WanVAE
from wan_vae.chunking import schedule
from wan_vae.network.blocks import Step
from wan_vae.network.cache import FeatureCache
from wan_vae.ops.opset import eager_ops
from wan_vae.planning import choose

VIDEO = CASES["wan2.1-narrow"]


def measured(case: Case):
    return measure_roofline(case, Weights.random(case.config), CPU, torch.float32, "eager")


@pytest.mark.parametrize("name", ["wan2.1-narrow", "wan2.2-narrow"])
def test_every_convolution_of_the_decoder_is_timed(name):
    case = CASES[name]
    vae = WanVAE.from_state_dict(Weights.random(case.config).native, device="cpu")
    convolutions = sum(
        p.ndim in (4, 5) and key.endswith("weight")
        for key, p in vae.model.named_parameters()
        if not key.startswith(("encoder.", "conv1."))
    )
    roofline = measured(case)
    calls = sum(row.calls for row in roofline.layers if row.layer.kernel)
    assert calls == convolutions  # the small clip is one chunk: each layer runs once
    assert "?" not in {row.name for row in roofline.layers}
    assert 0 < sum(row.total_ms for row in roofline.layers) < roofline.decode_ms
    totals = [row.total_ms for row in roofline.layers]
    assert totals == sorted(totals, reverse=True)


def test_the_layers_are_those_of_a_decode_in_passes(monkeypatch):
    elements = pass_elements(VIDEO.config, VIDEO.latent, 2)
    monkeypatch.setattr(choose, "PASSES", (elements, elements))
    heads = [row for row in measured(VIDEO).layers if row.name == "decoder.head.2"]
    # Five frames of pixels in one chunk: in pairs, and the one that is left.
    assert {(row.layer.frames, row.calls) for row in heads} == {(2, 2), (1, 1)}


def test_flops_and_bytes_of_a_known_layer():
    (head,) = (row for row in measured(VIDEO).layers if row.name == "decoder.head.2")
    layer = head.layer
    assert (layer.in_channels, layer.out_channels, layer.kernel) == (8, 3, (3, 3, 3))
    assert (layer.frames, layer.height, layer.width) == VIDEO.pixels[2:]
    pixels = prod(VIDEO.pixels[2:])
    assert head.flops == 2 * 27 * 8 * 3 * pixels
    history = 2 * prod(VIDEO.pixels[3:])
    floats = 8 * (pixels + history) + 3 * pixels + 27 * 8 * 3 + 3
    assert head.moved_bytes == 4 * floats


def test_an_image_uses_one_temporal_slice():
    image = replace(VIDEO, name="image", latent=(1, 16, 1, 4, 4))
    kernels = {row.name: row.layer.kernel for row in measured(image).layers}
    assert kernels["decoder.head.2"] == kernels["decoder.conv1"] == (1, 3, 3)


def test_the_clocks_change_no_bit():
    vae = WanVAE.from_state_dict(Weights.random(VIDEO.config).native, device="cpu")
    recorder, z = Recorder(vae.model, eager_ops(), CPU), VIDEO.random_latent()

    def decode(ops):
        cache, out = FeatureCache(), []
        with torch.inference_mode():
            for chunk in schedule(z.shape[2], 1):
                part = z[:, :, chunk.start : chunk.stop]
                out.append(vae.model.decode_chunk(part, Step(cache, chunk, ops=ops)))
        return torch.cat(out, 2)

    assert torch.equal(decode(recorder.ops), decode(eager_ops()))
    assert recorder.layer_times()


class StandIn:
    """Our kernels as the recorder sees them: this protocol."""

    def operand(self, x, history, *, only_frame, keep, overwrite=False, halo=None):
        return x, None

    def convolve(self, operand, frames, residual, *, padding, only_frame):
        return operand.new_zeros(operand.shape[0], 3, frames, *operand.shape[3:])


def test_a_fused_kernel_is_two_operations_of_its_layer():
    vae = WanVAE.from_state_dict(Weights.random(VIDEO.config).native, device="cpu")
    taken = vae.decoder.head["2"].weight
    ops = replace(eager_ops(), fused_conv=lambda weight: StandIn() if weight is taken else None)
    recorder, (chunk,) = Recorder(vae.model, ops, CPU), schedule(2, 2)
    with torch.inference_mode():
        vae.model.decode_chunk(VIDEO.random_latent(), Step(FeatureCache(), chunk, ops=recorder.ops))
    rows = recorder.layer_times()
    (conv,) = (row for row in rows if row.name == "decoder.head.2")
    assert conv.layer.op == "conv3d" and conv.layer.out_channels == 3
    assert conv.flops == 2 * prod(VIDEO.pixels) * 8 * 27
    # Counted with those of the same shape, under the first one's name.
    assert any(row.layer.op == "norm + SiLU" and row.flops == 0 for row in rows)


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    ceilings = Ceilings(matrix_flops_per_s=1e12, copy_bytes_per_s=1e9)
    assert ceilings.floor_ms(10**12, 0) == pytest.approx(1000)
    assert ceilings.floor_ms(10**12, 2 * 10**9) == pytest.approx(2000)


def test_ceilings_are_measured():
    ceilings = measure_ceilings(CPU, torch.float32)
    assert 1e8 < ceilings.matrix_flops_per_s < 1e15
    assert 1e7 < ceilings.copy_bytes_per_s < 1e14
