"""Devices: which one, in which dtype, how much memory is free, and what a person calls it."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch

from .errors import BackendError
from .said import expected_one_of, said
from .version import __version__

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(device: str | torch.device | None) -> torch.device:
    """`device`, or the best one of this machine; a CUDA device always with its index.

    Raises BackendError for a device that is unknown or not here.
    """
    if device is None:
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.xpu.is_available():
            device = "xpu"
        elif torch.backends.mps.is_available():
            device = "mps"
        else:
            device = "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BackendError(
            said(
                "device.unknown",
                "device {device} is unknown: expected cpu, cuda, cuda:1, xpu, mps or "
                "privateuseone:0 (DirectML)",
                device=repr(device),
            )
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendError(
                said(
                    "device.no_cuda",
                    "device {device} was asked for, but PyTorch sees no CUDA device here:"
                    " name one that is here, such as cpu",
                    device=device,
                )
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise BackendError(
                said(
                    "device.no_such_cuda",
                    "device cuda:{index} was asked for: this machine has {count} CUDA "
                    "device(s), counted from 0",
                    index=index,
                    count=torch.cuda.device_count(),
                )
            )
        device = torch.device("cuda", index)
    if device.type == "meta":
        raise BackendError(
            said("device.meta", "device meta holds no data: nothing can be decoded on it")
        )
    if device.type == "privateuseone" and has_directml():
        importlib.import_module("torch_directml")  # which makes PyTorch know the device
        return device
    module = torch.backends.mps if device.type == "mps" else getattr(torch, device.type, None)
    if device.type not in ("cpu", "cuda") and not (module and module.is_available()):
        raise BackendError(
            said(
                "device.none",
                "device {device} was asked for, but PyTorch sees none of its kind here: "
                "name one that is here, such as cpu",
                device=device,
            )
        )
    return device


def has_directml() -> bool:
    """Whether torch-directml is installed, which brings the device "privateuseone"."""
    return importlib.util.find_spec("torch_directml") is not None


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The compute dtype that `dtype` names; for "auto" see `auto_dtype`.

    Raises BackendError for any other dtype.
    """
    if dtype == "auto":
        return auto_dtype(device)[0]
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise BackendError(expected_one_of("dtype", dtype, ("auto", "fp32", "bf16", "fp16")))
    return chosen


def auto_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype that suits `device`, and why: half precision where the device has it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is None:
            return dtype_of_nvidia((properties.major, properties.minor))
        return dtype_of_amd(str(properties.gcnArchName).partition(":")[0])
    if device.type == "mps":
        return dtype_of_macos(platform.mac_ver()[0])
    if device.type == "xpu":
        return torch.bfloat16, "Intel's GPUs compute in bfloat16"
    return torch.float32, f"{device.type}: half precision brings no speed"


def dtype_of_nvidia(capability: tuple[int, int]) -> tuple[torch.dtype, str]:
    """`auto_dtype` of an NVIDIA card: cuDNN has no bfloat16 kernels below 8.0 (Ampere).

    The same as `torch.cuda.is_bf16_supported(including_emulation=False)`, whose argument older
    PyTorch does not know.
    """
    spoken = "{}.{}".format(*capability)
    if capability >= (8, 0):
        return torch.bfloat16, f"compute capability {spoken} has bfloat16"
    return torch.float16, f"compute capability {spoken} has no bfloat16, which starts with 8.0"


def dtype_of_amd(architecture: str) -> tuple[torch.dtype, str]:
    """`auto_dtype` of an AMD card: matrix products in bfloat16 start with gfx908 and gfx1100.

    PyTorch says of every AMD card that it has bfloat16.
    """
    if architecture.startswith(("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")):
        return torch.bfloat16, f"{architecture} has bfloat16"
    return torch.float16, f"{architecture} has no bfloat16"


