"""Reads and writes latent files, and checks latents and videos before a run starts."""

from __future__ import annotations

import json
import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from .. import geometry
from ..config import WanVAEConfig
from ..errors import CheckpointError, LatentError, first_line
from ..report import ChannelRecord
from ..said import said
from .files import unreadable_reason, writing
from .kinds import NUMPY_ARCHIVE, PYTORCH, is_safetensors, kind_of, what_is_it
from .tensors import (
    missing_data,
    read_tensors,
    safetensors_metadata,
    save_tensors,
    seen_finite,
)

# Names that tools give to the tensor, most specific first.
TENSOR_KEYS = ("latent_tensor", "latent", "latents", "samples")
# ComfyUI marks files whose latents have the model's own scale; latents of older files were
# multiplied by Stable Diffusion's factor. Source: what ComfyUI's SaveLatent and LoadLatent do.
COMFYUI_KEY, VERSION_KEY = TENSOR_KEYS[0], "latent_format_version_0"
OLD_SCALE = 1.0 / 0.18215
# The names of musubi-tuner's caches: "latents_21x60x104_float32", and beside it
# "latents_image_...", "latents_control_0_..."; a tensor holds one video [z, T, H, W], normalised.
_MUSUBI = re.compile(r"latents_\d+x\d+x\d+_\w+")
_MUSUBI_MORE = re.compile(r"latents_(\w+_)?(\d+x)?\d+x\d+_\w+")
# Its names of models whose latents another VAE made.
_OTHER_ARCHITECTURES = re.compile(r"hunyuan|framepack|flux|z_image|hidream|ideogram|kandinsky|lens")
# What its scripts that generate write beside the tensor "latent", and what those of HunyuanVideo
# and FramePack write besides.
_MUSUBI_SETTINGS = {"seeds", "infer_steps", "guidance_scale"}
_OTHER_SETTINGS = {"embedded_cfg_scale", "latent_window_size"}
# Latent channels of Wan 2.1, Wan 2.2 (5B) and Qwen-Image 2.1.
_CHANNELS = (16, 48, 64)

# When a latent looks like the other kind (`statistics_hint`). Channels of 30% more or less contrast
# than usual, which is what single pictures have, move the slope by 0.2 (Wan 2.1, 16 channels).
_CLEARLY, _NORMALIZED_SLOPE, _RAW_SLOPE = 0.05, 0.1, 0.5


@dataclass(frozen=True)
class LatentFile:
    """What a file holds: the latent [B, z, T, H, W] in float32.

    is_normalized: whether it is normalised as diffusers' are; None where the file does not tell.
    notes: sentences about how it was read, for the user.
    """

    latent: torch.Tensor
    is_normalized: bool | None = None
    notes: tuple[str, ...] = ()


def load_latent(path: str | Path, key: str | None = None) -> torch.Tensor:
    """Read a latent [B, z, T, H, W] in float32; see `read_latent`. Raises LatentError."""
    return read_latent(path, key).latent


