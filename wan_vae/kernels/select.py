"""Chooses the kernel of every layer.

For each layer, the kernels are asked in the order of the registry: `requires` (card, dtype,
channels), `candidates` (their configurations), `bound` (numbers that could overflow). What is left
is built and proven on this device. Where the device can be timed, the first right configurations
are timed against each other and against eager, once for each class of layers, and the cache keeps
the choice; elsewhere the first right one is taken. A layer without one runs eager, and the report
says why. This module knows no operation and no family.

If every layer has a kernel, the bits of the result do not depend on chunks, strips or shards: a
kernel adds up in one fixed order, whatever the size of its input, and the choice depends on nothing
but the class of the layer. A shard has the choice of the whole picture.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

import torch

from ..arithmetic import own_arithmetic
from ..errors import BackendError
from ..ops.opset import LayerChoice, OpSet, eager_ops
from ..ops.problem import LayerSite, Problem
from ..options import Axis
from . import registry
from .bounds import Bound, operand_bound
from .device import Device
from .kernel import BuildError, Kernel
from .proof.cache import ProofCache
from .proof.cases import prove_kernel
from .proof.choice import EAGER, Choice, fastest, worth_their_bits
from .proof.prove import Verdict
from .proof.timing import Timer, time_kernels
from .table import LayerTable

# How many right configurations of a class are timed.
_TIMED = 3
# Seconds for everything that a choice by time costs a model: what is left of the classes when they
# are over is not built, proven and timed beyond the first right configuration.
_BUDGET_S = 2.0


@dataclass(frozen=True)
class SelectRequest:
    """What kernels are wanted for.

    families: in order of preference. device: the card for which kernels are chosen and built.
    runs_on: the device that proves and runs them; usually the same card. axis: the axis along which
    the features of a shard have halo rows; None for the whole picture. timer: milliseconds of a
    call on `runs_on`; None takes the first configuration that is right. prescribed: the choices of
    another rank by the name of the layer, to be taken as they are. eager: the operations of layers
    without a kernel.
    """

    sites: Sequence[LayerSite]
    families: tuple[str, ...]
    device: Device
    runs_on: torch.device
    proofs: ProofCache
    axis: Axis | None = None
    timer: Timer | None = None
    prescribed: Mapping[str, LayerChoice] | None = None
    eager: OpSet = field(default_factory=eager_ops)


def select_kernels(request: SelectRequest) -> OpSet:
    """The operations of a run over the layers of `request.sites`: kernels where they are proven.

    Raises BackendError where a prescribed kernel cannot run.
    """
    with own_arithmetic(request.runs_on):
        return _Selection(request).table().ops()


def proof_key(kernel: Kernel[Any, Any], problem: Problem, config: str, axis: Axis | None) -> str:
    """Names a verdict: family, kernel, class of problems, configuration, axis of a halo."""
    key = f"{kernel.family} {kernel.name}: {problem.key()}: {config}"
    return key if axis is None or not problem.has_halo else f"{key}: halo along {axis}"


@dataclass(frozen=True)
class _Contender:
    """A configuration that may run a layer; or, with a `reason`, a kernel that may not.

    failed: see `LayerTable.refuse`.
    """

    kernel: Kernel[Any, Any]
    config: str = ""
    reason: str = ""
    failed: bool = False


@dataclass(frozen=True)
class _Class:
    """Layers that take the same choice: their problem, and what may run them, the best first."""

    problem: Problem
    contenders: tuple[_Contender, ...]

    def key_of(self, contender: _Contender) -> str:
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


class _Selection:
    """One walk over the layers of a request."""

    def __init__(self, request: SelectRequest):
        self.request = request
        self.builds = _Builds(request.device)
        self.spent_s = 0.0

    def table(self) -> LayerTable:
        request = self.request
        table = LayerTable(request.families, request.eager)
        asked = _Contenders(request).all()
        classes = [
            _Class(site.problem, tuple(one for one in own if not one.reason))
            for site, own in zip(request.sites, asked, strict=True)
        ]
        with self.builds:
            self._build_ahead(classes)
            decisions: dict[str, Choice] = {}
            if request.prescribed is None:
                for one in sorted(_distinct(classes), key=lambda one: one.rank):
                    decisions[one.key] = self._decide(one)
                decisions |= self._for_their_bits(decisions, classes)
            for site, own, one in zip(request.sites, asked, classes, strict=True):
                if request.prescribed is not None:
                    self._bind_prescribed(table, site, one, request.prescribed.get(site.name))
                else:
                    self._bind(table, site, own, one, decisions[one.key])
        return table

    # -- the choice ------------------------------------------------------------------------------

    def _decide(self, one: _Class) -> Choice:
        request, timer = self.request, self.request.timer
        if timer is None or not one.contenders:
            return self._first_right(one)
        choice = request.proofs.choice(one.key)
        if choice is None:
            choice = self._measure(one, timer)
            if choice.times_ms:  # else nothing is right: what failed is asked again
                choice = request.proofs.keep_choice(one.key, choice)
        if choice.winner == EAGER:
            return choice
        verdict = self._verdict(one.problem, self._winner(one, choice), request.axis)
        if verdict.passed:
            return choice
        # It could be built once, or is wrong with halo rows only.
        return self._first_right(one)

    def _for_their_bits(
        self, decisions: Mapping[str, Choice], classes: Sequence[_Class]
    ) -> dict[str, Choice]:
        """Kernels for the classes that run eager, where that gains too little."""
        layers = Counter(one.key for one in classes)
        distinct = {one.key: one for one in classes}
        kept = {}
        for key, winner in worth_their_bits(decisions, layers).items():
            choice = replace(decisions[key], winner=winner)
            contender = self._winner(distinct[key], choice)
            if self._verdict(distinct[key].problem, contender, self.request.axis).passed:
                kept[key] = choice
        return kept

    def _first_right(self, one: _Class) -> Choice:
        """The first contender that is right, or eager. Nothing is timed."""
        refused: dict[str, str] = {}
        for contender in one.contenders:
            verdict = self._verdict(one.problem, contender, self.request.axis)
            if verdict.passed:
                return Choice(one.key_of(contender), {}, refused)
            refused[one.key_of(contender)] = verdict.reason
        return Choice(EAGER, {}, refused)

    def _measure(self, one: _Class, timer: Timer) -> Choice:
        """The fastest of the first right contenders and eager."""
        right: list[_Contender] = []
        refused: dict[str, str] = {}
        for contender in one.contenders:
            if len(right) >= _TIMED and not _is_timed_beside(contender, right):
                continue
            key = one.key_of(contender)
            if not right:
                verdict = self._verdict(one.problem, contender, None)
            else:
                began = time.perf_counter()
                left = _BUDGET_S - self.spent_s
                if left <= 0 or not self.builds.is_done(contender, one.problem, left):
                    break
                verdict = self._verdict(one.problem, contender, None)
                self.spent_s += time.perf_counter() - began
            if verdict.passed:
                right.append(contender)
            else:
                refused[key] = verdict.reason
        if not right:
            return Choice(EAGER, {}, refused)
        began = time.perf_counter()
        request = self.request
        times = time_kernels(
            [(contender.kernel, contender.config) for contender in right],
            one.problem,
            request.device,
            request.runs_on,
            timer,
        )
        self.spent_s += time.perf_counter() - began
        known: dict[str, float] = {}
        for contender, ms in zip(right, times.kernels, strict=True):
            if isinstance(ms, str):
                refused[one.key_of(contender)] = ms
            else:
                known[one.key_of(contender)] = ms
        if times.eager_ms is not None:
            known[EAGER] = times.eager_ms
        return Choice(fastest(known), known, refused)

    def _winner(self, one: _Class, choice: Choice) -> _Contender:
        return next(c for c in one.contenders if one.key_of(c) == choice.winner)

    def _verdict(self, problem: Problem, contender: _Contender, axis: Axis | None) -> Verdict:
        request, kernel, config = self.request, contender.kernel, contender.config
        failure = self.builds.failure(contender, problem)
        if failure is not None:
            return Verdict(False, failure)
        return request.proofs.verdict(
            proof_key(kernel, problem, config, axis),
            lambda: prove_kernel(kernel, problem, config, request.device, request.runs_on, axis),
        )

    def _build_ahead(self, classes: Sequence[_Class]) -> None:
        """Build in parallel what the classes try first, because compilers take seconds.

        Then, while the first are proven, what else is to be timed.
        """
        request, unknown = self.request, []
        for one in _distinct(classes):
            choice = None if request.timer is None else request.proofs.choice(one.key)
            if request.prescribed is not None or not one.contenders:
                continue
            if choice is None:
                unknown.append(one)
                self.builds.start(one.contenders[0], one.problem)
            elif choice.winner != EAGER:
                self.builds.start(self._winner(one, choice), one.problem)
        if request.timer is not None:
            for one in sorted(unknown, key=lambda one: one.rank):
                for contender in one.contenders[1:_TIMED]:
                    self.builds.start(contender, one.problem)

    # -- the table -------------------------------------------------------------------------------

    def _bind(
        self,
        table: LayerTable,
        site: LayerSite,
        asked: Sequence[_Contender],
        one: _Class,
        choice: Choice,
    ) -> None:
        """Take what is chosen, and keep why what is preferred to it is not taken."""
        for contender in asked:
            if contender.reason:
                table.refuse(
                    site, contender.kernel.family, contender.reason, failed=contender.failed
                )
                continue
            key = one.key_of(contender)
            if key == choice.winner:
                self._take(table, site, contender, choice)
            elif key in choice.refused:
                reason = choice.refused[key]
                axis = None if choice.times_ms else self.request.axis  # what was proven
                key = proof_key(contender.kernel, site.problem, contender.config, axis)
                table.refuse(site, contender.kernel.family, f"{key}: {reason}", failed=True)
            if key == choice.winner and not choice.times_ms:
                return
        if choice.winner == EAGER and len(choice.times_ms) > 1:
            best = min(ms for key, ms in choice.times_ms.items() if key != EAGER)
            gain = best / choice.times_ms[EAGER]
            reason = (
                f"{_library(site.problem, self.request.device)} is {gain:.1f}x faster here: the "
                "bits of these layers depend on the size of the picture"
            )
            table.refuse(site, one.contenders[0].kernel.family, reason, failed=True)

    def _take(
        self, table: LayerTable, site: LayerSite, contender: _Contender, choice: Choice
    ) -> None:
        kernel, config = contender.kernel, contender.config
        layer = kernel.prepare(site.weights, site.problem, config, self.request.device)
        times = choice.times_ms
        facts = LayerChoice(
            kernel.family, kernel.name, config, times.get(choice.winner), times.get(EAGER)
        )
        table.bind(site, kernel, layer, facts)

    def _bind_prescribed(
        self, table: LayerTable, site: LayerSite, one: _Class, wanted: LayerChoice | None
    ) -> None:
        """Take what another rank has chosen. Raises BackendError where it cannot run here."""
        if wanted is None:
            if one.contenders:
                family = one.contenders[0].kernel.family
                table.refuse(site, family, "eager on rank 0", failed=True)
            return
        named = (wanted.family, wanted.kernel, wanted.config)
        for contender in one.contenders:
            kernel, config = contender.kernel, contender.config
            if (kernel.family, kernel.name, config) == named:
                verdict = self._verdict(site.problem, contender, self.request.axis)
                if not verdict.passed:
                    raise BackendError(f"{site.name} cannot run {wanted.text}: {verdict.reason}")
                layer = kernel.prepare(site.weights, site.problem, config, self.request.device)
                table.bind(site, kernel, layer, wanted)
                return
        raise BackendError(f"{site.name} cannot run {wanted.text}: not made for this device")


def _is_timed_beside(contender: _Contender, right: Sequence[_Contender]) -> bool:
    """Whether it is timed beside those that are right already, which are enough."""
    family = contender.kernel.family
    return registry.is_timed_beside(family) and all(one.kernel.family != family for one in right)


def _distinct(classes: Sequence[_Class]) -> list[_Class]:
    """Each class once."""
    return list({one.key: one for one in classes}.values())


class _Contenders:
    """What may run each layer, by requirements and bounds."""

    def __init__(self, request: SelectRequest):
        self.request = request
        self.bounds: list[Bound] = []

    def all(self) -> list[list[_Contender]]:
        """For each site, in order of preference. All bounds come from the device in one
        transfer."""
        drafts = [self._of(site) for site in self.request.sites]
        numbers = torch.stack([b.value for b in self.bounds]).tolist() if self.bounds else []
        return [
            [self._checked(contender, bounds, numbers) for contender, bounds in draft]
            for draft in drafts
        ]

    def _checked(
        self, contender: _Contender, bounds: Sequence[int], numbers: Sequence[float]
    ) -> _Contender:
        for i in bounds:
            reason = self.bounds[i].refusal(numbers[i])
            if reason is not None:
                return _Contender(contender.kernel, contender.config, reason, failed=True)
        return contender

    def _of(self, site: LayerSite) -> list[tuple[_Contender, list[int]]]:
        """Each with the places of its bounds in `self.bounds`."""
        found: list[tuple[_Contender, list[int]]] = []
        problem, device = site.problem, self.request.device
        for kernel in registry.kernels_of(problem.operation, self.request.families):
            reason = kernel.requires.unmet(device, problem)
            configs = () if reason else kernel.candidates(problem, device)
            if not configs:
                channels = f"{problem.in_channels} to {problem.out_channels} channels"
                reason = reason or f"no configuration for {channels}"
                found.append((_Contender(kernel, reason=reason), []))
                continue
            shared = []
            if kernel.requires.largest_operand < float("inf"):
                shared = self._kept(operand_bound(site.weights, kernel.requires.largest_operand))
            for config in configs:
                bound = kernel.bound(site.weights, problem, config)
                if bound is not None:
                    bound = replace(bound, text=f"{kernel.name} {config}: {bound.text}")
                own = self._kept(bound)
                found.append((_Contender(kernel, config), [*shared, *own]))
        return found

    def _kept(self, bound: Bound | None) -> list[int]:
        if bound is None:
            return []
        self.bounds.append(bound)
        return [len(self.bounds) - 1]


class _Builds:
    """Builds each configuration once, in threads, because compilers take seconds."""

    def __init__(self, device: Device):
        self.device = device
        self._pool = ThreadPoolExecutor(max_workers=8)
        # The reason why it could not be built, or None; by proof key.
        self._running: dict[str, Future[str | None]] = {}

    def __enter__(self) -> _Builds:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def start(self, contender: _Contender, problem: Problem) -> Future[str | None]:
        key = proof_key(contender.kernel, problem, contender.config, None)
        if key not in self._running:
            job = contender.kernel, problem, contender.config, self.device
            self._running[key] = self._pool.submit(_build_failure, *job)
        return self._running[key]

    def is_done(self, contender: _Contender, problem: Problem, timeout_s: float) -> bool:
        """Whether it is built, or failed, within that time."""
        return bool(wait([self.start(contender, problem)], timeout_s).done)

    def failure(self, contender: _Contender, problem: Problem) -> str | None:
        """Wait until it is built; the reason if that fails."""
        return self.start(contender, problem).result()


def _build_failure(
    kernel: Kernel[Any, Any], problem: Problem, config: str, device: Device
) -> str | None:
    try:
        kernel.build(problem, config, device)
    except BuildError as error:
        return str(error)
    return None


def _library(problem: Problem, device: Device) -> str:
    """What computes the layer where no kernel does."""
    if problem.operation == "attention":
        return "PyTorch"
    if not torch.backends.cudnn.enabled:
        return "PyTorch"
    real = device.runs_on or device
    return {"nvidia": "cuDNN", "amd": "MIOpen"}.get(real.vendor, "PyTorch")
