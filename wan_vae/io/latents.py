"""Reads and writes latent files, and checks latents and videos before a run starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from ..config import WanVAEConfig
from ..errors import CheckpointError, LatentError, first_line
from ..said import said
from .files import unreadable_reason, writing
from .tensors import missing_data, read_safetensors, save_tensors

# Names that tools give to the tensor, most specific first.
TENSOR_KEYS = ("latent_tensor", "latent", "latents", "samples")
# ComfyUI marks files whose latents have the model's own scale; latents of older files were
# multiplied by Stable Diffusion's factor. Source: what ComfyUI's SaveLatent and LoadLatent do.
VERSION_KEY = "latent_format_version_0"
OLD_SCALE = 1.0 / 0.18215


def load_latent(path: str | Path) -> torch.Tensor:
    """Read a latent [B, z, T, H, W] in float32 from `.latent`, `.safetensors` or `.npy`.

    A latent of four dimensions is [z, T, H, W]; in a `.latent` file it is [B, z, H, W], because
    ComfyUI stores images so. Raises LatentError, one line that contains the path.
    """
    path = Path(path)
    if reason := unreadable_reason(path):
        raise LatentError(f"{path}: {reason}")
    suffix, scale = path.suffix.lower(), 1.0
    if suffix == ".npy":
        latent = _load_npy(path)
    else:
        try:
            tensors = read_safetensors(path)
        except CheckpointError as error:
            raise LatentError(f"{path}: {error}") from error
        key = next((k for k in TENSOR_KEYS if k in tensors), None)
        others = [k for k in tensors if k != VERSION_KEY]
        if key is None and len(others) == 1:
            key = others[0]
        if key is None:
            raise LatentError(
                f"{path}: no latent among {len(tensors)} tensors: expected a tensor named "
                f"{', '.join(TENSOR_KEYS)}, or only one"
            )
        latent = tensors[key]
        if suffix == ".latent" and VERSION_KEY not in tensors:
            scale = OLD_SCALE
    if latent.ndim == 4:
        latent = latent.unsqueeze(2 if suffix == ".latent" else 0)
    if latent.ndim != 5 or not latent.dtype.is_floating_point:
        raise LatentError(
            f"{path}: the latent is {tuple(latent.shape)} of {latent.dtype}: expected a floating "
            "tensor [B, z, T, H, W]"
        )
    return latent.float() * scale if scale != 1 else latent.float()


def _load_npy(path: Path) -> torch.Tensor:
    try:
        # mmap: if the header claims a huge array, NumPy compares that with the file's size first.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, OverflowError, SyntaxError, MemoryError) as error:
        raise LatentError(f"{path}: not a readable .npy array: {first_line(error)}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise LatentError(f"{path}: an .npz archive, not a .npy array: save one array as .npy")
    if array.dtype.kind != "f":
        raise LatentError(f"{path}: the array is {array.dtype}: expected floating numbers")
    return torch.from_numpy(np.array(array, dtype=np.float32))


def save_latent(path: str | Path, latent: torch.Tensor, name: Path | None = None) -> None:
    """Write `latent` as ComfyUI's SaveLatent does, so that Load Latent can read it.

    name: the file name in an OutputError, if `path` is a temporary one.
    """
    marker = torch.empty(0, dtype=torch.float32, device="cpu")
    tensors = {"latent_tensor": latent.detach().cpu().contiguous(), VERSION_KEY: marker}
    with writing(Path(name or path), SafetensorError):
        save_tensors(tensors, Path(path))


# The dtypes that samplers and files use and that arithmetic supports; float8 has no isfinite.
_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def as_batch(x: torch.Tensor, what: str) -> torch.Tensor:
    """Add a batch dimension to `x` if it has four. Raises LatentError unless `x` is dense."""
    if not isinstance(x, torch.Tensor):
        raise LatentError(f"the {what} is a {type(x).__name__}: expected a torch.Tensor")
    if kind := missing_data(x):
        raise LatentError(f"the {what} is a {kind} tensor: expected a dense one, with data")
    return x.unsqueeze(0) if x.ndim == 4 else x


def check_latent(latent: torch.Tensor, config: WanVAEConfig) -> None:
    """Raise LatentError unless `latent` is finite, not empty and [B, z, T, H, W] of this VAE."""
    check_latent_shape(latent, config)
    check_latent_values(latent)


def check_latent_values(latent: torch.Tensor) -> None:
    """Raise LatentError unless every value of `latent` [B, z, T, H, W] is finite."""
    # One pass over memory.
    extremes = torch.stack(latent.detach().aminmax()).tolist()
    consequence = "the sampler overflowed, and any decoder would return black frames"
    if error := not_finite(extremes, latent, "latent", consequence):
        raise error


def check_latent_shape(latent: torch.Tensor, config: WanVAEConfig) -> None:
    """Check all that `check_latent` checks, except the values."""
    if latent.ndim != 5:
        raise LatentError(f"the latent is {tuple(latent.shape)}: expected [B, z, T, H, W]")
    if 0 in latent.shape:
        raise LatentError(f"the latent is empty: its shape is {tuple(latent.shape)}")
    if latent.dtype not in _READABLE:
        raise LatentError(
            f"the latent is of {latent.dtype}: expected a floating tensor of 16 to 64 bits"
        )
    check_channels(latent.shape[1], config)


def check_channels(channels: int, config: WanVAEConfig) -> None:
    """Raise LatentError unless a latent of `channels` is one of this VAE."""
    if channels == config.z_dim:
        return
    other = {16: "Wan 2.1", 48: "Wan 2.2 (5B)"}.get(channels)
    hint = f"; {other} latents have {channels} channels" if other else ""
    raise LatentError(
        f"the latent has {channels} channels: this {config.family} VAE decodes {config.z_dim}{hint}"
    )


def check_pixels(pixels: torch.Tensor, config: WanVAEConfig) -> None:
    """Raise LatentError unless `pixels` is not empty and [B, 3, T, H, W] of floating numbers.

    The values are looked at on their way to the device: see `pixels.PixelSource`.
    """
    if pixels.ndim != 5 or pixels.shape[1] != 3:
        raise LatentError(f"the video is {tuple(pixels.shape)}: expected [B, 3, T, H, W]")
    if 0 in pixels.shape:
        raise LatentError(f"the video is empty: its shape is {tuple(pixels.shape)}")
    if pixels.dtype not in _READABLE:
        raise LatentError(f"the video is of {pixels.dtype}: expected floating values in [-1, 1]")


def range_warning(largest: float) -> str | None:
    """A warning if the `largest` absolute value of pixels lies far outside [-1, 1], as in a video
    in [0, 255]; None if not.

    This is not an error: resampling overshoots, and high dynamic range exceeds [-1, 1] on purpose.
    """
    if largest <= 2:
        return None
    return said(
        "run.out_of_range",
        "the video's values reach {largest}: expected [-1, 1] (x / 127.5 - 1 for 8-bit)",
        largest=f"{largest:.0f}",
    )


def not_finite(
    extremes: Sequence[float], x: torch.Tensor, what: str, consequence: str
) -> LatentError | None:
    """The error for `x` [B, C, T, H, W] with these `extremes`; None if all values are finite.

    If there is a NaN, minimum and maximum are NaN.
    """
    if all(map(math.isfinite, extremes)):
        return None
    finite = torch.isfinite(x).all(dim=4).all(dim=3).all(dim=1).all(dim=0)
    bad = (~finite).nonzero().flatten().tolist()
    if not bad:
        return None
    shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    return LatentError(
        f"the {what} itself contains NaN or inf in {len(bad)} of {len(finite)} frames "
        f"({shown}): {consequence}"
    )
