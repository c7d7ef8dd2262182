"""What a command was asked to do, as values. Needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..options import RunOptions


@dataclass(frozen=True)
class DecodeRequest:
    """Decode `latents` with the checkpoint `vae`.

    output: the file, or for several latents the folder. device: None for the best one. normalized:
    the latents are normalized, as in diffusers. fps: None for the model's. key: the tensor in a
    file of several. overwrite: outputs may replace files that exist.
    """

    latents: tuple[Path, ...]
    vae: Path
    output: Path
    device: str | None
    options: RunOptions
    normalized: bool
    fps: float | None
    overwrite: bool
    key: str | None = None


@dataclass(frozen=True)
class EncodeRequest:
    """Encode a video or an image to the latent file `output`."""

    video: Path
    vae: Path
    output: Path
    device: str | None
    options: RunOptions
    overwrite: bool


@dataclass(frozen=True)
class InspectRequest:
    """Describe a checkpoint: as text, with each convolution or their counts, or as JSON."""

    file: Path
    all_layers: bool
    as_json: bool


@dataclass(frozen=True)
class PlanRequest:
    """Plan the decode of `latent` with the checkpoint `file`, without decoding it."""

    file: Path
    latent: Path
    device: str | None
    options: RunOptions
    all_layers: bool
    as_json: bool
    key: str | None = None


@dataclass(frozen=True)
class DemoRequest:
    """Decode the sample latents to the folder `output`; `garble` also draws what a bug did."""

    output: Path
    device: str | None
    options: RunOptions
    garble: bool
