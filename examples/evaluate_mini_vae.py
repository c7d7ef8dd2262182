"""Score the miniature VAE on scenes that it has not seen, through the public encode and decode.

    python examples/evaluate_mini_vae.py --output out/

Prints the PSNR of each category (the camera moves by picture, since a grey picture is easier than
a coloured one) and writes a contact sheet: input above, reconstruction below.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import wan_vae
from examples.scenes import HELD_OUT_PICTURES, Scenes, load_pictures

SEED = 2_000_003


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB for values in [-1, 1]."""
    return (10 * torch.log10(4 / F.mse_loss(a.clamp(-1, 1), b))).item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--vae", type=Path, default=HERE / "wan_vae_mini.safetensors", help="checkpoint"
    )
    parser.add_argument("--output", type=Path, default=Path("mini_vae_output"), help="folder")
    parser.add_argument("--clips", type=int, default=4, help="clips of each category")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = wan_vae.load(args.vae, device=device, dtype=torch.float32)
    # Category -> (kind of scene, pictures that it may show).
    categories = {"shapes": ("shapes", HELD_OUT_PICTURES), "textures": ("textures", ())}
    for name in HELD_OUT_PICTURES:
        categories[f"camera, {name}"] = ("camera", (name,))
    rows = []
    for category, (kind, names) in categories.items():
        scenes = Scenes(SEED, device, load_pictures(names, device))
        videos, images = [], []
        for i in range(args.clips):
            clip = getattr(scenes, kind)(17, 192, 320)[None]
            made = vae.decode(vae.encode(clip))
            videos.append(psnr(made, clip))
            first = clip[:, :, :1]
            images.append(psnr(vae.decode(vae.encode(first)), first))
            if i == 0:
                for x in (clip, made):
                    rows.append(torch.cat([x[0, :, t] for t in (0, 5, 11, 16)], dim=2))
        print(
            f"{category}: video {statistics.mean(videos):.1f} dB "
            f"({min(videos):.1f} to {max(videos):.1f}), image {statistics.mean(images):.1f} dB",
            flush=True,
        )
    sheet = ((torch.cat(rows, dim=1).cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    # Half size and JPEG: it is there to be looked at, not measured.
    picture = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    picture.resize((picture.width // 2, picture.height // 2)).save(
        args.output / "contact_sheet.jpg", quality=88
    )


if __name__ == "__main__":
    main()
