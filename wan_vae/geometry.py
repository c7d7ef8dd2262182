"""Converts between latent sizes and pixel sizes. Only this module knows that T frames give 4T-3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .chunking import whole_number
from .config import WanVAEConfig
from .errors import GeometryError
from .said import said


def pixel_frames(latent_frames: int, config: WanVAEConfig) -> int:
    """Pixel frames that `latent_frames` decode to: 4t - 3; the first one gives one frame."""
    return (latent_frames - 1) * config.temporal_factor + 1


def latent_frames(frames: int, config: WanVAEConfig) -> int:
    """Latent frames that `frames` pixel frames encode to; only 4n + 1 frames are kept."""
    return (frames - 1) // config.temporal_factor + 1


def pixel_shape(latent_shape: tuple[int, ...], config: WanVAEConfig) -> tuple[int, ...]:
    """Shape of the pixels of a latent: [B, z, T, H, W] -> [B, 3, 4T-3, 8H, 8W] (2.2: 16H, 16W).

    4 channels with alpha, 1 for a grey picture; 16 H, 16 W of a decoder that doubles the picture.
    """
    b, _, t, h, w = latent_shape
    s = config.decoded_factor
    return (b, config.decoder_colours, pixel_frames(t, config), h * s, w * s)


def latent_shape(pixels: tuple[int, ...], config: WanVAEConfig) -> tuple[int, ...]:
    """Shape of the latent of pixels: [B, 3, T, H, W] -> [B, z, (T-1)//4+1, H//8, W//8] (2.2: 16).

    Raises GeometryError for less than one frame or one latent pixel.
    """
    b, _, t, h, w = pixels
    s = config.spatial_factor
    if t < 1 or h < s or w < s:
        raise GeometryError(
            said(
                "encode.too_small",
                "a video of {frames} frames of {size} pixels is too small to encode: need at least "
                "1 frame of {least}",
                frames=t,
                size=f"{h}x{w}",
                least=f"{s}x{s}",
            )
        )
    return (b, config.z_dim, latent_frames(t, config), h // s, w // s)


class Window(NamedTuple):
    """The part of a video that has a latent: frames from the first on, rows and columns."""

    frames: int
    rows: slice
    columns: slice


def encode_window(shape: tuple[int, ...], config: WanVAEConfig) -> Window:
    """What is encoded of pixels of `shape` [B, 3, T, H, W]: 4n + 1 frames, whole latent pixels.

    Rows and columns are cropped evenly from both sides (the extra one at the end). Raises
    GeometryError.
    """
    _, _, t, h, w = latent_shape(shape, config)
    height, width = h * config.spatial_factor, w * config.spatial_factor
    top, left = (shape[3] - height) // 2, (shape[4] - width) // 2
    return Window(pixel_frames(t, config), slice(top, top + height), slice(left, left + width))


def crop_for_encode(pixels: torch.Tensor, config: WanVAEConfig) -> torch.Tensor:
    """The `encode_window` of `pixels` [B, 3, T, H, W]; a view."""
    window = encode_window(tuple(pixels.shape), config)
    return pixels[:, :, : window.frames, window.rows, window.columns]


def chunk_frames_slice(start: int, stop: int, config: WanVAEConfig) -> tuple[int, int]:
    """Pixel frames [first, last) that latent frames [start, stop) decode to."""
    first = 0 if start == 0 else pixel_frames(start, config)
    return first, pixel_frames(stop, config)


class Halo(NamedTuple):
    """Rows around a strip: `before` its first and `after` its last."""

    before: int
    after: int


@dataclass(frozen=True)
class Strip:
    """Latent rows [start, stop) of a picture of `rows` rows, decoded with a halo of `halo` rows."""

    start: int
    stop: int
    rows: int
    halo: int

    @property
    def halo_start(self) -> int:
        return max(0, self.start - self.halo)

    @property
    def halo_stop(self) -> int:
        return min(self.rows, self.stop + self.halo)

    def bounds(self, scale: int, halo: int | Halo) -> tuple[int, int]:
        """First and last row with `halo`, in a picture `scale` times as high as the latent."""
        before, after = (halo, halo) if isinstance(halo, int) else halo
        return (
            max(0, self.start * scale - before),
            min(self.rows * scale, self.stop * scale + after),
        )

    def crop(
        self,
        x: torch.Tensor,
        scale_from: int,
        halo_from: int | Halo,
        scale_to: int,
        halo_to: int | Halo,
    ) -> torch.Tensor:
        """Drop the rows of `x` that no later layer needs; returns a view.

        `x` [B, C, T, H, W] covers `bounds(scale_from, halo_from)`, up- or down-sampled to
        `scale_to`. The result covers `bounds(scale_to, halo_to)`.
        """
        have, _ = self.bounds(scale_from, halo_from)
        first = have * scale_to // scale_from
        top, bottom = self.bounds(scale_to, halo_to)
        return x[:, :, :, top - first : bottom - first]


def strip_halos(config: WanVAEConfig) -> tuple[int, ...]:
    """Halo rows that each decoder stage needs at its input, on its own grid, first stage first.

    Counted backwards. Each residual block has two 3x3 convolutions, and the last stage also has
    the head. The convolution after an up-sampler needs one row on each side of the larger grid.
    Wan 2.1 and 2.2: (13, 12, 10, 7).
    """
    convolutions = 2 * (config.num_res_blocks + 1)
    halos = [convolutions + 1]
    for _ in range(len(config.dim_mult) - 1):
        halos.append((halos[-1] + 1 + 1) // 2 + convolutions)
    return tuple(reversed(halos))


def encoder_halos(config: WanVAEConfig) -> tuple[Halo, ...]:
    """Halo rows that each encoder stage but the last needs at its input, on its own grid.

    Counted backwards from the first row of the last stage, which takes the whole picture. A
    down-sampler's row reads two rows and the one after them. Each residual block has two 3x3
    convolutions, and the first stage also has that of the pixels. Rounded up to even numbers,
    because the down-samplers take rows in pairs; what is only there to fill a pair is not needed of
    the stage before. Wan 2.1 and 2.2: ((30, 36), (12, 16), (4, 6)).
    """
    halos: list[Halo] = []
    before = after = 0  # needed of the result of a stage
    for i in reversed(range(len(config.dim_mult) - 1)):
        convolutions = 2 * config.num_res_blocks + (1 if i == 0 else 0)
        before, after = 2 * before + convolutions, 2 * after + 1 + convolutions
        halos.append(Halo(before + before % 2, after + after % 2))
    return tuple(reversed(halos))


def strips(rows: int, count: int, config: WanVAEConfig) -> list[Strip]:
    """Divide `rows` latent rows into `count` strips, as evenly as possible, taller ones first.

    Raises GeometryError for more strips than rows or fewer than one.
    """
    count = whole_number(count, "strips")
    if not 1 <= count <= rows:
        raise GeometryError(
            said(
                "plan.no_strips",
                "cannot cut {rows} latent rows into {count} strips: expected 1 to {most}",
                rows=rows,
                count=count,
                most=rows,
            )
        )
    base, extra = divmod(rows, count)
    out, start = [], 0
    for i in range(count):
        stop = start + base + (i < extra)
        out.append(Strip(start, stop, rows, strip_halos(config)[0]))
        start = stop
    return out
