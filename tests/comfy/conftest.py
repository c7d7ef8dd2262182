"""One ComfyUI for all tests of the session. Nothing here skips: what is missing is an error."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.comfy import graphs
from tests.comfy.provision import ComfyEnvironment, provision
from tests.comfy.server import Comfy


@pytest.fixture(scope="session")
def environment() -> ComfyEnvironment:
    return provision()


@pytest.fixture(scope="session")
def comfy(environment, tmp_path_factory):
    """A running server with random Wan VAEs and the probe nodes."""
    server = Comfy(environment, tmp_path_factory.mktemp("comfy"))
    graphs.write_vaes(server.base / "models" / "vae")
    probe = Path(__file__).with_name("probe_nodes.py")
    shutil.copyfile(probe, server.base / "custom_nodes" / "wan_vae_probe.py")
    with server:
        yield server
