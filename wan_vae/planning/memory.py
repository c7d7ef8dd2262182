"""The planning functions under their former names, until their callers make a PlanRequest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from ..config import WanVAEConfig
from ..ops.opset import Prepared
from .choose import Choice, PlanRequest, choose
from .choose import planned_bytes as _planned_bytes
from .passes import pass_frames
from .peak import WeightFormat

__all__ = ["pass_frames", "plan_chunk_frames", "plan_decode", "planned_bytes"]

_NONE: Mapping[str, Prepared] = MappingProxyType({})


def plan_decode(
    config: WanVAEConfig,
    latent_shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: WeightFormat,
    free: float | None,
    *,
    whole_frames: bool = False,
    chunk_frames: int | Sequence[int] | None = None,
    strips: int | None = None,
    layers: Mapping[str, Prepared] = _NONE,
) -> Choice:
    """See `choose`."""
    return choose(
        PlanRequest(
            config,
            latent_shape,
            dtype,
            memory_format,
            layers,
            free,
            whole_frames=whole_frames,
            chunk_frames=chunk_frames,
            strips=strips,
        )
    )


def planned_bytes(
    config: WanVAEConfig,
    latent_shape: tuple[int, ...],
    dtype: torch.dtype,
    chunk_frames: int,
    memory_format: WeightFormat = "contiguous",
    layers: Mapping[str, Prepared] = _NONE,
) -> int:
    """See `choose.planned_bytes`."""
    request = PlanRequest(config, latent_shape, dtype, memory_format, layers)
    return _planned_bytes(PlanRequest(**{**vars(request), "chunk_frames": chunk_frames}))


def plan_chunk_frames(
    config: WanVAEConfig,
    latent_shape: tuple[int, ...],
    dtype: torch.dtype,
    free: float | None,
    memory_format: WeightFormat = "contiguous",
    layers: Mapping[str, Prepared] = _NONE,
) -> int:
    """Latent frames a chunk of a shard: see `choose`."""
    request = PlanRequest(config, latent_shape, dtype, memory_format, layers, free, shards=True)
    return choose(request).chunk_frames
