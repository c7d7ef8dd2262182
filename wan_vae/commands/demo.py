"""`wan-vae demo`: decodes the sample latents of the repository with its miniature VAE."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from .. import geometry
from ..chunking import Chunk
from ..errors import CheckpointError
from ..io.files import writing
from ..io.latents import load_latent
from ..io.video_write import ContactSheetSink, check_sink, save_png, to_uint8
from ..network.blocks import Step
from ..network.cache import FeatureCache
from ..pipeline import WanVAE
from .decode import decode_to_file
from .load import last_report, load_vae
from .report_text import report_text
from .requests import DemoRequest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MINI_VAE = EXAMPLES / "wan_vae_mini.safetensors"


def samples() -> list[Path]:
    """The sample latents of the repository, in order of name."""
    return sorted((EXAMPLES / "latents").glob("*.latent"))


def run_demo(request: DemoRequest) -> int:
    """Decode each sample to a video (or image) and a contact sheet; returns the exit code.

    Prints the report of the last sample. The reports of all samples go to layout_report.json, by
    name of the sample. Files of an earlier demo are overwritten.
    """
    folder = request.output
    if not MINI_VAE.is_file() or not samples():
        raise CheckpointError(
            f"{EXAMPLES}: the files of the demo are missing: run it from a clone of the repository "
            "(pip install -e .)"
        )
    for path in samples():  # impossible outputs are refused before the first decode
        for suffix in (".mp4", ".png"):
            check_sink(folder / f"{path.stem}{suffix}")
    vae = load_vae(MINI_VAE, request.device, request.options.precision)
    reports = {}
    for path in samples():
        reports[path.stem] = _decode_sample(vae, path, request)
    written = folder / "layout_report.json"
    with writing(written):
        written.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    print(written)
    if request.garble:
        picture = folder / "right_and_garbled.png"
        draw_garbled(vae, load_latent(samples()[0]), picture)
        print(picture)
    print(report_text(last_report(vae)))
    return 0


def _decode_sample(vae: WanVAE, path: Path, request: DemoRequest) -> dict[str, object]:
    latent = load_latent(path)
    frames = geometry.pixel_frames(latent.shape[2], vae.config)
    if frames == 1:
        output = request.output / f"{path.stem}.png"
        report = decode_to_file(vae, latent, output, request.options)
        print(output)
    else:
        output = request.output / f"{path.stem}.mp4"
        sheet = request.output / f"{path.stem}_contact_sheet.png"
        extra = (ContactSheetSink(sheet, frames),)
        report = decode_to_file(vae, latent, output, request.options, extra=extra)
        print(f"{output}\n{sheet}")
    return report.as_dict()


def garble(x: torch.Tensor) -> torch.Tensor:
    """What a receiver gets that reads the raw bytes of a dense NDHWC tensor as NCDHW."""
    raw = x.permute(0, 2, 3, 4, 1).contiguous()
    return raw.view(x.shape)


def draw_garbled(vae: WanVAE, latent: torch.Tensor, path: Path) -> None:
    """Draw the middle frame twice: decoded correctly, and from halves gathered as raw bytes.

    As on two GPUs without a check of memory formats: the second half of the rows of the decoder's
    features comes from the other rank, whose NDHWC bytes were read as NCDHW.
    """
    chunk = Chunk(0, latent.shape[2], is_first=True, is_last=True)
    model = vae.model
    z = latent.to(device=vae.device, dtype=vae.dtype)
    with torch.inference_mode():
        features = model.trunk(z, Step(FeatureCache(), chunk))
        right = model.finish(features, Step(FeatureCache(), chunk))
        rows = features.shape[3] // 2
        gathered = features.clone()
        gathered[:, :, :, rows:] = garble(features[:, :, :, rows:])
        wrong = model.finish(gathered, Step(FeatureCache(), chunk))
    middle = right.shape[2] // 2
    pair = [to_uint8(x[0, :, middle : middle + 1])[0] for x in (right, wrong)]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    save_png(np.concatenate(pair, axis=1), path)
