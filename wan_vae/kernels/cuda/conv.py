"""Convolution as an implicit GEMM, for all layers but the 3x3x3 behind a norm; see conv.cu.

Eager twins: `eager.conv3d.conv3d` and, with a stride, `eager.conv3d.conv2d`. The sum of a result
runs over (taps, 16 input channels) in this order, whatever the tile, the size of the picture or the
length of the chunk.
"""

from __future__ import annotations

import functools
from ctypes import c_void_p
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...errors import LayoutError
from ...said import said
from ..weights import fit_channels, in_tiles
from .program import Program, integers, launch

# As in conv.cu: numbers of the dtypes, pixels of a program, bytes of a pixel in a step.
_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_PIXELS, _STEP, _STAGES = 128, 64, 3


class Block(NamedTuple):
    """How a program makes its output channels: warps along pixels and along channels, and programs
    that a multiprocessor holds, which bounds the registers."""

    rows: int
    columns: int
    resident: int


# By output channels of a program, the one that reads shared memory least for its products first.
BLOCKS = {
    128: Block(2, 2, 2),
    96: Block(2, 2, 3),
    160: Block(4, 2, 2),
    64: Block(2, 2, 4),
    48: Block(4, 1, 4),
    32: Block(4, 1, 4),
    16: Block(4, 1, 4),
}
# Of float32 operands, which are multiplied on the CUDA cores.
FLOAT32_BLOCK = 64


@dataclass(frozen=True)
class Variant:
    """What one compiled kernel is for.

    cin: a multiple of 16. kernel, stride: in frames, rows and columns. block: output channels of
    one program, see `BLOCKS`; the weights are filled with zeros to a multiple of it.
    """

    cin: int
    cout: int
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    operand: torch.dtype
    out: torch.dtype
    block: int

    @property
    def blocks(self) -> int:
        """Programs that share the output channels."""
        return -(-self.cout // self.block)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program: the ring, and the bias."""
        return _STAGES * (_PIXELS + self.block) * _STEP + 4 * self.block


def pack(weight: torch.Tensor, variant: Variant) -> torch.Tensor:
    """[O, C, kT, kH, kW] -> `variant.operand`, flat, in the order in which the kernel reads it.

    By block of output channels and step (64 bytes of a pixel: taps, then channels); within a step
    by input channel if float32, else as the tensor cores' fragments: 16 input channels, warp, two
    tiles of 8 output channels, lane, tile, word.
    """
    w = fit_channels(weight.detach().to(variant.operand)).permute(0, 2, 3, 4, 1).flatten(1)
    step = _STEP // variant.operand.itemsize
    whole = w.new_zeros((variant.blocks * variant.block, -(-w.shape[1] // step) * step))
    whole[: w.shape[0], : w.shape[1]] = w
    if variant.operand == torch.float32:
        p = whole.view(variant.blocks, variant.block, -1, step)
        return p.permute(0, 2, 3, 1).flatten()
    warps = BLOCKS[variant.block].columns
    tiles = variant.block // warps // 8
    # [block, warp, channel, step, 16 input channels, half of them, quad, element]
    p = whole.view(variant.blocks, warps, tiles * 8, -1, 2, 2, 4, 2)
    p = in_tiles(p, 2)
    p = p.view(*p.shape[:2], tiles // 2, 2, *p.shape[3:])
    # [block, warp, two tiles, tile, column, step, 16 input channels, half of them, quad, element]
    return p.permute(0, 5, 6, 1, 2, 4, 8, 3, 7, 9).flatten()


class Call(NamedTuple):
    """One convolution of x [B, C, T, H, W], channels_last_3d, with weights from `pack`.

    bias [O] of any dtype, or None. padding: zero rows above and columns on the left; pad_after:
    below and on the right, as `padding` if None. last_slice: all history is zero and absent from
    `x` (one-frame video), use the last temporal slice of the kernel.
    """

    x: torch.Tensor
    packed: torch.Tensor
    bias: torch.Tensor | None = None
    padding: tuple[int, int] = (0, 0)
    pad_after: tuple[int, int] | None = None
    last_slice: bool = False


def conv(call: Call, variant: Variant, machine_code: str) -> torch.Tensor:
    """[B, O, T', H', W'] of `variant.out`, channels_last_3d; its size is that of eager's."""
    x = call.x.permute(0, 2, 3, 4, 1)
    if not x.is_contiguous() or x.dtype != variant.operand or x.shape[-1] != variant.cin:
        raise LayoutError(
            said(
                "kernel.operand",
                "the kernel's operand {shape} in {dtype} has strides {strides}: expected "
                "{channels} channels in {wanted}, channels_last_3d",
                shape=tuple(call.x.shape),
                dtype=x.dtype,
                strides=call.x.stride(),
                channels=variant.cin,
                wanted=variant.operand,
            )
        )
    b, frames_in, *plane, _ = x.shape
    (kt, *kernel), (st, *stride) = variant.kernel, variant.stride
    after = call.padding if call.pad_after is None else call.pad_after
    first = kt - 1 if call.last_slice else 0
    frames = (frames_in - (kt - first)) // st + 1
    padded = [n + p + a for n, p, a in zip(plane, call.padding, after, strict=True)]
    made = [(n - k) // s + 1 for n, k, s in zip(padded, kernel, stride, strict=True)]
    out = torch.empty((b, frames, *made, variant.cout), dtype=variant.out, device=x.device)

    sizes = [b, frames_in, frames, *plane, *made]
    if kernel == stride == [1, 1]:
        # A plane is a row, and if frames do not meet, all of them are one.
        if padded != plane:
            raise LayoutError(
                said(
                    "kernel.padding",
                    "a kernel of one pixel with padding {padding}, {after}",
                    padding=call.padding,
                    after=after,
                )
            )
        row = plane[0] * plane[1]
        sizes = [b, frames_in, frames, 1, row, 1, row]
        if kt == st == 1:
            sizes = [1, 1, 1, 1, b * frames * row, 1, b * frames * row]
    clips, *arguments = sizes
    tiles = -(-arguments[-2] * arguments[-1] // _PIXELS)
    bias = call.bias
    launch(
        program(variant, machine_code),
        x.device,
        (variant.blocks * tiles * arguments[1] * clips, 1, 1),
        [
            c_void_p(x.data_ptr()),
            c_void_p(call.packed.data_ptr()),
            c_void_p(None if bias is None else bias.data_ptr()),
            c_void_p(out.data_ptr()),
            *integers(-1 if bias is None else _TYPES[bias.dtype], *arguments, *call.padding, first),
        ],
    )
    return out.permute(0, 4, 1, 2, 3)


@functools.cache
def program(variant: Variant, machine_code: str) -> Program:
    """The kernel of `variant`."""
    rows, columns, resident = BLOCKS[variant.block]
    (kt, kh, kw), (st, sy, sx) = variant.kernel, variant.stride
    defines = {
        "CIN": variant.cin,
        "COUT": variant.cout,
        "KT": kt,
        "KH": kh,
        "KW": kw,
        "ST": st,
        "SY": sy,
        "SX": sx,
        "IN": _TYPES[variant.operand],
        "OUT": _TYPES[variant.out],
        "BN": variant.block,
        "WM": rows,
        "WN": columns,
        # The products of float32 need more registers.
        "RESIDENT": 2 if variant.operand == torch.float32 else resident,
    }
    return Program(
        "conv.cu",
        "conv",
        tuple(defines.items()),
        machine_code,
        threads=rows * columns * 32,
        shared_bytes=variant.shared_bytes,
    )
