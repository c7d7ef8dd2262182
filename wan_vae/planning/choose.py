"""How a decode or encode goes in the memory that is free: chunks, passes and strips.

Chosen before the first chunk, from predicted peaks (`peak.py`), the faster ways first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from types import MappingProxyType

import torch

from ..chunking import Chunk, schedule
from ..config import WanVAEConfig
from ..network.architecture import residual_convolutions
from ..ops.eager.forms import EagerForms
from ..ops.opset import Prepared
from ..options import PARTS, Operation
from ..said import said
from .encode_peak import EncodeMemory
from .peak import DecodeMemory, WeightFormat

# Of the free bytes, those that a plan may use: for whole pictures, for strips of our kernels and
# for strips of the eager backend. The rest is what the allocator cannot hand out because it lies in
# pieces. NVIDIA H100, allocator capped to 8 GB, 1080p in three strips: our kernels ran out at 0.82;
# capped to 6 GB, 720p in two, the eager backend did at 0.73. More strips cost it little.
_USABLE, _USABLE_STRIPS, _USABLE_EAGER_STRIPS = 0.85, 0.75, 0.6
# A chunk of about one 720p latent frame keeps an H200 busy; smaller pictures take more frames a
# chunk so that launches do not dominate.
_FULL_CHUNK_PIXELS = 4 * 720 * 1280
# With our kernels a chunk is larger by this factor: at latent resolution one 720p frame leaves a
# large device half empty, and what follows goes on in passes.
_WIDE_CHUNKS = 2
# Numbers that the features of a pass may hold: a latent frame of Wan 2.1 at 720p, and half of one
# where memory is short.
PASSES = (4 * 720 * 1280 * 96, 2 * 720 * 1280 * 96)
# Shards take more: an exchange of rows takes as long in a short chunk as in a long one, and at
# latent resolution a shard's frame is too small for a device.
_SHARD_CHUNKS = 2
# At most, of eager float32: half for the bytes of a number, and half because there cuDNN takes
# operand and result of a convolution once more, in its own format (`peak.py`). Its chunks are half
# as long. 480p x 17 on an H200: 11.0 GiB with full passes, where ComfyUI's core took 6.0.
_FLOAT32_PASSES = tuple(n // 4 for n in PASSES)
_USUAL_ITEMSIZE = 2
_STRIP_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)

_NO_KERNELS: Mapping[str, Prepared] = MappingProxyType({})


@dataclass(frozen=True)
class PlanRequest:
    """A decode of a latent [B, z, T, H, W], or an encode to one, that is to be planned.

    dtype: of the computation. memory_format: of the weights. layers: what kernels run, by native
    layer name (`OpSet.layers`); every other layer runs eager. free_bytes: see
    `device.free_bytes`; None plans as if everything fitted. whole_frames: the sink needs them, so
    that strips are taken in each chunk and the history of all of them stays.

    chunk_frames, strips: what the caller asked for. The choice uses them as given, with one
    exception: if one latent frame a chunk does not fit and `strips` is None, strips are planned.

    shards: `latent_shape` is the part of one rank. A rank takes neither passes nor strips.

    forms: how layers without a kernel are computed (`OpSet.forms`). staged: the pixels of an encode
    come from the host, pass by pass.
    """

    config: WanVAEConfig
    latent_shape: tuple[int, ...]
    dtype: torch.dtype
    memory_format: WeightFormat = "contiguous"
    layers: Mapping[str, Prepared] = field(default_factory=lambda: _NO_KERNELS)
    free_bytes: float | None = None
    whole_frames: bool = False
    chunk_frames: int | Sequence[int] | None = None
    strips: int | None = None
    shards: bool = False
    forms: EagerForms = field(default_factory=EagerForms)
    operation: Operation = "decode"
    staged: bool = False


@dataclass(frozen=True)
class Choice:
    """How a decode or encode goes, and what it takes.

    lengths: latent frames of every chunk. pass_elements: numbers that the features of a pass may
    hold (see `pass_frames`); None takes each chunk as a whole. strips: 1 is the whole picture.
    planned_bytes: the predicted peak of allocated device memory above weights, latent and output.
    extra_work: the share of the convolutions' multiplications that strips do twice. note: says why
    strips were planned; None if they were not.
    """

    lengths: tuple[int, ...]
    pass_elements: int | None
    strips: int
    planned_bytes: int
    extra_work: float = 0.0
    note: str | None = None

    @property
    def chunk_frames(self) -> int:
        """Latent frames of the longest chunk."""
        return max(self.lengths)


def choose(request: PlanRequest) -> Choice:
    """Choose chunks, passes and strips. Raises GeometryError for an impossible request."""
    return _Chooser(request).choose()


def planned_bytes(request: PlanRequest) -> int:
    """The predicted peak of a decode in whole chunks, without passes or strips.

    `chunk_frames` of the request says which chunks; None is one latent frame each.
    """
    frames = 1 if request.chunk_frames is None else request.chunk_frames
    return choose(replace(request, chunk_frames=frames, strips=None, shards=True)).planned_bytes


class _Chooser:
    """The choice for one request."""

    def __init__(self, request: PlanRequest):
        self.request = request
        self.memory = _memory_of(request)
        # A run counts as eager as long as one of the layers that do most of the work is.
        large = residual_convolutions(request.config, PARTS[request.operation])
        self.is_eager = not all(name in request.layers for name in large)
        self.wide = max(1, request.dtype.itemsize // _USUAL_ITEMSIZE) if self.is_eager else 1
        self.passes: Sequence[int] = PASSES
        if self.wide > 1:
            limits = zip(PASSES, _FLOAT32_PASSES, strict=True)
            self.passes = tuple(min(n, most) for n, most in limits)

    def choose(self) -> Choice:
        request = self.request
        if request.shards:
            return self._of_shard()
        asked, free = request.chunk_frames, request.free_bytes
        if request.strips is not None:
            chunks = self._schedule(1 if asked is None else asked)
            return self._in_strips(request.strips, chunks, self.passes[0])
        wide = self._full_chunk() * (1 if self.is_eager else _WIDE_CHUNKS)
        ways = _ways(min(request.latent_shape[2], wide), self.passes)
        for frames, elements in ways if asked is None else [(asked, e) for e in self.passes]:
            choice = self._whole(self._schedule(frames), elements)
            if free is None or choice.planned_bytes <= int(_USABLE * free):
                return choice
        assert free is not None
        smallest = self._whole(self._schedule(1), self.passes[-1])
        if smallest.planned_bytes <= int(_USABLE * free):
            return choice  # as asked for; chunks become shorter if memory does run out
        return self._fitting_strips(free, ways, smallest)

    def _fitting_strips(self, free: float, ways: list[tuple[int, int]], smallest: Choice) -> Choice:
        """The fewest strips that fit, or those that take least if none do.

        smallest: what the decode takes at least without strips.
        """
        height = self.request.latent_shape[3]
        counts = [*(n for n in _STRIP_COUNTS if n < height), *([height] if height > 1 else [])]
        usable = int(_USABLE_STRIPS * free)
        if self.is_eager:
            usable, ways = int(_USABLE_EAGER_STRIPS * free), [(1, self.passes[0])]
        best: Choice | None = None
        for count, (frames, elements) in product(counts, ways):
            choice = self._in_strips(count, self._schedule(frames), elements)
            if best is None or choice.planned_bytes < best.planned_bytes:
                best = choice
            if choice.planned_bytes <= usable:
                break
        if best is None or best.planned_bytes >= smallest.planned_bytes:
            return smallest
        note = said(
            "plan.strips",
            "planned {strips} strips: {without} GiB needed without, {free} free; they need "
            "{planned}, and {twice} of the work is done twice",
            strips=best.strips,
            without=_gib(smallest.planned_bytes),
            free=_gib(free),
            planned=_gib(best.planned_bytes),
            twice=f"{best.extra_work:.0%}",
        )
        if best.planned_bytes > usable:
            note = said("plan.unsure", "{note}; no number of strips is sure to fit", note=note)
        return replace(best, note=note)

    def _of_shard(self) -> Choice:
        """The longest chunks that fit."""
        request, free = self.request, self.request.free_bytes
        if request.chunk_frames is not None:
            return self._whole(self._schedule(request.chunk_frames), None)
        frames = min(request.latent_shape[2], _SHARD_CHUNKS * self._full_chunk())
        while True:
            choice = self._whole(self._schedule(frames), None)
            if free is None or frames == 1 or choice.planned_bytes <= _USABLE * free:
                return choice
            frames -= 1

    def _whole(self, chunks: list[Chunk], elements: int | None) -> Choice:
        lengths = tuple(c.frames for c in chunks)
        return Choice(lengths, elements, 1, self.memory.of_picture(chunks, elements))

    def _in_strips(self, count: int, chunks: list[Chunk], elements: int) -> Choice:
        peak = self.memory.of_strips(count, self.request.whole_frames, chunks, elements)
        lengths = tuple(c.frames for c in chunks)
        return Choice(lengths, elements, count, peak.bytes, peak.extra_work)

    def _schedule(self, chunk_frames: int | Sequence[int]) -> list[Chunk]:
        return schedule(self.request.latent_shape[2], chunk_frames)

    def _full_chunk(self) -> int:
        """Latent frames of a chunk that fills a large device."""
        config, (b, _, t, h, w) = self.request.config, self.request.latent_shape
        pixels = b * config.temporal_factor * h * w * config.spatial_factor**2
        return max(1, min(t, _FULL_CHUNK_PIXELS // (pixels * self.wide)))


def _memory_of(request: PlanRequest) -> DecodeMemory | EncodeMemory:
    """What predicts the peaks of `request`."""
    size = (request.config, tuple(request.latent_shape), request.dtype, request.memory_format)
    if request.operation == "encode":
        return EncodeMemory(*size, request.layers, request.forms, request.staged)
    return DecodeMemory(*size, request.layers, request.forms)


def _ways(frames: int, passes: Sequence[int]) -> list[tuple[int, int]]:
    """Latent frames a chunk and numbers a pass, from at most `frames`, the faster ones first."""
    found: list[tuple[int, int]] = []
    while frames:
        found += [(frames, elements) for elements in passes]
        frames //= 2
    return found


def _gib(n: float) -> str:
    return f"{n / 2**30:.1f}"
