"""Procedural moving scenes, and camera moves over free pictures, to train the miniature VAE.

Everything is computed on the device in batches, deterministic by generator. Clips are
[B, 3, T, H, W] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

# Pictures inside the scikit-image wheel (free licences; see examples/README.md). The held-out
# ones are never trained on.
TRAIN_PICTURES = (
    "astronaut",
    "coffee",
    "rocket",
    "color",
    "ihc",
    "retina",
    "hubble_deep_field",
    "brick",
    "grass",
    "coins",
    "moon",
    "page",
    "text",
    "motorcycle_right",
    "chessboard_RGB",
)
HELD_OUT_PICTURES = ("chelsea", "gravel", "cell")


def load_pictures(names: Sequence[str], device: torch.device) -> list[torch.Tensor]:
    """[3, H, W] in [-1, 1] for each name that this scikit-image has without a download."""
    from pathlib import Path

    import numpy as np
    import skimage
    from PIL import Image

    folder = Path(skimage.__file__).parent / "data"
    pictures = []
    for name in names:
        for path in sorted(folder.glob(f"{name}.*")):
            if path.suffix not in (".png", ".jpg", ".jpeg"):
                continue
            array = np.asarray(Image.open(path).convert("RGB"))
            picture = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 127.5 - 1
            pictures.append(picture.to(device))
    return pictures


def grid(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates of pixel centres, the shorter side spanning [-1, 1]; each [H, W]."""
    scale = 2.0 / min(height, width)
    y = (torch.arange(height, device=device) - (height - 1) / 2) * scale
    x = (torch.arange(width, device=device) - (width - 1) / 2) * scale
    return torch.meshgrid(y, x, indexing="ij")


