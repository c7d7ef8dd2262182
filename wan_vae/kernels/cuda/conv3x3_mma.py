"""3x3x3 convolution behind a norm, and the 3x3 behind an up-sampler, on every card from Ampere on
(Turing too, in float16). See conv3x3_mma.cu and conv3x3_mma_2d.cu.

Eager twins: `eager.conv3d.conv3d`, `eager.upsample.upsample_conv2d`. A configuration is a form and
a tile: "winograd_8x96" makes pairs of frames of 8 x 16 pixels x 96 channels a program. With
"_halfsums" up to 288 products at a time are summed in float16, and these sums in float32.
"""

from __future__ import annotations

import functools
import re
from ctypes import c_void_p
from dataclasses import dataclass
from typing import Literal

import torch

from ...errors import LayoutError
from ...said import said
from ..weights import in_tiles
from ..winograd import DIRECT, PAIRS, QUADS, Transform, pair_phases, quad_phases
from .driver import Argument
from .program import Program, integers, launch_persistent

# winograd: F(2,3) along time. winograd4: F(4,3) along time. winograd2d: F(2,3) along time and rows,
# which is given to no layer, see conv3x3_mma_2d.cu.
Form = Literal["direct1", "direct3", "winograd", "doubled", "winograd2d", "winograd4"]
_NUMBERS: dict[Form, int] = {
    "direct1": 0,
    "direct3": 0,
    "winograd": 1,
    "doubled": 2,
    "winograd2d": 3,
    "winograd4": 4,
}
_TRANSFORMS: dict[Form, Transform] = {
    "winograd": PAIRS,
    "winograd2d": PAIRS,
    "winograd4": QUADS,
}
_OUT = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_CONFIG = re.compile(
    r"(direct1|direct3|winograd|doubled|winograd2d|winograd4)_(\d+x\d+)(_halfsums)?"
)


@dataclass(frozen=True)
class Tile:
    """How a program is cut.

    rows: of 16 pixels. block: output channels. warps_m, warps_n: warps that share the rows, and the
    channels. chunk: input channels of a halo tile. resident: see `Program`. stages: halo tiles in
    the ring. promote: after how many chunks of channels sums of float16 are added in float32.
    """

    rows: int
    block: int
    warps_m: int
    warps_n: int
    chunk: int
    resident: int
    stages: int = 2
    promote: int = 1

    @property
    def summed_channels(self) -> int:
        """Input channels whose products are added in float16, where sums are halves."""
        return self.chunk * self.promote

    @property
    def name(self) -> str:
        """Such as "8x96"."""
        return f"{self.rows}x{self.block}"


# By form: accumulators of two frames, or columns, leave room for fewer pixels. What they take of a
# multiprocessor is what benchmarks/kernel_resources.py prints.
_TWO = (
    Tile(8, 96, 2, 2, 16, 2),
    Tile(12, 96, 4, 3, 32, 1),
    Tile(16, 64, 4, 2, 32, 1),
    Tile(18, 64, 6, 2, 32, 1),
    Tile(8, 80, 4, 1, 16, 2),
    Tile(12, 48, 6, 1, 16, 2),
    Tile(16, 32, 4, 1, 16, 2),
    Tile(16, 24, 4, 1, 16, 2),
    Tile(16, 16, 4, 1, 16, 2),
)
_ONE = (
    Tile(16, 96, 4, 2, 32, 1),
    Tile(16, 64, 4, 1, 16, 2),
    Tile(16, 80, 4, 1, 16, 2),
    Tile(12, 48, 6, 1, 16, 2),
    Tile(16, 32, 4, 1, 16, 2),
    Tile(16, 24, 4, 1, 16, 2),
    Tile(16, 16, 4, 1, 16, 2),
    Tile(16, 8, 4, 1, 16, 2),
)
_FOUR = (  # columns of weights a step
    Tile(8, 96, 2, 2, 16, 2),
    Tile(16, 64, 4, 2, 16, 1),
    Tile(8, 80, 4, 1, 16, 2),
    Tile(12, 48, 6, 1, 16, 2),
    Tile(16, 32, 4, 1, 16, 2),
    Tile(16, 24, 4, 1, 16, 2),
    Tile(16, 16, 4, 1, 16, 2),
)
_QUADS = (
    Tile(4, 96, 2, 2, 16, 2),
    Tile(8, 96, 2, 4, 32, 1),
    Tile(12, 64, 4, 2, 32, 1),
    Tile(8, 64, 4, 2, 32, 1),
    Tile(8, 80, 4, 2, 16, 1),
    Tile(8, 48, 4, 1, 16, 2),
    Tile(8, 32, 4, 1, 16, 2),
    Tile(16, 24, 4, 1, 16, 2),
    Tile(16, 16, 4, 1, 16, 2),
)
_ROW_PAIRS = (
    Tile(8, 96, 2, 2, 16, 2),
    Tile(12, 96, 6, 2, 16, 1, stages=3),
    Tile(12, 64, 6, 2, 16, 1, stages=3, promote=4),
)


