"""What the kernels' tests share: verdicts of their own, and outputs that are poisoned."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def own_proofs(tmp_path_factory, interpreted):
    """The tests' own verdicts, none of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WAN_VAE_CACHE", str(tmp_path_factory.mktemp("proofs")))
        yield


@pytest.fixture
def poisoned_outputs():
    """Deterministic mode fills every `torch.empty` with NaN."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)
