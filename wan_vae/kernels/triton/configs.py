"""Configurations of the Triton kernels: their names, and which to prove for a layer, best first.

A choice depends on the layer and the card, never on the length of a chunk or the size of the
picture: that is what keeps the bits the same for every schedule, strip and shard. What a
configuration costs (registers, shared memory, serialised tensor core instructions) is what
`benchmarks/kernel_resources.py` prints without a GPU; times are for benchmarks/kernels.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from ..device import Device

_CONV = re.compile(r"f(\d+)_p(\d+)x(\d+)_n(\d+)\+(\d+)_k(\d+)_w(\d+)_s(\d+)")
_STRIDED = re.compile(r"m(\d+)_n(\d+)\+(\d+)_k(\d+)_w(\d+)_s(\d+)")
_HEAD = re.compile(r"m(\d+)_w(\d+)")
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
class HeadConfig:
    """Tile of one program of the narrow head: M pixels, all taps and output channels."""

    M: int
    warps: int

    @property
    def name(self) -> str:
        """Such as "m128_w4"."""
        return f"m{self.M}_w{self.warps}"

    @staticmethod
    @functools.cache
    def parse(name: str) -> HeadConfig:
        """The configuration of this name. Raises ValueError."""
        return HeadConfig(*_numbers(_HEAD, name))


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


# The tensor cores that a tile is made for: NVIDIA's; those of AMD's CDNA, with 64 threads in a warp
# and 512 registers for each; of RDNA 3, where each half of a warp holds its own copy of the
# operands; of RDNA 4, where it does not.
Cores = Literal["nvidia", "cdna", "rdna3", "rdna4"]


def cores_of(device: Device) -> Cores:
    """The tensor cores of `device`. The interpreter's are NVIDIA's."""
    if "wmma" in device.features:
        return "rdna3" if device.architecture.startswith("gfx11") else "rdna4"
    return "cdna" if "mfma" in device.features else "nvidia"


# Width that the output channels must be a multiple of -> {frames that a latent frame of a steady
# chunk has there: configurations}.
_ByWidth = Mapping[int, Mapping[int, tuple[str, ...]]]


@dataclass(frozen=True)
class ConvTable:
    """Configurations of a convolution, by output width and frames; of several widths the first.

    wide: of 32 input channels and more. thin: of multiples of 16, which a latent, pixels and
    narrow models have. narrow: of every other layer, by frames.
    """

    wide: _ByWidth
    thin: _ByWidth
    narrow: Mapping[int, tuple[str, ...]]

    def candidates(self, channels: int, out_channels: int, frames: int) -> Sequence[str]:
        """Those for `channels` to `out_channels` where a latent frame is `frames` frames."""
        wide = _dividing(self.wide, out_channels)
        if wide is not None and channels % 32 == 0:
            return wide[min(frames, max(wide))]
        if channels % 16:
            return ()
        thin = _dividing(self.thin, out_channels)
        found = self.narrow if thin is None else thin
        return found[min(frames, max(found))]


def _dividing(table: _ByWidth, out_channels: int) -> Mapping[int, tuple[str, ...]] | None:
    """The first entry whose width divides `out_channels`, or None."""
    return next((entry for width, entry in table.items() if out_channels % width == 0), None)


# With tensor descriptors. Compiled for compute capability 9.0: none of them spills registers
# except 4x8x8 of 96, which the compiler serialises and which still was the fastest measured
# (NVIDIA H200, 3.46 ms against 6.8 ms of cuDNN at 720x1280).
_TMA_WIDE: _ByWidth = {
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
_TMA_THIN: _ByWidth = {
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


_TMA = ConvTable(_TMA_WIDE, _TMA_THIN, _TMA_NARROW)


def tma_table(device: Device, operand: torch.dtype) -> ConvTable:
    """Configurations with tensor descriptors."""
    return _TMA


# Width that the output channels must be a multiple of -> N0 and N1, the best first.
_STRIDED_BLOCKS = {128: "128+0", 160: "128+32", 96: "64+32", 64: "64+0", 32: "32+0", 16: "16+0"}
_AMD_STRIDED_BLOCKS = {64: "64+0", 160: "64+16", 96: "64+32", 32: "32+0", 16: "16+0"}


def strided_candidates(channels: int, out_channels: int, device: Device) -> Sequence[str]:
    """Configurations of a strided convolution.

    Not timed yet: chosen by what they cost compiled for compute capability 9.0 and for AMD's cards,
    where none spills registers.
    """
    is_amd = device.vendor == "amd"
    widths = _AMD_STRIDED_BLOCKS if is_amd else _STRIDED_BLOCKS
    blocks = next((n for width, n in widths.items() if out_channels % width == 0), None)
    if blocks is None or channels % 16:
        return ()
    if channels % 32:
        return (f"m32_n{blocks}_k16_w4_s2",)
    if is_amd:
        return (f"m128_n{blocks}_k32_w8_s2", f"m64_n{blocks}_k32_w4_s2")
    depth = 64 if channels % 64 == 0 else 32
    return (f"m128_n{blocks}_k{depth}_w8_s3", f"m64_n{blocks}_k32_w4_s2")


# Width that the channels must be a multiple of -> configurations.
_TMA_ATTENTION = {
    384: ("m128_n64_d128x3_w8_s2", "m64_n64_d128x3_w8_s2", "m64_n32_d128x1_w4_s2"),
    256: ("m128_n64_d128x2_w8_s2", "m64_n32_d128x1_w4_s2"),
    128: ("m128_n64_d128x1_w8_s2", "m64_n32_d128x1_w4_s2"),
    16: ("m16_n16_d16x1_w4_s2",),
}
# Compiled for compute capability 8.0 and 8.6, where they spill 24 bytes at most.
_NVIDIA_ATTENTION = {
    384: ("m64_n32_d128x3_w8_s2", "m64_n32_d128x1_w4_s2"),
    256: ("m64_n32_d128x2_w8_s2", "m64_n32_d128x1_w4_s2"),
    128: ("m64_n32_d128x1_w4_s2",),
    16: ("m16_n16_d16x1_w4_s2",),
}
# Sixteen rows for each warp, so that a row's scores stay in one, and narrow products: with others
# the compiler spills hundreds of bytes (gfx1100).
_AMD_ATTENTION = {
    128: ("m128_n32_d64x2_w8_s1", "m64_n16_d64x2_w4_s1"),
    16: ("m16_n16_d16x1_w4_s2",),
}
_POINTER_ATTENTION: Mapping[Cores, Mapping[int, tuple[str, ...]]] = MappingProxyType(
    {
        "nvidia": _NVIDIA_ATTENTION,
        "cdna": _AMD_ATTENTION,
        "rdna3": _AMD_ATTENTION,
        "rdna4": _AMD_ATTENTION,
    }
)


def attention_candidates(channels: int, device: Device, with_descriptors: bool) -> Sequence[str]:
    """Configurations for a head of `channels`, loaded with tensor descriptors or pointers."""
    found = _TMA_ATTENTION if with_descriptors else _POINTER_ATTENTION[cores_of(device)]
    return next((names for width, names in found.items() if channels % width == 0), ())


# Through pointers, for 99 KiB of shared memory; programs make one frame or two. Not timed yet:
# chosen by what they cost compiled for compute capability 8.6, where none of the first spills
# more than 8 bytes a thread.
_POINTER_WIDE: _ByWidth = {
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
_POINTER_THIN: _ByWidth = {
    64: {1: ("f1_p8x8_n64+0_k16_w4_s2",), 2: ("f2_p8x8_n64+0_k16_w4_s2",)},
    96: {1: ("f1_p8x8_n64+32_k16_w4_s3",), 2: ("f2_p8x8_n64+32_k16_w4_s3",)},
    160: {1: ("f1_p8x8_n128+32_k16_w8_s3",), 2: ("f1_p8x8_n128+32_k16_w8_s3",)},
}
_POINTER_NARROW = {1: ("f1_p4x8_n16+0_k16_w4_s2",), 2: ("f2_p4x8_n16+0_k16_w4_s2",)}


# AMD's: not timed, and compiled for gfx942, gfx1100 and gfx1201, where none spills a register. Of
# what fits, the first has the most products for each byte that it loads, the second half of them.
_CDNA_WIDE: _ByWidth = {
    128: {
        1: ("f1_p8x16_n128+0_k32_w8_s2", "f1_p8x8_n128+0_k32_w4_s2"),
        2: ("f2_p8x16_n128+0_k32_w8_s2", "f2_p8x8_n128+0_k32_w8_s2"),
    },
    64: {
        1: ("f1_p8x16_n64+0_k32_w4_s2", "f1_p8x8_n64+0_k32_w4_s2"),
        2: ("f2_p8x16_n64+0_k32_w4_s2", "f2_p8x8_n64+0_k32_w4_s2"),
    },
    96: {
        1: ("f1_p8x16_n64+32_k32_w8_s2", "f1_p8x8_n64+32_k32_w4_s2"),
        2: ("f2_p8x8_n64+32_k32_w4_s2", "f2_p8x16_n32+0_k32_w4_s2"),
    },
    160: {
        1: ("f1_p8x16_n128+32_k32_w8_s2", "f1_p8x16_n64+16_k32_w4_s2"),
        2: ("f2_p8x8_n128+32_k32_w8_s2", "f2_p8x8_n64+16_k32_w4_s2"),
    },
    32: {
        1: ("f1_p8x16_n32+0_k32_w4_s2", "f1_p8x8_n32+0_k32_w4_s2"),
        2: ("f2_p8x16_n32+0_k32_w4_s2", "f2_p8x8_n32+0_k32_w4_s2"),
    },
}
_RDNA3_WIDE: _ByWidth = {
    128: {
        1: ("f1_p8x8_n128+0_k16_w8_s2", "f1_p8x8_n64+0_k32_w8_s2"),
        2: ("f2_p8x8_n128+0_k16_w8_s2", "f2_p8x8_n64+0_k16_w8_s2"),
    },
    64: {
        1: ("f1_p8x16_n64+0_k16_w8_s2", "f1_p8x8_n64+0_k32_w8_s2"),
        2: ("f2_p8x16_n64+0_k16_w8_s2", "f2_p8x8_n64+0_k16_w8_s2"),
    },
    96: {
        1: ("f1_p8x16_n64+32_k16_w8_s2", "f1_p8x8_n64+32_k16_w8_s2"),
        2: ("f2_p8x8_n64+32_k16_w8_s2", "f2_p8x16_n32+0_k16_w8_s2"),
    },
    160: {
        1: ("f1_p8x16_n64+16_k16_w8_s2", "f1_p8x8_n64+16_k16_w8_s2"),
        2: ("f2_p8x8_n64+16_k16_w8_s2", "f2_p8x16_n32+0_k16_w8_s2"),
    },
    32: {
        1: ("f1_p8x16_n32+0_k16_w8_s2", "f1_p8x8_n32+0_k16_w4_s2"),
        2: ("f2_p8x16_n32+0_k16_w8_s2", "f2_p8x8_n32+0_k16_w4_s2"),
    },
}
_RDNA4_WIDE: _ByWidth = {
    128: {
        1: ("f1_p8x16_n128+0_k32_w8_s2", "f1_p8x8_n128+0_k32_w8_s2"),
        2: ("f2_p8x8_n128+0_k32_w8_s2", "f2_p8x8_n64+0_k32_w8_s2"),
    },
    64: {
        1: ("f1_p8x16_n64+0_k32_w8_s2", "f1_p8x8_n64+0_k32_w4_s2"),
        2: ("f2_p8x16_n64+0_k32_w8_s2", "f2_p8x8_n64+0_k32_w8_s2"),
    },
    96: {
        1: ("f1_p8x16_n64+32_k32_w8_s2", "f1_p8x8_n64+32_k32_w8_s2"),
        2: ("f2_p8x8_n64+32_k32_w8_s2", "f2_p8x16_n32+0_k32_w8_s2"),
    },
    160: {
        1: ("f1_p8x16_n64+16_k32_w8_s2", "f1_p8x8_n64+16_k32_w8_s2"),
        2: ("f2_p8x8_n64+16_k32_w8_s2", "f2_p8x16_n32+0_k32_w8_s2"),
    },
    32: {
        1: ("f1_p8x16_n32+0_k32_w8_s2", "f1_p8x8_n32+0_k32_w4_s2"),
        2: ("f2_p8x16_n32+0_k32_w8_s2", "f2_p8x8_n32+0_k32_w8_s2"),
    },
}
_AMD_THIN: _ByWidth = {
    64: {1: ("f1_p8x8_n64+0_k16_w8_s2",), 2: ("f2_p8x8_n64+0_k16_w8_s2",)},
    96: {1: ("f1_p8x8_n64+32_k16_w8_s2",), 2: ("f2_p8x8_n64+32_k16_w8_s2",)},
    160: {1: ("f1_p8x8_n64+16_k16_w8_s2",), 2: ("f2_p8x8_n64+16_k16_w8_s2",)},
}
# float32 operands, multiplied without tensor cores: small tiles, of any width.
_AMD_FLOAT32 = ConvTable(
    MappingProxyType({}),
    MappingProxyType({}),
    MappingProxyType({1: ("f1_p8x8_n16+0_k16_w4_s1", "f1_p4x8_n16+0_k16_w4_s1")}),
)

_POINTER: Mapping[Cores, ConvTable] = MappingProxyType(
    {
        "nvidia": ConvTable(_POINTER_WIDE, _POINTER_THIN, _POINTER_NARROW),
        "cdna": ConvTable(_CDNA_WIDE, _AMD_THIN, _POINTER_NARROW),
        "rdna3": ConvTable(_RDNA3_WIDE, _AMD_THIN, _POINTER_NARROW),
        "rdna4": ConvTable(_RDNA4_WIDE, _AMD_THIN, _POINTER_NARROW),
    }
)


def pointer_table(device: Device, operand: torch.dtype) -> ConvTable:
    """Configurations with pointer loads."""
    if device.vendor == "amd" and operand == torch.float32:
        return _AMD_FLOAT32
    return _POINTER[cores_of(device)]


def head_candidates(device: Device) -> Sequence[str]:
    """Configurations of a narrow head. RDNA has no room for the sums of more pixels."""
    return ("m128_w4",) if cores_of(device) in ("nvidia", "cdna") else ("m64_w4",)
