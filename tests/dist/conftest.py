"""The ranks, started on first use."""

from __future__ import annotations

import pytest
import torch

from tests.dist.ranks import Ranks


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """One thread here too, as the ranks have: the CPU's kernels sum in another order with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Four Gloo ranks; a job may use the first 2, 3 or 4."""
    running = Ranks(tmp_path_factory.mktemp("ranks"))
    yield running
    running.close()
