"""The context in which all arithmetic of the library runs, independent of the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def own_arithmetic(device: torch.device) -> Iterator[None]:
    """Run without gradients, without the caller's autocast, and with `device` as current device.

    Autocast would round results that are promised in float32. Inference mode is not used, because
    the caller could not change its tensors in place. Triton launches on the current device, also
    if the tensors are on another one.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield
