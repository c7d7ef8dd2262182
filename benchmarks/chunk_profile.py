"""Which kernels a steady chunk takes: of the whole picture, and of a shard of it.

    wan-vae bench profile [--height 90 --width 160] [--frames 2] [--ranks 1,2]
    python benchmarks/chunk_profile.py        # the same

Prints device time by kernel (PyTorch's profiler), and on a GPU the host's time for a chunk.
Neighbours' rows are zeros that lie ready.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.suite.emulation import SteadyClip
from benchmarks.suite.measure import synchronise, times_ms
from benchmarks.suite.weights import random_vae
from wan_vae.arithmetic import own_arithmetic
from wan_vae.config import wan21
from wan_vae.device import pick_device
from wan_vae.geometry import chunk_frames_slice
from wan_vae.pipeline import WanVAE
from wan_vae.sharding.context import ShardContext

# The chunk that is profiled: the third of a video that goes on behind it.
_CHUNK, _CHUNKS = 2, 4


def profiled(vae: WanVAE, height: int, width: int, frames: int, ranks: int) -> profile:
    """The profile of the third chunk of `frames` latent frames on rank 0 of `ranks`."""
    device = vae.device
    run = SteadyClip(height, width, frames, _CHUNKS).run(vae, ShardContext(0, ranks))
    first, last = chunk_frames_slice(_CHUNK * frames, (_CHUNK + 1) * frames, vae.config)
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    run.begin()
    pieces, done = run.pieces(), 0
    with own_arithmetic(device):
        while done < first:
            done += next(pieces).values.shape[2]
        found = profile(activities=[activity])
        with found:
            while done < last:
                done += next(pieces).values.shape[2]
            synchronise(device)
    return found


def host_ms(vae: WanVAE, chunks: int = 20, repeats: int = 8) -> float:
    """Milliseconds of the host for a chunk of one latent frame: what remains on tiny pictures.

    The difference between two decodes that the launches bound, one of them `chunks` chunks longer;
    of each the fastest of `repeats`.
    """
    fastest: list[float] = []
    for frames in (2, 2 + chunks):
        z = torch.randn((1, vae.config.z_dim, frames, 8, 8), device=vae.device)

        def decode(latent: torch.Tensor = z) -> None:
            vae.decode(latent, chunk_frames=1)

        decode()
        fastest.append(min(times_ms(decode, vae.device, repeats)))
    return (fastest[1] - fastest[0]) / chunks


def table(found: profile, device: torch.device, rows: int = 14) -> str:
    """Milliseconds and calls of the kernels that take longest, after their sum."""
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    kind = "CUDA" if device.type == "cuda" else "CPU"
    events = [e for e in found.key_averages() if e.device_type.name == kind]
    events.sort(key=lambda e: -getattr(e, own))
    lines = [f"{sum(getattr(e, own) for e in events) / 1e3:9.2f} ms in all"]
    lines += [f"{getattr(e, own) / 1e3:9.2f} ms {e.count:5d}  {e.key[:90]}" for e in events[:rows]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Profile and print."""
    parser = argparse.ArgumentParser(
        prog="wan-vae bench profile",
        description="Which kernels a steady chunk takes: of the whole picture, and of a shard.",
    )
    parser.add_argument("--device", help="cuda:0, cpu (default: the best one here)")
    parser.add_argument("--height", type=int, default=90, help="of the latent")
    parser.add_argument("--width", type=int, default=160, help="of the latent")
    parser.add_argument("--frames", type=int, default=2, help="latent frames of a chunk")
    parser.add_argument("--ranks", default="1,2")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    vae = random_vae(wan21() if device.type == "cuda" else wan21(dim=8), device)
    for ranks in map(int, args.ranks.split(",")):
        print(f"rank 0 of {ranks}, {args.frames} latent frames of {args.height}x{args.width}")
        print(table(profiled(vae, args.height, args.width, args.frames, ranks), device))
    if device.type == "cuda":
        print(f"host: {host_ms(vae):.2f} ms a chunk (8x8 latents, where only launches count)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