def read_latent(path: str | Path, key: str | None = None) -> LatentFile:
    """Read a latent as ComfyUI, diffusers and trainers write it, whatever the file is called.

    A safetensors file (ComfyUI's `.latent`, musubi-tuner's caches), a PyTorch file of a tensor or
    of a dict with one, a NumPy array or an archive of some. key: the tensor to take; None takes the
    only one, or the one with a name for a latent. Of four dimensions, it is [B, z, H, W] of images
    in ComfyUI's files, else [z, T, H, W], unless only the second can be the channels; of three
    dimensions [z, H, W]. Raises LatentError, one line that contains the path.
    """
    path = Path(path)
    if reason := unreadable_reason(path):
        raise LatentError(f"{path}: {reason}")
    try:
        tensors, metadata = _read(path)
        name = _choose(tensors, key)
    except CheckpointError as error:
        raise LatentError(f"{path}: {error}") from error
    latent, notes = tensors[name], []
    is_comfyui = name == COMFYUI_KEY
    if (kind := missing_data(latent)) is not None:
        raise LatentError(f"{path}: the latent is a {kind} tensor: expected a dense one")
    shape = tuple(latent.shape)
    if latent.dtype not in _STORED or not 3 <= latent.ndim <= 5:
        raise LatentError(
            f"{path}: the latent is {shape} of {latent.dtype}: expected a floating tensor "
            "[B, z, T, H, W]"
        )
    if latent.ndim == 3 and shape[0] not in _CHANNELS:
        packed = shape[2] in (64, 128, 192)
        raise LatentError(
            f"{path}: the latent is {shape}: expected a floating tensor [B, z, T, H, W]"
            + (
                "; these look like the packed tokens of a Qwen-Image or Flux pipeline: unpack them "
                "with the pipeline's _unpack_latents"
                if packed
                else ""
            )
        )
    latent = _five_dimensions(latent, is_comfyui)
    latent = latent.float()
    if is_comfyui and VERSION_KEY not in tensors:
        notes.append(
            "an old ComfyUI file: its latent is multiplied by 1 / 0.18215, as ComfyUI does"
        )
        latent = latent * OLD_SCALE
    is_normalized: bool | None = None
    architecture = metadata.get("architecture", "")
    if _MUSUBI_MORE.fullmatch(name):
        if _OTHER_ARCHITECTURES.search(architecture):
            raise LatentError(f"{path}: a latent of {architecture}, which another VAE decodes")
        is_normalized = True
        notes.append(f"{name} of a musubi-tuner cache: a normalised latent")
    elif name == "latent" and metadata.keys() >= _MUSUBI_SETTINGS:
        if _OTHER_SETTINGS & metadata.keys():
            raise LatentError(
                f"{path}: musubi-tuner made it with HunyuanVideo or FramePack, whose latents "
                "another VAE decodes"
            )
        is_normalized = True
        notes.append("generated by musubi-tuner: a normalised latent")
    elif is_comfyui and (node := _node_of_wrapper(metadata)):
        is_normalized = True
        notes.append(f"saved behind {node} of WanVideoWrapper: a normalised latent")
    return LatentFile(latent, is_normalized, tuple(notes))


def _five_dimensions(latent: torch.Tensor, is_comfyui: bool) -> torch.Tensor:
    if latent.ndim == 3:
        return latent[None, :, None]
    if latent.ndim == 4:
        channels = (latent.shape[0] in _CHANNELS, latent.shape[1] in _CHANNELS)
        return latent.unsqueeze(2 if is_comfyui or channels == (False, True) else 0)
    return latent


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file by name, and what else it says. Raises CheckpointError."""
    if (arrays := _read_numpy(path)) is not None:
        return arrays, {}
    loaded = read_tensors(path, "latent")
    if isinstance(loaded, torch.Tensor):
        return {"": loaded}, {}
    if isinstance(loaded, (list, tuple)) and len(loaded) == 1 and torch.is_tensor(loaded[0]):
        return {"": loaded[0]}, {}
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"contains a {type(loaded).__name__}: expected a tensor")
    tensors = _tensors_in(loaded)
    with path.open("rb") as file:
        metadata = safetensors_metadata(path) if is_safetensors(file.read(9)) else {}
    return tensors, metadata


def _tensors_in(found: Mapping[object, object], levels: int = 3) -> dict[str, torch.Tensor]:
    """Those of a dict, and of dicts in it as "latents.samples": a LATENT saved with other things.

    levels: how deep a dict is looked into.
    """
    tensors: dict[str, torch.Tensor] = {}
    for key, value in found.items():
        if isinstance(value, torch.Tensor):
            tensors[str(key)] = value
        elif isinstance(value, Mapping) and levels > 1:
            inner = _tensors_in(value, levels - 1)
            tensors |= {f"{key}.{name}": tensor for name, tensor in inner.items()}
    return tensors


def _choose(tensors: Mapping[str, torch.Tensor], key: str | None) -> str:
    """The name of the latent among `tensors`. Raises CheckpointError."""
    # A nested tensor has no shape.
    shown = [
        f"{k} {'nested' if v.is_nested else list(v.shape)}"
        for k, v in tensors.items()
        if k != VERSION_KEY
    ]
    listed = ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
    if key is not None:
        if key not in tensors:
            raise CheckpointError(f"no tensor {key!r}: it holds {listed or 'none'}")
        return key
    others = [k for k in tensors if k != VERSION_KEY]
    caches = [k for k in others if _MUSUBI.fullmatch(k)]
    named = [k for k in TENSOR_KEYS if k in tensors][:1]
    nested = [k for k in others if k.rpartition(".")[2] in TENSOR_KEYS]
    for names in (named, others, caches, nested):
        if len(names) == 1:
            return names[0]
    if len(caches) > 1:
        raise CheckpointError(f"holds several latents, {listed}: name one with --key")
    raise CheckpointError(
        f"no latent among {len(tensors)} tensors{f' ({listed})' if listed else ''}: expected a "
        f"tensor named {', '.join(TENSOR_KEYS)}, or only one; or name one with --key"
    )


# ComfyUI's nodes that write a latent, and the wrapper's that make a normalised one.
_SAVERS = ("SaveLatent",)
_WRAPPER = re.compile(r"WanVideo\w*Sampler\w*|WanVideoEncode(LatentBatch)?")
# The wrapper's node that turns one kind into the other.
_RESCALER, _TO_NORMALISED = "WanVideoLatentReScale", "comfy_to_wrapper"


def _node_of_wrapper(metadata: Mapping[str, str]) -> str | None:
    """The node of WanVideoWrapper whose normalised latent the graph in a ComfyUI file saves; None
    if another node made it, as ComfyUI's own samplers, whose latents are not normalised."""
    try:
        graph = json.loads(metadata.get("prompt", "null"))
        sources = [
            graph[str(node["inputs"]["samples"][0])]
            for node in graph.values()
            if node["class_type"] in _SAVERS
        ]
        names = [str(source["class_type"]) for source in sources if _makes_normalised(source)]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None
    return names[0] if names and len(names) == len(sources) else None


