"""What the kernels in CUDA C++ take of a card: NVRTC compiles each for it, without having it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from wan_vae.kernels.cuda.driver import compile_source
from wan_vae.kernels.cuda.program import CompiledKernel, Program
from wan_vae.kernels.device import Device
from wan_vae.kernels.registry import kernels_of
from wan_vae.ops.problem import Problem

from .usage import RESERVED_SHARED_BYTES, Resources, usage_of


@dataclass(frozen=True)
class Job:
    """A program to compile, and what it is called in the table."""

    name: str
    config: str
    program: Program


def jobs(
    problems: Iterable[Problem],
    device: Device,
    first: bool,
    only: str | None = None,
) -> Iterator[Job]:
    """What layers run on `device`, each program once.

    first: only what is tried first. only: the kernels of this name, instead of all. The first
    program of a kernel has the layer's name; those beside it, which other layers have too, have a
    name of their own.
    """
    seen = set()
    for problem in problems:
        for kernel, config in _configurations(problem, device, first, only):
            layer, *others = kernel.programs(problem, config, device)
            for job in (
                Job(problem.key(), f"{kernel.name} {config}", layer),
                *(Job(*_own_name(program), program) for program in others),
            ):
                if job.program not in seen:
                    seen.add(job.program)
                    yield job


def _configurations(
    problem: Problem, device: Device, first: bool, only: str | None
) -> Iterator[tuple[Any, str]]:
    """Kernels that name their programs, each with its configurations."""
    for kernel in kernels_of(problem.operation, ("cuda",)):
        if only not in (None, kernel.name) or not isinstance(kernel, CompiledKernel):
            continue
        if kernel.requires.unmet(device, problem) is None:
            configs = kernel.candidates(problem, device)
            for config in configs[:1] if first else configs:
                yield kernel, config
            if first and configs:
                return


def _own_name(program: Program) -> tuple[str, str]:
    """Name and configuration of a program by its macros: ("norm_join 96", "past 2, SiLU")."""
    macros = dict(program.defines)
    sizes = [str(macros[name]) for name in ("CHANNELS", "CIN", "COUT") if name in macros]
    details = [f"past {macros['PAST']}"] if "PAST" in macros else []
    details += ["SiLU"] if macros.get("SILU") else []
    details += [f"gemm n{macros['BN']}"] if program.entry == "conv" else []
    return f"{program.entry} {'x'.join(sizes)}", ", ".join(details)


def compile_jobs(jobs: Sequence[Job], device: Device) -> Iterator[Resources]:
    """Compile them for `device`, for which they were made, in their order. Raises BuildError with
    NVRTC's message."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield from pool.map(lambda job: _compile(job, device), jobs)


def _compile(job: Job, device: Device) -> Resources:
    program = job.program
    cubin = compile_source(program.source, dict(program.defines), program.machine_code, None)
    usage = usage_of(cubin)
    is_counted = device.capability is not None and device.capability >= (9, 0)
    static = usage.shared_bytes - (RESERVED_SHARED_BYTES if is_counted else 0)
    return Resources(
        kernel=job.name,
        config=job.config,
        family="cuda",
        architecture=device.architecture,
        registers=usage.registers,
        stack_bytes=usage.stack_bytes,
        shared_bytes=program.shared_bytes + max(0, static),
        threads=program.threads,
        resident=program.resident,
    )
