"""Reads any checkpoint of a Wan VAE into one canonical dict: the native keys that ComfyUI loads.

Reads safetensors, the original `.pth` (weights only: no pickle that runs code), and a diffusers
folder. All problems of a file are reported here, in one error, before a device is used; only the
numbers may be left to who copies them.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ..config import WanVAEConfig, detect_config
from ..errors import CheckpointError, NotAWanVAEError, first_line
from ..network.model import expected_shapes
from ..network.weights import suspects_of
from ..said import said, together
from .files import unreadable_reason
from .tensors import PYTORCH_SUFFIXES, missing_data, read_tensors

# Prefixes that trainers and bundles put in front of every key; another one is taken if it is the
# only one.
PREFIXES = (
    "first_stage_model.",
    "vae.",
    "module.",
    "model.",
    "_orig_mod.",
    "gen_model.",
    "generator.",
)
# Names under which trainers nest the weights in a PyTorch file, beside their own state.
_NESTED = ("state_dict", "model_state_dict", "gen_model", "generator", "model", "vae", "module")
_NESTED_DEPTH = 3
# Dtypes in which weights are stored. As in ComfyUI, they are cast to the compute dtype.
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAST_DTYPES = (
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
# Layers that a distillation trained beside the VAE, and that no decode or encode runs
# (Matrix-Game 3.0's MG-LightVAE: "dynamic_feature_projection_heads.0.weight").
_PROJECTION_HEAD = re.compile(r"\w*projection_heads?\.")
# What ComfyUI's and other tools' scaled float8 files have beside their weights.
_SCALES = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", ".comfy_quant")
# What holds a VAE in a folder: diffusers' names, the safe ones first, and Wan's own.
FOLDER_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bf16.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.safetensors.index.bf16.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.bin",
    "diffusion_pytorch_model.bin.index.json",
    "Wan2.1_VAE.pth",
    "Wan2.2_VAE.pth",
)
_INDEX = re.compile(r".+\.index(\.\w+)?\.json")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
_SUFFIXES = (".safetensors", ".sft", *PYTORCH_SUFFIXES)
# Classes of diffusers whose networks are made of these blocks.
DIFFUSERS_CLASSES = ("AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21")
# How many names an error lists; it only counts the others.
_LISTED = 6


@dataclass(frozen=True)
class Checkpoint:
    """Tensors under canonical keys, and how the file names them.

    notes: sentences about what of the file is not used.
    """

    state: dict[str, torch.Tensor]
    key_layout: Literal["native", "diffusers"]
    prefix: str
    path: Path | None
    config: WanVAEConfig
    notes: tuple[str, ...] = ()

    def check_numbers(self, suspects: Iterable[str]) -> None:
        """Raise CheckpointError if one of the tensors `suspects` holds NaN or inf.

        It is those of the file that are asked: a cast to float16 makes inf of a number that is
        none.
        """
        names = set(suspects)
        damaged = [k for k, v in self.state.items() if k in names and not _is_finite(v)]
        if damaged:
            error = _incomplete(
                self.config,
                said(
                    "vae.not_finite",
                    "NaN or inf in {names}: the file is damaged or was badly converted",
                    names=_some(damaged),
                ),
            )
            if self.path is None:
                raise error
            raise CheckpointError(
                said("vae.file", "{path}: {reason}", path=self.path, reason=error)
            )


def load_checkpoint(path: str | Path, *, check_numbers: bool = True) -> Checkpoint:
    """Read a checkpoint file or a diffusers folder (that of the VAE, or the one above `vae/`).

    safetensors files are memory-mapped: tensors are read when they are copied, or here, by
    `check_numbers` (see `canonical_state_dict`). Raises CheckpointError, or NotAWanVAEError for
    another model: one line that contains the path.
    """
    path = Path(path)
    try:
        checkpoint = canonical_state_dict(_read(_find_file(path)), check_numbers=check_numbers)
    except NotAWanVAEError as error:
        raise NotAWanVAEError(f"{path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return replace(checkpoint, path=path)


def canonical_state_dict(
    mapping: Mapping[str, torch.Tensor], *, check_numbers: bool = True
) -> Checkpoint:
    """Rename native, diffusers or prefixed keys to canonical ones and check every tensor.

    Returns references, except for two-dimensional kernels, which become the last slice of kernels
    over three frames. Tensors on the meta device, which have shapes but no data, are
    renamed too: no VAE can be made of them, but their keys can be looked up. Raises one
    CheckpointError that lists missing and extra tensors, wrong shapes and dtypes, and tensors with
    NaN or inf; NotAWanVAEError for another model.

    check_numbers: look for NaN and inf, for which every number is read. Who copies the tensors
    looks at them on the way (`network.weights.copied`) and asks `Checkpoint.check_numbers`.
    """
    if not isinstance(mapping, Mapping):
        raise CheckpointError(
            said(
                "vae.no_dict",
                "the state dict is a {kind}: expected a dict of tensors",
                kind=type(mapping).__name__,
            )
        )
    bad = [k for k, v in mapping.items() if not isinstance(k, str) or not torch.is_tensor(v)]
    if bad:
        raise CheckpointError(
            said(
                "vae.no_tensors",
                "not a state dict of tensors: {names} are something else",
                names=_some([str(k) for k in bad]),
            )
        )
    # First: they have no shape to ask for.
    nested = [f"{k} is nested" for k, v in mapping.items() if v.is_nested]
    if nested:
        raise CheckpointError(
            said("vae.not_dense", "{names}; expected dense tensors with data", names=_some(nested))
        )
    prefixes = _prefixes_of(mapping)
    if len(prefixes) > 1:
        raise CheckpointError(
            said(
                "vae.several",
                "contains {count} Wan VAEs, under {prefixes}: expected one",
                count=len(prefixes),
                prefixes=_some([repr(p) for p in prefixes]),
            )
        )
    prefix = prefixes[0] if prefixes else ""
    state = {k.removeprefix(prefix): v for k, v in mapping.items() if k.startswith(prefix)}
    key_layout: Literal["native", "diffusers"] = "native"
    if "decoder.mid_block.resnets.0.norm1.gamma" in state:
        key_layout = "diffusers"
        state = _native_keys(state)
    heads = [key for key in state if _PROJECTION_HEAD.match(key)]
    notes: tuple[str, ...] = ()
    if heads:
        ignored = said(
            "vae.heads",
            "{names}: ignored, as nothing runs these projection heads",
            names=_some(heads),
        )
        notes = (ignored,)
    state = _with_frames({k: v for k, v in state.items() if k not in set(heads)})
    config = detect_config(state)
    stored, state = state, _causal(state, config) if config.image_only else state
    _check(state, config)
    checkpoint = Checkpoint(state, key_layout, prefix, None, config)
    if check_numbers:
        checkpoint.check_numbers(suspects_of(state))
    if zeros := [key for key, value in stored.items() if _is_zero(key, value)]:
        notes = (
            *notes,
            f"{_some(zeros)}: nothing but zeros; if the picture is wrong, the download broke off "
            "with the full size",
        )
    return replace(checkpoint, notes=notes)


# -- keys -----------------------------------------------------------------------------------------

_MARKERS = ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma")


def _prefixes_of(mapping: Mapping[str, object]) -> list[str]:
    """The prefixes of the Wan VAEs in `mapping`: one, or more if there are several VAEs.

    A known prefix goes before others, as "model." before "ema." of its average.
    """
    candidates = {
        prefix
        for key in mapping
        for marker in _MARKERS
        if key.endswith(marker) and (prefix := key.removesuffix(marker))[-1:] in ("", ".")
    }
    known = [
        prefix
        for prefix in candidates
        if all(f"{part}." in PREFIXES for part in prefix.split(".") if part)
    ]
    return sorted(known or candidates)


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
    """Rename the keys of diffusers' AutoencoderKLWan; unknown ones are kept (and then refused).

    Raises CheckpointError where two keys name one tensor: which of them is meant, nobody can say.
    """
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
            block = f"{side}.{word}.{n}"
            if r := re.match(r"resnets\.(\d+)\.(.*)", rest):
                index, rest = int(r[1]), r[2]
            elif r := re.match(r"(?:up|down)sampler(?:s\.0)?\.(.*)", rest):
                index, rest = count, r[1]
            else:
                return f"{block}.{_resnet_part(rest)}"
            if by_stage:
                block = f"{block}.{word}.{index}"
            else:
                block = f"{side}.{word}.{n * (count + 1) + index}"
            return f"{block}.{_resnet_part(rest)}"
        side, dot, rest = key.partition(".")
        if side in ("encoder", "decoder"):
            for old, new in _FIXED.items():
                if rest.startswith(f"{old}."):
                    return f"{side}.{new}.{_resnet_part(rest.removeprefix(f'{old}.'))}"
            return key
        return f"{_FIXED.get(side, side)}{dot}{rest}"

    names = {key: rename(key) for key in state}
    counted = Counter(names.values())
    if twice := [key for key, name in names.items() if counted[name] > 1]:
        raise CheckpointError(
            said(
                "vae.twice",
                "holds tensors twice, under native and diffusers' names: {names}: expected one VAE",
                names=_some(twice),
            )
        )
    return {names[key]: value for key, value in state.items()}


def _resnet_part(rest: str) -> str:
    head, dot, tail = rest.partition(".")
    return f"{_RESNET.get(head, head)}{dot}{tail}"


# -- kernels of images ----------------------------------------------------------------------------

# The layers that are two-dimensional in every Wan VAE.
_FLAT_LAYER = re.compile(r"\.(resample\.1|to_qkv|proj|norm)\.")


def _with_frames(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the tensors of a VAE of images, [O, I, 3, 3] and [C, 1, 1], a dimension for frames.

    Views; other tensors are returned as they are.
    """
    head = state.get("decoder.head.2.weight")
    if head is None or head.ndim != 4:
        return dict(state)

    def with_frames(key: str, value: torch.Tensor) -> torch.Tensor:
        if _FLAT_LAYER.search(key):
            return value
        if key.endswith(".weight") and value.ndim == 4:
            return value.unsqueeze(2)
        return value.unsqueeze(1) if key.endswith(".gamma") and value.ndim == 3 else value

    return {key: with_frames(key, value) for key, value in state.items()}


