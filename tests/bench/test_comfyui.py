"""ComfyUI's core as a decoder: a stand-in checkout here, a real one where COMFYUI_PATH is set."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.suite.cases import CASES
from benchmarks.suite.comfyui import BackendFlags, ComfyUICore
from benchmarks.suite.weights import Weights
from tests.bench.conftest import CPU

STAND_IN = {
    "comfy/__init__.py": "",
    "comfy/options.py": "args_parsing = False\n"
    "def enable_args_parsing():\n    global args_parsing\n    args_parsing = True\n",
    "comfy/cli_args.py": "import sys\nimport comfy.options\n"
    "assert comfy.options.args_parsing\nseen = list(sys.argv)\n",
    "comfy/model_management.py": "import torch\ntorch.backends.cudnn.benchmark = True\nlog = []\n"
    "def load_models_gpu(models, force_full_load): log.append('load')\n"
    "def unload_all_models(): log.append('unload')\n",
    "comfy/sd.py": "import comfy.model_management\n"
    "class VAE:\n"
    "    def __init__(self, sd, dtype):\n"
    "        known = 'decoder.head.2.weight' in sd\n"
    "        self.first_stage_model = self if known else None\n"
    "        self.vae_dtype, self.patcher = dtype, None\n"
    "    def decode(self, z): return z + 1\n",
    "comfyui_version.py": "__version__ = '0.0.1'\n",
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that looks like ComfyUI; what it leaves in this process is taken back."""
    for name, text in STAND_IN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before, flags = set(sys.modules), BackendFlags.read()
    yield tmp_path
    flags.apply()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("comfy", "comfyui_version"):
            del sys.modules[name]


def test_its_switches_hold_for_its_own_decodes_only(checkout):
    before, arguments = BackendFlags.read(), list(sys.argv)
    assert not before.cudnn_benchmark
    core = ComfyUICore(str(checkout))
    assert core.version is None
    assert core.unavailable_reason(CPU, torch.float32) is None
    assert BackendFlags.read() == before and sys.argv == arguments
    assert core.version == "0.0.1"
    assert sys.modules["comfy.cli_args"].seen == ["main.py", "--cpu"]

    weights = Weights.random(CASES["wan2.1-narrow"].config)
    built = core.build(weights, CPU, torch.float32)
    assert torch.backends.cudnn.benchmark
    assert torch.equal(built.decode(torch.zeros(2)), torch.ones(2))
    built.close()
    assert BackendFlags.read() == before
    assert sys.modules["comfy.model_management"].log == ["load", "unload"]


def test_weights_that_it_does_not_know_are_an_error(checkout):
    core = ComfyUICore(str(checkout))
    assert core.unavailable_reason(CPU, torch.float32) is None
    before = BackendFlags.read()
    with pytest.raises(RuntimeError, match="does not take"):
        core.build(Weights(CASES["wan2.1-narrow"].config, {}), CPU, torch.float32)
    assert BackendFlags.read() == before


def test_why_it_cannot_run(checkout, tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    assert ComfyUICore().unavailable_reason(CPU, torch.float32) == "COMFYUI_PATH is not set"
    reason = ComfyUICore(str(tmp_path / "nowhere")).unavailable_reason(CPU, torch.float32)
    assert "not a ComfyUI checkout" in reason and str(tmp_path) not in reason
    (checkout / "comfy" / "sd.py").write_text("import no_such_module_at_all\n")
    core = ComfyUICore(str(checkout))
    reason = core.unavailable_reason(CPU, torch.float32)
    assert "no_such_module_at_all" in reason
    assert core.unavailable_reason(CPU, torch.float32) == reason and core.version is None


@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no checkout")
def test_a_real_checkout_passes_the_gate(tmp_path):
    command = [
        os.environ.get("COMFYUI_PYTHON", sys.executable),
        "-m",
        "wan_vae",
        "bench",
        "--device",
        "cpu",
        "--case",
        "wan2.1-narrow",
        "--only",
        "comfyui",
        "--part",
        "decode",
        "--repeats",
        "1",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    if rows[0]["kind"] == "unavailable":
        pytest.skip(rows[0]["reason"])
    assert [row["kind"] for row in rows] == ["result", "result"], rows
    assert max(row["error"] for row in rows) < 1e-4
