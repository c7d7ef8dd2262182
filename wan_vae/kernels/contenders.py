"""What may run each layer: the kernels' configurations that fit, and the order of building them.

This is what a card will look for. A run asks here, and so does what compiles ahead of a run
(`runs/ahead.py`), so the two cannot disagree.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any
from zlib import crc32

from ..device import numbers_of
from ..ops.problem import LayerSite, Problem
from ..options import Axis
from ..said import said
from . import registry
from .bounds import Bound, operand_bound
from .device import Device
from .kernel import BuildError, Kernel

# How many right configurations of a class are timed.
TIMED = 3
# Compilers at a time.
_FEWEST, _MOST = 4, 16


def proof_key(kernel: Kernel[Any, Any], problem: Problem, config: str, axis: Axis | None) -> str:
    """Names a verdict: family, kernel, class of problems, configuration, axis of a halo."""
    key = f"{kernel.family} {kernel.name}: {problem.key()}: {config}"
    return key if axis is None or not problem.has_halo else f"{key}: halo along {axis}"


@dataclass(frozen=True)
class Contender:
    """A configuration that may run a layer; or, with a `reason`, a kernel that may not.

    failed: see `LayerTable.refuse`.
    """

    kernel: Kernel[Any, Any]
    config: str = ""
    reason: str = ""
    failed: bool = False


@dataclass(frozen=True)
class LayerClass:
    """Layers that take the same choice: their problem, and what may run them, the best first."""

    problem: Problem
    contenders: tuple[Contender, ...]

    def key_of(self, contender: Contender) -> str:
        """The proof key, for the whole picture."""
        return proof_key(contender.kernel, self.problem, contender.config, None)

    @functools.cached_property
    def key(self) -> str:
        """Names the choice: another list of contenders may have another winner."""
        names = "\n".join(self.key_of(contender) for contender in self.contenders)
        return f"{self.problem.key()}: of {crc32(names.encode()):08x}"

    @property
    def rank(self) -> tuple[bool, int]:
        """Sorts by what a choice is worth: the narrow layers run at the highest resolution."""
        problem = self.problem
        is_small = getattr(problem, "source", "features") == "latent"
        return is_small, max(problem.in_channels, problem.out_channels)


def distinct(classes: Sequence[LayerClass]) -> list[LayerClass]:
    """Each class once."""
    return list({one.key: one for one in classes}.values())


def class_of(site: LayerSite, contenders: Iterable[Contender]) -> LayerClass:
    """The class of the layer at `site`: what may run it, of its `contenders`."""
    return LayerClass(site.problem, tuple(one for one in contenders if not one.reason))


@dataclass(frozen=True)
class Wanted:
    """A configuration that is to be built for a class of layers."""

    contender: Contender
    problem: Problem

    @property
    def key(self) -> str:
        """Its proof key, for the whole picture."""
        return proof_key(self.contender.kernel, self.problem, self.contender.config, None)


def wanted_builds(
    classes: Sequence[LayerClass], winner_of: Callable[[LayerClass], str | None], is_timed: bool
) -> list[Wanted]:
    """What a run builds before it needs it, each once, in the order of its need.

    First what each class tries first, in the order of the layers; then what else is to be timed,
    if `is_timed`, for the classes first of which a choice is worth the most. winner_of: the proof
    key of what is chosen for a class already, which is built alone (nothing is, if that is no
    contender); None where nothing is chosen.
    """
    first: list[Wanted] = []
    later: list[tuple[tuple[bool, int], list[Wanted]]] = []
    for one in distinct(classes):
        builds = [Wanted(contender, one.problem) for contender in one.contenders]
        winner = winner_of(one)
        if winner is not None:
            first += [build for build in builds if build.key == winner]
        else:
            first += builds[:1]
            later.append((one.rank, builds[1:TIMED] if is_timed else []))
    later.sort(key=lambda entry: entry[0])
    ordered = [*first, *(build for _, builds in later for build in builds)]
    return list({build.key: build for build in ordered}.values())


class Contenders:
    """What may run each layer of `sites`, by requirements and bounds.

    Of weights on the device `meta`, which have no numbers, no bound is computed: for that PyTorch
    would import its compiler, and that Triton (2.8 s).
    """

    def __init__(self, sites: Sequence[LayerSite], families: tuple[str, ...], device: Device):
        self.sites, self.families, self.device = sites, families, device
        self.bounds: list[Bound] = []

    def all(self) -> list[list[Contender]]:
        """For each site, in order of preference. All bounds come from the device in one
        transfer."""
        drafts = [self._of(site) for site in self.sites]
        numbers = iter(numbers_of([number for bound in self.bounds for number in bound.numbers]))
        values = [bound.value(*islice(numbers, len(bound.numbers))) for bound in self.bounds]
        return [
            [self._checked(contender, bounds, values) for contender, bounds in draft]
            for draft in drafts
        ]

    def _checked(
        self, contender: Contender, bounds: Sequence[int], values: Sequence[float]
    ) -> Contender:
        for i in bounds:
            reason = self.bounds[i].refusal(values[i])
            if reason is not None:
                return Contender(contender.kernel, contender.config, reason, failed=True)
        return contender

    def _of(self, site: LayerSite) -> list[tuple[Contender, list[int]]]:
        """Each with the places of its bounds in `self.bounds`."""
        found: list[tuple[Contender, list[int]]] = []
        problem, device = site.problem, self.device
        has_numbers = not site.weights.weight.is_meta
        # Of the layer's operand, by their limit: kernels share them.
        operands: dict[float, list[int]] = {}
        for kernel in registry.kernels_of(problem.operation, self.families):
            reason = kernel.requires.unmet(device, problem)
            configs = () if reason else kernel.candidates(problem, device)
            if not configs:
                reason = reason or said(
                    "kernel.no_configuration",
                    "no configuration for {in_channels} to {out_channels} channels",
                    in_channels=problem.in_channels,
                    out_channels=problem.out_channels,
                )
                found.append((Contender(kernel, reason=reason), []))
                continue
            shared, limit = list[int](), kernel.requires.largest_operand
            if has_numbers and limit < float("inf"):
                if limit not in operands:
                    operands[limit] = self._kept(operand_bound(site.weights, limit))
                shared = operands[limit]
            for config in configs:
                bound = kernel.bound(site.weights, problem, config) if has_numbers else None
                if bound is not None:
                    bound = replace(bound, of=f"{kernel.name} {config}")
                own = self._kept(bound)
                found.append((Contender(kernel, config), [*shared, *own]))
        return found

    def _kept(self, bound: Bound | None) -> list[int]:
        if bound is None:
            return []
        self.bounds.append(bound)
        return [len(self.bounds) - 1]


def compiler_threads() -> int:
    """How many compilers a run starts at a time: as many as there are cores, to a limit."""
    return max(_FEWEST, min(_MOST, os.cpu_count() or _FEWEST))


class Builds:
    """Builds each configuration once, in threads, because compilers take seconds.

    They are C++ and hold no lock of Python's meanwhile.
    """

    def __init__(self, device: Device, threads: int | None = None):
        self.device = device
        self._pool = ThreadPoolExecutor(max_workers=threads or compiler_threads())
        # The reason why it could not be built, or None; by proof key.
        self._running: dict[str, Future[str | None]] = {}

    def __enter__(self) -> Builds:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def start(self, build: Wanted) -> Future[str | None]:
        """Queue it, unless it was; the reason why it cannot be built, or None, once it is done."""
        if build.key not in self._running:
            contender = build.contender
            job = contender.kernel, build.problem, contender.config, self.device
            self._running[build.key] = self._pool.submit(_build_failure, *job)
        return self._running[build.key]

    def is_done(self, build: Wanted, timeout_s: float) -> bool:
        """Whether it is built, or failed, within that time."""
        return bool(wait([self.start(build)], timeout_s).done)

    def failure(self, build: Wanted) -> str | None:
        """Wait until it is built; the reason if that fails."""
        return self.start(build).result()

    def in_turn(self, builds: Iterable[Wanted]) -> Iterator[Wanted]:
        """`builds`, each as soon as it is built or has failed."""
        running = {self.start(build): build for build in builds}
        for future in as_completed(running):
            yield running[future]


def _build_failure(
    kernel: Kernel[Any, Any], problem: Problem, config: str, device: Device
) -> str | None:
    try:
        kernel.build(problem, config, device)
    except BuildError as error:
        return str(error)
    return None