def _by_name(*tiles: Tile) -> dict[str, Tile]:
    return {tile.name: tile for tile in tiles}


_TILES: dict[Form, dict[str, Tile]] = {
    "direct1": _by_name(*_ONE),
    "direct3": _by_name(*_ONE),
    "winograd": _by_name(*_TWO),
    "doubled": _by_name(*_FOUR),
    "winograd2d": _by_name(*_ROW_PAIRS),
    "winograd4": _by_name(*_QUADS),
}


@dataclass(frozen=True)
class Variant:
    """What one compiled kernel is for.

    cin, cout: channels of a pixel, multiples of 8 (any `cout` where `out` is float32). operand,
    out: dtypes. repeat: each product is issued so many times, to imitate slower tensor cores in a
    measurement; a result is then wrong.
    """

    cin: int
    cout: int
    form: Form
    tile: Tile
    operand: torch.dtype
    out: torch.dtype
    machine_code: str
    half_sums: bool = False
    repeat: int = 1

    @property
    def taps(self) -> int:
        """Temporal taps of the convolution, of which 1 reads no history."""
        return 1 if self.form in ("direct1", "doubled") else 3

    @property
    def transform(self) -> Transform:
        """How the frames that it reads are transformed along time."""
        return _TRANSFORMS.get(self.form, DIRECT)

    @property
    def config(self) -> str:
        """The name of form and tile."""
        return f"{self.form}_{self.tile.name}{'_halfsums' if self.half_sums else ''}"


def parse(config: str) -> tuple[Form, Tile, bool]:
    """Form, tile and whether sums are halves, of the configuration of this name.

    Raises ValueError.
    """
    match = _CONFIG.fullmatch(config)
    for form, tiles in _TILES.items():
        if match is not None and match[1] == form and match[2] in tiles:
            return form, tiles[match[2]], match[3] is not None
    known = [f"{form}_{name}" for form, tiles in _TILES.items() for name in tiles]
    raise ValueError(f"{config!r} is no configuration: expected one of {', '.join(known)}")


# Narrower blocks read each pixel too often to be tried beside a wide one.
_WIDE = 64


def configs(form: Form, out_channels: int) -> list[str]:
    """Configurations of `form` for a layer, the most promising first: of the tiles that waste the
    fewest output channels the widest, up to three. Two dimensions are for the wide layers alone."""
    tiles = list(_TILES[form].values())
    wasted = {tile: -out_channels % tile.block for tile in tiles}
    fitting = [tile for tile in tiles if wasted[tile] == min(wasted.values())]
    widest = max(tile.block for tile in fitting)
    if form == "winograd2d" and wasted[fitting[0]]:
        return []
    tried = [tile for tile in fitting if tile.block >= min(widest, _WIDE)]
    tried.sort(key=lambda tile: -tile.block)
    return [f"{form}_{tile.name}" for tile in tried[:3]]


def half_sums(names: list[str]) -> list[str]:
    """Those of `names` that can sum in float16: in the others it saves nothing."""
    return [f"{name}_halfsums" for name in names if parse(name)[1].chunk == 32]


# -- weights ---------------------------------------------------------------------------------------


