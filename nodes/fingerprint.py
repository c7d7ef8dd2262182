"""A fingerprint of a VAE's weights: whether our copy is still a copy of them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch

# Samples in each row (output channel) of a weight. Wan 2.1's 127 million parameters, float32:
# 9 ms on a CPU; 8 samples a row take 14 ms.
PER_ROW = 4
# Smaller tensors (biases, gammas) are read whole.
WHOLE = 4096
# Primes: each row is sampled at other places, spread over its length.
ROW_STEP, SAMPLE_STEP = 7919, 104729
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
    digest = hashlib.blake2b(digest_size=16)
    places: dict[torch.Size, np.ndarray] = {}
    on_host: dict[str, np.ndarray] = {}
    on_device: dict[torch.device, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in sorted(state.items()):
        if tensor.is_meta:
            return None
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        bits = tensor.detach().view(_BITS[tensor.element_size()])
        at = None
        if bits.numel() > WHOLE:
            if bits.shape not in places:
                places[bits.shape] = _places(bits.shape)
            at = places[bits.shape]
        # Both count in logical order in every memory format and copy only the samples. Torch's
        # index would wake all threads for each tensor on the CPU: 30 ms and more on busy cores.
        if bits.device.type == "cpu":
            host = bits.numpy()
            on_host[name] = host if at is None else host[tuple(at)]
        else:
            on_device[bits.device][name] = _sampled(bits, at)
    for pieces in on_device.values():  # one copy a device: each waits for it
        ends = np.cumsum([piece.numel() for piece in pieces.values()])
        flat = torch.cat(list(pieces.values())).cpu().numpy()
        on_host.update(zip(pieces, np.split(flat, ends[:-1]), strict=True))
    for name in sorted(state):
        digest.update(np.ascontiguousarray(on_host[name]).data)
    return digest.digest()


def _sampled(bits: torch.Tensor, at: np.ndarray | None) -> torch.Tensor:
    """The bytes of `bits` at the places `at` (all if None), on its device.

    By an index and not by `take`, which MPS does not have.
    """
    if at is not None:
        bits = bits[tuple(torch.from_numpy(at).to(bits.device))]
    return bits.reshape(-1).view(torch.uint8)


def _places(shape: torch.Size) -> np.ndarray:
    """Where a tensor of `shape` is sampled: PER_ROW places for each row, an index a dimension."""
    rows, length = shape[0], shape.numel() // shape[0]
    row = np.arange(rows, dtype=np.int64)[:, None]
    sample = np.arange(PER_ROW, dtype=np.int64)
    flat = (row * length + (row * ROW_STEP + sample * SAMPLE_STEP) % length).reshape(-1)
    return np.stack(np.unravel_index(flat, shape))
