"""Page-locked memory: locked once, let go of once, and no error left behind where it is refused."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.unit.cudart import FakeCudart, Launches
from wan_vae.io.pages import LockedPages
from wan_vae.runs.parked import HostMemory

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


def test_pages_are_locked_until_they_are_let_go_of():
    cudart, memory = FakeCudart(), torch.zeros(1000, dtype=torch.int32)
    place = memory.data_ptr(), 4000
    locked = LockedPages(memory, CPU, cudart)
    assert locked.is_locked and cudart.registered == [place]
    del memory  # it stays as long as it is locked
    for _ in range(2):
        locked.close()
        assert not locked.is_locked and (cudart.registered, cudart.before) == ([], [place])


def test_a_refusal_is_no_error_neither_now_nor_later():
    cudart, memory = FakeCudart(refuses=True), torch.zeros(1000)
    with Launches(cudart):
        locked = LockedPages(memory, CPU, cudart)
        assert not locked.is_locked and cudart.calls == 1
        assert cudart.last_error == 0
        assert torch.ones(2).sum() == 2
        locked.close()
    assert cudart.before == []


def test_nothing_is_locked_for_other_devices_nor_where_nothing_is():
    cudart = FakeCudart()
    assert not LockedPages(torch.zeros(8), CPU).is_locked
    assert not LockedPages(torch.zeros(0), CPU, cudart).is_locked
    assert cudart.calls == 0
    memory = HostMemory(8, CPU)
    assert not memory.is_locked and memory.bytes.numel() == 8
    memory.close()
    assert memory.bytes.numel() == 0


@pytest.mark.gpu
def test_a_card_copies_from_what_is_locked_and_works_on_after_a_refusal():
    device, memory = torch.device("cuda"), torch.arange(1 << 20, dtype=torch.int32)
    for _ in range(2):
        locked = LockedPages(memory, device)
        assert locked.is_locked and memory.is_pinned()
        assert torch.equal(memory.to(device).cpu(), memory)
        # It is locked already.
        assert not LockedPages(memory, device).is_locked
        assert torch.ones(2, device=device).sum() == 2
        locked.close()
        assert not memory.is_pinned()
