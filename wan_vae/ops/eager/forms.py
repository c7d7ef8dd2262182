"""Which form each eager operation takes: chosen once for a run, and passed on as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...libraries import Libraries
from ...said import said
from . import unfolded

# "library": torch.nn.functional, and what stands behind it. "cudnn": cuDNN, past PyTorch, which
# would skip it. The others: see `unfolded`.
ConvForm = Literal["library", "cudnn"] | unfolded.Form


@dataclass(frozen=True)
class EagerForms:
    """How the eager operations of a run are computed.

    conv3d, conv2d: see `ConvForm`. joined_norm: a norm writes into the operand of the convolution
    behind it. sliced_attention: queries in slices (`attention.py`).
    deterministic: whether cuDNN is asked for deterministic algorithms. conv_reason: why conv3d is
    not "library"; empty if it is. attention_reason: why attention is sliced.
    """

    conv3d: ConvForm = "library"
    conv2d: ConvForm = "library"
    joined_norm: bool = False
    sliced_attention: bool = False
    deterministic: bool = False
    conv_reason: str = ""
    attention_reason: str = ""

    @property
    def reasons(self) -> dict[str, str]:
        """Why an operation is not the library's, by operation."""
        found = {"conv3d": self.conv_reason, "attention": self.attention_reason}
        return {operation: reason for operation, reason in found.items() if reason}


def choose_forms(
    libraries: Libraries, dtype: torch.dtype, fmt: str, is_wrong: bool = False
) -> EagerForms:
    """The forms for features of `dtype` with weights in the memory format `fmt`.

    is_wrong: 3-D convolutions of this device are wrong in every format.
    """
    conv3d: ConvForm = "library"
    conv2d: ConvForm = "library"
    reason: str = ""
    if is_wrong:
        # 2-D convolutions are another code path, which nobody has seen wrong.
        conv3d = "planes"
        reason = said(
            "eager.planes", "wrong in both memory formats here: 2-D convolutions, added up"
        )
    elif libraries.missing is not None:
        conv3d = conv2d = unfolded.UNFOLDED
        reason = said(
            "eager.products",
            "{missing}: convolutions as products of matrices ({form})",
            missing=libraries.missing,
            form=conv3d,
        )
    elif libraries.skips_cudnn(dtype, fmt):
        conv3d = "cudnn"
        version = ".".join(map(str, libraries.torch_version))
        reason = said(
            "eager.cudnn",
            "PyTorch {version} skips cuDNN {cudnn} here: it is called directly",
            version=version,
            cudnn=libraries.cudnn,
        )
    sliced = not libraries.has_fused_attention(dtype)
    return EagerForms(
        conv3d,
        conv2d,
        # The CPU computes the last numbers of a run of memory, which are fewer than its vectors
        # hold, in another way: there the bits would depend on how long a chunk's runs are.
        libraries.device_type != "cpu",
        sliced,
        libraries.deterministic,
        reason,
        "no fused kernel for a head this wide: queries in slices" if sliced else "",
    )