def dtype_of_macos(release: str) -> tuple[torch.dtype, str]:
    """`auto_dtype` of an Apple GPU under the macOS `release`, such as "14.5"."""
    major = release.partition(".")[0]
    if major.isdecimal() and int(major) >= 14:
        return torch.bfloat16, f"macOS {release} has bfloat16"
    return torch.float32, f"macOS {release or 'of unknown release'} has no bfloat16, 14 has"


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype without its module: "float32"."""
    return str(dtype).removeprefix("torch.")


def free_bytes(device: torch.device, driver_free: int | None = None) -> int | None:
    """Bytes that a run may still allocate on `device`; None where nobody can say (the CPU,
    DirectML, Intel cards and Macs whose PyTorch or driver does not tell).

    On CUDA: what the driver reports, plus what PyTorch's allocator holds and can hand out again,
    within the memory fraction of the process if one was set. On a Mac: what Metal recommends as the
    most, less what this process has. On Intel's cards: as on CUDA.

    driver_free: what the driver of a CUDA device has just reported, where somebody has asked it: on
    some hosts its answer takes longer than a small decode (13 ms beside an H200).
    """
    if device.type == "mps":
        most = getattr(torch.mps, "recommended_max_memory", None)  # PyTorch 2.5
        return None if most is None else max(0, most() - torch.mps.driver_allocated_memory())
    if device.type == "xpu":
        return _xpu_free_bytes(device)
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0] if driver_free is None else driver_free
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    taken = _counted(stats, "allocated_bytes")
    if allocator_of(device) == "caching":
        # Held in pieces between tensors that are alive: the allocator cannot give them back, and a
        # large tensor does not fit into them. Segments that grow give back single pages, and CUDA's
        # own pool counts no pieces.
        taken += _counted(stats, "inactive_split_bytes")
    free += _counted(stats, "reserved_bytes") - taken
    # PyTorch before 2.8 does not say what was set.
    fraction_of = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    if fraction_of is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        free = min(free, int(fraction_of(device) * total) - taken)
    return max(0, free)


def allocated_bytes(device: torch.device) -> int:
    """Bytes of the tensors of this process on `device`, as PyTorch counts them without asking
    anybody; 0 where it does not count (the CPU, DirectML)."""
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    if device.type == "cuda":
        return _counted(torch.cuda.memory_stats_as_nested_dict(device), "allocated_bytes")
    return int(torch.xpu.memory_allocated(device)) if device.type == "xpu" else 0


def peak_bytes(device: torch.device) -> int:
    """The most bytes of tensors of this process on a CUDA `device` since the peak was reset."""
    return _counted(torch.cuda.memory_stats_as_nested_dict(device), "allocated_bytes", "peak")


def _counted(stats: Mapping[str, Any], what: str, when: str = "current") -> int:
    """A number of PyTorch's allocator; 0 before it has begun.

    As the allocator gives them: `torch.cuda.memory_allocated` and its kin give every number a name
    first, which takes 0.4 ms.
    """
    return int(stats[what]["all"][when]) if what in stats else 0


# Who hands out device memory: PyTorch's caching allocator, the same with segments that grow (its
# option expandable_segments), or CUDA's own pool, which ComfyUI switches to by default.
Allocator = Literal["caching", "expandable_segments", "cudaMallocAsync"]


def allocator_of(device: torch.device) -> Allocator:
    """The allocator of `device` in this process; "caching" for all that is no CUDA device."""
    if device.type == "cuda" and torch.cuda.get_allocator_backend() == "cudaMallocAsync":
        return "cudaMallocAsync"
    return allocator_named(os.environ) if device.type == "cuda" else "caching"


def allocator_named(environment: Mapping[str, str]) -> Allocator:
    """The allocator that PyTorch's variables in `environment` name; the newer one counts first."""
    settings = environment.get("PYTORCH_ALLOC_CONF") or environment.get("PYTORCH_CUDA_ALLOC_CONF")
    words = (settings or "").replace(" ", "").lower().split(",")
    if "backend:cudamallocasync" in words:
        return "cudaMallocAsync"
    return "expandable_segments" if "expandable_segments:true" in words else "caching"


