"""Chooses the kernel of every layer.

For each layer, the kernels are tried in the order of the registry. A kernel goes through five
steps: `requires` (card, dtype, channels), `candidates` (its configurations), `build` (compile), the
proof on this device, and `prepare` (pack the weights). The first configuration that is proven is
taken. A layer without one runs eager, and the report says why. This module knows no operation and
no family.

If every layer has a kernel, the bits of the result do not depend on chunks, strips or shards: a
kernel adds up in one fixed order, whatever the size of its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from ..arithmetic import own_arithmetic
from ..ops.opset import OpSet
from ..ops.problem import LayerSite, Problem
from ..options import Axis
from . import registry
from .device import Device
from .kernel import BuildError, Kernel
from .proof.cache import ProofCache
from .proof.cases import prove_kernel
from .proof.prove import Verdict
from .table import LayerTable


@dataclass(frozen=True)
class SelectRequest:
    """What kernels are wanted for.

    families: in order of preference. device: the card for which kernels are chosen and built.
    runs_on: the device that proves and runs them; usually the same card. axis: the axis along which
    the features of a shard have halo rows; None for the whole picture.
    """

    sites: Sequence[LayerSite]
    families: tuple[str, ...]
    device: Device
    runs_on: torch.device
    proofs: ProofCache
    axis: Axis | None = None


def select_kernels(request: SelectRequest) -> OpSet:
    """The operations of a run over the layers of `request.sites`: kernels where they are proven."""
    with own_arithmetic(request.runs_on):
        return _Selection(request).table().ops()


def proof_key(kernel: Kernel[Any, Any], problem: Problem, config: str, axis: Axis | None) -> str:
    """Names a verdict: family, kernel, class of problems, configuration, axis of a halo."""
    key = f"{kernel.family} {kernel.name}: {problem.key()}: {config}"
    return key if axis is None or not problem.has_halo else f"{key}: halo along {axis}"


class _Selection:
    """One walk over the layers of a request."""

    def __init__(self, request: SelectRequest):
        self.request = request
        # Why a configuration could not be built, or None if it could; by proof key.
        self.builds: dict[str, str | None] = {}

    def table(self) -> LayerTable:
        request, table = self.request, LayerTable(self.request.families)
        self._build_ahead()
        largest = _largest_operands(request.sites)
        for site, number in zip(request.sites, largest, strict=True):
            for kernel in self._kernels(site):
                if self._take(table, site, kernel, number):
                    break
        return table

    def _kernels(self, site: LayerSite) -> Iterable[Kernel[Any, Any]]:
        return registry.kernels_of(site.problem.operation, self.request.families)

    def _take(
        self, table: LayerTable, site: LayerSite, kernel: Kernel[Any, Any], largest: float
    ) -> bool:
        """Bind the first configuration of `kernel` that is proven; False if there is none."""
        problem, device = site.problem, self.request.device
        reason = kernel.requires.unmet(device, problem)
        if reason is not None:
            table.refuse(site, kernel.family, reason, failed=False)
            return False
        if not largest < kernel.requires.largest_operand:  # NaN too
            reason = f"its operand may reach {largest:.0e}, too large for float16"
            table.refuse(site, kernel.family, reason, failed=True)
            return False
        configs = kernel.candidates(problem, device)
        for config in configs:
            verdict = self._verdict(kernel, problem, config)
            if verdict.passed:
                layer = kernel.prepare(site.weights, problem, config, device)
                table.bind(site, kernel, layer)
                return True
            key = proof_key(kernel, problem, config, self.request.axis)
            table.refuse(site, kernel.family, f"{key}: {verdict.reason}", failed=True)
        if not configs:
            channels = f"{problem.in_channels} to {problem.out_channels} channels"
            table.refuse(site, kernel.family, f"no configuration for {channels}", failed=False)
        return False

    def _verdict(self, kernel: Kernel[Any, Any], problem: Problem, config: str) -> Verdict:
        request = self.request
        failure = self._build(kernel, problem, config)
        if failure is not None:
            return Verdict(False, failure)
        return request.proofs.verdict(
            proof_key(kernel, problem, config, request.axis),
            lambda: prove_kernel(
                kernel, problem, config, request.device, request.runs_on, request.axis
            ),
        )

    def _build(self, kernel: Kernel[Any, Any], problem: Problem, config: str) -> str | None:
        """Build it once; the reason if that fails."""
        key = proof_key(kernel, problem, config, None)
        if key not in self.builds:
            self.builds[key] = _build_failure(kernel, problem, config, self.request.device)
        return self.builds[key]

    def _build_ahead(self) -> None:
        """Build in parallel what each layer tries first, because compilers take seconds."""
        device, jobs = self.request.device, {}
        for site in self.request.sites:
            for kernel in self._kernels(site):
                if kernel.requires.unmet(device, site.problem) is None:
                    for config in kernel.candidates(site.problem, device)[:1]:
                        key = proof_key(kernel, site.problem, config, None)
                        jobs[key] = kernel, site.problem, config
                    break
        with ThreadPoolExecutor(max_workers=8) as pool:
            running = {key: pool.submit(_build_failure, *job, device) for key, job in jobs.items()}
        self.builds |= {key: job.result() for key, job in running.items()}


def _build_failure(
    kernel: Kernel[Any, Any], problem: Problem, config: str, device: Device
) -> str | None:
    try:
        kernel.build(problem, config, device)
    except BuildError as error:
        return str(error)
    return None


def _largest_operands(sites: Iterable[LayerSite]) -> list[float]:
    """The largest absolute value that each layer can get from its norm; 0 if it has no norm.

    After the norm, the length of a pixel's vector has a bound. So has its product with a row of
    the weight in front of attention. All values come from the device in one transfer.
    """
    peaks: list[torch.Tensor | None] = []
    for site in sites:
        gamma, weight = site.weights.gamma, site.weights.weight
        if gamma is None:
            peaks.append(None)
            continue
        peak = gamma.detach().abs().max().float() * weight.shape[1] ** 0.5
        if site.weights.projection is not None:
            reach = weight.detach().float().flatten(1).norm(dim=1).max()
            peak = torch.maximum(peak, peak * reach)
        peaks.append(peak)
    known = [peak for peak in peaks if peak is not None]
    numbers = iter(torch.stack(known).tolist() if known else ())
    return [0.0 if peak is None else next(numbers) for peak in peaks]
