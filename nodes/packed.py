"""Our packed copy of a VAE's weights, for each VAE object of ComfyUI and each dtype.

The copy is packed for the layout that was decided and lives in a plain ModelPatcher, so that
ComfyUI counts it, unloads it under pressure and brings it back. Nothing of ComfyUI's own model is
touched: its weights may be memory-mapped, offloaded or cast while they are used.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import comfy.model_management as model_management
import comfy.model_patcher
import torch

from ..wan_vae import BackendError, NotAWanVAEError, WanVAE
from ..wan_vae.device import DTYPES, dtype_name
from ..wan_vae.options import PRECISIONS
from .fingerprint import fingerprint
from .free_memory import believed_free_bytes


@dataclass(frozen=True)
class Packed:
    """Our copy of one VAE in one dtype, and the patcher through which ComfyUI moves it.

    `source` is the fingerprint of the weights that it is a copy of.
    """

    wan: WanVAE
    patcher: comfy.model_patcher.ModelPatcher
    device: torch.device
    source: bytes | None

    def load(self, memory_bytes: int) -> None:
        """Bring the weights to the device and have ComfyUI free `memory_bytes` beside them."""
        model_management.load_models_gpu(
            [self.patcher], memory_required=memory_bytes, force_full_load=True
        )
        # A partial unload may have left some modules behind, which a patcher that thinks itself
        # loaded does not bring back.
        self.wan.model.to(self.device)

    def free_bytes(self) -> float:
        """Bytes that ComfyUI leaves free; infinity where it does not know."""
        return believed_free_bytes(self.device, model_management.get_free_memory(self.device))


class PackedCopies:
    """The packed copies of every VAE alive, by VAE object and dtype; keeps no VAE alive."""

    def __init__(self) -> None:
        self._copies: weakref.WeakKeyDictionary[object, dict[torch.dtype, Packed]] = (
            weakref.WeakKeyDictionary()
        )

    def get(self, vae: Any, precision: str) -> Packed:
        """Our copy of `vae` (a comfy.sd.VAE) in `precision`; "auto" is ComfyUI's choice for it.

        It is made anew when another node has changed the weights since. Raises BackendError for an
        unknown precision, NotAWanVAEError with the name of the model it is, and CheckpointError.
        """
        if precision != "auto" and precision not in DTYPES:
            expected = ", ".join(map(repr, PRECISIONS))
            raise BackendError(f"precision is {precision!r}: expected one of {expected}")
        if getattr(vae, "first_stage_model", None) is None:
            raise NotAWanVAEError(
                "this VAE holds no weights (the checkpoint that it was loaded from has no VAE): "
                "load a Wan VAE file with Load VAE"
            )
        dtype = vae.vae_dtype if precision == "auto" else DTYPES[precision]
        state = vae.get_sd()
        source = fingerprint(state)
        copies = self._copies.setdefault(vae, {})
        # Weights that cannot be read (None: not in memory now) cannot be packed anew either.
        if dtype in copies and source is not None and copies[dtype].source != source:
            del copies[dtype]  # before the next one is made: two would take twice the memory
        if dtype not in copies:
            copies[dtype] = _pack(vae, state, dtype, source)
        return copies[dtype]


# A node has no object of its own that outlives a prompt: what must is kept by the module.
COPIES = PackedCopies()


def _pack(
    vae: Any, state: dict[str, torch.Tensor], dtype: torch.dtype, source: bytes | None
) -> Packed:
    offload_device = model_management.vae_offload_device()
    # Nodes run in inference mode; tensors made in it could not be moved outside of it, where
    # ComfyUI loads and unloads models.
    with torch.inference_mode(False), torch.no_grad():
        try:
            wan = WanVAE.from_state_dict(state, device=offload_device, dtype=dtype)
        except NotAWanVAEError as error:
            raise NotAWanVAEError(f"{error}; for this one use ComfyUI's own VAE nodes") from None
    patcher = comfy.model_patcher.ModelPatcher(
        wan.model, load_device=vae.device, offload_device=offload_device
    )
    return Packed(wan, patcher, vae.device, source)


def weight_dtypes(vae: Any) -> dict[str, int]:
    """How many tensors of the VAE, as ComfyUI holds it, are of each dtype: {"float32": 194}."""
    return dict(Counter(dtype_name(t.dtype) for t in vae.get_sd().values()))
