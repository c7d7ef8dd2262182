"""Compile CUDA C++ with NVRTC, keep the result on disk, launch it through the CUDA driver.

NVRTC comes with PyTorch, the driver with the card: a user needs neither a compiler nor a package.
Both are called through ctypes, which gives no types: every function's arguments are spelled out
here, and nothing outside this file touches them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_size_t,
    c_uint,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

import torch

from ...said import said
from ..cache_folder import write_whole
from ..kernel import BuildError

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_FLOAT16, _NO_INTERLEAVE, _SWIZZLE_64, _PROMOTE_L2_128, _ZERO_FILL = 6, 0, 2, 2, 0


class TensorMap(ctypes.Structure):
    """What the copy engine knows of a tensor (CUtensorMap): 128 bytes, aligned to 64."""

    _fields_ = (("bytes", ctypes.c_ubyte * 128),)


Argument = c_int | c_float | c_void_p | TensorMap


class Function:
    """One compiled kernel, loaded into the context of `device`, which is the current one.

    code: machine code, or PTX, which the driver compiles for this device.
    """

    def __init__(self, code: bytes, name: str, shared_bytes: int, device: int):
        self._module, self._function = c_void_p(), c_void_p()
        driver = _driver()
        _check(driver.cuModuleLoadData(byref(self._module), code), "cuModuleLoadData")
        _check(
            driver.cuModuleGetFunction(byref(self._function), self._module, name.encode()),
            f"cuModuleGetFunction {name}",
        )
        _check(
            driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared_bytes),
            f"cuFuncSetAttribute {name} {shared_bytes}",
        )
        self._shared, self._name, self._device = shared_bytes, name, device

    def launch(
        self, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]
    ) -> None:
        """Queue it on the device's current stream. The driver copies the arguments before it
        returns."""
        pointers = (c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        # By its number: to find the current device first takes PyTorch four times as long.
        stream = c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        code = _driver().cuLaunchKernel(
            self._function, *grid, threads, 1, 1, self._shared, stream, pointers, None
        )
        _check(code, f"cuLaunchKernel {self._name}")


def compile_source(
    source: str, defines: dict[str, int], machine_code: str, folder: Path | None
) -> bytes:
    """`source` as `machine_code` ("sm_90a"; "compute_86" is PTX), from `folder` if it was compiled
    before.

    A file in the folder starts with a digest of its content: a damaged one is compiled again.
    Safe under several processes: a file appears whole or not at all; one that cannot be written
    costs the next process the compilation.
    Raises BuildError with the compiler's first message.
    """
    options = [f"--gpu-architecture={machine_code}", "-std=c++17"]
    options += [f"-D{name}={value}" for name, value in sorted(defines.items())]
    major, minor = nvrtc_version()
    identity = "\n".join([f"nvrtc {major}.{minor}", *options, source])
    kind = "ptx" if machine_code.startswith("compute_") else "cubin"
    key = hashlib.sha256(identity.encode()).hexdigest()[:32]
    path = None if folder is None else folder / f"{key}.{kind}"
    if path is not None:
        kept = _read_kept(path)
        if kept is not None:
            return kept
    code = _compile(source, options, kind)
    if path is not None:
        _keep(path, code)
    return code


def _read_kept(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _keep(path: Path, code: bytes) -> None:
    # On a read-only or full disk it is compiled again next time, which takes seconds.
    with suppress(OSError):
        write_whole(path, hashlib.sha256(code).digest() + code)


def _compile(source: str, options: list[str], kind: str) -> bytes:
    nvrtc = _nvrtc()
    program = c_void_p()
    code = nvrtc.nvrtcCreateProgram(byref(program), source.encode(), b"wan_vae.cu", 0, None, None)
    if code:
        raise BuildError(
            said(
                "kernel.nvrtc",
                "NVRTC cannot start: {message}",
                message=nvrtc.nvrtcGetErrorString(code).decode(),
            )
        )
    try:
        flags = (c_char_p * len(options))(*(o.encode() for o in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), flags):
            size = c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            lines = [line for line in log.value.decode(errors="replace").splitlines() if line]
            raise BuildError(f"NVRTC: {lines[0][:200] if lines else '-'}")
        name = "PTX" if kind == "ptx" else "CUBIN"
        size = c_size_t()
        getattr(nvrtc, f"nvrtcGet{name}Size")(program, byref(size))
        code = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{name}")(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


@functools.lru_cache(maxsize=512)
def frames_map(
    address: int, shape: tuple[int, int, int, int], box: tuple[int, int, int]
) -> TensorMap:
    """Tensor map of float16 [N, H, W, C], dense from `address`, in boxes (rows, columns, channels).

    Outside the tensor the copy engine reads zeros. 64-byte swizzle: a box has 32 channels. Kept by
    its arguments, which are all that is in it: chunk after chunk gets the same memory.
    """
    n, h, w, c = shape
    sizes = (c_uint64 * 4)(c, w, h, n)
    strides = (c_uint64 * 3)(2 * c, 2 * c * w, 2 * c * w * h)
    rows, columns, channels = box
    boxes = (c_uint32 * 4)(channels, columns, rows, 1)
    steps = (c_uint32 * 4)(1, 1, 1, 1)
    # The driver wants 64-byte alignment, which ctypes does not promise.
    raw = (ctypes.c_ubyte * 192)()
    at = -ctypes.addressof(raw) % 64
    layout = (_NO_INTERLEAVE, _SWIZZLE_64, _PROMOTE_L2_128, _ZERO_FILL)
    code = _driver().cuTensorMapEncodeTiled(
        byref(raw, at), _FLOAT16, 4, c_void_p(address), sizes, strides, boxes, steps, *layout
    )
    _check(code, f"cuTensorMapEncodeTiled {shape}")
    return TensorMap.from_buffer_copy(raw, at)


def nvrtc_version() -> tuple[int, int]:
    """Of the library that PyTorch brought; its machine code depends on it."""
    major, minor = c_int(), c_int()
    _nvrtc().nvrtcVersion(byref(major), byref(minor))
    return major.value, minor.value


def unavailable_reason() -> str | None:
    """Why kernels cannot be compiled and launched here, or None if they can."""
    try:
        _nvrtc()
        _driver()
    except OSError as error:
        return said("kernel.no_compiler", "cannot be compiled here: {error}", error=error)
    return None


def compiler_missing() -> str | None:
    """Why nothing can be compiled here, also for another machine, and what to do; None if it can
    be."""
    try:
        _nvrtc()
    except OSError as error:
        return said(
            "kernel.no_nvrtc",
            "NVRTC, the compiler, cannot be loaded ({error}): PyTorch's CUDA builds bring it, and "
            "so does the package nvidia-cuda-nvrtc",
            error=error,
        )
    return None


def get_ready() -> None:
    """Load NVRTC and the driver's library, which takes a first launch 0.1 s."""
    unavailable_reason()


