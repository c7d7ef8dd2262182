"""Small cases, and decoders that are wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.suite.baseline import Built
from benchmarks.suite.decoders import Ours
from benchmarks.suite.weights import Weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Decodes of 64 x 64 pixels lose more to waiting threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Altered:
    """Our eager decoder under another name, its device pixels passed through `alter`."""

    def __init__(self, name: str, alter: Callable[[torch.Tensor], torch.Tensor]):
        self.name, self._alter, self.closed = name, alter, False

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def build(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> Built:
        built = Ours("eager").build(weights, device, dtype)
        return Built(lambda z: self._alter(built.decode(z)), built.image, close=self._close)

    def _close(self) -> None:
        self.closed = True
