"""Videos and images to encode: read from a file, turned upright, scaled to [-1, 1]."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from ..errors import LatentError, first_line
from .files import ffmpeg_name, import_package, unreadable_reason

if TYPE_CHECKING:
    from av import VideoFrame

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_pixels(path: Path) -> torch.Tensor:
    """Read a video or image as float32 pixels [1, 3, T, H, W] in [-1, 1], upright.

    Upright: rotated and mirrored as the EXIF orientation or the display matrix of the file says,
    which is how viewers show it. Raises LatentError.
    """
    if reason := unreadable_reason(path):
        raise LatentError(f"{path}: {reason}")
    frames: list[npt.NDArray[np.generic]]
    if path.suffix.lower() in IMAGE_SUFFIXES:
        image, white = _read_image(path)
        frames = [image]
    else:
        frames, white = [*_read_video(path)], 255
    if not frames:
        raise LatentError(f"{path}: the video has no frames")
    sizes = sorted({frame.shape for frame in frames})
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for height, width, _ in sizes)
        raise LatentError(f"{path}: frames of {len(sizes)} sizes ({listed}): expected one size")
    stacked = torch.from_numpy(np.stack(frames))
    return (stacked.float() / (white / 2) - 1).permute(3, 0, 1, 2).unsqueeze(0)


def _read_image(path: Path) -> tuple[npt.NDArray[np.generic], int]:
    """Read one image [H, W, 3]; also returns the value of white in it."""
    import_package("PIL.Image", "Pillow", path, LatentError)
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            mode = image.mode
            if mode != "F" and not mode.startswith("I"):
                return np.asarray(image.convert("RGB")), 255
            grey = np.asarray(image)
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
    ) as error:
        raise LatentError(f"{path}: not a readable image: {first_line(error)}") from error
    # Modes "I" and "I;16" hold 16-bit greyscale; Pillow's conversion to RGB would clip it at 255.
    if mode == "F" or grey.min() < 0 or grey.max() > 65535:
        raise LatentError(
            f"{path}: an image of mode {mode}, whose value of white is unknown: save it with 8 or "
            "16 bits"
        )
    return np.repeat(grey.astype(np.float32)[..., None], 3, axis=2), 65535


def _read_video(path: Path) -> list[npt.NDArray[np.uint8]]:
    """Read the frames [H, W, 3] of the first video stream."""
    av = import_package("av", "av", path, LatentError)
    try:
        with av.open(ffmpeg_name(path)) as file:
            return [_upright(frame, path) for frame in file.decode(video=0)]
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise LatentError(f"{path}: not a readable video: {first_line(error)}") from error


def _upright(frame: VideoFrame, path: Path) -> npt.NDArray[np.uint8]:
    """The pixels of a frame, rotated and mirrored as its display matrix says."""
    from av.sidedata.sidedata import SideData

    picture = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(matrix, SideData):
        return picture
    # Column x and row y are shown at column a x + c y and row b x + d y, in 16.16 fixed point.
    a, b, _, c, d = np.frombuffer(memoryview(matrix), np.int32)[:5].tolist()
    if (a or d) and (b or c):
        raise LatentError(
            f"{path}: its frames are rotated by {frame.rotation} degrees: expected a multiple of 90"
        )
    if b or c:
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
