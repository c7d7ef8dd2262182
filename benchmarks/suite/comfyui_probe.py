"""A node for the measured ComfyUI: what the nodes before it asked for, and what they took.

Copied into the server's custom_nodes as a pack of its own: it imports nothing of this repository.
"""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
import time
import zlib
from types import CodeType
from typing import Any, ClassVar

import comfy.model_management as model_management
import comfy.model_patcher
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

    `digest`: of the bytes of an image or a latent. `asked`: bytes that ComfyUI was asked to free,
    call by call. `start` and `peak`: bytes that PyTorch's allocator held, at the look before and at
    most since then.
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
        if isinstance(value, dict) and isinstance(value.get("samples"), torch.Tensor):
            value = value["samples"]
        if isinstance(value, torch.Tensor):
            found["digest"] = [zlib.crc32(value.contiguous().cpu().float().numpy().data)]
        if torch.cuda.is_available():
            found["peak"] = [torch.cuda.max_memory_allocated()]
            torch.cuda.reset_peak_memory_stats()
            WanVAEBenchMemory.start = torch.cuda.memory_allocated()
        return {"ui": found}


class _Fault:
    """A node that leaves ComfyUI in a state from which others have to work.

    `salt` is new each time, so that the cache does not answer.
    """

    RETURN_TYPES = ()
    FUNCTION = "fail"
    OUTPUT_NODE = True
    CATEGORY = "bench"

    # What a fault keeps, until `WanVAEBenchRelease`.
    kept: ClassVar[list[Any]] = []

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        gib = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1000.0})
        return {"required": {"gib": gib, "salt": ("INT", {"default": 0, "max": 1 << 30})}}


class WanVAEBenchRunOut(_Fault):
    """Takes `gib` GiB, runs out of memory, and has somebody keep the error and its traceback."""

    def fail(self, gib: float, salt: int) -> dict[str, Any]:
        held = torch.empty(int(gib * 2**30), dtype=torch.uint8, device="cuda")
        try:
            more = torch.empty(1 << 46, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            _Fault.kept.append(error)
            raise
        return {"ui": {"held": [held.numel() + more.numel()]}}


class WanVAEBenchModel(_Fault):
    """Loads a stand-in of a sampler's model of `gib` GiB through ComfyUI's model management."""

    def fail(self, gib: float, salt: int) -> dict[str, Any]:
        device, offload = model_management.get_torch_device(), torch.device("cpu")
        model = torch.nn.Module()
        # In parts, as a model is: ComfyUI moves them one by one.
        for i in range(16):
            part = torch.zeros(int(gib * 2**30) // 32, dtype=torch.bfloat16)
            layer = torch.nn.Module()
            layer.weight = torch.nn.Parameter(part, requires_grad=False)
            model.add_module(f"part{i}", layer)
        patcher = comfy.model_patcher.ModelPatcher(model, device, offload)
        _Fault.kept.append(patcher)
        model_management.load_models_gpu([patcher], force_full_load=True)
        return {"ui": {"loaded": [patcher.loaded_size()]}}


class WanVAEBenchTaker(_Fault):
    """Another process takes all but `gib` GiB as soon as the next run of ours has made its plan.

    It starts when `Run.begin` has returned for the next time, which is replaced until then.
    """

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        types = super().INPUT_TYPES()
        return {"required": {**types["required"], "script": ("STRING", {})}}

    def fail(self, gib: float, salt: int, script: str) -> dict[str, Any]:
        run = next(
            module.Run
            for name, module in list(sys.modules.items())
            if name.endswith(".wan_vae.runs.run")
        )
        begin = run.begin

        def begin_and_take(*arguments: Any, **options: Any) -> None:
            run.begin = begin
            begin(*arguments, **options)
            process = subprocess.Popen(
                [sys.executable, script, str(gib)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert process.stdout is not None
            process.stdout.readline()  # it holds what it should
            _Fault.kept.append(process)

        run.begin = begin_and_take
        return {"ui": {"armed": [1]}}


class WanVAEBenchRelease(_Fault):
    """Ends what the faults keep."""

    def fail(self, gib: float, salt: int) -> dict[str, Any]:
        for kept in _Fault.kept:
            if isinstance(kept, subprocess.Popen):
                kept.communicate()
        _Fault.kept.clear()
        gc.collect()
        model_management.soft_empty_cache()
        return {"ui": {"released": [1]}}


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
    node.__name__: node
    for node in (
        WanVAEBenchMemory,
        WanVAEBenchSampler,
        WanVAEBenchRunOut,
        WanVAEBenchModel,
        WanVAEBenchTaker,
        WanVAEBenchRelease,
    )
}
