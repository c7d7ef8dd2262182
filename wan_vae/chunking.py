"""Chunk schedules: how many latent frames the decoder takes at a time.

Every schedule gives the same pixels, because the history is exact. The schedule only decides about
memory and speed. All frames of a chunk go through the small layers together. Where features are
large, they go on in passes of fewer frames.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import SupportsIndex, cast

from .config import WanVAEConfig
from .errors import GeometryError
from .said import said


@dataclass(frozen=True)
class Chunk:
    """Latent frames [start, stop) of one call.

    `is_first`: frame 0 skips the temporal up-samplers. `is_last`: no history is kept afterwards.
    Where features are large, a chunk is split into passes (`split`). A layer sees each pass as a
    chunk of its own.
    """

    start: int
    stop: int
    is_first: bool
    is_last: bool

    def split(self) -> tuple[Chunk, Chunk]:
        """The chunk as a layer sees it in a first pass, and in the passes after it."""
        return replace(self, is_last=False), replace(self, is_first=False)

    @property
    def frames(self) -> int:
        return self.stop - self.start

    @property
    def is_only_frame(self) -> bool:
        """True for a video of one frame: all history is zero, one temporal slice is enough."""
        return self.is_first and self.is_last and self.frames == 1


@dataclass(frozen=True)
class Pass:
    """Pixel frames [first, last) of a chunk that go through a stage of the encoder together.

    chunk: as the layers see it, which take each pass as a chunk of its own.
    """

    first: int
    last: int
    chunk: Chunk

    @property
    def frames(self) -> int:
        return self.last - self.first

    def at_stage(self, stage: int, config: WanVAEConfig) -> int:
        """Frames of features that enter `stage`; the video's first frame stays one frame."""
        factor = 1 << sum(config.temporal_downsample[:stage])
        own = self.chunk.is_first
        return (self.frames - own) // factor + own

    def split(self, stage: int, limits: tuple[int, ...], config: WanVAEConfig) -> list[Pass]:
        """The passes in which `stage`, and all before it, takes this one: only itself, if it fits.

        Otherwise the first frame of the video goes alone, so that whole latent frames remain,
        which are cut where no kernel makes frames together (`planning.passes`).
        """
        if not limits or self.at_stage(stage, config) <= limits[stage]:
            return [self]
        step = limits[stage] << sum(config.temporal_downsample[:stage])
        start = self.first + self.chunk.is_first
        starts = [self.first] * self.chunk.is_first + list(range(start, self.last, step))
        stops = [*starts[1:], self.last]
        return [
            Pass(
                a,
                b,
                replace(
                    self.chunk,
                    is_first=self.chunk.is_first and a == self.first,
                    is_last=self.chunk.is_last and b == self.last,
                ),
            )
            for a, b in zip(starts, stops, strict=True)
        ]

    def parts(self, stage: int, limits: tuple[int, ...], config: WanVAEConfig) -> Iterator[Pass]:
        """The passes in which the first stage takes this one on its way through `stage`, in turn:
        those of `stage`, each split by the stages before it."""
        for one in self.split(stage, limits, config):
            if stage:
                yield from one.parts(stage - 1, limits, config)
            else:
                yield one


@dataclass(frozen=True)
class PassEnds:
    """How passes begin and end where the frames of a chunk do not go through a stage together.

    first: how many frames of features enter each stage of the decoder in a video's first pass;
    empty: its first frame alone. last: how many enter the last stage in its last pass; the passes
    before it become shorter by halves. 0: no pass is shorter.
    """

    first: tuple[int, ...] = ()
    last: int = 0


def next_pass(
    frames: int, stage: int, limits: tuple[int, ...], ends: PassEnds, is_first: bool, is_last: bool
) -> int:
    """How many of `frames` frames of features enter `stage` of the decoder in the next pass.

    limits: of each stage; empty: none has one. Where the frames do not all enter together, the
    first pass of a video (is_first) leaves whole latent frames, which are cut where no kernel makes
    frames together (`planning.passes`). is_last: these are the video's last frames.
    """
    if not limits:
        return frames
    limit = limits[stage]
    if frames <= limit:
        # What a pass has made is copied in the time of the next one.
        is_cut = is_last and stage + 1 == len(limits) and 0 < ends.last < frames
        return frames - _half(frames, ends.last) if is_cut else frames
    if is_first:
        return ends.first[stage] if ends.first else 1
    if is_last and 0 < ends.last < limit and frames < 2 * limit:
        # No short pass behind a long one.
        return min(limit, frames - _half(frames, ends.last))
    return limit


def _half(frames: int, of: int) -> int:
    """About half of `frames`: a multiple of `of`."""
    return max(of, frames // 2 // of * of)


def whole_number(value: object, what: str) -> int:
    """Return `value` as an int if it is a whole number of any library. Raises GeometryError.

    Booleans are refused, because True would silently be 1.
    """
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
            raise TypeError
        return operator.index(cast(SupportsIndex, value))
    except TypeError as error:
        raise GeometryError(
            said(
                "input.whole",
                "{what} is {value}: expected a whole number",
                what=what,
                value=repr(value),
            )
        ) from error


def schedule(total_frames: int, chunk_frames: int | Sequence[int]) -> list[Chunk]:
    """Make the chunks that cover `total_frames` latent frames.

    `chunk_frames`: frames per chunk (only the last chunk may be shorter), or a list of chunk
    lengths that add up to `total_frames`. Raises GeometryError for an impossible schedule.
    """
    if total_frames < 1:
        raise GeometryError(
            said(
                "latent.no_frames",
                "a latent of {frames} frames cannot be decoded: need at least 1",
                frames=total_frames,
            )
        )
    if not isinstance(chunk_frames, Sequence):
        chunk_frames = whole_number(chunk_frames, "chunk_frames")
        if chunk_frames < 1:
            raise GeometryError(
                said(
                    "input.chunk_frames",
                    "chunk_frames is {frames}: expected 1 or more latent frames",
                    frames=chunk_frames,
                )
            )
        lengths = [
            min(chunk_frames, total_frames - i) for i in range(0, total_frames, chunk_frames)
        ]
    else:
        lengths = [whole_number(n, "a chunk length") for n in chunk_frames]
        if any(n < 1 for n in lengths) or sum(lengths) != total_frames:
            raise GeometryError(
                said(
                    "plan.schedule",
                    "chunk schedule {lengths} does not cover {frames} latent frames exactly",
                    lengths=lengths,
                    frames=total_frames,
                )
            )
    chunks, start = [], 0
    for n in lengths:
        chunks.append(Chunk(start, start + n, start == 0, start + n == total_frames))
        start += n
    return chunks


def chunk_lengths(total_frames: int, chunk_frames: int | Sequence[int]) -> tuple[int, ...]:
    """Latent frames of each chunk of `schedule`. Raises GeometryError."""
    return tuple(chunk.frames for chunk in schedule(total_frames, chunk_frames))
