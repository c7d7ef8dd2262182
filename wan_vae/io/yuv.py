"""Pixels as planes of YUV 4:2:0, computed where the pixels are: half the bytes of 8-bit RGB travel.

BT.709, limited range. Luma is that of each pixel; a chroma sample lies in the middle of its two by
two pixels, as FFmpeg's scaler puts it.

Source: Rec. ITU-R BT.709-6, items 3.2 to 3.5 (weights, scales, ranges of 8 and 10 bits). The filter
of chroma was measured on what `av.VideoFrame.reformat` makes of RGB: the mean of two columns, and
(1, 3, 3, 1) / 8 over four rows.
"""

from __future__ import annotations

import torch

# Weights of R, G and B in luma, and twice what blue and red differ from it at most.
_RED, _GREEN, _BLUE = 0.2126, 0.7152, 0.0722
_BLUE_RANGE, _RED_RANGE = 2 * (1 - _BLUE), 2 * (1 - _RED)


def frame_rows(height: int) -> int:
    """Rows of the array that holds the three planes of a frame of `height` rows, an even number."""
    return height * 3 // 2


def even(size: int) -> int:
    """`size`, or the next even number: 4:2:0 has one chroma sample for two rows and columns."""
    return size + size % 2


def to_yuv420(frame: torch.Tensor, bit_depth: int = 8) -> torch.Tensor:
    """The planes Y, U, V of one frame [3, H, W] in [-1, 1], below each other in [3 H' / 2, W'].

    H', W': H and W made even by repeating the last row or column. The two chroma planes [H' / 2,
    W' / 2] follow the luma without gaps, so two of their rows fill one row. Values are rounded to
    nearest; uint8, or int16 for a bit_depth of 10. On the device of `frame`, which may have any
    strides. Takes about 30 bytes a pixel there until it returns.
    """
    height, width = even(frame.shape[1]), even(frame.shape[2])
    x = frame.float().clamp(-1, 1)
    if x.shape[2] != width:
        x = torch.cat((x, x[:, :, -1:]), dim=2)
    if x.shape[1] != height:
        x = torch.cat((x, x[:, -1:]), dim=1)
    # Levels of 10 bits are four times those of 8, also black and white.
    scale = 1 << (bit_depth - 8)
    dtype = torch.uint8 if bit_depth == 8 else torch.int16
    planes = torch.empty((frame_rows(height), width), dtype=dtype, device=x.device)
    # [-1, 1] has twice the width of [0, 1], hence half of 219 and 224 levels.
    planes[:height] = _luma(x).mul_(109.5 * scale).add_(125.5 * scale).round_()
    small = _halved(x)
    y = _luma(small)
    chroma = planes[height:].view(2, height // 2, width // 2)
    for plane, colour, reach in (
        (chroma[0], small[2], _BLUE_RANGE),
        (chroma[1], small[0], _RED_RANGE),
    ):
        plane.copy_((colour - y).mul_(112 * scale / reach).add_(128 * scale).round_())
    return planes


def _luma(x: torch.Tensor) -> torch.Tensor:
    """The luma [H, W] of [3, H, W], in a new tensor."""
    return (x[0] * _RED).add_(x[1], alpha=_GREEN).add_(x[2], alpha=_BLUE)


def _halved(x: torch.Tensor) -> torch.Tensor:
    """[3, H, W] in half the size: the mean of two columns, (1, 3, 3, 1) / 8 of four rows.

    The first and the last row stand in for the rows outside.
    """
    narrow = (x[:, :, 0::2] + x[:, :, 1::2]).mul_(0.5)
    upper, lower = narrow[:, 0::2], narrow[:, 1::2]
    small = (upper + lower).mul_(0.375)
    small[:, 1:].add_(lower[:, :-1], alpha=0.125)
    small[:, 0].add_(upper[:, 0], alpha=0.125)
    small[:, :-1].add_(upper[:, 1:], alpha=0.125)
    small[:, -1].add_(lower[:, -1], alpha=0.125)
    return small
