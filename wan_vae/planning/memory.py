"""Device memory: what is free, what a decode will take, and the schedule that fits.

Asked before the first chunk. The model is a walk over the decoder that holds and drops, in bytes,
the tensors that `blocks.py` and `decoder.py` hold and drop; it allocates nothing and takes
milliseconds. A test holds it to a tracked decode, so a change of those files that costs memory
fails there until it is told here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

import torch

from .. import geometry
from ..chunking import Chunk, schedule
from ..config import WanVAEConfig
from ..geometry import Strip

# The allocator's smallest block.
_BLOCK_BYTES = 512
# Of the free bytes, those that a plan may use: for whole pictures, for strips of our kernels and
# for strips of the eager backend. The rest is what the allocator cannot hand out because it lies in
# pieces. NVIDIA H100, allocator capped to 8 GB, 1080p in three strips: our kernels ran out at 0.82;
# capped to 6 GB, 720p in two, the eager backend did at 0.73. More strips cost it little.
_USABLE, _USABLE_STRIPS, _USABLE_EAGER_STRIPS = 0.85, 0.75, 0.6
# Memory that cuDNN takes for one convolution of NCDHW data, in units of its operand's bytes:
# it converts operand and result to NDHWC and back. NVIDIA H200, bfloat16, contiguous against
# channels_last_3d: 1.28 GiB more at 480p, 1.64 at 720p (Wan 2.1), which is operand + result of
# the widest convolution to 1%; benchmarks/results/2026-11-24-h200-eager.md. NDHWC data takes
# none: there the walk alone is within 1% of the measured peaks.
# A single frame in NCDHW (a 1x3x3 kernel) runs through unfolded columns, one for each tap: the
# 1024x1024 image of the same results took 2.40 GiB, of which 1.69 are 9 operands. An H100 with the
# same versions took 1.23: the plan keeps to the larger.
_IMAGE_COLUMNS = 9
# A chunk of about one 720p latent frame keeps an H200 busy; smaller pictures take more frames a
# chunk so that launches do not dominate.
_FULL_CHUNK_PIXELS = 4 * 720 * 1280
# With our kernels a chunk is so many times larger: at latent resolution one 720p frame leaves a
# large device half empty, and what follows goes on in passes.
_WIDE_CHUNKS = 2
# Numbers that the features of a pass may hold: a latent frame of Wan 2.1 at 720p, and half of one
# where memory is short.
_PASSES = (4 * 720 * 1280 * 96, 2 * 720 * 1280 * 96)
# Shards take more: each exchange of rows costs a chunk the same time whatever its length, and at
# latent resolution a shard's frame is too small for a device.
_SHARD_CHUNKS = 2
_STRIP_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)


@dataclass(frozen=True)
class Plan:
    """How a decode goes: latent frames a chunk, strips (1: the whole picture), and what it takes.

    `lengths` are the frames of every chunk, and `pass_elements` is what features of a pass may
    hold (see `pass_frames`). `planned_bytes` is the predicted peak of allocated
    device memory above weights, latent and output. `extra_work` is the share of the convolutions'
    multiplications that strips do twice. `note` says why strips were planned; None if they were
    not.
    """

    lengths: tuple[int, ...]
    strips: int
    planned_bytes: int
    pass_elements: int
    extra_work: float = 0.0
    note: str | None = None

    @property
    def chunk_frames(self) -> int:
        return max(self.lengths)


def plan_decode(
    config: WanVAEConfig,
    latent_shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: str,
    free: int | None,
    *,
    whole_frames: bool = False,
    chunk_frames: int | Sequence[int] | None = None,
    strips: int | None = None,
    backend: str = "eager",
) -> Plan:
    """Choose chunks and strips of a decode of latent [B, z, T, H, W] in `free` bytes.

    backend: what runs the 3x3x3 convolutions ("eager", "triton" or "cuda").
    free: see `device.free_bytes`; None plans as if it all fitted. memory_format: of the weights.
    whole_frames: the sink needs them, so strips are taken in each chunk and the history of all of
    them stays. chunk_frames, strips: what the caller asked for, kept as it is; but where not even
    one latent frame a chunk fits and `strips` is None, strips are planned whatever
    `chunk_frames` is. Raises GeometryError for an impossible request.
    """
    _, _, t, height, _ = latent_shape
    model = _Model(config, latent_shape, dtype, memory_format, backend)
    usable = None if free is None else int(_USABLE * free)
    if strips is not None:
        return model.in_strips(
            strips, whole_frames, schedule(t, 1 if chunk_frames is None else chunk_frames),
            _PASSES[0],
        )  # fmt: skip
    wide = _full_chunk(config, latent_shape) * (1 if backend == "eager" else _WIDE_CHUNKS)
    ways = _ways(min(t, wide))
    asked = [] if chunk_frames is None else [(chunk_frames, e) for e in _PASSES]
    for frames, elements in asked or ways:
        plan = model.in_chunks(schedule(t, frames), elements)
        if usable is None or plan.planned_bytes <= usable:
            return plan
    smallest = model.in_chunks(schedule(t, 1), _PASSES[-1])
    if smallest.planned_bytes <= usable:
        return plan  # as asked for; out of memory would shrink the chunks
    counts = [*(n for n in _STRIP_COUNTS if n < height), *([height] if height > 1 else [])]
    usable = int(_USABLE_STRIPS * free)
    if backend == "eager":
        usable, ways = int(_USABLE_EAGER_STRIPS * free), [(1, _PASSES[0])]
    best = None
    for count, (frames, elements) in product(counts, ways):
        plan = model.in_strips(count, whole_frames, schedule(t, frames), elements)
        if best is None or plan.planned_bytes < best.planned_bytes:
            best = plan
        if plan.planned_bytes <= usable:
            break
    if best is None or best.planned_bytes >= smallest.planned_bytes:
        return smallest
    note = (
        f"planned {best.strips} strips: {_gib(smallest.planned_bytes)} GiB needed without, "
        f"{_gib(free)} free; they need {_gib(best.planned_bytes)}, and {best.extra_work:.0%} of "
        "the work is done twice"
    )
    if best.planned_bytes > usable:
        note += "; no number of strips is sure to fit"
    return replace(best, note=note)


def _ways(frames: int) -> list[tuple[int, int]]:
    """Latent frames a chunk and numbers a pass, from at most `frames`, the faster ones first."""
    found = []
    while frames:
        found += [(frames, elements) for elements in _PASSES]
        frames //= 2
    return found


def pass_frames(
    config: WanVAEConfig, latent_shape: tuple[int, ...], elements: int
) -> tuple[int, ...]:
    """Frames of features that enter each stage of the decoder at once (`Step.pass_frames`).

    As many as keep what enters a stage, and what it makes of that, below `elements` numbers; but at
    least a pair where a latent frame is several (see `decoder.first_pass`). latent_shape: [B, z, T,
    rows, W] of the picture, or of the rows that a strip reads.
    """
    b, _, _, h, w = latent_shape
    found, per_latent, pixels = [], 1, b * h * w
    for stage in _stages(config):
        largest = max(stage.channels_in, stage.channels) * pixels
        if stage.up is not None:
            largest = max(largest, stage.up * pixels * 4 * (2 if stage.temporal else 1))
        frames = elements // largest
        found.append(max(1, frames) if per_latent == 1 else max(2, frames - frames % 2))
        pixels, per_latent = pixels * 4, per_latent * (2 if stage.temporal else 1)
    return tuple(found)


def planned_bytes(
    config: WanVAEConfig,
    latent_shape: tuple[int, ...],
    dtype: torch.dtype,
    chunk_frames: int,
    memory_format: str = "contiguous",
    backend: str = "eager",
) -> int:
    """Predicted peak of a decode in chunks of `chunk_frames` latent frames, without strips.

    Chunks go through whole, not in passes. The defaults are the format and the backend that take
    more. See `Plan`.
    """
    model = _Model(config, latent_shape, dtype, memory_format, backend)
    return model.in_chunks(schedule(latent_shape[2], chunk_frames), None).planned_bytes


def plan_chunk_frames(
    config: WanVAEConfig,
    latent_shape: tuple[int, ...],
    dtype: torch.dtype,
    free: int | None,
    memory_format: str = "contiguous",
    backend: str = "eager",
) -> int:
    """Latent frames a chunk for a decode that cannot go in strips (a shard): see `plan_decode`."""

    def fits(frames: int) -> bool:
        needed = planned_bytes(config, latent_shape, dtype, frames, memory_format, backend)
        return needed <= _USABLE * free

    frames = min(latent_shape[2], _SHARD_CHUNKS * _full_chunk(config, latent_shape))
    while free is not None and frames > 1 and not fits(frames):
        frames -= 1
    return frames


def _full_chunk(config: WanVAEConfig, latent_shape: tuple[int, ...]) -> int:
    """Latent frames of a chunk that fills a large device."""
    b, _, t, h, w = latent_shape
    pixels = b * config.temporal_factor * h * w * config.spatial_factor**2
    return max(1, min(t, _FULL_CHUNK_PIXELS // pixels))


def _gib(n: int) -> str:
    return f"{n / 2**30:.1f}"


# -- the model -----------------------------------------------------------------------------------


class _Stage(NamedTuple):
    """Channels of a decoder stage's input, of its blocks, and of its up-sampler (None without)."""

    channels_in: int
    channels: int
    up: int | None
    temporal: bool