def pack(weight: torch.Tensor, variant: Variant) -> torch.Tensor:
    """[O, C, 3, 3, 3] -> `variant.operand`, flat, in the order in which the kernel reads it.

    The Winograd transform is computed in float32 (F(4,3): float64) and rounded once.
    """
    taps = weight.detach().float().unbind(2)
    if variant.transform == DIRECT:
        phases = torch.stack(taps[3 - variant.taps :])
    elif variant.form == "winograd":
        phases = torch.stack(pair_phases(*taps))
    elif variant.form == "winograd4":
        phases = quad_phases(weight)
    else:
        # Two products of rows for each frame and pass, in the order of conv3x3_mma_2d.cu.
        rows = [pair_phases(*frame.unbind(2)) for frame in pair_phases(*taps)]
        order = ((0, 0), (1, 0), (0, 1), (1, 1), (2, 1), (3, 1), (2, 0), (3, 0))
        products = [torch.stack(rows[frame][2 * y : 2 * y + 2]) for frame, y in order]
        # [phase, product of rows, O, C, column]: a step has all columns, one after the other.
        p = torch.stack(products).permute(0, 4, 1, 2, 3).flatten(1, 2)
        return _fragments(p[:, None], variant)
    # A step is a column of taps, with a tap for each row.
    return _fragments(phases.permute(0, 4, 3, 1, 2), variant)


def pack_doubled(folded: torch.Tensor, variant: Variant) -> torch.Tensor:
    """[4 * O, 4 * C] of `weights.fold_upsample` -> `variant.operand`, flat, as the kernel reads it.

    A phase is a parity of the output's row, a step a parity of its column and a column of taps.
    """
    w = folded.view(2, 2, variant.cout, 2, 2, variant.cin)  # py, px, O, ky, kx, C
    return _fragments(
        w.permute(0, 1, 4, 3, 2, 5).reshape(2, 4, 2, variant.cout, variant.cin), variant
    )