def _makes_normalised(node: Mapping[str, Any]) -> bool:
    if node["class_type"] == _RESCALER:
        return bool(node["inputs"]["direction"] == _TO_NORMALISED)
    return _WRAPPER.fullmatch(str(node["class_type"])) is not None


def _read_numpy(path: Path) -> dict[str, torch.Tensor] | None:
    """The arrays of a NumPy file or archive; None if it is another file. Raises CheckpointError."""
    with path.open("rb") as file:
        start = file.read(9)
    kind = kind_of(path) if start[:4] == b"PK\x03\x04" else None
    is_archive = kind == NUMPY_ARCHIVE
    if not is_archive and start[:6] != b"\x93NUMPY":
        is_other = is_safetensors(start) or kind == PYTORCH
        if is_other or path.suffix.lower() not in (".npy", ".npz"):
            return None
        if said := what_is_it(path, "latent"):
            raise CheckpointError(f"not a readable .npy array: {said}")
    try:
        # mmap: if the header claims a huge array, NumPy compares that with the file's size first.
        loaded = np.load(path, mmap_mode=None if is_archive else "r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": _from_numpy(loaded)}
        with loaded:
            return {name: _from_numpy(loaded[name]) for name in loaded.files}
    except (
        ValueError,
        OSError,
        EOFError,
        OverflowError,
        SyntaxError,
        MemoryError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
    ) as error:
        raise CheckpointError(f"not a readable .npy array: {first_line(error)}") from error


def _from_numpy(array: np.ndarray[Any, Any]) -> torch.Tensor:
    if array.dtype.kind != "f":
        raise CheckpointError(f"the array is {array.dtype}: expected floating numbers")
    return torch.from_numpy(np.array(array, dtype=np.float32))


def save_latent(path: str | Path, latent: torch.Tensor, name: Path | None = None) -> None:
    """Write `latent` as ComfyUI's SaveLatent does, so that Load Latent can read it.

    name: the file name in an OutputError, if `path` is a temporary one.
    """
    marker = torch.empty(0, dtype=torch.float32, device="cpu")
    tensors = {"latent_tensor": latent.detach().cpu().contiguous(), VERSION_KEY: marker}
    with writing(Path(name or path), SafetensorError):
        save_tensors(tensors, Path(path))


# What a sentence is about.
WHAT = {"latent": said("word.latent", "latent"), "video": said("word.video", "video")}

# The dtypes that samplers and files use and that arithmetic supports; float8 has no isfinite.
_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# And those from which a file's numbers are cast.
_STORED = (*_READABLE, torch.float8_e4m3fn, torch.float8_e5m2)


