"""Any checkpoint of a Wan VAE -> one canonical dict (the native keys that ComfyUI loads).

Reads safetensors, the original `.pth` (weights only: no pickle that runs code), and a diffusers
folder. Everything wrong with a file is found here, in one error, before a device is touched.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open

from ..config import WanVAEConfig, detect_config, identify_other_model
from ..errors import CheckpointError, NotAWanVAEError, first_line
from ..network.model import expected_shapes
from .files import why_unreadable

# Wrappers that trainers and bundles put in front of every key.
PREFIXES = ("first_stage_model.", "vae.", "module.", "model.", "_orig_mod.")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bf16.safetensors",
)
# How many names an error lists before it only counts the rest.
_LISTED = 6


@dataclass(frozen=True)
class Checkpoint:
    """Tensors under canonical keys, and how they were found."""

    state: dict[str, torch.Tensor]
    key_layout: Literal["native", "diffusers"]
    prefix: str
    path: Path | None
    config: WanVAEConfig


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file, or a diffusers folder (also the folder that holds `vae/`).

    safetensors files are memory-mapped: tensors are read when they are copied. Raises
    CheckpointError, or NotAWanVAEError for another model; one line, with the path.
    """
    path = Path(path)
    try:
        file = _find_file(path)
        state = _read(file)
        found = canonical_state_dict(state)
    except NotAWanVAEError as error:
        raise NotAWanVAEError(f"{path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Checkpoint(found.state, found.key_layout, found.prefix, path, found.config)


def canonical_state_dict(mapping: Mapping[str, torch.Tensor]) -> Checkpoint:
    """Rename native, diffusers or prefixed keys to canonical ones and check every tensor.

    Returns references, no copies. Tensors on the meta device, which have shapes and no data, are
    renamed too: no VAE can be made of them, but keys can be looked up. Raises one CheckpointError
    that lists missing, extra and mis-shaped tensors, wrong dtypes, and tensors with NaN or inf;
    NotAWanVAEError for another model.
    """
    if not isinstance(mapping, Mapping):
        raise CheckpointError(
            f"the state dict is a {type(mapping).__name__}: expected a dict of tensors"
        )
    bad = [k for k, v in mapping.items() if not isinstance(k, str) or not torch.is_tensor(v)]
    if bad:
        raise CheckpointError(
            f"not a state dict of tensors: {_some([str(k) for k in bad])} hold something else"
        )
    prefixes = _prefixes_of(mapping)
    if len(prefixes) > 1:
        raise CheckpointError(
            f"holds {len(prefixes)} Wan VAEs, under {_some([repr(p) for p in prefixes])}: "
            "expected one"
        )
    prefix = prefixes[0] if prefixes else ""
    state = {k.removeprefix(prefix): v for k, v in mapping.items() if k.startswith(prefix)}
    key_layout: Literal["native", "diffusers"] = "native"
    if "decoder.mid_block.resnets.0.norm1.gamma" in state:
        key_layout = "diffusers"
        state = _native_keys(state)
    config = detect_config(state)
    _check(state, config)
    return Checkpoint(state, key_layout, prefix, None, config)


# -- keys -----------------------------------------------------------------------------------------

_MARKERS = ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma")


def _prefixes_of(mapping: Mapping[str, object]) -> list[str]:
    """The wrappers in front of all keys of a Wan VAE: one, or more if there are several VAEs."""
    found = {
        key.removesuffix(marker) for key in mapping for marker in _MARKERS if key.endswith(marker)
    }
    return sorted(
        prefix
        for prefix in found
        if all(f"{part}." in PREFIXES for part in prefix.split(".") if part)
    )


_RESNET = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_FIXED = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    "conv_in": "conv1",
    "norm_out": "head.0",
    "conv_out": "head.2",
    "mid_block.resnets.0": "middle.0",
    "mid_block.attentions.0": "middle.1",
    "mid_block.resnets.1": "middle.2",
}


