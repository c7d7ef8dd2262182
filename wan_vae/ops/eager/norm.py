"""RMS norm over channels, alone or followed by SiLU: eager reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x / max(||x||_2 over channels, 1e-12) * sqrt(C) * gamma, per pixel.

    `x` is [B, C, ...], `gamma` holds C values (any trailing size-1 dimensions). Half
    precision sums in float32 and rounds the norm, the quotient and the product. `out`: where the
    result goes, of any strides; only without gradients. Source: Wan's `RMS_norm`.
    """
    c = x.shape[1]
    scale = (gamma.reshape(1, c, *([1] * (x.ndim - 2))) * c**0.5).to(x.dtype)
    y = F.normalize(x, dim=1, out=out)
    # In place where no gradient needs the quotient: one feature tensor less at the widest point.
    return y * scale if y.requires_grad or scale.requires_grad else y.mul_(scale)


def rms_norm_silu(
    x: torch.Tensor, gamma: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """SiLU of `rms_norm`; same shapes."""
    y = rms_norm(x, gamma, out)
    return F.silu(y, inplace=not y.requires_grad)
