"""What a prepared layer says that it takes is what a call allocates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")

from wan_vae.kernels.device import CARDS
from wan_vae.kernels.registry import kernels_of
from wan_vae.kernels.triton import head as triton_head
from wan_vae.kernels.triton.configs import ConvConfig
from wan_vae.kernels.triton.conv3d import ConvCall
from wan_vae.layout import LayoutCounter
from wan_vae.ops.opset import CallSize, Workspace
from wan_vae.ops.problem import (
    AttentionProblem,
    ConvProblem,
    HeadProblem,
    LayerWeights,
    NormConvProblem,
    Problem,
    Source,
    StridedProblem,
    UpsampleProblem,
)

pytestmark = pytest.mark.usefixtures("interpreted")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP16, FP32 = torch.float16, torch.float32
SIZES = [CallSize(2, 3, 3, 5), CallSize(1, 2, 4, 3), CallSize(1, 1, 3, 5, only_frame=True)]


def prepared(problem: Problem, config: str, name: str = "tma", **weights: torch.Tensor) -> Any:
    kernel = next(k for k in kernels_of(problem.operation, ("triton",)) if k.name == name)
    return kernel.prepare(LayerWeights(**weights), problem, config, CARDS["H100"])


def bytes_of(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.numel() * x.element_size()


def features(channels: int, size: CallSize, past: int = 0, dtype=FP16) -> torch.Tensor:
    shape = (size.batch, channels, size.frames + past, size.rows, size.cols)
    return torch.randn(shape, device=DEVICE).to(dtype)


def behind_norm(channels: int, out: int) -> dict[str, torch.Tensor]:
    weight = torch.randn(out, channels, 3, 3, 3, device=DEVICE)
    return {
        "weight": weight / 20,
        "bias": torch.randn(out, device=DEVICE),
        "gamma": torch.ones(channels, device=DEVICE),
    }


def taken(layer: Any, x: torch.Tensor, size: CallSize) -> Workspace:
    """Of the norm: operand and history as they come back."""
    operand, history = layer.operand(x, None, only_frame=size.only_frame, keep=True)
    return Workspace(bytes_of(operand), bytes_of(history))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["tma", "pointer"])
def test_a_convolution_behind_a_norm(name, size):
    problem = NormConvProblem(16, 16, FP16, only_frame=size.only_frame)
    layer = prepared(problem, "f1_p4x8_n16+0_k16_w4_s2", name, **behind_norm(16, 16))
    assert layer.workspace(size) == taken(layer, features(16, size), size)
    assert (layer.family, layer.kernel, layer.config[:2]) == ("triton", name, "f1")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_narrow_head(size, monkeypatch):
    problem = HeadProblem(16, 3, FP16, only_frame=size.only_frame)
    layer = prepared(problem, "m128_w4", "narrow", **behind_norm(16, 3))
    said, made = layer.workspace(size), []
    assert Workspace(said.operand_bytes, said.history_bytes) == taken(
        layer, features(16, size), size
    )
    real = torch.empty

    def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
        made.append(real(*arguments, **options))
        return made[-1]

    operand, _ = layer.operand(features(16, size), None, only_frame=size.only_frame, keep=False)
    monkeypatch.setattr(triton_head.torch, "empty", recorded)
    y = layer.convolve(operand, size.frames, None, padding=(1, 1), only_frame=size.only_frame)
    assert said.hidden_bytes == sum(map(bytes_of, made)) - bytes_of(y)


@pytest.mark.usefixtures("emulated")
@pytest.mark.skipif(DEVICE == "cuda", reason="the emulation runs on the CPU")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("frames", [1, 2])
def test_an_operand_of_the_cuda_family(frames, size):
    """Direct, and by Winograd."""
    card = CARDS["RTX 3060"]
    problem = NormConvProblem(32, 96, FP16, frames, only_frame=size.only_frame)
    (kernel,) = (k for k in kernels_of("norm_conv3d", ("cuda",)) if k.name == "mma")
    weights = LayerWeights(**behind_norm(32, 96))
    for config in kernel.candidates(problem, card):
        layer = kernel.prepare(weights, problem, config, card)
        assert layer.workspace(size) == taken(layer, features(32, size), size)
    (kernel,) = (k for k in kernels_of("upsample_conv2d", ("cuda",)) if k.name == "mma")
    up = UpsampleProblem(32, 96, FP16)
    weights = LayerWeights(torch.randn(96, 32, 3, 3), torch.randn(96))
    layer = kernel.prepare(weights, up, kernel.candidates(up, card)[0], card)
    assert layer.workspace(size) == Workspace()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("source", "channels", "dtype", "copied"),
    [("features", 16, FP16, 0), ("latent", 16, FP32, 4 * 16), ("pixels", 3, FP16, 2 * 16)],
)
def test_a_convolution_alone(source: Source, channels, dtype, copied, size):
    """The latent is copied to float32, pixels get channels of zeros, both with their history."""
    problem = ConvProblem(source, channels, 16, (3, 3, 3), FP16, FP16, only_frame=size.only_frame)
    weight = torch.randn(16, channels, 3, 3, 3, device=DEVICE)
    layer = prepared(problem, "f1_p4x8_n16+0_k16_w4_s2", weight=weight)
    past = 0 if size.only_frame else 2
    pixels = size.batch * (size.frames + past) * size.rows * size.cols
    assert layer.workspace(size) == Workspace(hidden_bytes=copied * pixels)
    assert layer.operand_dtype == dtype
    seen: list[torch.Tensor] = []

    def launch(call: ConvCall, tile: ConvConfig) -> None:
        seen.append(call.buffer)
        layer.launch(call, tile)

    x = features(channels, size, past).contiguous(memory_format=torch.channels_last_3d)
    replace(layer, launch=launch).run(x, None, LayoutCounter(), (1, 1), size.only_frame)
    is_copy = seen[0].data_ptr() != x.data_ptr()
    assert layer.workspace(size).hidden_bytes == (bytes_of(seen[0]) if is_copy else 0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_others(size):
    weight, bias = torch.randn(16, 16, 3, 3, device=DEVICE), torch.randn(16, device=DEVICE)
    up = UpsampleProblem(16, 16, FP16)
    layer = prepared(up, "f1_p4x8_n16+0_k16_w4_s2", weight=weight, bias=bias)
    assert layer.workspace(size) == Workspace()
    down = StridedProblem(16, 16, (1, 3, 3), FP16)
    layer = prepared(down, "m32_n16+0_k16_w4_s2", "pointer", weight=weight, bias=bias)
    assert layer.workspace(size) == Workspace()
    tile = "f1_p4x8_n16+0_k16_w4_s2"
    layer = prepared(
        AttentionProblem(16, FP16),
        f"m16_n16_d16x1_w4_s2 / {tile} / {tile}",
        weight=torch.randn(48, 16, 1, 1, device=DEVICE),
        projection=torch.randn(16, 16, 1, 1, device=DEVICE),
        gamma=torch.ones(16, device=DEVICE),
    )
    x = features(16, size).transpose(1, 2).flatten(0, 1)
    assert layer.workspace(size) == Workspace(operand_bytes=bytes_of(layer.norm(x)))
