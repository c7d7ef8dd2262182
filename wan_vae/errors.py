"""Typed errors. Each message is one line: what was wrong, the value, what was expected, the cure.

ComfyUI users read it in a red box, users of the command line on one line of stderr. It contains the
numbers that an engineer needs.
"""

from __future__ import annotations

from .said import Said, said


class WanVAEError(Exception):
    """Base class of every error that this package raises on purpose.

    All are named `wan_vae.NAME`, as callers import them. Inside ComfyUI the module's own name is
    the path of a user's folder, which its error dialog would show.
    """

    __module__ = "wan_vae"

    def __init_subclass__(cls) -> None:
        cls.__module__ = WanVAEError.__module__


class CheckpointError(WanVAEError):
    """A checkpoint is unreadable, or a tensor is missing, extra, not finite or mis-shaped."""


class NotAWanVAEError(CheckpointError):
    """The tensors belong to another model. The message names it if it is known.

    `finding` is the message without advice, for who can go on with that model.
    """

    def __init__(self, message: str, finding: str | None = None):
        super().__init__(message)
        self.finding = message if finding is None else finding


class LatentError(WanVAEError):
    """A latent (or a video to encode) has a wrong shape, dtype, channel count, or is not finite."""


class GeometryError(WanVAEError, ValueError):
    """A size, chunk schedule, or number of strips or shards is impossible for this latent."""


class LayoutError(WanVAEError):
    """A tensor does not have the memory format that an operation needs."""


class DecodeMemoryError(WanVAEError):
    """The device ran out of memory, even with the smallest schedule."""


class DecodeCancelled(WanVAEError):
    """`should_stop` returned true. What the sink received so far is incomplete."""


class BackendError(WanVAEError):
    """A requested backend or precision cannot run here, or failed its proof."""


class ShardingError(WanVAEError):
    """Ranks disagree about shape, dtype or format, or one of them failed.

    `rank` is the rank at fault, or None if it is unknown.
    """

    def __init__(self, message: str, rank: int | None = None):
        super().__init__(message)
        self.rank = rank


class OutputError(WanVAEError):
    """The output cannot be written: unknown kind of file, no encoder, unwritable folder."""


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, at most 200 characters, or the name of its type."""
    text = str(error)
    if isinstance(text, Said):
        return text  # one of ours is one line, and knows its key
    text = text.strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def named(error: BaseException) -> str:
    """What `error` is and the first line of what it says: "RuntimeError: no kernel image"."""
    kind = type(error).__name__
    return said("error.named", "{kind}: {message}", kind=kind, message=first_line(error))
