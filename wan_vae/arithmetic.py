"""The context in which all of the library's arithmetic runs, whatever the caller's is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_arithmetic(device: torch.device) -> Iterator[None]:
    """No gradients, and no autocast of the caller's: it would round what is promised in float32.

    Not inference mode: its tensors could not be changed in place by the caller that gets them.
    `device` is the current one: Triton launches on that, wherever the tensors are.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield
