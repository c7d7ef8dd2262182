"""Runs over several devices: the workers, what ComfyUI knows of them, and the way back to one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import comfy.model_management as model_management
import comfy.model_patcher
import torch

from ..wan_vae import ShardingError, geometry
from ..wan_vae.options import AxisRequest, Collect, MemoryFormat, Operation
from ..wan_vae.runs.engine import PROOF_BYTES
from ..wan_vae.said import said
from ..wan_vae.walk import parameters
from ..wan_vae.workers.devices import parse_devices, worth_sharing
from ..wan_vae.workers.pool import ONE_DEVICE, WorkerPool
from ..wan_vae.workers.sharded import fallback_note
from .device_memory import ComfyMemory, loaded
from .session import Session


@dataclass(frozen=True)
class Sharding:
    """Over which devices a picture is divided, and how; see the inputs of WanVAEDecodeSharded."""

    devices: str
    axis: AxisRequest = "auto"
    gather: Collect = "shared"
    allow_fallback: bool = True
    timeout_s: float = 30.0

    def reason_for_one(self, own: torch.device, pixel_shape: Sequence[int]) -> str | None:
        """Why the VAE's own device does a video [B, 3, T, H, W] alone; None if workers share it.

        Raises ShardingError for a device that is missing.
        """
        if len(parse_devices(self.devices, own)) < 2:
            return ONE_DEVICE
        if self.devices.strip() == "all" and not worth_sharing(pixel_shape):
            return said(
                "run.few_pixels",
                "done on {device} alone: several devices are hardly faster with a small image; "
                "name the devices (0,1) to share it all the same",
                device=own,
            )
        return None


class WanVAEWorkers(torch.nn.Module):
    """Stands for the workers among ComfyUI's loaded models; the weights are in their processes."""

    def __init__(self, pool: WorkerPool):
        super().__init__()
        self.pool = pool


class WorkersPatcher(comfy.model_patcher.ModelPatcher):
    """Lets ComfyUI give the workers back as it unloads a model: under pressure, or when asked to.

    `size` is what they hold on the device that ComfyUI counts, as far as we know it.
    """

    def loaded_size(self) -> int:
        return self.size if self.model.pool.pids else 0

    def partially_unload(self, *_: object, **__: object) -> int:
        """Nothing: workers go together or not at all."""
        return 0

    def detach(self, unpatch_all: bool = True) -> object:
        if unpatch_all:  # else ComfyUI only reorders its list, or drops the patcher
            self.model.pool.free_devices()
        return super().detach(unpatch_all)


class Pools:
    """The worker pool in use. One at a time: workers of other devices give their memory back."""

    def __init__(self) -> None:
        self._pool: WorkerPool | None = None
        self._patcher: WorkersPatcher | None = None

    def get(self, devices: str, timeout_s: float, own: torch.device) -> WorkerPool:
        """The warm pool of these devices, or a new one in place of another's. own: the VAE's."""
        wanted = parse_devices(devices, own)
        if self._pool is not None and self._pool.devices != wanted:
            self._pool.close()
            self._pool = self._patcher = None
        if self._pool is None:
            self._pool = WorkerPool(wanted)
        self._pool.timeout_s = timeout_s
        return self._pool

    def start_ahead(self, devices: str, own: torch.device) -> None:
        """Start the processes that a run will need, unless workers of other devices are there.

        What is wrong with `devices` is said by the run.
        """
        with suppress(ShardingError):
            wanted = parse_devices(devices, own)
            if len(wanted) > 1 and (self._pool is None or self._pool.devices == wanted):
                self._pool = self._pool or WorkerPool(wanted)
                # The server's loop must not wait for a run, or for workers that are ending.
                threading.Thread(target=_start_ahead, args=(self._pool,), daemon=True).start()

    def count(self, device: torch.device, weights_bytes: int, needed_bytes: int) -> None:
        """Put the workers among the models that ComfyUI holds on `device`.

        ComfyUI makes room there for their weights and for `needed_bytes`, if `device` is one of
        theirs. The memory of other processes is not ComfyUI's to see.
        """
        if self._pool is None:
            raise ShardingError(said("run.no_workers", "workers are counted before there are any"))
        theirs = device in self._pool.devices
        size = weights_bytes if theirs else 1
        if self._patcher is None or self._patcher.load_device != device:
            model = WanVAEWorkers(self._pool)
            self._patcher = WorkersPatcher(model, device, device, size=size)
        held = self._patcher.loaded_size() if loaded(self._patcher) else 0
        self._patcher.size = size
        # ComfyUI adds the weights of workers that it does not count, or that have ended.
        wanted = needed_bytes + (max(0, size - held) if held else 0)
        if theirs and held and ComfyMemory(device, self._patcher).has(wanted):
            return  # ComfyUI would ask the driver several times, to free nothing
        model_management.load_models_gpu(
            [self._patcher], memory_required=wanted if theirs else 0, force_full_load=True
        )


