"""Attention of one wide head on every card from Ampere on (Turing too, in float16); see
attention.cu.

Eager twin: `eager.attention.attention`. A query's bits depend on its own row and all keys, never on
which other queries its program holds: shards that decode some rows get the bits of one device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ctypes import c_float, c_int, c_void_p
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from ...ops.opset import CallSize, Workspace
from ...ops.problem import AttentionProblem, LayerWeights
from ..device import Device
from ..kernel import FusedNorm, Kernel, NormCall, Requires
from ..weights import norm_scale
from ..winograd import DIRECT
from .base import CudaKernel
from .conv_layers import CudaConv, pointwise, pointwise_program
from .layers import OPERAND, CudaLayer
from .norm import make_norm, norm_program
from .program import Program, launch

_LOG2_E = 1.4426950408889634
_KIB = 1024
# As in attention.cu: channels of a slice of values, and its bytes; numbers in a word of 16 bytes.
_PART, _SLICE, _WORD = 128, 8 * _KIB, 8
_MOST_STAGES = 4
# Sums of more would not fit into the registers.
_MOST_CHANNELS = 1024


@dataclass(frozen=True)
class Tile:
    """How a program is cut: it has `rows` * 16 queries for each of `warps_m` warps, and 16 keys for
    each of `warps_n` at a time. shared_kib: how much shared memory it may take."""

    rows: int
    warps_m: int
    warps_n: int
    shared_kib: int

    @property
    def queries(self) -> int:
        """Of one program."""
        return 16 * self.rows * self.warps_m

    @property
    def keys(self) -> int:
        """Of one block."""
        return 16 * self.warps_n

    @property
    def name(self) -> str:
        """Such as "m64_n64"."""
        return f"m{self.queries}_n{self.keys}"


# The best first; a second one for the 64 KiB of Turing.
_NARROW = (Tile(2, 2, 4, 99), Tile(1, 2, 4, 64))
_WIDE = (Tile(2, 1, 8, 99), Tile(1, 1, 8, 64))
_TILES = {tile.name: tile for tile in _NARROW + _WIDE}


@dataclass(frozen=True)
class Variant:
    """What one compiled kernel is for: a head of `channels`, a multiple of 8."""

    channels: int
    tile: Tile

    @property
    def _fixed_bytes(self) -> int:
        """Shared memory for queries, probabilities, and a number of each query and warp."""
        tile, filled = self.tile, self.channels + -self.channels % _PART
        return tile.queries * (2 * filled + 2 * tile.keys + 4 * tile.warps_n)

    @property
    def stages(self) -> int:
        """Slices of keys or values in the ring."""
        fitting = (self.tile.shared_kib * _KIB - self._fixed_bytes) // _SLICE
        return min(_MOST_STAGES, fitting)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        return self._fixed_bytes + self.stages * _SLICE


@functools.cache
def program(variant: Variant, machine_code: str) -> Program:
    """The kernel of `variant`."""
    tile = variant.tile
    defines = {
        "CHANNELS": variant.channels,
        "MI": tile.rows,
        "WARPS_M": tile.warps_m,
        "WARPS_N": tile.warps_n,
        "STAGES": variant.stages,
    }
    return Program(
        "attention.cu",
        "attention",
        tuple(defines.items()),
        machine_code,
        threads=32 * tile.warps_m * tile.warps_n,
        shared_bytes=variant.shared_bytes,
    )


def tiles_for(channels: int) -> tuple[Tile, ...]:
    """The tiles that suit a head of `channels`, the best first."""
    return _NARROW if channels <= 512 else _WIDE


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, machine_code: str
) -> torch.Tensor:
    """softmax(q k^T / sqrt(C)) v, one head: q [N, P, C], k and v [N, K, C], float16 -> [N, P, C].

    They are read where they are if channels lie together and rows are aligned (views of one qkv
    tensor are so), else copied. Raises ValueError for what the kernel is not made for.
    """
    n, queries, c = q.shape
    keys = k.shape[1]
    if c != variant.channels or {q.dtype, k.dtype, v.dtype} != {OPERAND} or not keys:
        raise ValueError(
            f"attention of {c} channels over {keys} keys in {q.dtype}: expected "
            f"{variant.channels} in {OPERAND}"
        )
    q, k, v = map(_rows, (q, k, v))
    out = torch.empty((n, queries, c), dtype=OPERAND, device=q.device)
    steps = [x.stride(axis) // _WORD for x in (q, k, v) for axis in (0, 1)]
    launch(
        program(variant, machine_code),
        q.device,
        (-(-queries // variant.tile.queries), n, 1),
        [
            *(c_void_p(x.data_ptr()) for x in (q, k, v, out)),
            *(c_int(i) for i in (queries, keys, *steps)),
            c_float(_LOG2_E / c**0.5),
        ],
    )
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with its last dimension dense and rows aligned to 16 bytes."""
    aligned = all(stride % _WORD == 0 for stride in x.stride()[:-1])
    dense = x.stride(-1) == 1 and aligned and x.data_ptr() % 16 == 0
    return x if dense else x.contiguous()


