"""Low-resolution thumbnails of decoded samples, and the tolerant comparison with stored ones.

A thumbnail file is one PNG: the frames of a clip, each shrunk by 16 by averaging, side by side.
Averages over 16 x 16 pixels hide rounding (another dtype, device or kernel) and show everything
that an eye would see: shifted blocks, wrong colours, frames in the wrong order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SHRINK = 16
# Mean absolute difference of the worst frame, in levels of 255. Decoding in bfloat16 instead of
# float32 stays well below; the mildest garble of tests/unit/test_demo.py is well above.
TOLERANCE_LEVELS = 3.0


def thumbnails(pixels: torch.Tensor) -> np.ndarray:
    """[1, 3, T, H, W] in [-1, 1] -> uint8 [H // 16, T * (W // 16), 3], frames left to right."""
    frames = pixels[0].float().cpu().transpose(0, 1)
    small = F.interpolate(
        frames, (frames.shape[2] // SHRINK, frames.shape[3] // SHRINK), mode="area"
    )
    row = torch.cat(list(small), dim=2)
    return ((row + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def save(path: Path, pixels: torch.Tensor) -> None:
    """Write the thumbnails of `pixels` as a PNG."""
    Image.fromarray(thumbnails(pixels)).save(path, optimize=True)


def difference(path: Path, pixels: torch.Tensor) -> float:
    """Mean absolute difference, in levels of 255, of the frame that is furthest from the stored.

    Raises ValueError if the stored thumbnails have another size, so a clip of the wrong length or
    resolution never passes.
    """
    stored = np.asarray(Image.open(path).convert("RGB")).astype(np.float32)
    made = thumbnails(pixels).astype(np.float32)
    if stored.shape != made.shape:
        raise ValueError(f"{path}: stored thumbnails are {stored.shape}, made ones {made.shape}")
    frames = np.split(np.abs(stored - made), pixels.shape[2], axis=1)
    return max(float(frame.mean()) for frame in frames)
