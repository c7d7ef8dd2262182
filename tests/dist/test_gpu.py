"""What only a CUDA device can show: several ranks on one card, and what NCCL does to NDHWC."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from benchmarks.suite.cases import Case
from benchmarks.suite.ranks.correct import Reference, exact_float32
from benchmarks.suite.weights import random_vae
from wan_vae.config import wan21
from wan_vae.sharding import ShardContext
from wan_vae.sharding.proof import check_wire
from wan_vae.workers import WorkerPool


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_that_share_a_card_make_the_picture_of_one_process(count, monkeypatch):
    """480p, Gloo with halos staged through the host."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    monkeypatch.setattr(
        torch.backends.cuda.matmul, "allow_tf32", torch.backends.cuda.matmul.allow_tf32
    )
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    # All of which monkeypatch puts back afterwards.
    exact_float32()
    case = Case("480p", wan21(), (1, 16, 3, 60, 104))
    reference = Reference(torch.device("cuda", 0))
    with WorkerPool(["cuda:0"] * count) as pool:
        assert pool.transport == "gloo"
        for precision in reference.precisions:
            vae = reference.vae(case.config)
            found = pool.decode(vae, case.random_latent(), precision=precision)
            passed, said = reference.judge("decode", case, precision, found)
            assert passed, f"decode {precision}: {said}"
            found = pool.encode(vae, reference.video(case), precision=precision)
            passed, said = reference.judge("encode", case, precision, found)
            assert passed, f"encode {precision}: {said}"
        assert all(answer["gather"] and answer["exchange"] for answer in pool.check_wire())


@pytest.mark.gpu
@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "12.0"])
def test_ranks_with_the_kernels_of_another_card_give_the_bits_of_one(
    capability, monkeypatch, tmp_path
):
    """On two cards by NCCL, or on one that they share; uneven parts, two chunks."""
    monkeypatch.setenv("WAN_VAE_CAPABILITY", capability)
    monkeypatch.setenv("WAN_VAE_CACHE", str(tmp_path))
    device = torch.device("cuda", 0)
    vae = random_vae(wan21(), device)
    latent = torch.randn((1, 16, 5, 17, 31), generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latent).cpu()
    alone = {(layer.name, layer.backend, layer.kernel) for layer in vae.last_report.layers}
    second = torch.device("cuda", 1) if torch.cuda.device_count() > 1 else device
    with WorkerPool([device, second]) as pool:
        for axis in ("height", "width"):
            for chunk_frames in (None, 3):
                found = pool.decode(vae, latent, axis=axis, chunk_frames=chunk_frames)
                assert torch.equal(found, expected), (axis, chunk_frames)
                layers = vae.last_report.layers
                assert {(x.name, x.backend, x.kernel) for x in layers} == alone
                assert "cuda" in {layer.backend for layer in layers}
                assert capability in vae.last_report.device_name


@pytest.fixture
def alone(tmp_path):
    """A NCCL group of this process alone."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1
    )
    yield device
    dist.destroy_process_group()


@pytest.mark.nccl
def test_nccl_garbles_an_unguarded_gather_and_not_ours(alone):
    answer = check_wire(ShardContext(0, 1), alone)
    assert answer["gather"], "the guarded gather"
    assert answer["unguarded"] == "garbled", "NCCL no longer garbles: is the guard still needed?"
