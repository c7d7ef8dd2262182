"""Pixels as images: frames with channels last in [0, 1], as ComfyUI's IMAGE holds them.

`ImageSink` collects all frames in one host tensor; it copies each chunk off the device while the
next one is decoded.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from .. import geometry
from ..config import WanVAEConfig
from ..device import host_empty, is_out_of_memory
from ..errors import WanVAEError
from . import pages
from .sink import Reserve, room_for

if TYPE_CHECKING:  # 10 ms in each process
    import numpy.typing as npt

# Called with a number of frames; called when something is done.
OnWritten = Callable[[int], None]
Done = Callable[[], None]
# A number of a block's first frames, and what is called when they and those before them are there.
Arrival = tuple[int, Done]
# Blocks that are not yet copied: the device computes one while the host empties the other.
BLOCKS_UNDER_WAY = 2
# At most so many threads copy: memory of one socket is no faster with more.
_COPY_THREADS = 4
# ... but so many where a caller waits for the last frames, when nothing else runs any more.
_FOLLOWING_THREADS = 8
# So much of a following copy's memory is mapped ahead of what is copied: 16 frames of 720p.
_MAPPED_BYTES = 180 << 20
# Readers are told of so many frames at a time: they copy the first ones of a pass meanwhile.
_TOLD_FRAMES = 4
# What a thread may meet: no memory, no room, a pipe whose reader is gone, or a mistake of ours,
# which must not leave the caller waiting.
_FAILURES = (RuntimeError, ValueError, TypeError, OSError, MemoryError, WanVAEError)
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
# Page-locked memory of a thread. The device takes 0.2 ms for so much over PCIe 4. With half of it
# encodes took 3% longer: twice as many pieces take Python's lock from the thread that launches.
_PIECE_BYTES = 4 << 20


def frames_view(image: torch.Tensor, colours: int = 3) -> torch.Tensor:
    """Frames [T, H, W, C >= 3] in [0, 1] as pixels [1, colours, T, H, W] in [0, 1]; a view.

    Frames without the alpha that a VAE of four colours encodes are opaque: that is a copy.
    For `WanVAE.encode` with `unit_range`, which scales each pass on the device.
    """
    if image.shape[-1] < colours:
        image = torch.cat((image, torch.ones_like(image[..., :1])), dim=-1)
    return image[..., :colours].movedim(-1, 0).unsqueeze(0)


def as_rgb(image: torch.Tensor) -> torch.Tensor:
    """Frames [..., 1] of a grey picture as [..., 3]; frames with more channels as they are."""
    if image.shape[-1] != 1:
        return image
    return image.expand(*image.shape[:-1], 3).contiguous()


def on_white(image: torch.Tensor) -> torch.Tensor:
    """Frames [..., 4] in [0, 1], whose last channel is alpha, as [..., 3] on white."""
    return (image[..., :3] - 1) * image[..., 3:] + 1


def frames_to_pixels(image: torch.Tensor) -> torch.Tensor:
    """Convert frames [T, H, W, C >= 3] in [0, 1] to pixels [1, 3, T, H, W] in [-1, 1]."""
    return frames_view(image) * 2 - 1


class ImageSink:
    """Writes pixels into `image` [B, T', H', W', 3] in [0, 1], on any device, of any float dtype.

    From CUDA to pageable host memory the copy overlaps with decoding, in threads (`HostWriter`).
    Most of the time goes to pages of memory that is used for the first time; while the threads wait
    for pixels, they ask for the pages of the next chunk, so that little work is left after the last
    one. Host memory beyond `image`: 4 MiB a thread.

    reserve: called with each part of `image` before it is written, by the thread that writes it.
    is_new: nobody has written into `image` since it was allocated. on_written: called with n, in
    any thread, as soon as frames [0, n) have arrived in `image`; not where they come in strips.
    """

    needs_whole_frames = False

    def __init__(
        self,
        image: torch.Tensor,
        reserve: Reserve | None = None,
        *,
        is_new: bool = False,
        on_written: OnWritten | None = None,
    ):
        self.image, self._reserve, self._is_new = image, reserve, is_new
        self.output_bytes = image.numel() * image.element_size()
        self._copier: HostCopier | None = None
        self._arrivals = None if on_written is None else _Arrivals(on_written)

    @classmethod
    def allocate(
        cls,
        latent_shape: tuple[int, ...],
        config: WanVAEConfig,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> ImageSink:
        """Make a sink with memory for a decode of `latent_shape`. Raises GeometryError,
        DecodeMemoryError."""
        b, c, t, h, w = geometry.pixel_shape(latent_shape, config)
        shape = (b, t, h, w, c)
        make = partial(torch.empty, shape, device=device, dtype=dtype)
        if device.type == "cpu":
            make = partial(host_empty, shape, dtype)
        return cls(room_for(shape, dtype, make), is_new=True)

    @property
    def is_copying(self) -> bool:
        """See `sink.is_copying`. False after an error, which `close` raises."""
        return self._copier is not None and not self._copier.has_failed

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        """Take pixels [B, 3, t, rows, W'] float32 in [-1, 1]; see `sink.Sink`."""
        frames, rows = pixels.shape[2], pixels.shape[3]
        target = self.image[:, start_frame : start_frame + frames, first_row : first_row + rows]
        # Scaled and cast on the device of the pixels, where that takes next to no time.
        block = pixels.add(1.0).mul_(0.5).movedim(1, -1)
        if block.is_cuda and self.image.device.type == "cpu":
            if self._copier is None:
                self._copier = HostCopier(block.device, self._reserve, self._is_new)
            # Blocks of the same rows come in the order of their frames.
            ahead = self.image[:, start_frame + frames :, first_row : first_row + rows]
            block = block.to(self.image.dtype).contiguous()
            arrivals = self._expected(start_frame, frames, rows)
            self._copier.copy(block, target, ahead[:, :frames], arrivals)
            return
        if self._reserve is not None:
            self._reserve(target)
        arrivals = self._expected(start_frame, frames, rows)
        target.copy_(block)
        for _, done in arrivals:
            done()

    def _expected(self, start: int, frames: int, rows: int) -> list[Arrival]:
        """What to call when some and all of `frames` from `start` on are there; after all that may
        run out of memory."""
        if self._arrivals is None or rows != self.image.shape[2]:
            return []
        stops = [*range(_TOLD_FRAMES, frames, _TOLD_FRAMES), frames]
        return [(stop, self._arrivals.expect(start + stop)) for stop in stops]

    def close(self) -> None:
        """Wait until all pixels have arrived. Raises the first error of a copy."""
        if self._copier is not None:
            copier, self._copier = self._copier, None
            copier.finish()

    def abort(self) -> None:
        """Stop the copying thread. Pixels that have arrived stay in `image`."""
        if self._copier is not None:
            copier, self._copier = self._copier, None
            copier.stop()


class EndFrames:
    """A sink that keeps the first and last frame, [B, H, W, 3] in [0, 1], and drops the rest."""

    needs_whole_frames = True

    def __init__(self, total_frames: int, device: torch.device, dtype: torch.dtype = torch.float32):
        self._total, self._device, self._dtype = total_frames, device, dtype
        self._kept: dict[int, torch.Tensor] = {}

    @property
    def first(self) -> torch.Tensor:
        return self._kept[0]

    @property
    def last(self) -> torch.Tensor:
        return self._kept[self._total - 1]

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        for frame in {0, self._total - 1}:
            if start_frame <= frame < start_frame + pixels.shape[2]:
                image = pixels[:, :, frame - start_frame].add(1.0).mul_(0.5).movedim(1, -1)
                # In order on the device of the pixels: on the host it would wake PyTorch's threads.
                self._kept[frame] = image.contiguous().to(self._device, self._dtype)

    def close(self) -> None:
        """Nothing to flush."""

    def abort(self) -> None:
        """Nothing to undo."""


class _Arrivals:
    """Tells of frames in their order, although blocks may arrive in another."""

    def __init__(self, on_written: OnWritten):
        self._on_written = on_written
        self._lock = threading.Lock()
        # The frames at which blocks end, in order, of those that have not all arrived; and those
        # that have.
        self._stops: deque[int] = deque()
        self._arrived: set[int] = set()

    def expect(self, stop: int) -> Done:
        """A block that ends at frame `stop` is on its way; what to call when it is there."""
        with self._lock:
            self._stops.append(stop)
        return partial(self._arrive, stop)

    def _arrive(self, stop: int) -> None:
        with self._lock:
            self._arrived.add(stop)
            last = 0
            while self._stops and self._stops[0] in self._arrived:
                last = self._stops.popleft()
                self._arrived.remove(last)
            if last:
                self._on_written(last)


@dataclass
class _Part:
    """Frames of a block up to `stop`: how many pieces of them are left, and what then happens."""

    stop: int
    done: Done
    left: int = 0


@dataclass
class _Block:
    """A block on its way, in parts: how many pieces of it are not copied yet."""

    left: int
    parts: Sequence[_Part]
    is_over: threading.Event = field(default_factory=threading.Event)

    def parts_of(self, frames: slice) -> list[_Part]:
        """The parts of which these frames are."""
        start, found = 0, []
        for part in self.parts:
            if frames.start < part.stop and frames.stop > start:
                found.append(part)
            start = part.stop
        return found


@dataclass(frozen=True)
class _Piece:
    """What one thread copies at a time: `source` of a block, once it is `ready`, to `target`.

    parts: of the block, to which it belongs. ahead: memory to prepare. clears: by writing zeros,
    where pages cannot be mapped.
    """

    block: _Block
    parts: Sequence[_Part]
    ready: Ready
    source: torch.Tensor
    target: torch.Tensor
    ahead: torch.Tensor
    clears: bool = True


class Ready(Protocol):
    """An event of a device: `synchronize` returns when the block is computed."""

    def synchronize(self) -> None: ...


class _Now:
    """What is there already."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


NOW = _Now()
# Brings a piece to the host; the result is read before the next call.
Fetch = Callable[[torch.Tensor], torch.Tensor]


def on_host() -> Fetch:
    """A `Fetch` of what is on the host already."""
    return lambda piece: piece


class FollowingCopy:
    """A copy of frames [B, T, ...] in host memory that others write, while they do: in memory of
    its own, `image`. Use as a context: it ends its threads.

    mapped_frames: so many have their memory ahead of what is copied; None: as many as are usual.
    """

    def __init__(self, frames: torch.Tensor, mapped_frames: int | None = None):
        self._frames, self._copied = frames, 0
        shape, dtype = tuple(frames.shape), frames.dtype
        if mapped_frames is None:
            frame_bytes = max(1, frames.numel() * frames.element_size() // max(1, shape[1]))
            mapped_frames = max(1, _MAPPED_BYTES // frame_bytes)
        self._mapped_frames = min(mapped_frames, shape[1])
        self.image = room_for(shape, dtype, lambda: host_empty(shape, dtype))
        threads = copy_threads(os.cpu_count(), _FOLLOWING_THREADS)
        self._writer = HostWriter(threads, on_host, is_new=True)

    def __enter__(self) -> FollowingCopy:
        return self

    def prepare(self) -> None:
        """Let the threads map the memory of the first frames, before any of them is final."""
        self._writer.expect(self.image[:, : self._mapped_frames])

    def __exit__(self, *error: object) -> None:
        self._writer.stop()

    def follow(self, written: int) -> None:
        """Frames [0, written) of the original are final. Raises the first error of a copy."""
        start, stop = self._copied, written
        if stop <= start:
            return
        self._copied = stop
        ahead = self.image[:, start + self._mapped_frames : stop + self._mapped_frames]
        # Other threads copy there: it may have been written already.
        self._writer.put(
            NOW, self._frames[:, start:stop], self.image[:, start:stop], ahead, clears_ahead=False
        )

    def finish(self) -> torch.Tensor:
        """The copy, when all frames of the original are final."""
        self.follow(self._frames.shape[1])
        self._writer.finish()
        return self.image


class HostWriter:
    """Threads that copy blocks to pageable memory, piece by piece.

    One thread copies 5 to 8 GB/s, so the last block of a clip would keep the caller waiting. While
    a thread waits for its piece, the pages that it will fill are mapped, and those of its piece of
    the next block afterwards: pieces of equal blocks are equal, and go to the same thread.

    fetch: makes what brings pieces to the host, for each thread its own. reserve, is_new: as in
    `ImageSink`.
    """

    def __init__(
        self,
        threads: int,
        fetch: Callable[[], Fetch],
        reserve: Reserve | None = None,
        is_new: bool = False,
    ):
        self._fetch, self._reserve, self._is_new = fetch, reserve, is_new
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._under_way: deque[_Block] = deque()
        self._most = threads
        self._pieces: list[queue.SimpleQueue[_Piece | None]] = []
        self._threads: list[threading.Thread] = []

    def put(
        self,
        ready: Ready,
        source: torch.Tensor,
        target: torch.Tensor,
        ahead: torch.Tensor,
        arrivals: Sequence[Arrival] = (),
        clears_ahead: bool = True,
    ) -> None:
        """Queue a copy of dense `source` [A, B, C, ...] to `target`; waits while two are under way.

        ahead: memory that a later block will fill. Its contents do not matter until then, where
        that is the next block (clears_ahead). arrivals: what a thread calls when the first b frames
        [A, :b] have arrived, by rising b; the last one is of all of them. Raises the first error of
        a thread.
        """
        self._await_room()
        if self._failure is not None:
            raise self._failure
        pieces = list(pieces_of(source))
        if not pieces:  # of a rank without rows
            for _, done in arrivals:
                done()
            return
        block = _Block(len(pieces), [_Part(stop, done) for stop, done in arrivals])
        parts = [block.parts_of(place[1]) for _, place in pieces]
        for own in parts:
            for part in own:
                part.left += 1
        self._under_way.append(block)
        self._start_threads(pieces)
        for (number, place), own in zip(pieces, parts, strict=True):
            piece = _Piece(
                block, own, ready, source[place], target[place], ahead[place], clears_ahead
            )
            self._queue(number, piece)

    def expect(self, ahead: torch.Tensor) -> None:
        """Prepare the memory of the first block before there is any."""
        pieces = list(pieces_of(ahead))
        block = _Block(len(pieces), ())
        if pieces:
            self._await_room()
            self._under_way.append(block)
        self._start_threads(pieces)
        for number, place in pieces:
            part = ahead[place]
            nothing = part[:, :0]
            self._queue(number, _Piece(block, (), NOW, nothing, nothing, part))

    def _await_room(self) -> None:
        while len(self._under_way) >= BLOCKS_UNDER_WAY:
            self._under_way.popleft().is_over.wait()

    def _start_threads(self, pieces: Sequence[tuple[int, object]]) -> None:
        """Start those that will get these numbered pieces, before any of them works: threads that
        map pages keep new ones from starting."""
        for number, _ in pieces:
            while len(self._threads) <= number % self._most:
                self._start_thread()

    def _queue(self, number: int, piece: _Piece) -> None:
        self._pieces[number % self._most].put(piece)

    @property
    def has_failed(self) -> bool:
        """Whether a thread has met an error, which the next call but `stop` raises."""
        return self._failure is not None

    def finish(self) -> None:
        """Wait for all copies. Raises the first error."""
        self.stop()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Wait for all copies and end the threads; raises nothing."""
        for pieces in self._pieces:
            pieces.put(None)
        for thread in self._threads:
            thread.join()

    def _start_thread(self) -> None:
        pieces: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        name = f"wan_vae_copy_{len(self._threads)}"
        thread = threading.Thread(target=self._empty, args=(pieces,), name=name, daemon=True)
        thread.start()
        self._pieces.append(pieces)
        self._threads.append(thread)

    def _empty(self, pieces: queue.SimpleQueue[_Piece | None]) -> None:
        fetch: Fetch | None = None
        while (piece := pieces.get()) is not None:
            try:
                # Each thread has its own inference mode, and a tensor that was made in this mode
                # can only be written in it.
                with torch.inference_mode():
                    if self._failure is None:
                        fetch = fetch or self._fetch()
                        self._fill(piece, fetch)
            except _FAILURES as error:  # raised in the caller's thread
                self._failure = self._failure or error
            block, parts = piece.block, piece.parts
            del piece  # device memory, which nobody waits for any more
            with self._lock:
                for part in parts:
                    part.left -= 1
                arrived = [part.done for part in parts if part.left == 0]
            try:
                for done in arrived:
                    if self._failure is None:
                        done()
            except _FAILURES as error:
                self._failure = self._failure or error
            finally:
                with self._lock:
                    block.left -= 1
                if block.left == 0:
                    block.is_over.set()

    def _fill(self, piece: _Piece, fetch: Fetch) -> None:
        self._prepare(piece.target)
        piece.ready.synchronize()
        # NumPy's copy, because PyTorch's would start a pool of threads for this thread.
        np.copyto(bits(piece.target), bits(fetch(piece.source)))
        if not self._prepare(piece.ahead) and self._is_new and piece.clears:
            bits(piece.ahead).fill(0)

    def _prepare(self, part: torch.Tensor) -> bool:
        """Make room for `part` before it is written, and map its pages if that can be done."""
        if self._reserve is not None:
            self._reserve(part)
            return True
        try:
            return self._is_new and pages.populate(part)
        except OSError:  # no memory: what writes there will meet it
            return False


class HostCopier:
    """Copies tensors from one CUDA device to pageable host memory, in order, in threads."""

    def __init__(self, device: torch.device, reserve: Reserve | None, is_new: bool):
        self._device = device
        threads = copy_threads(os.cpu_count())
        self._writer = HostWriter(threads, partial(_Staging, device), reserve, is_new)

    def copy(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        ahead: torch.Tensor,
        arrivals: Sequence[Arrival] = (),
    ) -> None:
        """Queue a copy of dense `source` [A, B, C, ...] to `target`: see `HostWriter.put`.

        The threads let go of `source` when it has left the device.
        """
        # Threads that spin would take cores from the thread that launches.
        ready = torch.cuda.Event(blocking=True)
        ready.record(torch.cuda.current_stream(self._device))
        self._writer.put(ready, source, target, ahead, arrivals)

    @property
    def has_failed(self) -> bool:
        """See `HostWriter.has_failed`."""
        return self._writer.has_failed

    def finish(self) -> None:
        """Wait for all copies. Raises the first error."""
        self._writer.finish()

    def stop(self) -> None:
        """Wait for all copies and end the threads; raises nothing."""
        self._writer.stop()


class _Staging:
    """A `Fetch` for one thread: page-locked memory for a piece, and a stream.

    While one thread copies from its memory, the device fills that of others.
    """

    def __init__(self, device: torch.device):
        # A thread begins with device 0, where leaving a stream of another would make a context.
        torch.cuda.set_device(device)
        self._stream = torch.cuda.Stream(device)
        self._memory = LockedMemory()

    def __call__(self, source: torch.Tensor) -> torch.Tensor:
        staged = self._memory.like(source)
        with torch.cuda.stream(self._stream):
            staged.copy_(source)  # returns when it has arrived
        return staged


class LockedMemory:
    """Host memory for one piece at a time, page-locked where the system allows so much of it: from
    other memory copies are right, and slower."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """A dense tensor of the shape and dtype of `x`, in the memory of the one before."""
        size = x.numel() * x.element_size()
        if self._bytes.numel() < size:
            self._bytes = _locked(size)
        return self._bytes[:size].view(x.dtype).view(x.shape)


def _locked(size: int) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return torch.empty(size, dtype=torch.uint8)


def copy_threads(cores: int | None, most: int = _COPY_THREADS) -> int:
    """How many threads copy on a machine of so many cores: a quarter of them, `most` at most."""
    return max(1, min(most, (cores or 1) // 4))


def pieces_of(block: torch.Tensor) -> Iterator[tuple[int, tuple[slice, slice, slice]]]:
    """Numbers and places of dense pieces of a dense `block` [A, B, C, ...], about `_PIECE_BYTES`
    each.

    Blocks that differ only in A or only in B are cut and numbered alike from their start on.
    """
    a, b, c = block.shape[:3]
    line = max(1, prod(block.shape[3:]) * block.element_size())
    lines = max(1, min(c, _PIECE_BYTES // line))
    several = max(1, _PIECE_BYTES // (lines * line)) if lines == c else 1
    for i in range(a):
        for j in range(0, b, several):
            for k in range(0, c, lines):
                number = i + j // several * -(-c // lines) + k // lines
                yield number, (slice(i, i + 1), slice(j, j + several), slice(k, k + lines))


def bits(x: torch.Tensor) -> npt.NDArray[Any]:
    """View `x`, on the CPU, as integers of the same width: NumPy has no bfloat16."""
    integers: npt.NDArray[Any] = x.view(_INTEGERS[x.itemsize]).numpy()
    return integers
