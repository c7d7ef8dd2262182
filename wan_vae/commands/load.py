"""The VAE of a command: loaded for a precision, and asked for the report of its last run."""

from __future__ import annotations

from pathlib import Path

from ..options import Precision
from ..pipeline import WanVAE, load
from ..report import DecodeReport
from .console import log


def load_vae(file: Path, device: str | None, precision: Precision) -> WanVAE:
    """Load a checkpoint to `device` in the dtype that suits `precision`.

    With fp32 the weights are loaded in float32: a VAE that was loaded in bfloat16 would compute in
    float32 with rounded weights.
    """
    vae = load(file, device=device, dtype="fp32" if precision == "fp32" else "auto")
    for note in vae.notes:
        log(f"wan-vae: {file}: {note}")
    return vae


def last_report(vae: WanVAE) -> DecodeReport:
    """The report of a run that has ended without an error."""
    report = vae.last_report
    assert report is not None  # only a run that was refused has none
    return report
