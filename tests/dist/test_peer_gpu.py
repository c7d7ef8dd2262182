"""Rows by writes into a neighbour's memory on real cards: the bits of NCCL, and every fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.suite.weights import random_vae
from wan_vae.config import wan21, wan22
from wan_vae.errors import DecodeCancelled, ShardingError
from wan_vae.sharding.cuda_memory import CudaMemory
from wan_vae.workers import WorkerPool

pytestmark = [
    pytest.mark.nccl,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
CONFIGS = {"wan2.1": wan21(), "wan2.2": wan22()}
# Latents: of a usual video, of odd sizes along both axes, of one frame, of an image.
SHAPES = {
    "480p": ("wan2.1", (1, 16, 9, 60, 104)),
    "720p, whose messages are large": ("wan2.1", (1, 16, 21, 90, 160)),
    "odd": ("wan2.1", (1, 16, 5, 47, 83)),
    "one frame": ("wan2.1", (1, 16, 1, 60, 104)),
    "few rows": ("wan2.1", (1, 16, 3, 3, 5)),
    "two videos": ("wan2.1", (2, 16, 3, 30, 52)),
    "wan2.2": ("wan2.2", (1, 48, 9, 44, 80)),
}
# So long that a fault reaches the ranks before they are done.
LONG = (1, 16, 81, 60, 104)


def device_names() -> list[str]:
    return [f"cuda:{i}" for i in range(min(4, torch.cuda.device_count()))]


def noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vaes():
    return {name: random_vae(config, torch.device("cuda:0")) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def by_nccl():
    with WorkerPool(device_names(), transport="nccl") as pool:
        yield pool


@pytest.fixture(scope="module")
def direct():
    with WorkerPool(device_names(), timeout_s=10.0) as pool:
        answers = pool.check_wire()
        if not all(answer["direct"] for answer in answers):
            pytest.skip(f"no direct writes here: {answers[0]['reason']}")
        yield pool


def test_the_proof_passes_and_nccl_can_be_asked_for(direct, by_nccl):
    for answer in direct.check_wire():
        assert answer["gather"] and answer["exchange"] and answer["direct"]
    for answer in by_nccl.check_wire():
        assert answer["gather"] and answer["exchange"] and not answer["direct"]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("size", SHAPES)
def test_a_decode_has_the_bits_of_nccl(direct, by_nccl, vaes, size, precision):
    name, shape = SHAPES[size]
    for axis in ("height", "width"):
        options = {"axis": axis, "precision": precision}
        expected = by_nccl.decode(vaes[name], noise(shape), **options).clone()
        halos = [s.halo_bytes for s in vaes[name].last_report.shards]
        found = direct.decode(vaes[name], noise(shape), **options)
        assert torch.equal(found, expected), axis
        assert [s.halo_bytes for s in vaes[name].last_report.shards] == halos


@pytest.mark.parametrize("shape", [(1, 3, 17, 480, 832), (1, 3, 5, 376, 664), (1, 3, 1, 480, 832)])
def test_an_encode_has_the_bits_of_nccl(direct, by_nccl, vaes, shape):
    for axis in ("height", "width"):
        video = noise(shape).tanh()
        expected = by_nccl.encode(vaes["wan2.1"], video, axis=axis).clone()
        assert torch.equal(direct.encode(vaes["wan2.1"], video, axis=axis), expected), axis


def test_twenty_decodes_of_different_sizes_have_the_same_bits(direct, vaes):
    """A race would show as a difference now and then."""
    shapes = [(1, 16, 9, 60, 104), (1, 16, 5, 30, 52), (1, 16, 1, 60, 104)]
    expected = {}
    for turn in range(20):
        for shape in shapes:
            found = direct.decode(vaes["wan2.1"], noise(shape), chunk_frames=1 + turn % 3)
            before = expected.setdefault(shape, found.clone())
            assert torch.equal(found, before), f"turn {turn}, {shape}"


def test_an_image_in_frames_is_right(direct, by_nccl, vaes):
    latent = noise((1, 16, 5, 60, 104))
    expected = by_nccl.decode(vaes["wan2.1"], latent, form="image").clone()
    assert torch.equal(direct.decode(vaes["wan2.1"], latent, form="image"), expected)


@pytest.mark.parametrize("gather", ["rank0", "all"])
def test_a_gathered_picture_is_right(direct, by_nccl, vaes, gather):
    latent = noise((1, 16, 5, 60, 104))
    expected = by_nccl.decode(vaes["wan2.1"], latent).clone()
    assert torch.equal(direct.decode(vaes["wan2.1"], latent, gather=gather), expected)


def test_a_cancel_keeps_the_workers_and_their_links(direct, vaes):
    latent = noise((1, 16, 9, 60, 104))
    expected = direct.decode(vaes["wan2.1"], latent).clone()
    pids, seen = direct.pids, []
    with pytest.raises(DecodeCancelled):
        direct.decode(
            vaes["wan2.1"],
            noise(LONG),
            chunk_frames=1,
            on_progress=lambda done, *_: seen.append(done),
            should_stop=lambda: bool(seen),
        )
    assert torch.equal(direct.decode(vaes["wan2.1"], latent), expected)
    assert direct.pids == pids


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "does not answer")]
)
def test_a_rank_that_is_gone_ends_those_that_wait_for_it(direct, vaes, rank, number, said):
    """Their streams wait for its rows, and would for ever."""
    latent = noise((1, 16, 9, 60, 104))
    expected = direct.decode(vaes["wan2.1"], latent).clone()
    pids, sent = direct.pids, []

    def break_it(*_):
        if not sent:
            sent.append(True)
            os.kill(pids[rank], number)

    with pytest.raises(ShardingError, match=said) as caught:
        direct.decode(vaes["wan2.1"], noise(LONG), chunk_frames=1, on_progress=break_it)
    assert caught.value.rank == rank
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert torch.equal(direct.decode(vaes["wan2.1"], latent), expected)
    assert all(answer["direct"] for answer in direct.check_wire())


WRITER = """
import ctypes, sys
import torch
from wan_vae.sharding.cuda_memory import CudaMemory

