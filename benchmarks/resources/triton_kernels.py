"""What the Triton kernels take of a card: each is compiled for it, without having it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from wan_vae.kernels.device import Device
from wan_vae.kernels.kernel import Kernel
from wan_vae.kernels.registry import kernels_of
from wan_vae.kernels.triton import attention as triton_attention
from wan_vae.kernels.triton import conv3d_pointer, conv3d_tma
from wan_vae.kernels.triton import head as triton_head
from wan_vae.kernels.triton import norm as triton_norm
from wan_vae.kernels.triton import strided as triton_strided
from wan_vae.kernels.triton.ahead import target_of
from wan_vae.kernels.triton.configs import (
    AttentionConfig,
    ConvConfig,
    HeadConfig,
    StridedConfig,
)
from wan_vae.kernels.triton.conv3d import precision_of
from wan_vae.kernels.weights import filled_channels
from wan_vae.ops.problem import (
    AttentionProblem,
    ConvProblem,
    HeadProblem,
    NormConvProblem,
    Problem,
    StridedProblem,
    UpsampleProblem,
)

from .usage import Resources, amd_usage_of, nvdisasm, usage_of

_ATTENTION_STEPS = ("q_frame", "q_row", "k_frame", "k_row", "v_frame", "v_row")
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Job:
    """A kernel to compile: its function, types of its arguments, and compile-time constants.

    loads: how a convolution is loaded.
    """

    name: str
    config: str
    function: Any
    types: dict[str, str]
    constants: dict[str, object]
    warps: int = 4
    stages: int = 3
    loads: str = ""


def jobs(
    problems: Iterable[Problem], device: Device, first: bool, only: str | None = None
) -> Iterator[Job]:
    """What layers run on `device`, each configuration once.

    first: only what is tried first. only: the kernels of this name, instead of the best ones.
    """
    seen = set()
    for problem in problems:
        for kernel in kernels_of(problem.operation, ("triton",)):
            if only not in (None, kernel.name) or kernel.requires.unmet(device, problem):
                continue
            configs = kernel.candidates(problem, device)
            for config in configs[:1] if first else configs:
                for job in _jobs_of(kernel, problem, config, device):
                    if (job.name, job.config) not in seen:
                        seen.add((job.name, job.config))
                        yield job
            break


def _jobs_of(
    kernel: Kernel[Any, Any], problem: Problem, config: str, device: Device
) -> Iterator[Job]:
    """The launches of a layer: those of its norm, and its own."""
    match problem:
        case AttentionProblem(channels=c):
            core, *convolutions = config.split(" / ")
            yield _attention(c, AttentionConfig.parse(core), kernel.name)
            yield from _norms(problem, False, device)
            for out, tile in zip((3 * c, c), convolutions, strict=True):
                pointwise = ConvProblem(
                    "features", c, out, (1, 1, 1), torch.float16, problem.feature_dtype
                )
                yield _conv(kernel, pointwise, ConvConfig.parse(tile), device)
        case StridedProblem():
            yield _strided(problem, StridedConfig.parse(config), device)
        case HeadProblem() if kernel.name == "narrow":
            yield from _norms(problem, True, device)
            yield from _head(problem.in_channels, problem.out_channels, HeadConfig.parse(config))
        case HeadProblem() | NormConvProblem():
            yield from _norms(problem, True, device)
            yield _conv(kernel, problem, ConvConfig.parse(config), device)
        case ConvProblem() | UpsampleProblem():
            yield _conv(kernel, problem, ConvConfig.parse(config), device)


def _conv(
    kernel: Kernel[Any, Any],
    problem: ConvProblem | NormConvProblem | HeadProblem | UpsampleProblem,
    config: ConvConfig,
    device: Device,
) -> Job:
    c, o, up = filled_channels(problem.in_channels), problem.out_channels, False
    kt, kh, kw = problem.kernel
    feature = _TYPES[problem.feature_dtype]
    operand, out = _TYPES[problem.operand_dtype], feature
    if isinstance(problem, UpsampleProblem):
        up, kt, kh, kw = True, 1, 2, 2
    else:
        out = _TYPES[problem.out_dtype]
    label = problem.source if isinstance(problem, ConvProblem) else problem.operation
    constants: dict[str, object] = {
        **{"CIN": c, "F": config.F, "PH": config.PH, "PW": config.PW},
        **{"N0": config.N0, "N1": config.N1, "BK": config.BK, "KT": kt, "KH": kh, "KW": kw},
        **{"PAD_Y": kh // 2, "PAD_X": kw // 2, "TAP0": 0, "UP": up},
        **{"PRECISION": precision_of(problem.operand_dtype, device)},
        **{"HAS_BIAS": True, "HAS_RESIDUAL": not up},
    }
    types = {**dict.fromkeys(("bias", "residual"), f"*{feature}"), "out": f"*{out}"}
    if kernel.name == "pointer":
        function = conv3d_pointer._conv
        constants["TAPS"] = kt * kh * kw
        types |= dict.fromkeys(("x", "weight"), f"*{operand}")
    else:
        function = conv3d_tma._conv
        types |= {
            "x": f"tensordesc<{operand}[1, {config.PH}, {config.PW}, {config.BK}]>",
            "w0": f"tensordesc<{operand}[{config.N0}, {config.BK}]>",
            "w1": f"tensordesc<{operand}[{config.N1 or config.N0}, {config.BK}]>",
        }
    name = f"{label} {c}x{o} {kt}x{kh}x{kw}"
    return Job(
        name, config.name, function, types, constants, config.warps, config.stages, kernel.name
    )


def _strided(problem: StridedProblem, config: StridedConfig, device: Device) -> Job:
    """Over every second pixel of each frame, or over every second frame."""
    c, o = problem.in_channels, problem.out_channels
    (kt, kh, kw), (st, sy, sx) = problem.kernel, problem.stride
    constants: dict[str, object] = {
        **{"CIN": c, "COUT": o, "M": config.M, "N0": config.N0, "N1": config.N1},
        **{"BK": config.BK, "KT": kt, "KH": kh, "KW": kw, "ST": st, "SY": sy, "SX": sx},
        **{"PRECISION": precision_of(problem.feature_dtype, device), "HAS_BIAS": True},
    }
    types = dict.fromkeys(("x", "weight", "bias", "out"), f"*{_TYPES[problem.feature_dtype]}")
    name, function = f"strided_conv {c}x{o} {kt}x{kh}x{kw}", triton_strided._strided
    return Job(name, config.name, function, types, constants, config.warps, config.stages)


def _attention(c: int, config: AttentionConfig, loads: str) -> Job:
    constants: dict[str, object] = {
        **{"D": c, "DC": config.DC, "NC": config.NC, "M": config.M, "BN": config.BN}
    }
    types = {**dict.fromkeys(("q", "k", "v", "out"), "*fp16"), "scale": "fp32"}
    if loads == "tma":
        types |= {
            "q": f"tensordesc<fp16[1, {config.M}, {config.DC}]>",
            **dict.fromkeys(("k", "v"), f"tensordesc<fp16[1, {config.BN}, {config.DC}]>"),
        }
        constants |= dict.fromkeys(_ATTENTION_STEPS)
    name, function = f"attention {c}", triton_attention._attention
    return Job(name, config.name, function, types, constants, config.warps, config.stages, loads)


def _norms(problem: Problem, silu: bool, device: Device) -> Iterator[Job]:
    """float16 operands and history: what a decode launches."""
    c = problem.in_channels
    types = {
        **{"x": f"*{_TYPES[problem.feature_dtype]}", "scale": "*fp32"},
        **dict.fromkeys(("has_x", "has_history", "keep"), "fp32"),
        **dict.fromkeys(("history", "buffer", "out", "kept"), "*fp16"),
    }
    common: dict[str, object] = {"C": c, "BLOCK_C": triton.next_power_of_2(c)}
    for placed in (False, True) if silu else (False,):
        shard = " of a shard" if placed else ""
        past = 2 if silu else 0
        rows, warps = triton_norm.join_rows(c), triton_norm.join_warps(c)
        join = {"ROWS": rows, "PAST_FRAMES": past, "SILU": silu, "PLACED": placed}
        label = f"join silu={silu}{shard}"
        yield Job(f"norm {c}", label, triton_norm._norm_silu_join, types, common | join, warps)
        if silu and device.vendor != "amd":  # Winograd's frames: of kernels that AMD has not
            pairs = {"ROWS": triton_norm.pair_rows(c), "PLACED": placed}
            function = triton_norm._norm_silu_pairs
            yield Job(f"norm {c}", f"pairs{shard}", function, types, common | pairs)


def _head(c: int, o: int, config: HeadConfig) -> Iterator[Job]:
    types = {
        **dict.fromkeys(("buffer", "weight"), "*fp16"),
        **dict.fromkeys(("partial", "bias", "out"), "*fp32"),
    }
    columns = max(16, triton.next_power_of_2(9 * o))
    sums = {"C": c, "BLOCK_C": 32, "COLS": columns, "USED": 9 * o, "M": config.M, "KT": 3}
    gather = {"OUT": o, "M": 1024, "PAD_Y": 1, "PAD_X": 1, "HAS_BIAS": True}
    name = f"head {c}x{o}"
    partials, function = f"partials {config.name}", triton_head._partials
    yield Job(name, partials, function, types, dict(sums), config.warps)
    yield Job(name, "gather", triton_head._gather, types, dict(gather))


def compile_jobs(jobs: Sequence[Job], device: Device) -> Iterator[Resources]:
    """Compile them for `device`, in their order. Raises what Triton's compiler raises."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield from pool.map(lambda job: compile_job(job, device), jobs)


