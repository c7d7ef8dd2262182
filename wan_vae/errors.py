"""Typed errors. Each is one readable line: what was wrong, the value, what was expected, the cure.

A ComfyUI user reads them in a red box and a command line user on one line of stderr, so no message
spans lines, and the numbers an engineer needs are in it.
"""


class WanVAEError(Exception):
    """Base of every error that this package raises on purpose."""


class CheckpointError(WanVAEError):
    """A checkpoint cannot be read, or its tensors are missing, extra, mis-shaped or not finite."""


class NotAWanVAEError(CheckpointError):
    """The tensors are those of another model; the message names it where it is recognised."""


class LatentError(WanVAEError):
    """A latent (or a video to encode) has a wrong shape, dtype, channel count, or is not finite."""


class GeometryError(WanVAEError, ValueError):
    """A size, chunk schedule, strip or shard count is impossible for this latent."""


class LayoutError(WanVAEError):
    """A tensor is not in the memory format that an operation was promised."""


class DecodeMemoryError(WanVAEError):
    """The device is out of memory after every smaller schedule was tried."""


class DecodeCancelled(WanVAEError):
    """`should_stop` returned true; what was written to the sink so far is incomplete."""


class BackendError(WanVAEError):
    """A requested backend or precision cannot run here, or failed its proof."""


class ShardingError(WanVAEError):
    """Ranks disagree about shape, dtype or format, or one of them failed.

    `rank` is the one that is at fault, None where that is not known.
    """

    def __init__(self, message: str, rank: int | None = None):
        super().__init__(message)
        self.rank = rank


class OutputError(WanVAEError):
    """The output cannot be written: unknown kind of file, no encoder, unwritable folder."""


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, at most 200 characters, or the name of its type."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