class Scenes:
    """Draws clips with a seeded generator on one device."""

    def __init__(self, seed: int, device: torch.device, pictures: Sequence[torch.Tensor] = ()):
        self.device = device
        self.generator = torch.Generator(device=device).manual_seed(seed)
        # Choices of kinds are drawn on the host, so that they never wait for the device.
        self._host = torch.Generator().manual_seed(seed)
        self.pictures = list(pictures)

    def clips(self, batch: int, frames: int, height: int, width: int) -> torch.Tensor:
        """[batch, 3, frames, height, width] in [-1, 1], a mix of kinds, one kind a clip."""
        kinds = [self.shapes, self.textures]
        if self.pictures:
            kinds += [self.camera, self.camera, self.camera]
        made = []
        for _ in range(batch):
            kind = kinds[self._int(len(kinds))]
            made.append(kind(frames, height, width))
        return torch.stack(made)

    def shapes(self, frames: int, height: int, width: int) -> torch.Tensor:
        """Shaded discs, boxes, rings and bars with soft edges over a drifting background."""
        t = self._time(frames)
        clip = self._background(frames, height, width)
        y, x = grid(height, width, self.device)
        pixel = 2.0 / min(height, width)
        for _ in range(3 + self._int(7)):
            centre = self._uniform(2, -1.2, 1.2)
            speed, bend = self._uniform(2, -0.8, 0.8), self._uniform(2, -0.4, 0.4)
            size = 0.06 + 0.4 * self._uniform(1, 0, 1) ** 2
            spin, angle = self._uniform(1, -2, 2), self._uniform(1, 0, 6.28)
            cy = (centre[0] + speed[0] * t + bend[0] * t**2)[:, None, None]
            cx = (centre[1] + speed[1] * t + bend[1] * t**2)[:, None, None]
            a = (angle + spin * t)[:, None, None]
            dy, dx = y - cy, x - cx
            u, v = dx * a.cos() + dy * a.sin(), dy * a.cos() - dx * a.sin()
            aspect = 0.4 + self._uniform(1, 0, 1)
            kind = self._int(4)
            if kind == 0:
                distance = (u**2 + v**2).sqrt() - size
            elif kind == 1:
                distance = torch.maximum(u.abs() - size, v.abs() - size * aspect)
            elif kind == 2:
                distance = ((u**2 + v**2).sqrt() - size).abs() - size * 0.25
            else:
                distance = torch.maximum(u.abs() - size * 2, v.abs() - size * 0.15)
            softness = pixel * (0.7 + 3 * self._uniform(1, 0, 1) ** 3)
            mask = torch.sigmoid(-distance / softness * 2)[None]
            colour = self._uniform(3, -1, 1)[:, None, None, None]
            shade = (1 + 0.5 * (v / (size + 0.05)).clamp(-1, 1))[None]
            if self._int(3) == 0:
                shade = shade * (0.75 + 0.25 * torch.sign(torch.sin(u * 40 * size.sqrt())))[None]
            clip = clip * (1 - mask) + (colour * shade).clamp(-1, 1) * mask
        return clip

    def textures(self, frames: int, height: int, width: int) -> torch.Tensor:
        """Noise of several octaves, checkers and stripes under a moving, turning camera."""
        t = self._time(frames)
        side = 256
        picture = self._noise(side, 1.0 + 0.8 * float(self._uniform(1, 0, 1)))
        y, x = grid(side, side, self.device)
        kind = self._int(3)
        if kind == 0:
            step = 3 + self._int(20)
            checker = torch.sign(torch.sin(x * step) * torch.sin(y * step))
            picture = 0.6 * picture + 0.4 * checker * self._uniform(3, -1, 1)[:, None, None]
        elif kind == 1:
            stripes = torch.sin((x + y * self._uniform(1, -1, 1)) * (5 + self._int(40)))
            picture = 0.6 * picture + 0.4 * stripes * self._uniform(3, -1, 1)[:, None, None]
        return self._move(picture, t, height, width)

    def camera(self, frames: int, height: int, width: int) -> torch.Tensor:
        """Pan, zoom and turn over one of the pictures."""
        picture = self.pictures[self._int(len(self.pictures))]
        if self._int(2):
            picture = picture.flip(2)
        return self._move(picture, self._time(frames), height, width)

    # -- parts ---------------------------------------------------------------------------------

    def _time(self, frames: int) -> torch.Tensor:
        """Seconds at 16 frames a second, at a random overall speed."""
        speed = self._uniform(1, 0.2, 1.6)
        return torch.arange(frames, device=self.device) / 16 * speed

    def _background(self, frames: int, height: int, width: int) -> torch.Tensor:
        """[3, T, H, W]: a slow gradient, or a drifting picture or noise."""
        if self._int(2):
            t = self._time(frames)
            if self.pictures and self._int(2):
                return self._move(self.pictures[self._int(len(self.pictures))], t, height, width)
            return self._move(self._noise(192, 1.4), t, height, width)
        y, x = grid(height, width, self.device)
        a, b = self._uniform(3, -1, 1), self._uniform(3, -1, 1)
        angle = self._uniform(1, 0, 6.28)
        ramp = ((x * angle.cos() + y * angle.sin()) * 0.4 + 0.5).clamp(0, 1)
        picture = a[:, None, None] * (1 - ramp) + b[:, None, None] * ramp
        return picture[:, None].expand(-1, frames, -1, -1).clone()

    def _noise(self, side: int, roughness: float) -> torch.Tensor:
        """[3, side, side]: octaves of smooth noise; a larger `roughness` damps the fine ones."""
        total = torch.zeros(3, side, side, device=self.device)
        size, gain = 4, 1.0
        while size <= side:
            octave = torch.randn(1, 3, size, size, generator=self.generator, device=self.device)
            total += gain * F.interpolate(octave, (side, side), mode="bicubic")[0]
            size, gain = size * 2, gain * 2.0**-roughness
        # Mostly one brightness, a little colour: natural pictures are far from saturated.
        mix = torch.randn(3, 3, generator=self.generator, device=self.device) * 0.25
        mix[:, 0] += 0.7
        return torch.tanh(torch.einsum("ij,jhw->ihw", mix, total))

    def _move(self, picture: torch.Tensor, t: torch.Tensor, height: int, width: int):
        """[3, T, height, width]: `picture` [3, h, w] under a camera that pans, zooms and turns."""
        frames = len(t)
        y, x = grid(height, width, self.device)
        _, h, w = picture.shape
        # Zoom so that a pixel of the clip covers between half and 2.5 pixels of the picture.
        zoom = min(height, width) / min(h, w) * self._uniform(1, 0.5, 2.5)
        zoom = zoom.clamp(max=1.0) * (self._uniform(1, -0.3, 0.3) * t).exp()
        angle = self._uniform(1, -0.5, 0.5) + self._uniform(1, -0.3, 0.3) * t
        pan = self._uniform(2, -0.3, 0.3)[:, None] + self._uniform(2, -0.5, 0.5)[:, None] * t
        c, s = (zoom * angle.cos())[:, None, None], (zoom * angle.sin())[:, None, None]
        u = x * c - y * s + pan[0][:, None, None] * (1 - zoom.clamp(max=0.9))[:, None, None]
        v = x * s + y * c + pan[1][:, None, None] * (1 - zoom.clamp(max=0.9))[:, None, None]
        # grid_sample wants [-1, 1] over both sides; `grid` spans it over the shorter one.
        u, v = u * min(h, w) / w, v * min(h, w) / h
        places = torch.stack((u.expand(frames, -1, -1), v.expand(frames, -1, -1)), dim=-1)
        source = picture[None].expand(frames, -1, -1, -1)
        seen = F.grid_sample(
            source, places, mode="bilinear", padding_mode="reflection", align_corners=False
        )
        return seen.transpose(0, 1)

    def _uniform(self, n: int, low: float, high: float) -> torch.Tensor:
        r = torch.rand(n, generator=self.generator, device=self.device)
        return r * (high - low) + low

    def _int(self, n: int) -> int:
        return int(torch.randint(n, (1,), generator=self._host))
