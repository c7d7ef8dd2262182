"""CUDA's runtime, as far as it page-locks memory of the host, for tests without a card."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class FakeCudart:
    """Notes what is registered, [(address, size)], and what was. refuses: with an error, which it
    keeps for the next launch of a kernel, as CUDA does; see `Launches`."""

    def __init__(self, refuses: bool = False):
        self.refuses, self.last_error, self.calls = refuses, 0, 0
        self.registered: list[tuple[int, int]] = []
        self.before: list[tuple[int, int]] = []

    def cudaHostRegister(self, address, size, flags):
        assert flags == 1
        self.calls += 1
        if self.refuses:
            self.last_error = 2
            return 2
        for start, length in self.registered:
            assert address + size <= start or start + length <= address, "registered twice"
        self.registered.append((address, size))
        return 0

    def cudaHostUnregister(self, address):
        (place,) = [place for place in self.registered if place[0] == address]
        assert is_mapped(*place), "the memory is gone"
        self.registered.remove(place)
        self.before.append(place)
        return 0


class Launches(TorchDispatchMode):
    """Inside, each operation fails as the launch of a kernel does after an error of CUDA's, which
    is then forgotten."""

    def __init__(self, cudart: FakeCudart):
        super().__init__()
        self._cudart = cudart

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        error, self._cudart.last_error = self._cudart.last_error, 0
        if error:
            raise RuntimeError("CUDA error: out of memory")
        return func(*args, **(kwargs or {}))


def is_mapped(address: int, size: int) -> bool:
    """Whether all of this memory is mapped by this process, in one piece."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        pieces = [line.split(maxsplit=1)[0].split("-") for line in maps]
    return any(int(a, 16) <= address and address + size <= int(b, 16) for a, b in pieces)
