"""Pixels as images: frames with channels last in [0, 1], as ComfyUI's IMAGE holds them.

`ImageSink` collects all frames in one host tensor; it copies each chunk off the device while the
next one is decoded.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from .. import geometry
from ..config import WanVAEConfig
from ..errors import WanVAEError
from .sink import Reserve, room_for

# The device fills one buffer while the host empties the other.
_STAGING_BUFFERS = 2
# At most so many threads copy: memory of one socket is no faster with more.
_COPY_THREADS = 4
# The device takes 0.6 ms for so much over PCIe 4.
_PART_BYTES = 16 << 20


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

    From CUDA to pageable host memory the copy overlaps with decoding: the device fills pinned
    buffers on a stream of its own and threads empty them. Most of the time goes to page faults
    of memory that is used for the first time; while the threads wait for pixels, they touch the
    memory of the next chunk, so that little work is left after the last chunk. Host memory beyond
    `image`: two chunks.

    reserve: called with each part of `image` before it is written, by the thread that writes it.
    is_new: nobody has written into `image` since it was allocated.
    """

    needs_whole_frames = False

    def __init__(
        self, image: torch.Tensor, reserve: Reserve | None = None, *, is_new: bool = False
    ):
        self.image, self._reserve, self._is_new = image, reserve, is_new
        self.output_bytes = image.numel() * image.element_size()
        self._copier: HostCopier | None = None

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

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        """Take pixels [B, 3, t, rows, W'] float32 in [-1, 1]; see `sink.Sink`."""
        frames, rows = pixels.shape[2], pixels.shape[3]
        target = self.image[:, start_frame : start_frame + frames, first_row : first_row + rows]
        # Scaled and cast on the device of the pixels, where that takes next to no time.
        block = pixels.add(1.0).mul_(0.5).movedim(1, -1)
        # With a block that is the whole clip (an image), a copy has nothing to overlap with.
        if block.is_cuda and self.image.device.type == "cpu" and target.shape != self.image.shape:
            if self._copier is None:
                self._copier = HostCopier(block.device, self._reserve, self._is_new)
            # Blocks of the same rows come in the order of their frames.
            ahead = self.image[:, start_frame + frames :, first_row : first_row + rows]
            block = block.to(self.image.dtype).contiguous()
            self._copier.copy(block, target, ahead[:, :frames])
            return
        if self._reserve is not None:
            self._reserve(target)
        target.copy_(block)

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
                self._kept[frame] = image.to(self._device, self._dtype).contiguous()

    def close(self) -> None:
        """Nothing to flush."""

    def abort(self) -> None:
        """Nothing to undo."""


@dataclass
class _Block:
    """A block on its way: its staging buffer, and how many shares of it are not copied yet."""

    staging: torch.Tensor
    left: int


@dataclass(frozen=True)
class _Share:
    """What one thread copies: `staged`, a view of the block's buffer, to `target` on `arrived`."""

    block: _Block
    arrived: Arrival
    staged: torch.Tensor
    target: torch.Tensor
    ahead: torch.Tensor


class Arrival(Protocol):
    """An event of a device: `synchronize` returns when the copy into a staging buffer is done."""

    def synchronize(self) -> None: ...


