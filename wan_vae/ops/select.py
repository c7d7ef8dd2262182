"""Choose the operations of one decode: which backend runs which layer, and why others do not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch

from ..decoder import Decoder
from ..errors import BackendError
from ..report import BackendOff
from .dispatch import OpSet, eager_ops
from .proof import ProofBook
from .upsample import upsample_conv2d

Backend = Literal["auto", "eager", "triton"]
# Tensor descriptors (TMA) came with Hopper.
_MIN_CAPABILITY = (9, 0)


def select_ops(
    requested: Backend,
    decoder: Decoder,
    weights_format: str,
    only_frame: bool,
    book: Callable[[], ProofBook],
) -> OpSet:
    """The operations for a decode with `decoder`, whose weights decide device and dtype.

    "eager": the reference. "triton": our kernels for each layer where one is proven on this
    device, the reference elsewhere, each refusal in `OpSet.off`. "auto": the reference, until the
    kernels have been measured on a GPU (benchmarks/NOTES.md). `book` opens the verdicts of this
    device; it is not called when no kernel is asked for.
    Raises BackendError for an unknown request, or for "triton" where no kernel can run.
    """
    if requested not in ("auto", "eager", "triton"):
        raise BackendError(f"backend is {requested!r}: expected 'auto', 'eager' or 'triton'")
    weight = decoder.conv1.weight
    reason = why_not(weight.device, weight.dtype, weights_format)
    if requested == "auto":
        reason = reason or "not yet measured on a GPU: ask for it with backend='triton'"
        return replace(eager_ops(), off=(BackendOff("conv3d", "triton", reason),))
    if requested == "eager":
        return eager_ops()
    if reason is not None:
        raise BackendError(f"backend 'triton' cannot run: {reason}")
    from .triton_backend import TritonBackend

    backend = TritonBackend(weight.device, weight.dtype, book())
    for norm, conv in decoder.normed_convolutions():
        backend.add_conv(conv.weight, norm.gamma, only_frame)
    for conv in decoder.upsampling_convolutions():
        backend.add_upsample(conv.weight)
    eager = eager_ops()
    return replace(
        eager,
        fused_conv=backend.fused_conv,
        upsample_conv2d=partial(backend.upsample_conv2d, eager=upsample_conv2d),
        backend_of=lambda weight: "triton" if backend.runs(weight) else "eager",
        used=eager.used | {"conv3d": "triton", "norm_silu": "triton", "upsample_conv2d": "triton"},
        off=backend.off,
    )


def why_not(device: torch.device, dtype: torch.dtype, weights_format: str) -> str | None:
    """Why the Triton kernels cannot run here, or None if they can.

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
    if weights_format != "channels_last_3d":
        return f"the weights are {weights_format}, the kernels read channels_last_3d"
    return None
