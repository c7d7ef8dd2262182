"""The ranks, started on first use."""

from __future__ import annotations

import pytest

from tests.dist.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Four Gloo ranks; a job may use the first 2, 3 or 4."""
    running = Ranks(tmp_path_factory.mktemp("ranks"))
    yield running
    running.close()