def compile_job(job: Job, device: Device) -> Resources:
    """Compile for `device`. Raises what Triton's compiler raises."""
    names = job.function.arg_names
    signature = {
        name: "constexpr" if name in job.constants else job.types.get(name, "i32") for name in names
    }
    # What Triton finds out at a launch: widths are multiples of 16, and pointers are aligned.
    multiples = {"cout", *_ATTENTION_STEPS}
    aligned = [
        i
        for i, n in enumerate(names)
        if signature[n].startswith("*") or (n in multiples and n not in job.constants)
    ]
    source = ASTSource(
        job.function,
        signature,
        constexprs={(names.index(name),): value for name, value in job.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    target, options = target_of(device), {"num_warps": job.warps, "num_stages": job.stages}
    made = triton.compile(source, target=target, options=options)
    if device.vendor == "amd":
        code, waits = made.asm["amdgcn"], None
        usage = amd_usage_of(code)
        products = len(re.findall(r"\bv_(?:wmma|mfma)_", code))
    else:
        cubin = made.asm["cubin"]
        usage, code = usage_of(cubin), nvdisasm(cubin)
        products = len(re.findall(r"\b[HIQ]?G?MMA\.", code))
        waits = code.count("WARPGROUP.DEPBAR")
    return Resources(
        kernel=job.name,
        config=job.config,
        family="triton",
        loads=job.loads,
        architecture=device.architecture,
        registers=usage.registers,
        stack_bytes=usage.stack_bytes,
        shared_bytes=made.metadata.shared,
        threads=target.warp_size * job.warps,
        tensor_core_instructions=products,
        waits=waits,
    )