torch.cuda.set_device(1)
memory = CudaMemory(torch.device("cuda", 1))
assert memory.can_reach(0), "no NVLink"
address = memory.open(bytes.fromhex(sys.argv[1]))
there = memory.tensor(address + 512, 1 << 20)
rows = torch.arange(1 << 20, device="cuda:1").remainder(251).to(torch.uint8)
# By a kernel, as from rows that lie apart, and as one dense copy.
memory.copy(there[: 1 << 19].view(-1, 2), rows[: 1 << 19].view(2, -1).t())
memory.copy(there[1 << 19 :], rows[1 << 19 :])
memory.signal(address, 7)
memory.synchronise()
flags, is_active = ctypes.c_uint(), ctypes.c_int(-1)
code = ctypes.CDLL("libcuda.so.1").cuDevicePrimaryCtxGetState(
    0, ctypes.byref(flags), ctypes.byref(is_active)
)
assert code == 0
memory.close(address)
print("context" if is_active.value else "no context")
"""


def test_another_process_writes_here_and_makes_no_context_on_this_card():
    """Its context would take half a gigabyte of the neighbour's memory."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    memory = CudaMemory(device)
    if not memory.can_reach(1):
        pytest.skip("no NVLink between the first two cards")
    address = memory.allocate(512 + (1 << 20))
    memory.wait(address, 7)
    whole = memory.tensor(address + 512, 1 << 20)
    found = whole.clone()  # behind the wait of the stream
    command = [sys.executable, "-c", WRITER, memory.export(address).hex()]
    folder = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:  # or the stream here waits for ever
        with torch.cuda.stream(torch.cuda.Stream(device)):
            memory.signal(address, 7)
    memory.synchronise()
    assert done.returncode == 0, done.stderr
    rows = torch.arange(1 << 20).remainder(251).to(torch.uint8)
    expected = torch.cat((rows[: 1 << 19].view(2, -1).t().reshape(-1), rows[1 << 19 :]))
    assert torch.equal(found.cpu(), expected)
    assert done.stdout.strip() == "no context"
    memory.free(address)


def test_memory_of_the_driver_as_tensors():
    """What needs no neighbour: allocate, write and read, signal and wait in one stream."""
    device = torch.device("cuda", 0)
    with torch.cuda.device(device):
        memory = CudaMemory(device)
        address = memory.allocate(1 << 20)
        whole = memory.tensor(address, 1 << 20)
        assert whole.device == device and whole.data_ptr() == address
        assert not whole.any()
        rows = noise((3, 5, 16)).to(device)
        memory.copy(whole[512 : 512 + rows.numel() * 4].view(torch.float32).view(3, 5, 16), rows)
        memory.signal(address, (1 << 32) - 2)
        memory.wait(address, (1 << 32) - 3)
        memory.signal(address, 1)
        memory.wait(address, (1 << 32) - 1)  # passed: counted modulo 2^32
        memory.synchronise()
        assert whole[:4].view(torch.int32).item() == 1
        assert torch.equal(whole[512:][: rows.numel() * 4].view(torch.float32), rows.flatten())
        assert len(memory.export(address)) == 64
        with pytest.raises(ShardingError, match="the CUDA driver refuses cuMemAlloc"):
            memory.allocate(1 << 50)
        memory.free(address)
