"""A counter of the bytes of tensors, for plans of memory to be compared with."""

from __future__ import annotations

import weakref
from math import inf

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wan_vae.layout import detect, to_format

CONVOLUTIONS = ("conv2d", "conv3d", "convolution")


class TensorCounter(TorchDispatchMode):
    """Counts the bytes of all storages made under it that are still alive, and their peak.

    Two things are as on CUDA and not as on the CPU. A convolution's result takes the memory format
    of its weight, or of its input where a 1x1x1 weight has none, as cuDNN gives it. And for NCDHW
    data it takes, for as long as it runs, what was measured for cuDNN (`peak._IMAGE_COLUMNS`).

    Convolutions give zeros: computing them would be most of the time, and no size depends on it.
    Unless `computes` says so: then they are computed, and take no memory besides. limit: bytes
    above which memory has run out, as on a device of that size.
    """

    def __init__(self, computes: bool = False, limit: float = inf):
        super().__init__()
        self.computes, self.limit = computes, limit
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):  # what was there before, such as weights
                self._seen.add(tensor.untyped_storage()._cdata)
        if self.computes or func.overloadpacket.__name__ not in CONVOLUTIONS:
            result = func(*args, **(kwargs or {}))
        else:
            x, weight = args[:2]
            result = _zeros(*args)
            deciding = x if detect(weight) == "either" else weight
            if detect(deciding) == "channels_last_3d":
                result = to_format(result, "channels_last_3d")
            elif max(weight.shape[2:]) > 1:
                one_frame = weight.ndim == 5 and weight.shape[2] == 1
                taken = x.nbytes * 9 if one_frame else x.nbytes + result.nbytes
                self._count(result)
                self.peak = max(self.peak, self.live + taken)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            n = -(-storage.nbytes() // 512) * 512
            if self.live + n > self.limit:
                raise torch.OutOfMemoryError(f"CUDA out of memory: {n} bytes (planted)")
            self._seen.add(key)
            self.live += n
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, n)

    def _free(self, key, n):
        self._seen.discard(key)
        self.live -= n


def _zeros(x, weight, bias=None, stride=1, padding=0, *_):
    """What a convolution of `x` without dilation gives, as zeros."""
    stride, padding = (
        [value] * (x.ndim - 2) if isinstance(value, int) else value for value in (stride, padding)
    )
    size = [
        (length + 2 * around - taps) // step + 1
        for length, taps, step, around in zip(
            x.shape[2:], weight.shape[2:], stride, padding, strict=True
        )
    ]
    return x.new_zeros((x.shape[0], weight.shape[0], *size))
