"""3x3x3 convolution behind a norm on Hopper: Winograd along time, or direct; and the 3x3 behind an
up-sampler. See conv3x3_wgmma.cu.

Eager twins: `eager.conv3d.conv3d`, `eager.upsample.upsample_conv2d`. Winograd F(2,3) makes two
output frames from four products instead of six; pairs end with a chunk's last frame, so which
frames are a pair does not depend on the chunk schedule. F(4,3) makes four from six, for layers
whose latent frame is four frames (`winograd.py`).
"""

from __future__ import annotations

import functools
import itertools
from ctypes import c_void_p
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...errors import LayoutError
from ...said import said
from ..winograd import DIRECT, PAIRS, QUADS, Transform, pair_phases, quad_phases
from .driver import Argument, frames_map
from .program import Program, integers, launch_persistent

# What the source is written for: wgmma is Hopper's alone.
ARCHITECTURE = "sm_90a"
_BLOCK_K, _TILE = 32, 16
# As in conv3x3_wgmma.cu: bytes of a halo tile by its rows without the halo, and by the number of
# tiles in the ring and the block, the rows of three taps in theirs.
_INPUT_STAGE = {16: 21504, 8: 12288}
_WEIGHT_STAGES = {
    **{(3, 96): 8, (3, 64): 12, (4, 96): 7, (4, 64): 10},
    **{(5, 96): 8, (5, 64): 12},
}


