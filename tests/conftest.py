"""Shared helpers: small random VAEs of the real architectures, and skips that say why."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import signal
from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

if platform.machine() in ("x86_64", "AMD64"):
    # Before NumPy is imported, here and in each process that is started from here. Triton's
    # interpreter multiplies matrices by OpenBLAS, whose kernels for AVX2 add up in an order that
    # follows the size of the matrix: a row would have other bits in a shard than in the picture.
    os.environ.setdefault("OPENBLAS_CORETYPE", "Prescott")

import pytest
import torch
from hypothesis import HealthCheck, settings

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    # Triton asks when functions are decorated, its own at its first import: so now, before a test
    # imports something that imports it. What the kernels' tests need besides is in `interpreted`.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("wan_vae.kernels.triton")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("triton."):  # Triton before 3.4
            raise
    del os.environ["TRITON_INTERPRET"]

from wan_vae import WanVAE
from wan_vae.config import WanVAEConfig, wan21, wan22
from wan_vae.network.model import expected_shapes
from wan_vae.planning.passes import pass_frames

# Nothing here depends on a clock: the machine may be busy.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

# For what ends by itself: only what hangs takes so long, on the busiest machine too.
PATIENCE_S = 600.0

# Tests that share servers, browsers or processes which start slowly: with pytest-xdist, a group
# stays in one process.
GROUPS = {
    "comfy": "comfy",
    "browser": "browser",
    "registry": "registry",
    "dist/test_workers.py": "workers",
    "dist/test_equal.py": "ranks",
    "dist/test_kernels.py": "ranks",
    "dist/test_plan.py": "ranks",
    "unit/test_cli.py": "demo",
    "unit/test_demo.py": "demo",
    # Proofs of kernels in the interpreter, which take longer than what is tested with them.
    "kernels/test_triton_decode.py": "proofs of decodes",
    "kernels/test_triton_encode.py": "proofs of encodes",
    # The import of diffusers.
    "bench/test_measure.py": "diffusers",
    "bench/test_scripts.py": "diffusers",
    "parity/test_diffusers.py": "diffusers",
}


def random_state(config: WanVAEConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights that keep activations near one; gains and biases are random too."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("gamma"):
            state[name] = 1 + 0.2 * noise
        elif name.endswith("bias"):
            state[name] = 0.1 * noise
        else:
            state[name] = noise / prod(shape[1:]) ** 0.5
    return state


def pass_elements(config: WanVAEConfig, latent_shape: tuple[int, ...], frames: int) -> int:
    """Numbers that a pass may hold, so that the decoder's last stage takes `frames` at once.

    latent_shape: [B, z, T, rows, W], as for `pass_frames`; frames: an even number.
    """
    plenty = 10**12
    return frames * -(-plenty // pass_frames(config, latent_shape, plenty)[-1])


def in_pairs(*columns: Sequence[Any]) -> list[Any]:
    """All combinations, for `parametrize`.

    `make test` takes those in which each two values of different columns meet: the last column
    follows from the others, round robin.
    """
    made = []
    for values in product(*(enumerate(column) for column in columns)):
        *others, last = (index for index, _ in values)
        is_quick = last == sum(others) % len(columns[-1])
        row = (value for _, value in values)
        made.append(pytest.param(*row, marks=() if is_quick else pytest.mark.full))
    return made


SMALL_CONFIGS = {"wan2.1": wan21(dim=8), "wan2.2": wan22(dim=8, decoder_dim=16)}


@pytest.fixture(scope="module")
def interpreted():
    """Kernels may run on the CPU, in Triton's interpreter; does nothing where there is a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def quick_with(family: str) -> pytest.MarkDecorator:
    """For tests with `small_vae` of what both families share: `make test` takes one of them."""
    return pytest.mark.parametrize(
        "small_vae",
        [pytest.param(f, marks=() if f == family else pytest.mark.full) for f in SMALL_CONFIGS],
        indirect=True,
    )


@pytest.fixture(scope="session", params=SMALL_CONFIGS, ids=str)
def small_vae(request) -> WanVAE:
    """A narrow VAE of each family on the CPU in float32, with random weights."""
    return WanVAE.from_state_dict(random_state(SMALL_CONFIGS[request.param]), device="cpu")


def pytest_configure(config):
    # A job in the background (`nohup make test &`) starts with SIGINT ignored, and everything that
    # the tests start would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)  # several test processes share the cores


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of a group in one process, and give any other test to a process that is free.

    `--dist loadgroup` of xdist 3.8 finds no groups with pytest 9.2: the name it sets is not used.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid) or nodeid

    return ByGroup(config, log)


def group_of(nodeid: str) -> str | None:
    """The group of a test in GROUPS: that of its file, or of its folder."""
    place = nodeid.partition("::")[0].rpartition("tests/")[2]
    return GROUPS.get(place) or GROUPS.get(place.partition("/")[0])


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here; run `make test-gpu` on a machine with one")
    for item in items:
        if {"gpu", "nccl"} & {mark.name for mark in item.iter_markers()}:
            item.add_marker(skip)
