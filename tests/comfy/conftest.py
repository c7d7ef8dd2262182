"""One ComfyUI for all tests of the session. Nothing here skips: what is missing is an error."""

from __future__ import annotations

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
    server.install_probe()
    with server:
        yield server
