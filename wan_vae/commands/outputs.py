"""The outputs that a command may write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import OutputError


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