class HostWriter:
    """Threads that copy blocks from staging buffers to pageable memory, each its rows of them.

    One thread copies 5 to 8 GB/s, so the last block of a clip would keep the caller waiting. Each
    takes the same rows of every block: it touches the memory ahead of a block before the next
    block comes there, and no other thread does.

    reserve, is_new: as in `ImageSink`. free: called with a staging buffer that may be used again.
    """

    def __init__(
        self,
        threads: int,
        free: Callable[[torch.Tensor], None],
        reserve: Reserve | None = None,
        is_new: bool = False,
    ):
        self._free, self._reserve, self._is_new = free, reserve, is_new
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._shares: list[queue.SimpleQueue[_Share | None]] = []
        self._threads: list[threading.Thread] = []
        for number in range(threads):
            shares: queue.SimpleQueue[_Share | None] = queue.SimpleQueue()
            thread = threading.Thread(
                target=self._empty, args=(shares,), name=f"wan_vae_copy_{number}", daemon=True
            )
            self._shares.append(shares)
            self._threads.append(thread)
            thread.start()

    def put(
        self,
        staging: torch.Tensor,
        parts: Sequence[tuple[Arrival, torch.Tensor, torch.Tensor, torch.Tensor]],
    ) -> None:
        """Queue the `parts` (arrived, staged, target, ahead) of one block in `staging`.

        staged, target: [B, t, rows, W, C] of some frames. ahead: memory that a later block will
        fill; its contents do not matter until then.
        """
        block = _Block(staging, len(parts) * len(self._threads))
        for arrived, staged, target, ahead in parts:
            # torch's cut depends on the number of rows alone, so equal blocks are cut alike.
            cuts = [x.tensor_split(len(self._threads), dim=2) for x in (staged, target, ahead)]
            for shares, *own in zip(self._shares, *cuts, strict=True):
                shares.put(_Share(block, arrived, *own))

    def finish(self) -> None:
        """Wait for all copies. Raises the first error."""
        self.stop()
        self.raise_failure()

    def stop(self) -> None:
        """Wait for all copies and end the threads; raises nothing."""
        for shares in self._shares:
            shares.put(None)
        for thread in self._threads:
            thread.join()

    def raise_failure(self) -> None:
        """Raise the first error of a thread."""
        if self._failure is not None:
            raise self._failure

    def _empty(self, shares: queue.SimpleQueue[_Share | None]) -> None:
        while (share := shares.get()) is not None:
            self._attempt(self._fill, share)
            with self._lock:
                share.block.left -= 1
                is_empty = share.block.left == 0
            if is_empty:
                self._free(share.block.staging)
            self._attempt(self._touch, share)

    def _attempt(self, work: Callable[[_Share], None], share: _Share) -> None:
        try:
            # Each thread has its own inference mode, and a tensor that was made in this mode can
            # only be written in it.
            with torch.inference_mode():
                work(share)
        except (RuntimeError, WanVAEError) as error:  # raised in the caller's thread
            self._failure = self._failure or error

    def _fill(self, share: _Share) -> None:
        if self._reserve is not None:
            self._reserve(share.target)
        share.arrived.synchronize()
        # NumPy's copy, because PyTorch's would start a pool of threads for this thread.
        np.copyto(_bits(share.target), _bits(share.staged))

    def _touch(self, share: _Share) -> None:
        if self._reserve is not None:
            self._reserve(share.ahead)
        elif self._is_new:
            _bits(share.ahead).fill(0)


class HostCopier:
    """Copies tensors from one CUDA device to pageable host memory, in order, in threads."""

    def __init__(self, device: torch.device, reserve: Reserve | None, is_new: bool):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._free: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        for _ in range(_STAGING_BUFFERS):
            self._free.put(None)  # allocated at first use, when the size of a chunk is known
        self._writer = HostWriter(copy_threads(os.cpu_count()), self._free.put, reserve, is_new)

    def copy(self, source: torch.Tensor, target: torch.Tensor, ahead: torch.Tensor) -> None:
        """Queue a copy of dense `source` [B, t, rows, W, C] to `target`.

        Waits while both buffers are in use. ahead: see `HostWriter.put`.
        """
        staging = self._free.get()
        self._writer.raise_failure()
        if staging is None or staging.numel() < source.numel() or staging.dtype != source.dtype:
            staging = torch.empty(source.numel(), dtype=source.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        staged = staging[: source.numel()].view(source.shape)
        parts = []
        with torch.cuda.stream(self._stream):
            for frames in frames_of_parts(source):
                staged[:, frames].copy_(source[:, frames], non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record(self._stream)
                parts.append((arrived, staged[:, frames], target[:, frames], ahead[:, frames]))
        # Without this, the allocator could give the memory to the next chunk during the copy.
        source.record_stream(self._stream)
        self._writer.put(staging, parts)

    def finish(self) -> None:
        """Wait for all copies. Raises the first error."""
        self._writer.finish()

    def stop(self) -> None:
        """Wait for all copies and end the threads; raises nothing."""
        self._writer.stop()


def copy_threads(cores: int | None) -> int:
    """How many threads copy on a machine of so many cores: a quarter of them, four at most."""
    return max(1, min(_COPY_THREADS, (cores or 1) // 4))


def frames_of_parts(block: torch.Tensor) -> list[slice]:
    """The frames of a block [B, t, ...] that are copied at a time: the host empties one part of a
    staging buffer while the device fills the next."""
    frames = block.shape[1]
    step = max(1, _PART_BYTES * frames // (block.numel() * block.element_size()))
    if block.shape[0] > 1:  # the frames of several videos do not lie together
        step = frames
    return [slice(first, min(first + step, frames)) for first in range(0, frames, step)]


def host_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty` on the CPU, in memory that NumPy allocates, which asks Linux for huge pages.

    The first write into 388 MB, by a copy from a GPU, takes 120 ms there and 250 ms in memory of
    PyTorch (the host of an NVIDIA H100, transparent huge pages by `madvise`, Linux's default).
    """
    raw = np.empty(prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def _bits(x: torch.Tensor) -> npt.NDArray[Any]:
    """View `x`, on the CPU, as integers of the same width: NumPy has no bfloat16."""
    integers: npt.NDArray[Any] = x.view({4: torch.int32, 2: torch.int16}[x.itemsize]).numpy()
    return integers
