"""A queued prompt has its kernels compiled; in a ComfyUI whose CPU imitates a card."""

from __future__ import annotations

import time

import pytest

from tests.comfy import graphs
from tests.comfy.graphs import decode, latent, load_vae
from tests.comfy.server import Comfy
from tests.conftest import PATIENCE_S

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")


def test_a_prompt_with_our_node_starts_a_process_that_ends_by_itself(environment, tmp_path):
    # The interpreter imitates a card, and compiles nothing: the process goes all its way, quickly.
    cache = tmp_path / "cache"
    server = Comfy(
        environment,
        tmp_path / "comfy",
        variables={
            "WAN_VAE_CACHE": str(cache),
            "TRITON_INTERPRET": "1",
            "WAN_VAE_CAPABILITY": "gfx1100",
        },
    )
    graphs.write_vaes(server.base / "models" / "vae")
    server.install_probe()
    with server:
        # Core's node alone wants nothing.
        prompt = decode(latent(kind="none"))
        prompt["3"]["class_type"] = "VAEDecode"
        assert server.run(prompt).error is not None
        assert not cache.exists()
        # A latent that is none: the node ends before it proves anything.
        for _ in range(2):
            run = server.run(decode(latent(kind="none"), load_vae()))
            assert "the latent is no LATENT" in run.error["exception_message"]
        deadline = time.monotonic() + PATIENCE_S
        # Videos and images of the decoder, once.
        while len(list((cache / "kernels").glob("*.done"))) < 2:
            assert time.monotonic() < deadline, server.log_text()[-3000:]
            time.sleep(0.1)
    assert len(list((cache / "kernels").iterdir())) == 2
    said = server.log_text()
    assert "on_prompt_handler" not in said and "Wan VAE:" not in said, said[-3000:]
