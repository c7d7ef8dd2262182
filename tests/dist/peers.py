"""Devices that are not there: drivers for `wan_vae.sharding.peer`, with memory of the host."""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from wan_vae.errors import ShardingError
from wan_vae.sharding.peer import Link, Side


class Deadlock(Exception):
    """Every stream that has work waits for a number that nobody will write."""


class Machine:
    """Devices of one process: `run` does the queued work of their streams in any possible order."""

    def __init__(self) -> None:
        self.memory: dict[int, torch.Tensor] = {}
        # Steps that say whether they could be done.
        self.streams: list[deque[Callable[[], bool]]] = []
        self._next = 1 << 20

    def device(self) -> QueuedDriver:
        self.streams.append(deque())
        return QueuedDriver(self, self.streams[-1])

    def allocate(self, size: int) -> int:
        address, self._next = self._next, self._next + size + 4096
        self.memory[address] = torch.zeros(size, dtype=torch.uint8)
        return address

    def tensor(self, address: int, size: int) -> torch.Tensor:
        start = max(begin for begin in self.memory if begin <= address)
        return self.memory[start][address - start :][:size]

    def run(self, random: Random) -> None:
        while busy := [stream for stream in self.streams if stream]:
            random.shuffle(busy)
            for stream in busy:
                if stream[0]():
                    stream.popleft()
                    break
            else:
                raise Deadlock


class QueuedDriver:
    """One device of a `Machine`; only what exchanges need."""

    def __init__(self, machine: Machine, stream: deque[Callable[[], bool]]):
        self.machine, self.stream = machine, stream

    def do(self, step: Callable[[], object]) -> None:
        """Queue a kernel."""

        def whole() -> bool:
            step()
            return True

        self.stream.append(whole)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """In two steps: others may see a half."""
        half = target.shape[-1] // 2
        self.do(lambda: target[..., :half].copy_(source[..., :half]))
        self.do(lambda: target[..., half:].copy_(source[..., half:]))

    def signal(self, address: int, value: int) -> None:
        word = self.machine.tensor(address, 4).view(torch.int32)
        self.do(lambda: word.fill_(signed(value)))

    def wait(self, address: int, value: int) -> None:
        word = self.machine.tensor(address, 4).view(torch.int32)
        self.stream.append(lambda: signed(word.item() - value) >= 0)


def signed(value: int) -> int:
    """The 32-bit number with the low bits of `value`."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def slots_of(machine: Machine, count: int, size: int) -> tuple[torch.Tensor, ...]:
    return tuple(machine.tensor(machine.allocate(size), size) for _ in range(count))


def linked(
    machine: Machine,
    one: QueuedDriver,
    other: QueuedDriver,
    size: int,
    slots: int,
    kind: type[Link] = Link,
) -> tuple[Link, Link]:
    """Both ends of a link between two devices."""
    first = Side(machine.allocate(64), slots_of(machine, slots, size))
    second = Side(machine.allocate(64), slots_of(machine, slots, size))
    return kind(one, first, second), kind(other, second, first)


class HostDriver:
    """Memory of the host in files of `folder` that all ranks map. Work is done at once.

    fault: what goes wrong on this rank: "driver", "allocate", "reach", "open", "garbled" (writes do
    not reach the other side), or "swapped" (those that are queued without a pause do not keep
    their order: a flag is written before the rows).
    allocations: how many are possible.
    """

    place = 0

    def __init__(self, folder: str, rank: int, fault: str = "", allocations: int = 1000):
        self.folder, self.rank, self.fault = Path(folder), rank, fault
        self.left = allocations
        self.mapped: dict[int, torch.Tensor] = {}
        self.paths: dict[int, Path] = {}
        self.held: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.signals = 0
        self._fail("driver")

    def _fail(self, where: str) -> None:
        if self.fault == where:
            raise ShardingError(f"planted: {where}")

    def can_reach(self, place: int) -> bool:
        return self.fault != "reach"

    def _map(self, path: Path, shared: bool) -> int:
        with path.open("r+b") as file:
            flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
            raw = mmap.mmap(file.fileno(), 0, flags=flags)
        whole = torch.frombuffer(raw, dtype=torch.uint8)
        address = whole.data_ptr()
        self.mapped[address], self.paths[address] = whole, path
        return address

    def allocate(self, size: int) -> int:
        self._fail("allocate")
        if not self.left:
            raise ShardingError("planted: no memory")
        self.left -= 1
        path = self.folder / f"{self.rank}-{len(self.paths)}"
        with path.open("wb") as file:
            file.truncate(size)
        return self._map(path, shared=True)

    def free(self, address: int) -> None:
        self.mapped.pop(address)
        self.paths[address].unlink()

    def export(self, address: int) -> bytes:
        return self.paths[address].name.encode().ljust(64, b"\0")

    def open(self, handle: bytes) -> int:
        self._fail("open")
        name = handle.rstrip(b"\0").decode()
        return self._map(self.folder / name, shared=self.fault != "garbled")

    def close(self, address: int) -> None:
        self.mapped.pop(address)

    def tensor(self, address: int, size: int) -> torch.Tensor:
        for start, whole in self.mapped.items():
            if start <= address < start + whole.numel():
                return whole[address - start :][:size]
        raise AssertionError("not mapped")

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self.fault == "swapped" and self.signals > 1:
            self.held.append((target, source.clone()))
        else:
            target.copy_(source)

    def signal(self, address: int, value: int) -> None:
        self.tensor(address, 4).view(torch.int32).fill_(signed(value))
        self.signals += 1

    def wait(self, address: int, value: int) -> None:
        word = self.tensor(address, 4).view(torch.int32)
        while signed(word.item() - value) < 0:
            os.sched_yield()
        self._write_held()

    def _write_held(self) -> None:
        for target, source in self.held:
            target.copy_(source)
        self.held.clear()

    def synchronise(self) -> None:
        self._write_held()
