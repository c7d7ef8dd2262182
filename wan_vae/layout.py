"""Memory formats: detects them, decides which one a run uses, converts and checks.

Only this module asks a tensor about its strides. All others say which format they want.

Words: *NCDHW* is `contiguous`, *NDHWC* is `channels_last_3d`. A tensor is `either` if its strides
fit both (it has one channel, or one pixel as every 1x1x1 kernel has); it never needs a conversion.
A tensor that fits neither, such as a permuted or expanded view, is `other`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from .errors import LayoutError
from .libraries import Libraries
from .said import expected_one_of, said
from .walk import named_parameters

Format = Literal["contiguous", "channels_last_3d", "either", "other"]
Requested = Literal["auto", "contiguous", "channels_last_3d"]
FORMATS: tuple[Format, ...] = ("contiguous", "channels_last_3d", "either", "other")

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Dimensions as they lie in memory, innermost first: contiguous, and with channels last.
_INNERMOST_FIRST = {4: ((3, 2, 1, 0), (1, 3, 2, 0)), 5: ((4, 3, 2, 1, 0), (1, 4, 3, 2, 0))}


def detect(x: torch.Tensor) -> Format:
    """The memory format of a 4-D or 5-D tensor. Strides of size-1 dimensions are ignored.

    `is_contiguous(memory_format=...)` also looks at those strides on some paths, although they do
    not matter for the place of any element.
    """
    if x.ndim not in _CHANNELS_LAST:
        raise LayoutError(
            said(
                "layout.dimensions",
                "memory format of a {count}-D tensor: expected 4 or 5 dimensions",
                count=x.ndim,
            )
        )
    shape, strides = x.shape, x.stride()
    first, last = (_is_dense(shape, strides, order) for order in _INNERMOST_FIRST[x.ndim])
    if first and last:
        return "either"
    if first:
        return "contiguous"
    return "channels_last_3d" if last else "other"


def _is_dense(shape: Sequence[int], strides: Sequence[int], order: Iterable[int]) -> bool:
    """Whether elements are dense when dimensions are ordered as `order`, innermost first."""
    expected = 1
    for dim in order:
        size = shape[dim]
        if size != 1:
            if strides[dim] != expected:
                return False
            expected *= size
    return True


@dataclass(frozen=True)
class LayoutDecision:
    """The requested format, the chosen one, and the reason. `chosen` is never "auto".

    is_wrong: 3-D convolutions are wrong in both formats on this device, and must not be used.
    """

    requested: Requested
    chosen: Literal["contiguous", "channels_last_3d"]
    reason: str
    is_wrong: bool = False


def decide(
    requested: Requested,
    device: torch.device,
    dtype: torch.dtype,
    libraries: Libraries | None = None,
    wrong: Mapping[str, str] | None = None,
) -> LayoutDecision:
    """Choose the memory format of the convolution weights for `device` and `dtype`.

    "auto" chooses channels_last_3d where it is faster and gives right results. libraries: those of
    the device; None takes what stands behind it now. wrong: formats in which 3-D convolutions of
    this device were seen to be wrong, and how; such a one is chosen only if both are wrong, and
    then there is no 3-D convolution. Raises LayoutError for an unknown request.
    """
    libraries = Libraries.of(device) if libraries is None else libraries
    decision = _decide(requested, device, dtype, libraries)
    wrong = wrong or {}
    if decision.chosen not in wrong:
        return decision
    reason = said(
        "layout.wrong",
        "{format} conv3d is wrong on this device ({how})",
        format=decision.chosen,
        how=wrong[decision.chosen],
    )
    other: Literal["contiguous", "channels_last_3d"] = (
        "contiguous" if decision.chosen == "channels_last_3d" else "channels_last_3d"
    )
    if other not in wrong:
        return LayoutDecision(requested, other, reason)
    reason = said(
        "layout.both_wrong",
        "{reason}, and so is {other}: 3-D convolutions are not used",
        reason=reason,
        other=other,
    )
    return LayoutDecision(requested, "contiguous", reason, is_wrong=True)


def _decide(
    requested: Requested, device: torch.device, dtype: torch.dtype, libraries: Libraries
) -> LayoutDecision:
    """`decide` where no format is known to be wrong."""
    if requested not in ("auto", "contiguous", "channels_last_3d"):
        raise LayoutError(
            expected_one_of("memory_format", requested, ("auto", "contiguous", "channels_last_3d"))
        )
    if requested != "auto":
        return LayoutDecision(requested, requested, said("layout.requested", "requested"))
    if libraries.missing is not None:
        return LayoutDecision(
            requested,
            "channels_last_3d",
            said(
                "layout.stand_in",
                "{missing}: the products that stand in for it read NDHWC pixels",
                missing=libraries.missing,
            ),
        )
    if device.type == "cuda":
        if libraries.is_hip:
            return LayoutDecision(
                requested,
                "contiguous",
                said("layout.rocm", "ROCm: MIOpen repeats its search for each channels-last shape"),
            )
        if dtype in (torch.float16, torch.bfloat16):
            # NVIDIA H200, 96 -> 96 channels at 720x1280: 270 against 203 TFLOP/s; see
            # docs/performance.md for whole decodes.
            return LayoutDecision(
                requested,
                "channels_last_3d",
                said("layout.cudnn", "cuDNN's half-precision kernels are faster in NDHWC"),
            )
        return LayoutDecision(
            requested,
            "contiguous",
            said("layout.float32", "float32 on CUDA: NDHWC brings no speed"),
        )
    if device.type == "mps":
        return LayoutDecision(
            requested,
            "contiguous",
            said("layout.mps", "MPS had wrong results for NDHWC conv3d (pytorch #141471)"),
        )
    return LayoutDecision(
        requested,
        "contiguous",
        said("layout.no_gain", "{device}: no gain measured from NDHWC weights", device=device.type),
    )


def to_format(x: torch.Tensor, fmt: str) -> torch.Tensor:
    """Return `x` (4-D or 5-D) dense in `fmt` ("contiguous" or "channels_last_3d").

    Copies only if needed. The result has canonical strides, also for size-1 dimensions, so that
    ATen takes the code path of that format.
    """
    if fmt == "channels_last_3d":
        if detect(x) in ("channels_last_3d", "either"):
            return _canonical(x, _channels_last_strides(x.shape))
        return x.contiguous(memory_format=_CHANNELS_LAST[x.ndim])
    if fmt == "contiguous":
        if detect(x) in ("contiguous", "either"):
            return _canonical(x, _contiguous_strides(x.shape))
        return x.contiguous()
    raise LayoutError(
        said("layout.unknown", "cannot convert to memory format {format}", format=repr(fmt))
    )


def _canonical(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A view of `x` with canonical `strides`; only strides of size-1 dimensions can differ."""
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def _channels_last_strides(shape: torch.Size) -> tuple[int, ...]:
    n, c, *space = shape
    inner = _contiguous_strides(torch.Size((n, *space, c)))
    return (inner[0], inner[-1], *inner[1:-1])


