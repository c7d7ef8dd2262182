"""How a decode or encode goes in the memory that is free: chunks, passes and strips.

Chosen before the first chunk, from predicted peaks (`peak.py`), the faster ways first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import ceil
from types import MappingProxyType

import torch

from ..chunking import Chunk, schedule
from ..config import WanVAEConfig
from ..device import Allocator
from ..network.architecture import residual_convolutions
from ..ops.eager.forms import EagerForms
from ..ops.opset import Prepared
from ..options import PARTS, Operation
from ..said import said
from .encode_peak import EncodeMemory
from .margins import MARGINS
from .peak import DecodeMemory, WeightFormat

# A chunk of about one 720p latent frame keeps an H200 busy; smaller pictures take more frames a
# chunk so that launches do not dominate.
_FULL_CHUNK_PIXELS = 4 * 720 * 1280
# With our kernels a chunk is larger by this factor: at latent resolution one 720p frame leaves a
# large device half empty, and what follows goes on in passes.
_WIDE_CHUNKS = 2
# Numbers that the features of a pass may hold: a latent frame of Wan 2.1 at 720p, and half of one
# where memory is short.
PASSES = (4 * 720 * 1280 * 96, 2 * 720 * 1280 * 96)
# Shards take more: an exchange of rows takes as long for few frames as for many, and a part of a
# frame is too small for a device. Two H200, 720p x 81, milliseconds of the devices: chunks of 4
# latent frames without passes 404, all 21 in passes of twice PASSES[0] 396, of PASSES[0] 403.
_SHARD_WIDER = 2
# At most: until the first pass nothing is copied, shown or stopped.
_MOST_SHARD_FRAMES = 32
# Encodes of shards go in whole chunks.
_SHARD_CHUNKS = 2
# At most, of eager float32: half for the bytes of a number, and half because there cuDNN takes
# operand and result of a convolution once more, in its own format (`peak.py`). Its chunks are half
# as long. 480p x 17 on an H200: 11.0 GiB with full passes and two frames a chunk (the walk: 10.98),
# where ComfyUI's core took 6.0 with one frame.
_FLOAT32_PASSES = tuple(n // 4 for n in PASSES)
_USUAL_ITEMSIZE = 2
# Into how many parts a video is cut whose strips wait on the host: all strips go through a part
# before the next one begins.
_PART_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# What a way must take at most of the time of one with less on the host: the rates are rough.
_WORTH_MORE = 0.95
# Of the host memory that is free, what a plan may take of it: other programs use it too.
_USABLE_HOST = 0.6
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

    shards: `latent_shape` is the part of one rank. A rank takes no strips, and an encode of it no
    passes.

    forms: how layers without a kernel are computed (`OpSet.forms`). staged: the device has memory
    of its own: pixels come from the host and go there pass by pass, and what is not at work can
    wait there. allocator: who hands out the device's memory. host_free_bytes: free host memory;
    None where nobody can say.
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
    allocator: Allocator = "caching"
    host_free_bytes: float | None = None

    @property
    def may_park(self) -> bool:
        """Whether whole frames of strips can be put together on the host; see `runs.parked`."""
        return self.operation == "decode" and self.whole_frames and self.staged


@dataclass(frozen=True)
class Choice:
    """How a decode or encode goes, and what it takes.

    lengths: latent frames of every chunk. pass_elements: numbers that the features of a pass may
    hold (see `pass_frames`); None takes each chunk as a whole. strips: 1 is the whole picture.
    planned_bytes: the predicted peak of allocated device memory above weights, latent and output.
    extra_work: the share of the convolutions' multiplications that strips do twice. note: says why
    strips were planned; None if they were not. parked: strips leave their frames on the host and,
    between parts of the video, their history; all that takes host_bytes there. parts: latent frames
    of each part that all strips go through before the next one begins; each is of whole chunks.
    features_wait: what the trunk has made of a part waits on the host too. seconds: what an H200
    would take in parked strips (`waiting.py`). needed_bytes: what must be free for this to be
    chosen. wanted_bytes: what the fastest way would take, without regard to what is free.
    """

    lengths: tuple[int, ...]
    pass_elements: int | None
    strips: int
    planned_bytes: int
    extra_work: float = 0.0
    note: str | None = None
    parked: bool = False
    parts: tuple[int, ...] = ()
    features_wait: bool = False
    host_bytes: int = 0
    seconds: float = 0.0
    needed_bytes: int = 0
    wanted_bytes: int = 0

    @property
    def chunk_frames(self) -> int:
        """Latent frames of the longest chunk."""
        return max(self.lengths)


def choose(request: PlanRequest) -> Choice:
    """Choose chunks, passes and strips. Raises GeometryError for an impossible request."""
    return _Chooser(request).choose()


def choice_of(
    request: PlanRequest,
    strips: int | None,
    elements: int | None,
    parked: bool,
    parts: Sequence[int] = (),
    features_wait: bool = False,
) -> Choice:
    """What these strips (None: the whole picture) take; `chunk_frames` of the request says of which
    chunks. For a plan that was changed because memory ran out. parts: see `Choice`; of parked
    strips without any they are chosen."""
    assert request.chunk_frames is not None
    return _Chooser(request).priced(strips, elements, parked, parts, features_wait)


class _Chooser:
    """The choice for one request."""

    def __init__(self, request: PlanRequest):
        self.request = request
        self.memory = _memory_of(request)
        # A run counts as eager as long as one of the layers that do most of the work is.
        large = residual_convolutions(request.config, PARTS[request.operation])
        self.margin = MARGINS[request.allocator]
        self.is_eager = not all(name in request.layers for name in large)
        self.wide = max(1, request.dtype.itemsize // _USUAL_ITEMSIZE) if self.is_eager else 1
        self.passes: Sequence[int] = PASSES
        if self.wide > 1:
            limits = zip(PASSES, _FLOAT32_PASSES, strict=True)
            self.passes = tuple(min(n, most) for n, most in limits)

    def choose(self) -> Choice:
        return self._with_bounds(self._choice())

    def priced(
        self,
        strips: int | None,
        elements: int | None,
        parked: bool,
        parts: Sequence[int],
        features_wait: bool,
    ) -> Choice:
        """See `choice_of`."""
        assert self.request.chunk_frames is not None
        chunks = self._schedule(self.request.chunk_frames)
        if strips is None:
            return self._with_bounds(self._whole(chunks, elements))
        assert elements is not None  # only ranks go without passes, and they take no strips
        if not parked:
            return self._with_bounds(self._in_strips(strips, chunks, elements))
        if parts:
            choice = self._parked(strips, chunks, elements, parts, features_wait)
            return self._with_bounds(choice)
        return self._with_bounds(self._parked_as_asked(strips, chunks, elements))

    def _with_bounds(self, choice: Choice) -> Choice:
        share = self.margin.of(choice.strips, self.is_eager, self.request.shards)
        return replace(
            choice,
            needed_bytes=ceil(choice.planned_bytes / share),
            wanted_bytes=max(choice.wanted_bytes, choice.planned_bytes),
        )

    def _choice(self) -> Choice:
        request = self.request
        if request.shards:
            return self._of_shard()
        asked, free = request.chunk_frames, request.free_bytes
        if request.strips is not None:
            chunks = self._schedule(1 if asked is None else asked)
            if request.may_park:
                return self._parked_as_asked(request.strips, chunks, self.passes[0])
            return self._in_strips(request.strips, chunks, self.passes[0])
        wide = self._full_chunk() * (1 if self.is_eager else _WIDE_CHUNKS)
        ways = _ways(min(request.latent_shape[2], wide), self.passes)
        wanted, tried = 0, list[Choice]()
        if asked is None and self.wide > 1:
            # What a frame at a time takes, as ComfyUI's core does it, and so no more than core: a
            # user of --fp32-vae must not run out of memory for having installed us.
            most = self._whole(self._schedule(1), None).planned_bytes
            ways = [
                way
                for way in ways
                if self._whole(self._schedule(way[0]), way[1]).planned_bytes <= most
            ] or ways[-1:]
        for frames, elements in ways if asked is None else [(asked, e) for e in self.passes]:
            choice = self._whole(self._schedule(frames), elements)
            wanted = max(wanted, choice.planned_bytes)
            if free is None or choice.planned_bytes <= int(self.margin.whole * free):
                return replace(choice, wanted_bytes=wanted)
            tried.append(choice)
        assert free is not None
        smallest = _least([*tried, self._whole(self._schedule(1), self.passes[-1])])
        if smallest.planned_bytes > int(self.margin.whole * free):
            choice = self._fitting_strips(free, ways, smallest)
        # Else as asked for; chunks become shorter if memory does run out.
        return replace(choice, wanted_bytes=wanted)

    def _fitting_strips(self, free: float, ways: list[tuple[int, int]], smallest: Choice) -> Choice:
        """The fewest strips that fit, or those that take least if none do.

        smallest: what the decode takes at least without strips.
        """
        usable = int(self.margin.of(2, self.is_eager, False) * free)
        best = self._fitting_parked_strips(usable, ways) if self.request.may_park else None
        if best is None:
            best = self._fitting_strips_on_the_device(usable, ways)
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
        if best.parked:
            host = _gib(best.host_bytes)
            if len(best.parts) == 1:
                note = said(
                    "plan.parked",
                    "{note}; frames of strips wait in {host} GiB of host memory",
                    note=note,
                    host=host,
                )
            else:
                note = said(
                    "plan.parked_history",
                    "{note}; frames and history of strips wait in {host} GiB of host memory",
                    note=note,
                    host=host,
                )
        if best.planned_bytes > usable:
            note = said("plan.unsure", "{note}; no number of strips is sure to fit", note=note)
        return replace(best, note=note)

    def _strip_counts(self) -> list[int]:
        height = self.request.latent_shape[3]
        return [*(n for n in _STRIP_COUNTS if n < height), *([height] if height > 1 else [])]

    def _strip_ways(self, ways: list[tuple[int, int]]) -> list[tuple[list[Chunk], int]]:
        """Chunks and numbers a pass of strips, the faster ones first."""
        asked = self.request.chunk_frames
        if asked is not None:
            passes = self.passes[:1] if self.is_eager else self.passes
            return [(self._schedule(asked), elements) for elements in passes]
        if self.is_eager:
            ways = [(1, self.passes[0])]
        return [(self._schedule(frames), elements) for frames, elements in ways]

    def _fitting_strips_on_the_device(
        self, usable: int, ways: list[tuple[int, int]]
    ) -> Choice | None:
        """The fewest strips that take `usable` bytes, or the smallest; all that they keep stays on
        the device."""
        if self.is_eager:
            ways = [(1, self.passes[0])]
        best: Choice | None = None
        for count, (frames, elements) in product(self._strip_counts(), ways):
            choice = self._in_strips(count, self._schedule(frames), elements)
            if best is None or choice.planned_bytes < best.planned_bytes:
                best = choice
            if choice.planned_bytes <= usable:
                break
        return best

    def _fitting_parked_strips(self, usable: int, ways: list[tuple[int, int]]) -> Choice | None:
        """Of parked strips that take `usable` bytes those that take least time, or the smallest.
        None where the host has no room for what waits there."""
        smallest: Choice | None = None
        best: Choice | None = None
        for count, features_wait in product(_PART_COUNTS, (False, True)):
            choice = self._fewest_parked_strips(usable, ways, count, features_wait, best)
            if choice is None:
                continue
            if smallest is None or choice.planned_bytes < smallest.planned_bytes:
                smallest = choice
            if choice.planned_bytes <= usable:
                best = choice  # it takes less time than the one before
        return smallest if best is None else best

    def _fewest_parked_strips(
        self,
        usable: int,
        ways: list[tuple[int, int]],
        parts: int,
        features_wait: bool,
        best: Choice | None,
    ) -> Choice | None:
        """The fewest strips that take `usable` bytes in so many parts of the video, or the smallest
        of all. None where the host has no room, where there are not so many chunks, or where none
        takes clearly less time than `best`."""
        smallest: Choice | None = None
        for count, (chunks, elements) in product(self._strip_counts(), self._strip_ways(ways)):
            lengths = _parts(chunks, parts)
            if len(lengths) < parts:
                continue
            choice = self._parked(count, chunks, elements, lengths, features_wait)
            is_slower = best is not None and choice.seconds > _WORTH_MORE * best.seconds
            if is_slower or not self._fits_the_host(choice):
                break  # more strips only add to both
            if smallest is None or choice.planned_bytes < smallest.planned_bytes:
                smallest = choice
            if choice.planned_bytes <= usable:
                break
        return smallest

    def _parked_as_asked(self, count: int, chunks: list[Chunk], elements: int) -> Choice:
        """So many strips: in the fewest parts for which the host has room, or in the smallest."""
        choices = []
        for parts in _PART_COUNTS:
            lengths = _parts(chunks, parts)
            choices.append(self._parked(count, chunks, elements, lengths, features_wait=False))
            if self._fits_the_host(choices[-1]):
                return choices[-1]
        return min(choices, key=lambda choice: choice.host_bytes)

    def _fits_the_host(self, choice: Choice) -> bool:
        host = self.request.host_free_bytes
        return host is None or choice.host_bytes <= _USABLE_HOST * host

    def _of_shard(self) -> Choice:
        """The longest chunks and passes that fit; those that take least if none do."""
        request, free = self.request, self.request.free_bytes
        asked, ways, wanted = request.chunk_frames, self._shard_ways(), 0
        tried: list[Choice] = []
        passes = dict.fromkeys(elements for _, elements in ways)
        for frames, elements in ways if asked is None else [(asked, e) for e in passes]:
            choice = self._whole(self._schedule(frames), elements)
            wanted = max(wanted, choice.planned_bytes)
            if free is None or choice.planned_bytes <= self.margin.shards * free:
                return replace(choice, wanted_bytes=wanted)
            tried.append(choice)
        return replace(_least(tried), wanted_bytes=wanted)

    def _shard_ways(self) -> list[tuple[int, int | None]]:
        """Latent frames a chunk and numbers a pass of a shard, the faster ones first."""
        total = self.request.latent_shape[2]
        if self.request.operation == "encode":
            most = min(total, _SHARD_CHUNKS * self._full_chunk())
            return [(frames, None) for frames in range(most, 0, -1)]
        passes = _SHARD_WIDER * self.passes[0], *self.passes
        return list(_ways(min(total, _MOST_SHARD_FRAMES), passes))

    def _whole(self, chunks: list[Chunk], elements: int | None) -> Choice:
        lengths = tuple(c.frames for c in chunks)
        return Choice(lengths, elements, 1, self.memory.of_picture(chunks, elements))

    def _in_strips(self, count: int, chunks: list[Chunk], elements: int) -> Choice:
        peak = self.memory.of_strips(count, self.request.whole_frames, chunks, elements)
        lengths = tuple(c.frames for c in chunks)
        return Choice(lengths, elements, count, peak.bytes, peak.extra_work)

    def _parked(
        self,
        count: int,
        chunks: list[Chunk],
        elements: int,
        parts: Sequence[int],
        features_wait: bool,
    ) -> Choice:
        assert isinstance(self.memory, DecodeMemory)  # `may_park`
        peak = self.memory.of_parked_strips(count, chunks, elements, parts, features_wait)
        assert peak.waiting is not None
        return Choice(
            tuple(c.frames for c in chunks),
            elements,
            count,
            peak.bytes,
            peak.extra_work,
            parked=True,
            parts=tuple(parts),
            features_wait=features_wait,
            host_bytes=peak.host_bytes,
            seconds=peak.waiting.seconds,
        )

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
    return DecodeMemory(*size, request.layers, request.forms, request.staged, request.shards)


def _ways(frames: int, passes: Sequence[int]) -> list[tuple[int, int]]:
    """Latent frames a chunk and numbers a pass, from at most `frames`, the faster ones first."""
    found: list[tuple[int, int]] = []
    while frames:
        found += [(frames, elements) for elements in passes]
        frames //= 2
    return found


def _least(choices: Sequence[Choice]) -> Choice:
    """That which takes least, the last of equal ones. Not always the shortest chunks: one chunk of
    two latent frames keeps no history, which takes up to a quarter more."""
    return min(reversed(choices), key=lambda choice: choice.planned_bytes)


def _parts(chunks: Sequence[Chunk], count: int) -> tuple[int, ...]:
    """Latent frames of at most `count` parts of whole chunks, as even as the chunks allow."""
    total, found, stop = chunks[-1].stop, [], 0
    for i in range(1, count + 1):
        ends = [c.stop for c in chunks if c.stop > stop]
        if ends:
            end = total if i == count else min(ends, key=lambda end: abs(end - total * i / count))
            found.append(end - stop)
            stop = end
    return tuple(found)


def _gib(n: float) -> str:
    return f"{n / 2**30:.1f}"
