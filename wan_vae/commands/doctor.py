"""`wan-vae doctor`: checks the convolution in every memory format on this machine, and the kernels.

A device or a component that is missing or broken is a line of the output, never an exception.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F

from .. import layout
from ..config import wan21, wan22
from ..device import (
    DTYPES,
    auto_dtype,
    device_name,
    dtype_name,
    has_directml,
    pick_device,
    versions,
)
from ..errors import WanVAEError, first_line
from ..kernels import registry
from ..kernels.cache_folder import cache_folder
from ..kernels.device import Device
from ..kernels.proof.cache import ProofCache, environment
from ..kernels.proof.formats import LAYER_SHAPES, must_prove_formats, wrong_formats
from ..libraries import Libraries
from ..network.model import WanVAEModel
from ..ops.eager.forms import choose_forms
from ..options import Backend, Part
from ..runs.kernel_choice import OpsRequest, own_modules, select_ops, unavailable_reason
from .kernel_rows import KernelRow, float16_sums_note, kernel_rows
from .outlook import outlook, random_vae

_FORMATS = ("contiguous", "channels_last_3d")
# The largest relative error that rounding explains, by dtype.
_BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# What a device raises that cannot do what was asked: PyTorch's errors of a driver, of memory and of
# missing operators are RuntimeErrors, those of dtypes that a device lacks are TypeErrors.
_DEVICE_ERRORS = (RuntimeError, TypeError, WanVAEError)


@dataclass(frozen=True)
class ConvCheck:
    """A convolution in one dtype and combination of formats, compared with float64 on the CPU.

    error: the largest relative error over the layer shapes; None if it cannot run, and then
    `failure` says why.
    """

    dtype: torch.dtype
    input_format: str
    weight_format: str
    error: float | None
    failure: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether the convolution ran and its result was wrong."""
        return self.error is not None and self.error >= _BOUNDS[self.dtype]

    def __str__(self) -> str:
        formats = f"{self.input_format} / {self.weight_format}"
        if self.error is None:
            result = f"cannot run: {self.failure}"
        else:
            result = f"{'WRONG' if self.is_wrong else 'right'}  {self.error:.1e}"
        return f"{dtype_name(self.dtype):<9} {formats:<36} {result}"