def empty_like_format(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Allocate `shape`, uninitialised, in the memory format of `x` (NCDHW if that is a view)."""
    last = detect(x) == "channels_last_3d"
    fmt = _CHANNELS_LAST[x.ndim] if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=fmt)


def memory_order(x: torch.Tensor) -> tuple[int, ...]:
    """The dimensions of `x` in the order in which they lie in memory, outermost first."""
    strides = x.stride()
    return tuple(sorted(range(x.ndim), key=lambda dim: (-strides[dim], dim)))


@dataclass(frozen=True)
class DenseForm:
    """How a dense tensor lies in memory, whatever its format: for a copy of its bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: torch.Tensor) -> DenseForm:
        """The form of `x`. Raises LayoutError for a tensor with gaps."""
        if not _is_dense(x.shape, x.stride(), reversed(memory_order(x))):
            raise LayoutError(
                said(
                    "layout.gaps",
                    "a tensor of {shape} with strides {strides} has gaps",
                    shape=tuple(x.shape),
                    strides=x.stride(),
                )
            )
        return cls(tuple(x.shape), x.stride(), x.dtype)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """A tensor of this form in the first of the bytes `memory`."""
        return memory[: self.nbytes].view(self.dtype).as_strided(self.shape, self.strides)


class LayoutCounter:
    """Counts the format conversions and the calls with mixed formats (normally 0) of one run."""

    def __init__(self) -> None:
        self.conversions = 0
        self.mixed_calls = 0


