"""`import wan_vae` and a decode on one device need torch, numpy and safetensors, nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# Runs before anything is imported in a Python of its own: no finder finds what is in `MISSING`.
# A torch that was built without distributed still has a module `torch.distributed`, which holds
# `is_available()` and little more. It looks for functions of torch's C part, so these are taken
# away when torch, half imported, asks for the module.
PRELUDE = """
import sys

class All:
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name == "torch.distributed" and name in MISSING:
            for function in ("_c10d_init", "_rpc_init", "_dist_autograd_init"):
                delattr(sys.modules["torch._C"], function)
        elif name.partition(".")[0] in MISSING:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)

sys.meta_path[:] = [All(list(sys.meta_path))]
"""

DECODE = """
import torch
import wan_vae
from wan_vae.config import wan21
from wan_vae.network.model import expected_shapes

shapes = expected_shapes(wan21(dim=8))
vae = wan_vae.WanVAE.from_state_dict(
    {name: torch.full(shape, 0.01) for name, shape in shapes.items()}, device="cpu"
)
latent = torch.zeros(1, 16, 2, 3, 4)
pixels = vae.decode(latent)
assert pixels.shape == (1, 3, 5, 24, 32), pixels.shape
assert vae.encode(pixels).shape == latent.shape
assert len(list(vae.decode_stream(latent))) >= 1
print("decoded with", vae.last_report.backends_used)
"""

LOOK = """
import torch
assert not torch.distributed.is_available()
assert not hasattr(torch.distributed, "all_reduce")
for name in ("torch.distributed.distributed_c10d", *MISSING[1:]):
    try:
        __import__(name)
    except ImportError:
        print(name)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )


PACKAGES = ["triton", "comfy_kitchen", "av", "PIL", "tqdm"]


# All at once; `make test-all` also takes one without the other.
@pytest.mark.parametrize(
    "missing",
    [
        ["torch.distributed", *PACKAGES],
        pytest.param(["torch.distributed"], marks=pytest.mark.full),
        pytest.param(PACKAGES, marks=pytest.mark.full),
    ],
    ids=lambda names: "-".join(names),
)
def test_a_decode_needs_none_of(missing):
    done = python(f"MISSING = {missing!r}\n{PRELUDE}{DECODE}")
    assert done.returncode == 0, done.stderr
    assert "decoded with" in done.stdout


def test_a_package_that_is_missing_here_is_missing_there():
    """The test above would pass if its finder did nothing."""
    names = ["torch.distributed", "triton", "av", "PIL", "tqdm"]
    done = python(f"MISSING = {names!r}\n{PRELUDE}{LOOK}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch.distributed.distributed_c10d", *names[1:]]
