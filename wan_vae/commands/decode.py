"""`wan-vae decode`: latents to videos, images, frames or tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import geometry
from ..errors import OutputError, WanVAEError
from ..io.latents import check_latent, load_latent
from ..io.sink import Sink
from ..io.video_write import TeeSink, check_sink
from ..options import RunOptions
from ..pipeline import WanVAE
from ..report import DecodeReport
from . import torchrun
from .console import ProgressBar, log
from .load import last_report, load_vae
from .outputs import open_output, output_of_each, refuse_to_overwrite
from .report_text import report_text
from .requests import DecodeRequest


def run_decode(request: DecodeRequest) -> int:
    """Decode each latent to its output; returns the exit code, 3 if some of several failed."""
    outputs = output_of_each(request.latents, request.output)
    rank = torchrun.RankInfo.from_environment(os.environ)
    if rank is not None:
        if request.options.strips is not None:
            raise OutputError("--strips is for one device: leave it out under torchrun")
        return torchrun.decode_list(request, outputs, rank)
    for output in outputs:  # an impossible output is refused before anything is loaded
        check_sink(output)
    if not request.overwrite:
        refuse_to_overwrite(outputs)
    if len(outputs) == 1:
        latent = load_latent(request.latents[0])
        print(report_text(_decode(_load(request), latent, outputs[0], request)))
        return 0
    vae, failures = _load(request), 0
    for path, output in zip(request.latents, outputs, strict=True):
        try:
            _decode(vae, load_latent(path), output, request)
        except WanVAEError as error:
            failures += 1
            log(f"wan-vae: {error}")
    print(f"{len(outputs) - failures} of {len(outputs)} latents decoded")
    return 3 if failures else 0


def _load(request: DecodeRequest) -> WanVAE:
    return load_vae(request.vae, request.device, request.options.precision)


def _decode(
    vae: WanVAE, latent: torch.Tensor, output: Path, request: DecodeRequest
) -> DecodeReport:
    return decode_to_file(
        vae,
        latent,
        output,
        request.options,
        normalized=request.normalized,
        fps=request.fps,
    )


def decode_to_file(
    vae: WanVAE,
    latent: torch.Tensor,
    output: Path,
    options: RunOptions,
    *,
    normalized: bool = False,
    fps: float = 16.0,
    extra: Sequence[Sink] = (),
) -> DecodeReport:
    """Decode to `output` and to the sinks of `extra`; an error leaves none of them behind."""
    sinks = list(extra)
    bar: ProgressBar | None = None
    try:
        check_latent(latent, vae.config)
        shape = geometry.pixel_shape(tuple(latent.shape), vae.config)
        bar = ProgressBar(output.name, total=shape[2])
        file, warnings = open_output(output, shape, fps)
        sinks.insert(0, file)
        vae.decode(
            latent,
            normalized=normalized,
            chunk_frames=options.chunk_frames,
            memory_format=options.memory_format,
            precision=options.precision,
            strips=options.strips,
            backend=options.backend,
            sink=TeeSink(*sinks),
            on_progress=bar,
            should_stop=bar.show,
        )
    except BaseException:
        TeeSink(*sinks).abort()
        raise
    finally:
        if bar is not None:
            bar.close()
    report = last_report(vae)
    for text in (*warnings, *report.warnings):
        log(f"wan-vae: warning: {text}")
    return report