@dataclass(frozen=True)
class Holders:
    """Who holds the memory of a device, in bytes.

    free: as the driver says. tensors: of this process, by PyTorch. cached: what PyTorch holds
    beside them. others: all the rest: other processes, and what CUDA itself has in this one.
    """

    total: int
    free: int
    tensors: int
    cached: int

    @property
    def others(self) -> int:
        return max(0, self.total - self.free - self.tensors - self.cached)


def holders(device: torch.device) -> Holders | None:
    """Who holds the memory of `device` now; None where nobody can say."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    tensors = torch.cuda.memory_allocated(device)
    return Holders(total, free, tensors, torch.cuda.memory_reserved(device) - tensors)


def has_own_memory(device: torch.device) -> bool:
    """Whether `device` has memory of its own, to which data of the host is copied."""
    return device.type not in ("cpu", "mps", "meta")


# As PyTorch aligns memory.
_ALIGNMENT = 64


def host_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty` on the CPU, in memory that NumPy allocates, which asks Linux for huge pages.

    The first write into 388 MB, by a copy from a GPU, takes 120 ms there and 250 ms in memory of
    PyTorch (the host of an NVIDIA H100, transparent huge pages by `madvise`, Linux's default).
    """
    size = prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)


def numbers_of(scalars: Collection[torch.Tensor]) -> list[float]:
    """The numbers of `scalars`, tensors of one number on one device, as float32: in one transfer,
    which waits for the device.

    Put side by side by copies: a process loads each of PyTorch's CUDA kernels when it is first
    used, which takes milliseconds, and `stack` has one of its own.
    """
    if not scalars:
        return []
    device = next(iter(scalars)).device
    with torch.no_grad():
        together = torch.empty(len(scalars), dtype=torch.float32, device=device)
        for place, scalar in zip(together.unbind(), scalars, strict=True):
            place.copy_(scalar)
        found: list[float] = together.tolist()
    return found


def host_free_bytes() -> int | None:
    """Bytes of host memory that are free, with what the system can give up at once; None where
    nobody can say."""
    if sys.platform == "win32":
        return _windows_free_bytes()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # no Linux
        return None
    found = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(words[1]) * 1024 for words in found), None)


if sys.platform == "win32":

    class _MemoryStatus(ctypes.Structure):
        """MEMORYSTATUSEX of the Windows API."""

        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            *((name, ctypes.c_uint64) for name in ("total", "free", "pages", "free_pages")),
            *((name, ctypes.c_uint64) for name in ("virtual", "free_virtual", "extended")),
        )

    def _windows_free_bytes() -> int | None:
        status = _MemoryStatus()
        status.length = ctypes.sizeof(status)
        known = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return int(status.free) if known else None


def _xpu_free_bytes(device: torch.device) -> int | None:
    info = getattr(torch.xpu, "mem_get_info", None)  # PyTorch 2.6
    if info is None:
        return None
    try:
        free, _ = info(device)
    except RuntimeError:  # a driver that does not tell
        return None
    unused = torch.xpu.memory_reserved(device) - torch.xpu.memory_allocated(device)
    return max(0, int(free) + unused)


