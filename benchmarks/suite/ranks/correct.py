"""Whether several ranks make the picture of one device."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

import torch

from benchmarks.suite.cases import Case
from benchmarks.suite.ranks.cases import Sizes
from benchmarks.suite.ranks.results import Check
from benchmarks.suite.weights import random_vae
from wan_vae.config import WanVAEConfig
from wan_vae.options import MemoryFormat, Operation, Precision
from wan_vae.pipeline import WanVAE
from wan_vae.workers.pool import WorkerPool

# Float32 against one device, where a library takes other kernels for other sizes: of the largest
# value. Two NVIDIA H100 against one, 2026-11-25: 8e-6 and 1.3e-5 in the decoder. In half precision
# a shard may be this many times as far from float32 as one device is.
FLOAT32_TOLERANCE = 5e-5
HALF_SLACK = 1.05


def exact_float32() -> None:
    """No TF32 here and in the workers to come: it would depend on the kernel that a size gets."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest expected value; both on the host."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


class Reference:
    """What one device makes of each case, in this process: computed once, for all rank counts."""

    def __init__(self, device: torch.device):
        self.device = device
        self.precisions: tuple[Precision, ...] = ("fp32",)
        if device.type == "cuda":
            self.precisions = ("fp32", "bf16")
        self._made: dict[tuple[Operation, str, Precision], torch.Tensor] = {}
        self._vaes: dict[WanVAEConfig, WanVAE] = {}

    def vae(self, config: WanVAEConfig) -> WanVAE:
        """The random model of `config`; one model is in memory at a time."""
        if config not in self._vaes:
            self._vaes.clear()
            self._vaes[config] = random_vae(config, self.device)
        return self._vaes[config]

    def pixels(self, case: Case, precision: Precision) -> torch.Tensor:
        """The decode of the case's latent, on the host."""
        return self._get(
            "decode",
            case,
            precision,
            lambda vae: vae.decode(case.random_latent(), precision=precision),
        )

    def latent(self, case: Case, precision: Precision) -> torch.Tensor:
        """The encode of `video`, on the host."""
        return self._get(
            "encode",
            case,
            precision,
            lambda vae: vae.encode(self.video(case), precision=precision),
        )

    def video(self, case: Case) -> torch.Tensor:
        """A video to encode, of the case's pixel size."""
        return self.pixels(case, "fp32")

    def _get(
        self,
        operation: Operation,
        case: Case,
        precision: Precision,
        make: Callable[[WanVAE], torch.Tensor | None],
    ) -> torch.Tensor:
        key = (operation, case.name, precision)
        if key not in self._made:
            made = make(self.vae(case.config))
            assert made is not None  # None only with a sink
            self._made[key] = made.cpu()
        return self._made[key]

    def judge(
        self, operation: Operation, case: Case, precision: Precision, found: torch.Tensor
    ) -> tuple[bool, str]:
        """Whether `found` is the picture (or latent) of one device, and how close it is."""
        get = self.pixels if operation == "decode" else self.latent
        expected = get(case, precision)
        if torch.equal(found, expected):
            return True, "equal bit for bit"
        if precision == "fp32":
            error = largest_difference(found, expected)
            return error <= FLOAT32_TOLERANCE, (
                f"differs by {error:.1e} of the largest value (allowed {FLOAT32_TOLERANCE:.0e})"
            )
        exact = get(case, "fp32")
        ours, one = (((x - exact).norm() / exact.norm()).item() for x in (found, expected))
        return ours <= HALF_SLACK * one, (
            f"not bit for bit: {ours:.3e} from float32, one device is {one:.3e}"
        )


def check_correct(pool: WorkerPool, reference: Reference, sizes: Sizes) -> list[Check]:
    """Decode and encode of each size, mixed weight formats, and the guarded messages."""
    ranks = len(pool.devices)
    checks: list[Check] = []

    def add(name: str, passed: bool, said: str) -> None:
        checks.append(Check(ranks, name, passed, said))

    operations: tuple[Literal["decode"], Literal["encode"]] = ("decode", "encode")
    for case in sizes.correct:
        vae = reference.vae(case.config)
        for precision in reference.precisions:
            for operation in operations:
                if operation == "decode":
                    found = pool.decode(vae, case.random_latent(), precision=precision)
                else:
                    found = pool.encode(vae, reference.video(case), precision=precision)
                name = f"{operation} {case.name} {precision}"
                add(name, *reference.judge(operation, case, precision, found))
    if ranks == 1:
        return checks
    case, precision = sizes.correct[0], reference.precisions[-1]
    vae = reference.vae(case.config)
    both: tuple[MemoryFormat, MemoryFormat] = ("contiguous", "channels_last_3d")
    formats = [both[rank % 2] for rank in range(ranks)]
    found = pool.decode(vae, case.random_latent(), precision=precision, memory_formats=formats)
    passed, said = reference.judge("decode", case, precision, found)
    report = vae.last_report
    mixed = -1 if report is None else report.layout.mixed_calls
    name = f"ranks with different weight formats, {precision}"
    add(name, passed and mixed == 0, f"{said}; {mixed} mixed calls")
    answers = pool.check_wire()
    add(
        "messages in every memory format arrive as they are",
        all(a["gather"] and a["exchange"] for a in answers),
        f"an unguarded gather of NDHWC ({pool.transport}): {answers[0]['unguarded']}",
    )
    return checks