def has_tensor_maps() -> bool:
    """Whether the driver can describe a tensor to the copy engine: CUDA 12 or later.

    True without a driver: kernels may be compiled there for another machine.
    """
    try:
        return hasattr(_driver(), "cuTensorMapEncodeTiled")
    except OSError:
        return True


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC of PyTorch's CUDA version: on the loader's path, or among its wheels."""
    # Without CUDA in PyTorch (a test that only compiles) any version will do.
    major = (torch.version.cuda or "*").partition(".")[0]
    name = f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"
    site = Path(torch.__file__).resolve().parents[1]
    # On Windows in a wheel's bin/x86_64, or beside PyTorch's own libraries.
    folders = ("nvidia/*/*", "nvidia/*/*/*", "torch/lib")
    paths = sorted(path for folder in folders for path in site.glob(f"{folder}/{name}"))
    library = ctypes.CDLL(str(paths[0]) if paths else name)
    library.nvrtcGetErrorString.restype = c_char_p
    library.nvrtcCreateProgram.argtypes = (
        *(POINTER(c_void_p), c_char_p, c_char_p),
        *(c_int, c_void_p, c_void_p),
    )
    library.nvrtcCompileProgram.argtypes = (c_void_p, c_int, c_void_p)
    for get in ("nvrtcGetProgramLogSize", "nvrtcGetCUBINSize", "nvrtcGetPTXSize"):
        getattr(library, get).argtypes = (c_void_p, POINTER(c_size_t))
    for get in ("nvrtcGetProgramLog", "nvrtcGetCUBIN", "nvrtcGetPTX"):
        getattr(library, get).argtypes = (c_void_p, c_char_p)
    return library


@functools.cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    library.cuGetErrorString.argtypes = (c_int, POINTER(c_char_p))
    library.cuModuleLoadData.argtypes = (POINTER(c_void_p), c_char_p)
    library.cuModuleGetFunction.argtypes = (POINTER(c_void_p), c_void_p, c_char_p)
    library.cuFuncSetAttribute.argtypes = (c_void_p, c_int, c_int)
    library.cuLaunchKernel.argtypes = (c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p)
    return library


def _check(code: int, call: str) -> None:
    """Raise BuildError if `call` of the driver, in its own words, returned an error."""
    if code:
        text = c_char_p()
        _driver().cuGetErrorString(code, byref(text))
        reason = text.value.decode() if text.value else f"error {code}"
        raise BuildError(
            said(
                "kernel.driver",
                "the CUDA driver refuses {call}: {reason}",
                call=call,
                reason=reason,
            )
        )