# What a RuntimeError says if memory ran out and PyTorch has no type for it, in small letters, and
# who says so. Not among them: CUDNN_STATUS_NOT_INITIALIZED and CUDNN_STATUS_INTERNAL_ERROR, which
# have other causes too.
OUT_OF_MEMORY_TEXTS = MappingProxyType(
    {
        # PyTorch, c10/core/impl/alloc_cpu.cpp: on Linux and macOS, and on Windows.
        "defaultcpuallocator: can't allocate memory": "the CPU",
        "defaultcpuallocator: not enough memory": "the CPU on Windows",
        # C++'s own, where the library's own code asked: glibc's words, and Microsoft's.
        "std::bad_alloc": "the CPU",
        "bad allocation": "the CPU on Windows",
        # What every caching allocator that was made after CUDA's says (NPU, MLU, MUSA).
        "out of memory. tried to allocate": "any other device",
        # PyTorch, aten/src/ATen/mps/MPSAllocator.mm: at its limit, and beyond the largest buffer
        # that Metal has ("Invalid buffer size: 19.45 GB", pytorch #141909).
        "mps backend out of memory": "MPS",
        "invalid buffer size:": "MPS",
        # torch-directml ("There is not enough GPU video memory available!", DirectML #579).
        "not enough gpu video memory available": "DirectML",
        # Windows' E_OUTOFMEMORY, which its graphics drivers return.
        "0x8007000e": "DirectML",
        # The runtimes of CUDA and HIP, through c10/cuda/CUDAException.cpp, where no allocator of
        # PyTorch asked; and the allocator of IPEX and of PyTorch before 2.5 ("XPU out of memory").
        "cuda error: out of memory": "CUDA",
        "hip error: out of memory": "HIP",
        "hiperroroutofmemory": "HIP",
        # The driver, where memory grows in segments (c10/cuda/driver_api.h), and CUDA's own name.
        "cuda driver error: out of memory": "CUDA",
        "cudaerrormemoryallocation": "CUDA",
        "hip out of memory": "HIP",
        "cuda out of memory": "CUDA",
        "xpu out of memory": "XPU",
        # Workspaces of libraries. cuDNN 9 has two names beside the older one (cudnn_graph.h).
        "cublas_status_alloc_failed": "cuBLAS",
        "hipblas_status_alloc_failed": "hipBLAS",
        "cudnn_status_alloc_failed": "cuDNN",
        "cudnn_status_internal_error_device_allocation_failed": "cuDNN",
        "cudnn_status_internal_error_host_allocation_failed": "cuDNN",
        "miopenstatusallocfailed": "MIOpen",
        "rocblas_status_memory_error": "rocBLAS",
        # Level Zero through SYCL: newer and older names ("Native API returns: 39 (...)",
        # torch-xpu-ops #1598, pytorch #177714; "-5 (PI_ERROR_OUT_OF_RESOURCES)", ipex-llm #9467).
        "ur_result_error_out_of_device_memory": "XPU",
        "ur_result_error_out_of_host_memory": "XPU",
        "ur_result_error_out_of_resources": "XPU",
        "pi_error_out_of_resources": "XPU",
        "pi_error_out_of_host_memory": "XPU",
    }
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: by its type, or in the words of a platform whose
    errors are plain RuntimeErrors; see `OUT_OF_MEMORY_TEXTS`."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = str(error).lower()
    return any(text in said for text in OUT_OF_MEMORY_TEXTS)


def empty_cache(device: torch.device) -> None:
    """Give memory that PyTorch holds and does not use back to the device, where it holds any."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).empty_cache()


def device_name(device: torch.device) -> str:
    """What a person calls the device: the card's name, or CPU / MPS."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type.upper()


# The packages that bring a module `triton`, and on which systems PyTorch or people install them.
_TRITON_PACKAGES = (
    "triton",
    "pytorch-triton",
    "pytorch-triton-rocm",
    "pytorch-triton-xpu",
    "triton-windows",
    "triton-rocm",
    "triton-xpu",
)


@functools.cache
def _triton_version() -> str | None:
    return None if importlib.util.find_spec("triton") is None else triton_version(version)


def triton_version(version_of: Callable[[str], str]) -> str:
    """The version of the installed Triton, under whatever name, by `importlib.metadata.version`.

    With the name of the package where it is not "triton"; all of them if there are several, because
    nobody can say which one wrote the module last. "unknown" without metadata.
    """
    found = []
    for package in _TRITON_PACKAGES:
        with suppress(PackageNotFoundError):
            number = version_of(package)
            found.append(number if package == "triton" else f"{package} {number}")
    return ", ".join(found) or "unknown"


def versions() -> dict[str, str | None]:
    """Versions that decide which bits come out; None where a component is absent."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "wan_vae": __version__,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "triton": _triton_version(),
    }
