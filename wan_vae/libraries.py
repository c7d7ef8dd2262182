"""What PyTorch has behind convolutions and attention: read once for a run, passed on as a value.

A 3-D convolution without a library behind it unfolds its input in memory: on CUDA and ROCm without
cuDNN and MIOpen it holds every input number once for each tap, 27 times for a 3x3x3 kernel, of all
frames at once. Source: `slow_conv_dilated3d` in ATen's NaiveDilatedConvolution.cu.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from .said import said

# The cuDNN releases for which PyTorch 2.9 and 2.10 skip cuDNN in half-precision 3-D convolutions,
# from the first one on and up to the last one not included. The fault behind it (pytorch #163539)
# concerns inputs of about 2^31 numbers; a pass of a decode holds at most a fifth of that.
_SKIPPED_CUDNN = (90800, 91500)
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Libraries:
    """The libraries for the operations of one device.

    torch_version: such as (2, 9, 1). cudnn: cuDNN's, such as 91002; None without it, and
    on ROCm, where MIOpen stands in its place. enabled: `torch.backends.cudnn.enabled`, which is
    MIOpen's switch too, and on the CPU oneDNN's. deterministic: that of `torch.backends.cudnn`.
    capability: NVIDIA's compute capability. efficient_attention: whether PyTorch may take its
    memory-efficient attention.
    """

    device_type: str
    is_hip: bool = False
    torch_version: tuple[int, int, int] = (0, 0, 0)
    cudnn: int | None = None
    enabled: bool = True
    deterministic: bool = False
    capability: tuple[int, int] | None = None
    efficient_attention: bool = True

    @classmethod
    def of(cls, device: torch.device) -> Libraries:
        """What stands behind the operations of `device` now."""
        backends, is_hip = torch.backends, torch.version.hip is not None
        version = version_numbers(str(torch.__version__))
        if device.type == "cpu":
            enabled = backends.mkldnn.is_available() and bool(backends.mkldnn.enabled)
            return cls("cpu", torch_version=version, enabled=enabled)
        if device.type != "cuda":
            return cls(device.type, torch_version=version)
        has_cudnn = not is_hip and backends.cudnn.is_available()
        return cls(
            "cuda",
            is_hip,
            version,
            backends.cudnn.version() if has_cudnn else None,
            backends.cudnn.enabled,
            backends.cudnn.deterministic,
            None if is_hip else torch.cuda.get_device_capability(device),
            backends.cuda.mem_efficient_sdp_enabled(),
        )

    @property
    def missing(self) -> str | None:
        """Why convolutions have no library behind them; None if they have one."""
        if self.device_type == "cpu":
            return None if self.enabled else said("libraries.onednn", "oneDNN is off or missing")
        if self.device_type != "cuda":
            return None  # MPS and XPU bring their own
        if not self.enabled:
            name = "MIOpen" if self.is_hip else "cuDNN"
            return said(
                "libraries.off", "{name} is off (torch.backends.cudnn.enabled is False)", name=name
            )
        if not self.is_hip and self.cudnn is None:
            return said("libraries.no_cudnn", "this PyTorch has no cuDNN")
        return None

    def skips_cudnn(self, dtype: torch.dtype, fmt: str) -> bool:
        """Whether `torch.nn.functional.conv3d` goes past cuDNN, although it is there, for a kernel
        of more than one tap and numbers of `dtype` in the memory format `fmt`.

        PyTorch 2.9.0: in any format. 2.9.1 and 2.10: contiguous ones. Source: `use_cudnn` in ATen's
        Convolution.cpp (pytorch #163581, #166480).
        """
        if self.device_type != "cuda" or self.is_hip or self.missing or dtype not in _HALVES:
            return False
        assert self.cudnn is not None  # not missing
        first, end = _SKIPPED_CUDNN
        if self.torch_version == (2, 9, 0):
            return self.cudnn >= first
        if (2, 9, 1) <= self.torch_version < (2, 11, 0):
            return first <= self.cudnn < end and fmt == "contiguous"
        return False

    def has_fused_attention(self, dtype: torch.dtype) -> bool:
        """Whether attention with one head of 384 or 1024 channels keeps no matrix of scores.

        Flash kernels stop at 256 channels, on ROCm at 256 or 512 by card and release, on XPU and
        MPS earlier. CUDA's memory-efficient kernel takes any, and so does the CPU's. Source: ATen's
        cuda/sdp_utils.cpp and sdp_utils_cpp.cpp.
        """
        if self.device_type == "cpu":
            return True
        if self.capability is None or not self.efficient_attention:
            return False
        return dtype != torch.bfloat16 or self.capability >= (8, 0)


def version_numbers(text: str) -> tuple[int, int, int]:
    """The first three numbers of a version: "2.9.1+cu128" is (2, 9, 1); zeros where there are none.

    A build from source calls itself by the release that it becomes ("2.10.0a0+git1234").
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if found is None:
        return (0, 0, 0)
    major, minor, patch = found.groups()
    return int(major), int(minor), int(patch or 0)
