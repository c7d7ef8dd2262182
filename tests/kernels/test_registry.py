"""The registry: its matrix in the README, and families that cannot be imported."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed here: pip install triton")

import wan_vae.kernels
from wan_vae.errors import BackendError
from wan_vae.kernels import registry
from wan_vae.kernels.device import CARDS, CPU, Device
from wan_vae.kernels.kernel import Family
from wan_vae.ops.problem import Operation
from wan_vae.options import BACKENDS

HALF = torch.bfloat16
README = Path(wan_vae.kernels.__file__).with_name("README.md")
_START, _END = "registry -->\n", "<!-- end of matrix -->"


def matrix() -> str:
    """Operation x family, with what each kernel requires."""
    lines = [
        f"| operation | {' | '.join(registry.FAMILIES)} |",
        "|---" * (len(registry.FAMILIES) + 1) + "|",
    ]
    for operation in get_args(Operation):
        cells = [
            "<br>".join(
                f"`{kernel.name}`: {kernel.requires.describe()}"
                for kernel in registry.kernels_of(operation, (family,))
            )
            for family in registry.FAMILIES
        ]
        lines.append(f"| {operation} | {' | '.join(cell or 'eager' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def test_the_readme_holds_the_matrix_of_the_registry():
    text = README.read_text(encoding="utf-8")
    start, end = text.index(_START) + len(_START), text.index(_END)
    assert text[start:end] == matrix()


def test_names_are_unique_and_families_are_what_they_say():
    for name in registry.FAMILIES:
        family = registry.load(name)
        assert isinstance(family, Family) and family.name == name
        names = [(kernel.operation, kernel.name) for kernel in family.kernels]
        assert len(set(names)) == len(names)
        assert {kernel.family for kernel in family.kernels} == {name}


def test_requests_are_those_of_the_options():
    assert {*registry.REQUESTS, "auto"} == set(BACKENDS)
    for families in registry.REQUESTS.values():
        assert set(families) <= set(registry.FAMILIES)
    with pytest.raises(BackendError, match="is 'tensorrt': expected one of 'auto', 'eager'"):
        registry.families_of("tensorrt", CPU)


@pytest.fixture
def forgotten():
    """Families are imported again, before and after."""
    registry._load.cache_clear()
    yield
    registry._load.cache_clear()


def test_two_threads_import_a_family_once(forgotten, monkeypatch):
    """The thread that gets a process ready, and a decode, which must not see half of a package."""
    entered, second = [], threading.Event()
    real = importlib.import_module

    def slow(name, package=None):
        entered.append(name)
        if len(entered) > 1:
            second.set()
        second.wait(0.3)  # a second thread has the time to come in
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", slow)
    with ThreadPoolExecutor(2) as pool:
        first, other = pool.map(registry.load, ["cuda", "cuda"])
    assert entered == [".cuda"] and first is other


def test_without_triton_the_other_family_stays(forgotten, monkeypatch):
    """PyTorch for Windows brings no Triton."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "triton" else real(name, *a)
    )
    monkeypatch.setattr("wan_vae.kernels.cuda.driver.unavailable_reason", lambda: None)
    for card in CARDS.values():
        reason = registry.unavailable_reason("triton", card, HALF)
        # What is not installed matters to nobody who has no card.
        assert reason == ("no GPU" if card.vendor == "cpu" else "triton is not installed")
    assert list(registry.kernels_of("norm_conv3d", ("triton",))) == []
    assert registry.unavailable_reason("cuda", CARDS["RTX 4090"], HALF) is None
    assert len(list(registry.kernels_of("norm_conv3d", ("cuda", "triton")))) == 2


@pytest.mark.parametrize(
    "error",
    [
        # Before 3.4 Triton has no tensor descriptors.
        ModuleNotFoundError("No module named 'triton.tools.tensor_descriptor'"),
        ImportError("DLL load failed while importing libtriton"),
        AttributeError("module 'triton.language' has no attribute 'make_tensor_descriptor'"),
        TypeError("jit() got an unexpected keyword argument 'noinline'"),
        OSError("libcuda.so.1: cannot open shared object file"),
        RuntimeError("0 active drivers ([]). There should only be one."),
        SyntaxError("invalid syntax (language.py, line 3)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_family_that_cannot_be_imported_is_a_reason_and_no_crash(error, forgotten, monkeypatch):
    def broken(name, package):
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    for family in registry.FAMILIES:
        reason = registry.unavailable_reason(family, CARDS["H100"], HALF)
        assert reason == f"cannot be imported: {error}"


def test_float32_is_for_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert Device.of(torch.device("cpu")) is CPU
    reason = registry.unavailable_reason("triton", CARDS["H100"], torch.float32)
    assert reason == "float32 was asked for, the kernels' operands are float16"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    interpreter = Device.of(torch.device("cpu"))
    assert registry.unavailable_reason("triton", interpreter, torch.float32) is None
    assert registry.unavailable_reason("cuda", interpreter, torch.float32) is not None


def test_devices_without_kernels():
    assert Device.of(torch.device("mps")).vendor == "apple"
    assert Device.of(torch.device("xpu")).vendor == "intel"
    assert Device.of(torch.device("hpu")).vendor == "other"