def _native_keys(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Diffusers' AutoencoderKLWan keys -> native keys. Unknown keys stay as they are (extra)."""
    # Wan 2.1 numbers blocks and resamplers of all stages in one list; Wan 2.2 by stage.
    by_stage = any(k.startswith("encoder.down_blocks.0.resnets.") for k in state) or any(
        re.match(r"decoder\.up_blocks\.\d+\.upsampler\.", k) for k in state
    )
    blocks = {
        side: 1
        + max(
            (int(m[1]) for k in state if (m := re.match(rf"{side}\.\d+\.resnets\.(\d+)\.", k))),
            default=0,
        )
        for side in (r"decoder\.up_blocks", r"encoder\.down_blocks")
    }
    ups, downs = blocks[r"decoder\.up_blocks"], blocks[r"encoder\.down_blocks"]

    def rename(key: str) -> str:
        if m := re.match(r"(encoder|decoder)\.(?:up|down)_blocks\.(\d+)\.(.*)", key):
            side, n, rest = m[1], int(m[2]), m[3]
            word, count = ("upsamples", ups) if side == "decoder" else ("downsamples", downs)
            place = f"{side}.{word}.{n}"
            if r := re.match(r"resnets\.(\d+)\.(.*)", rest):
                index, rest = int(r[1]), r[2]
            elif r := re.match(r"(?:up|down)sampler(?:s\.0)?\.(.*)", rest):
                index, rest = count, r[1]
            else:
                return f"{place}.{_resnet_part(rest)}"
            if by_stage:
                place = f"{place}.{word}.{index}"
            else:
                place = f"{side}.{word}.{n * (count + 1) + index}"
            return f"{place}.{_resnet_part(rest)}"
        side, dot, rest = key.partition(".")
        if side in ("encoder", "decoder"):
            for old, new in _FIXED.items():
                if rest.startswith(f"{old}."):
                    return f"{side}.{new}.{_resnet_part(rest.removeprefix(f'{old}.'))}"
            return key
        return f"{_FIXED.get(side, side)}{dot}{rest}"

    return {rename(k): v for k, v in state.items()}


def _resnet_part(rest: str) -> str:
    head, dot, tail = rest.partition(".")
    return f"{_RESNET.get(head, head)}{dot}{tail}"


# -- checks ---------------------------------------------------------------------------------------


def _check(state: Mapping[str, torch.Tensor], config: WanVAEConfig) -> None:
    expected = expected_shapes(config)
    missing = [k for k in expected if k not in state]
    extra = [k for k in state if k not in expected]
    shapes = [
        f"{k} is {tuple(state[k].shape)}, expected {shape}"
        for k, shape in expected.items()
        if k in state and tuple(state[k].shape) != shape
    ]
    problems = []
    if missing:
        problems.append(f"missing {_some(missing)}")
    if extra:
        problems.append(f"unknown {_some(extra)}")
    if shapes:
        problems.append(f"wrong shape: {_some(shapes)}")
    kinds = {k: without_data(v) for k, v in state.items()}
    empty = [f"{k} is {kind}" for k, kind in kinds.items() if kind not in (None, "meta")]
    if empty:
        problems.append(f"{_some(empty)}; expected dense tensors with data")
    dtypes = [f"{k} is {v.dtype}" for k, v in state.items() if v.dtype not in FLOAT_DTYPES]
    if dtypes:
        problems.append(f"{_some(dtypes)}; expected float32, float16 or bfloat16")
    if not problems:
        # Reads every byte once; a memory-mapped file is read here instead of at the copy.
        real = {k: v for k, v in state.items() if not v.is_meta}
        not_finite = [k for k, v in real.items() if not bool(torch.isfinite(v).all())]
        if not_finite:
            problems.append(
                f"NaN or inf in {_some(not_finite)}: the file is damaged or was badly converted"
            )
    if problems:
        raise CheckpointError(
            f"not a complete {config.family} VAE (z {config.z_dim}, width {config.decoder_dim}): "
            + "; ".join(problems)
        )


def without_data(x: torch.Tensor) -> str | None:
    """What kind of tensor `x` is, if not one whose elements all lie in memory, as ours must."""
    if x.is_nested:  # first: the other questions are errors to some of them
        return "nested"
    if x.layout != torch.strided:
        return f"sparse ({x.layout})"
    if any(t.__name__ == "FakeTensor" for t in type(x).__mro__):
        return "fake"
    return "meta" if x.is_meta else None


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    rest = len(names) - _LISTED
    return f"{shown} and {rest} more ({len(names)} in all)" if rest > 0 else shown


# -- files ----------------------------------------------------------------------------------------


def _find_file(path: Path) -> Path:
    reason = why_unreadable(path)
    if reason is None:
        return path
    if not os.path.isdir(path):
        raise CheckpointError(reason)
    for folder in (path, path / "vae"):
        config = folder / "config.json"
        if os.path.isfile(config):
            _check_diffusers_config(config)
        for name in DIFFUSERS_FILES:
            if os.path.isfile(folder / name):
                return folder / name
    raise CheckpointError(
        f"a folder without {DIFFUSERS_FILES[0]}: pass a checkpoint file or a diffusers VAE folder"
    )


def _check_diffusers_config(path: Path) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path.name} is not readable JSON: {error}") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in (None, "AutoencoderKLWan", "AutoencoderKLQwenImage"):
        raise NotAWanVAEError(
            f"config.json names the class {name}: expected AutoencoderKLWan "
            "(or AutoencoderKLQwenImage, the same network)"
        )


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        with path.open("rb") as f:
            start = f.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}") from error
    if not start:
        raise CheckpointError("the file is empty")
    # By content first: people rename files. A safetensors header begins with a brace, a pickle
    # with its protocol byte.
    if start[8:] != b"{" and (
        zipfile.is_zipfile(path)
        or start[:1] == b"\x80"
        or path.suffix in (".pth", ".pt", ".ckpt", ".bin")
    ):
        return _read_pth(path)
    return read_safetensors(path, start[:8])


