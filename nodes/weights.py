"""The weights of a comfy.sd.VAE as it was loaded, and what else of it our network does not follow.

Other packs copy a VAE object and put patches into its patcher. An object patch replaces a module
while the VAE is loaded, so that the state dict has other names and numbers then.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Container, Hashable, Iterable
from inspect import isfunction
from typing import Any, cast

import comfy.model_management as model_management
import comfy.sd
import torch

from ..wan_vae import CheckpointError, NotAWanVAEError, walk
from ..wan_vae.device import dtype_name
from ..wan_vae.said import said

# What a VAE computes with; a class or an object that replaces one of them is not followed.
METHODS = ("decode", "decode_tiled", "encode", "encode_tiled")
# Names in a sentence; the others are counted.
NAMED = 3


def has_weights(vae: Any) -> bool:
    """Whether `vae` holds a network: a checkpoint without a VAE gives one that does not."""
    return getattr(vae, "first_stage_model", None) is not None


def state_of(vae: Any) -> dict[str, torch.Tensor]:
    """The state dict of `vae` without its object patches, also while they are applied.

    Raises NotAWanVAEError for a VAE without weights, and CheckpointError for one whose weights are
    patched (as a LoRA does it): a copy of unpatched weights would give another picture.
    """
    model = getattr(vae, "first_stage_model", None)
    if not has_weights(vae):
        raise NotAWanVAEError(
            said(
                "vae.no_weights",
                "this VAE holds no weights (the checkpoint that it was loaded from has no VAE): "
                "load a Wan VAE file with Load VAE",
            )
        )
    patched = getattr(getattr(vae, "patcher", None), "patches", {})
    if patched:
        raise CheckpointError(
            said(
                "vae.patched",
                "another node has patched {count} weights of this VAE ({names}), which a copy of "
                "its weights cannot follow: use ComfyUI's own VAE nodes for this one",
                count=len(patched),
                names=_names(patched),
            )
        )
    state = _own_state(vae)
    # Several patchers may share one network. The one that is loaded has patched it, and the VAE's
    # own may have left its patches there when another one was loaded.
    loaded = [entry.model for entry in model_management.current_loaded_models]
    for patcher in (getattr(vae, "patcher", None), *loaded):
        if patcher is not None and patcher.model is model:
            for name, original in patcher.object_patches_backup.items():
                _put_back(state, name, original)
    return state


def _own_state(vae: Any) -> dict[str, torch.Tensor]:
    """`vae.get_sd()`, in a tenth of its time where that is the state dict of plain modules."""
    model = vae.first_stage_model
    is_own = "get_sd" not in vars(vae) and getattr(type(vae), "get_sd", None) is comfy.sd.VAE.get_sd
    state = walk.plain_state(model) if is_own else None
    return dict(vae.get_sd()) if state is None else state


def _put_back(state: dict[str, torch.Tensor], name: str, original: object) -> None:
    if isinstance(original, torch.Tensor):
        state[name] = original
    elif isinstance(original, torch.nn.Module):
        for key in [key for key in state if key.startswith(f"{name}.")]:
            del state[key]
        state.update({f"{name}.{key}": value for key, value in original.state_dict().items()})


def ignored(vae: Any) -> list[str]:
    """Sentences about what `vae` has beside its weights and we do not use; mostly none."""
    sentences: list[str] = []
    patches = getattr(getattr(vae, "patcher", None), "object_patches", {})
    if patches:
        sentences.append(
            said(
                "vae.object_patches",
                "{count} object patches of this VAE are ignored ({names}): they replace modules of "
                "ComfyUI's network, and ours runs instead",
                count=len(patches),
                names=_names(patches),
            )
        )
    methods = replaced_methods(vae)
    if methods:
        sentences.append(
            said(
                "vae.methods",
                "another pack replaced {methods} of this VAE: that is ignored, ours runs",
                methods=", ".join(methods),
            )
        )
    changed = _changed_modules(getattr(vae, "first_stage_model", None))
    if changed:
        sentences.append(
            said(
                "vae.modules",
                "another pack changed how {count} modules of this VAE compute ({names}): that is "
                "ignored, ours run",
                count=len(changed),
                names=_names(changed),
            )
        )
    return sentences


# What PyTorch keeps of hooks in a module that have a say in its result.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _changed_modules(model: torch.nn.Module | None) -> list[str]:
    """Modules of `model` with a method of their own in place of their class's, or with hooks."""
    changed = []
    for name, module in () if model is None else walk.named_modules(model):
        own = vars(module)
        methods = _methods_of(cast(Hashable, type(module)))
        # Nearly always: these few questions of 300 modules are what each run waits for.
        if methods.isdisjoint(own) and not own[_HOOKS[0]] and not own[_HOOKS[1]]:
            continue
        replaced = sorted(key for key in methods & own.keys() if callable(own[key]))
        hooks = [key.strip("_") for key in _HOOKS if own[key]]
        changed += [f"{name}.{key}".strip(".") for key in (*replaced, *hooks)]
    return changed


@functools.lru_cache(maxsize=256)
def _methods_of(cls: Hashable) -> frozenset[str]:
    """The names of all functions that the class `cls` has or inherits."""
    functions = (vars(base).items() for base in cast(type, cls).__mro__)
    return frozenset(name for items in functions for name, value in items if isfunction(value))


def replaced_methods(vae: Any) -> list[str]:
    """Which of METHODS another pack replaced, in a subclass of ComfyUI's VAE or in the object."""
    options = getattr(vae, "wan_vae", None)  # of an accelerated VAE
    owners: list[Container[str]] = [getattr(vae, "__dict__", {}), getattr(options, "replaced", ())]
    for cls in type(vae).__mro__[:-1]:
        if cls.__module__ != "comfy.sd" and not cls.__module__.startswith(str(__package__)):
            owners.append(vars(cls))
    return [name for name in METHODS if any(name in owner for owner in owners)]


def _names(patches: Iterable[Any]) -> str:
    names = sorted(map(str, patches))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def weight_dtypes(vae: Any) -> dict[str, int]:
    """How many tensors of the VAE, as ComfyUI holds it, are of each dtype: {"float32": 194}."""
    return dict(Counter(dtype_name(t.dtype) for t in vae.get_sd().values()))