def as_batch(x: torch.Tensor, what: str) -> torch.Tensor:
    """Add a batch dimension to `x` if it has four. Raises LatentError unless `x` is dense."""
    if not isinstance(x, torch.Tensor):
        raise LatentError(
            said(
                "input.no_tensor",
                "the {what} is a {kind}: expected a torch.Tensor",
                what=what,
                kind=type(x).__name__,
            )
        )
    if kind := missing_data(x):
        raise LatentError(
            said(
                "input.no_data",
                "the {what} is a {kind} tensor: expected a dense one, with data",
                what=what,
                kind=kind,
            )
        )
    return x.unsqueeze(0) if x.ndim == 4 else x


def check_latent(latent: torch.Tensor, config: WanVAEConfig) -> None:
    """Raise LatentError unless `latent` is finite, not empty and [B, z, T, H, W] of this VAE."""
    check_latent_shape(latent, config)
    if error := wrong_values(latent):
        raise error


def wrong_values(latent: torch.Tensor) -> LatentError | None:
    """The error for `latent` [B, z, T, H, W]; None if all values are finite."""
    if seen_finite(latent):
        return None
    # One pass over memory.
    extremes = torch.stack(latent.detach().aminmax()).tolist()
    consequence = said(
        "latent.overflow", "the sampler overflowed, and any decoder would return black frames"
    )
    return not_finite(extremes, latent, WHAT["latent"], consequence)


def check_latent_shape(latent: torch.Tensor, config: WanVAEConfig) -> None:
    """Check all that `check_latent` checks, except the values."""
    if latent.ndim != 5:
        raise LatentError(
            said(
                "latent.dimensions",
                "the latent is {shape}: expected [B, z, T, H, W]",
                shape=tuple(latent.shape),
            )
        )
    if 0 in latent.shape:
        raise LatentError(
            said(
                "latent.empty_shape",
                "the latent is empty: its shape is {shape}",
                shape=tuple(latent.shape),
            )
        )
    if latent.dtype not in _READABLE:
        raise LatentError(
            said(
                "latent.dtype",
                "the latent is of {dtype}: expected a floating tensor of 16 to 64 bits",
                dtype=latent.dtype,
            )
        )
    others = [i for i in range(2, 5) if latent.shape[i] == config.z_dim]
    if latent.shape[1] != config.z_dim and others == [2]:
        raise LatentError(
            said(
                "latent.frames_first",
                "the latent is {shape}, which looks like [B, T, z, H, W]: expected [B, z,"
                " T, H, W], so swap its second and third dimension",
                shape=tuple(latent.shape),
            )
        )
    if latent.shape[1] != config.z_dim and others == [4]:
        raise LatentError(
            said(
                "latent.channels_last",
                "the latent is {shape}, which looks like [B, T, H, W, z]: expected [B, z,"
                " T, H, W], so move its last dimension to the second place",
                shape=tuple(latent.shape),
            )
        )
    check_channels(latent.shape[1], config)
    check_frames(latent.shape[2], config, WHAT["latent"])


def check_frames(frames: int, config: WanVAEConfig, what: str) -> None:
    """Raise LatentError for several frames of a VAE of images."""
    if config.image_only and frames > 1:
        raise LatentError(
            said(
                "latent.images_only",
                "the {what} has {frames} frames: this {family} VAE has two-dimensional kernels and "
                "knows images only; give them as a batch of images",
                what=what,
                frames=frames,
                family=config.family,
            )
        )


def check_channels(channels: int, config: WanVAEConfig) -> None:
    """Raise LatentError unless a latent of `channels` is one of this VAE."""
    if channels == config.z_dim:
        return
    other = {16: "Wan 2.1", 48: "Wan 2.2 (5B)", 64: "Qwen-Image 2.1"}.get(channels)
    text: str = said(
        "latent.channels",
        "the latent has {channels} channels: this {family} VAE decodes {own}; use the VAE of the "
        "model that made the latent",
        channels=channels,
        family=config.family,
        own=config.z_dim,
    )
    if other:
        text = said(
            "latent.channels_of",
            "{text}; {other} latents have {channels} channels",
            text=text,
            other=other,
            channels=channels,
        )
    raise LatentError(text)


def check_pixels(pixels: torch.Tensor, config: WanVAEConfig) -> None:
    """Raise LatentError unless `pixels` is not empty and [B, 3, T, H, W] of floating numbers.

    [B, 4, T, H, W] for a VAE of pictures with alpha.

    The values are looked at on their way to the device: see `pixels.PixelSource`.
    """
    check_video_shape(tuple(pixels.shape), config)
    if pixels.dtype not in _READABLE:
        raise LatentError(
            said(
                "encode.dtype",
                "the video is of {dtype}: expected floating values in [-1, 1]",
                dtype=pixels.dtype,
            )
        )


