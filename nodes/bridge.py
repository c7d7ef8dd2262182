"""From ComfyUI's VAE object to our own: weights, devices, memory, progress, cancel.

Our copy of the weights is packed for the layout that was decided and lives in a plain ModelPatcher,
so that ComfyUI counts it, unloads it under pressure and brings it back. Nothing of ComfyUI's own
model is touched: its weights may be mmapped, offloaded or cast on the fly.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import comfy.model_management as model_management
import comfy.model_patcher
import comfy.utils
import torch

from ..wan_vae import (
    BackendError,
    DecodeCancelled,
    LatentError,
    NotAWanVAEError,
    WanVAE,
    WanVAEError,
    geometry,
)
from ..wan_vae import layout as wan_layout
from ..wan_vae.device import DTYPES
from ..wan_vae.planning import memory as wan_memory
from ..wan_vae.report import SCHEMA, DecodeReport
from .fingerprint import fingerprint
from .reports import NodeId, Reporter


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

    def free_bytes(self) -> int:
        return int(model_management.get_free_memory(self.device))


class PackedCopies:
    """The packed copies of every VAE alive, by VAE object and dtype; keeps no VAE alive."""

    def __init__(self) -> None:
        self._copies: weakref.WeakKeyDictionary[object, dict[torch.dtype, Packed]] = (
            weakref.WeakKeyDictionary()
        )

    def get(self, vae, precision: str) -> Packed:
        """Our copy of `vae` (a comfy.sd.VAE) in `precision`; "auto" is ComfyUI's choice for it.

        It is made anew when another node has changed the weights since. Raises BackendError for an
        unknown precision, NotAWanVAEError with the name of the model it is, and CheckpointError.
        """
        if precision != "auto" and precision not in DTYPES:
            expected = ", ".join(map(repr, ("auto", *DTYPES)))
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


COPIES = PackedCopies()


def _pack(vae, state: dict, dtype: torch.dtype, source: bytes | None) -> Packed:
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


def weight_dtypes(vae) -> dict[str, int]:
    """How many tensors of the VAE, as ComfyUI holds it, are of each dtype: {"float32": 194}."""
    return dict(Counter(str(t.dtype).removeprefix("torch.") for t in vae.get_sd().values()))


def latent_5d(samples: dict) -> torch.Tensor:
    """The tensor of a LATENT as [B, C, T, H, W]: unbinds a nested one, an image gets T = 1.

    Raises LatentError for what is no latent, or an empty one.
    """
    if not isinstance(samples, Mapping) or "samples" not in samples:
        keys = f"keys {sorted(map(str, samples))}" if isinstance(samples, Mapping) else None
        raise LatentError(
            f"the latent is no LATENT ({keys or type(samples).__name__}): expected a dictionary "
            "with a tensor 'samples', as samplers and Load Latent give"
        )
    latent = samples["samples"]
    if getattr(latent, "is_nested", False):
        latent = latent.unbind()[0]
    if not isinstance(latent, torch.Tensor):
        raise LatentError(f"the latent's 'samples' is a {type(latent).__name__}: expected a tensor")
    shape = tuple(latent.shape)
    if latent.ndim == 4:
        latent = latent.unsqueeze(2)
    if latent.ndim != 5:
        raise LatentError(
            f"the latent has shape {shape}: expected [B, C, T, H, W] of a video or [B, C, H, W] "
            "of an image"
        )
    if 0 in shape:
        raise LatentError(
            f"the latent is empty, its shape is {shape}: expected every size to be above 0"
        )
    return latent


def frames(image: torch.Tensor) -> torch.Tensor:
    """An IMAGE [T, H, W, C >= 3]. Raises LatentError for what is none, or an empty one."""
    shape = tuple(image.shape) if isinstance(image, torch.Tensor) else None
    if shape is None or len(shape) != 4 or 0 in shape or shape[3] < 3:
        what = type(image).__name__ if shape is None else f"of shape {shape}"
        raise LatentError(f"the image is {what}: expected frames [T, H, W, 3 or more]")
    return image


def output_dtype(vae) -> torch.dtype:
    """Dtype of IMAGE and LATENT tensors: ComfyUI's choice where it has one, else float32."""
    choose = getattr(vae, "vae_output_dtype", None)
    return torch.float32 if choose is None else choose()


