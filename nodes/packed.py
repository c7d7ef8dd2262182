"""Our packed copies of VAE weights, one for the same weights, dtype and device.

A copy is packed for the layout that was decided and lives in a plain ModelPatcher, so that ComfyUI
counts it, unloads it under pressure and brings it back. Nothing of ComfyUI's own model is touched:
its weights may be memory-mapped, offloaded or cast while they are used.

A copy is found by the fingerprint of the weights, not by the VAE object: two loaders of one file
share it, and a VAE that is loaded again (--cache-none) finds it with all its kernels prepared. It
goes:
- when nobody can ask for it: the weights of its VAE have changed, and no other VAE has these;
- when no VAE with these weights is alive and ComfyUI has unloaded the copy, in either order;
- when there are more than MAX_COPIES, the one that was not used for the longest time, those without
  a VAE first.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import comfy.model_management as model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP

from ..wan_vae import BackendError, WanVAE, WanVAEError
from ..wan_vae.device import DTYPES
from ..wan_vae.io.fingerprint import Look, fingerprint, is_elsewhere
from ..wan_vae.options import PRECISIONS
from ..wan_vae.runs.engine import count_weight_formats
from ..wan_vae.said import expected_one_of
from ..wan_vae.walk import parameters
from .device_memory import ComfyMemory, loaded
from .free_memory import believed_free_bytes
from .weights import state_of

# A workflow may use both generations of Wan, or one of them in two precisions. A copy of Wan 2.1 in
# bfloat16 is 0.24 GiB, of Wan 2.2 1.3 GiB.
MAX_COPIES = 3
# How many times the bytes of a VAE's weights must be free on its device for a copy made there: for
# the copy, the part of it that is not cast yet, and what ComfyUI keeps free.
_ROOM = 6


@dataclass(frozen=True)
class Key:
    """Which weights a copy is made of, and for which dtype and device."""

    source: bytes | None
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Packed:
    """A copy of one VAE's weights, and the patcher through which ComfyUI moves it.

    `models`: the networks of ComfyUI that have these weights and are alive.
    """

    wan: WanVAE
    patcher: comfy.model_patcher.ModelPatcher
    device: torch.device
    models: weakref.WeakSet[torch.nn.Module] = field(default_factory=weakref.WeakSet)

    def load(self, memory_bytes: int) -> None:
        """Bring the weights to the device and have ComfyUI free `memory_bytes` beside them."""
        model_management.load_models_gpu(
            [self.patcher], memory_required=memory_bytes, force_full_load=True
        )
        # A partial unload may have left some modules behind, which a patcher that thinks itself
        # loaded does not bring back. Only then: moving a model drops its prepared kernels.
        if not self._is_on_device:
            self.wan.model.to(self.device)

    @property
    def is_ready(self) -> bool:
        """Whether all weights are on the device and ComfyUI counts them there."""
        return self.is_loaded and self._is_on_device

    @property
    def _is_on_device(self) -> bool:
        device = torch.empty(0, device=self.device).device  # "cuda" is the current one
        return all(weight.device == device for weight in parameters(self.wan.model))

    @property
    def memory(self) -> ComfyMemory:
        """Who says what is free beside the weights, and gives memory back."""
        return ComfyMemory(self.device, self.patcher)

    @property
    def is_wanted(self) -> bool:
        """Whether a VAE with these weights is alive."""
        return any(True for _ in self.models)

    @property
    def is_loaded(self) -> bool:
        """Whether ComfyUI counts it among its loaded models."""
        return bool(loaded(self.patcher))


@dataclass(frozen=True)
class _Known:
    """The weights of a network when they were looked at last: their fingerprint, how they lay, from
    the second look on, and how many are in each memory format, once there was a copy of them."""

    source: bytes
    look: Look | None = None
    formats: dict[str, dict[str, int]] | None = None


class PackedCopies:
    """The copies that there are, the least recently used first. Keeps no VAE alive."""

    def __init__(self, limit: int = MAX_COPIES) -> None:
        self._limit = limit
        self._copies: OrderedDict[Key, Packed] = OrderedDict()
        # What is known of each network of ComfyUI that is alive.
        self._sources: weakref.WeakKeyDictionary[torch.nn.Module, _Known] = (
            weakref.WeakKeyDictionary()
        )

    def assumed(self, vae: Any, precision: str) -> Packed | None:
        """The copy of `vae` of the last run, not looked at: it may be of what the weights were, see
        `is_right`. None where there is none, or where a look would not be quick."""
        model = getattr(vae, "first_stage_model", None)
        last = self._sources.get(model) if isinstance(model, torch.nn.Module) else None
        if last is None or last.look is None or not (precision == "auto" or precision in DTYPES):
            return None
        key = Key(last.source, _dtype(vae, precision), vae.device)
        packed = self._copies.get(key)
        if packed is None or last.formats is None:
            return None
        self._copies.move_to_end(key)
        packed.wan.engine.weights_found = last.formats
        return packed

    def is_right(self, vae: Any, packed: Packed) -> bool:
        """Whether `packed`, which was `assumed`, is a copy of the weights of `vae` as they are."""
        last = self._sources.get(vae.first_stage_model)
        if last is None or last.look is None:
            return False
        # Another thread may have looked since, and found other weights.
        sources = (key.source for key, copy in self._copies.items() if copy is packed)
        try:
            return last.source in sources and last.look.is_still_true(state_of(vae))
        except WanVAEError:
            return False

    def get(
        self,
        vae: Any,
        precision: str,
        packing: Callable[[], AbstractContextManager[object]] = nullcontext,
        *,
        loads: bool = False,
    ) -> Packed:
        """Our copy of `vae` (a comfy.sd.VAE) in `precision`; "auto" is ComfyUI's choice for it.

        packing: entered while one is made, which takes long. loads: it will be loaded next.
        It is made anew when another node has changed the weights since. Raises BackendError for an
        unknown precision, NotAWanVAEError with the name of the model it is, and CheckpointError.
        """
        if precision != "auto" and precision not in DTYPES:
            raise BackendError(expected_one_of("precision", precision, PRECISIONS))
        state = state_of(vae)
        model = vae.first_stage_model
        source = self._source(model, state)
        dtype = _dtype(vae, precision)
        key = Key(source, dtype, vae.device)
        if key not in self._copies:
            with packing():
                self._make_room()  # first: two would take twice the memory
                self._copies[key] = _pack(vae, state, dtype, loads)
            self._copies[key].patcher.add_callback(
                CallbacksMP.ON_DETACH, partial(self._unloaded, key)
            )
        self._copies.move_to_end(key)
        packed = self._copies[key]
        packed.models.add(model)
        # Not part of the fingerprint: each VAE may hold the same numbers in another format.
        known = self._sources.get(model)
        formats = None if known is None else known.formats
        if formats is None:
            formats = count_weight_formats(state)
            if known is not None:
                self._sources[model] = replace(known, formats=formats)
        packed.wan.engine.weights_found = formats
        return packed

    def _source(self, model: torch.nn.Module, state: dict[str, torch.Tensor]) -> bytes | None:
        """The fingerprint of `model`'s weights, and what follows from a change of it.

        Weights that are not in memory now are taken for those that were read last.
        """
        last = self._sources.get(model)
        known = None if last is None else last.source
        if last is not None and last.look is not None and last.look.is_still_true(state):
            return known
        source = fingerprint(state)
        if source is None:
            return known if is_elsewhere(state) else None  # what cannot be copied is refused there
        if known is None:
            weakref.finalize(model, self._sweep).atexit = False
        elif known != source:
            for packed in self._copies.values():
                packed.models.discard(model)
            self._drop_where(lambda key, packed: key.source == known and not packed.is_wanted)
        # A look from the second time on: to make one takes longer than a fingerprint.
        look = Look.of(state) if known == source else None
        self._sources[model] = _Known(source, look)
        return source

    def _make_room(self) -> None:
        while len(self._copies) >= self._limit:
            oldest = [key for key, packed in self._copies.items() if not packed.is_wanted]
            self._copies.pop((oldest or list(self._copies))[0])

    def _sweep(self) -> None:
        """After the death of a VAE: drop copies that nobody wants and ComfyUI does not count."""
        self._drop_where(lambda _, packed: not packed.is_wanted and not packed.is_loaded)

    def _drop_where(self, is_due: Any) -> None:
        for key, packed in list(self._copies.items()):
            if is_due(key, packed):
                self._copies.pop(key, None)

    def _unloaded(self, key: Key, patcher: Any, unpatch_all: bool) -> None:
        """ComfyUI gives the device memory of a copy back; `unpatch_all` is False if it only
        reorders its list."""
        packed = self._copies.get(key)
        if packed is None or packed.patcher is not patcher or not unpatch_all:
            return
        if not packed.is_wanted:
            del self._copies[key]
            # ComfyUI names the model that it has unloaded: it must live until it is off the list.
            for entry in loaded(patcher):
                weakref.finalize(entry, _let_go, packed).atexit = False


def _let_go(_packed: Packed) -> None:
    """The last reference to a copy ends here."""


# A node has no object of its own that outlives a prompt: what must is kept by the module.
COPIES = PackedCopies()


def _dtype(vae: Any, precision: str) -> torch.dtype:
    dtype: torch.dtype = vae.vae_dtype if precision == "auto" else DTYPES[precision]
    return dtype


def _pack(vae: Any, state: dict[str, torch.Tensor], dtype: torch.dtype, loads: bool) -> Packed:
    offload_device = model_management.vae_offload_device()
    place = vae.device if loads and _has_room(vae.device, state) else offload_device
    # Nodes run in inference mode; tensors made in it could not be moved outside of it, where
    # ComfyUI loads and unloads models.
    with torch.inference_mode(False), torch.no_grad():
        wan = WanVAE.from_state_dict(state, device=place, dtype=dtype)
    patcher = comfy.model_patcher.ModelPatcher(
        wan.model, load_device=vae.device, offload_device=offload_device
    )
    return Packed(wan, patcher, vae.device)


def _has_room(device: torch.device, state: dict[str, torch.Tensor]) -> bool:
    """Whether `device` takes a copy without a question to ComfyUI, which does not count it yet.

    Made there, a copy of Wan 2.1 takes a fifth of the time that the host needs to cast it. Where
    memory is short, ComfyUI must make room first, and the copy is made on the host.
    """
    if device.type != "cuda":
        return False
    free = believed_free_bytes(device, model_management.get_free_memory(device))
    return free >= _ROOM * sum(tensor.nbytes for tensor in state.values())
