"""Pixels as pictures: frames with channels last in [0, 1], as ComfyUI's IMAGE holds them.

Last step of the sentence for a caller that wants all frames in one host tensor: `ImageSink` takes
each chunk off the device while the next one is decoded.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from math import prod

import numpy as np
import torch

from .. import geometry
from ..config import WanVAEConfig
from ..errors import WanVAEError
from .sink import Claim

# One buffer is filled by the device while the other is emptied by the host.
_STAGING_BUFFERS = 2


def frames_to_pixels(image: torch.Tensor) -> torch.Tensor:
    """Frames [T, H, W, C >= 3] in [0, 1] -> pixels [1, 3, T, H, W] in [-1, 1], one video."""
    return image[..., :3].movedim(-1, 0).unsqueeze(0) * 2 - 1


class ImageSink:
    """Writes pixels into `image` [B, T', H', W', 3] in [0, 1], on any device, of any float dtype.

    From CUDA to ordinary host memory the copy overlaps with decoding: the device fills pinned
    buffers on its own stream and a thread empties them. The page faults of fresh host memory, most
    of the cost, then happen beside the decode: the thread meets those of the next chunk while it
    waits, so that little is left to do behind the last one. Host memory beyond `image`: two chunks.
    `claim` is called with each part of `image` before it is written, by whoever writes it. `fresh`:
    nobody has written into `image` since it was allocated.
    """

    needs_whole_frames = False

    def __init__(self, image: torch.Tensor, claim: Claim | None = None, *, fresh: bool = False):
        self.image, self._claim, self._fresh = image, claim, fresh
        self.output_bytes = image.numel() * image.element_size()
        self._mover: _Mover | None = None

    @classmethod
    def allocate(
        cls,
        latent_shape: tuple[int, ...],
        config: WanVAEConfig,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> ImageSink:
        """A sink with room for a decode of `latent_shape`. Raises GeometryError."""
        b, c, t, h, w = geometry.pixel_shape(latent_shape, config)
        return cls(_empty((b, t, h, w, c), device, dtype), fresh=True)

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        """Take pixels [B, 3, t, rows, W'] float32 in [-1, 1]; see `sink.Sink`."""
        frames, rows = pixels.shape[2], pixels.shape[3]
        place = self.image[:, start_frame : start_frame + frames, first_row : first_row + rows]
        # Halved and cast where the pixels are: a device does that in no time.
        picture = pixels.add(1.0).mul_(0.5).movedim(1, -1)
        # One piece that is the whole clip (an image) has nothing to be copied beside.
        if picture.is_cuda and self.image.device.type == "cpu" and place.shape != self.image.shape:
            if self._mover is None:
                self._mover = _Mover(picture.device, self._claim, self._fresh)
            # Pieces of the same rows come in the order of their frames.
            ahead = self.image[:, start_frame + frames :, first_row : first_row + rows]
            picture = picture.to(self.image.dtype).contiguous()
            self._mover.move(picture, place, ahead[:, :frames])
            return
        if self._claim is not None:
            self._claim(place)
        place.copy_(picture)

    def close(self) -> None:
        """Wait until every chunk has arrived; raises what went wrong on the way."""
        if self._mover is not None:
            mover, self._mover = self._mover, None
            mover.finish()

    def abort(self) -> None:
        """Stop the copying thread. What arrived so far stays in `image`."""
        if self._mover is not None:
            mover, self._mover = self._mover, None
            mover.stop()


class _Mover:
    """Copies tensors from one CUDA device to pageable host memory, in order, in the background."""

    def __init__(self, device: torch.device, claim: Claim | None, fresh: bool):
        self._device, self._claim, self._fresh = device, claim, fresh
        self._stream = torch.cuda.Stream(device)
        self._free: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        for _ in range(_STAGING_BUFFERS):
            self._free.put(None)  # made on first use, when the size of a chunk is known
        self._filled: queue.SimpleQueue = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._empty, name="wan_vae_copy", daemon=True)
        self._thread.start()

    def move(self, source: torch.Tensor, place: torch.Tensor, ahead: torch.Tensor) -> None:
        """Queue a copy of dense `source` to `place`. Waits while both buffers are in use.

        `ahead`: memory that a later call will fill; until then its contents do not matter.
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
        # Else the allocator could hand its memory to the next chunk while the copy still reads it.
        source.record_stream(self._stream)
        self._filled.put((arrived, staging, staged, place, ahead))

    def finish(self) -> None:
        """Wait for all copies. Raises the first failure."""
        self.stop()
        self._raise_failure()

    def stop(self) -> None:
        """Wait for all copies, whatever their outcome."""
        self._filled.put(None)
        self._thread.join()

    def _empty(self) -> None:
        while (item := self._filled.get()) is not None:
            arrived, staging, staged, place, ahead = item
            self._attempt(self._fill, place, arrived, staged)
            self._free.put(staging)
            self._attempt(self._touch, ahead)

    def _attempt(self, work: Callable[..., None], *arguments) -> None:
        try:
            # Inference mode is a thread's own: tensors made in it may be written only in it.
            with torch.inference_mode():
                work(*arguments)
        except (RuntimeError, WanVAEError) as error:  # raised in the caller's thread
            self._failure = self._failure or error

    def _fill(self, place: torch.Tensor, arrived: torch.cuda.Event, staged: torch.Tensor) -> None:
        if self._claim is not None:
            self._claim(place)
        arrived.synchronize()
        # NumPy's copy: PyTorch's would start a pool of threads for this thread.
        np.copyto(_bits(place), _bits(staged))

    def _touch(self, ahead: torch.Tensor) -> None:
        if self._claim is not None:
            self._claim(ahead)
        elif self._fresh:
            _bits(ahead).fill(0)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def _empty(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty`; on the CPU in memory of NumPy's, which asks Linux for huge pages.

    The first write into 388 MB, by a copy from a GPU: 120 ms there against 250 ms (the host of an
    NVIDIA H100, transparent huge pages by `madvise`, Linux's default).
    """
    if device.type != "cpu":
        return torch.empty(shape, device=device, dtype=dtype)
    raw = np.empty(prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def _bits(x: torch.Tensor) -> np.ndarray:
    """`x` on the CPU as integers of its width: NumPy has no bfloat16."""
    return x.view({4: torch.int32, 2: torch.int16}[x.itemsize]).numpy()
