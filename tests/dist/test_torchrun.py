"""`torchrun -m wan_vae decode`: shards inside a node, a list over nodes, resumable."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import PATIENCE_S
from tests.dist import jobs
from wan_vae.io.latents import save_latent

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Three latents of the miniature and, third in the list, a file that is none."""
    folder = tmp_path_factory.mktemp("latents")
    z = jobs.model("mini").config.z_dim
    for i in range(4):
        save_latent(folder / f"{i}.latent", jobs.noise((1, z, 2, 5, 16), seed=i))
    (folder / "2.latent").write_bytes(b"not a latent")
    return [folder / f"{i}.latent" for i in range(4)]


def start(latents, output, *, ranks=2, nodes=1, node=0, port=0, more=(), before=None):
    """One torchrun; its output is read later, so that several run at once.

    `before` is called in the new process.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = port or probe.getsockname()[1]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nnodes={nodes}",
            f"--nproc-per-node={ranks}",
            f"--node-rank={node}",
            "--master-addr=127.0.0.1",
            f"--master-port={port}",
            "-m",
            "wan_vae",
            "decode",
            *map(str, latents),
            "--vae",
            str(jobs.MINI),
            "-o",
            str(output),
            "--device",
            "cpu",
            *more,
        ],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=before,
    )


def finish(process):
    text, _ = process.communicate(timeout=PATIENCE_S)
    return text


def test_one_latent_has_the_pixels_of_one_process(latents, tmp_path):
    output = tmp_path / "out.safetensors"
    text = finish(start(latents[:1], output, more=["--chunk-frames", "2"]))
    assert "node 0: 1 decoded, 0 skipped (already there), 0 failed" in text, text
    expected = jobs.model("mini").decode(jobs.noise((1, 16, 2, 5, 16)), chunk_frames=2)
    assert torch.equal(load_file(output)["pixels"], expected)


@pytest.mark.full
def test_a_list_goes_over_two_nodes_past_a_failure_and_resumes(latents, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = [start(latents, tmp_path, nodes=2, node=n, port=port) for n in range(2)]
    texts = [finish(p) for p in running]
    assert all(p.returncode != 0 for p in running[:1]), texts[0]
    assert "node 0: 1 decoded, 0 skipped (already there), 1 failed" in texts[0], texts[0]
    assert "2.latent" in texts[0] and "node 0: failed" in texts[0]
    assert "node 1: 2 decoded, 0 skipped (already there), 0 failed" in texts[1], texts[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.mp4", "1.mp4", "3.mp4"]
    # Started again with the bad file mended, and one output lost: only what is missing is done.
    save_latent(latents[2], jobs.noise((1, 16, 2, 5, 16), seed=2))
    (tmp_path / "3.mp4").unlink()
    kept = (tmp_path / "0.mp4").stat().st_mtime_ns
    text = finish(start(latents, tmp_path))
    assert "node 0: 2 decoded, 2 skipped (already there), 0 failed" in text, text
    assert (tmp_path / "0.mp4").stat().st_mtime_ns == kept
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.full
def test_an_output_that_cannot_be_written_fails_on_all_ranks_and_the_rest_goes_on(
    latents, tmp_path
):
    resource = pytest.importorskip("resource", reason="limits of a process need POSIX")
    # A limit on the size of files stands for a full disk; only the first, longer clip reaches it.
    save_latent(tmp_path / "0.latent", jobs.noise((1, 16, 12, 5, 16), seed=9))
    limit = 14_000
    text = finish(
        start(
            [tmp_path / "0.latent", latents[1]],
            tmp_path,
            before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
    )
    assert "node 0: 1 decoded, 0 skipped (already there), 1 failed" in text, text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.latent", "1.mp4"]
