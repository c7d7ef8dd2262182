"""The operations of a run over a model: which backend was asked for, and kernels that are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from ..errors import BackendError
from ..kernels import registry
from ..kernels.device import Device
from ..kernels.proof.cache import ProofCache
from ..kernels.select import SelectRequest, select_kernels
from ..network.model import WanVAEModel, tensor_version
from ..network.sites import layer_sites
from ..ops.opset import OpSet, Refusal, eager_ops
from ..options import Axis, Backend, Part


def select_ops(
    requested: Backend,
    model: WanVAEModel,
    only_frame: bool,
    proofs: Callable[[], ProofCache],
    axis: Axis | None = None,
    part: Part = "decoder",
) -> OpSet:
    """The operations for a decode or encode with `model`, whose weights decide device and dtype.

    axis: along which the picture is cut into shards, whose kernels take halo rows; None for the
    whole picture. part: whose layers the operations are for; `model` must have it.

    "eager": the reference. "triton": kernels in Triton for each layer where one is proven on this
    device, the reference elsewhere, with the reasons in `OpSet.refusals`. "cuda": as "triton", with
    kernels in CUDA C++ for the wide 3x3x3 convolutions. "auto": "cuda" on the cards that they were
    measured on (Hopper), else the reference. `proofs` opens the verdicts of this device; it is not
    called where no kernel is asked for. The weights' memory format does not matter: kernels read
    copies of their own. What was prepared stays with `model` for the next call, for each part.
    Raises BackendError for an unknown request, or for "triton" and "cuda" where they cannot run.
    """
    weight = model.decoder.conv1.weight
    device = Device.chosen_for(weight.device)
    families = registry.families_of(requested, device)
    if not families:
        reason = registry.auto_reason(device) if requested == "auto" else None
        return _eager_because("cuda", reason)
    for family in families:
        reason = registry.unavailable_reason(family, device, weight.dtype)
        if reason is not None:
            if requested == "auto":
                return _eager_because(family, reason)
            raise BackendError(f"backend {requested!r} cannot run: {reason}")
    key, state = (requested, only_frame, axis, part), _state_of(model, part)
    kept = model.prepared.get(key)
    if kept is None or kept[0] != state:
        sites = tuple(layer_sites(model, part, only_frame))
        request = SelectRequest(sites, families, device, weight.device, proofs(), axis)
        kept = state, select_kernels(request)
        model.prepared[key] = kept
    return kept[1]


def may_prove(
    requested: Backend,
    model: WanVAEModel,
    device: torch.device,
    only_frame: bool,
    axis: Axis | None = None,
    part: Part = "decoder",
) -> bool:
    """Whether `select_ops`, with the model on `device`, may have to prove kernels first."""
    if not registry.families_of(requested, Device.chosen_for(device)):
        return False
    if unavailable_reason(requested, device, model.decoder.conv1.weight.dtype) is not None:
        return False
    kept = model.prepared.get((requested, only_frame, axis, part))
    return kept is None or kept[0] != _state_of(model, part)


def _state_of(model: WanVAEModel, part: Part) -> list[tuple[int, int]]:
    """Which tensors the weights of `part` are, and how often each was changed in place.

    Of this part alone: packing the other's weights must not cost this one its kernels.
    """
    weights = [p for module in own_modules(model, part) for p in module.parameters()]
    return [(p.data_ptr(), tensor_version(p)) for p in weights]


def unavailable_reason(requested: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels that `requested` asks for cannot run on `device`, or None if they can."""
    card = Device.chosen_for(device)
    reasons = (
        registry.unavailable_reason(family, card, dtype)
        for family in registry.families_of(requested, card)
    )
    return next((reason for reason in reasons if reason is not None), None)


def own_modules(model: WanVAEModel, part: Part) -> tuple[nn.Module, nn.Module]:
    """What holds the weights of `part`: decoder or encoder, and the convolution at its latent."""
    if part == "decoder":
        return model.decoder, model.conv2
    if model.encoder is None or model.conv1 is None:
        raise ValueError("the model has no encoder")
    return model.encoder, model.conv1


def _eager_because(family: str, reason: str | None) -> OpSet:
    refusals = () if reason is None else (Refusal("conv3d", family, reason),)
    return replace(eager_ops(), refusals=refusals)