@dataclass(frozen=True)
class CudaAttention(CudaLayer):
    """Norm, queries / keys / values, attention and projection. scale: from `norm_scale`."""

    variant: Variant
    scale: torch.Tensor
    qkv: CudaConv
    projection: CudaConv
    fused: FusedNorm
    machine_code: str

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """See `AttentionLayer`."""
        call = NormCall(x[:, :, None], self.scale, past=0, dtype=OPERAND, silu=False)
        return self.fused.join(call)[0][:, :, 0]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `AttentionLayer`."""
        return attention(q, k, v, self.variant, self.machine_code)

    def workspace(self, size: CallSize) -> Workspace:
        """The result of the norm; sums are in registers."""
        pixels = size.batch * size.frames * size.rows * size.cols
        return Workspace(operand_bytes=self.variant.channels * pixels * OPERAND.itemsize)


@dataclass(frozen=True)
class Attention(CudaKernel):
    """Attention. A configuration is the tile's name."""

    def candidates(self, problem: AttentionProblem, device: Device) -> Sequence[str]:
        """See `Kernel`."""
        variants = [Variant(problem.channels, tile) for tile in tiles_for(problem.channels)]
        return [v.tile.name for v in variants if v.shared_bytes <= device.shared_bytes]

    def programs(
        self, problem: AttentionProblem, config: str, device: Device
    ) -> tuple[Program, ...]:
        """See `CompiledKernel`."""
        c, code = problem.channels, device.machine_code
        return (
            program(_variant(problem, config), code),
            pointwise_program(c, 3 * c, OPERAND, code),
            pointwise_program(c, c, problem.feature_dtype, code),
            norm_program(c, problem.feature_dtype, 0, DIRECT, code, silu=False),
        )

    def prepare(
        self, weights: LayerWeights, problem: AttentionProblem, config: str, device: Device
    ) -> CudaAttention:
        """See `Kernel`."""
        if weights.gamma is None or weights.projection is None:
            raise ValueError("attention needs the gain of its norm and a projection")
        code = device.machine_code
        return CudaAttention(
            self.name,
            config,
            _variant(problem, config),
            norm_scale(weights.gamma),
            pointwise(weights.weight, OPERAND, code),
            pointwise(weights.projection, problem.feature_dtype, code),
            make_norm(code),
            code,
        )


def _variant(problem: AttentionProblem, config: str) -> Variant:
    """Raises ValueError for a name that is no configuration."""
    if config not in _TILES:
        raise ValueError(f"{config!r} is no configuration: expected one of {', '.join(_TILES)}")
    return Variant(problem.channels, _TILES[config])


_USED = MappingProxyType(dict.fromkeys(("norm", "conv2d", "attention"), "cuda"))
_REQUIRES = Requires(
    capability=(7, 5),
    in_multiple=16,
    out_channels=(1, _MOST_CHANNELS),
    largest_operand=torch.finfo(OPERAND).max,
)

ATTENTION_KERNELS: tuple[Kernel[Any, Any], ...] = (Attention("mma", "attention", _REQUIRES, _USED),)
