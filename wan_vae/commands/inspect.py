"""`wan-vae inspect`: what a checkpoint is, and the plan of a decode with it."""

from __future__ import annotations

import json
from collections import Counter

from ..device import dtype_name
from ..io.checkpoint import load_checkpoint
from ..io.latents import check_latent_shape, load_latent
from ..pipeline import WanVAE
from .load import load_vae
from .report_text import count, plan_text, report_text
from .requests import InspectRequest, PlanRequest


def run_inspect(request: InspectRequest) -> int:
    """Print what the checkpoint is; returns the exit code."""
    checkpoint = load_checkpoint(request.file)
    report = WanVAE.from_checkpoint(checkpoint, device="cpu").inspect()
    tensors = checkpoint.state.values()
    dtypes = dict(Counter(dtype_name(tensor.dtype) for tensor in tensors).most_common())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if request.as_json:
        file = {
            "tensors": len(tensors),
            "dtypes": dtypes,
            "bytes": size,
            "keys": checkpoint.key_layout,
            "prefix": checkpoint.prefix,
        }
        plain = {**report.as_dict(), "compute_dtype": report.dtype, "file": file}
        print(json.dumps(plain, indent=1))
        return 0
    stored = ", ".join(f"{count(n, 'tensor')} of {dtype}" for dtype, n in dtypes.items())
    prefix = f" with the prefix {checkpoint.prefix!r}" if checkpoint.prefix else ""
    print(f"file      {stored}, {size / 1e6:.1f} MB, {checkpoint.key_layout} keys{prefix}")
    print(report_text(report, all_layers=request.all_layers))
    if not request.all_layers:
        print("          (--layers lists each of them)")
    return 0


def run_plan(request: PlanRequest) -> int:
    """Print how the latent would be decoded; returns the exit code."""
    options = request.options
    latent = load_latent(request.latent, request.key)
    vae = load_vae(request.file, request.device, options.precision)
    check_latent_shape(latent, vae.config)
    plan = vae.plan(
        tuple(latent.shape),
        chunk_frames=options.chunk_frames,
        memory_format=options.memory_format,
        precision=options.precision,
        strips=options.strips,
        backend=options.backend,
        free_bytes=options.free_bytes,
    )
    if request.as_json:
        print(json.dumps(plan.as_dict(), indent=1))
    else:
        print(plan_text(plan, all_layers=request.all_layers))
    return 0
