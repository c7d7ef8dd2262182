"""FileSink: what every sink has that makes one file or folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import torch

from .files import Partial


class FileSink(ABC):
    """A sink of one file or folder, which gets its name when it is complete.

    path: its name; or with `names` any of these, the first that nobody else has when it is
    complete. `path` is then the name that it got. `warnings` are for the user: what the file
    differs in from what was asked for. `output_bytes`: see `sink.sink_bytes`.
    """

    needs_whole_frames = True

    def __init__(self, path: Path, *, is_folder: bool = False, names: Iterable[Path] = ()):
        self.path = Path(path)
        self.warnings: list[str] = []
        self.output_bytes = 0
        self._partial = Partial(self.path, is_folder=is_folder)
        self._names = names
        self._is_finished = False

    @abstractmethod
    def write(self, pixels: torch.Tensor, start_frame: int, first_row: int) -> None:
        """Take a block of pixels; see `sink.Sink`."""

    def finish(self) -> None:
        """Write all that is still held. An error of a full disk is raised here, not in `close`."""
        if not self._is_finished:
            self._finish()
            self._is_finished = True

    def close(self) -> None:
        """Finish, and rename the result to its final name."""
        self.finish()
        self.path = self._partial.publish(self._names)

    def abort(self) -> None:
        """Remove what was written; does nothing after `close` or a second time."""
        self._partial.discard()

    @abstractmethod
    def _finish(self) -> None:
        """Write what the sink still holds."""
