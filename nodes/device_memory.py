"""The device memory of our runs where ComfyUI manages it: what is free, and who gives some back."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import comfy.model_management as model_management
import torch

from ..wan_vae.device import free_bytes as device_free_bytes
from .free_memory import believed_free_bytes


class ComfyMemory:
    """A `hooks.DeviceMemory`: the memory of `device`, on which the model of `patcher` must stay."""

    def __init__(self, device: torch.device, patcher: Any) -> None:
        self._device, self._patcher = device, patcher

    def free_bytes(self) -> int | None:
        """The smaller number of ComfyUI's and ours; None where nobody knows."""
        told = believed_free_bytes(self._device, model_management.get_free_memory(self._device))
        counts = (None if told == math.inf else int(told), device_free_bytes(self._device))
        return min((n for n in counts if n is not None), default=None)

    def give_back(self, wanted_bytes: int) -> None:
        """Collect garbage, empty the allocator's pool, then have ComfyUI move other models away.

        ComfyUI counts the pool as free. It must be empty before: what lies in it in pieces would
        keep ComfyUI from moving anything.
        """
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
            found[f"ComfyUI's {type(patcher.model).__name__}"] += int(entry.model_loaded_memory())
        return dict(found)


def loaded(patcher: Any) -> list[Any]:
    """The entry of `patcher` among ComfyUI's loaded models, if it is there."""
    return [entry for entry in model_management.current_loaded_models if entry.model is patcher]
