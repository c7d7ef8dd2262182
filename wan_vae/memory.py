"""Device memory: what is free, what a decode will take, and the schedule that fits.

Asked before the first chunk. The model is a walk over the decoder that holds and drops, in bytes,
the tensors that `blocks.py` and `decoder.py` hold and drop; it allocates nothing and takes
milliseconds. A test holds it to a tracked decode, so a change of those files that costs memory
fails there until it is told here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch

from . import geometry
from .chunking import Chunk, schedule
from .config import WanVAEConfig
from .geometry import Strip

# The allocator's smallest block.
_BLOCK_BYTES = 512
# Of the free bytes, those that a plan may use. The rest is for what the allocator cannot hand out
# because it lies in pieces. NVIDIA H100, allocator capped to 6 GB, 720p in two strips: our kernels
# decoded as planned at 0.80, the eager backend ran out at 0.73. More strips cost it little.
_USABLE, _USABLE_EAGER_STRIPS = 0.85, 0.6
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
# Shards take more: each exchange of rows costs a chunk the same time whatever its length, and at
# latent resolution a shard's frame is too small for a device.
_SHARD_CHUNKS = 2
_STRIP_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a decode may still allocate on `device`; None where nobody can say (the CPU).

    On CUDA: what the driver reports, plus what PyTorch's allocator holds and does not use, within
    the process's memory fraction if one was set.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - allocated
    # PyTorch before 2.8 does not say what was set.
    fraction_of = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    if fraction_of is not None:
        free = min(free, int(fraction_of(device) * total) - allocated)
    return max(0, free)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: PyTorch's own type, or what its CPU allocator says.

    The CPU allocator raises a plain RuntimeError.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@dataclass(frozen=True)
class Plan:
    """How a decode goes: latent frames a chunk, strips (1: the whole picture), and what it takes.

    `lengths` are the frames of every chunk. `planned_bytes` is the predicted peak of allocated
    device memory above weights, latent and output. `extra_work` is the share of the convolutions'
    multiplications that strips do twice. `note` says why strips were planned; None if they were
    not.
    """

    lengths: tuple[int, ...]
    strips: int
    planned_bytes: int
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
    free: see `free_bytes`; None plans as if it all fitted. memory_format: of the weights.
    whole_frames: the sink needs them, so strips are taken in each chunk and the history of all of
    them stays. chunk_frames, strips: what the caller asked for, kept as it is; but where not even
    one latent frame a chunk fits and `strips` is None, strips are planned whatever
    `chunk_frames` is. Raises GeometryError for an impossible request.
    """
    _, _, t, height, _ = latent_shape
    model = _Model(config, latent_shape, dtype, memory_format, backend)
    usable = None if free is None else int(_USABLE * free)
    if strips is not None:
        lengths = tuple(c.frames for c in schedule(t, 1 if chunk_frames is None else chunk_frames))
        return Plan(lengths, strips, *model.in_strips(strips, whole_frames))
    if chunk_frames is None:
        for frames in range(_full_chunk(config, latent_shape), 0, -1):
            plan = model.in_chunks(schedule(t, frames))
            if usable is None or plan.planned_bytes <= usable:
                return plan
        smallest = plan
    else:
        plan = model.in_chunks(schedule(t, chunk_frames))
        if usable is None or plan.planned_bytes <= usable:
            return plan
        smallest = model.in_chunks(schedule(t, 1))
        if smallest.planned_bytes <= usable:
            return plan  # as asked for; out of memory would shrink the chunks
    counts = [*(n for n in _STRIP_COUNTS if n < height), *([height] if height > 1 else [])]
    if backend == "eager":
        usable = int(_USABLE_EAGER_STRIPS * free)
    best = None
    for count in counts:
        needed, extra = model.in_strips(count, whole_frames)
        if best is None or needed < best[1]:
            best = count, needed, extra
        if needed <= usable:
            break
    if best is None or best[1] >= smallest.planned_bytes:
        return smallest
    count, needed, extra = best
    note = (
        f"planned {count} strips: {_gib(smallest.planned_bytes)} GiB needed without, "
        f"{_gib(free)} free; they need {_gib(needed)}, and {extra:.0%} of the work is done twice"
    )
    if needed > usable:
        note += "; no number of strips is sure to fit"
    return Plan(smallest.lengths, count, needed, extra, note)