def _causal(state: Mapping[str, torch.Tensor], config: WanVAEConfig) -> dict[str, torch.Tensor]:
    """The kernels of a VAE of images as those over three frames that give the same image.

    Exact: the frames before the first are zero, so what the other slices hold does not matter; they
    are zero here. The convolutions over time, which no image runs, may be missing.
    """
    made = dict(state)
    for key, shape in expected_shapes(config).items():
        value = made.get(key)
        if value is None and ".time_conv." in key:
            made[key] = made["decoder.head.2.weight"].new_zeros(shape)
        elif (
            value is not None
            and value.ndim == 5
            and tuple(value.shape)
            == (
                *shape[:2],
                1,
                *shape[3:],
            )
        ):
            past = value.new_zeros((*shape[:2], shape[2] - 1, *shape[3:]))
            made[key] = torch.cat((past, value), dim=2)
    return made


# -- checks ---------------------------------------------------------------------------------------


def _check(state: Mapping[str, torch.Tensor], config: WanVAEConfig) -> None:
    expected = expected_shapes(config)
    scales = [k for k in state if k.endswith(_SCALES) or k == "scaled_fp8"]
    if scales:
        raise CheckpointError(
            said(
                "vae.scaled",
                "scaled float8 weights ({names}): without their scales they give another "
                "picture; load the VAE in float16, bfloat16 or float32",
                names=_some(scales),
            )
        )
    missing = [k for k in expected if k not in state]
    extra = [k for k in state if k not in expected]
    shapes = [
        f"{k} is {tuple(state[k].shape)}, expected {shape}"
        for k, shape in expected.items()
        if k in state and tuple(state[k].shape) != shape
    ]
    problems = []
    if missing:
        problems.append(said("vae.missing", "missing {names}", names=_some(missing)))
    if extra:
        problems.append(said("vae.extra", "unknown {names}", names=_some(extra)))
    if shapes:
        problems.append(said("vae.shapes", "wrong shape: {names}", names=_some(shapes)))
    kinds = {k: missing_data(v) for k, v in state.items()}
    empty = [f"{k} is {kind}" for k, kind in kinds.items() if kind not in (None, "meta")]
    if empty:
        problems.append(
            said("vae.not_dense", "{names}; expected dense tensors with data", names=_some(empty))
        )
    known = (*FLOAT_DTYPES, *CAST_DTYPES)
    dtypes = [f"{k} is {v.dtype}" for k, v in state.items() if v.dtype not in known]
    if dtypes:
        problems.append(
            said(
                "vae.dtypes",
                "{names}; expected floating numbers of 8 to 64 bits",
                names=_some(dtypes),
            )
        )
    if problems:
        raise _incomplete(config, *problems)


