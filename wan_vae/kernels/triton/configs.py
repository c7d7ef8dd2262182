"""Configurations of the Triton kernels: their names, and which to prove for a layer, best first.

A choice depends on the layer and the card, never on the length of a chunk or the size of the
picture: that is what keeps the bits the same for every schedule, strip and shard. What a
configuration costs (registers, shared memory, serialised tensor core instructions) is what
`benchmarks/kernel_resources.py` prints without a GPU; times are for benchmarks/kernels.py.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

_CONV = re.compile(r"f(\d+)_p(\d+)x(\d+)_n(\d+)\+(\d+)_k(\d+)_w(\d+)_s(\d+)")
_STRIDED = re.compile(r"m(\d+)_n(\d+)\+(\d+)_k(\d+)_w(\d+)_s(\d+)")
_ATTENTION = re.compile(r"m(\d+)_n(\d+)_d(\d+)x(\d+)_w(\d+)_s(\d+)")


@dataclass(frozen=True)
class ConvConfig:
    """Tile of one program: F frames, PH x PW pixels, N0 + N1 output channels, BK of the sum."""

    F: int
    PH: int
    PW: int
    N0: int
    N1: int
    BK: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """Such as "f1_p8x16_n128+0_k32_w8_s3"."""
        return (
            f"f{self.F}_p{self.PH}x{self.PW}_n{self.N0}+{self.N1}_k{self.BK}"
            f"_w{self.warps}_s{self.stages}"
        )

    @staticmethod
    @functools.cache
    def parse(name: str) -> ConvConfig:
        """The configuration of this name. Raises ValueError."""
        return ConvConfig(*_numbers(_CONV, name))


@dataclass(frozen=True)
class StridedConfig:
    """Tile of one program: M output pixels, N0 + N1 output channels, BK of the sum."""

    M: int
    N0: int
    N1: int
    BK: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """Such as "m128_n64+32_k32_w8_s3"."""
        return f"m{self.M}_n{self.N0}+{self.N1}_k{self.BK}_w{self.warps}_s{self.stages}"

    @staticmethod
    @functools.cache
    def parse(name: str) -> StridedConfig:
        """The configuration of this name. Raises ValueError."""
        return StridedConfig(*_numbers(_STRIDED, name))


@dataclass(frozen=True)
class AttentionConfig:
    """Tile of one program: M queries, BN keys a step, DC channels a product, NC products wide.

    A program makes DC * NC channels of the result and, for each, all scores: fewer programs share
    less work, more registers hold more channels.
    """

    M: int
    BN: int
    DC: int
    NC: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """Such as "m128_n64_d128x3_w8_s2"."""
        return f"m{self.M}_n{self.BN}_d{self.DC}x{self.NC}_w{self.warps}_s{self.stages}"

    @staticmethod
    @functools.cache
    def parse(name: str) -> AttentionConfig:
        """The configuration of this name. Raises ValueError."""
        return AttentionConfig(*_numbers(_ATTENTION, name))


def _numbers(pattern: re.Pattern[str], name: str) -> list[int]:
    match = pattern.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no configuration: expected {pattern.pattern}")
    return [int(text) for text in match.groups()]


# Width that the output channels must be a multiple of -> {frames that a latent frame of a steady
# chunk has there: configurations}.
ConvTable = dict[int, dict[int, tuple[str, ...]]]

# With tensor descriptors. Compiled for compute capability 9.0: none of them spills registers
# except 4x8x8 of 96, which the compiler serialises and which still was the fastest measured
# (NVIDIA H200, 3.46 ms against 6.8 ms of cuDNN at 720x1280).
_TMA: ConvTable = {
    128: {
        1: ("f1_p8x16_n128+0_k32_w8_s3", "f1_p8x8_n128+0_k32_w4_s2"),
        2: ("f2_p8x16_n128+0_k32_w8_s3", "f2_p8x8_n64+0_k32_w4_s2"),
        4: ("f2_p8x16_n128+0_k32_w8_s3", "f2_p8x8_n64+0_k32_w4_s2"),
    },
    64: {
        1: ("f1_p8x16_n64+0_k32_w8_s3", "f1_p8x8_n64+0_k32_w4_s2"),
        2: ("f2_p8x16_n64+0_k32_w8_s3", "f2_p8x8_n64+0_k32_w4_s2"),
        4: ("f2_p8x16_n64+0_k32_w8_s3", "f2_p8x8_n64+0_k32_w4_s2"),
    },
    96: {
        1: ("f1_p8x16_n64+32_k32_w8_s3", "f1_p8x8_n64+32_k32_w4_s2"),
        2: ("f2_p8x16_n64+32_k32_w8_s3", "f2_p8x8_n64+32_k32_w4_s2"),
        4: (
            "f4_p8x8_n64+32_k32_w4_s3",
            "f2_p8x16_n64+32_k32_w8_s3",
            "f2_p8x8_n64+32_k32_w4_s2",
        ),
    },
    160: {
        1: ("f1_p8x16_n128+32_k32_w8_s3", "f1_p8x8_n128+32_k32_w4_s2"),
        2: ("f2_p8x16_n128+32_k32_w8_s3", "f1_p8x8_n128+32_k32_w4_s2"),
        4: ("f2_p8x16_n128+32_k32_w8_s3", "f1_p8x8_n128+32_k32_w4_s2"),
    },
    32: {
        1: ("f1_p8x16_n32+0_k32_w4_s3", "f1_p8x8_n32+0_k32_w4_s2"),
        2: ("f2_p8x16_n32+0_k32_w4_s3", "f2_p8x8_n32+0_k32_w4_s2"),
        4: ("f2_p8x16_n32+0_k32_w4_s3", "f2_p8x8_n32+0_k32_w4_s2"),
    },
}
# Layers with few input channels: a latent, pixels, narrow models.
_TMA_THIN_INPUT: ConvTable = {
    64: {1: ("f1_p8x8_n64+0_k16_w4_s2",), 2: ("f2_p8x8_n64+0_k16_w4_s2",)},
    96: {
        1: ("f1_p8x16_n64+32_k16_w8_s3", "f1_p8x8_n64+32_k16_w4_s2"),
        2: ("f2_p8x16_n64+32_k16_w8_s3", "f2_p8x8_n64+32_k16_w4_s2"),
    },
    160: {
        1: ("f1_p8x16_n128+32_k16_w8_s3", "f1_p8x8_n128+32_k16_w4_s2"),
        2: ("f2_p8x16_n128+32_k16_w8_s3", "f1_p8x8_n128+32_k16_w4_s2"),
    },
}
# What fits every other layer.
_TMA_NARROW = {1: ("f1_p4x8_n16+0_k16_w4_s2",), 2: ("f2_p4x8_n16+0_k16_w4_s2",)}


def conv_candidates(channels: int, out_channels: int, frames: int) -> tuple[str, ...]:
    """Configurations with tensor descriptors for `channels` to `out_channels` where a latent frame
    is `frames` frames."""
    frames = min(frames, 4)
    wide = _dividing(_TMA, out_channels)
    if wide is not None and channels % 32 == 0:
        return wide[frames]
    if channels % 16:
        return ()
    thin = _dividing(_TMA_THIN_INPUT, out_channels)
    return (_TMA_NARROW if thin is None else thin)[min(frames, 2)]


def _dividing(table: ConvTable, out_channels: int) -> dict[int, tuple[str, ...]] | None:
    """The first entry whose width divides `out_channels`, or None."""
    return next((entry for width, entry in table.items() if out_channels % width == 0), None)


# Width that the output channels must be a multiple of -> N0 and N1, the best first.
_STRIDED_BLOCKS = {128: "128+0", 160: "128+32", 96: "64+32", 64: "64+0", 32: "32+0", 16: "16+0"}


def strided_candidates(channels: int, out_channels: int) -> tuple[str, ...]:
    """Configurations of a strided convolution.

    Not timed yet: chosen by what they cost compiled for compute capability 9.0, where none spills
    registers.
    """
    blocks = next((n for width, n in _STRIDED_BLOCKS.items() if out_channels % width == 0), None)
    if blocks is None or channels % 16:
        return ()
    if channels % 32:
        return (f"m32_n{blocks}_k16_w4_s2",)
    depth = 64 if channels % 64 == 0 else 32
    return (f"m128_n{blocks}_k{depth}_w8_s3", f"m64_n{blocks}_k32_w4_s2")


def attention_candidates(channels: int) -> tuple[str, ...]:
    """Configurations for a head of `channels`."""
    if channels % 384 == 0:
        return ("m128_n64_d128x3_w8_s2", "m64_n64_d128x3_w8_s2", "m64_n32_d128x1_w4_s2")
    if channels % 256 == 0:
        return ("m128_n64_d128x2_w8_s2", "m64_n32_d128x1_w4_s2")
    if channels % 128 == 0:
        return ("m128_n64_d128x1_w8_s2", "m64_n32_d128x1_w4_s2")
    return ("m16_n16_d16x1_w4_s2",) if channels % 16 == 0 else ()


# Through pointers, for 99 KiB of shared memory; programs make one frame or two. Not timed yet:
# chosen by what they cost compiled for compute capability 8.6, where none of the first spills
# more than 8 bytes a thread.
_POINTER: ConvTable = {
    128: {
        1: ("f1_p8x8_n128+0_k32_w4_s3", "f1_p8x8_n64+0_k32_w4_s2"),
        2: ("f2_p8x8_n128+0_k32_w8_s3", "f2_p8x8_n64+0_k32_w4_s2"),
    },
    64: {
        1: ("f1_p8x8_n64+0_k32_w4_s3", "f1_p8x8_n64+0_k32_w4_s2"),
        2: ("f2_p8x8_n64+0_k32_w4_s3", "f2_p8x8_n64+0_k32_w4_s2"),
    },
    96: {
        1: ("f1_p8x8_n64+32_k32_w8_s3", "f1_p8x8_n32+0_k32_w4_s2"),
        2: ("f2_p8x8_n64+32_k32_w8_s3", "f2_p8x8_n32+0_k32_w4_s2"),
    },
    160: {
        1: ("f1_p8x8_n128+32_k32_w8_s3", "f1_p8x8_n32+0_k32_w4_s2"),
        2: ("f1_p8x8_n128+32_k32_w8_s3", "f2_p8x8_n32+0_k32_w4_s2"),
    },
    32: {
        1: ("f1_p8x8_n32+0_k32_w4_s3", "f1_p8x8_n32+0_k32_w4_s2"),
        2: ("f2_p8x8_n32+0_k32_w4_s3", "f2_p8x8_n32+0_k32_w4_s2"),
    },
}
_POINTER_THIN_INPUT: ConvTable = {
    64: {1: ("f1_p8x8_n64+0_k16_w4_s2",), 2: ("f2_p8x8_n64+0_k16_w4_s2",)},
    96: {1: ("f1_p8x8_n64+32_k16_w4_s3",), 2: ("f2_p8x8_n64+32_k16_w4_s3",)},
    160: {1: ("f1_p8x8_n128+32_k16_w8_s3",), 2: ("f1_p8x8_n128+32_k16_w8_s3",)},
}
_POINTER_NARROW = {1: ("f1_p4x8_n16+0_k16_w4_s2",), 2: ("f2_p4x8_n16+0_k16_w4_s2",)}


def pointer_candidates(channels: int, out_channels: int, frames: int) -> tuple[str, ...]:
    """Configurations with pointer loads; see `conv_candidates`."""
    frames = min(frames, 2)
    wide = _dividing(_POINTER, out_channels)
    if wide is not None and channels % 32 == 0:
        return wide[frames]
    if channels % 16:
        return ()
    thin = _dividing(_POINTER_THIN_INPUT, out_channels)
    return (_POINTER_NARROW if thin is None else thin)[frames]
