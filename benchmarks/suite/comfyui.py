"""ComfyUI's core as a decoder: imported from `COMFYUI_PATH` into this process, not copied.

It is imported as a library: what its `main.py` sets up besides (allocator, dynamic VRAM) is
not part of the comparison.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite.baseline import Built
from benchmarks.suite.weights import Weights


@dataclass(frozen=True)
class BackendFlags:
    """PyTorch's process-wide switches that an import may turn and that change times."""

    cudnn_enabled: bool
    cudnn_benchmark: bool
    cudnn_tf32: bool
    matmul_tf32: bool

    @classmethod
    def read(cls) -> BackendFlags:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        return cls(cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32)

    def apply(self) -> None:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        cudnn.enabled, cudnn.benchmark = self.cudnn_enabled, self.cudnn_benchmark
        cudnn.allow_tf32, matmul.allow_tf32 = self.cudnn_tf32, self.matmul_tf32


class ComfyUICore:
    """`comfy.sd.VAE` of a checkout, built from the native state dict.

    ComfyUI turns some of PyTorch's switches when it is imported. They hold for its own decodes
    (from `build` to `close`) and for nobody else's.
    """

    name = "comfyui core"

    def __init__(self, path: str | None = None):
        """`path`: a checkout; None takes the environment's COMFYUI_PATH."""
        self._path = os.environ.get("COMFYUI_PATH") if path is None else path
        self._flags: BackendFlags | None = None
        self._failure: str | None = None

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Imports ComfyUI the first time it is asked."""
        if not self._path:
            return "COMFYUI_PATH is not set"
        if not (Path(self._path) / "comfy" / "sd.py").is_file():
            return "COMFYUI_PATH is not a ComfyUI checkout: it has no comfy/sd.py"
        # Tried once: a second import would trip over the halves of the first.
        if self._flags is None and self._failure is None:
            before = BackendFlags.read()
            try:
                _import_comfy(Path(self._path), device)
                # What was switched off for the whole comparison stays off.
                flags = BackendFlags.read()
                enabled = flags.cudnn_enabled and before.cudnn_enabled
                self._flags = replace(flags, cudnn_enabled=enabled)
            except ImportError as error:
                self._failure = f"ComfyUI cannot be imported here: {error}"
            finally:
                before.apply()
        return self._failure

    @property
    def version(self) -> str | None:
        """ComfyUI's version once it has been imported."""
        if self._flags is None:
            return None
        return str(importlib.import_module("comfyui_version").__version__)

    def load(self, weights: Weights, dtype: torch.dtype) -> tuple[Any, Callable[[], None]]:
        """ComfyUI's VAE of `weights` on its device, and what gives it back. Its switches of PyTorch
        hold until then."""
        if self._flags is None:
            raise RuntimeError("ComfyUI was not imported: ask for unavailable_reason first")
        management = importlib.import_module("comfy.model_management")
        before = BackendFlags.read()
        self._flags.apply()
        try:
            vae = importlib.import_module("comfy.sd").VAE(sd=dict(weights.native), dtype=dtype)
            if vae.first_stage_model is None:
                raise RuntimeError("ComfyUI does not take these weights for a VAE")
            management.load_models_gpu([vae.patcher], force_full_load=True)
        except BaseException:
            before.apply()
            raise

        def close() -> None:
            management.unload_all_models()
            before.apply()

        return vae, close

    def build(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> Built:
        vae, close = self.load(weights, dtype)

        def decode(z: torch.Tensor) -> torch.Tensor:
            pixels: torch.Tensor = vae.first_stage_model.decode(z.to(vae.vae_dtype))
            return pixels

        def image(z: torch.Tensor) -> torch.Tensor:
            frames: torch.Tensor = vae.decode(z)
            return frames

        return Built(decode, image, close=close)


def _import_comfy(path: Path, device: torch.device) -> None:
    """Import `comfy.sd` from `path`, with the options that its command line would have had."""
    # It must stay on the path: ComfyUI imports more of itself when it is used.
    sys.path.insert(0, str(path))
    importlib.import_module("comfy.options").enable_args_parsing()
    arguments = sys.argv
    sys.argv = ["main.py", *(["--cpu"] if device.type == "cpu" else [])]
    try:
        importlib.import_module("comfy.cli_args")
    finally:
        sys.argv = arguments
    importlib.import_module("comfy.sd")
