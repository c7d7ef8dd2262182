"""The command `wan-vae bench ranks`: all steps within a limit of time, and what they found."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.suite.emulation import Emulated, emulate
from benchmarks.suite.facts import Facts, repeatable, write_results
from benchmarks.suite.ranks import faults
from benchmarks.suite.ranks.cases import Sizes, full_sizes, small_sizes
from benchmarks.suite.ranks.correct import Reference, check_correct, exact_float32
from benchmarks.suite.ranks.results import SCHEMA, RanksResults, Timing, ranks_markdown
from benchmarks.suite.ranks.timing import time_case, with_predictions
from benchmarks.suite.scaling import LINKS
from wan_vae.device import pick_device
from wan_vae.errors import ShardingError
from wan_vae.workers.pool import WorkerPool

LIMIT_S = 450.0
# The most ranks that share devices.
_MOST_SHARED = 8


def pick_ranks(text: str, devices: int, share: bool = False) -> list[int]:
    """Counts from "1,2,4", or "all": 1, 2, 4, 8 as far as there are devices. share: several ranks
    may have one."""
    if share:
        devices = max(devices, _MOST_SHARED)
    if text == "all":
        return [n for n in (1, 2, 4, 8) if n <= devices]
    counts = sorted({int(part) for part in text.split(",")})
    if not counts or counts[0] < 1 or counts[-1] > devices:
        raise ShardingError(
            f"--ranks {text}: expected counts from 1 to the {devices} devices of this machine"
        )
    return counts


@dataclass
class Budget:
    """Seconds left of the limit; what did not fit in is listed."""

    limit_s: float
    skipped: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self.start

    def allows(self, what: str, seconds: float) -> bool:
        """Whether `what`, which takes up to `seconds`, may begin; if not, it is listed."""
        if self.spent_s + seconds <= self.limit_s:
            print(f"{self.spent_s:6.0f} s  {what}", file=sys.stderr, flush=True)
            return True
        self.skipped.append(f"{what}: no time left")
        return False


def run(
    budget: Budget,
    results: RanksResults,
    counts: Sequence[int],
    device: torch.device,
    sizes: Sizes,
    repeats: int = 3,
) -> None:
    """Fill `results`; see the package. `device` names the kind: ranks take its devices from 0, and
    share them where there are more ranks."""
    reference = Reference(device)
    available = _available(device)

    def devices(count: int) -> list[str]:
        if device.type == "cpu":
            return ["cpu"] * count
        return [f"cuda:{i % available}" for i in range(count)]

    timings: dict[str, list[Timing]] = {case.name: [] for case in sizes.timed}
    for n in counts:
        if not budget.allows(f"correctness on {n} ranks, and all that follows", 60):
            break
        # One start of the workers for a count: for many GPUs it takes longer than the decodes.
        with WorkerPool(devices(n)) as pool:
            results.checks += check_correct(pool, reference, sizes)
            results.backends[n] = pool.transport if n > 1 else "one process"
            if n > available:
                results.skipped.append(f"times on {n} ranks: they share {available} devices")
            for case in sizes.timed if n <= available and results.passed(n) else ():
                if budget.allows(f"time of {case.name} on {n} ranks", 30):
                    vae = reference.vae(case.config)
                    timings[case.name].append(time_case(pool, vae, case, repeats))
    proven = [n for n in counts if n in results.backends]
    several = [n for n in proven if n > 1]
    if several:
        _break_decodes(budget, results, devices(several[-1]), reference, sizes)
    timed = [n for n in several if n <= available]
    for case in sizes.timed if proven else ():
        emulated: list[Emulated] = []
        if timed and budget.allows(f"emulation of {case.name}", 20):
            vae = reference.vae(case.config)
            emulated = emulate(vae, *case.latent[3:], timed, LINKS[:1], repeats, case.latent[2])
        results.timings += with_predictions(case, timings[case.name], emulated)
    results.skipped += budget.skipped


def _available(device: torch.device) -> int:
    """How many devices there are of this kind; cores of a CPU."""
    return torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1


def _break_decodes(
    budget: Budget, results: RanksResults, devices: list[str], reference: Reference, sizes: Sizes
) -> None:
    what = f"faults on {len(devices)} ranks"
    reason = faults.unavailable_reason()
    if reason is not None:
        results.skipped.append(f"{what}: {reason}")
    elif sys.platform != "win32" and budget.allows(what, 12 * sizes.timeout_s):
        vae = reference.vae(sizes.faults.config)
        results.faults += faults.check_faults(devices, vae, sizes)


def main(argv: Sequence[str]) -> int:
    """Run and write; 1 if a picture was wrong, a fault unnoticed, or nothing compared, else 0.

    argv: the words after `wan-vae bench`, of which the first may be "ranks".
    """
    parser = argparse.ArgumentParser(
        prog="wan-vae bench ranks",
        description="One decode over several devices: correct, timed, with planted faults.",
    )
    parser.add_argument("--ranks", default="all", help="1,2,4 or all (default)")
    parser.add_argument("--device", help="cuda or cpu (default: the best one here)")
    parser.add_argument(
        "--shared-devices",
        action="store_true",
        help="also more ranks than devices, up to 8: whether they are right, and faults; no times",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--limit-s",
        type=float,
        default=LIMIT_S,
        help=f"seconds for everything (default: {LIMIT_S:g}); a step that may not fit is left out "
        "and listed, and no step runs on ranks whose pictures were not compared",
    )
    parser.add_argument("--output", type=Path, help="folder for ranks.md and ranks.json")
    args = parser.parse_args(argv[1:] if argv[:1] == ["ranks"] else argv)
    exact_float32()
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    device = torch.device("cuda", 0) if cuda else device
    counts = pick_ranks(args.ranks, _available(device), args.shared_devices)
    budget = Budget(args.limit_s)
    used = min(max(counts), _available(device))
    results = RanksResults(Facts.begin(SCHEMA, repeatable(argv), device), used)
    sizes = full_sizes() if cuda else small_sizes()
    run(budget, results, counts, device, sizes, args.repeats)
    results.seconds = round(budget.spent_s)
    text = ranks_markdown(results)
    print(text)
    if args.output is not None:
        write_results(args.output, "ranks", text, results.as_dict())
    return 0 if results.all_good and results.backends else 1
