"""The peak of device memory of an encode, predicted before its first chunk.

As `peak.py` for the decoder, over what `encoder.py` and `runs/encode.py` hold and drop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .. import geometry
from ..chunking import Chunk, Pass
from ..geometry import Strip
from ..io.pixels import STAGING_BUFFERS
from ..network import architecture
from ..network.architecture import Downsampler, EncoderStage
from .passes import (
    encoder_latent_rows,
    encoder_pass_frames,
    encoder_rows,
    frames_together,
)
from .peak import Memory, Peak, StripsPeak, Walk, heaviest_chunks

_FLOAT_BYTES = 4
# Zeros above, below, left and right of a frame that is to be halved.
_BEHIND = (0, 1, 0, 1)


@dataclass(frozen=True)
class EncodeMemory(Memory):
    """Predicts the memory of encodes.

    staged: the pixels come from the host, in float32.
    """

    staged: bool = False

    def of_picture(self, chunks: Sequence[Chunk], elements: int | None) -> int:
        """Peak of the whole picture, chunk after chunk. elements: see `encoder_pass_frames`."""
        height, peak, staging = self.shape[3], 0, 0
        whole = Strip(0, height, height, 0)
        for chunk in heaviest_chunks(chunks):
            walk = EncoderWalk(self, chunk, whole, elements)
            walk.trunk(walk.features())
            peak = max(peak, walk.found(0).peak + (0 if chunk.is_first else walk.moments))
            staging = max(staging, walk.staging)
        return peak + staging

    def of_strips(
        self, count: int, whole_frames: bool, chunks: Sequence[Chunk], elements: int
    ) -> StripsPeak:
        """Peak of the same encode in `count` strips, each through all chunks before the next.

        The features of all frames lie at the latent's resolution until the trunk has read them.
        whole_frames: of no meaning here. Raises GeometryError for an impossible count.
        """
        height = self.shape[3]
        heaviest = heaviest_chunks(chunks)
        peak = staging = work = 0
        alike: dict[tuple[int, int], list[Strip]] = {}
        for strip in geometry.strips(height, count, self.config):
            rows = encoder_rows(self.config, strip)
            alike.setdefault((rows[0], rows[-1]), []).append(strip)
        for group in alike.values():
            walks = [EncoderWalk(self, c, group[0], elements) for c in heaviest]
            peak = max(peak, *(walk.found(walk.features()).peak for walk in walks))
            staging = max(staging, *(walk.staging for walk in walks))
            work += len(group) * walks[0].work
        whole = Strip(0, height, height, 0)
        uncut = EncoderWalk(self, heaviest[0], whole, elements)
        uncut.features()
        trunks = [EncoderWalk(self, c, whole, elements) for c in heaviest]
        for walk in trunks:
            walk.trunk(0)
        kept = sum(EncoderWalk(self, c, whole, elements).result_size() for c in chunks)
        top = max(peak + staging, *(walk.found(0).peak + walk.moments for walk in trunks))
        extra = (work - uncut.work) / (trunks[0].work + uncut.work)
        return StripsPeak(kept + top, extra)


class EncoderWalk(Walk):
    """A chunk, or a strip of it, on its way through the encoder.

    staging: bytes of the pixels of its largest pass in `STAGING_BUFFERS`. moments: bytes of the
    result of the trunk.
    """

    def __init__(self, memory: EncodeMemory, chunk: Chunk, strip: Strip, elements: int | None):
        """elements: see `encoder_pass_frames`."""
        config = memory.config
        first, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, config)
        self.described = architecture.encoder_stages(config)
        super().__init__(memory, chunk, last - first, 1 << (len(self.described) - 1))
        self.whole = Pass(0, last - first, chunk)
        self.rows = encoder_rows(config, strip)
        self.is_cut = strip.stop - strip.start < strip.rows
        self.staged, self.staging = memory.staged, 0
        self.limits: tuple[int, ...] = ()
        if elements is not None:
            shape = (*memory.shape[:3], encoder_latent_rows(config, strip), self.width)
            together = frames_together(memory.layers)
            self.limits = encoder_pass_frames(config, shape, elements, together)
        moments = self.batch * 2 * config.z_dim * chunk.frames * self.height * self.width
        self.moments = self.rounded(moments * _FLOAT_BYTES)

    # -- the parts that a run calls ----------------------------------------------------------------

    def features(self) -> int:
        """Pixels -> features at the latent's resolution."""
        return self.through(len(self.described) - 2, self.whole)

    def trunk(self, x: int) -> Peak:
        """Features, which stay -> moments."""
        last, (before, after) = (
            self.described[-1],
            architecture.middle_blocks(self.config, "encoder"),
        )
        self.enter(len(self.described) - 1, self.whole)
        h, c = self.height, last.channels
        y = self.stage(last, h, 0)
        for block in (before, None, after):
            if block is None:
                y, read = self.attention(c, h, architecture.ENCODER_ATTENTION), y
            else:
                y, read = self.block(block, h), y
            self.drop(read)
        head = self.normed(architecture.ENCODER_HEAD, c, 2 * self.config.z_dim, h)
        # In a kernel its result is float32, and so is that of the convolution behind it.
        self.hold(2 * self.moments - head)
        self.drop(y)
        self.drop(x)
        return self.found(self.moments)

    def result_size(self) -> int:
        """Bytes of the features of the whole picture."""
        self.enter(len(self.described) - 1, self.whole)
        return self.size(self.described[-2].channels, self.height)

    # -- the way through, as in encoder.py ---------------------------------------------------------

    def enter(self, i: int, part: Pass) -> None:
        """Come to stage `i` with the frames of `part`."""
        self.t = part.at_stage(i, self.config)
        self.first, self.last = part.chunk.is_first, part.chunk.is_last
        self.resumes = part.first > 0
        self.scale = 1 << (len(self.described) - 1 - i)

    def through(self, i: int, part: Pass) -> int:
        """The result of stages 0 to `i`."""
        passes = part.split(i, self.limits, self.config)
        stage = self.described[i]
        if len(passes) > 1:
            joined = 0
            for one in passes:
                y = self.through(i, one)
                if not joined:
                    joined = self.size(
                        stage.channels, self.rows[i + 1], part.at_stage(i + 1, self.config)
                    )
                    self.hold(joined)
                self.drop(y)
            return joined
        x = self.through(i - 1, part) if i else 0
        self.enter(i, part)
        if not i:
            x = self.pixels(part.frames)
        y = self.stage(stage, self.rows[i], x)
        if self.is_cut:
            needed = self.size(stage.channels, self.rows[i + 1])
            self.hold(needed)
            self.drop(y)
            return needed
        return y

    def pixels(self, frames: int) -> int:
        """The pixels of a pass and the first convolution."""
        h, colours = self.rows[0], self.config.encoder_channels
        numbers, converted = self.elements(colours, h), self.size(colours, h)
        if self.staged:
            self.staging = max(self.staging, STAGING_BUFFERS * self.rounded(numbers * _FLOAT_BYTES))
            # In [-1, 1], before it is rounded.
            self.hidden(converted + numbers * _FLOAT_BYTES)
        elif self.itemsize == _FLOAT_BYTES:
            converted = 0  # taken as they lie
        self.hold(converted)
        if self.config.patch_size > 1:
            folded = self.size(colours, h)
            self.hold(folded)
            self.drop(converted)
            converted = folded
        # As frames of an IMAGE lie; a kernel's copy with more channels reads either format.
        fits = architecture.PIXEL_CONV in self.layers
        self.ndhwc = fits or self.config.patch_size == 1
        x = self.conv(architecture.PIXEL_CONV, colours, self.described[0].channels_in, h)
        self.drop(converted)
        return x

    def stage(self, stage: EncoderStage, h: int, x: int) -> int:
        """A stage, which frees `x` bytes of its input."""
        y = 0
        for n, block in enumerate(stage.blocks):
            y, read = self.block(block, h), y
            self.drop(read if n else 0 if stage.shortcut else x)
        if stage.down is not None:
            y, read = self.downsampler(stage.down, h), y
            self.drop(read)
        if stage.shortcut:
            self.average(stage, h)
            self.drop(x)
        return y

    def average(self, stage: EncoderStage, h: int) -> None:
        """Wan 2.2's shortcut around `stage`, of whose result the features are."""
        if stage.down is None:
            return  # of one resolution and width: the input itself
        y = self.elements(stage.channels, h // 2)
        # The sums in float32, then the averages.
        result = self.size(stage.channels, h // 2) if self.itemsize < _FLOAT_BYTES else 0
        self.hidden(self.rounded(y * _FLOAT_BYTES) + result)

    def downsampler(self, down: Downsampler, h: int) -> int:
        """Half as many rows and columns, and if it is temporal half as many frames."""
        c, prepared = down.channels, self.layers.get(down.conv)
        frames = self.size(c, h)
        # The frames of several NCDHW videos are not one batch: they are copied.
        copies = 0 if self.ndhwc or self.batch == 1 or self.t == 1 else frames
        if prepared is not None:
            copies += 0 if self.ndhwc else frames
            workspace = self.workspace(prepared, h)
            self.scale //= 2
            y = self.size(c, h // 2)
            self.hold(copies + y)
            self.hidden(workspace.operand_bytes + workspace.hidden_bytes)
            self.drop(copies)
            self.ndhwc = True
        elif self.forms.conv2d in ("columns", "taps"):
            unfolds = self.unfolded(self.forms.conv2d, c, c, h, 1, (1, 3, 3), (1, 2, 2), _BEHIND)
            self.hold(copies)
            self.scale //= 2
            y = self.size(c, h // 2)
            self.hold(y)
            self.hidden(unfolds or 0)
            self.drop(copies)
            self.ndhwc = self.weights_ndhwc
        else:
            numbers = self.batch * c * self.t * (h + 1) * (self.width * self.scale + 1)
            padded = self.rounded(numbers * self.itemsize)
            converted = 0 if self.ndhwc == self.weights_ndhwc else padded
            self.hold(copies + padded + converted)
            self.drop(min(padded, converted))
            self.scale //= 2
            y = self.size(c, h // 2)
            self.hold(y)
            self.hidden(0 if self.weights_ndhwc else padded + y)
            self.drop(copies + padded)
            self.ndhwc = self.weights_ndhwc
        self.work += 9 * c * self.elements(c, h // 2)
        return y if down.time_conv is None else self.halve_time(down.time_conv, c, h // 2, y)

    def halve_time(self, name: str, c: int, h: int, x: int) -> int:
        """The 3x1x1 convolution over every second frame; the first frame of a video passes."""
        slot = self.size(c, h, 1)
        self.history += 0 if self.resumes else slot
        passed, read = (1, self.t) if self.first else (0, self.t + 1)
        x_ndhwc = self.ndhwc
        joined = 0 if self.first else self.size(c, h, read)
        self.hold(joined)
        if not self.first:
            self.ndhwc = self.weights_ndhwc  # joining converts
        if not self.last:
            self.hold(slot if self.first else 0)
        if self.first and self.t == 1:
            return x
        prepared = self.layers.get(name)
        wanted = True if prepared else self.weights_ndhwc
        form = self.forms.conv3d
        # Forms that copy rows of their input convert them in that copy.
        copies_rows = prepared is None and form in ("columns", "taps")
        converted = 0 if self.ndhwc == wanted or copies_rows else self.size(c, h, read)
        self.hold(converted)
        unfolds = self.unfolded(form, c, c, h, read, (3, 1, 1), (2, 1, 1))
        self.t = (self.t - passed) // 2
        y = self.size(c, h)
        self.hold(y)
        if prepared is not None:
            self.hidden(self.workspace(prepared, h).hidden_bytes)
        elif unfolds is not None:
            self.hidden(unfolds)
        else:
            self.hidden(0 if self.weights_ndhwc else self.size(c, h, read) + y)
        self.work += 3 * c * self.elements(c, h)
        self.drop(joined + converted)
        self.ndhwc = wanted
        self.t += passed
        if passed:
            both = self.size(c, h)
            self.hold(both)
            self.drop(y)
            y = both
            # Where their formats differ, the joined frames are NCDHW.
            self.ndhwc = self.ndhwc and x_ndhwc
        self.drop(x)
        return y
