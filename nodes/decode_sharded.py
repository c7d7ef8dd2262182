"""WanVAEDecodeSharded: one decode over several devices, each rank writing its rows of the IMAGE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import comfy.model_management as model_management
import comfy.model_patcher
import torch
from comfy_api.latest import io

from ..wan_vae import ShardingError
from ..wan_vae.hooks import Hooks
from ..wan_vae.io.image import ImageSink
from ..wan_vae.options import AXES, COLLECTS, AxisRequest, Collect, MemoryFormat
from ..wan_vae.runs.decode import DecodeRequest
from ..wan_vae.workers.devices import parse_devices
from ..wan_vae.workers.pool import WorkerPool
from ..wan_vae.workers.sharded import fallback_note
from . import inputs
from .reports import HIDDEN
from .schema import (
    advanced,
    chunk_input,
    latent_input,
    layout_input,
    precision_input,
    schema,
    vae_input,
)
from .session import PROOF_BYTES, session


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
            self.model.pool.close()
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

    def count(self, device: torch.device, weights_bytes: int, needed_bytes: int) -> None:
        """Put the workers among the models that ComfyUI holds on `device`.

        ComfyUI makes room there for their weights and for `needed_bytes`, if `device` is one of
        theirs. The memory of other processes is not ComfyUI's to see.
        """
        if self._pool is None:
            raise ShardingError("workers are counted before there are any")
        theirs = device in self._pool.devices
        size = weights_bytes if theirs else 1
        if self._patcher is None or self._patcher.load_device != device:
            model = WanVAEWorkers(self._pool)
            self._patcher = WorkersPatcher(model, device, device, size=size)
        self._patcher.size = size
        model_management.load_models_gpu(
            [self._patcher], memory_required=needed_bytes if theirs else 0, force_full_load=True
        )


POOLS = Pools()


class WanVAEDecodeSharded(io.ComfyNode):
    """Decodes over worker processes, one a device, or falls back to one device and says why."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WanVAEDecodeSharded",
            display_name="Wan VAE Decode (Sharded)",
            description="Decodes one Wan latent on several GPUs. Each GPU decodes its part of "
            "every frame. The picture is that of Wan VAE Decode.",
            search_aliases=["multi gpu vae", "parallel vae decode", "sharded decode"],
            inputs=[
                latent_input(),
                vae_input(),
                io.String.Input(
                    "devices",
                    default="all",
                    tooltip="all, or a list of GPUs such as 0,1,3. With cpu,cpu you can try it "
                    "without a GPU.",
                ),
                io.Combo.Input(
                    "axis",
                    options=list(AXES),
                    default="auto",
                    tooltip="The side along which the picture is divided. auto takes the one with "
                    "less exchange between the devices.",
                ),
                io.Combo.Input(
                    "gather",
                    options=list(COLLECTS),
                    default="shared",
                    tooltip="How the parts become one image. shared: every device writes its own "
                    "part. rank0 and all: the devices exchange pixels first, which is only for "
                    "comparison.",
                ),
                advanced(
                    io.Boolean.Input,
                    "allow_fallback",
                    default=True,
                    tooltip="If a device fails, decode on one device and say so in the report, "
                    "instead of stopping with an error.",
                ),
                advanced(
                    io.Float.Input,
                    "timeout_s",
                    default=30.0,
                    min=1.0,
                    max=3600.0,
                    tooltip="How many seconds a device waits for another one before the decode "
                    "fails.",
                ),
                layout_input(),
                precision_input(),
                chunk_input(),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The frames, in order.")],
            hidden=list(HIDDEN),
        )

    @classmethod
    def execute(
        cls,
        samples: Mapping[str, Any],
        vae: Any,
        devices: str = "all",
        axis: AxisRequest = "auto",
        gather: Collect = "shared",
        allow_fallback: bool = True,
        timeout_s: float = 30.0,
        memory_layout: MemoryFormat = "auto",
        precision: str = "auto",
        chunk_frames: int = 0,
    ) -> io.NodeOutput:
        with session(cls.hidden, vae, precision, "decode") as run:
            wan, device = run.wan, run.packed.device
            latent = inputs.latent_5d(samples)
            shape, dtype, note = tuple(latent.shape), inputs.output_dtype(vae), ""
            try:
                pool = POOLS.get(devices, timeout_s, device)
                weights = sum(p.nbytes for p in wan.model.parameters())
                # Workers prove their kernels before anybody knows what the decode will take.
                POOLS.count(vae.device, weights, PROOF_BYTES)
                plans = pool.plan(
                    wan,
                    shape,
                    axis=axis,
                    chunk_frames=chunk_frames or None,
                    memory_format=memory_layout,
                )
                own = [plan for plan in plans if plan.device == str(vae.device)]
                POOLS.count(vae.device, weights, sum(plan.planned_bytes for plan in own))
                image = pool.decode(
                    wan, latent, axis=axis, gather=gather, form="image", plans=plans, **run.hooks
                ).to(device=vae.output_device, dtype=dtype)
            except ShardingError as error:
                if not allow_fallback:
                    raise
                note = fallback_note(device, error)
            if note:
                plan = run.plan(shape, memory_format=memory_layout, chunk_frames=chunk_frames)
                sink = ImageSink.allocate(shape, wan.config, vae.output_device, dtype)
                wan.run_decode(
                    DecodeRequest(
                        latent,
                        options=replace(plan.options, free_bytes=run.free_bytes()),
                        hooks=Hooks(**run.hooks),
                        plan=plan,
                        sink=sink,
                        notes=(note,),
                    )
                )
                image = sink.image
        return io.NodeOutput(image.flatten(0, 1), ui=run.ui)
