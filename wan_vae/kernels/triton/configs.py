"""Which configurations of the Triton kernels to prove for a layer, the best first.

A choice depends on the layer alone, never on the length of a chunk or the size of the picture:
that is what keeps the bits the same for every schedule, strip and shard. What a configuration
costs (registers, shared memory, serialised tensor core instructions) is what
`benchmarks/kernel_resources.py` prints without a GPU; times are for benchmarks/kernels.py.
"""

from __future__ import annotations

from .attention import AttentionConfig
from .conv3d import Config

# Output channels that a width must divide by -> {frames that a steady chunk of one latent frame
# has there: configurations}. Compiled for compute capability 9.0: none of them spills registers
# except 4x8x8 of 96, which the compiler serialises and which still was the fastest measured
# (NVIDIA H200, 3.46 ms against 6.8 ms of cuDNN at 720x1280).
_WIDE: dict[int, dict[int, tuple[Config, ...]]] = {
    128: {
        1: (Config(1, 8, 16, 128, 0, 32, 8, 3), Config(1, 8, 8, 128, 0, 32, 4, 2)),
        2: (Config(2, 8, 16, 128, 0, 32, 8, 3), Config(2, 8, 8, 64, 0, 32, 4, 2)),
        4: (Config(2, 8, 16, 128, 0, 32, 8, 3), Config(2, 8, 8, 64, 0, 32, 4, 2)),
    },
    64: {
        1: (Config(1, 8, 16, 64, 0, 32, 8, 3), Config(1, 8, 8, 64, 0, 32, 4, 2)),
        2: (Config(2, 8, 16, 64, 0, 32, 8, 3), Config(2, 8, 8, 64, 0, 32, 4, 2)),
        4: (Config(2, 8, 16, 64, 0, 32, 8, 3), Config(2, 8, 8, 64, 0, 32, 4, 2)),
    },
    96: {
        1: (Config(1, 8, 16, 64, 32, 32, 8, 3), Config(1, 8, 8, 64, 32, 32, 4, 2)),
        2: (Config(2, 8, 16, 64, 32, 32, 8, 3), Config(2, 8, 8, 64, 32, 32, 4, 2)),
        4: (
            Config(4, 8, 8, 64, 32, 32, 4, 3),
            Config(2, 8, 16, 64, 32, 32, 8, 3),
            Config(2, 8, 8, 64, 32, 32, 4, 2),
        ),
    },
    160: {
        1: (Config(1, 8, 16, 128, 32, 32, 8, 3), Config(1, 8, 8, 128, 32, 32, 4, 2)),
        2: (Config(2, 8, 16, 128, 32, 32, 8, 3), Config(1, 8, 8, 128, 32, 32, 4, 2)),
        4: (Config(2, 8, 16, 128, 32, 32, 8, 3), Config(1, 8, 8, 128, 32, 32, 4, 2)),
    },
    32: {
        1: (Config(1, 8, 16, 32, 0, 32, 4, 3), Config(1, 8, 8, 32, 0, 32, 4, 2)),
        2: (Config(2, 8, 16, 32, 0, 32, 4, 3), Config(2, 8, 8, 32, 0, 32, 4, 2)),
        4: (Config(2, 8, 16, 32, 0, 32, 4, 3), Config(2, 8, 8, 32, 0, 32, 4, 2)),
    },
}
# Narrow layers and models, and layers with few input channels: what fits them all.
_NARROW = {f: (Config(f, 4, 8, 16, 0, 16, 4, 2),) for f in (1, 2)}
_THIN_INPUT = {
    64: {f: (Config(f, 8, 8, 64, 0, 16, 4, 2),) for f in (1, 2)},
    96: {
        f: (Config(f, 8, 16, 64, 32, 16, 8, 3), Config(f, 8, 8, 64, 32, 16, 4, 2)) for f in (1, 2)
    },
    160: {
        f: (Config(f, 8, 16, 128, 32, 16, 8, 3), Config(1, 8, 8, 128, 32, 16, 4, 2)) for f in (1, 2)
    },
}


def conv_candidates(cin: int, cout: int, frames: int) -> tuple[Config, ...]:
    """Configurations for `cin` to `cout` channels where a latent frame is `frames` frames."""
    frames = min(frames, 4)
    wide = _dividing(_WIDE, cout)
    if wide is not None and cin % 32 == 0:
        return wide[frames]
    if cin % 16:
        return ()
    thin = _dividing(_THIN_INPUT, cout)
    return (_NARROW if thin is None else thin)[min(frames, 2)]


def _dividing(
    tables: dict[int, dict[int, tuple[Config, ...]]], cout: int
) -> dict[int, tuple[Config, ...]] | None:
    """The first of the tables whose width divides `cout`, or None."""
    return next((table for width, table in tables.items() if cout % width == 0), None)


def attention_candidates(channels: int) -> tuple[AttentionConfig, ...]:
    """Configurations for a head of `channels`."""
    if channels % 384 == 0:
        return (
            AttentionConfig(128, 64, 128, 3, 8, 2),
            AttentionConfig(64, 64, 128, 3, 8, 2),
            AttentionConfig(64, 32, 128, 1, 4, 2),
        )
    if channels % 256 == 0:
        return (AttentionConfig(128, 64, 128, 2, 8, 2), AttentionConfig(64, 32, 128, 1, 4, 2))
    if channels % 128 == 0:
        return (AttentionConfig(128, 64, 128, 1, 8, 2), AttentionConfig(64, 32, 128, 1, 4, 2))
    return (AttentionConfig(16, 16, 16, 1, 4, 2),) if channels % 16 == 0 else ()
