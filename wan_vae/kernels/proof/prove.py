"""Proof: a fast kernel runs only where it matched the reference on this device, twice.

Some kernel configurations are wrong on some cards, and differently in each run. So before one is
used for a class of problems, it runs twice on random data on this device: both results must be
equal bit for bit and close to a float32 reference. `cache.py` keeps the verdicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...errors import named
from ...said import said

# Of the largest single error, in units of the bound times the result's root mean square: rounding
# of random data stays below 8; a tile read twice or not at all is far above.
_WORST_ELEMENT = 24


@dataclass(frozen=True)
class Verdict:
    """The result of the proof of one kernel for one class of problems.

    `reason` is empty if and only if it `passed`. `error` is relative to the float32 reference.
    """

    passed: bool
    reason: str = ""
    error: float | None = None


def prove(
    kernel: Callable[[], torch.Tensor],
    reference: Callable[[], torch.Tensor],
    bound: float,
    failures: tuple[type[Exception], ...] = (),
) -> Verdict:
    """Run `kernel` twice and hold it against `reference`, computed in float32 on the same inputs.

    It passes if both runs are equal bit for bit, every element is written and finite, the relative
    error is at most `bound`, and no single element is far off. Memory is poisoned with NaN before
    each run, so that what a kernel does not write is seen. A kernel that raises one of `failures`
    (it does not compile, or wants more shared memory than the card has) fails; running out of
    device memory is no verdict and is raised.
    """
    expected = reference()
    try:
        first = _poisoned(kernel, expected)
        second = _poisoned(kernel, expected)
    except torch.OutOfMemoryError:
        raise
    except failures as failure:
        return Verdict(False, named(failure))
    if first.shape != expected.shape:
        return Verdict(
            False,
            said(
                "proof.shape",
                "shape {shape}, expected {expected}",
                shape=tuple(first.shape),
                expected=tuple(expected.shape),
            ),
        )
    if not bool(torch.isfinite(first).all()):
        return Verdict(
            False, said("proof.not_finite", "left elements unwritten, or NaN or inf in the result")
        )
    different = int((first != second).sum())
    if different:
        return Verdict(
            False,
            said(
                "proof.race",
                "two runs differ in {different} of {count} values: a race",
                different=different,
                count=first.numel(),
            ),
        )
    difference = first.float() - expected
    error = float(difference.norm() / expected.norm())
    if not error <= bound:
        return Verdict(
            False,
            said(
                "proof.error",
                "relative error {error}, allowed {bound}",
                error=f"{error:.1e}",
                bound=f"{bound:.1e}",
            ),
            error,
        )
    rms = float(expected.square().mean().sqrt())
    worst = float(difference.abs().max())
    if not worst <= _WORST_ELEMENT * bound * rms:
        return Verdict(
            False,
            said(
                "proof.one_value",
                "one value is off by {worst} of the mean size",
                worst=f"{worst / rms:.1e}",
            ),
            error,
        )
    return Verdict(True, "", error)


def _poisoned(kernel: Callable[[], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Run `kernel` after blocks of its result's size were filled with NaN and given back.

    The caching allocator hands such a block out again for the kernel's `torch.empty`.
    """
    blocks = [torch.full_like(like, float("nan")) for _ in range(2)]
    blocks += [torch.full_like(like, float("nan"), dtype=torch.float16) for _ in range(2)]
    del blocks
    return kernel()
