"""Choose the operations of a decode or encode: which backend runs a layer, why others do not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import nn

from ..arithmetic import own_arithmetic
from ..errors import BackendError
from ..network.model import WanVAEModel, tensor_version
from ..network.sites import decoder_sites, encoder_sites
from ..ops.opset import Cut, OpSet, Refusal, eager_ops
from .proof.prove import ProofBook

Backend = Literal["auto", "eager", "triton", "cuda"]
# Which half of the model is to run.
Part = Literal["decoder", "encoder"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# Tensor descriptors (TMA) came with Hopper.
_MIN_CAPABILITY = (9, 0)
# wgmma is Hopper's alone.
_CUDA_CAPABILITY = (9, 0)


def select_ops(
    requested: Backend,
    model: WanVAEModel,
    only_frame: bool,
    book: Callable[[], ProofBook],
    cut: Cut = "whole",
    part: Part = "decoder",
) -> OpSet:
    """The operations for a decode or encode with `model`, whose weights decide device and dtype.

    `cut`: the axis along which the picture is cut into shards, whose kernels take halo rows.
    `part`: whose layers the operations are for; `model` must have it.

    "eager": the reference. "triton": our kernels in Triton for each layer where one is proven on
    this device, the reference elsewhere, refusals in `OpSet.refusals`. "cuda": as "triton", with
    kernels in CUDA C++ for the wide 3x3x3 convolutions. "auto": "cuda" on the cards that they were
    measured on (Hopper), else the reference. `book` opens the verdicts of this device; it is not
    called when no kernel is asked for. The weights' memory format does not matter: kernels read
    copies of their own. What was prepared stays with `model` for the next call, for each part.
    Raises BackendError for an unknown request, or for "triton" and "cuda" where they cannot run.
    """
    if requested not in BACKENDS:
        raise BackendError(f"backend is {requested!r}: expected one of {', '.join(BACKENDS)}")
    if requested == "eager":
        return eager_ops()
    weight = model.decoder.conv1.weight
    reason = why_not_backend(requested, weight.device, weight.dtype)
    if reason is not None:
        if requested == "auto":
            return replace(eager_ops(), refusals=(Refusal("conv3d", "cuda", reason),))
        raise BackendError(f"backend {requested!r} cannot run: {reason}")
    # Of this part alone: packing the other's weights must not cost this one its kernels.
    weights = [p for module in own_modules(model, part) for p in module.parameters()]
    state = [(p.data_ptr(), tensor_version(p)) for p in weights]
    key = (requested, only_frame, cut, part)
    kept = model.prepared.get(key)
    if kept is None or kept[0] != state:
        made = _kernels(requested, model, only_frame, book(), cut, part)
        model.prepared[key] = kept = state, made
    return kept[1]


def own_modules(model: WanVAEModel, part: Part) -> tuple[nn.Module, nn.Module]:
    """What holds the weights of `part`: decoder or encoder, and the convolution at its latent."""
    return (model.decoder, model.conv2) if part == "decoder" else (model.encoder, model.conv1)


def _kernels(
    requested: Backend,
    model: WanVAEModel,
    only_frame: bool,
    book: ProofBook,
    cut: Cut,
    part: Part,
) -> OpSet:
    from .backend import KernelBackend

    weight = model.decoder.conv1.weight
    sites = decoder_sites(model) if part == "decoder" else encoder_sites(model)
    with own_arithmetic(weight.device):
        backend = KernelBackend(
            sites, weight.device, weight.dtype, book, only_frame, requested != "triton", cut
        )
    eager = eager_ops()
    return replace(
        eager,
        norm=backend.norm,
        conv3d=backend.conv3d,
        conv2d=backend.conv2d,
        upsample_conv2d=backend.upsample_conv2d,
        attention=backend.attention,
        fused_conv=backend.fused_conv,
        pixels=backend.pixels,
        backend_of=backend.backend_of,
        used=eager.used | backend.used,
        refusals=backend.off,
    )


def why_not_backend(requested: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels that `requested` asks for cannot run here, or None if they can."""
    reason = why_not(device, dtype)
    return why_not_cuda(device) if reason is None and requested != "triton" else reason


def why_not_cuda(device: torch.device) -> str | None:
    """Why the kernels in CUDA C++ cannot run on `device`, or None if they can."""
    if device.type != "cuda":
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability != _CUDA_CAPABILITY:
        have = ".".join(map(str, capability))
        return f"written for compute capability 9.0 (Hopper), this card has {have}"
    from .cuda.driver import why_not as why_no_compiler

    return why_no_compiler()


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why our kernels cannot run here, or None if they can.

    On the CPU they can only in Triton's interpreter (TRITON_INTERPRET=1), which is for tests.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device"
    if device.type not in ("cpu", "cuda"):
        return f"no kernels for {device.type} devices"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "written for NVIDIA cards"
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CAPABILITY:
            have = ".".join(map(str, capability))
            return f"needs compute capability 9.0 (TMA), this card has {have}"
        if dtype == torch.float32:
            return "float32 was asked for, the kernels' operands are float16"
    return None
