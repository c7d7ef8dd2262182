"""Memory of a CUDA device that other processes map, through the CUDA driver: a `peer.Driver`.

The driver is called through ctypes, which gives no types: every function's arguments are spelled
out here. All of it happens in PyTorch's own context of the device: to map another device's memory
takes no context there. Only devices with atomics over their link are linked, which are those on
NVLink: over PCIe direct writes were not measured, and some machines garble them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_ubyte,
    c_uint,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)

import torch
from torch.utils.dlpack import from_dlpack

from ..errors import ShardingError
from ..said import said

_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
_FENCED = 0  # CU_STREAM_WRITE_VALUE_DEFAULT: behind a fence for the whole system
_REACHED = 0  # CU_STREAM_WAIT_VALUE_GEQ: (int)(*address - value) >= 0
# The driver cuts small allocations from blocks of this size, and maps a whole block elsewhere.
_BLOCK_BYTES = 2 << 20
_HANDLE_BYTES = 64
_ON_CUDA, _UNSIGNED = 2, 1  # kDLCUDA, kDLUInt
_CAPSULE = b"dltensor"


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = (("reserved", c_ubyte * _HANDLE_BYTES),)


class _Device(ctypes.Structure):
    """DLDevice."""

    _fields_ = (("type", c_int32), ("index", c_int32))


class _Type(ctypes.Structure):
    """DLDataType."""

    _fields_ = (("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16))


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", c_void_p),
        ("device", _Device),
        ("dimensions", c_int32),
        ("type", _Type),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("offset", c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor; with no deleter nobody is told when PyTorch lets go of it."""

    _fields_ = (("tensor", _Tensor), ("context", c_void_p), ("deleter", c_void_p))