def _incomplete(config: WanVAEConfig, *problems: str) -> CheckpointError:
    return CheckpointError(
        said(
            "vae.incomplete",
            "not a complete {family} VAE (z {channels}, width {width}): {problems}",
            family=config.family,
            channels=config.z_dim,
            width=config.decoder_dim,
            problems=together(problems),
        )
    )


def _is_zero(key: str, x: torch.Tensor) -> bool:
    """Whether a weight is all zeros; a look at its first output channel suffices for most."""
    if not key.endswith(".weight") or x.is_meta:
        return False
    return not any(bool(part.float().any()) for part in (x[:1], x))


def _is_finite(x: torch.Tensor) -> bool:
    # Float8 has no arithmetic; float64 is asked what remains of it.
    return bool(torch.isfinite(x if x.dtype in FLOAT_DTYPES else x.float()).all())


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    rest = len(names) - _LISTED
    if rest <= 0:
        return shown
    return said(
        "text.more",
        "{shown} and {rest} more ({count} in all)",
        shown=shown,
        rest=rest,
        count=len(names),
    )


# -- files ----------------------------------------------------------------------------------------


def _find_file(path: Path) -> Path:
    reason = unreadable_reason(path)
    if reason is None:
        return path
    if not os.path.isdir(path):
        raise CheckpointError(reason)
    for folder in (path, path / "vae"):
        config = folder / "config.json"
        if os.path.isfile(config):
            _check_diffusers_config(config)
        for name in FOLDER_FILES:
            if os.path.isfile(folder / name):
                return folder / name
    # Of another name, as transformers and ComfyUI's tools write it: the only one there.
    indices = [p for p in path.iterdir() if _INDEX.fullmatch(p.name)]
    if len(indices) == 1:
        return indices[0]
    files = sorted(p.name for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
    holds = f", with {_some(files)}" if files else ""
    raise CheckpointError(
        f"a folder without {FOLDER_FILES[0]}{holds}: pass a checkpoint file or a diffusers VAE "
        "folder"
    )


def _read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file; an empty one if it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not readable JSON: {first_line(error)}") from error
    return found if isinstance(found, dict) else {}


def _check_diffusers_config(path: Path) -> None:
    name = _read_json(path).get("_class_name")
    if name not in (None, *DIFFUSERS_CLASSES):
        raise NotAWanVAEError(
            f"config.json names the class {name}: expected {', '.join(DIFFUSERS_CLASSES[:-1])} or "
            f"{DIFFUSERS_CLASSES[-1]}"
        )


def _read(path: Path) -> dict[str, torch.Tensor]:
    if _INDEX.fullmatch(path.name):
        return _read_shards(path)
    if shard := _SHARD.fullmatch(path.name):
        raise CheckpointError(
            f"part {int(shard[2])} of a checkpoint of {int(shard[3])} files: pass "
            f"{shard[1]}{shard[4]}.index.json, or the folder"
        )
    return _read_file(path)


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    """Read the files that an index names, which are beside it: {"weight_map": {key: file}}."""
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError('an index without a "weight_map" of tensors to files')
    state: dict[str, torch.Tensor] = {}
    for name in sorted({str(value) for value in files.values()}):
        # Only files beside the index, whatever a hostile one says.
        part = index.with_name(name) if name == os.path.basename(name) else None
        if part is None or _SHARD.fullmatch(name) is None:
            raise CheckpointError(f"an index that names {name!r}: expected files beside it")
        if reason := unreadable_reason(part):
            raise CheckpointError(f"its part {name}: {reason}")
        try:
            state |= _read_file(part)
        except CheckpointError as error:
            raise CheckpointError(f"its part {name}: {error}") from error
    missing = [str(key) for key in files if key not in state]
    if missing:
        raise CheckpointError(f"the parts lack {_some(missing)}, which the index names")
    return state


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, found where trainers nest them."""
    loaded = read_tensors(path, "VAE")
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"contains a {type(loaded).__name__}: expected a dict of tensors")
    for _ in range(_NESTED_DEPTH):  # a pickle can hold a dict that holds itself
        nested = [loaded[k] for k in _NESTED if isinstance(loaded.get(k), Mapping)]
        if not nested:  # under another name, if only one holds a VAE
            others = [v for v in loaded.values() if isinstance(v, Mapping) and _holds_a_vae(v)]
            nested = others if len(others) == 1 else []
        loaded = nested[0] if nested else loaded
    return dict(loaded)


def _holds_a_vae(mapping: Mapping[object, object]) -> bool:
    return any(isinstance(key, str) and key.endswith(_MARKERS) for key in mapping)
