"""PreviewSink: shows the frame just made, small and seldom, while another sink takes them all."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..clock import Mark
from .sink import Sink, rgb_of, sink_bytes

# As often as ComfyUI's samplers, whose steps take about that long, show a preview.
INTERVAL_S = 0.25


class PreviewSink:
    """Passes pixels on to `sink`, and calls `show` with the last frame of some of them.

    show: gets uint8 [h, w, 3] in host memory, no side longer than `most` pixels, at most once in
    `interval_s` seconds. The frame is scaled on the device, which nobody waits for: it is shown
    with the next pixels, or at the end. height: rows of a whole frame. Of a decode in strips one
    after another, which has no whole frame before its end, nothing is shown.
    """

    def __init__(
        self,
        sink: Sink,
        show: Callable[[torch.Tensor], None],
        *,
        height: int,
        most: int,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._sink, self._show = sink, show
        self._height, self._most, self._interval_s = height, most, interval_s
        self.needs_whole_frames = sink.needs_whole_frames
        self.output_bytes = sink_bytes(sink)
        self._due_s = 0.0
        self._waiting: tuple[torch.Tensor, Mark] | None = None

    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        """Take pixels [B, C, t, rows, W'] float32 in [-1, 1]; see `sink.Sink`."""
        self._sink.write(pixels, start_frame, first_row)
        if self._waiting is not None and self._waiting[1].is_past():
            self._show_waiting()
        now = time.monotonic()
        if self._waiting is None and now >= self._due_s and pixels.shape[3] == self._height:
            self._due_s = now + self._interval_s
            frame = self._small(pixels[:1, :, -1])
            self._waiting = frame, Mark.now(pixels.device)
            if not pixels.is_cuda:
                self._show_waiting()

    def _small(self, frame: torch.Tensor) -> torch.Tensor:
        """`frame` [1, C, H, W] in [-1, 1] as uint8 [h, w, 3] on its way to the host."""
        height, width = frame.shape[2:]
        factor = min(1.0, self._most / max(height, width))
        size = max(1, round(height * factor)), max(1, round(width * factor))
        small = F.interpolate(rgb_of(frame), size, mode="area")[0]
        levels = ((small + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        levels = levels.movedim(0, -1).contiguous()
        if not levels.is_cuda:
            return levels.cpu()
        host = torch.empty(levels.shape, dtype=torch.uint8, pin_memory=True)
        return host.copy_(levels, non_blocking=True)

    def _show_waiting(self) -> None:
        assert self._waiting is not None
        frame, mark = self._waiting
        self._waiting = None
        mark.wait()
        self._show(frame)

    def close(self) -> None:
        """Close the other sink, and show what is still waiting."""
        self._sink.close()
        if self._waiting is not None:
            self._show_waiting()

    def abort(self) -> None:
        """Abort the other sink; nothing is shown any more."""
        self._waiting = None
        self._sink.abort()
