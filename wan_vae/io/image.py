"""Pixels as images: frames with channels last in [0, 1], as ComfyUI's IMAGE holds them.

`ImageSink` collects all frames in one host tensor; it copies each chunk off the device while the
next one is decoded.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import geometry
from ..config import WanVAEConfig
from ..errors import WanVAEError
from .sink import Reserve

# The device fills one buffer while the host empties the other.
_STAGING_BUFFERS = 2


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


def frames_to_pixels(image: torch.Tensor) -> torch.Tensor:
    """Convert frames [T, H, W, C >= 3] in [0, 1] to pixels [1, 3, T, H, W] in [-1, 1]."""
    return frames_view(image) * 2 - 1


class ImageSink:
    """Writes pixels into `image` [B, T', H', W', 3] in [0, 1], on any device, of any float dtype.

    From CUDA to pageable host memory the copy overlaps with decoding: the device fills pinned
    buffers on a stream of its own and a thread empties them. Most of the time goes to page faults
    of memory that is used for the first time; while the thread waits for pixels, it touches the
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
        """Make a sink with memory for a decode of `latent_shape`. Raises GeometryError."""
        b, c, t, h, w = geometry.pixel_shape(latent_shape, config)
        shape = (b, t, h, w, c)
        on_host = device.type == "cpu"
        image = (
            host_empty(shape, dtype) if on_host else torch.empty(shape, device=device, dtype=dtype)
        )
        return cls(image, is_new=True)

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


@dataclass(frozen=True)
class _Copy:
    """One copy on its way: `staged`, a view of `staging`, is to go to `target` on `arrived`."""

    arrived: torch.cuda.Event
    staging: torch.Tensor
    staged: torch.Tensor
    target: torch.Tensor
    ahead: torch.Tensor


class HostCopier:
    """Copies tensors from one CUDA device to pageable host memory, in order, in a thread."""

    def __init__(self, device: torch.device, reserve: Reserve | None, is_new: bool):
        self._device, self._reserve, self._is_new = device, reserve, is_new
        self._stream = torch.cuda.Stream(device)
        self._free: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        for _ in range(_STAGING_BUFFERS):
            self._free.put(None)  # allocated at first use, when the size of a chunk is known
        self._filled: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._empty, name="wan_vae_copy", daemon=True)
        self._thread.start()

    def copy(self, source: torch.Tensor, target: torch.Tensor, ahead: torch.Tensor) -> None:
        """Queue a copy of dense `source` to `target`. Waits while both buffers are in use.

        ahead: memory that a later call will fill; its contents do not matter until then.
        """
        staging = self._free.get()
        self._raise_failure()
        if staging is None or staging.numel() < source.numel() or staging.dtype != source.dtype:
            staging = torch.empty(source.numel(), dtype=source.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            staged = staging[: source.numel()].view(source.shape)
            staged.copy_(source, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        # Without this, the allocator could give the memory to the next chunk during the copy.
        source.record_stream(self._stream)
        self._filled.put(_Copy(arrived, staging, staged, target, ahead))

    def finish(self) -> None:
        """Wait for all copies. Raises the first error."""
        self.stop()
        self._raise_failure()

    def stop(self) -> None:
        """Wait for all copies and end the thread; raises nothing."""
        self._filled.put(None)
        self._thread.join()

    def _empty(self) -> None:
        while (item := self._filled.get()) is not None:
            self._attempt(self._fill, item)
            self._free.put(item.staging)
            self._attempt(self._touch, item)

    def _attempt(self, work: Callable[[_Copy], None], item: _Copy) -> None:
        try:
            # Each thread has its own inference mode, and a tensor that was made in this mode can
            # only be written in it.
            with torch.inference_mode():
                work(item)
        except (RuntimeError, WanVAEError) as error:  # raised in the caller's thread
            self._failure = self._failure or error

    def _fill(self, item: _Copy) -> None:
        if self._reserve is not None:
            self._reserve(item.target)
        item.arrived.synchronize()
        # NumPy's copy, because PyTorch's would start a pool of threads for this thread.
        np.copyto(_bits(item.target), _bits(item.staged))

    def _touch(self, item: _Copy) -> None:
        if self._reserve is not None:
            self._reserve(item.ahead)
        elif self._is_new:
            _bits(item.ahead).fill(0)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


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
