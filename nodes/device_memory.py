"""The device memory of our runs where ComfyUI manages it: what is free, and who gives some back."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import comfy.model_management as model_management
import torch

from ..wan_vae.device import allocated_bytes
from ..wan_vae.device import free_bytes as device_free_bytes
from ..wan_vae.said import said
from .free_memory import believed_free_bytes


class ComfyMemory:
    """A `hooks.DeviceMemory`: the memory of `device`, on which the model of `patcher` must stay."""

    def __init__(self, device: torch.device, patcher: Any) -> None:
        self._device, self._patcher = device, patcher
        # What was free, and what this process had allocated then; see `has`.
        self._seen: tuple[int | None, int] | None = None

    def has(self, needed_bytes: int) -> bool:
        """Whether so much is free that ComfyUI, asked for `needed_bytes`, would move no model away.

        ComfyUI would find that out too, by asking the driver several times, whose answer may take
        longer than a small decode. It is asked once here, and the answer kept for the run that
        follows at once: see `free_bytes`.
        """
        if getattr(model_management, "DISABLE_SMART_MEMORY", False):
            return False  # it moves all others away before each run
        self._seen = self._ask(), allocated_bytes(self._device)
        asked = needed_bytes + model_management.extra_reserved_memory()
        free, wanted = self._seen[0], max(asked, model_management.minimum_inference_memory())
        if free is None or free < wanted:
            self._seen = None
            return False
        return True

    def free_bytes(self) -> int | None:
        """The smaller number of ComfyUI's and ours; None where nobody knows.

        Right after `has` what that found, less what this process has allocated since.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            return self._ask()
        free, allocated = seen
        return None if free is None else max(0, free + allocated - allocated_bytes(self._device))

    def _ask(self) -> int | None:
        whole, pool = model_management.get_free_memory(self._device, torch_free_too=True)
        told = believed_free_bytes(self._device, whole)
        # On a CUDA device ComfyUI has added what is free in PyTorch's pool to the driver's answer.
        own = device_free_bytes(self._device, int(whole - pool))
        counts = (None if told == math.inf else int(told), own)
        return min((n for n in counts if n is not None), default=None)

    def give_back(self, wanted_bytes: int) -> None:
        """Collect garbage, empty the allocator's pool, then have ComfyUI move other models away.

        ComfyUI counts the pool as free. It must be empty before: what lies in it in pieces would
        keep ComfyUI from moving anything.
        """
        self._seen = None
        gc.collect()
        model_management.soft_empty_cache()
        model_management.free_memory(wanted_bytes, self._device, keep_loaded=loaded(self._patcher))
        model_management.soft_empty_cache()

    def held(self) -> Mapping[str, int]:
        """Bytes of the other models that ComfyUI has loaded here, by the name of their class."""
        found: Counter[str] = Counter()
        for entry in model_management.current_loaded_models:
            patcher = entry.model
            if patcher is None or patcher is self._patcher or entry.device != self._device:
                continue
            name = said("memory.comfyui", "ComfyUI's {name}", name=type(patcher.model).__name__)
            found[name] += int(entry.model_loaded_memory())
        return dict(found)


def loaded(patcher: Any) -> list[Any]:
    """The entry of `patcher` among ComfyUI's loaded models, if it is there."""
    return [entry for entry in model_management.current_loaded_models if entry.model is patcher]
