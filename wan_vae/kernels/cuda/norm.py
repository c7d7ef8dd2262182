"""RMS norm + SiLU that writes straight into the convolution's operand; see norm.cu.

Eager twin: `norm.rms_norm_silu` followed by `layout.join_frames`. One launch copies the history
frames, normalises the new ones behind them, keeps the last ones for the next chunk and, on a shard,
does the same with the neighbours' rows around the rank's own: a pixel's bits depend on its
channels alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from ctypes import c_int, c_void_p
from dataclasses import dataclass

import torch

from ..kernel import FusedNorm, NormCall, NormResult
from ..winograd import DIRECT, PAIRS, QUADS, Transform
from .program import Program, launch

_INPUTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_RESULTS = (torch.float16, torch.bfloat16)
_VECTOR, _WARP = 8, 32
# Two past frames, two new ones and the features of two are in registers (quads: four of each).
_MOST_VECTORS = 5
_THREADS = {"norm_join": 256, "norm_pairs": 128, "norm_quads": 128}
_ENTRIES = {DIRECT: "norm_join", PAIRS: "norm_pairs", QUADS: "norm_quads"}


@dataclass(frozen=True)
class Variant:
    """What one compiled kernel is for. width: channels of the result; halo: "" without."""

    entry: str
    channels: int
    width: int
    dtype: torch.dtype
    out: torch.dtype
    past: int
    silu: bool
    halo: str

    @property
    def lanes(self) -> int:
        """Threads of one pixel."""
        return _lanes(self.width)

    @property
    def vectors(self) -> int:
        """Of 8 channels, that a thread has."""
        return -(-self.width // (_VECTOR * self.lanes))


@functools.cache
def _lanes(width: int) -> int:
    """Threads of one pixel: so many that each has a few vectors of 8 channels and none stands idle,
    and that together they read 64 bytes of neighbours."""
    vectors = width // _VECTOR
    numbers = [1 << i for i in range(6)]
    fitting = [n for n in numbers if -(-vectors // n) <= _MOST_VECTORS] or [_WARP]
    return min(fitting, key=lambda n: (-vectors % n, max(4 - n, 0), n))


@functools.cache
def program(variant: Variant, machine_code: str) -> Program:
    """The kernel of `variant`."""
    threads = _THREADS[variant.entry]
    defines = {
        "ENTRY": tuple(_ENTRIES.values()).index(variant.entry),
        "CHANNELS": variant.channels,
        "WIDTH": variant.width,
        "X": _INPUTS[variant.dtype],
        "BF16_OUT": int(variant.out == torch.bfloat16),
        "PAST": variant.past,
        "SILU": int(variant.silu),
        "HALO": ("", "height", "width").index(variant.halo),
        "LANES": variant.lanes,
        "VECTORS": variant.vectors,
        "THREADS": threads,
    }
    return Program(
        "norm.cu",
        variant.entry,
        tuple(defines.items()),
        machine_code,
        threads,
        headers=("machine.cuh", "winograd.cuh"),
    )


def norm_program(
    channels: int,
    dtype: torch.dtype,
    past: int,
    transform: Transform,
    machine_code: str,
    silu: bool = True,
) -> Program:
    """What a float16 operand is written by, of a whole picture with features of `dtype`.

    On a shard, with halo rows, another program does it, which is compiled at its first use.
    """
    entry = _ENTRIES[transform]
    variant = Variant(entry, channels, channels, dtype, torch.float16, past, silu, "")
    return program(variant, machine_code)


@dataclass(frozen=True)
class CudaNorm(FusedNorm):
    """quads: transformed for Winograd F(4,3), [B, C, 6 * ceil(T / 4), H', W']."""

    quads: Callable[[NormCall], NormResult]

    def of(self, transform: Transform) -> Callable[[NormCall], NormResult]:
        """The one that writes the operand of a convolution with `transform`."""
        return {DIRECT: self.join, PAIRS: self.pairs, QUADS: self.quads}[transform]


@functools.cache
def make_norm(machine_code: str) -> CudaNorm:
    """The norms of this family, for cards that run `machine_code` (see `Device.machine_code`)."""

    def join(call: NormCall) -> NormResult:
        """silu(rms_norm(x)) behind `past` history frames, and the last `past` frames of the result.

        See `NormCall`. Returns the operand [B, C, past + T, H', W'] (channels_last_3d) and, if
        `keep`, the new history in memory of its own (with `overwrite`, in that of `history`).
        """
        return _run(DIRECT, call, machine_code)

    def pairs(call: NormCall) -> NormResult:
        """As `join` with two past frames, but transformed for Winograd F(2,3) along time.

        Returns [B, C, 4 * ceil(T / 2), H', W']: for each two frames d2, d3 behind d0, d1 the four
        frames d0 - d2, d1 + d2, d2 - d1, d1 - d3 of the rounded frames; and the new history,
        untransformed. Pairs end with the last frame: if T is odd (a chunk with the video's first
        frame, which stands alone), the first pair's d2 is of the past. So which frames are a pair
        does not depend on the chunk schedule.
        """
        return _run(PAIRS, call, machine_code)

    def quads(call: NormCall) -> NormResult:
        """As `pairs`, for F(4,3) with the points of `winograd.POINTS`.

        Returns [B, C, 6 * ceil(T / 4), H', W']: for each four frames d2 to d5 behind d0, d1 the six
        frames that `Points.into` makes of the rounded frames, in float32, rounded once; and the new
        history, untransformed. Quads end with the last frame; frames of the past that the history
        does not reach are zero, and matter to none of the new ones. A quad is a latent frame, so
        the bits do not depend on the chunk schedule.
        """
        return _run(QUADS, call, machine_code)

    return CudaNorm("cuda", join, pairs, quads)


def _run(transform: Transform, call: NormCall, machine_code: str) -> NormResult:
    """Launch the norm for `call`. Raises ValueError for what it is not made for."""
    entry = _ENTRIES[transform]
    x, halo, past = call.x, call.halo, call.past
    b, c, t, h, w = x.shape
    dtype = x.dtype if call.dtype is None else call.dtype
    width = c if call.channels is None else call.channels
    if c % _VECTOR or width % _VECTOR or not 0 < c <= width:
        raise ValueError(f"{c} channels of {width}: the norm's kernel needs multiples of 8")
    if x.dtype not in _INPUTS or dtype not in _RESULTS:
        raise ValueError(f"no norm of {x.dtype} with a result in {dtype}")
    if past not in ((0, 1, 2) if transform == DIRECT else (2,)):
        raise ValueError(f"{entry} with {past} frames of the past")

    x = x.contiguous(memory_format=torch.channels_last_3d)
    edges: Sequence[torch.Tensor | None] = (None, None)
    plane = h, w
    if halo is not None:
        edges = halo.on_their_way
        plane = (h + 2, w) if halo.axis == "height" else (h, w + 2)
    history = call.history if past else None
    if history is not None:
        if history.dtype != dtype or history.shape != (b, width, past, *plane):
            raise ValueError(f"a history {tuple(history.shape)} in {history.dtype}")
        history = history.contiguous(memory_format=torch.channels_last_3d)
    kept: torch.Tensor | None = None
    if call.keep and past:
        own = None if history is None or not call.overwrite else history
        kept = _empty(x, b, width, past, plane, dtype) if own is None else own
    out = _empty(x, b, width, transform.operand_frames(t, past), plane, dtype)

    axis = "" if halo is None else halo.axis
    made, lanes = _made(entry, c, width, x.dtype, dtype, past, call.silu, axis, machine_code)
    tensors = (x, *edges, call.scale, history, out, kept)
    pointers = [c_void_p(None if y is None else y.data_ptr()) for y in tensors]

    def run(pixels: int, are_edges: bool) -> None:
        blocks = -(-pixels * lanes // made.threads)
        grid = (blocks, t if transform == DIRECT else 1, b)
        sizes = [c_int(n) for n in (t, h, w, are_edges)]
        launch(made, x.device, grid, [*pointers, *sizes])

    run(h * w, False)
    if halo is not None:
        halo.arrive()
        run(plane[0] * plane[1] - h * w, True)
    return out, kept


@functools.lru_cache(maxsize=512)
def _made(
    entry: str,
    channels: int,
    width: int,
    dtype: torch.dtype,
    out: torch.dtype,
    past: int,
    silu: bool,
    halo: str,
    machine_code: str,
) -> tuple[Program, int]:
    """The program of a `Variant`, and its lanes: looked up at each launch."""
    variant = Variant(entry, channels, width, dtype, out, past, silu, halo)
    return program(variant, machine_code), variant.lanes


def _empty(
    x: torch.Tensor, b: int, c: int, t: int, plane: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """[B, C, T, H, W] on the device of `x`, channels_last_3d."""
    return torch.empty((b, t, *plane, c), dtype=dtype, device=x.device).permute(0, 4, 1, 2, 3)