class CudaMemory:
    """See `peer.Driver`. For the thread whose current device is `device`."""

    def __init__(self, device: torch.device):
        self._device = device
        # PyTorch's context of the device exists after this.
        torch.cuda.current_stream(device).synchronize()
        self._driver = _driver()
        current = c_int(-1)
        _check(self._driver.cuCtxGetDevice(byref(current)), "cuCtxGetDevice")
        if current.value != device.index:
            raise ShardingError(
                said(
                    "peer.context",
                    "the current context is of cuda:{current}, expected {device}",
                    current=current.value,
                    device=device,
                )
            )
        # What a tensor of PyTorch refers to.
        self._described: list[tuple[_Managed, object]] = []

    @property
    def place(self) -> int:
        """The index of the device; all ranks see the same devices in the same order."""
        return int(self._device.index)

    def can_reach(self, place: int) -> bool:
        """Whether there is NVLink from here to there."""
        has_access, has_atomics = c_int(0), c_int(0)
        driver = self._driver
        _check(
            driver.cuDeviceCanAccessPeer(byref(has_access), self.place, place),
            "cuDeviceCanAccessPeer",
        )
        if not has_access.value:
            return False
        _check(
            driver.cuDeviceGetP2PAttribute(byref(has_atomics), _NATIVE_ATOMICS, self.place, place),
            "cuDeviceGetP2PAttribute",
        )
        return bool(has_atomics.value)

    def allocate(self, size: int) -> int:
        """Whole blocks, so that a neighbour maps nothing else. Waits until they are zero."""
        address, whole = c_uint64(0), -(-size // _BLOCK_BYTES) * _BLOCK_BYTES
        _check(self._driver.cuMemAlloc_v2(byref(address), whole), f"cuMemAlloc {whole}")
        self.tensor(address.value, whole).zero_()
        self.synchronise()
        return address.value

    def free(self, address: int) -> None:
        """Waits for the device."""
        _check(self._driver.cuMemFree_v2(address), "cuMemFree")

    def export(self, address: int) -> bytes:
        """The bytes of a CUipcMemHandle."""
        handle = _Handle()
        _check(self._driver.cuIpcGetMemHandle(byref(handle), address), "cuIpcGetMemHandle")
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        """Map it for this device."""
        address, plain = c_uint64(0), _Handle.from_buffer_copy(handle)
        _check(
            self._driver.cuIpcOpenMemHandle_v2(byref(address), plain, _LAZY_PEER_ACCESS),
            "cuIpcOpenMemHandle",
        )
        return address.value

    def close(self, address: int) -> None:
        """Unmap it."""
        _check(self._driver.cuIpcCloseMemHandle(address), "cuIpcCloseMemHandle")

    def tensor(self, address: int, size: int) -> torch.Tensor:
        """By DLPack, in which the giver names the device: PyTorch would ask the driver, and refuse
        to write from here to memory of another device, unless by way of that device's context."""
        shape = (c_int64 * 1)(size)
        described = _Managed(
            _Tensor(
                address,
                _Device(_ON_CUDA, self.place),
                1,
                _Type(_UNSIGNED, 8, 1),
                shape,
                None,
                0,
            ),
            None,
            None,
        )
        self._described.append((described, shape))
        capsule = _new_capsule()(ctypes.addressof(described), _CAPSULE, None)
        tensor: torch.Tensor = from_dlpack(capsule)
        return tensor

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """By a kernel of this device, or its copy engine if both are dense."""
        target.copy_(source)

    def signal(self, address: int, value: int) -> None:
        """Behind a fence, so that whoever sees the number sees what was written before."""
        code = self._driver.cuStreamWriteValue32_v2(self._stream(), address, value, _FENCED)
        if code:
            _check(code, "cuStreamWriteValue32")

    def wait(self, address: int, value: int) -> None:
        """The stream waits, not the host."""
        code = self._driver.cuStreamWaitValue32_v2(self._stream(), address, value, _REACHED)
        if code:
            _check(code, "cuStreamWaitValue32")

    def synchronise(self) -> None:
        """Also ends with the error of an earlier kernel, as everything in CUDA does."""
        torch.cuda.current_stream(self._device).synchronize()

    def _stream(self) -> c_void_p:
        return c_void_p(torch.cuda.current_stream(self._device).cuda_stream)


@functools.cache
def _new_capsule() -> Callable[..., object]:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (c_void_p, c_char_p, c_void_p)
    return new


@functools.cache
def _driver() -> ctypes.CDLL:
    """The driver's library, with the types of the functions that are used here."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        library.cuGetErrorString.argtypes = (c_int, POINTER(c_char_p))
        library.cuCtxGetDevice.argtypes = (POINTER(c_int),)
        library.cuDeviceCanAccessPeer.argtypes = (POINTER(c_int), c_int, c_int)
        library.cuDeviceGetP2PAttribute.argtypes = (POINTER(c_int), c_int, c_int, c_int)
        library.cuMemAlloc_v2.argtypes = (POINTER(c_uint64), c_size_t)
        library.cuMemFree_v2.argtypes = (c_uint64,)
        library.cuIpcGetMemHandle.argtypes = (POINTER(_Handle), c_uint64)
        library.cuIpcOpenMemHandle_v2.argtypes = (POINTER(c_uint64), _Handle, c_uint)
        library.cuIpcCloseMemHandle.argtypes = (c_uint64,)
        for function in (library.cuStreamWriteValue32_v2, library.cuStreamWaitValue32_v2):
            function.argtypes = (c_void_p, c_uint64, c_uint32, c_uint)
    # No NVIDIA driver, or one from before CUDA 11.7.
    except (OSError, AttributeError) as error:
        raise ShardingError(
            said("peer.no_library", "the CUDA driver cannot be used here: {error}", error=error)
        ) from error
    return library


def _check(code: int, call: str) -> None:
    """Raise ShardingError if `call` of the driver, in its own words, returned an error."""
    if code:
        text = c_char_p()
        _driver().cuGetErrorString(code, byref(text))
        reason = text.value.decode() if text.value else f"error {code}"
        raise ShardingError(
            said(
                "kernel.driver",
                "the CUDA driver refuses {call}: {reason}",
                call=call,
                reason=reason,
            )
        )