def plan_chunk(
    packed: Packed,
    latent_shape: tuple[int, ...],
    memory_layout: str,
    chunk_frames: int,
    whole_frames: bool = False,
) -> dict[str, int | None]:
    """Load the weights and have memory freed for a decode; what the library plans with.

    The arguments chunk_frames (None where the node's is 0) and free_bytes of `WanVAE.decode`: it
    plans chunks and strips in the memory that ComfyUI leaves. whole_frames: of the sink.
    """
    wan, wanted = packed.wan, chunk_frames or None
    fmt = wan_layout.decide(memory_layout, packed.device, wan.dtype).chosen
    plan = wan_memory.plan_decode(
        wan.config, latent_shape, wan.dtype, fmt, None,
        whole_frames=whole_frames, chunk_frames=wanted,
    )  # fmt: skip
    packed.load(plan.planned_bytes)
    return {"chunk_frames": wanted, "free_bytes": packed.free_bytes()}


def plan_encode(packed: Packed, image_shape: tuple[int, ...]) -> None:
    """Load the weights and have memory freed for encoding frames [T, H, W, C]."""
    config = packed.wan.config
    pixel_shape = (1, 3, *image_shape[:3])
    latent_shape = geometry.latent_shape(pixel_shape, config)
    # The encoder mirrors the decoder, which is as wide or wider: its plan covers both.
    packed.load(wan_memory.planned_bytes(config, latent_shape, packed.wan.dtype, 1))


@dataclass(frozen=True)
class Result:
    """What `run` gives back: the value of the work and the report as the panel reads it."""

    value: object
    report: dict


def run(
    hidden, operation: str, packed_vae: Callable[[], Packed], work: Callable[[Packed, dict], object]
) -> Result:
    """Do `work(packed, hooks)` with progress, cancel and reports.

    `hooks` are the keyword arguments on_progress and should_stop of the library. A cancel raises
    ComfyUI's own exception; every other error goes through, after its report was sent: else the
    panel would go on showing the run before.
    """
    reporter = Reporter(NodeId.of(hidden))
    bar = comfy.utils.ProgressBar(1)
    wan: WanVAE | None = None
    before: DecodeReport | None = None

    def on_progress(done: int, total: int, report: DecodeReport) -> None:
        if reporter.due():
            reporter.send(report.as_dict())
        if not model_management.processing_interrupted():  # else it raises: should_stop is next
            bar.update_absolute(done, total)

    hooks = {
        "on_progress": on_progress,
        "should_stop": model_management.processing_interrupted,
    }
    try:
        packed = packed_vae()
        wan, before = packed.wan, packed.wan.last_report
        with torch.inference_mode(False), torch.no_grad():
            value = work(packed, hooks)
    except DecodeCancelled as error:
        reporter.finish(_final_report(wan, before, operation, "cancelled", str(error)))
        model_management.throw_exception_if_processing_interrupted()
        raise model_management.InterruptProcessingException() from None
    except model_management.InterruptProcessingException:
        reporter.finish(_final_report(wan, before, operation, "cancelled", "cancelled"))
        raise
    except Exception as error:
        reporter.finish(_final_report(wan, before, operation, "failed", _one_line(error)))
        raise
    report = wan.last_report.as_dict()
    reporter.finish(report)
    return Result(value, report)


def _one_line(error: Exception) -> str:
    """Our own errors are one readable line; others are named, and may be many lines long."""
    if isinstance(error, WanVAEError):
        return str(error)
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def _final_report(wan, before, operation: str, status: str, error: str) -> dict:
    """The library's report of the run that ended early, or one that says only how it ended."""
    if wan is not None and wan.last_report is not None and wan.last_report is not before:
        return replace(wan.last_report, status=status, error=error).as_dict()
    return {"schema": SCHEMA, "operation": operation, "status": status, "error": error}
