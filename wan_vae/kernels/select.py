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

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..arithmetic import own_arithmetic
from ..errors import BackendError
from ..ops.opset import LayerChoice, OpSet, eager_ops
from ..ops.problem import LayerSite, Problem
from ..options import Axis
from ..said import said
from . import registry
from .contenders import (
    TIMED,
    Builds,
    Contender,
    Contenders,
    LayerClass,
    Wanted,
    class_of,
    distinct,
    proof_key,
    wanted_builds,
)
from .device import Device
from .proof.cache import ProofCache
from .proof.cases import prove_kernel
from .proof.choice import EAGER, Choice, fastest, worth_their_bits
from .proof.prove import Verdict
from .proof.timing import Timer, time_kernels
from .table import LayerTable

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


class _Selection:
    """One walk over the layers of a request."""

    def __init__(self, request: SelectRequest):
        self.request = request
        self.builds = Builds(request.device)
        self.spent_s = 0.0

    def table(self) -> LayerTable:
        request = self.request
        table = LayerTable(request.families, request.eager)
        asked = Contenders(request.sites, request.families, request.device).all()
        classes = [class_of(site, own) for site, own in zip(request.sites, asked, strict=True)]
        with self.builds, request.proofs.gathered():
            decisions: dict[str, Choice] = {}
            if request.prescribed is None:
                self._build_ahead(classes)
                for one in sorted(distinct(classes), key=lambda one: one.rank):
                    decisions[one.key] = self._decide(one)
                decisions |= self._for_their_bits(decisions, classes)
            for site, own, one in zip(request.sites, asked, classes, strict=True):
                if request.prescribed is not None:
                    self._bind_prescribed(table, site, one, request.prescribed.get(site.name))
                else:
                    self._bind(table, site, own, one, decisions[one.key])
        return table

    # -- the choice ------------------------------------------------------------------------------

    def _decide(self, one: LayerClass) -> Choice:
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
        self, decisions: Mapping[str, Choice], classes: Sequence[LayerClass]
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

    def _first_right(self, one: LayerClass) -> Choice:
        """The first contender that is right, or eager. Nothing is timed."""
        refused: dict[str, str] = {}
        for contender in one.contenders:
            verdict = self._verdict(one.problem, contender, self.request.axis)
            if verdict.passed:
                return Choice(one.key_of(contender), {}, refused)
            refused[one.key_of(contender)] = verdict.reason
        return Choice(EAGER, {}, refused)

    def _measure(self, one: LayerClass, timer: Timer) -> Choice:
        """The fastest of the first right contenders and eager."""
        right: list[Contender] = []
        refused: dict[str, str] = {}
        for contender in one.contenders:
            if len(right) >= TIMED and not _is_timed_beside(contender, right):
                continue
            key = one.key_of(contender)
            if not right:
                verdict = self._verdict(one.problem, contender, None)
            else:
                began = time.perf_counter()
                left = _BUDGET_S - self.spent_s
                if left <= 0 or not self.builds.is_done(Wanted(contender, one.problem), left):
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

    def _winner(self, one: LayerClass, choice: Choice) -> Contender:
        return next(c for c in one.contenders if one.key_of(c) == choice.winner)

    def _verdict(self, problem: Problem, contender: Contender, axis: Axis | None) -> Verdict:
        request, kernel, config = self.request, contender.kernel, contender.config
        key = proof_key(kernel, problem, config, axis)
        known = request.proofs.known(key)
        if known is not None and kernel.compiles_at_launch:
            return known
        failure = self.builds.failure(Wanted(contender, problem))
        if failure is not None:
            return Verdict(False, failure)
        return request.proofs.verdict(
            key,
            lambda: prove_kernel(kernel, problem, config, request.device, request.runs_on, axis),
        )

    def _build_ahead(self, classes: Sequence[LayerClass]) -> None:
        """Start all that is wanted, and prove what the classes try first as soon as it is built:
        the compilers of the others take seconds."""
        request = self.request
        is_timed = request.timer is not None

        def winner_of(one: LayerClass) -> str | None:
            choice = request.proofs.choice(one.key) if is_timed else None
            return None if choice is None else choice.winner

        wanted = [
            build
            for build in wanted_builds(classes, winner_of, is_timed)
            if request.proofs.known(build.key) is None
            or not build.contender.kernel.compiles_at_launch
        ]
        for build in wanted:
            self.builds.start(build)
        first = {
            Wanted(one.contenders[0], one.problem).key
            for one in classes
            if one.contenders and winner_of(one) is None
        }
        axis = None if is_timed else request.axis
        for build in self.builds.in_turn(build for build in wanted if build.key in first):
            self._verdict(build.problem, build.contender, axis)

    # -- the table -------------------------------------------------------------------------------

    def _bind(
        self,
        table: LayerTable,
        site: LayerSite,
        asked: Sequence[Contender],
        one: LayerClass,
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
                table.refuse(
                    site,
                    contender.kernel.family,
                    said("kernel.of", "{kernel}: {reason}", kernel=key, reason=reason),
                    failed=True,
                )
            if key == choice.winner and not choice.times_ms:
                return
        if choice.winner == EAGER and len(choice.times_ms) > 1:
            best = min(ms for key, ms in choice.times_ms.items() if key != EAGER)
            gain = best / choice.times_ms[EAGER]
            reason = said(
                "kernel.faster_library",
                "{library} is {gain}x faster here: the bits of these layers depend on the size of "
                "the picture",
                library=_library(site.problem, self.request.device),
                gain=f"{gain:.1f}",
            )
            table.refuse(site, one.contenders[0].kernel.family, reason, failed=True)

    def _take(
        self, table: LayerTable, site: LayerSite, contender: Contender, choice: Choice
    ) -> None:
        kernel, config = contender.kernel, contender.config
        layer = kernel.prepare(site.weights, site.problem, config, self.request.device)
        times = choice.times_ms
        facts = LayerChoice(
            kernel.family, kernel.name, config, times.get(choice.winner), times.get(EAGER)
        )
        table.bind(site, kernel, layer, facts)

    def _bind_prescribed(
        self, table: LayerTable, site: LayerSite, one: LayerClass, wanted: LayerChoice | None
    ) -> None:
        """Take what another rank has chosen. Raises BackendError where it cannot run here."""
        if wanted is None:
            if one.contenders:
                family = one.contenders[0].kernel.family
                table.refuse(site, family, said("kernel.rank_0", "eager on rank 0"), failed=True)
            return
        named = (wanted.family, wanted.kernel, wanted.config)
        for contender in one.contenders:
            kernel, config = contender.kernel, contender.config
            if (kernel.family, kernel.name, config) == named:
                verdict = self._verdict(site.problem, contender, self.request.axis)
                if not verdict.passed:
                    raise BackendError(
                        said(
                            "kernel.prescribed",
                            "{layer} cannot run {choice}: {reason}",
                            layer=site.name,
                            choice=wanted.text,
                            reason=verdict.reason,
                        )
                    )
                layer = kernel.prepare(site.weights, site.problem, config, self.request.device)
                table.bind(site, kernel, layer, wanted)
                return
        raise BackendError(
            said(
                "kernel.not_made",
                "{layer} cannot run {choice}: not made for this device",
                layer=site.name,
                choice=wanted.text,
            )
        )


def _is_timed_beside(contender: Contender, right: Sequence[Contender]) -> bool:
    """Whether it is timed beside those that are right already, which are enough."""
    family = contender.kernel.family
    return registry.is_timed_beside(family) and all(one.kernel.family != family for one in right)


def _library(problem: Problem, device: Device) -> str:
    """What computes the layer where no kernel does."""
    if problem.operation == "attention":
        return "PyTorch"
    if not torch.backends.cudnn.enabled:
        return "PyTorch"
    real = device.runs_on or device
    return {"nvidia": "cuDNN", "amd": "MIOpen"}.get(real.vendor, "PyTorch")
