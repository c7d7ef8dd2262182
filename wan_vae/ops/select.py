"""Choose the operations of one decode: which backend runs which layer, and why others do not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from ..errors import BackendError
from ..model import WanVAEModel
from ..report import BackendOff
from .dispatch import OpSet, eager_ops
from .proof import ProofBook
from .sites import decoder_sites

Backend = Literal["auto", "eager", "triton"]
# Tensor descriptors (TMA) came with Hopper.
_MIN_CAPABILITY = (9, 0)


def select_ops(
    requested: Backend,
    model: WanVAEModel,
    weights_format: str,
    only_frame: bool,
    book: Callable[[], ProofBook],
) -> OpSet:
    """The operations for a decode with `model`, whose weights decide device and dtype.

    "eager": the reference. "triton": our kernels for each layer where one is proven on this
    device, the reference elsewhere, each refusal in `OpSet.off`. "auto": the reference, until the
    kernels have been measured on a GPU (benchmarks/NOTES.md). `book` opens the verdicts of this
    device; it is not called when no kernel is asked for.
    Raises BackendError for an unknown request, or for "triton" where no kernel can run.
    """
    if requested not in ("auto", "eager", "triton"):
        raise BackendError(f"backend is {requested!r}: expected 'auto', 'eager' or 'triton'")
    weight = model.decoder.conv1.weight
    reason = why_not(weight.device, weight.dtype, weights_format)
    if requested == "auto":
        reason = reason or "not yet measured on a GPU: ask for it with backend='triton'"
        return replace(eager_ops(), off=(BackendOff("conv3d", "triton", reason),))
    if requested == "eager":
        return eager_ops()
    if reason is not None:
        raise BackendError(f"backend 'triton' cannot run: {reason}")
    from .triton_backend import TritonBackend

    backend = TritonBackend(decoder_sites(model), weight.device, weight.dtype, book(), only_frame)
    eager = eager_ops()
    return replace(
        eager,
        norm=backend.norm,
        conv3d=backend.conv3d,
        conv2d=backend.conv2d,
        upsample_conv2d=backend.upsample_conv2d,
        attention=backend.attention,
        fused_conv=backend.fused_conv,
        backend_of=lambda weight: "triton" if backend.runs(weight) else "eager",
        used=eager.used | backend.used,
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
