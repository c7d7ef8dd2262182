"""`wan-vae decode`: latents to videos, images, frames or tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .. import geometry
from ..errors import OutputError, WanVAEError
from ..io.latents import LatentFile, check_latent, read_latent, statistics_hint
from ..io.sink import Sink
from ..io.video_write import TeeSink, check_sink
from ..options import RunOptions
from ..pipeline import WanVAE
from ..report import DecodeReport
from . import torchrun
from .console import ProgressBar, log
from .load import last_report, load_vae
from .outputs import (
    frame_rate,
    frame_rate_note,
    open_output,
    output_of_each,
    outputs_of_batch,
    refuse_to_overwrite,
)
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
        file = read_latent(request.latents[0], request.key)
        _refuse_parts(file, outputs[0], request)
        vae = _load(request)
        for report in _decode(vae, file, request.latents[0], outputs[0], request):
            print(report_text(report))
        _print_frame_rate(outputs, request, vae)
        return 0
    vae, failures = _load(request), 0
    for path, output in zip(request.latents, outputs, strict=True):
        try:
            file = read_latent(path, request.key)
            _refuse_parts(file, output, request)
            for _ in _decode(vae, file, path, output, request):
                pass
        except WanVAEError as error:
            failures += 1
            log(f"wan-vae: {error}")
    print(f"{len(outputs) - failures} of {len(outputs)} latents decoded")
    _print_frame_rate(outputs, request, vae)
    return 3 if failures else 0


def _load(request: DecodeRequest) -> WanVAE:
    return load_vae(request.vae, request.device, request.options.precision)


def _refuse_parts(file: LatentFile, output: Path, request: DecodeRequest) -> None:
    """Refuse outputs of a batch that exist, as it is done for the output of a single latent."""
    outputs = outputs_of_batch(output, file.latent.shape[0])
    if outputs != [output] and not request.overwrite:
        refuse_to_overwrite(outputs)


def _decode(
    vae: WanVAE, file: LatentFile, path: Path, output: Path, request: DecodeRequest
) -> Iterator[DecodeReport]:
    """Decode what a latent file holds, a batch to an output each."""
    for note in file.notes:
        log(f"wan-vae: {path}: {note}")
    outputs = outputs_of_batch(output, file.latent.shape[0])
    parts = file.latent.split(1) if len(outputs) > 1 else [file.latent]
    normalized = request.normalized or file.is_normalized is True
    for part, place in zip(parts, outputs, strict=True):
        if hint := statistics_hint(part, vae.config, normalized):
            log(f"wan-vae: {path}: warning: {hint}")
        yield decode_to_file(
            vae, part, place, request.options, normalized=normalized, fps=request.fps
        )


def _print_frame_rate(outputs: Sequence[Path], request: DecodeRequest, vae: WanVAE) -> None:
    if note := frame_rate_note(outputs, request.fps, vae.config):
        print(note)


def decode_to_file(
    vae: WanVAE,
    latent: torch.Tensor,
    output: Path,
    options: RunOptions,
    *,
    normalized: bool = False,
    fps: float | None = None,
    extra: Sequence[Sink] = (),
) -> DecodeReport:
    """Decode to `output` and to the sinks of `extra`; an error leaves none of them behind."""
    sinks = list(extra)
    bar: ProgressBar | None = None
    try:
        check_latent(latent, vae.config)
        shape = geometry.pixel_shape(tuple(latent.shape), vae.config)
        bar = ProgressBar(output.name, total=shape[2])
        file, warnings = open_output(output, shape, frame_rate(fps, vae.config))
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
