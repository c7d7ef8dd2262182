"""The one place that launches a Triton kernel, and so compiles it the first time.

On tensors of the device `meta`, which have a shape and no data, a kernel is compiled and not
launched: so what is compiled ahead is what a launch looks for, because the same code asks for both.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from ...errors import first_line
from ...said import said
from ..kernel import BuildError

# What Triton's compiler says, as a plain RuntimeError, where one of its passes fails.
_FAILED_PASS = "PassManager::run failed"


def launch_kernel(
    kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object
) -> None:
    """`kernel[grid](*arguments, **options)`, or on `meta` tensors its compilation alone. Raises
    BuildError where a pass of the compiler fails, as it may for an architecture that nobody tried.
    """
    is_ahead = any(isinstance(one, torch.Tensor) and one.is_meta for one in arguments)
    try:
        if is_ahead:
            _compile(kernel, grid, arguments, options)
        else:
            kernel[grid](*arguments, **options)
    except RuntimeError as error:
        if _FAILED_PASS not in str(error):
            raise
        raise BuildError(
            said(
                "kernel.triton_failed",
                "Triton cannot compile it: {message}",
                message=first_line(error),
            )
        ) from error


def get_ready() -> None:
    """Have Triton hash its compiler, by whose digest it names what is in its cache: 460 MB (0.8 s)
    for Triton 3.7, once a process, at the first launch of a kernel if not before."""
    # Where it lies by release; a release that has neither does it at the first launch.
    for module in (triton.runtime.cache, triton.compiler.compiler):
        hashed = getattr(module, "triton_key", None)
        if hashed is not None:
            hashed()
            return


def _compile(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[object, ...], options: dict[str, object]
) -> None:
    """Compile into Triton's cache: the kernel, and what launches it, which some releases compile
    for each kernel too."""
    made = kernel.warmup(*arguments, grid=grid, **options)
    if made is None:  # by the interpreter, which compiles nothing
        return
    launcher = getattr(triton.runtime.driver.active, "launcher_cls", None)
    if launcher is not None:
        launcher(made.src, made.metadata)
