"""`wan-vae doctor`: run the convolution in every format on this machine, against float64."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import torch
import torch.nn.functional as F

from .. import layout
from ..config import wan21, wan22
from ..device import DTYPES, device_name, pick_device, pick_dtype, versions
from ..kernels.cache_folder import cache_folder
from ..kernels.proof.cache import ProofCache, environment
from ..network.model import WanVAEModel
from ..options import Backend, Part
from ..runs.kernel_choice import own_modules, select_ops, unavailable_reason

# Shapes of the real decoder's layers, small in space: (in, out, kernel, frames, rows, columns).
_LAYERS = (
    (96, 96, (3, 3, 3), 6, 18, 22),
    (384, 192, (3, 3, 3), 3, 9, 11),
    (96, 3, (3, 3, 3), 3, 17, 13),
    (192, 384, (3, 1, 1), 4, 8, 8),
)
# Largest relative error that rounding explains, by dtype.
_BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def check_device(device: torch.device) -> list[tuple[str, str, bool, float]]:
    """(dtype, formats of input/weight, right?, largest relative error) over the layer shapes."""
    rows = []
    dtypes = (torch.float32,) if device.type == "cpu" else tuple(_BOUNDS)
    generator = torch.Generator().manual_seed(0)
    for dtype in dtypes:
        for x_format in ("contiguous", "channels_last_3d"):
            for w_format in ("contiguous", "channels_last_3d"):
                worst = 0.0
                for c, o, kernel, t, h, w in _LAYERS:
                    x = torch.randn(1, c, t, h, w, generator=generator).to(dtype)
                    weight = torch.randn(o, c, *kernel, generator=generator).to(dtype) / c
                    padding = (0, kernel[1] // 2, kernel[2] // 2)
                    expected = F.conv3d(x.double(), weight.double(), padding=padding)
                    got = F.conv3d(
                        layout.to_format(x.to(device), x_format),
                        layout.to_format(weight.to(device), w_format),
                        padding=padding,
                    )
                    error = (got.double().cpu() - expected).norm() / expected.norm()
                    worst = max(worst, error.item() if error.isfinite() else float("inf"))
                name = str(dtype).removeprefix("torch.")
                rows.append((name, f"{x_format} / {w_format}", worst < _BOUNDS[dtype], worst))
    return rows


def known_faults() -> list[str]:
    """Versions of this machine's libraries with a published fault in 3-D convolutions."""
    found = []
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if cudnn is not None and 90800 <= cudnn < 91100:
        found.append(f"cuDNN {cudnn}: wrong results for huge bf16 conv3d (pytorch #163539)")
    if cudnn is not None and 91002 <= cudnn <= 91500:
        found.append(f"cuDNN {cudnn}: faulty TF32 3-D kernels (pytorch #167024)")
    if cudnn is not None and torch.__version__.startswith("2.9") and cudnn < 91500:
        found.append(f"PyTorch 2.9 with cuDNN {cudnn}: bf16 conv3d very slow (pytorch #166643)")
    if torch.backends.mps.is_available():
        found.append("MPS: conv3d was wrong for NDHWC input in some releases (pytorch #141471)")
    return found


def check_kernels(device: torch.device) -> list[str]:
    """Prove our kernels for the layers of both full-width models; one line a finding."""
    reason = unavailable_reason("triton", device, torch.bfloat16)
    if reason is not None:
        return [f"kernels: off ({reason})"]
    lines: list[str] = []
    requested: Backend = "cuda"
    reason = unavailable_reason(requested, device, torch.bfloat16)
    if reason is not None:
        lines, requested = [f"kernels in CUDA C++: off ({reason})"], "triton"
    book = ProofCache(environment(device), cache_folder())
    for config in (wan21(), wan22()):
        for only_frame in (False, True):
            with torch.device(device):
                model = WanVAEModel(config).to(torch.bfloat16)
            layout.pack_weights(model, "channels_last_3d")
            for part in get_args(Part):
                ops = select_ops(requested, model, only_frame, lambda: book, part=part)
                weights = [
                    p
                    for module in own_modules(model, part)
                    for name, p in module.named_parameters()
                    if name.endswith("weight")
                ]
                counts = Counter(ops.backend_of(p) for p in weights)
                what = f"{config.family} {part}, {'one image' if only_frame else 'video'}"
                found = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
                lines.append(f"kernels: {what}: of {len(weights)} layers {found}")
                lines += [f"  {off.op} off: {off.text}" for off in ops.refusals]
    return [*lines, *book.notes]


def run_doctor(wanted: str | None) -> int:
    """Print versions, the layout check of each device and the backends; 1 if a layout is wrong."""
    print("  ".join(f"{k} {v}" for k, v in versions().items() if v))
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    if wanted is not None:
        devices = [pick_device(wanted)]
    wrong = False
    for device in devices:
        print(f"\n{device} ({device_name(device)}): conv3d, input / weight format")
        for dtype, formats, right, error in check_device(device):
            wrong |= not right
            print(f"  {dtype:<9} {formats:<36} {'right' if right else 'WRONG'}  {error:.1e}")
        dtype = pick_dtype("auto", device)
        decision = layout.decide("auto", device, dtype)
        name = {v: k for k, v in DTYPES.items()}[dtype]
        print(f"  auto in {name}: {decision.chosen} ({decision.reason})")
        for line in check_kernels(device):
            print(f"  {line}")
    for text in known_faults():
        print(f"warning: {text}")
    return 1 if wrong else 0