def _stages(config: WanVAEConfig) -> list[_Stage]:
    mult = config.dim_mult
    widths = [config.decoder_dim * m for m in (mult[-1], *reversed(mult))]
    temporal = (*reversed(config.temporal_downsample), False)
    found = []
    for i, (cin, out) in enumerate(pairwise(widths)):
        halves = not config.residual_shortcuts  # the up-samplers halve the channels
        up = None if i == len(mult) - 1 else out // 2 if halves else out
        found.append(_Stage(cin // 2 if i and halves else cin, out, up, temporal[i]))
    return found


@dataclass(frozen=True)
class _Peak:
    """What one walk over a part of the decoder takes, in bytes above what was there before it.

    `history`: what its slots keep from chunk to chunk. `result`: what it returns. `pixels`: frames
    of pixels that its largest pass makes. `work`: multiplications.
    """

    peak: int
    history: int
    result: int
    pixels: int
    work: int


class _Model:
    """Peaks of one decode: one latent shape, dtype and memory format."""

    def __init__(
        self, config, latent_shape, dtype: torch.dtype, memory_format: str, backend: str = "eager"
    ):
        self.config: WanVAEConfig = config
        self.shape: tuple[int, ...] = tuple(latent_shape)
        self.itemsize = dtype.itemsize
        # Our kernels read and write NDHWC, whatever the weights are.
        self.backend, self.kernels = backend, backend != "eager"
        self.ndhwc = memory_format == "channels_last_3d" or self.kernels

    def in_chunks(self, chunks: Sequence[Chunk], elements: int | None) -> Plan:
        """The whole picture, chunk after chunk; the frames of the pass before are still held.

        elements: see `pass_frames`; None takes each chunk whole.
        """
        height, peak = self.shape[3], 0
        for chunk in _heaviest(chunks):
            p = _Walk(self, chunk, height, elements).decode(height)
            only = chunk.is_first and p.pixels == self._frames(chunk)
            before = 0 if only else self._pixel_bytes(p.pixels, height)
            peak = max(peak, p.peak + before)
        return Plan(tuple(c.frames for c in chunks), 1, peak, elements or _PASSES[0])

    def in_strips(
        self, count: int, whole_frames: bool, chunks: Sequence[Chunk], elements: int
    ) -> Plan:
        """The same in `count` strips, with the share of work done twice.

        Raises GeometryError for an impossible count.
        """
        config, (_, _, t, height, _) = self.config, self.shape
        heaviest = _heaviest(chunks)
        bands = geometry.strips(height, count, config)
        trunks = [_Walk(self, c, height, elements).trunk_alone() for c in heaviest]
        trunk_history = 0 if len(chunks) == 1 else max(p.history for p in trunks)
        peak = history = work = 0
        # Bands of one size and place (top, inner, bottom) are alike.
        alike: dict[tuple[int, int], list] = {}
        for band in bands:
            size = band.halo_stop - band.halo_start, band.stop - band.start
            alike.setdefault(size, [band, 0])[1] += 1
        kept = len(chunks) > 1
        features = trunks[0].result // heaviest[0].frames  # of a latent frame
        longest = max(c.frames for c in chunks)
        frames = self._pixel_bytes(max(self._frames(c) for c in chunks), height)
        for band, times in alike.values():
            rows = band.halo_stop - band.halo_start
            walks = [_Walk(self, c, rows, elements).band(band) for c in heaviest]
            pixels = max(p.pixels for p in walks)
            before = self._pixel_bytes(pixels, band.stop - band.start) if count * t > 1 else 0
            for chunk, p in zip(heaviest, walks, strict=True):
                top = p.peak + before
                if whole_frames:
                    # Its features and frames, the frames of the chunk before; its history is
                    # among that of all strips.
                    top += chunk.frames * features + self._pixel_bytes(self._frames(chunk), height)
                    top += (0 if chunk.is_first else frames) - (p.history if kept else 0)
                peak = max(peak, top)
            work += times * walks[0].work
            history += times * (walks[0].history if kept else 0)
        if whole_frames:
            behind = history + frames + longest * features
            trunk = max(
                p.peak + (0 if c.is_first else behind)
                for c, p in zip(heaviest, trunks, strict=True)
            )
            peak = max(trunk, trunk_history + history + peak)
        else:
            # The trunk of all frames first; its features stay until the last strip is done.
            trunk = max(p.peak for p in trunks) + (t - longest) * features
            peak = max(trunk, t * features + peak)
        uncut = _Walk(self, heaviest[0], height, elements).band(Strip(0, height, height, 0)).work
        extra = (work - uncut) / (trunks[0].work + uncut)
        return Plan(tuple(c.frames for c in chunks), count, peak, elements, extra)

    def _frames(self, chunk: Chunk) -> int:
        first, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, self.config)
        return last - first

    def _pixel_bytes(self, frames: int, rows: int) -> int:
        """float32 pixels of so many frames of `rows` latent rows."""
        b, _, _, _, w = self.shape
        return _rounded(b * 3 * frames * rows * w * self.config.spatial_factor**2 * 4)


class _Walk:
    """One chunk through the decoder: what is alive, layer by layer, as the eager code has it.

    Every method takes the layer's input as alive and owned by the caller, and leaves the layer's
    result alive; they return its bytes. Bytes are counted from what was alive before the chunk,
    with the history of earlier chunks (of unknown size until the walk is over) counted as 0: what
    the first chunk makes, later ones write over.
    """

    def __init__(self, model: _Model, chunk: Chunk, rows: int, elements: int | None):
        """`rows`: latent rows that go through the stages. `elements`: see `pass_frames`."""
        self.config, self.itemsize, self.ndhwc = model.config, model.itemsize, model.ndhwc
        self.kernels, self.cuda = model.kernels, model.backend == "cuda"
        self.per_latent = 1  # frames of a latent frame at this stage
        self.batch, _, _, self.height, self.width = model.shape
        self.chunk_is_first = self.first = chunk.is_first
        self.last = chunk.is_last
        self.only_frame = chunk.is_only_frame
        self.resumes = False  # a later pass of this chunk
        # The video's first frame went alone past these temporal up-samplers, by `per_latent`.
        self.skipped: set[int] = set()
        self.t = chunk.frames
        self.pass_frames: tuple[int, ...] | None = None
        if elements is not None:
            shape = (*model.shape[:3], rows, self.width)
            self.pass_frames = pass_frames(self.config, shape, elements)
        self.scale = 1  # columns for each latent column
        self.live = self.peak = self.history = self.pixels = self.work = 0

    # -- the parts that the pipeline runs ---------------------------------------------------------

    def decode(self, height: int) -> _Peak:
        """Latent chunk -> float32 pixels of the whole picture."""
        features = self.trunk(height)
        self.passes(0, features, [height * 2**i for i in range(len(self.config.dim_mult))], None)
        return self.found(0)

    def trunk_alone(self) -> _Peak:
        """Latent chunk -> features."""
        return self.found(self.trunk(self.height))

    def band(self, band: Strip) -> _Peak:
        """Features (not counted) -> float32 pixels of a strip."""
        halos = geometry.strip_halos(self.config)
        rows = [
            bottom - top
            for top, bottom in (band.bounds(2**i, halo) for i, halo in enumerate(halos))
        ]
        self.passes(0, 0, rows, (band.stop - band.start) * 2 ** (len(halos) - 1))
        return self.found(0)

    def found(self, result: int) -> _Peak:
        old = 0 if self.chunk_is_first else self.history
        return _Peak(self.peak + old, self.history, result, self.pixels, self.work)

    def trunk(self, h: int) -> int:
        c = self.config.decoder_dim * self.config.dim_mult[-1]
        z = self.conv(self.config.z_dim, self.config.z_dim, h, (1, 1, 1))
        x = self.conv(self.config.z_dim, c, h)
        self.drop(z)
        for layer in (self.block, self.attention, self.block):
            y = layer(c, c, h)
            self.drop(x)
            x = y
        return x

    def passes(self, i: int, x: int, rows: list[int], cropped: int | None) -> None:
        """Stage `i` and all that follows, in passes over `x`, which the first frees: of the frames
        that wait it takes a copy.

        `rows` of each stage's input, `cropped` of the result.
        """
        missing, last, place = self.t, self.last, (self.scale, self.per_latent)
        while missing:
            frames = missing
            if self.pass_frames is not None and frames > self.pass_frames[i]:
                frames = 1 if self.first else self.pass_frames[i]
            missing -= frames
            stage = _stages(self.config)[i]
            self.t, self.last = frames, last and not missing
            self.scale, self.per_latent = place
            waiting = self.size(stage.channels_in, rows[i], missing)
            self.hold(waiting)
            y = self.stage(stage, rows[i], x)
            x = waiting
            if i + 1 < len(rows):
                if cropped is not None:
                    needed = self.size(stage.up, rows[i + 1])
                    self.hold(needed)
                    self.drop(y)
                    y = needed
                self.passes(i + 1, y, rows, cropped)
            else:
                self.head(y, rows[-1], cropped)
            self.first, self.resumes = False, True

    def stage(self, stage: _Stage, h: int, x: int) -> int:
        """A stage, which frees `x` bytes of its input."""
        cin, out, up, temporal = stage
        keeps, before = self.config.residual_shortcuts, self.t  # for the shortcut around the stage
        layers = [(self.block, cin, out)] + [(self.block, out, out)] * self.config.num_res_blocks
        if up is not None:
            layers.append((self.temporal_up if temporal else self.up, out, up))
        y = 0
        for n, (layer, a, b) in enumerate(layers):
            y, read = layer(a, b, h), y
            self.drop(read if n else 0 if keeps else x)
        if up is not None and keeps:
            shortcut = self.size(out, 2 * h, before * (2 if temporal else 1))
            self.hold(shortcut)
            self.drop(shortcut)
        self.drop(x if keeps else 0)
        return y

    def head(self, x: int, h: int, cropped: int | None) -> None:
        """Norm, convolution, float32 pixels; frees `x`."""
        channels, colours = _stages(self.config)[-1].channels, self.config.image_channels
        self.pixels = max(self.pixels, self.t)
        if self.kernels:
            self.kernel_head(channels, h, x, cropped)
            return
        y = self.normed(channels, colours, h)
        self.drop(x)
        h = h if cropped is None else cropped
        folded = self.size(colours, h)
        copies = folded if self.config.patch_size > 1 else 0
        if self.itemsize < 4:
            copies += folded * 4 // self.itemsize
        self.hold(copies)
        self.drop(copies)
        self.drop(y)

    # -- layers, as in blocks.py -------------------------------------------------------------------

    def block(self, cin: int, out: int, h: int) -> int:
        y = self.normed(cin, out, h)
        skip = self.conv(cin, out, h, (1, 1, 1)) if cin != out else 0
        y = self.normed(out, out, h, owned=y)
        self.drop(skip)
        return y

    def normed(self, cin: int, out: int, h: int, owned: int = 0) -> int:
        """Norm and SiLU in one tensor, then the convolution; an `owned` input is freed between."""
        if self.kernels:
            operand = self.kernel_operand(cin, h, self.cuda and self.per_latent > 1)
            self.drop(owned)
            y = self.size(out, h)
            self.work += (1 if self.only_frame else 3) * 9 * cin * self.elements(out, h)
            self.hold(y)
            self.drop(operand)
            return y
        y, length = self.size(cin, h), self.size(1, h)
        self.hold(y + length)
        self.drop(length + owned)
        return self.conv(cin, out, h, owned=y)

    def kernel_operand(self, cin: int, h: int, winograd: bool) -> int:
        """Norm, SiLU and join in one kernel: its result, and the new history beside the old."""
        if self.only_frame:
            operand = self.size(cin, h)
            self.hold(operand)
            return operand
        frames = -(-self.t // 2) * 4 if winograd else self.t + 2
        operand, slot = self.size(cin, h, frames), self.size(cin, h, 2)
        self.hold(operand)
        if self.first and not self.last:
            self.hold(slot)
        self.history += 0 if self.resumes else slot
        return operand

    def kernel_head(self, c: int, h: int, x: int, cropped: int | None) -> None:
        """Norm, partial sums of nine taps in float32, pixels in float32."""
        operand, o = self.kernel_operand(c, h, False), self.config.image_channels
        pixels = self.elements(o, h) * 4
        self.work += (1 if self.only_frame else 3) * 9 * c * self.elements(o, h)
        self.hold(10 * pixels)
        self.drop(9 * pixels + operand + x)
        folded = self.elements(o, h if cropped is None else cropped) * 4
        copies = folded if self.config.patch_size > 1 else 0
        self.hold(copies)
        self.drop(copies + pixels)

    def conv(
        self,
        cin: int,
        out: int,
        h: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        owned: int = 0,
        is_new: bool = False,
    ) -> int:
        """Join with history, then convolve; an `owned` input is freed as early as it can be.

        is_new: a layer that earlier passes of this chunk, which is the first, did not reach.
        """
        past, t = kernel[0] - 1, self.t
        operand, taps = owned, kernel[0]
        if past and not self.only_frame:
            operand, slot = self.size(cin, h, t + past), self.size(cin, h, past)
            # Zeros, in whose place the first history comes.
            self.hold(slot if self.first or is_new else 0)
            self.hold(operand)
            self.drop(slot if self.last else 0)
            self.history += 0 if self.resumes and not is_new else slot
            self.drop(owned)
        elif past:
            taps = 1
        y = self.size(out, h)
        self.work += taps * prod(kernel[1:]) * cin * self.elements(out, h)
        read = self.size(cin, h, t + past * (not self.only_frame))
        self.hold(y)
        # See `_IMAGE_COLUMNS`.
        if not self.ndhwc and kernel != (1, 1, 1):
            self.hidden(_IMAGE_COLUMNS * read if self.only_frame else read + y)
        self.drop(operand)
        return y

    def attention(self, c: int, _: int, h: int) -> int:
        x = self.size(c, h)
        copy = 0 if self.ndhwc else x
        self.hold(x + copy)  # norm, and the dense input of the convolution
        self.hold(3 * x)
        self.drop(copy)
        if copy:
            self.hold(3 * x)
            self.drop(3 * x)
        self.hold(x)
        # A head as wide as this one is summed up in float32 beside the result.
        self.hidden(x * 4 // self.itemsize if self.itemsize < 4 and not self.kernels else 0)
        self.drop(x)  # the norm's result
        self.hold(x)
        self.drop(4 * x)
        self.work += (4 * c * c + 2 * c * h * self.width) * self.elements(1, h)
        return x

    def temporal_up(self, cin: int, out: int, h: int) -> int:
        passed = 1 if self.first else 0
        rest = self.t - passed
        if rest == 0:
            self.skipped.add(self.per_latent)
            self.per_latent *= 2
            return self.up(cin, out, h)
        self.t = rest
        is_new = self.per_latent in self.skipped
        self.skipped.discard(self.per_latent)
        x = self.conv(cin, 2 * cin, h, (3, 1, 1), is_new=is_new)
        if rest > 1 or self.batch > 1:
            self.hold(x)  # frames in their order
            self.drop(x)
        self.t = passed + 2 * rest
        self.per_latent *= 2
        if passed:
            joined = self.size(cin, h)
            self.hold(joined)
            self.drop(x)
            x = joined
        y = self.up(cin, out, h)
        self.drop(x)
        return y

    def up(self, cin: int, out: int, h: int) -> int:
        copy = 0 if self.ndhwc or self.batch == 1 or self.t == 1 else self.size(cin, h)
        self.scale *= 2
        if self.kernels:
            y = self.size(out, 2 * h)
            self.hold(y)
            self.work += 4 * cin * self.elements(out, 2 * h)
            return y
        doubled, y = self.size(cin, 2 * h), self.size(out, 2 * h)
        self.hold(copy + doubled + y)
        self.hidden(0 if self.ndhwc else doubled + y)
        self.drop(copy + doubled)
        self.work += 9 * cin * self.elements(out, 2 * h)
        return y

    # -- bytes -------------------------------------------------------------------------------------

    def elements(self, c: int, h: int, t: int | None = None) -> int:
        return self.batch * c * (self.t if t is None else t) * h * self.width * self.scale

    def size(self, c: int, h: int, t: int | None = None) -> int:
        return _rounded(self.elements(c, h, t) * self.itemsize)

    def hold(self, n: int) -> None:
        self.live += n
        self.peak = max(self.peak, self.live)

    def drop(self, n: int) -> None:
        self.live -= n

    def hidden(self, n: int) -> None:
        """Taken and given back inside a library call, where no tracker of tensors sees it."""
        self.peak = max(self.peak, self.live + n)


def _heaviest(chunks: Iterable[Chunk]) -> list[Chunk]:
    """One chunk of each kind that can be the peak: no lighter one of the same or fewer frames."""
    kinds = {(c.frames, c.is_first, c.is_last): c for c in chunks}
    inner = max((n for n, first, last in kinds if not (first or last)), default=0)
    return [c for (n, first, last), c in kinds.items() if n > inner or not (first or last)]


def _rounded(n: int) -> int:
    return -(-n // _BLOCK_BYTES) * _BLOCK_BYTES
