"""`decode_sharded`: one decode over several devices, with one device to fall back on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .. import geometry
from ..errors import ShardingError
from ..hooks import Hooks, OnProgress, ShouldStop
from ..io.image import ImageSink
from ..io.sink import Sink, TensorSink
from ..options import AxisRequest, Backend, Collect, MemoryFormat, Precision, RunOptions
from ..pipeline import WanVAE
from ..runs.decode import DecodeRequest
from ..said import said
from .pool import Form, WorkerPool


def fallback_note(device: torch.device, error: ShardingError) -> str:
    """The sentence of a report after sharding failed and `device` decoded alone."""
    return said(
        "run.alone",
        "decoded on {device} alone, because sharding failed: {error}",
        device=device,
        error=error,
    )


def decode_sharded(
    vae: WanVAE | Mapping[str, torch.Tensor],
    latent: torch.Tensor,
    devices: str | Sequence[str | torch.device] = "all",
    *,
    pool: WorkerPool | None = None,
    fallback: bool = False,
    form: Form = "pixels",
    timeout_s: float = 30.0,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
    axis: AxisRequest = "auto",
    gather: Collect = "shared",
    normalized: bool = False,
    chunk_frames: int | Sequence[int] | None = None,
    memory_format: MemoryFormat = "auto",
    precision: Precision = "auto",
    backend: Backend = "auto",
) -> torch.Tensor:
    """Decode `latent` over `devices`; results, options and errors are those of `WorkerPool.decode`.

    vae: a WanVAE or a state dict. pool: workers to use (and keep); without one, workers are started
    for this decode. fallback: after a ShardingError decode on the VAE's own device instead; the
    report's `fallbacks` then says why.
    """
    if not isinstance(vae, WanVAE):
        vae = WanVAE.from_state_dict(vae, device="cpu")
    vae_ = vae

    def over(workers: WorkerPool) -> torch.Tensor:
        return workers.decode(
            vae_,
            latent,
            axis=axis,
            gather=gather,
            form=form,
            normalized=normalized,
            chunk_frames=chunk_frames,
            memory_format=memory_format,
            precision=precision,
            backend=backend,
            on_progress=on_progress,
            should_stop=should_stop,
        )

    try:
        if pool is not None:
            return over(pool)
        with WorkerPool(devices, timeout_s=timeout_s) as own:
            return over(own)
    except ShardingError as error:
        if not fallback:
            raise
        note = fallback_note(vae.device, error)
    shape = tuple(latent.shape) if latent.ndim == 5 else (1, *latent.shape)
    sink: Sink
    if form == "image":
        sink = ImageSink.allocate(shape, vae.config, torch.device("cpu"))
        result = sink.image
    else:
        result = torch.empty(geometry.pixel_shape(shape, vae.config))
        sink = TensorSink(result)
    vae.run_decode(
        DecodeRequest(
            latent=latent,
            normalized=normalized,
            options=RunOptions(chunk_frames, memory_format, precision, backend=backend),
            hooks=Hooks(on_progress, should_stop),
            sink=sink,
            notes=(note,),
        )
    )
    return result