def check_device(device: torch.device) -> Iterator[ConvCheck]:
    """Check each dtype of `device` in each combination of formats."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32,) if device.type == "cpu" else tuple(_BOUNDS):
        for input_format in _FORMATS:
            for weight_format in _FORMATS:
                try:
                    error = _worst_error(device, dtype, input_format, weight_format, generator)
                except _DEVICE_ERRORS as failure:
                    yield ConvCheck(dtype, input_format, weight_format, None, first_line(failure))
                else:
                    yield ConvCheck(dtype, input_format, weight_format, error)


def _worst_error(
    device: torch.device,
    dtype: torch.dtype,
    input_format: str,
    weight_format: str,
    generator: torch.Generator,
) -> float:
    worst = 0.0
    for c, o, kernel, t, h, w in LAYER_SHAPES:
        x = torch.randn(1, c, t, h, w, generator=generator).to(dtype)
        weight = torch.randn(o, c, *kernel, generator=generator).to(dtype) / c
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        expected = F.conv3d(x.double(), weight.double(), padding=padding)
        result = F.conv3d(
            layout.to_format(x.to(device), input_format),
            layout.to_format(weight.to(device), weight_format),
            padding=padding,
        )
        error = (result.cpu().double() - expected).norm() / expected.norm()
        worst = max(worst, error.item() if error.isfinite() else float("inf"))
    return worst


def known_faults() -> list[str]:
    """Published faults in 3-D convolutions of the library versions on this machine."""
    faults = []
    version = versions()["cudnn"] if torch.version.hip is None else None
    cudnn = None if version is None else int(version)
    if cudnn is not None and 90800 <= cudnn < 91100:
        faults.append(f"cuDNN {cudnn}: wrong results for huge bf16 conv3d (pytorch #163539)")
    if cudnn is not None and 91002 <= cudnn <= 91500:
        faults.append(f"cuDNN {cudnn}: faulty TF32 3-D kernels (pytorch #167024)")
    if cudnn is not None and torch.__version__.startswith("2.9") and cudnn < 91500:
        faults.append(f"PyTorch 2.9 with cuDNN {cudnn}: bf16 conv3d very slow (pytorch #166643)")
    if torch.backends.mps.is_available():
        faults.append("MPS: conv3d was wrong for NDHWC input in some releases (pytorch #141471)")
    return faults


def check_kernels(device: torch.device) -> list[str]:
    """Prove and time the kernels for the layers of both full-width models: for each class of layers
    what runs them and what that gained, and what cannot run and why."""
    families = registry.families_of("auto", Device.chosen_for(device))
    requested: Backend = "auto" if families else "cuda"
    dtype = auto_dtype(device)[0] if families else torch.bfloat16
    reason = unavailable_reason(requested, device, dtype)
    if reason is not None:
        return [f"kernels: off ({reason})"]
    imitation = Device.chosen_for(device).imitation
    lines = [] if imitation is None else [f"kernels: {imitation}"]
    rows: list[KernelRow] = []
    proofs = ProofCache(environment(device), cache_folder())
    for config in (wan21(), wan22()):
        for only_frame in (False, True):
            with torch.device(device):
                model = WanVAEModel(config).to(dtype)
            layout.pack_weights(model, "channels_last_3d")
            for part in get_args(Part):
                request = OpsRequest(requested, model, only_frame, part)
                ops = select_ops(request, lambda: proofs)
                weights = [
                    p
                    for module in own_modules(model, part)
                    for name, p in module.named_parameters()
                    if name.endswith("weight")
                ]
                backends = Counter(ops.backend_of(p) for p in weights)
                what = f"{config.family} {part}, {'one image' if only_frame else 'video'}"
                numbers = ", ".join(f"{n} {name}" for name, n in sorted(backends.items()))
                lines.append(f"kernels: {what}: of {len(weights)} layers {numbers}")
                own = kernel_rows(model, part, only_frame, ops)
                lines += [f"  {_row(row)}" for row in own]
                lines += [f"  {refusal.op} off: {refusal.text}" for refusal in ops.refusals]
                rows += own
    note = float16_sums_note(rows)
    return [*lines, *([] if note is None else [note]), *proofs.notes]


def _row(row: KernelRow) -> str:
    text = f"{row.layers:>2} {row.problem:<44} {row.runs:<48} {row.gain:>5} {row.times}"
    return text.rstrip()


def run_doctor(requested: str | None) -> int:
    """Print versions, and the checks of each device; returns 1 if a result is wrong.

    Returns 1 also for a device that runs no convolution in any dtype.
    """
    print("  ".join(f"{name} {value}" for name, value in versions().items() if value))
    are_right = [_report_on(device) for device in _devices(requested)]
    for fault in known_faults():
        print(f"warning: {fault}")
    return 0 if all(are_right) else 1


def _devices(requested: str | None) -> list[torch.device]:
    if requested is not None:
        return [pick_device(requested)]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if torch.xpu.is_available():
        devices += [torch.device("xpu", i) for i in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    if has_directml():
        devices.append(pick_device("privateuseone:0"))
    return devices


def _report_on(device: torch.device) -> bool:
    """Print the checks of one device; returns whether it gives correct results."""
    try:
        name = device_name(device)
    except _DEVICE_ERRORS as failure:
        name = f"no name: {first_line(failure)}"
    print(f"\n{device} ({name}): conv3d, input / weight format")
    checks = []
    for check in check_device(device):
        checks.append(check)
        print(f"  {check}")
    dtype, why = auto_dtype(device)
    names = {value: name for name, value in DTYPES.items()}
    print(f"  auto is {names[dtype]} ({why})")
    libraries, wrong = Libraries.of(device), {}
    if must_prove_formats(device):
        proofs = ProofCache(environment(device), cache_folder())
        wrong = wrong_formats(device, dtype, proofs)
    decision = layout.decide("auto", device, dtype, libraries, wrong)
    print(f"  auto in {names[dtype]}: {decision.chosen} ({decision.reason})")
    forms = choose_forms(libraries, dtype, decision.chosen, decision.is_wrong)
    for operation, reason in forms.reasons.items():
        print(f"  eager {operation}: {reason}")
    try:
        lines = check_kernels(device)
    except _DEVICE_ERRORS as failure:
        lines = [f"kernels: cannot be checked: {first_line(failure)}"]
    for line in lines:
        print(f"  {line}")
    try:
        lines = outlook(random_vae(device))
    except _DEVICE_ERRORS as failure:
        lines = [f"decode: cannot be planned: {first_line(failure)}"]
    for line in lines:
        print(f"  {line}")
    return any(c.error is not None for c in checks) and not any(c.is_wrong for c in checks)