@dataclass(frozen=True)
class Variant:
    """What one compiled kernel is for. `taps`: temporal taps of a direct one (3, or 1). `doubled`:
    it is the 3x3 of an up-sampler, and its operand has the dtype of the result. `quads`: Winograd
    F(4,3) and not F(2,3)."""

    cin: int
    cout: int
    winograd: bool
    taps: int
    out: torch.dtype
    doubled: bool = False
    quads: bool = False

    @property
    def block(self) -> int:
        """Output channels of one accumulator."""
        return 96 if self.cout % 96 == 0 else 64

    @property
    def blocks(self) -> int:
        """Blocks of output channels that one tile of a direct kernel makes."""
        one = self.winograd or self.doubled or self.cout % (2 * self.block)
        return 1 if one else 2

    @property
    def transform(self) -> Transform:
        """How the frames that it reads are transformed along time."""
        return QUADS if self.quads else PAIRS if self.winograd else DIRECT

    @property
    def rows(self) -> int:
        """Of 16 pixels, of a tile."""
        return 8 if self.quads else _TILE

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program: rings, bias, barriers, and room to align the base."""
        inputs = 5 if self.quads else 4 if self.winograd and self.cin > 96 else 3
        rows = _WEIGHT_STAGES[inputs, self.block]
        rings = inputs * _INPUT_STAGE[self.rows] + rows * 3 * self.block * 64
        return 1024 + rings + 4 * self.cout + 2 * (inputs + rows) * 8

    @property
    def name(self) -> str:
        if self.quads:
            return "winograd4"
        return "winograd" if self.winograd else "doubled" if self.doubled else f"direct{self.taps}"


def pack(weight: torch.Tensor, variant: Variant) -> torch.Tensor:
    """[O, C, 3, 3, 3] -> float16, flat, in the order in which the kernel of `variant` reads it.

    By block of output channels, phase (transformed or temporal tap), 32 input channels, row of
    taps, (block within a tile,) tap, output channel, input channel; each row of 64 bytes swizzled.
    The Winograd transform is computed in float32 (F(4,3): float64) and rounded once.
    """
    w = weight.detach().float()
    o, c = w.shape[:2]
    taps = w.unbind(2)
    if variant.quads:
        phases = quad_phases(weight)
    elif variant.winograd:
        phases = torch.stack(pair_phases(*taps))
    else:
        phases = torch.stack(taps[3 - variant.taps :])
    n, block = variant.blocks, variant.block
    # [phase, tile block, block, row, chunk, 4 x 8 channels, ky, kx]
    p = phases.to(torch.float16).view(len(phases), o // (n * block), n, block, c // 32, 4, 8, 3, 3)
    p = p.permute(1, 0, 4, 7, 2, 8, 3, 5, 6)  # tile block, phase, chunk, ky, block, kx, row, 4, 8
    return _swizzled(p)


def pack_doubled(folded: torch.Tensor, variant: Variant) -> torch.Tensor:
    """[4 * O, 4 * C] of `weights.fold_upsample` -> `variant.out`, flat, as the kernel reads it.

    By block of output channels, parity of the output's row, 32 input channels, row of taps, parity
    of the column, tap, output channel, input channel; each row of 64 bytes swizzled.
    """
    o, c, block = variant.cout, variant.cin, variant.block
    # [py, px, tile block, row, ky, kx, chunk, 4 x 8 channels]
    p = folded.to(variant.out).view(2, 2, o // block, block, 2, 2, c // 32, 4, 8)
    return _swizzled(p.permute(2, 0, 6, 4, 1, 5, 3, 7, 8))


def _swizzled(p: torch.Tensor) -> torch.Tensor:
    """Rows [..., row, 4, 8] of 64 bytes, their 16-byte words in the hardware's order; flat.

    Word i of row r goes to place i ^ (r // 2 % 4): in every second pair of rows neighbours change
    places, in every second two pairs the halves. By copies, and not by `gather`: a process loads
    each of PyTorch's CUDA kernels when it is first used (that one: 15 ms, H200).
    """
    swizzled = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    # [..., 8 rows, halves change, neighbours change, row, half, neighbour, 8]
    read, written = (x.unflatten(-2, (2, 2)).unflatten(-4, (-1, 2, 2, 2)) for x in (p, swizzled))
    first, second, both = slice(0, 1), slice(1, 2), slice(None)
    moves = ((both, both),), ((first, second), (second, first))  # from, to: without a change, with
    for halves, neighbours in itertools.product((0, 1), (0, 1)):
        source, target = (x[..., halves, neighbours, :, :, :, :] for x in (read, written))
        for (half, to_half), (word, to_word) in itertools.product(moves[halves], moves[neighbours]):
            target[..., to_half, to_word, :] = source[..., half, word, :]
    return swizzled.flatten()


def conv3x3(
    buffer: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    variant: Variant,
    frames: int,
    padding: tuple[int, int],
) -> torch.Tensor:
    """[B, C, T', H, W] float16 channels_last_3d -> [B, O, frames, H', W'], channels_last_3d.

    `buffer`: with `variant.winograd` the transformed frames of each pair or quad one after the
    other (`CudaNorm.pairs`, `quads`), else frames + taps - 1 frames. `packed`: from `pack`. `bias`
    [O] float32. `residual`: as the result, which has dtype `variant.out`. `padding`: zero rows and
    columns on each side.
    """
    if not buffer.is_contiguous(memory_format=torch.channels_last_3d):
        raise LayoutError(
            said(
                "kernel.operand_strides",
                "the kernel's operand {shape} has strides {strides}: expected channels_last_3d",
                shape=tuple(buffer.shape),
                strides=buffer.stride(),
            )
        )
    b, c, frames_in, h, w = buffer.shape
    height, width = h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
    out = torch.empty(
        (b, frames, height, width, variant.cout), dtype=variant.out, device=buffer.device
    )
    transform = variant.transform
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last_3d)
    groups, stride = transform.groups(frames), transform.products
    sizes = (frames, height, width, groups, stride, frames_in, *padding)
    operand = buffer.data_ptr(), (b * frames_in, h, w, c)
    _launch(variant, _Call(operand, packed, bias, out, residual, sizes, b))
    return out.permute(0, 4, 1, 2, 3)


def upsample_conv3x3(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor,
    variant: Variant,
    padding: tuple[int, int] = (1, 1),
) -> torch.Tensor:
    """[N, C, H, W] in channels_last -> [N, O, 2H, 2W], both of `variant.out`: doubled, then a 3x3.

    `packed`: from `pack_doubled`. `bias` [O] float32. `padding` 0 on an axis: see
    `eager.upsample.upsample_conv2d`.
    """
    n, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).contiguous()
    height, width = h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
    out = torch.empty((n, 2 * height, 2 * width, variant.cout), dtype=variant.out, device=x.device)
    sizes = (n, height, width, n, 1, n, *padding)
    operand = x.data_ptr(), (n, h, w, c)
    _launch(variant, _Call(operand, packed, bias, out, None, sizes, 1))
    return out.permute(0, 3, 1, 2)


class _Call(NamedTuple):
    """One launch. operand: address and size [N, H, W, C]. sizes: the kernel's, from `frames` to
    `pad_x`."""

    operand: tuple[int, tuple[int, int, int, int]]
    packed: torch.Tensor
    bias: torch.Tensor
    out: torch.Tensor
    residual: torch.Tensor | None
    sizes: tuple[int, ...]
    clips: int


def _launch(variant: Variant, call: _Call) -> None:
    operand, packed, bias, out, residual, sizes, clips = call
    frames, height, width, groups, *_ = sizes
    tiles = -(-height // variant.rows) * -(-width // _TILE) * groups * clips
    tiles *= variant.cout // (variant.block * variant.blocks)
    # Without a residual its map is not used.
    added = out if residual is None else residual
    results = clips * frames, height, width, variant.cout
    maps: list[Argument] = []
    if not out.is_meta:  # the driver makes them, and there may be none where nothing is launched
        # Two bytes a number, bfloat16 or float16.
        box = (variant.rows + 2, _TILE + 2, _BLOCK_K)
        maps = [
            frames_map(*operand, box),
            frames_map(added.data_ptr(), results, (variant.rows, _TILE, _BLOCK_K)),
        ]
    arguments: list[Argument] = [
        *maps,
        c_void_p(packed.data_ptr()),
        c_void_p(bias.data_ptr()),
        c_void_p(out.data_ptr()),
        *integers(int(residual is not None), *sizes, tiles),
    ]
    launch_persistent(program(variant), out.device, tiles, arguments)


@functools.cache
def program(variant: Variant) -> Program:
    """The kernel of `variant`."""
    defines = {
        "CIN": variant.cin,
        "COUT": variant.cout,
        "WINOGRAD": int(variant.winograd),
        "QUADS": int(variant.quads),
        "KT": variant.taps,
        "DOUBLED": int(variant.doubled),
        "BN": variant.block,
        "NB": variant.blocks,
        "BF16_OUT": int(variant.out == torch.bfloat16),
        "BF16_IN": int(variant.doubled and variant.out == torch.bfloat16),
    }
    return Program(
        "conv3x3_wgmma.cu",
        "conv3x3",
        tuple(defines.items()),
        ARCHITECTURE,
        threads=384,
        shared_bytes=variant.shared_bytes,
        headers=("hopper.cuh", "winograd.cuh"),
    )