def planned_bytes(
    config: WanVAEConfig,
    latent_shape: tuple[int, ...],
    dtype: torch.dtype,
    chunk_frames: int,
    memory_format: str = "contiguous",
    backend: str = "eager",
) -> int:
    """Predicted peak of a decode in chunks of `chunk_frames` latent frames, without strips.

    The defaults are the format and the backend that take more. See `Plan`.
    """
    model = _Model(config, latent_shape, dtype, memory_format, backend)
    return model.in_chunks(schedule(latent_shape[2], chunk_frames)).planned_bytes


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


@dataclass(frozen=True)
class _Peak:
    """What one pass over a part of the decoder takes, in bytes above what was there before it.

    `history`: what its slots keep from chunk to chunk. `result`: what it returns. `work`:
    multiplications.
    """

    peak: int
    history: int
    result: int
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

    def in_chunks(self, chunks: Sequence[Chunk]) -> Plan:
        """The whole picture, chunk after chunk; the frames of the one before are still held."""
        height, before, peak = self.shape[3], 0, 0
        largest = max(self._pixel_bytes(c, height * self.config.spatial_factor) for c in chunks)
        for chunk in _heaviest(chunks):
            p = self._pass(chunk).decode(height)
            before = 0 if chunk.is_first else largest
            peak = max(peak, p.peak + before)
        return Plan(tuple(c.frames for c in chunks), 1, peak)

    def in_strips(self, count: int, whole_frames: bool) -> tuple[int, float]:
        """Peak and share of work done twice of `count` strips, one latent frame a chunk.

        Raises GeometryError for an impossible count.
        """
        config, (_, _, t, height, _) = self.config, self.shape
        chunks = _heaviest(schedule(t, 1))
        bands = geometry.strips(height, count, config)
        trunks = [self._pass(c).trunk_alone() for c in chunks]
        trunk_history = 0 if t == 1 else max(p.history for p in trunks)
        feature = trunks[0].result
        peak = history = work = 0
        # Bands of one size and place (top, inner, bottom) are alike.
        alike: dict[tuple[int, int], list] = {}
        for band in bands:
            size = band.halo_stop - band.halo_start, band.stop - band.start
            alike.setdefault(size, [band, 0])[1] += 1
        for band, times in alike.values():
            passes = [self._pass(c).band(band) for c in chunks]
            rows = (band.stop - band.start) * config.spatial_factor
            before = max(self._pixel_bytes(c, rows) for c in chunks) if count * t > 1 else 0
            top = max(p.peak - (p.history if whole_frames and t > 1 else 0) for p in passes)
            peak = max(peak, top + before)
            work += times * passes[0].work
            history += times * (passes[0].history if t > 1 else 0)
        if whole_frames:
            frame = max(self._pixel_bytes(c, height * config.spatial_factor) for c in chunks)
            frames = frame * min(2, t)
            trunk = max(p.peak for p in trunks) + history + frame * min(1, t - 1)
            peak = max(trunk, trunk_history + feature + frames + history + peak)
        else:
            # The trunk of all frames first; its features stay until the last strip is done.
            trunk = max(p.peak for p in trunks) + (t - 1) * feature
            peak = max(trunk, t * feature + peak)
        uncut = self._pass(chunks[0]).band(Strip(0, height, height, 0)).work
        return peak, (work - uncut) / (trunks[0].work + uncut)

    def _pass(self, chunk: Chunk) -> _Pass:
        return _Pass(self, chunk)

    def _pixel_bytes(self, chunk: Chunk, rows: int) -> int:
        """float32 pixels of `rows` pixel rows of a chunk."""
        b, _, _, _, w = self.shape
        first, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, self.config)
        return _rounded(b * 3 * (last - first) * rows * w * self.config.spatial_factor * 4)