# Numbers of each channel at which `statistics_hint` looks, at most. The deviation of so many is
# right to two percent, and it is a matter of tens.
_SAMPLED = 4096


def _sample(latent: torch.Tensor) -> torch.Tensor:
    """Every so-many-th row, column, frame and video of `latent` [B, z, T, H, W]; a view."""
    b, _, t, h, w = latent.shape
    steps = [1, 1, 1, 1]
    sizes = [b, t, h, w]
    while prod(-(-size // step) for size, step in zip(sizes, steps, strict=True)) > _SAMPLED:
        # Of the dimension of which most is left; neighbours are alike along each of them.
        left = [-(-size // step) for size, step in zip(sizes, steps, strict=True)]
        steps[left.index(max(left))] += 1
    videos, frames, rows, columns = steps
    return latent[::videos, :, ::frames, ::rows, ::columns]


def _in_one_thread(sample: torch.Tensor) -> np.ndarray[Any, Any]:
    """`sample` in float32 on the host, by NumPy: a few thousand numbers are computed sooner than
    the threads of PyTorch wake up, which takes 10 to 20 ms on a host of 32 cores."""
    values = sample.contiguous().cpu() if sample.device.type != "cpu" else sample
    if values.dtype == torch.bfloat16:  # which NumPy does not know: the upper half of a float32
        bits: np.ndarray[Any, Any] = values.view(torch.int16).numpy().view(np.uint16)
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return values.numpy().astype(np.float32)


@dataclass(frozen=True)
class Mismatch:
    """That a latent looks like the other kind: a `sentence`, and the numbers of all channels."""

    sentence: str
    channels: tuple[ChannelRecord, ...]


def statistics_hint(
    latent: torch.Tensor, config: WanVAEConfig, normalized: bool = False
) -> str | None:
    """The sentence of `mismatch`; None if there is none."""
    found = mismatch(latent, config, normalized)
    return None if found is None else found.sentence


def mismatch(
    latent: torch.Tensor, config: WanVAEConfig, normalized: bool = False
) -> Mismatch | None:
    """What tells that `latent` [B, z, T, H, W] is of the other kind; None if it does not look so.

    The kinds: normalised, each channel with mean 0 and standard deviation 1, as diffusers holds
    them (`normalized`); or as the VAE makes them, with the statistics in `config`, as ComfyUI does.
    Two signs must agree: which of the two normal distributions fits better, and whether the
    deviations of the channels follow those in `config` (slope 1 on a logarithmic scale) or not
    (slope 0), which does not depend on the contrast of the picture. It is a sign and no proof, so a
    sample of a large latent is enough, which is all that leaves a device.
    """
    if config.latents_mean is None or config.latents_std is None or 0 in latent.shape:
        return None
    if latent.ndim != 5 or latent.shape[1] != config.z_dim:
        return None  # another check has words for it
    values = _in_one_thread(_sample(latent.detach()))
    # NaN and inf are for other checks to say.
    with np.errstate(invalid="ignore", over="ignore"):
        values = np.moveaxis(values, 1, 0).reshape(config.z_dim, -1)
        mean = values.mean(axis=1)
        std = np.sqrt(np.square(values - mean[:, None]).mean(axis=1))
        if not (std > 1e-3).all() or not np.isfinite(std).all():
            return None  # a channel without contrast says nothing
    their_mean, their_std = np.array(config.latents_mean), np.array(config.latents_std)
    raw = np.log(their_std) + (std**2 + (mean - their_mean) ** 2) / (2 * their_std**2)
    closer = float((raw - (std**2 + mean**2) / 2).mean())  # above 0: the normalised kind fits
    theirs = np.log(their_std) - np.log(their_std).mean()
    slope = float((np.log(std) * theirs).sum() / (theirs * theirs).sum())
    looks_normalized = closer > _CLEARLY and slope < _NORMALIZED_SLOPE
    looks_raw = closer < -_CLEARLY and slope > _RAW_SLOPE
    if (normalized, looks_normalized, looks_raw) not in ((False, True, False), (True, False, True)):
        return None
    return Mismatch(
        _mismatch_sentence(std, their_std, slope, normalized),
        tuple(
            ChannelRecord(*map(float, numbers))
            for numbers in zip(mean, std, their_mean, their_std, strict=True)
        ),
    )


def _mismatch_sentence(
    std: np.ndarray[Any, Any], their_std: np.ndarray[Any, Any], slope: float, normalized: bool
) -> str:
    widest = int(their_std.argmax())
    numbers = said(
        "latent.deviations",
        "its channels have standard deviations of {least} to {most}, and those of this VAE "
        "{their_least} to {their_most} (channel {channel}: {own} and {theirs}; slope {slope}, "
        "where 1 means as ComfyUI holds latents and 0 normalised)",
        least=f"{std.min():.2f}",
        most=f"{std.max():.2f}",
        their_least=f"{their_std.min():.2f}",
        their_most=f"{their_std.max():.2f}",
        channel=widest,
        own=f"{std[widest]:.2f}",
        theirs=f"{their_std[widest]:.2f}",
        slope=f"{slope:.2f}",
    )
    if normalized:
        return said(
            "latent.looks_raw",
            "the latent looks as ComfyUI holds it: {numbers}; should `normalized` be off?",
            numbers=numbers,
        )
    return said(
        "latent.looks_normalised",
        "the latent looks normalised, as diffusers and WanVideoWrapper hold latents: {numbers}; "
        "should `normalized` be on?",
        numbers=numbers,
    )


def encode_notices(pixels: tuple[int, ...], channels: int, config: WanVAEConfig) -> tuple[str, ...]:
    """What an encode of pixels [B, C, T, H, W] does not use, in sentences with the numbers.

    channels: of the images, before all but the model's were dropped. Raises GeometryError.
    """
    notices = []
    _, _, frames, height, width = pixels
    kept = geometry.pixel_shape(geometry.latent_shape(pixels, config), config)
    if channels > max(config.colours, 3):
        if config.colours == 4:
            used = said("encode.rgba", "red, green, blue and alpha")
        else:
            used = said("encode.rgb", "red, green and blue")
        if channels == 4:
            ignored = said("encode.no_alpha", "alpha is ignored")
        else:
            left = channels - max(config.colours, 3)
            ignored = said("encode.fewer_channels", "{count} channels are ignored", count=left)
        notices.append(
            said(
                "encode.channels",
                "the images have {channels} channels: {used} are encoded, and {ignored}",
                channels=channels,
                used=used,
                ignored=ignored,
            )
        )
    if kept[2] != frames:
        notices.append(
            said(
                "encode.frames",
                "{kept} of {frames} frames are encoded: the last {left} are past {factor}n + 1",
                kept=kept[2],
                frames=frames,
                left=frames - kept[2],
                factor=config.temporal_factor,
            )
        )
    if kept[3:] != (height, width):
        notices.append(
            said(
                "encode.cropped",
                "cropped from {size} to {kept}: sizes are multiples of {factor}",
                size=f"{width}x{height}",
                kept=f"{kept[4]}x{kept[3]}",
                factor=config.spatial_factor,
            )
        )
    return tuple(notices)


def check_video_shape(shape: tuple[int, ...], config: WanVAEConfig) -> None:
    """Raise LatentError unless `shape` is [B, 3, T, H, W] of a video that this VAE encodes."""
    if len(shape) != 5 or shape[1] != config.colours:
        raise LatentError(
            said(
                "encode.shape",
                "the video is {shape}: expected [B, {colours}, T, H, W]",
                shape=shape,
                colours=config.colours,
            )
        )
    if 0 in shape:
        raise LatentError(
            said("encode.empty", "the video is empty: its shape is {shape}", shape=shape)
        )
    check_frames(shape[2], config, WHAT["video"])


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
    # Where they are computed with, in float32: a larger float64 is inf there.
    finite = torch.isfinite(x.float() if x.dtype == torch.float64 else x)
    finite = finite.all(dim=4).all(dim=3).all(dim=1).all(dim=0)
    bad = (~finite).nonzero().flatten().tolist()
    if not bad:
        return None
    shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    return LatentError(
        said(
            "latent.not_finite",
            "the {what} itself contains NaN or inf in {count} of {frames} frames ({shown}): "
            "{consequence}",
            what=what,
            count=len(bad),
            frames=len(finite),
            shown=shown,
            consequence=consequence,
        )
    )
