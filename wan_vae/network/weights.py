"""Copies weights: each number is read once, cast, looked at and written, by a few threads.

A process waits for this before its first decode, and it is memory that takes the time: the file is
read for the first time, and nobody has written to the copy's pages yet. PyTorch's own threads make
it slower: on a machine with many cores, or with busy ones, waking them for each of 194 tensors
takes longer than the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch

from ..device import host_empty, numbers_of

# Dtypes that every device has: not float64 (MPS) and not float8, which are cast where they are.
_EVERYWHERE = (torch.float32, torch.float16, torch.bfloat16)
# At most so many threads copy. One casts about 5 GB/s of what it reads and writes, and the lock of
# Python that they share takes 20 ms of the 127 million numbers of Wan 2.1.
_THREADS = 8
# Numbers that a thread copies at a time. They stay in the cache of its core, so that looking at
# them costs next to nothing; and PyTorch takes no threads of its own for fewer than 32768.
_PIECE = 32_000
_BITS_PIECE = 1 << 19
# Bytes of tensors that are cast together on a device. While a group is cast, the next one is on its
# way: two of them lie there at a time.
_GROUP_BYTES = 32 << 20


@dataclass(frozen=True)
class Copies:
    """Tensors of our own. suspects: names of those that may hold NaN or inf; a cast to float16
    makes inf of numbers that are none."""

    state: dict[str, torch.Tensor]
    suspects: tuple[str, ...] = ()


# Copies groups of tensors from the host to the memory of a device, in their order. One is on its
# way while the one before it is read, and each lives as long as its reader keeps it.
Upload = Callable[[Iterable[Mapping[str, torch.Tensor]]], Iterator[dict[str, torch.Tensor]]]


def copied(
    state: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    upload: Upload | None = None,
) -> Copies:
    """Copies of `state` on `device` in `dtype`, dense and contiguous for any strides of the source.

    They are ordinary tensors, also if the caller is in inference mode: inference tensors could not
    be moved or used outside of it. upload: to `device`, faster than PyTorch's own copy of what lies
    on the host.
    """
    with torch.inference_mode(False), torch.no_grad():
        if device.type == "cpu":
            targets = {key: host_empty(tuple(x.shape), dtype) for key, x in state.items()}
            return Copies(targets, copy_weights(state, targets))
        on_host = {key: x for key, x in state.items() if x.device.type == "cpu"}
        own = {} if upload is None else uploaded(on_host, device, dtype, upload)
        for key, value in state.items():
            if key not in own:
                own[key] = torch.empty(value.shape, dtype=dtype, device=device).copy_(
                    value if value.dtype in _EVERYWHERE else value.to(dtype)
                )
        return Copies(own, suspects_of(own))


def uploaded(
    state: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype, upload: Upload
) -> dict[str, torch.Tensor]:
    """Copies of `state`, which lies on the host, in `dtype` on `device`, to which `upload` copies.

    They are cast there: on the host that takes several times as long as the way to the device.
    Group by group, so that little memory is taken by what is not cast yet; and after memory for all
    copies, because small ones between what is given back would keep that from being used again.
    """
    plain = {key: x if x.dtype in _EVERYWHERE else x.to(dtype) for key, x in state.items()}
    own = {key: torch.empty(x.shape, dtype=dtype, device=device) for key, x in plain.items()}
    for raw in upload(_groups(plain)):
        for key in tuple(raw):
            own[key].copy_(raw.pop(key))  # whose memory the group after the next may take
    return own


def _groups(state: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """`state` in parts that end where they reach _GROUP_BYTES."""
    group, size = dict[str, torch.Tensor](), 0
    for key, value in state.items():
        group[key] = value
        size += value.nbytes
        if size >= _GROUP_BYTES:
            yield group
            group, size = {}, 0
    if group:
        yield group


def suspects_of(state: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """The names of tensors that may hold NaN or inf; those on `meta` hold nothing.

    A sum of numbers of which one is NaN or inf is neither finite, and PyTorch adds a tensor up in a
    tenth of the time that it takes to ask for each number, without memory for the answers. The sum
    of finite numbers may be inf too. One transfer a device, which waits for it.
    """
    sums: dict[torch.device, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        if not value.is_meta:
            # Float8 has no arithmetic; float64 is asked what remains of it.
            x = value if value.dtype in _EVERYWHERE else value.float()
            sums.setdefault(value.device, {})[key] = x.sum()
    return tuple(
        key
        for found in sums.values()
        for key, total in zip(found, numbers_of(found.values()), strict=True)
        if not isfinite(total)
    )


def copy_weights(
    sources: Mapping[str, torch.Tensor],
    targets: Mapping[str, torch.Tensor],
    before: Callable[[torch.Tensor], None] = lambda target: None,
) -> tuple[str, ...]:
    """Copy and cast each of `sources` to the contiguous tensor on the host of the same name.

    before: called with each target before it is written, by the thread that writes it. Returns the
    names of what may hold NaN or inf, see `suspects_of`. Raises what `before` raises.
    """

    def copy(key: str) -> bool:
        with torch.no_grad():  # a mode of each thread; a source may be a parameter
            before(targets[key])
            return _copy(sources[key], targets[key])

    # The largest first, so that the threads end together. This thread alone asks other devices.
    keys = sorted(sources, key=lambda key: sources[key].numel(), reverse=True)
    on_host = [key for key in keys if sources[key].device.type == "cpu"]
    elsewhere = [key for key in keys if sources[key].device.type != "cpu"]
    with ThreadPoolExecutor(_threads(), thread_name_prefix="wan_vae_weights") as pool:
        found = pool.map(copy, on_host)
        rest = [copy(key) for key in elsewhere]
        are_finite = dict(zip((*on_host, *elsewhere), (*found, *rest), strict=True))
    return tuple(key for key in sources if not are_finite[key])


def _threads() -> int:
    return min(_THREADS, torch.get_num_threads())


def _copy(source: torch.Tensor, target: torch.Tensor) -> bool:
    """Copy `source` to `target` piece by piece. False if something in it may be NaN or inf."""
    read, written = source.detach().resolve_neg().reshape(-1).cpu(), target.view(-1)
    usual = read.dtype == written.dtype or (read.dtype, written.dtype) == _ROUNDED
    if usual and read.dtype in _BITS:
        return _copy_bits(read, written)
    total = 0.0
    for piece, place in zip(read.split(_PIECE), written.split(_PIECE), strict=True):
        total += place.copy_(piece).sum().item()
    return isfinite(total)


# How a dtype's bits are looked at: as integers, and the largest finite number of each sign.
_BITS: dict[torch.dtype, tuple[torch.dtype, int, int]] = {
    torch.float32: (torch.int32, 0x7F7FFFFF, 0xFF7FFFFF),
    torch.bfloat16: (torch.int16, 0x7F7F, 0xFF7F),
    torch.float16: (torch.int16, 0x7BFF, 0xFBFF),
}
_ROUNDED = torch.float32, torch.bfloat16


def _copy_bits(source: torch.Tensor, target: torch.Tensor) -> bool:
    """Copy flat `source` to `target` of its dtype, or round float32 to bfloat16; False if there is
    a NaN or inf in it.

    By NumPy, in pieces of 512 Ki numbers: each call of PyTorch lets go of Python's lock, and waits
    for it then behind all other threads, so that eight of them took 400 ms for Wan 2.1.
    """
    integers, positive, negative = _BITS[source.dtype]
    read, written = source.view(integers).numpy(), target.view(_BITS[target.dtype][0]).numpy()
    unsigned = read.view(f"u{read.itemsize}")
    scratch = np.empty(min(_BITS_PIECE, read.size), unsigned.dtype)
    is_finite = True
    for start in range(0, read.size, _BITS_PIECE):
        part = slice(start, start + _BITS_PIECE)
        bits, place = unsigned[part], written[part]
        is_finite = is_finite and read[part].max() <= positive and bits.max() <= negative
        if read.itemsize == written.itemsize:
            place[...] = read[part]
            continue
        # To the nearest, of two equally near ones to the even one, as PyTorch does.
        kept = scratch[: bits.size]
        np.right_shift(bits, 16, out=kept)
        np.bitwise_and(kept, 1, out=kept)
        np.add(kept, 0x7FFF, out=kept)
        np.add(kept, bits, out=kept)
        np.right_shift(kept, 16, out=kept)
        place.view(np.uint16)[...] = kept
    return bool(is_finite)
