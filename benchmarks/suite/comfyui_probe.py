"""A node for the measured ComfyUI: what the nodes before it asked for, and what they took.

Copied into the server's custom_nodes as a pack of its own: it imports nothing of this repository.
"""

from __future__ import annotations

import inspect
import sys
import time
from types import CodeType
from typing import Any

import comfy.model_management as model_management
import torch

# `memory_required` of each call of load_models_gpu since the last look.
ASKED: list[int] = []
# A tool that nobody else uses: 0 to 2 are for debuggers, coverage and profilers.
_TOOL = 4


# Python 3.11 cannot tell of calls: there the list stays empty.
if sys.version_info >= (3, 12):

    def observe() -> None:
        """Note what load_models_gpu is asked for, as Python tells of its calls; nothing changes."""
        events = sys.monitoring

        def entered(code: CodeType, _offset: int) -> None:
            ASKED.append(int(sys._getframe(1).f_locals["memory_required"]))

        events.use_tool_id(_TOOL, "wan_vae_bench")
        events.register_callback(_TOOL, events.events.PY_START, entered)
        code = inspect.unwrap(model_management.load_models_gpu).__code__
        events.set_local_events(_TOOL, code, events.events.PY_START)

    observe()


class WanVAEBenchMemory:
    """Wants a value, so that the node before it runs, and says how it used memory.

    `asked`: bytes that ComfyUI was asked to free, call by call. `start` and `peak`: bytes that
    PyTorch's allocator held, at the look before and at most since then.
    """

    RETURN_TYPES = ()
    FUNCTION = "look"
    OUTPUT_NODE = True
    CATEGORY = "bench"

    start: int | None = None

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: object) -> bool:
        return True

    def look(self, value: object) -> dict[str, Any]:
        asked, ASKED[:] = list(ASKED), []
        found: dict[str, list[Any]] = {
            "asked": asked,
            "start": [WanVAEBenchMemory.start],
            "peak": [None],
        }
        if torch.cuda.is_available():
            found["peak"] = [torch.cuda.max_memory_allocated()]
            torch.cuda.reset_peak_memory_stats()
            WanVAEBenchMemory.start = torch.cuda.memory_allocated()
        return {"ui": found}


class WanVAEBenchSampler:
    """Keeps the device as busy as a sampler, for `seconds`, and hands the latent on.

    A step is matrix products and many small launches, and the host waits at its end. `speed`:
    steps a second.
    """

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "sample"
    OUTPUT_NODE = True
    CATEGORY = "bench"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        seconds = ("FLOAT", {"default": 20.0, "min": 0.0, "max": 600.0})
        return {"required": {"samples": ("LATENT",), "seconds": seconds}}

    def sample(self, samples: dict[str, Any], seconds: float) -> dict[str, Any]:
        device = model_management.get_torch_device()
        on_gpu = device.type == "cuda"
        side = 4096 if on_gpu else 128
        dtype = torch.bfloat16 if on_gpu else torch.float32
        x = torch.randn(side, side, device=device, dtype=dtype)
        weight = torch.randn(side, side, device=device, dtype=dtype) / side**0.5
        steps, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            for _ in range(20):
                x = x @ weight
                for _ in range(10):
                    x = x * 1.0
            float(x.flatten()[0])
            steps += 1
        return {"ui": {"speed": [steps / max(passed, 1e-9)]}, "result": (samples,)}


NODE_CLASS_MAPPINGS = {
    "WanVAEBenchMemory": WanVAEBenchMemory,
    "WanVAEBenchSampler": WanVAEBenchSampler,
}
