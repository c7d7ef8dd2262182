"""The pictures that must not change: a grid of decodes, encodes, strips, streams and shards.

`python -m tests.unit.same_pictures` writes `same_pictures.json`, which `test_same_pictures.py`
compares with what the code gives now. Write it again only for a change that is meant to change
bits, and say so in the commit.

A case keeps a digest of the result's bytes, which holds on the environment named in the file (the
sums of PyTorch's CPU kernels depend on its version and on the processor), and four projections on
fixed random directions, which hold everywhere to rounding.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch

from tests.conftest import SMALL_CONFIGS, random_state
from wan_vae import WanVAE

FILE = Path(__file__).with_name("same_pictures.json")
PROJECTIONS = 4
MODELS = ("wan2.1", "wan2.2")
# Latent frames, rows, columns: an image, an odd video, one that is wider than tall.
SIZES = ((1, 4, 6), (3, 5, 9), (5, 4, 4))
SCHEDULES: tuple[int | list[int], ...] = (1, 2, [2, 1])
FORMATS = ("contiguous", "channels_last_3d")
PRECISIONS = ("fp32", "bf16")

Case = tuple[str, Callable[[], torch.Tensor]]


def environment() -> dict[str, str]:
    """What the bits of PyTorch's CPU kernels depend on."""
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor(),
        "system": platform.system(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe(x: torch.Tensor) -> dict[str, object]:
    """Shape, digest of the bytes, and projections of `x` (float32) relative to its norm."""
    flat = x.detach().contiguous().flatten()
    generator = torch.Generator().manual_seed(7)
    norm = flat.double().norm().item()
    parts = []
    for _ in range(PROJECTIONS):
        direction = torch.randn(flat.numel(), generator=generator, dtype=torch.float64)
        parts.append(float(flat.double() @ direction / (norm * flat.numel() ** 0.5)))
    digest = sha256(flat.numpy().tobytes()).hexdigest()[:32]
    return {"shape": list(x.shape), "digest": digest, "norm": norm, "projections": parts}


def vae_of(family: str) -> WanVAE:
    return WanVAE.from_state_dict(random_state(SMALL_CONFIGS[family]), device="cpu")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def cases() -> Iterator[Case]:
    """Every case of one process: its name, and what makes it."""
    for family in MODELS:
        vae = vae_of(family)
        for size in SIZES:
            z = noise(1, vae.config.z_dim, *size)
            what = f"{family} {size[0]}x{size[1]}x{size[2]}"
            yield from _decodes(vae, z, what)
            yield from _encodes(vae, size, what)


def _decodes(vae: WanVAE, z: torch.Tensor, what: str) -> Iterator[Case]:
    frames = z.shape[2]
    schedules = [s for s in SCHEDULES if not isinstance(s, list) or sum(s) == frames]
    for precision in PRECISIONS:
        for fmt in FORMATS:
            for chunks in schedules if precision == "fp32" else schedules[-1:]:
                name = f"decode {what} {precision} {fmt} chunks {chunks}"
                yield (
                    name,
                    lambda p=precision, f=fmt, c=chunks: vae.decode(
                        z, precision=p, memory_format=f, chunk_frames=c
                    ),
                )
        name = f"decode {what} {precision} planned"
        yield name, lambda p=precision: vae.decode(z, precision=p)
        for strips in (2, 3) if precision == "fp32" else (2,):
            name = f"decode {what} {precision} {strips} strips"
            yield name, lambda p=precision, s=strips: vae.decode(z, precision=p, strips=s)
        name = f"stream {what} {precision} 2 strips"
        yield (
            name,
            lambda p=precision: torch.cat(
                list(vae.decode_stream(z, precision=p, strips=2, chunk_frames=1)), 2
            ),
        )
    batch = torch.cat([z, z.flip(3)])
    yield f"decode {what} batch", lambda: vae.decode(batch, chunk_frames=2)
    yield f"decode {what} normalized", lambda: vae.decode(z, normalized=True)


def _encodes(vae: WanVAE, size: tuple[int, int, int], what: str) -> Iterator[Case]:
    factor = vae.config.spatial_factor
    # Cropped: two frames too many, three rows and one column.
    frames = 4 * (size[0] - 1) + 1 + (2 if size[0] > 1 else 0)
    pixels = noise(1, 3, frames, size[1] * factor + 3, size[2] * factor + 1).clamp(-1, 1)
    for precision in PRECISIONS:
        for fmt in FORMATS:
            name = f"encode {what} {precision} {fmt}"
            yield (
                name,
                lambda p=precision, f=fmt: vae.encode(pixels, precision=p, memory_format=f),
            )
    for chunks in (2, [1, 2]):
        if isinstance(chunks, int) or sum(chunks) == size[0]:
            yield (
                f"encode {what} chunks {chunks}",
                lambda c=chunks: vae.encode(pixels, chunk_frames=c),
            )
    yield f"encode {what} normalized", lambda: vae.encode(pixels, normalized=True)


def sharded_cases() -> Iterator[Case]:
    """Cases of worker processes on the CPU; those of one pool follow one another."""
    from wan_vae.workers import WorkerPool

    for ranks in (2, 3):
        with WorkerPool(["cpu"] * ranks) as pool:
            for family in MODELS:
                vae = vae_of(family)
                z = noise(1, vae.config.z_dim, 3, 5, 8)
                what = f"{family} on {ranks} ranks"
                for axis in ("height", "width"):
                    for chunks in (2, None):
                        name = f"decode {what} by {axis} chunks {chunks}"
                        yield (
                            name,
                            partial(pool.decode, vae, z, axis=axis, chunk_frames=chunks),
                        )
                yield f"decode {what} image", partial(pool.decode, vae, z, form="image")
                factor = vae.config.spatial_factor
                pixels = noise(1, 3, 9, 5 * factor, 8 * factor).clamp(-1, 1)
                yield f"encode {what}", partial(pool.encode, vae, pixels)


def main() -> None:
    torch.set_num_threads(1)
    results = {name: describe(make()) for name, make in cases()}
    results |= {name: describe(make()) for name, make in sharded_cases()}
    content = {"environment": environment(), "cases": results}
    FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{len(results)} cases")


if __name__ == "__main__":
    main()
