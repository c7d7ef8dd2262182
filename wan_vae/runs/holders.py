"""Who holds the memory that a run could not get: words for the message of its failure."""

from __future__ import annotations

import torch

from ..device import holders
from ..hooks import DeviceMemory


def who_holds(device: torch.device, memory: DeviceMemory, least_bytes: int) -> str:
    """What is free on `device`, what the run needs at least, and who holds the rest.

    Sentences that end in a semicolon and a space. Nothing where nobody can say what is free.
    """
    free = memory.free_bytes()
    if free is None:
        return ""
    text = f"{_gib(free)} GiB are free, at least {_gib(least_bytes)} are needed"
    found = holders(device)
    named = {name: size for name, size in memory.held().items() if size}
    parts = [f"{name} {_gib(size)}" for name, size in named.items()]
    if found is not None:
        # What has a name is among the tensors of this process.
        tensors = max(0, found.tensors - sum(named.values()))
        parts.append(f"{'other ' if named else ''}tensors of this process {_gib(tensors)}")
        parts.append(f"PyTorch's cache {_gib(found.cached)}")
        parts.append(f"other processes and CUDA itself {_gib(found.others)}")
        text += f"; the rest of {_gib(found.total)} GiB is held by"
    elif parts:
        text += "; the rest is held by"
    return f"{text} {', '.join(parts)}; ".replace("  ", " ").replace(" ; ", "; ")


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
