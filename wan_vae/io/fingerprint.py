"""A fingerprint of a VAE's weights: whether our copy is still a copy of them."""

from __future__ import annotations

import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

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
        plain = tensor.detach().resolve_conj().resolve_neg()  # else its bits are not its numbers
        bits = plain.view(_BITS[plain.element_size()])
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


class Look:
    """A state dict in host memory as it was when this was made, to see fast whether it is still so.

    Reads the samples that `fingerprint` takes by one index for all tensors of a width. A
    fingerprint of Wan 2.1 makes a view of each of 194 tensors and digests what it reads: 9 ms in
    ComfyUI on a host with an H200, which decodes an image of 256 x 256 in 8. Keeps no tensor alive:
    memory is read only where a tensor of the state dict at hand lies.
    """

    def __init__(self, lying: dict[str, tuple[Any, ...]], gathers: list[_Gather]) -> None:
        self._lying = lying
        self._gathers = [(gather, gather.read()) for gather in gathers]

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor]) -> Look | None:
        """None where a tensor does not lie in host memory, or not at a multiple of its width."""
        addresses: dict[int, list[np.ndarray]] = defaultdict(list)
        for tensor in state.values():
            on_host = _is_usual(tensor) and tensor.device.type == "cpu" and _has_bits(tensor)
            is_lazy = tensor.is_neg() or tensor.is_conj()  # its bits are not those of its numbers
            if not on_host or is_lazy or tensor.data_ptr() % tensor.element_size():
                return None
            shape, steps, width = tuple(tensor.shape), tensor.stride(), tensor.element_size()
            sampled = _places(shape) if tensor.numel() > WHOLE else np.indices(shape)
            offsets = np.tensordot(np.array(steps, np.int64), sampled, 1).reshape(-1)
            addresses[width].append(tensor.data_ptr() + offsets * width)
        lying = {name: _lying(tensor) for name, tensor in state.items()}
        return cls(lying, [_Gather(w, np.concatenate(at)) for w, at in addresses.items()])

    def is_still_true(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether the tensors of `state` lie where those of the first one lay, with the same bits
        at the sampled places."""
        return (
            all(map(_is_usual, state.values()))
            and {name: _lying(tensor) for name, tensor in state.items()} == self._lying
            and all(np.array_equal(gather.read(), kept) for gather, kept in self._gathers)
        )


_USUAL = (torch.Tensor, torch.nn.Parameter)


def _is_usual(tensor: object) -> bool:
    """Whether `tensor` is a strided one of a class that has nothing of its own to say."""
    return (
        type(tensor) in _USUAL
        and isinstance(tensor, torch.Tensor)
        and not tensor.is_nested
        and tensor.layout is torch.strided
    )


def _lying(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where the numbers of `tensor` lie, and as what. Memory that was given back lies nowhere."""
    lazy = tensor.is_neg(), tensor.is_conj()
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), lazy


class _Gather:
    """Reads the unsigned integers of `width` bytes at `addresses`, all multiples of it."""

    def __init__(self, width: int, addresses: np.ndarray) -> None:
        first = int(addresses.min()) if addresses.size else 0
        self._index = (addresses - first) // width
        # NumPy views memory by this. It ends with the last of the addresses, and what lies between
        # them is not read.
        count = int(self._index.max()) + 1 if addresses.size else 0
        self.__array_interface__ = {
            "data": (first, True),  # read-only
            "shape": (count,),
            "typestr": np.dtype(f"u{width}").str,
            "version": 3,
        }

    def read(self) -> np.ndarray:
        taken: np.ndarray = np.asarray(self).take(self._index)
        return taken


@functools.lru_cache(maxsize=256)
def _described(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {dtype}"


def _has_bits(tensor: object) -> bool:
    """Whether `tensor` is a dense one with data, of numbers that `_BITS` knows."""
    return (
        isinstance(tensor, torch.Tensor)
        and missing_data(tensor) is None
        and tensor.element_size() in _BITS
    )


def is_elsewhere(state: Mapping[str, object]) -> bool:
    """Whether numbers of `state` are not in memory now: on "meta", or in memory that was given
    back. They may come back."""
    tensors = (tensor for tensor in state.values() if isinstance(tensor, torch.Tensor))
    return any(missing_data(tensor) in ("meta", "fake", "freed") for tensor in tensors)


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