def _fragments(taps: torch.Tensor, variant: Variant) -> torch.Tensor:
    """[phases, steps, taps, O, C] -> as the lanes of a warp hold the tensor cores' second operand.

    By block of output channels, phase, chunk of input channels, step, 16 channels, tap, warp: two
    tiles of 8 output channels in 16 bytes of each lane, then the last tile of an odd number in 8.
    Channels that there are not are zeros.
    """
    tile = variant.tile
    blocks, chunks = -(-variant.cout // tile.block), -(-variant.cin // tile.chunk)
    width, n = tile.block // tile.warps_n, tile.block // tile.warps_n // 8
    phases, steps, count, o, c = taps.shape
    whole = taps.new_zeros(
        (phases, steps, count, blocks * tile.block, chunks * tile.chunk), dtype=variant.operand
    )
    whole[..., :o, :c] = taps.to(variant.operand)
    p = whole.view(
        phases, steps, count, blocks, tile.warps_n, width, chunks, tile.chunk // 16, 2, 4, 2
    )
    # Where each number is stored alone, channels are in their own order.
    p = p.unflatten(5, (n, 8)) if variant.out == torch.float32 else in_tiles(p, 5)
    #  0      1      2      3      4     5     6       7       8   9     10 11
    # phase, step, tap, block, warp, tile, column, chunk, 16 channels, half, quad, pair
    p = p.permute(3, 0, 7, 1, 8, 2, 4, 5, 6, 10, 9, 11)
    lead = p.shape[:7]
    parts = []
    if n > 1:
        pairs = p[..., : n // 2 * 2, :, :, :, :].unflatten(7, (n // 2, 2))
        parts.append(pairs.permute(*range(8), 9, 10, 8, 11, 12).reshape(*lead, -1))
    if n % 2:
        parts.append(p[..., n - 1 :, :, :, :, :].reshape(*lead, -1))
    return torch.cat(parts, -1).flatten()


# -- launches --------------------------------------------------------------------------------------


def conv3x3(
    buffer: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    variant: Variant,
    frames: int,
    padding: tuple[int, int],
) -> torch.Tensor:
    """[B, C, T', H, W] float16 channels_last_3d -> [B, O, frames, H', W'].

    `buffer`: with the forms of Winograd the transformed frames of each pair or quad behind each
    other (`CudaNorm.pairs`, `quads`), else frames + taps - 1 frames. `packed`: from `pack`. `bias`
    [O] float32.
    `residual`: as the result, which has dtype `variant.out` and is channels_last_3d, or dense NCDHW
    where it is float32 (without a residual then). `padding`: zero rows and columns on each side.
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
    b, _, frames_in, h, w = buffer.shape
    height, width = h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
    is_planar = variant.out == torch.float32
    size = (frames, height, width)
    shape = (b, variant.cout, *size) if is_planar else (b, *size, variant.cout)
    out = torch.empty(shape, dtype=variant.out, device=buffer.device)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last_3d)
    transform = variant.transform
    groups, stride = transform.groups(frames), transform.products
    sizes = (frames, h, w, height, width, groups, stride, frames_in, *padding)
    _launch(variant, (buffer, packed, bias, residual, out), sizes, b)
    return out if is_planar else out.permute(0, 4, 1, 2, 3)


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
    n, _, h, w = x.shape
    x = x.permute(0, 2, 3, 1).contiguous()
    height, width = h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
    out = torch.empty((n, 2 * height, 2 * width, variant.cout), dtype=variant.out, device=x.device)
    _launch(variant, (x, packed, bias, None, out), (n, h, w, height, width, n, 1, n, *padding), 1)
    return out.permute(0, 3, 1, 2)


def _launch(
    variant: Variant,
    tensors: tuple[torch.Tensor | None, ...],
    sizes: tuple[int, ...],
    clips: int,
) -> None:
    """tensors: operand, weights, bias, residual, result. sizes: from `frames` to `pad_x`."""
    out = tensors[-1]
    assert out is not None
    _, _, _, height, width, groups, *_ = sizes
    tile = variant.tile
    tiles = -(-height // tile.rows) * -(-width // 16) * groups * clips
    tiles *= -(-variant.cout // tile.block)
    addresses = [c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    arguments: list[Argument] = [*addresses, *integers(*sizes, tiles)]
    launch_persistent(program(variant), out.device, tiles, arguments)


@functools.cache
def program(variant: Variant) -> Program:
    """The kernel of `variant`."""
    tile = variant.tile
    defines = {
        "CIN": variant.cin,
        "COUT": variant.cout,
        "FORM": _NUMBERS[variant.form],
        "ROWS": tile.rows,
        "BN": tile.block,
        "WARPS_M": tile.warps_m,
        "WARPS_N": tile.warps_n,
        "KC": tile.chunk,
        "RESIDENT": tile.resident,
        "BF16_IN": int(variant.operand == torch.bfloat16),
        "OUT": _OUT[variant.out],
        "HALF_SUMS": int(variant.half_sums),
    }
    if variant.form == "winograd2d":
        defines |= {"STAGES": tile.stages, "PROMOTE": tile.promote if variant.half_sums else 1}
    else:
        defines["KT"] = variant.taps
    if variant.repeat > 1:
        defines["REPEAT"] = variant.repeat
    return Program(
        "conv3x3_mma_2d.cu" if variant.form == "winograd2d" else "conv3x3_mma.cu",
        "conv3x3",
        tuple(defines.items()),
        variant.machine_code,
        threads=32 * tile.warps_m * tile.warps_n,
        shared_bytes=_shared_bytes(variant),
        resident=tile.resident,
        headers=("machine.cuh", "winograd.cuh", "conv3x3_tile.cuh"),
    )


def _shared_bytes(variant: Variant) -> int:
    """Of one program, as in the sources: halo tiles, the weights of a chunk or a step, the bias."""
    tile, is_2d = variant.tile, variant.form == "winograd2d"
    taps = 6 * tile.stages if is_2d else 8 if variant.form == "doubled" else 9
    halo = (tile.rows + 2) * 18 * tile.chunk * 2
    weights = taps * tile.chunk // 16 * tile.block * 32
    blocks = -(-variant.cout // tile.block)
    return tile.stages * halo + weights + blocks * tile.block * 4
