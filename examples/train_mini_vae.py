"""Train the miniature Wan 2.1 VAE: the real architecture at width 16, on moving scenes.

    python examples/train_mini_vae.py --minutes 8 --output out/

Writes OUT/wan_vae_mini.safetensors (fp16, native keys, so ComfyUI's Load VAE takes it), a contact
sheet of held-out reconstructions and training.json. Needs torch, scikit-image and Pillow.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.scenes import HELD_OUT_PICTURES, TRAIN_PICTURES, Scenes, load_pictures
from wan_vae import layout
from wan_vae.config import wan21
from wan_vae.network.blocks import Step
from wan_vae.network.model import WanVAEModel

FRAMES, SIDE, CROP = 17, 160, 128
# Small noise on the latents keeps the decoder smooth around them; their scale is held near one.
LATENT_NOISE, SCALE_WEIGHT = 0.02, 1e-5
# Fraction of the time spent on single frames first: seventeen times cheaper, and what they teach
# (colour, edges, texture) is what the video steps then only have to move.
IMAGE_PHASE = 0.45


def reconstruct(model: WanVAEModel, clip: torch.Tensor, noise: float = 0.0):
    """Pixels -> mean latent -> pixels (not clamped) with fresh history; also the latent."""
    latent_frames = (clip.shape[2] - 1) // 4 + 1
    z, _ = model.encode_chunk(clip, Step.whole_clip(latent_frames))
    noisy = z + noise * torch.randn_like(z) if noise else z
    step = Step.whole_clip(latent_frames)
    return model.decoder.stages(model.trunk(noisy, step), step), z


def loss_of(model: WanVAEModel, clip: torch.Tensor) -> torch.Tensor:
    """Squared and absolute error, and a tiny price for large latents."""
    got, z = reconstruct(model, clip, noise=LATENT_NOISE)
    got, z = got.float(), z.float()
    return 2 * F.mse_loss(got, clip) + F.l1_loss(got, clip) + SCALE_WEIGHT * z.square().mean()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB for values in [-1, 1]."""
    return (10 * torch.log10(4 / F.mse_loss(a.clamp(-1, 1), b))).item()


@torch.no_grad()
def evaluate(model: WanVAEModel, device: torch.device, size=(17, 192, 320), clips: int = 4):
    """Held-out seeds (and pictures): category -> PSNR in dB, and one clip pair of each."""
    scenes = Scenes(999_983, device, load_pictures(HELD_OUT_PICTURES, device))
    scores, pairs = {}, {}
    for kind in (scenes.shapes, scenes.textures, scenes.camera):
        values = []
        for _ in range(clips):
            clip = kind(*size)[None]
            got = reconstruct(model, clip)[0].float()
            values.append(psnr(got, clip))
        scores[kind.__name__] = sum(values) / len(values)
        pairs[kind.__name__] = (clip[0], got[0].clamp(-1, 1))
    return scores, pairs


