"""`wan-vae demo`: the repository's sample latents through its miniature VAE, to look at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from ..errors import CheckpointError
from ..io.files import writing

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MINI_VAE = EXAMPLES / "wan_vae_mini.safetensors"


def samples() -> list[Path]:
    """The sample latents of the repository, in order of name."""
    return sorted((EXAMPLES / "latents").glob("*.latent"))


def run_demo(args, load, decode_one, report_table) -> int:
    """Decode each sample to a video (or image) and a contact sheet; print the layout report.

    The reports of all samples go to layout_report.json, by name of the sample. Files of an
    earlier demo are overwritten.
    """
    from .. import geometry
    from ..io.latents import load_latent
    from ..io.video_write import ContactSheetSink, check_sink

    if not MINI_VAE.is_file() or not samples():
        raise CheckpointError(
            f"{EXAMPLES}: the demo's files are not here: run it from a clone of the repository "
            "(pip install -e .)"
        )
    for path in samples():  # what cannot be written is refused before anything is
        for suffix in (".mp4", ".png"):
            check_sink(args.output / f"{path.stem}{suffix}")
    vae = load(args, MINI_VAE)
    reports = {}
    for path in samples():
        latent = load_latent(path)
        frames = geometry.pixel_frames(latent.shape[2], vae.config)
        if frames == 1:
            output = args.output / f"{path.stem}.png"
            decode_one(vae, latent, output, args)
            print(output)
        else:
            output = args.output / f"{path.stem}.mp4"
            sheet = args.output / f"{path.stem}_contact_sheet.png"
            decode_one(vae, latent, output, args, extra=(ContactSheetSink(sheet, frames),))
            print(f"{output}\n{sheet}")
        reports[path.stem] = vae.last_report.as_dict()
    written = args.output / "layout_report.json"
    with writing(written):
        written.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    print(written)
    if args.garble:
        picture = args.output / "right_and_garbled.png"
        draw_garbled(vae, load_latent(samples()[0]), picture)
        print(picture)
    print(report_table(vae.last_report))
    return 0


def garble(x: torch.Tensor) -> torch.Tensor:
    """What a receiver sees that reads the raw bytes of a dense NDHWC tensor as NCDHW."""
    raw = x.permute(0, 2, 3, 4, 1).contiguous()
    return raw.view(x.shape)


def draw_garbled(vae, latent: torch.Tensor, path: Path) -> None:
    """The middle frame decoded right, and decoded from halves gathered as raw bytes.

    As on two GPUs without the guard: the second half of the rows of the decoder's features comes
    from the other rank, whose NDHWC bytes were read as NCDHW.
    """
    from ..chunking import Chunk
    from ..io.video_write import save_png, to_uint8
    from ..network.blocks import Step
    from ..network.cache import FeatureCache

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
