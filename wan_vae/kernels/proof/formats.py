"""The proof of 3-D convolutions in both memory formats, where PyTorch's own have been wrong.

On Apple's GPUs contiguous conv3d was wrong on macOS 26.0 to 26.2 (pytorch #197114), and NDHWC with
older releases of PyTorch (pytorch #141471). So both formats are held against the CPU once before
one of them is used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ... import layout
from ...device import dtype_name
from .cache import ProofCache
from .cases import BOUNDS
from .prove import Verdict, prove

# Shapes of the real decoder's layers, small in space: (in, out, kernel, frames, rows, columns).
LAYER_SHAPES = (
    (96, 96, (3, 3, 3), 6, 18, 22),
    (384, 192, (3, 3, 3), 3, 9, 11),
    (96, 3, (3, 3, 3), 3, 17, 13),
    (192, 384, (3, 1, 1), 4, 8, 8),
)
# float32 may run as products of shorter numbers: see `doctor`.
_FLOAT32_BOUND = 2e-3

# input [B, C, T, H, W], weight, padding of frames, rows and columns -> result
Convolution = Callable[[torch.Tensor, torch.Tensor, tuple[int, int, int]], torch.Tensor]


def _conv3d(x: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int, int]) -> torch.Tensor:
    return F.conv3d(x, weight, padding=padding)


def must_prove_formats(device: torch.device) -> bool:
    """Whether convolutions of `device` have been wrong in one format and right in another."""
    return device.type == "mps"


def wrong_formats(
    device: torch.device,
    dtype: torch.dtype,
    proofs: ProofCache,
    convolution: Convolution = _conv3d,
) -> dict[str, str]:
    """The memory formats in which `convolution` is wrong on `device`, and how; from `proofs` if it
    knows."""
    found: dict[str, str] = {}
    for fmt in ("contiguous", "channels_last_3d"):
        verdict = proofs.verdict(
            f"conv3d {dtype_name(dtype)} {fmt}",
            lambda fmt=fmt: prove_format(device, dtype, fmt, convolution),  # type: ignore[misc]
        )
        if not verdict.passed:
            found[fmt] = verdict.reason
    return found


def prove_format(
    device: torch.device, dtype: torch.dtype, fmt: str, convolution: Convolution = _conv3d
) -> Verdict:
    """Hold `convolution` on `device`, with input and weight in `fmt`, against the CPU's float32.

    A convolution that the device cannot compute at all fails, too.
    """
    bound = _FLOAT32_BOUND if dtype == torch.float32 else BOUNDS[dtype]
    worst = Verdict(True)
    for c, o, kernel, t, h, w in LAYER_SHAPES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, c, t, h, w, generator=generator).to(dtype)
        weight = (torch.randn(o, c, *kernel, generator=generator) / c).to(dtype)
        padding = (0, kernel[1] // 2, kernel[2] // 2)

        def run(
            x: torch.Tensor = x,
            weight: torch.Tensor = weight,
            padding: tuple[int, int, int] = padding,
        ) -> torch.Tensor:
            own, filters = (layout.to_format(one.to(device), fmt) for one in (x, weight))
            return convolution(own, filters, padding).cpu()

        # In a format of its own: the CPU is not what is proven.
        expected = F.conv3d(x.float(), weight.float(), padding=padding)
        verdict = prove(run, lambda expected=expected: expected, bound, (RuntimeError, TypeError))  # type: ignore[misc]
        if not verdict.passed:
            return verdict
        if worst.error is None or (verdict.error or 0.0) > worst.error:
            worst = verdict
    return worst
