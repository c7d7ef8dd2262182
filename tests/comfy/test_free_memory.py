"""What is believed of the free memory that ComfyUI reports."""

import math

import pytest
import torch

from nodes.free_memory import believed_free_bytes
from wan_vae.config import wan21
from wan_vae.planning.choose import PlanRequest, choose

GIB = 1 << 30


@pytest.mark.parametrize(
    ("device", "told", "believed"),
    [
        ("cuda:0", 5.5 * GIB, 5.5 * GIB),
        ("mps", -1, 0),
        ("cpu", 0, 0),
        ("privateuseone:0", GIB, math.inf),
    ],
)
def test_all_but_directml_are_believed(device, told, believed):
    assert believed_free_bytes(torch.device(device), told) == believed


def test_a_gigabyte_that_nobody_measured_would_be_strips():
    """The reason for not believing it: 720p in float32."""
    latent = (1, 16, 21, 90, 160)
    told = choose(PlanRequest(wan21(), latent, torch.float32, free_bytes=GIB))
    free = choose(PlanRequest(wan21(), latent, torch.float32, free_bytes=None))
    assert told.strips > 30 and free.strips == 1
