"""The operations of a run over a model: which backend was asked for, and kernels that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..errors import BackendError
from ..kernels import registry
from ..kernels.device import Device
from ..kernels.proof.cache import ProofCache
from ..kernels.proof.timing import Timer, device_timer
from ..kernels.select import SelectRequest, select_kernels
from ..network.model import WanVAEModel, weight_state
from ..network.sites import layer_sites
from ..ops.eager.forms import EagerForms
from ..ops.opset import LayerChoice, OpSet, Refusal, eager_ops
from ..options import Axis, Backend, Part
from ..said import said, together
from ..walk import parameters


@dataclass(frozen=True)
class OpsRequest:
    """The operations that a run wants: with which kernels, for which part of which model.

    only_frame: the video has one frame. axis: along which the picture is cut into shards, whose
    kernels take halo rows; None for the whole picture. part: whose layers the operations are for;
    the model must have it. forms: how layers without a kernel are computed. weights: what
    `weights_state` finds now; None asks.
    """

    backend: Backend
    model: WanVAEModel
    only_frame: bool
    part: Part = "decoder"
    axis: Axis | None = None
    forms: EagerForms = field(default_factory=EagerForms)
    weights: Sequence[tuple[object, ...]] | None = None

    def weights_now(self) -> Sequence[tuple[object, ...]]:
        """Which tensors the weights are: see `weights_state`."""
        return weights_state(self.model, self.part) if self.weights is None else self.weights


def select_ops(
    request: OpsRequest,
    proofs: Callable[[], ProofCache],
    timer_of: Callable[[torch.device], Timer | None] = device_timer,
    prescribed: Mapping[str, LayerChoice] | None = None,
) -> OpSet:
    """The operations of a run; the weights of `request.model` decide device and dtype.

    "eager": the reference. "triton": kernels in Triton for each layer where one is proven on this
    device, the reference elsewhere, with the reasons in `OpSet.refusals`. "cuda": the same with
    kernels in CUDA C++. "kitchen": those of the package comfy-kitchen. "auto": "cuda" on NVIDIA
    cards, and Triton where NVRTC cannot be found; Triton and comfy-kitchen on AMD cards, else the
    reference. Families that cannot be used here are left out, with their reasons, as long as one of
    the request can.

    `proofs` opens what is known of this device; it is not called where no kernel is asked for.
    timer_of: what times kernels on a device, None where nothing can. prescribed: choices of another
    rank, which replace those of this device. The weights' memory format does not matter: kernels
    read copies of their own. What was prepared stays with the model for the next call, for each
    part. Raises BackendError for an unknown backend, for a named one where no family of
    theirs can run, and where what is prescribed cannot run.
    """
    model, requested = request.model, request.backend
    weight = model.decoder.conv1.weight
    device = Device.chosen_for(weight.device)
    families = registry.families_of(requested, device)
    if not families:
        reason = registry.auto_reason(device) if requested == "auto" else None
        return _eager_because({} if reason is None else {"cuda": reason}, request.forms)
    missing = _missing(families, device, weight.dtype)
    if len(missing) == len(families):
        if requested == "auto":
            return _eager_because(missing, request.forms)
        raise BackendError(
            said(
                "kernel.backend",
                "backend {backend} cannot run: {reasons}; take auto, or eager, which is "
                "plain PyTorch",
                backend=repr(requested),
                reasons=_in_words(missing),
            )
        )
    key = _key(request)
    state = (device, request.weights_now(), request.forms)
    kept = model.prepared.get(key)
    if kept is None or kept[0] != state or prescribed is not None:
        ops = select_kernels(
            SelectRequest(
                tuple(layer_sites(model, request.part, request.only_frame)),
                tuple(family for family in families if family not in missing),
                device,
                weight.device,
                proofs(),
                request.axis,
                timer_of(weight.device),
                prescribed,
                eager_ops(request.forms),
            )
        )
        refusals = (*_refusals(missing), *ops.refusals, *_form_refusals(request, ops))
        kept = model.prepared[key] = state, replace(ops, refusals=refusals)
    return kept[1]


def may_prove(request: OpsRequest, device: torch.device) -> bool:
    """Whether `select_ops`, with the model on `device`, may have to prove kernels first."""
    card, model = Device.chosen_for(device), request.model
    if not registry.families_of(request.backend, card):
        return False
    if unavailable_reason(request.backend, device, model.decoder.conv1.weight.dtype) is not None:
        return False
    kept = model.prepared.get(_key(request))
    # The forms of eager layers change no proof.
    state = (card, request.weights_now())
    return not (kept is not None and isinstance(kept[0], tuple) and kept[0][:2] == state)


def _key(request: OpsRequest) -> tuple[object, ...]:
    """Names what stays prepared with a model."""
    return (request.backend, request.only_frame, request.axis, request.part)


def weights_state(model: WanVAEModel, part: Part) -> list[tuple[object, ...]]:
    """Which tensors the weights of `part` are, and how often each was changed in place: see
    `weight_state`.

    Of this part alone: packing the other's weights must not cost this one its kernels.
    """
    return [weight_state(p) for p in parameters(*own_modules(model, part))]


def unavailable_reason(requested: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernels that `requested` asks for can run on `device`, or None if some can."""
    card = Device.chosen_for(device)
    families = registry.families_of(requested, card)
    missing = _missing(families, card, dtype)
    return _in_words(missing) if families and len(missing) == len(families) else None


def _missing(families: tuple[str, ...], device: Device, dtype: torch.dtype) -> dict[str, str]:
    """Those of `families` of which no kernel can run on `device`, and why."""
    reasons = {name: registry.unavailable_reason(name, device, dtype) for name in families}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _in_words(missing: Mapping[str, str]) -> str:
    if len(set(missing.values())) == 1:
        return next(iter(missing.values()))
    return together(
        said("kernel.of", "{kernel}: {reason}", kernel=family, reason=reason)
        for family, reason in missing.items()
    )


def own_modules(model: WanVAEModel, part: Part) -> tuple[nn.Module, nn.Module]:
    """What holds the weights of `part`: decoder or encoder, and the convolution at its latent."""
    if part == "decoder":
        return model.decoder, model.conv2
    if model.encoder is None or model.conv1 is None:
        raise ValueError("the model has no encoder")
    return model.encoder, model.conv1


def _refusals(missing: Mapping[str, str]) -> tuple[Refusal, ...]:
    return tuple(Refusal("conv3d", family, reason) for family, reason in missing.items())


def _eager_because(missing: Mapping[str, str], forms: EagerForms) -> OpSet:
    ops = eager_ops(forms)
    return replace(ops, refusals=(*_refusals(missing), *_library_refusals(forms)))


def _form_refusals(request: OpsRequest, ops: OpSet) -> tuple[Refusal, ...]:
    """Why eager layers go past a library; nothing where a kernel runs every layer."""
    sites = layer_sites(request.model, request.part, request.only_frame)
    if all(site.name in ops.layers for site in sites):
        return ()
    return _library_refusals(request.forms)


def _library_refusals(forms: EagerForms) -> tuple[Refusal, ...]:
    return tuple(Refusal(op, "PyTorch", reason) for op, reason in forms.reasons.items())