def _start_ahead(pool: WorkerPool) -> None:
    with suppress(ShardingError):  # the run says it
        pool.start_ahead()


POOLS = Pools()


def decode(
    run: Session,
    latent: torch.Tensor,
    sharding: Sharding,
    *,
    memory_format: MemoryFormat = "auto",
    chunk_frames: int = 0,
    normalized: bool = False,
) -> torch.Tensor:
    """The frames [B, T, H, W, 3] in [0, 1] of `latent`, where ComfyUI wants them."""
    shape = tuple(latent.shape)
    try:
        if _is_shared(run, sharding, shape):
            pool = _ready(run, shape, sharding, "decode", memory_format, chunk_frames)
            image = pool.decode(
                run.wan,
                latent,
                axis=sharding.axis,
                gather=sharding.gather,
                form="image",
                memory_format=memory_format,
                chunk_frames=chunk_frames or None,
                normalized=normalized,
                **run.hooks,
            )
            if run.has_right_weights():
                return run.as_output(image)
            del image
            return decode(
                run,
                latent,
                sharding,
                memory_format=memory_format,
                chunk_frames=chunk_frames,
                normalized=normalized,
            )
    except ShardingError as error:
        _fall_back(run, sharding, error)
    plan = run.plan(shape, memory_format=memory_format, chunk_frames=chunk_frames)
    return run.decode(latent, plan, normalized=normalized)


def encode(
    run: Session,
    video: torch.Tensor,
    latent_shape: tuple[int, ...],
    sharding: Sharding,
    *,
    memory_format: MemoryFormat = "auto",
    unit_range: bool = True,
) -> torch.Tensor:
    """The latent of `video` [B, 3, T, H, W], where ComfyUI wants it. unit_range: see `Session`."""
    try:
        if _is_shared(run, sharding, latent_shape):
            pool = _ready(run, latent_shape, sharding, "encode", memory_format, 0)
            latent = pool.encode(
                run.wan,
                video,
                axis=sharding.axis,
                unit_range=unit_range,
                memory_format=memory_format,
                **run.hooks,
            )
            if run.has_right_weights():
                return run.as_output(latent)
            return encode(
                run,
                video,
                latent_shape,
                sharding,
                memory_format=memory_format,
                unit_range=unit_range,
            )
    except ShardingError as error:
        _fall_back(run, sharding, error)
    plan = run.plan(latent_shape, operation="encode", memory_format=memory_format)
    return run.encode(video, plan, unit_range)


def _is_shared(run: Session, sharding: Sharding, latent_shape: tuple[int, ...]) -> bool:
    """Whether workers share the work; if not, the report says why. Raises ShardingError."""
    shape = geometry.pixel_shape(latent_shape, run.wan.config)
    reason = sharding.reason_for_one(run.vae.device, shape)
    if reason is not None:
        run.warnings.append(reason)
    return reason is None


def _ready(
    run: Session,
    latent_shape: tuple[int, ...],
    sharding: Sharding,
    operation: Operation,
    memory_format: MemoryFormat,
    chunk_frames: int,
) -> WorkerPool:
    """Workers with the weights, for which ComfyUI has made room. Raises ShardingError."""
    device: torch.device = run.vae.device
    with run.timed("room"):
        pool = POOLS.get(sharding.devices, sharding.timeout_s, device)
        weights = sum(p.nbytes for p in parameters(run.wan.model))
        starts = not pool.pids
        if starts:
            run.enter("starting_workers", count=len(pool.devices))
        run.begin_planning()
        if not pool.has_planned(run.wan, operation):
            # Workers prove their kernels before anybody knows what the run will take.
            POOLS.count(device, weights, PROOF_BYTES)
    with run.timed("plan"):
        # Each rank plans again as it begins, in the memory that is free then.
        plans = pool.plan(
            run.wan,
            latent_shape,
            operation=operation,
            axis=sharding.axis,
            chunk_frames=chunk_frames or None,
            memory_format=memory_format,
            earlier=True,
        )
    if starts:
        run.enter("planning")
    with run.timed("room"):
        own = [plan for plan in plans if plan.device == str(device)]
        POOLS.count(device, weights, sum(plan.needed_bytes for plan in own))
    return pool


def _fall_back(run: Session, sharding: Sharding, error: ShardingError) -> None:
    """Say in the report why one device does the work; raises `error` if that is not allowed."""
    if not sharding.allow_fallback:
        raise error
    run.fallbacks.append(fallback_note(run.packed.device, error))
