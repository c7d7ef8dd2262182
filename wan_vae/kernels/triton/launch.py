"""The one place that launches a Triton kernel, and so compiles it the first time."""

from __future__ import annotations

from typing import Any

from ...errors import first_line
from ..kernel import BuildError

# What Triton's compiler says, as a plain RuntimeError, where one of its passes fails.
_FAILED_PASS = "PassManager::run failed"


def launch_kernel(
    kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object
) -> None:
    """`kernel[grid](*arguments, **options)`. Raises BuildError where a pass of the compiler fails,
    as it may for an architecture that nobody tried."""
    try:
        kernel[grid](*arguments, **options)
    except RuntimeError as error:
        if _FAILED_PASS not in str(error):
            raise
        raise BuildError(f"Triton cannot compile it: {first_line(error)}") from error
