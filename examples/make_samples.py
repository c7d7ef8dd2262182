"""Make the sample latents and their thumbnails with the miniature VAE.

    python examples/make_samples.py

Clips come from seeds and pictures that training never saw. Each is encoded, kept as float16 in the
format of ComfyUI's SaveLatent, and decoded again for the thumbnails that the demo test compares
with. Needs scikit-image and Pillow; CPU, under two minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import wan_vae
from examples import thumbnails
from examples.evaluate_mini_vae import psnr
from examples.scenes import Scenes, load_pictures
from wan_vae.io.latents import save_latent

SEED = 3_000_017
# name -> (kind of scene, frames, height, width). The middle one has an odd latent (17 x 25).
SAMPLES = {
    "cat_416x240_17f": ("camera", 17, 240, 416),
    "image_320x240": ("camera", 1, 240, 320),
    "shapes_200x136_13f": ("shapes", 13, 136, 200),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--vae", type=Path, default=HERE / "wan_vae_mini.safetensors", help="checkpoint"
    )
    parser.add_argument("--output", type=Path, default=HERE, help="folder")
    args = parser.parse_args()
    device = torch.device("cpu")
    vae = wan_vae.load(args.vae, device=device, dtype=torch.float32)
    pictures = load_pictures(["chelsea"], device)
    if not pictures:
        raise SystemExit("no held-out picture: install scikit-image")
    for folder in ("latents", "thumbnails"):
        (args.output / folder).mkdir(parents=True, exist_ok=True)
    for i, (name, (kind, frames, height, width)) in enumerate(SAMPLES.items()):
        clip = getattr(Scenes(SEED + i, device, pictures), kind)(frames, height, width)[None]
        latent = vae.encode(clip).half()
        save_latent(args.output / "latents" / f"{name}.latent", latent)
        pixels = vae.decode(latent.float())
        thumbnails.save(args.output / "thumbnails" / f"{name}.png", pixels)
        print(f"{name}: latent {tuple(latent.shape)}, PSNR {psnr(pixels, clip):.1f} dB")


if __name__ == "__main__":
    main()
