"""Who holds the memory that a run could not get: words for the message of its failure."""

from __future__ import annotations

import torch

from ..device import holders
from ..hooks import DeviceMemory
from ..said import listed, said


def who_holds(device: torch.device, memory: DeviceMemory, least_bytes: int) -> str:
    """What is free on `device`, what the run needs at least, and who holds the rest.

    Sentences that end in a semicolon and a space. Nothing where nobody can say what is free.
    """
    free = memory.free_bytes()
    if free is None:
        return ""
    text = said(
        "memory.free",
        "{free} GiB are free, at least {needed} are needed",
        free=_gib(free),
        needed=_gib(least_bytes),
    )
    found = holders(device)
    named = {name: size for name, size in memory.held().items() if size}
    parts = [_part(name, size) for name, size in named.items()]
    if found is None:
        if not parts:
            return said("memory.only_free", "{free}; ", free=text)
        return said(
            "memory.rest", "{free}; the rest is held by {parts}; ", free=text, parts=listed(parts)
        )
    # What has a name is among the tensors of this process.
    tensors = max(0, found.tensors - sum(named.values()))
    if named:
        ours = said("memory.other_tensors", "other tensors of this process")
    else:
        ours = said("memory.tensors", "tensors of this process")
    parts += [
        _part(ours, tensors),
        _part(said("memory.cache", "PyTorch's cache"), found.cached),
        _part(said("memory.others", "other processes and CUDA itself"), found.others),
    ]
    return said(
        "memory.rest_of",
        "{free}; the rest of {total} GiB is held by {parts}; ",
        free=text,
        total=_gib(found.total),
        parts=listed(parts),
    )


def _part(name: str, size: float) -> str:
    return said("memory.part", "{name} {size}", name=name, size=_gib(size))


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