class _Pass:
    """One chunk through the decoder: what is alive, layer by layer, as the eager code has it.

    Every method takes the layer's input as alive and owned by the caller, and leaves the layer's
    result alive; they return its bytes. Bytes are counted from what was alive before the pass,
    with the history of earlier chunks (of unknown size until the walk is over) counted as 0: a
    slot that is taken lowers, and one that is stored raises it again.
    """

    def __init__(self, model: _Model, chunk: Chunk):
        self.config, self.itemsize, self.ndhwc = model.config, model.itemsize, model.ndhwc
        self.kernels, self.cuda = model.kernels, model.backend == "cuda"
        self.per_latent = 1  # frames of a latent frame at this stage
        self.batch, _, _, self.height, self.width = model.shape
        self.first, self.last = chunk.is_first, chunk.is_last
        self.only_frame = chunk.is_only_frame
        # More than one frame can be tried again in smaller chunks: the history from before the
        # chunk is kept until it is done.
        self.keeps_old = chunk.frames > 1 and not self.first
        self.t = self.frames = chunk.frames
        self.scale = 1  # columns for each latent column
        self.live = self.peak = self.history = self.work = 0

    # -- the parts that the pipeline runs ---------------------------------------------------------

    def decode(self, height: int) -> _Peak:
        """Latent chunk -> float32 pixels of the whole picture."""
        features = self.trunk(height)
        self.stages([height * 2**i for i in range(len(self.config.dim_mult))], None)
        self.drop(features)
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
        self.stages(rows, (band.stop - band.start) * 2 ** (len(halos) - 1))
        return self.found(0)

    def found(self, result: int) -> _Peak:
        old = 0 if self.first else self.history
        return _Peak(self.peak + old, self.history, result, self.work)

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

    def stages(self, rows: list[int], cropped: int | None) -> None:
        """Up-sampling stages and head; `rows` of each stage's input, `cropped` of the result."""
        config = self.config
        mult, x = config.dim_mult, 0
        widths = [config.decoder_dim * m for m in (mult[-1], *reversed(mult))]
        temporal = (*reversed(config.temporal_downsample), False)
        for i, (cin, out) in enumerate(pairwise(widths)):
            h, up, kept = rows[i], i < len(mult) - 1, 0
            if config.residual_shortcuts:
                kept, before = x, self.t  # held for the shortcut around the stage
            elif i:
                cin //= 2
            layers = [(self.block, cin, out)] + [(self.block, out, out)] * config.num_res_blocks
            if up:
                narrow = out if config.residual_shortcuts else out // 2
                layers.append((self.temporal_up if temporal[i] else self.up, out, narrow))
            for n, (layer, a, b) in enumerate(layers):
                y = layer(a, b, h)
                if n or not kept:
                    self.drop(x)
                x = y
            if up and config.residual_shortcuts:
                factor = 2 if temporal[i] else 1
                shortcut = self.size(out, 2 * h, before * factor)
                self.hold(shortcut)
                self.drop(shortcut)
            self.drop(kept)
        h = rows[-1]
        if self.kernels:
            self.kernel_head(widths[-1], h, x, cropped)
            return
        y = self.normed(widths[-1], config.image_channels, h)
        self.drop(x)
        h = h if cropped is None else cropped
        folded = self.size(config.image_channels, h)
        copies = folded if config.patch_size > 1 else 0
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
        # A chunk of one latent frame writes over its old history.
        if not self.last and (self.first or self.keeps_old):
            self.hold(slot)
        self.history += slot
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
        self, cin: int, out: int, h: int, kernel: tuple[int, int, int] = (3, 3, 3), owned: int = 0
    ) -> int:
        """Join with history, then convolve; an `owned` input is freed as early as it can be."""
        past, t = kernel[0] - 1, self.t
        operand, taps = owned, kernel[0]
        if past and not self.only_frame:
            operand, slot = self.size(cin, h, t + past), self.size(cin, h, past)
            if self.first:
                self.hold(slot)  # zeros
            self.hold(operand)
            if not self.keeps_old:
                self.drop(slot)
            if not self.last:
                self.hold(slot)
            self.history += slot
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
            self.per_latent *= 2
            return self.up(cin, out, h)
        self.t = rest
        x = self.conv(cin, 2 * cin, h, (3, 1, 1))
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
