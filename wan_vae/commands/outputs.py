"""The outputs that a command may write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..config import WanVAEConfig
from ..errors import OutputError
from ..io.sink import Sink, with_colours
from ..io.video_write import VIDEO_SUFFIXES, open_sink


def refuse_to_overwrite(outputs: Sequence[Path]) -> None:
    """Raise OutputError if one of `outputs` exists. An empty folder does not count."""
    existing = [
        path
        for path in outputs
        if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path))
    ]
    if existing:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        raise OutputError(
            f"{existing[0]}{more}: exists: use another name, or overwrite it with --force"
        )


def open_output(path: Path, shape: tuple[int, ...], fps: float) -> tuple[Sink, tuple[str, ...]]:
    """The sink of the file `path` for pixels of `shape` [B, C, T, H, W], and sentences about it.

    Raises OutputError.
    """
    file = open_sink(path, shape, fps)
    suffix, channels, warnings = path.suffix.lower(), shape[1], list(file.warnings)
    if suffix == ".safetensors":
        return file, tuple(warnings)
    if channels == 4 and suffix in VIDEO_SUFFIXES:
        warnings.append(
            f"{path}: a video holds no alpha: it is flattened on white; a folder of frames keeps it"
        )
    keeps_alpha = suffix not in VIDEO_SUFFIXES
    return with_colours(file, channels, keeps_alpha=keeps_alpha), tuple(warnings)


def outputs_of_batch(output: Path, batch: int) -> list[Path]:
    """The output of each latent of a batch: "clip.mp4" of two gives clip_000.mp4 and clip_001.mp4.

    A .safetensors file holds all of them.
    """
    if batch < 2 or output.suffix.lower() == ".safetensors":
        return [output]
    return [output.with_name(f"{output.stem}_{i:03d}{output.suffix}") for i in range(batch)]


def frame_rate(requested: float | None, config: WanVAEConfig) -> float:
    """The frames per second of a video: those asked for, or the model's own."""
    return config.default_fps if requested is None else requested


def frame_rate_note(outputs: Sequence[Path], requested: float | None, config: WanVAEConfig) -> str:
    """A line about the frame rate that nobody asked for; empty where no video was written."""
    videos = [path for path in outputs if path.suffix.lower() in VIDEO_SUFFIXES]
    if requested is not None or not videos:
        return ""
    return (
        f"video     {config.default_fps:g} frames per second, as {config.family} makes them "
        "(--fps sets another rate)"
    )


def output_of_each(latents: Sequence[Path], output: Path) -> list[Path]:
    """The output file of each latent: `output` for one latent, else a video each in that folder."""
    if len(latents) == 1:
        return [output]
    if output.suffix:
        raise OutputError(f"{output}: several latents need a folder as output")
    stems = [path.stem for path in latents]
    repeated = sorted({stem for stem in stems if stems.count(stem) > 1})
    if repeated:
        raise OutputError(
            f"several latents would be written to {output / repeated[0]}.mp4: decode them to "
            "different folders"
        )
    return [output / f"{stem}.mp4" for stem in stems]
