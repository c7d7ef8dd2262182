"""3x3x3 convolution behind a norm on Hopper: Winograd along time, or direct. See conv3x3.cu.

Eager twin: `conv3d.conv3d`. Winograd F(2,3) makes two output frames from four products instead of
six; pairs end with a chunk's last frame, so which frames are a pair does not depend on the chunk
schedule.
"""

from __future__ import annotations

import functools
from ctypes import c_int, c_void_p
from dataclasses import dataclass
from importlib.resources import files

import torch

from ...errors import LayoutError
from ..proof import cache_folder
from .driver import Function, compile_cubin, frames_map

ARCHITECTURE = "sm_90a"
_BLOCK_K, _TILE = 32, 16
_BOX, _RESIDUAL_BOX = (_TILE + 2, _TILE + 2, _BLOCK_K), (_TILE, _TILE, _BLOCK_K)
# As in conv3x3.cu: stages of the rings of halo tiles and, by block, of rows of taps.
_INPUT_STAGES, _INPUT_STAGE, _WEIGHT_STAGES = 3, 21504, {96: 8, 64: 12}


@dataclass(frozen=True)
class Form:
    """What one compiled kernel is for. `taps`: temporal taps of a direct one (3, or 1)."""

    cin: int
    cout: int
    winograd: bool
    taps: int
    out: torch.dtype

    @property
    def block(self) -> int:
        """Output channels of one accumulator."""
        return 96 if self.cout % 96 == 0 else 64

    @property
    def blocks(self) -> int:
        """Blocks of output channels that one tile of a direct kernel makes."""
        return 2 if not self.winograd and self.cout % (2 * self.block) == 0 else 1

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program: rings, bias, barriers, and room to align the base."""
        stages = _WEIGHT_STAGES[self.block]
        rings = _INPUT_STAGES * _INPUT_STAGE + stages * 3 * self.block * 64
        return 1024 + rings + 4 * self.cout + 2 * (_INPUT_STAGES + stages) * 8

    @property
    def name(self) -> str:
        return "winograd" if self.winograd else f"direct{self.taps}"


def fits(cin: int, cout: int) -> bool:
    """True if there is a kernel for `cin` to `cout` channels."""
    return cin % _BLOCK_K == 0 and (cout % 96 == 0 or cout % 64 == 0)


def pack(weight: torch.Tensor, form: Form) -> torch.Tensor:
    """[O, C, 3, 3, 3] -> float16, flat, in the order in which the kernel of `form` reads it.

    By block of output channels, phase (transformed or temporal tap), 32 input channels, row of
    taps, (block within a tile,) tap, output channel, input channel; each row of 64 bytes swizzled.
    The Winograd transform is computed in float32 and rounded once.
    """
    w = weight.detach().float()
    o, c = w.shape[:2]
    g0, g1, g2 = w.unbind(2)
    if form.winograd:
        phases = torch.stack([(g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g0, -g2])
    else:
        phases = torch.stack([g0, g1, g2][3 - form.taps :])
    n, block = form.blocks, form.block
    # [phase, tile block, block, row, chunk, 4 x 8 channels, ky, kx]
    p = phases.to(torch.float16).view(len(phases), o // (n * block), n, block, c // 32, 4, 8, 3, 3)
    p = p.permute(1, 0, 4, 7, 2, 8, 3, 5, 6)  # tile block, phase, chunk, ky, block, kx, row, 4, 8
    row = torch.arange(block, device=w.device)
    place = torch.arange(4, device=w.device)[None, :] ^ (row[:, None] // 2 % 4)
    index = place[:, :, None].expand(block, 4, 8).expand(p.shape)
    return p.contiguous().gather(-2, index).flatten()


def conv3x3(
    buffer: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    form: Form,
    frames: int,
    padding: tuple[int, int],
) -> torch.Tensor:
    """[B, C, T', H, W] float16 channels_last_3d -> [B, O, frames, H', W'], channels_last_3d.

    `buffer`: with `form.winograd` the four transformed frames of each pair one after the other
    (`triton_norm.norm_silu_pairs`), else frames + taps - 1 frames. `packed`: from `pack`. `bias`
    [O] float32. `residual`: as the result, which has dtype `form.out`. `padding`: zero rows and
    columns on each side.
    """
    if not buffer.is_contiguous(memory_format=torch.channels_last_3d):
        raise LayoutError(
            f"the kernel's operand {tuple(buffer.shape)} has strides {buffer.stride()}: expected "
            "channels_last_3d"
        )
    b, c, frames_in, h, w = buffer.shape
    height, width = h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
    out = torch.empty((b, frames, height, width, form.cout), dtype=form.out, device=buffer.device)
    groups = (frames + 1) // 2 if form.winograd else frames
    tiles = -(-height // _TILE) * -(-width // _TILE) * groups * b
    tiles *= form.cout // (form.block * form.blocks)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last_3d)
    with torch.cuda.device(buffer.device):
        function, processors = _function(form, buffer.device.index)
        arguments = [
            frames_map(buffer.data_ptr(), (b * frames_in, h, w, c), _BOX),
            # Two bytes a number, whatever their kind.
            frames_map(
                (out if residual is None else residual).data_ptr(),
                (b * frames, height, width, form.cout), _RESIDUAL_BOX,
            ),
            c_void_p(packed.data_ptr()),
            c_void_p(bias.data_ptr()),
            c_void_p(out.data_ptr()),
            *_integers(
                int(residual is not None), frames, height, width, groups,
                4 if form.winograd else 1, frames_in, padding[0], padding[1], tiles,
            ),
        ]  # fmt: skip
        function.launch(min(tiles, processors), 384, arguments)
    return out.permute(0, 4, 1, 2, 3)


@functools.lru_cache(maxsize=512)
def _integers(*numbers: int) -> tuple[c_int, ...]:
    """Arguments of a launch; those of a layer are the same chunk after chunk."""
    return tuple(map(c_int, numbers))


@functools.cache
def build(form: Form) -> bytes:
    """Machine code of the kernel of `form`; seconds, unless it is in the cache folder."""
    defines = {
        "CIN": form.cin, "COUT": form.cout, "WINOGRAD": int(form.winograd), "KT": form.taps,
        "BN": form.block, "NB": form.blocks, "BF16_OUT": int(form.out == torch.bfloat16),
    }  # fmt: skip
    source = files(__package__).joinpath("conv3x3.cu").read_text(encoding="utf-8")
    return compile_cubin(source, defines, ARCHITECTURE, cache_folder() / "kernels")


@functools.cache
def _function(form: Form, device: int) -> tuple[Function, int]:
    """The kernel of `form` loaded on the current device, and its number of multiprocessors."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Function(build(form), "conv3x3", form.shared_bytes), processors