def read_safetensors(path: Path, start: bytes | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, memory-mapped. Raises CheckpointError.

    The claimed header size is held against the file's before anything is parsed, so that a
    hostile header cannot make this allocate.
    """
    if start is None:
        with path.open("rb") as f:
            start = f.read(8)
    size = path.stat().st_size
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else None
    if header is None or header > size - 8:
        raise CheckpointError(
            f"not a safetensors file, or cut short: {size} bytes"
            + ("" if header is None else f", but its header claims {header}")
        )
    try:
        with safe_open(str(path), framework="pt", device="cpu") as f:
            return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        # AttributeError / KeyError: a dtype that this torch has no name for.
        raise CheckpointError(f"not a readable safetensors file: {first_line(error)}") from error


def _read_pth(path: Path) -> dict[str, torch.Tensor]:
    """A PyTorch file of plain tensors. `weights_only`: unpickling can construct nothing else."""
    try:
        # A file object, because torch.load takes a path's suffix for its content.
        with path.open("rb") as f:
            loaded = torch.load(f, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "refused: the pickle holds more than tensors and could run code "
            f"({first_line(error)}); convert it to safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError,
            IndexError, AssertionError, UnicodeDecodeError, struct.error, OverflowError,
            MemoryError, zipfile.BadZipFile) as error:  # fmt: skip
        # What torch.load raises for damaged files depends on where the damage is.
        raise CheckpointError(f"not a readable PyTorch file: {first_line(error)}") from error
    for key in ("state_dict", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"holds a {type(loaded).__name__}: expected a dict of tensors")
    return dict(loaded)


__all__ = [
    "Checkpoint",
    "canonical_state_dict",
    "identify_other_model",
    "load_checkpoint",
    "read_safetensors",
    "without_data",
]
