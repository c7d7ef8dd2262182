"""How much of ComfyUI's free memory is a number that somebody measured."""

from __future__ import annotations

import math

import torch


def believed_free_bytes(device: torch.device, told: float) -> float:
    """`told`, what ComfyUI says is free on `device`; infinity on DirectML.

    DirectML tells nobody, so ComfyUI always says 1 GiB there, for which a decode would be cut into
    60 strips. A run that does not fit starts over with less.
    """
    return math.inf if device.type == "privateuseone" else max(0, int(told))
