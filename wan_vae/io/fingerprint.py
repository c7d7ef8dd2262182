"""A fingerprint of a VAE's weights: whether our copy is still a copy of them."""

from __future__ import annotations

import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch

from .tensors import missing_data

# Samples in each row (output channel) of a weight. They lie side by side, so that a row is one wait
# for memory: reading those of Wan 2.1 (127 million parameters, float32, on a CPU) took 1.7 ms, and
# 2.7 ms where they were spread over the row.
PER_ROW = 4
# Smaller tensors (biases, gammas) are read whole.
WHOLE = 4096
# A prime: each row is sampled at another place.
ROW_STEP = 7919
# Bits are read as integers: NaN equals itself, and NumPy knows no bfloat16.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(state: Mapping[str, torch.Tensor]) -> bytes | None:
    """Digest of names, shapes, dtypes and sampled bits of `state`; None where bits are not there.

    Every output channel of every tensor is sampled, so a merge, a factor or a replaced channel
    changes it; an edit of a few numbers of a large tensor can be missed. Memory format and device
    do not count: ComfyUI moves weights without changing them. Pointers and version counters would
    not do: moving changes the former, and tensors made in inference mode, in which ComfyUI runs
    its nodes, have none of the latter.
    """
    described: list[str] = []
    on_host: dict[str, np.ndarray] = {}
    on_device: dict[torch.device, dict[str, torch.Tensor]] = defaultdict(dict)
    names = sorted(state)
    for name in names:
        tensor = state[name]
        # What has no bits to look at, and what is no tensor, is refused where it is copied.
        if not _has_bits(tensor):
            return None
        described.append(f"{name} {_described(tensor.shape, tensor.dtype)};")
        bits = tensor.detach().view(_BITS[tensor.element_size()])
        is_large = bits.numel() > WHOLE
        # Both count in logical order in every memory format and copy only the samples. Torch's
        # index would wake all threads for each tensor on the CPU: 30 ms and more on busy cores.
        if bits.device.type == "cpu":
            on_host[name] = _taken(bits) if is_large else bits.numpy()
        else:
            on_device[bits.device][name] = _sampled(
                bits, _places_on(tuple(bits.shape), bits.device) if is_large else None
            )
    for pieces in on_device.values():  # one copy a device: each waits for it
        ends = np.cumsum([piece.numel() for piece in pieces.values()])
        flat = torch.cat(list(pieces.values())).cpu().numpy()
        on_host.update(zip(pieces, np.split(flat, ends[:-1]), strict=True))
    digest = hashlib.blake2b("".join(described).encode(), digest_size=16)
    digest.update(b"".join([on_host[name].tobytes() for name in names]))
    return digest.digest()


@functools.lru_cache(maxsize=256)
def _described(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {dtype}"


def _has_bits(tensor: object) -> bool:
    """Whether `tensor` is a dense one with data, of numbers that `_BITS` knows."""
    return (
        isinstance(tensor, torch.Tensor)
        and missing_data(tensor) is None
        and tensor.element_size() in _BITS
        and not (tensor.is_conj() or tensor.is_neg())  # its bits are not those of its numbers
    )


def _sampled(bits: torch.Tensor, at: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
    """The bytes of `bits` at the places `at` (all if None), on its device.

    By an index and not by `take`, which MPS does not have.
    """
    if at is not None:
        bits = bits[at]
    return bits.reshape(-1).view(torch.uint8)


def _taken(bits: torch.Tensor) -> np.ndarray:
    """What lies at the places of `bits`, on the CPU.

    By one index into its memory, of which NumPy is four times as fast as by an index a dimension.
    """
    offsets, length = _offsets(tuple(bits.shape), bits.stride())
    memory: np.ndarray = bits.as_strided((length,), (1,)).numpy()
    return memory.take(offsets)


@functools.lru_cache(maxsize=256)
def _offsets(shape: tuple[int, ...], steps: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """The places of `shape` as numbers from its first one on, and how many numbers it spans."""
    offsets = np.einsum("ij,i->j", _places(shape), np.array(steps, dtype=np.int64))
    offsets.setflags(write=False)
    return offsets, 1 + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))


@functools.lru_cache(maxsize=256)
def _places_on(shape: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """`_places` on `device`, where they stay: 3 MB for Wan 2.1. Each copy there would be waited
    for, in every run."""
    return tuple(torch.tensor(_places(shape), device=device))


@functools.lru_cache(maxsize=256)
def _places(shape: tuple[int, ...]) -> np.ndarray:
    """Where a tensor of `shape` is sampled: PER_ROW places for each row, an index a dimension."""
    rows, length = shape[0], math.prod(shape[1:])
    row = np.arange(rows, dtype=np.int64)[:, None]
    sample = np.arange(PER_ROW, dtype=np.int64)
    flat = (row * length + (row * ROW_STEP + sample) % length).reshape(-1)
    places = np.stack(np.unravel_index(flat, shape))
    places.setflags(write=False)
    return places
