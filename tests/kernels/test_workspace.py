"""What a prepared layer says that it takes is what a call allocates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")

from wan_vae.kernels.cuda.conv3x3_wgmma import Variant
from wan_vae.kernels.cuda.layers import CudaNormConv, CudaUpsample
from wan_vae.kernels.device import CARDS
from wan_vae.kernels.registry import kernels_of
from wan_vae.kernels.triton import head as triton_head
from wan_vae.kernels.triton.configs import ConvConfig
from wan_vae.kernels.triton.conv3d import ConvCall
from wan_vae.kernels.triton.norm import NORM
from wan_vae.kernels.weights import norm_scale
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
    layer = prepared(problem, "partials", "narrow", **behind_norm(16, 3))
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


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("config", ["winograd", "direct3"])
def test_an_operand_of_the_cuda_family(config, size):
    """Its norm runs everywhere; its convolution does not."""
    if size.only_frame and config == "winograd":
        pytest.skip("a video of one frame has no pairs")
    taps = 1 if size.only_frame else 3
    variant = Variant(32, 96, config == "winograd", taps, FP16)
    scale, nothing = norm_scale(torch.ones(32, device=DEVICE)), torch.empty(0)
    layer = CudaNormConv("wgmma", variant, nothing, nothing, scale, NORM)
    assert layer.workspace(size) == taken(layer, features(32, size), size)
    doubled = Variant(32, 96, False, 1, FP16, doubled=True)
    assert CudaUpsample("wgmma", doubled, nothing, nothing).workspace(size) == Workspace()


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