def match_input(x: torch.Tensor, weight: torch.Tensor, counter: LayoutCounter) -> torch.Tensor:
    """Return `x` in the memory format of `weight`; called once, for the input of a convolution.

    If the format of one of them is `either`, nothing is copied.
    """
    wanted = detect(weight)
    if wanted == "other":
        raise LayoutError(
            said(
                "layout.weight",
                "a weight of shape {shape} is neither contiguous nor channels_last_3d "
                "(strides {strides}): pack the weights with pack_weights first",
                shape=tuple(weight.shape),
                strides=weight.stride(),
            )
        )
    if wanted == "either":
        if detect(x) != "other":
            return x
        counter.conversions += 1
        return x.contiguous()
    found = detect(x)
    if found not in (wanted, "either"):
        counter.conversions += 1
    return to_format(x, wanted)


def join_frames(
    parts: tuple[torch.Tensor, ...], weight: torch.Tensor, counter: LayoutCounter
) -> torch.Tensor:
    """Concatenate `parts` [B, C, T_i, H, W] along time, in the memory format of `weight`.

    The copy that joins the parts also converts them, so the conversion is free. It is counted if
    the last part (the new frames) had another format.
    """
    wanted = detect(weight)
    fmt = "channels_last_3d" if wanted == "channels_last_3d" else "contiguous"
    b, c, _, h, w = parts[-1].shape
    frames = sum(p.shape[2] for p in parts)
    out = _empty(parts[-1], (b, c, frames, h, w), fmt)
    if detect(parts[-1]) not in (fmt, "either"):
        counter.conversions += 1
    start = 0
    for part in parts:
        out[:, :, start : start + part.shape[2]] = part
        start += part.shape[2]
    return out


def frames_before(
    history: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, counter: LayoutCounter
) -> torch.Tensor:
    """`history` [B, C, past, H, W] in front of as many frames as `x` has, which are not written.

    In the memory format of `weight`, as `join_frames`: the caller computes the frames into the view
    `[:, :, past:]` of the result, and so saves the copy that joins them.
    """
    wanted = detect(weight)
    fmt = "channels_last_3d" if wanted == "channels_last_3d" else "contiguous"
    b, c, past, h, w = history.shape
    out = _empty(x, (b, c, past + x.shape[2], h, w), fmt)
    if detect(x) not in (fmt, "either"):
        counter.conversions += 1
    out[:, :, :past] = history
    return out


def _empty(like: torch.Tensor, shape: tuple[int, ...], fmt: str) -> torch.Tensor:
    last = fmt == "channels_last_3d"
    memory_format = torch.channels_last_3d if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def record_call(x: torch.Tensor, weight: torch.Tensor, counter: LayoutCounter) -> None:
    """Count a convolution as a mixed call if its input and weight have different formats."""
    if {detect(x), detect(weight)} == {"contiguous", "channels_last_3d"} or detect(x) == "other":
        counter.mixed_calls += 1


def pack_weights(module: torch.nn.Module, fmt: str) -> None:
    """Convert every 4-D and 5-D convolution weight of `module` to the format, in place.

    Gammas stay as they are. They are 4-D too, and `Module.to(memory_format=...)` fails on them.
    """
    for name, p in named_parameters(module):
        if name.endswith("weight") and p.ndim in _CHANNELS_LAST:
            p.data = to_format(p.data, fmt)


def count_formats(weights: Iterable[torch.Tensor]) -> dict[str, int]:
    """Count the 5-D convolution weights of each format. All four keys are present."""
    counts = Counter(detect(w) for w in weights if w.ndim == 5)
    return {fmt: counts.get(fmt, 0) for fmt in FORMATS}


def contiguous_for_collective(x: torch.Tensor) -> torch.Tensor:
    """Return `x` as dense NCDHW, for a collective or send that copies raw bytes.

    NCCL accepts a dense NDHWC tensor and sends its bytes in that order. The receiver reads them as
    NCDHW, and the picture is silently garbled. Every tensor that leaves this process comes through
    this function.
    """
    out = x.contiguous()
    if out.ndim in _CHANNELS_LAST and detect(out) not in ("contiguous", "either"):
        raise LayoutError(
            said(
                "layout.not_contiguous",
                "a tensor of shape {shape}, strides {strides} did not become contiguous",
                shape=tuple(x.shape),
                strides=x.stride(),
            )
        )
    return out
