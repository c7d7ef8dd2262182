"""The peak of device memory of a decode, predicted before its first chunk.

The prediction is a walk over the decoder: it holds and drops, in bytes, the tensors that
`blocks.py` and `decoder.py` hold and drop. It allocates nothing and takes milliseconds. A layer
with a kernel says itself how many bytes it takes in addition to its input and its result
(`Prepared.workspace`); a layer without a kernel is counted as the eager code runs it.

If you change what those two files hold, change the walk too: a test counts the tensors of real
decodes, and fails if they take more than the walk says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from typing import Literal, NamedTuple

import torch

from .. import geometry
from ..chunking import Chunk, PassEnds, next_pass
from ..config import WanVAEConfig
from ..geometry import Strip
from ..network import architecture
from ..network.architecture import Block, Stage, Upsampler
from ..ops.eager import unfolded
from ..ops.eager.attention import slice_bytes
from ..ops.eager.forms import ConvForm, EagerForms
from ..ops.eager.unfolded import ConvSize
from ..ops.opset import CallSize, Prepared, Workspace
from .passes import frames_together, pass_ends, pass_frames
from .waiting import Waiting

# What a walk depends on: the frames of a chunk, and whether it is the first or the last.
_Kind = tuple[int, bool, bool]
# The memory format of the weights.
WeightFormat = Literal["contiguous", "channels_last_3d"]

# The allocator's smallest block.
_BLOCK_BYTES = 512
# Memory that cuDNN takes for one convolution of NCDHW data, in units of its operand's bytes:
# it converts operand and result to NDHWC and back. NVIDIA H200, bfloat16, contiguous against
# channels_last_3d: 1.28 GiB more at 480p, 1.64 at 720p (Wan 2.1), which is operand + result of
# the widest convolution to 1%; benchmarks/results/2026-11-24-h200-eager.md. NDHWC data takes
# none: there the walk alone is within 1% of the measured peaks.
# A single frame in NCDHW (a 1x3x3 kernel) runs through unfolded columns, one for each tap: the
# 1024x1024 image of the same results took 2.40 GiB, of which 1.69 are 9 operands. An H100 with the
# same versions took 1.23: the plan keeps to the larger.
_IMAGE_COLUMNS = 9


# Tensors of a pass's pixels that are on their way to the host while the next pass runs: as many as
# `io.image.HostWriter` lets be under way.
_BLOCKS_UNDER_WAY = 2


class StripsPeak(NamedTuple):
    """Peak bytes of a decode in strips, and its extra work.

    extra_work: the multiplications that strips do twice, as a share of those without strips.
    host_bytes: what waits in host memory. waiting: how long that takes, and the work of the strips.
    """

    bytes: int
    extra_work: float
    host_bytes: int = 0
    waiting: Waiting | None = None


@dataclass(frozen=True)
class Peak:
    """What one walk over a part of the decoder takes, in bytes above what was there before it.

    history: what its layers keep from chunk to chunk. slot: what one of them keeps at most. result:
    what it returns. pixel_frames: the frames of pixels of its largest pass. work: multiplications.
    """

    peak: int
    history: int
    slot: int
    result: int
    pixel_frames: int
    work: int


# Strips of one size and place, and the walks of one of them through some chunks.
_StripWalks = tuple[list[Strip], list[Peak]]


@dataclass(frozen=True)
class Memory:
    """What a walk needs to know of runs on latents of one shape [B, z, T, H, W].

    dtype: that of the computation. memory_format: that of the weights. layers: the layers that
    kernels run, by native name (`OpSet.layers`). forms: how the others are computed
    (`OpSet.forms`).
    """

    config: WanVAEConfig
    shape: tuple[int, ...]
    dtype: torch.dtype
    memory_format: WeightFormat
    layers: Mapping[str, Prepared]
    forms: EagerForms = field(default_factory=EagerForms)


@dataclass(frozen=True)
class DecodeMemory(Memory):
    """Predicts the memory of decodes.

    staged: the pixels go to the host, pass by pass. shard: `shape` is the part of one rank.
    """

    staged: bool = False
    shard: bool = False
    # Walks that were made, for plans that differ only in what waits on the host: by kind of chunk
    # and numbers of a pass, for strips by their count too.
    _known_trunks: dict[tuple[_Kind, int], Peak] = field(default_factory=dict, compare=False)
    _known_strips: dict[tuple[int, tuple[_Kind, ...], int], list[_StripWalks]] = field(
        default_factory=dict, compare=False
    )

    def of_picture(self, chunks: Sequence[Chunk], elements: int | None) -> int:
        """Peak of the whole picture, chunk after chunk.

        The pixels of the previous pass are still held while the next one runs. elements: how many
        numbers a pass may hold (see `pass_frames`); None takes each chunk as a whole.
        """
        height, peak = self.shape[3], 0
        for chunk in heaviest_chunks(chunks):
            p = DecoderWalk(self, chunk, height, elements).peak_of_picture()
            is_only_pass = chunk.is_first and p.pixel_frames == self._frames(chunk)
            before = 0 if is_only_pass else self._held_pixels(p.pixel_frames, height)
            peak = max(peak, p.peak + before)
        return peak

    def of_strips(
        self, count: int, whole_frames: bool, chunks: Sequence[Chunk], elements: int
    ) -> StripsPeak:
        """Peak of the same decode in `count` strips.

        whole_frames: each chunk is cut into strips, and the history of all strips stays; otherwise
        each strip goes through all chunks before the next. Raises GeometryError for an impossible
        count.
        """
        t, height = self.shape[2:4]
        heaviest = heaviest_chunks(chunks)
        trunks = self._trunks(heaviest, elements)
        trunk_history = 0 if len(chunks) == 1 else max(p.history for p in trunks)
        peak = history = work = 0
        keeps_history = len(chunks) > 1
        features = trunks[0].result // heaviest[0].frames  # of a latent frame
        longest = max(c.frames for c in chunks)
        frames = self._pixel_bytes(max(self._frames(c) for c in chunks), height)
        for group, walks in self._strip_walks(count, heaviest, elements):
            own_rows = group[0].stop - group[0].start
            pixel_frames = max(p.pixel_frames for p in walks)
            held = self._pixel_bytes if whole_frames else self._held_pixels
            before = held(pixel_frames, own_rows) if count * t > 1 else 0
            for chunk, p in zip(heaviest, walks, strict=True):
                top = p.peak + before
                if whole_frames:
                    # Its features and frames, and the frames of the chunk before. Its history is
                    # among that of all strips.
                    top += chunk.frames * features + self._pixel_bytes(self._frames(chunk), height)
                    top += (0 if chunk.is_first else frames) - (p.history if keeps_history else 0)
                peak = max(peak, top)
            work += len(group) * walks[0].work
            history += len(group) * (walks[0].history if keeps_history else 0)
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
        return StripsPeak(peak, self._extra_work(heaviest[0], elements, trunks[0].work, work))

    def of_parked_strips(
        self,
        count: int,
        chunks: Sequence[Chunk],
        elements: int,
        parts: Sequence[int],
        features_wait: bool,
    ) -> StripsPeak:
        """Peak of the same decode where each strip goes through all chunks of a part of the video
        before the next. The pixels of all but the last wait in host memory, and between parts the
        history of the strips that are not at work; see `runs.parked`.

        parts: latent frames of each part. features_wait: what the trunk has made of a part waits on
        the host too. Raises GeometryError for an impossible count.
        """
        height, heaviest = self.shape[3], heaviest_chunks(chunks)
        longest, part = max(c.frames for c in chunks), max(parts)
        trunks = self._trunks(heaviest, elements)
        features = trunks[0].result // heaviest[0].frames
        walked = heaviest
        if len(parts) > 1:
            # The places of history stay on the device, also of what is read for the last time.
            walked = [replace(chunk, is_last=False) for chunk in heaviest]
        groups = self._strip_walks(count, walked, elements)
        bank = slot = trunk_history = history = peak = work = 0
        if len(parts) > 1:
            # One bank of history, as large as that of the largest strip. In the first chunk a layer
            # makes a history, which is then copied to its place there.
            bank = max(p.history for _, walks in groups for p in walks)
            slot = max(p.slot for _, walks in groups for p in walks)
            trunk_history = max(p.history for p in trunks)
        # Whole frames are put together and handed out a latent frame's at a time.
        frames = self._most_frames(parts)
        handed, two, three = (
            self._pixel_bytes(min(n * self.config.temporal_factor, frames), height)
            for n in (1, 2, 3)
        )
        fetched = 0  # of the features that wait on the host: rows of strips, for all strips
        last_rows = last_work = 0
        for group, walks in groups:
            strip, is_last = group[0], group[-1].stop == height
            rows, own_rows = strip.halo_stop - strip.halo_start, strip.stop - strip.start
            pixel_frames = max(p.pixel_frames for p in walks)
            before = self._held_pixels(pixel_frames, own_rows)
            for chunk, p in zip(heaviest, walks, strict=True):
                held = part * features
                if features_wait:
                    held = _rounded(chunk.frames * features * rows // height)
                if bank:
                    held += bank - p.history + (slot if chunk.is_first else 0)
                # The reader may still hold the last frames of the part before.
                given = handed if bank and not chunk.is_first else 0
                peak = max(peak, p.peak + held + before + given)
                if is_last:
                    # Its pixels stay. From its first pass on, there are the frames that are put
                    # together and those that the reader holds; between passes, the next ones too.
                    held += self._pixel_bytes(pixel_frames, own_rows)
                    is_only_pass = chunk.is_first and p.pixel_frames == self._frames(chunk)
                    if not is_only_pass:
                        peak = max(peak, p.peak + held + two)
                    peak = max(peak, p.history + held + three)
            work += len(group) * walks[0].work
            history += len(group) * (walks[0].history if bank else 0)
            fetched += len(group) * features * rows // height
            if is_last:
                last_rows, last_work = own_rows, walks[0].work
        peak += trunk_history
        made = (part - longest) * features
        if features_wait:  # on their way to the host
            made = min(made, longest * features * (_BLOCKS_UNDER_WAY if self.staged else 0))
        for chunk, p in zip(heaviest, trunks, strict=True):
            behind = bank + handed if bank and not chunk.is_first else 0
            peak = max(peak, p.peak + made + behind)
        pixels = self._pixel_bytes(frames, height - last_rows)
        kept = part * features if features_wait else 0
        t = self.shape[2]
        all_frames = geometry.pixel_frames(t, self.config)
        waiting = Waiting(
            work=(trunks[0].work + work) * t / heaviest[0].frames,
            history_bytes=history,
            boundaries=len(parts) - 1,
            features_bytes=t * (features + fetched) if features_wait else 0,
            pixels_bytes=self._pixel_bytes(all_frames, height - last_rows),
            last_work=last_work * t / heaviest[0].frames,
        )
        extra = self._extra_work(heaviest[0], elements, trunks[0].work, work)
        return StripsPeak(peak, extra, history + pixels + kept, waiting)

    def _trunks(self, chunks: Sequence[Chunk], elements: int) -> list[Peak]:
        """The trunk of each of `chunks`, which takes the whole picture."""
        found = []
        for chunk in chunks:
            key = _kind(chunk), elements
            if key not in self._known_trunks:
                walk = DecoderWalk(self, chunk, self.shape[3], elements)
                self._known_trunks[key] = walk.peak_of_trunk()
            found.append(self._known_trunks[key])
        return found

    def _strip_walks(self, count: int, chunks: Sequence[Chunk], elements: int) -> list[_StripWalks]:
        """Strips of one size and place (top, inner, bottom), which are alike, and the walks of one
        of them through each of `chunks`. Raises GeometryError for an impossible count."""
        key = count, tuple(_kind(chunk) for chunk in chunks), elements
        if key not in self._known_strips:
            self._known_strips[key] = self._walk_strips(count, chunks, elements)
        return self._known_strips[key]

    def _walk_strips(self, count: int, chunks: Sequence[Chunk], elements: int) -> list[_StripWalks]:
        alike: dict[tuple[int, int], list[Strip]] = {}
        for strip in geometry.strips(self.shape[3], count, self.config):
            size = strip.halo_stop - strip.halo_start, strip.stop - strip.start
            alike.setdefault(size, []).append(strip)
        return [
            (group, [DecoderWalk(self, c, rows, elements).peak_of_strip(group[0]) for c in chunks])
            for (rows, _), group in alike.items()
        ]

    def _extra_work(self, chunk: Chunk, elements: int, trunk: int, strips: int) -> float:
        """The share of the multiplications of `strips` that a decode without strips does not do."""
        height = self.shape[3]
        whole = Strip(0, height, height, 0)
        uncut = DecoderWalk(self, chunk, height, elements).peak_of_strip(whole).work
        return (strips - uncut) / (trunk + uncut)

    def _most_frames(self, parts: Sequence[int]) -> int:
        """Pixel frames of the longest of the `parts` of a video."""
        stops = accumulate(parts)
        bounds = ((stop - n, stop) for n, stop in zip(parts, stops, strict=True))
        slices = (geometry.chunk_frames_slice(*bound, self.config) for bound in bounds)
        return max(last - first for first, last in slices)

    def _frames(self, chunk: Chunk) -> int:
        first, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, self.config)
        return last - first

    def _held_pixels(self, frames: int, rows: int) -> int:
        """float32 pixels of a pass, which stay while the next one runs, and copies of them."""
        return self._pixel_bytes(frames, rows) * (1 + (_BLOCKS_UNDER_WAY if self.staged else 0))

    def _pixel_bytes(self, frames: int, rows: int) -> int:
        """float32 pixels of `frames` frames of `rows` latent rows."""
        b, _, _, _, w = self.shape
        colours, factor = self.config.decoder_colours, self.config.decoded_factor
        return _rounded(b * colours * frames * rows * w * factor**2 * 4)


class Walk:
    """One chunk on its way through a network: the bytes that are alive, layer by layer.

    When the method of a layer is called, the layer's input is alive and the caller owns it. The
    method leaves the layer's result alive and returns its bytes. `live` starts at 0: what was alive
    before the chunk is not counted. The history of earlier chunks is not counted either, because
    its size is unknown until the walk is over; `found` adds it.
    """

    def __init__(self, memory: Memory, chunk: Chunk, frames: int, scale: int):
        """frames: of the features that enter. scale: their columns for each latent column."""
        self.config, self.itemsize = memory.config, memory.dtype.itemsize
        self.layers, self.forms = memory.layers, memory.forms
        self.batch, _, _, self.height, self.width = memory.shape
        # Kernels read and write NDHWC. The eager code works in the format of the weights: it
        # converts its input, if need be, and its result has this format. `ndhwc` is of the
        # features that the walk has reached.
        self.weights_ndhwc = self.ndhwc = memory.memory_format == "channels_last_3d"
        self.chunk_is_first = self.first = chunk.is_first
        self.last = chunk.is_last
        self.only_frame = chunk.is_only_frame
        self.resumes = False  # a later pass of this chunk
        self.t = frames
        self.scale = scale
        self.live = self.peak = self.history = self.slot = self.pixel_frames = self.work = 0

    def found(self, result: int) -> Peak:
        old = 0 if self.chunk_is_first else self.history
        return Peak(self.peak + old, self.history, self.slot, result, self.pixel_frames, self.work)

    def keep(self, slot: int) -> None:
        """Count the history of a layer, `slot` bytes."""
        self.history += slot
        self.slot = max(self.slot, slot)

    # -- layers, as in blocks.py -------------------------------------------------------------------

    def block(self, block: Block, h: int) -> int:
        cin, out, x_ndhwc = block.channels_in, block.channels, self.ndhwc
        y = self.normed(block.conv1, cin, out, h)
        y_ndhwc, self.ndhwc = self.ndhwc, x_ndhwc
        skip = 0
        if block.shortcut is not None:
            skip = self.conv(block.shortcut, cin, out, h, (1, 1, 1))
        skip_ndhwc, self.ndhwc = self.ndhwc, y_ndhwc
        y = self.normed(block.conv2, out, out, h, owned=y, residual_ndhwc=skip_ndhwc)
        self.drop(skip)
        return y

    def normed(
        self,
        name: str,
        cin: int,
        out: int,
        h: int,
        owned: int = 0,
        residual_ndhwc: bool = True,
    ) -> int:
        """Norm, SiLU and the convolution; an `owned` input is freed between them.

        residual_ndhwc: whether a kernel can add the residual as it lies.
        """
        prepared = self.layers.get(name)
        if prepared is None:
            y, length = self.size(cin, h), self.size(1, h)
            if self.forms.joined_norm and not self.only_frame:
                return self.conv(name, cin, out, h, read=owned, norm=length)
            self.hold(y + length)
            self.drop(length + owned)
            return self.conv(name, cin, out, h, owned=y)
        operand, workspace = self.operand(prepared, cin, h)
        self.drop(owned)
        y = self.size(out, h)
        self.count_work(9, cin, out, h)
        self.hold(y)
        self.hidden(workspace.hidden_bytes + (0 if residual_ndhwc else y))
        self.drop(operand)
        self.ndhwc = True
        return y

    def operand(self, prepared: Prepared, cin: int, h: int) -> tuple[int, Workspace]:
        """Norm, SiLU and join in one kernel: its result and the new history."""
        workspace = self.workspace(prepared, h)
        operand, slot = _rounded(workspace.operand_bytes), _rounded(workspace.history_bytes)
        converted = 0 if self.ndhwc else self.size(cin, h)
        self.hold(converted + operand)
        if self.first and not self.last:
            self.hold(slot)
        self.drop(converted + (slot if self.last and not self.first else 0))
        self.keep(0 if self.resumes else slot)
        return operand, workspace

    def conv(
        self,
        name: str,
        cin: int,
        out: int,
        h: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        owned: int = 0,
        is_new: bool = False,
        read: int = 0,
        norm: int = 0,
    ) -> int:
        """Join with history, then convolve; an `owned` input is freed as early as it can be.

        is_new: a layer that earlier passes of this chunk, which is the first, did not reach. read:
        an owned input of a norm that writes the operand; norm: what that norm takes besides.
        """
        past = 0 if self.only_frame else kernel[0] - 1
        operand, is_pointwise = owned, kernel == (1, 1, 1)
        if past:
            operand, slot = self.size(cin, h, self.t + past), self.size(cin, h, past)
            # Zeros, in whose place the first history comes.
            self.hold(slot if self.first or is_new else 0)
            self.hold(operand)
            self.hidden(norm)
            self.drop(slot if self.last else 0)
            self.keep(0 if self.resumes and not is_new else slot)
            self.drop(owned + read)
            self.ndhwc = self.weights_ndhwc  # joining converts
        whole = self.size(cin, h, self.t + past)
        prepared = self.layers.get(name)
        # A 1x1x1 weight has no format: the eager code takes its input as it lies.
        wanted = True if prepared else self.ndhwc if is_pointwise else self.weights_ndhwc
        # Forms that copy rows of their input convert them in that copy.
        copies_rows = prepared is None and self.forms.conv3d in ("columns", "taps")
        converted = 0 if self.ndhwc == wanted or copies_rows else whole
        self.ndhwc = wanted
        self.hold(converted)
        y = self.size(out, h)
        self.count_work(prod(kernel[1:]), cin, out, h, kernel[0])
        if prepared is not None:
            workspace = self.workspace(prepared, h)
            self.hold(y)
            self.hidden(workspace.operand_bytes + workspace.hidden_bytes)
        else:
            self.hold(y)
            taps = (1 if self.only_frame else kernel[0], *kernel[1:])
            unfolds = self.unfolded(self.forms.conv3d, cin, out, h, self.t + past, taps)
            if unfolds is not None:
                self.hidden(unfolds)
            elif not self.weights_ndhwc and not is_pointwise:  # see `_IMAGE_COLUMNS`
                self.hidden(_IMAGE_COLUMNS * whole if self.only_frame else whole + y)
        self.drop(operand + converted)
        return y

    def attention(self, c: int, h: int, name: str = architecture.ATTENTION) -> int:
        x = normed = self.size(c, h)
        converted = 0 if self.ndhwc else x
        prepared = self.layers.get(name)
        if prepared is not None:
            # The norm's result, and what follows up to the projection, has the operand's dtype.
            workspace = self.workspace(prepared, h)
            normed, sums = _rounded(workspace.operand_bytes), workspace.hidden_bytes
            self.hold(converted + normed)
            self.drop(converted)
            self.hold(3 * normed)
        else:
            # A head as wide as this one is summed up in float32, next to the result.
            sums = x * 4 // self.itemsize if self.itemsize < 4 else 0
            if self.forms.sliced_attention:
                sums = slice_bytes(h * self.width, c, self.itemsize)
            self.hold(normed + converted)  # the norm, and the dense input of the convolution
            self.hold(3 * x)
            self.drop(converted)
            if converted:
                self.hold(3 * x)  # queries, keys and values in channels last
        self.hold(normed)
        self.hidden(sums)
        self.drop(normed)  # the norm's result
        self.hold(x)
        self.drop(4 * normed)
        if converted and prepared is None:
            self.drop(3 * x)
        # Attention is over pixels in channels last, and the 1x1 convolution behind it keeps that.
        self.ndhwc = True
        self.work += (4 * c * c + 2 * c * h * self.width) * self.elements(1, h)
        return x

    def unfolded(
        self,
        form: ConvForm,
        cin: int,
        out: int,
        h: int,
        t: int,
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
        around: tuple[int, int, int, int] | None = None,
    ) -> int | None:
        """What a convolution of `t` frames takes where no library computes it; else None.

        around: zeros above, below, left and right; as wide as the kernel needs if None.
        """
        if form == "library" or form == "cudnn":
            return None
        kt, kh, kw = kernel
        size = ConvSize(
            (self.batch, cin, t, h, self.width * self.scale),
            (out, cin, kt, kh, kw),
            stride,
            around or (kh // 2, kh // 2, kw // 2, kw // 2),
        )
        return unfolded.hidden_bytes(form, size, self.itemsize, self.weights_ndhwc)

    # -- bytes and multiplications -----------------------------------------------------------------

    def workspace(self, prepared: Prepared, h: int) -> Workspace:
        """What the layer says of a call on features of `h` rows."""
        cols = self.width * self.scale
        return prepared.workspace(CallSize(self.batch, self.t, h, cols, self.only_frame))

    def count_work(self, taps: int, cin: int, out: int, h: int, frames: int = 3) -> None:
        """The multiplications of a convolution over `taps` pixels of `frames` frames."""
        self.work += (1 if self.only_frame else frames) * taps * cin * self.elements(out, h)

    def elements(self, c: int, h: int, t: int | None = None) -> int:
        return self.batch * c * (self.t if t is None else t) * h * self.width * self.scale

    def size(self, c: int, h: int, t: int | None = None) -> int:
        return _rounded(self.elements(c, h, t) * self.itemsize)

    @staticmethod
    def rounded(n: int) -> int:
        """Bytes that the allocator takes for `n`."""
        return _rounded(n)

    def hold(self, n: int) -> None:
        self.live += n
        self.peak = max(self.peak, self.live)

    def drop(self, n: int) -> None:
        self.live -= n

    def hidden(self, n: int) -> None:
        """Count `n` bytes that a call takes and gives back itself, outside of our tensors."""
        self.peak = max(self.peak, self.live + n)


class DecoderWalk(Walk):
    """A chunk on its way through the decoder."""

    def __init__(self, memory: DecodeMemory, chunk: Chunk, rows: int, elements: int | None):
        """rows: latent rows that go through the stages. elements: see `pass_frames`."""
        super().__init__(memory, chunk, chunk.frames, 1)
        self.stages = architecture.stages(memory.config)
        # Temporal up-samplers that the video's first frame has passed alone.
        self.skipped: set[str] = set()
        self.pass_frames: tuple[int, ...] = ()
        self.pass_ends = PassEnds()
        if elements is not None:
            shape = (*memory.shape[:3], rows, self.width)
            together = frames_together(memory.layers)
            self.pass_frames = pass_frames(self.config, shape, elements, together)
            if memory.shard:
                # Of the part instead of the picture: its last passes are no shorter than the run's.
                self.pass_ends = pass_ends(self.config, shape, self.pass_frames, together)

    # -- the parts that a run calls ----------------------------------------------------------------

    def peak_of_picture(self) -> Peak:
        """Latent chunk -> float32 pixels of the whole picture."""
        features = self.trunk(self.height)
        self.passes(0, features, [self.height * 2**i for i in range(len(self.stages))], None)
        return self.found(0)

    def peak_of_trunk(self) -> Peak:
        """Latent chunk -> features."""
        return self.found(self.trunk(self.height))

    def peak_of_strip(self, strip: Strip) -> Peak:
        """Features (not counted) -> float32 pixels of a strip."""
        halos = geometry.strip_halos(self.config)
        rows = [
            bottom - top
            for top, bottom in (strip.bounds(2**i, halo) for i, halo in enumerate(halos))
        ]
        if architecture.middle_blocks(self.config)[1].conv2 in self.layers:
            self.ndhwc = True
        self.passes(0, 0, rows, (strip.stop - strip.start) * 2 ** (len(halos) - 1))
        return self.found(0)

    # -- the way through, as in decoder.py ---------------------------------------------------------

    def trunk(self, h: int) -> int:
        before, after = architecture.middle_blocks(self.config)
        z_dim, c = self.config.z_dim, before.channels
        z = self.conv(architecture.LATENT_CONV, z_dim, z_dim, h, (1, 1, 1))
        x = self.conv(architecture.FIRST_CONV, z_dim, c, h)
        self.drop(z)
        y = self.block(before, h)
        self.drop(x)
        x = self.attention(c, h)
        self.drop(y)
        y = self.block(after, h)
        self.drop(x)
        return y

    def passes(self, i: int, x: int, rows: list[int], cropped: int | None) -> None:
        """Stage `i` and all later stages, in passes over the features `x` (bytes).

        The first pass frees `x`, because the frames that wait for later passes are copied.

        rows: of the input of each stage. cropped: rows of the result.
        """
        missing, last = self.t, self.last
        place = self.scale, self.ndhwc
        while missing:
            frames = next_pass(missing, i, self.pass_frames, self.pass_ends, self.first, last)
            missing -= frames
            stage = self.stages[i]
            self.t, self.last = frames, last and not missing
            self.scale, self.ndhwc = place
            waiting = self.size(stage.channels_in, rows[i], missing)
            self.hold(waiting)
            y = self.stage(stage, rows[i], x)
            x = waiting
            if stage.up is not None:
                if cropped is not None:
                    needed = self.size(stage.up.channels, rows[i + 1])
                    self.hold(needed)
                    self.drop(y)
                    y = needed
                self.passes(i + 1, y, rows, cropped)
            else:
                self.head(y, rows[-1], cropped)
            self.first, self.resumes = False, True

    def stage(self, stage: Stage, h: int, x: int) -> int:
        """A stage, which frees `x` bytes of its input."""
        # With a shortcut around stages the input stays until the stage is done.
        keeps_input, frames = self.config.residual_shortcuts, self.t
        y = 0
        for n, block in enumerate(stage.blocks):
            y, read = self.block(block, h), y
            self.drop(read if n else 0 if keeps_input else x)
        if stage.up is not None:
            y, read = self.upsampler(stage.up, h), y
            self.drop(read)
        if stage.shortcut:
            shortcut = self.size(stage.channels, 2 * h, frames * (2 if stage.temporal else 1))
            self.hold(shortcut)
            self.drop(shortcut)
        self.drop(x if keeps_input else 0)
        return y

    def head(self, x: int, h: int, cropped: int | None) -> None:
        """Norm, convolution, float32 pixels; frees `x`."""
        c, colours = self.stages[-1].channels, self.config.decoder_channels
        self.pixel_frames = max(self.pixel_frames, self.t)
        h_out = h if cropped is None else cropped
        prepared = self.layers.get(architecture.HEAD)
        if prepared is not None:
            # Its result is float32.
            operand, workspace = self.operand(prepared, c, h)
            pixels = self.elements(colours, h) * 4
            self.count_work(9, c, colours, h)
            self.hold(pixels)
            self.hidden(workspace.hidden_bytes)
            self.drop(operand + x)
            folded = self.elements(colours, h_out) * 4
            copies = folded if self.config.decoder_patch_size > 1 else 0
            self.hold(copies)
            self.drop(copies + pixels)
            return
        y = self.normed(architecture.HEAD, c, colours, h)
        self.drop(x)
        folded = self.size(colours, h_out)
        copies = folded if self.config.decoder_patch_size > 1 else 0
        if self.itemsize < 4:
            copies += folded * 4 // self.itemsize
        self.hold(copies)
        self.drop(copies)
        self.drop(y)

    def upsampler(self, up: Upsampler, h: int) -> int:
        if up.time_conv is None:
            return self.double_picture(up, h)
        passed = 1 if self.first else 0
        rest = self.t - passed
        if rest == 0:
            self.skipped.add(up.name)
            return self.double_picture(up, h)
        cin, x_ndhwc = up.channels_in, self.ndhwc
        self.t = rest
        is_new = up.name in self.skipped
        self.skipped.discard(up.name)
        x = self.conv(up.time_conv, cin, 2 * cin, h, (3, 1, 1), is_new=is_new)
        if rest > 1 or self.batch > 1:
            self.hold(x)  # frames in their order
            self.drop(x)
        self.t = passed + 2 * rest
        if passed:
            joined = self.size(cin, h)
            self.hold(joined)
            self.drop(x)
            x = joined
            # Where their formats differ, the joined frames are NCDHW.
            self.ndhwc = self.ndhwc and x_ndhwc
        y = self.double_picture(up, h)
        self.drop(x)
        return y

    def double_picture(self, up: Upsampler, h: int) -> int:
        cin, out, prepared = up.channels_in, up.channels, self.layers.get(up.conv)
        frames = self.size(cin, h)
        # The frames of several NCDHW videos are not one batch: they are copied.
        copies = 0 if self.ndhwc or self.batch == 1 or self.t == 1 else frames
        if prepared is not None:
            workspace = self.workspace(prepared, h)
            copies += 0 if self.ndhwc else frames
            self.scale *= 2
            y = self.size(out, 2 * h)
            self.hold(copies + y)
            self.hidden(workspace.operand_bytes + workspace.hidden_bytes)
            self.drop(copies)
            self.work += 4 * cin * self.elements(out, 2 * h)  # the doubling is in its weight
            self.ndhwc = True
            return y
        self.scale *= 2
        doubled, y = self.size(cin, 2 * h), self.size(out, 2 * h)
        self.hold(copies + doubled + y)
        unfolds = self.unfolded(self.forms.conv2d, cin, out, 2 * h, 1, (1, 3, 3))
        if unfolds is not None:
            self.hidden(unfolds)
        else:
            self.hidden(0 if self.weights_ndhwc else doubled + y)
        self.drop(copies + doubled)
        self.work += 9 * cin * self.elements(out, 2 * h)
        self.ndhwc = self.weights_ndhwc
        return y


def heaviest_chunks(chunks: Iterable[Chunk]) -> list[Chunk]:
    """One chunk of each kind (frames, first, last) that can reach the peak.

    A first or last chunk is left out if a chunk between them is at least as long.
    """
    kinds = {_kind(c): c for c in chunks}
    inner = max((n for n, first, last in kinds if not (first or last)), default=0)
    return [c for (n, first, last), c in kinds.items() if n > inner or not (first or last)]


def _kind(chunk: Chunk) -> _Kind:
    return chunk.frames, chunk.is_first, chunk.is_last


def _rounded(n: int) -> int:
    return -(-n // _BLOCK_BYTES) * _BLOCK_BYTES