def contact_sheet(pairs, path: Path) -> None:
    """One row a category and side: input above, reconstruction below, four frames."""
    rows = []
    for clip, got in pairs.values():
        picks = torch.linspace(0, clip.shape[1] - 1, 4).long()
        for x in (clip, got):
            rows.append(torch.cat([x[:, t] for t in picks], dim=2))
    sheet = torch.cat(rows, dim=1)
    array = ((sheet + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(array).save(path, optimize=True)


def make_pool(count: int, seed: int, device: torch.device) -> torch.Tensor:
    """[count, 3, FRAMES, SIDE, SIDE] uint8: clips made once, cropped and flipped in training."""
    scenes = Scenes(seed, device, load_pictures(TRAIN_PICTURES, device))
    if not scenes.pictures:
        raise SystemExit("no training pictures: install scikit-image")
    pool = torch.empty(count, 3, FRAMES, SIDE, SIDE, dtype=torch.uint8, device=device)
    for i in range(count):
        clip = scenes.clips(1, FRAMES, SIDE, SIDE)[0]
        pool[i] = ((clip + 1) * 127.5).round().clamp(0, 255).byte()
    return pool


def draw(pool: torch.Tensor, batch: int, images: bool, host: torch.Generator) -> torch.Tensor:
    """A batch of random crops with flips of space and time; float in [-1, 1]; or single frames."""

    def pick(n: int) -> int:
        return int(torch.randint(n, (1,), generator=host))

    index = torch.randint(len(pool), (batch,), generator=host).to(pool.device)
    top, left = pick(SIDE - CROP + 1), pick(SIDE - CROP + 1)
    frames = slice(pick(FRAMES), None) if images else slice(None)
    clip = pool[index, :, frames, top : top + CROP, left : left + CROP]
    if images:
        clip = clip[:, :, :1]
    flips = [d for d in (2, 3, 4) if pick(2)]
    clip = clip.flip(flips) if flips else clip
    if pick(2):
        clip = clip.transpose(3, 4)
    return clip.float() / 127.5 - 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="of training, after the pool")
    parser.add_argument("--output", type=Path, default=Path("mini_vae_output"), help="folder")
    parser.add_argument("--dim", type=int, default=16, help="width of the VAE")
    parser.add_argument("--batch", type=int, default=4, help="clips a step; 8 times as many images")
    parser.add_argument("--pool", type=int, default=4000, help="clips made before training")
    parser.add_argument("--lr", type=float, default=1e-3, help="largest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of clips, weights and draws")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    started = time.monotonic()
    # On a CPU this is minutes, and --minutes counts from its end.
    print(f"making {args.pool} clips on {device} ...", flush=True)
    pool = make_pool(args.pool, args.seed, device)
    print(f"{args.pool} clips in {time.monotonic() - started:.0f} s", flush=True)

    model = WanVAEModel(wan21(dim=args.dim)).to(device)
    for part in (model.encoder, model.decoder):
        layout.pack_weights(part, "channels_last_3d" if device.type == "cuda" else "contiguous")
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.lr,
        betas=(0.9, 0.99),
        weight_decay=1e-4,
        fused=device.type == "cuda",
    )
    host = torch.Generator().manual_seed(args.seed)
    started, limit, step, log = time.monotonic(), args.minutes * 60, 0, []
    while (spent := time.monotonic() - started) < limit:
        # The schedule follows the clock: warm up over 2 %, then half a cosine to nothing.
        done = spent / limit
        factor = min(1.0, done / 0.02 + 0.02) * 0.5 * (1 + torch.cos(torch.tensor(done * 3.14159)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * float(factor)
        # A few images stay among the clips, so that T = 1 is not forgotten.
        images = done < IMAGE_PHASE or step % 5 == 0
        batch = draw(pool, args.batch * (8 if images else 1), images, host)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.998, step / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        if step == 20 or step % 500 == 0:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                scores, _ = evaluate(average, device, clips=1)
            log.append(
                {
                    "step": step,
                    "seconds": round(time.monotonic() - started, 1),
                    "loss": round(loss.item(), 5),
                    **scores,
                }
            )
            print(json.dumps(log[-1]), flush=True)
            save(average, args.output)

    save(average, args.output)
    # What is shipped is fp16: score that, in float32 arithmetic.
    shipped = copy.deepcopy(average).half().float()
    scores, pairs = evaluate(shipped, device)
    contact_sheet(pairs, args.output / "contact_sheet.png")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    summary = {
        "device": name,
        "torch": torch.__version__,
        "steps": step,
        "minutes": args.minutes,
        "held_out_psnr_db": scores,
        "log": log,
    }
    (args.output / "training.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps({k: v for k, v in summary.items() if k != "log"}), flush=True)


def save(model: WanVAEModel, folder: Path) -> None:
    """Write the weights as fp16 with native keys, dense NCDHW."""
    state = {k: v.detach().half().contiguous().cpu() for k, v in model.state_dict().items()}
    save_file(state, str(folder / "wan_vae_mini.safetensors"))


if __name__ == "__main__":
    main()
