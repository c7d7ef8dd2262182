"""`wan-vae bench --ranks 1,2,4`: one decode over several devices, proven, timed, and broken.

In this order: correctness (no count of ranks gets a time before its picture was right), times, then
the faults that need real transports. Ends within `--limit-s`: what there was no time for is listed.
On the CPU the same steps run with Gloo on a narrow model and small pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path

import torch

from benchmarks.suite.cases import Case
from benchmarks.suite.emulation import Emulated, emulate
from benchmarks.suite.ranks_results import Check, Fault, Results, Timing, markdown
from benchmarks.suite.results import repeatable
from benchmarks.suite.scaling import LINKS, predict
from wan_vae.config import WanVAEConfig, wan21, wan22
from wan_vae.device import device_name, pick_device, versions
from wan_vae.errors import DecodeCancelled, ShardingError
from wan_vae.network.model import build_model, expected_shapes
from wan_vae.pipeline import WanVAE
from wan_vae.workers.pool import WorkerPool

# Float32 against one device, where a library takes other kernels for other sizes: of the largest
# value. Two NVIDIA H100 against one, 2026-11-25: 8e-6 and 1.3e-5 in the decoder. In half precision
# a shard may be so much further from float32 than one device is.
FLOAT32_TOLERANCE = 5e-5
HALF_SLACK = 1.05
LIMIT_S = 450.0


@dataclass(frozen=True)
class Sizes:
    """What is run: for correctness (two pictures), for time, for faults."""

    correct: tuple[Case, ...]
    timed: tuple[Case, ...]
    faults: Case
    timeout_s: float


def full_sizes() -> Sizes:
    """For GPUs: the published models and pictures."""
    a, b = wan21(), wan22()
    return Sizes(
        (
            Case("wan2.1 480p", a, (1, 16, 2, 60, 104)),
            Case("wan2.1 odd", a, (1, 16, 3, 47, 83)),
        ),
        (
            Case("wan2.1 480p x 81", a, (1, 16, 21, 60, 104)),
            Case("wan2.1 720p x 81", a, (1, 16, 21, 90, 160)),
            Case("wan2.2 720p x 121", b, (1, 48, 31, 44, 80)),
        ),
        Case("wan2.1 480p x 81", a, (1, 16, 21, 60, 104)),
        10.0,
    )


def small_sizes() -> Sizes:
    """For the CPU: narrow models, small pictures."""
    a, b = wan21(dim=8), wan22(dim=8, decoder_dim=16)
    return Sizes(
        (Case("small", a, (1, 16, 2, 6, 16)), Case("small odd", a, (1, 16, 3, 7, 17))),
        (Case("small", a, (1, 16, 5, 6, 16)), Case("small wan2.2", b, (1, 48, 2, 5, 16))),
        Case("small", a, (1, 16, 9, 6, 16)),
        3.0,
    )


def random_vae(config: WanVAEConfig, device: torch.device, dtype: str = "auto") -> WanVAE:
    """A VAE with seeded random weights that keep activations near one, made on `device`."""
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, shape in expected_shapes(config).items():
        noise = torch.randn(shape, generator=generator, device=device)
        if name.endswith("gamma"):
            state[name] = 1 + 0.1 * noise
        else:
            state[name] = noise * (0.02 if name.endswith("bias") else prod(shape[1:]) ** -0.5)
    made = WanVAE(build_model(config, state, device, torch.float32))
    if dtype == "auto" and device.type == "cuda":
        made.model.to(torch.bfloat16)
    return made


def exact_float32() -> None:
    """No TF32 here and in the workers to come: it would depend on the kernel that a size gets."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"


def latent_of(case: Case) -> torch.Tensor:
    """Seeded noise on the host, where a ComfyUI LATENT is."""
    return torch.randn(case.latent, generator=torch.Generator().manual_seed(1))


# -- correctness ----------------------------------------------------------------------------------


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest expected value; both on the host."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


class Reference:
    """What one device makes of each case, in this process: computed once, for all rank counts."""

    def __init__(self, device: torch.device):
        self.device = device
        self.precisions = ("fp32", "bf16") if device.type == "cuda" else ("fp32",)
        self._made: dict[tuple[str, str, str], torch.Tensor] = {}
        self._vaes: dict[WanVAEConfig, WanVAE] = {}

    def vae(self, config: WanVAEConfig) -> WanVAE:
        if config not in self._vaes:
            self._vaes.clear()  # one model in memory at a time
            self._vaes[config] = random_vae(config, self.device)
        return self._vaes[config]

    def pixels(self, case: Case, precision: str) -> torch.Tensor:
        return self._get("decode", case, precision, lambda vae: vae.decode(
            latent_of(case), precision=precision))  # fmt: skip

    def latent(self, case: Case, precision: str) -> torch.Tensor:
        return self._get("encode", case, precision, lambda vae: vae.encode(
            self.video(case), precision=precision))  # fmt: skip

    def video(self, case: Case) -> torch.Tensor:
        """A video to encode, of the case's pixel size."""
        return self.pixels(case, "fp32")

    def _get(self, operation: str, case: Case, precision: str, make) -> torch.Tensor:
        key = (operation, case.name, precision)
        if key not in self._made:
            self._made[key] = make(self.vae(case.config)).cpu()
        return self._made[key]

    def judge(self, operation: str, case: Case, precision: str, found) -> tuple[bool, str]:
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
        ours, theirs = ((x - exact).norm() / exact.norm() for x in (found, expected))
        return bool(ours <= HALF_SLACK * theirs), (
            f"not bit for bit: {ours:.3e} from float32, one device is {theirs:.3e}"
        )


def check_correct(pool: WorkerPool, reference: Reference, sizes: Sizes) -> list[Check]:
    """Decode and encode of each size, mixed weight formats, and the guarded messages."""
    ranks, checks = len(pool.devices), []

    def add(name: str, passed: bool, said: str) -> None:
        checks.append(Check(ranks, name, passed, said))

    for case in sizes.correct:
        vae = reference.vae(case.config)
        for precision in reference.precisions:
            found = pool.decode(vae, latent_of(case), precision=precision)
            add(f"decode {case.name} {precision}",
                *reference.judge("decode", case, precision, found))  # fmt: skip
            found = pool.encode(vae, reference.video(case), precision=precision)
            add(f"encode {case.name} {precision}",
                *reference.judge("encode", case, precision, found))  # fmt: skip
    if ranks == 1:
        return checks
    case, precision = sizes.correct[0], reference.precisions[-1]
    vae = reference.vae(case.config)
    formats = [("contiguous", "channels_last_3d")[r % 2] for r in range(ranks)]
    found = pool.decode(vae, latent_of(case), precision=precision, memory_formats=formats)
    passed, said = reference.judge("decode", case, precision, found)
    mixed = vae.last_report.layout.mixed_calls
    add(f"ranks with different weight formats, {precision}",
        passed and mixed == 0, f"{said}; {mixed} mixed calls")  # fmt: skip
    answers = pool.check_wire()
    add("messages in every memory format arrive as they are",
        all(a["gather"] and a["exchange"] for a in answers),
        f"an unguarded gather of NDHWC ({pool.backend}): {answers[0]['unguarded']}")  # fmt: skip
    return checks


# -- time -----------------------------------------------------------------------------------------


def time_case(pool: WorkerPool, vae: WanVAE, case: Case, repeats: int) -> Timing:
    """LATENT on the host to IMAGE on the host, after one decode to warm up."""
    z, walls, device_ms, last = latent_of(case), [], [], ()
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        image = pool.decode(vae, z, form="image")
        wall_ms = (time.perf_counter() - start) * 1e3
        del image
        if repeat:
            walls.append(wall_ms)
            last = pool.last_reports
            device_ms.append(max(sum(c.duration_ms for c in r.chunks) for r in last))
    shards, chunks = last[0].shards, len(last[0].chunks)
    peaks = [r.memory.peak_bytes for r in last]
    return Timing(
        case=case.name,
        ranks=len(pool.devices),
        latent_frames=case.latent[2],
        image_ms=statistics.median(walls),
        image_min_ms=min(walls),
        image_max_ms=max(walls),
        device_ms=statistics.median(device_ms),
        chunks=chunks,
        halo_bytes_a_chunk=max((s.halo_bytes for s in shards), default=0) / chunks,
        wait_ms_a_chunk=max((s.wait_ms for s in shards), default=0.0) / chunks,
        peak_bytes=None if None in peaks else max(peaks),
    )


def with_predictions(
    case: Case, timings: Sequence[Timing], emulated: Sequence[Emulated]
) -> list[Timing]:
    """`timings` of one case with speed-ups over one rank, and what model and emulation said."""
    one = next((t for t in timings if t.ranks == 1), None)
    if one is None:
        return list(timings)
    height, width = case.latent[3:]
    found = []
    for t in timings:
        model = predict(
            case.config, height, width, t.ranks, LINKS[0], one.device_ms / one.latent_frames,
            frames=-(-t.latent_frames // t.chunks),
        )  # fmt: skip
        twin = next((e for e in emulated if e.ranks == t.ranks), None)
        found.append(
            replace(
                t,
                speed_up=one.image_ms / t.image_ms,
                device_speed_up=one.device_ms / t.device_ms,
                model_speed_up=model.efficiency * t.ranks if t.ranks > 1 else 1.0,
                emulated_speed_up=None if twin is None else twin.efficiency * t.ranks,
            )
        )
    return found


# -- faults ---------------------------------------------------------------------------------------


class _AbsentRank(WorkerPool):
    """A pool whose last worker is never told to decode: the others wait in a collective."""

    def _send_all(self, command, by_rank=None, **arguments) -> None:
        if command != "decode":
            super()._send_all(command, by_rank, **arguments)
            return
        present, self._ranks = self._ranks, self._ranks[:-1]
        super()._send_all(command, by_rank, **arguments)
        self._ranks = present


def is_gone(pid: int) -> bool:
    """Whether no process has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def check_faults(devices: Sequence[str], vae: WanVAE, sizes: Sizes) -> list[Fault]:
    """Break decodes on the last rank; each time it must be named, and the next decode be right."""
    z, last, found = latent_of(sizes.faults), len(devices) - 1, []

    def attempt(name: str, pool: WorkerPool, hooks: Callable[[list[int]], dict], said: str) -> None:
        expected = pool.decode(vae, z, chunk_frames=1) if type(pool) is WorkerPool else None
        pids = pool.pids
        start = time.perf_counter()
        try:
            pool.decode(vae, z, chunk_frames=1, **hooks(pids))
            text, passed = "nothing: the decode went through", False
        except ShardingError as error:
            text = str(error)
            passed = said in text and error.rank == last and not pool.pids
        except DecodeCancelled as error:
            text, passed = str(error), said in str(error) and pool.pids == pids
        seconds = time.perf_counter() - start
        passed = passed and (said == "cancelled" or all(map(is_gone, pids)))
        if expected is not None:
            passed = passed and torch.equal(pool.decode(vae, z, chunk_frames=1), expected)
        found.append(Fault(len(devices), name, passed, seconds, text))

    def once(act: Callable[[list[int]], None]) -> Callable[[list[int]], dict]:
        """A progress callback that acts at the first chunk: the ranks are then in the next."""

        def hooks(pids: list[int]) -> dict:
            done: list[bool] = []

            def on_progress(*_) -> None:
                if not done:
                    done.append(True)
                    act(pids)

            return {"on_progress": on_progress}

        return hooks

    def cancel(pids: list[int]) -> dict:
        seen: list[int] = []
        return {"on_progress": lambda *_: seen.append(1), "should_stop": lambda: bool(seen)}

    kill = once(lambda pids: os.kill(pids[last], signal.SIGKILL))
    stop = once(lambda pids: os.kill(pids[last], signal.SIGSTOP))
    with WorkerPool(devices, timeout_s=sizes.timeout_s) as pool:
        attempt("a rank is killed within a chunk", pool, kill, "died (exit code -9)")
        attempt("a rank stops within a chunk", pool, stop, "does not answer")
        attempt("a cancel keeps the workers", pool, cancel, "cancelled")
    with _AbsentRank(devices, timeout_s=sizes.timeout_s) as pool:
        pool.check_wire()
        attempt("a rank never joins: time-out and abort", pool, lambda _: {}, "does not answer")
    return found


# -- the command ----------------------------------------------------------------------------------


def pick_ranks(text: str, devices: int) -> list[int]:
    """Counts from "1,2,4", or "all": 1, 2, 4, 8 as far as there are devices."""
    if text == "all":
        return [n for n in (1, 2, 4, 8) if n <= devices]
    counts = sorted({int(part) for part in text.split(",")})
    if not counts or counts[0] < 1 or counts[-1] > devices:
        raise ShardingError(
            f"--ranks {text}: expected counts from 1 to the {devices} devices of this machine"
        )
    return counts


@dataclass
class _Budget:
    """Seconds left of the limit; what did not fit in is listed."""

    until: float
    skipped: list[str] = field(default_factory=list)

    def allows(self, what: str, seconds: float) -> bool:
        if time.monotonic() + seconds <= self.until:
            return True
        self.skipped.append(what)
        return False


def run(
    counts: Sequence[int], device: torch.device, sizes: Sizes, repeats: int, limit_s: float
) -> Results:
    """All steps; see the module. `device` names the kind: ranks take its devices from 0 on."""
    budget, results = _Budget(time.monotonic() + limit_s), Results()
    reference = Reference(device)

    def devices(count: int) -> list[str]:
        return ["cpu"] * count if device.type == "cpu" else [f"cuda:{i}" for i in range(count)]

    def tell(what: str) -> None:
        print(f"{limit_s - (budget.until - time.monotonic()):6.0f} s  {what}", file=sys.stderr,
              flush=True)  # fmt: skip

    timings: dict[str, list[Timing]] = {case.name: [] for case in sizes.timed}
    for n in counts:
        if not budget.allows(f"correctness on {n} ranks, and all that follows", 60):
            break
        # One start of the workers for a count: for many GPUs it takes longer than the decodes.
        with WorkerPool(devices(n)) as pool:
            tell(f"correctness on {n} ranks")
            results.checks += check_correct(pool, reference, sizes)
            results.backends[n] = pool.backend if n > 1 else "one process"
            for case in sizes.timed if results.passed(n) else ():
                if budget.allows(f"time of {case.name} on {n} ranks", 30):
                    tell(f"time of {case.name} on {n} ranks")
                    vae = reference.vae(case.config)
                    timings[case.name].append(time_case(pool, vae, case, repeats))
    proven = [n for n in counts if n in results.backends]
    for case in sizes.timed if proven else ():
        several, emulated = [n for n in proven if n > 1], []
        if several and budget.allows(f"emulation of {case.name}", 20):
            tell(f"emulation of {case.name}")
            vae = reference.vae(case.config)
            emulated = emulate(vae, *case.latent[3:], several, LINKS[:1], repeats, case.latent[2])
        results.timings += with_predictions(case, timings[case.name], emulated)
    most = max(proven, default=1)
    if most > 1 and budget.allows(f"faults on {most} ranks", 8 * sizes.timeout_s):
        tell(f"faults on {most} ranks")
        results.faults += check_faults(devices(most), reference.vae(sizes.faults.config), sizes)
    results.skipped += budget.skipped
    return results


def main(argv: list[str] | None = None) -> int:
    """Run and write; 1 if a picture was wrong, a fault unnoticed, or nothing compared, else 0."""
    parser = argparse.ArgumentParser(
        prog="wan-vae bench --ranks", description="One decode over several devices."
    )
    parser.add_argument("--ranks", required=True, help="1,2,4 or all")
    parser.add_argument("--device", help="cuda or cpu (default: the best one here)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--limit-s", type=float, default=LIMIT_S,
        help=f"seconds for everything (default: {LIMIT_S:g}); a step that may not fit is left out "
        "and listed, and no step runs on ranks whose pictures were not compared",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="folder for ranks.md and ranks.json")
    args = parser.parse_args(argv)
    exact_float32()
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    device = torch.device("cuda", 0) if cuda else device
    counts = pick_ranks(args.ranks, torch.cuda.device_count() if cuda else os.cpu_count() or 1)
    start = time.monotonic()
    results = run(
        counts, device, full_sizes() if cuda else small_sizes(), args.repeats, args.limit_s
    )
    words = sys.argv[2:] if argv is None else argv
    results.facts = {
        "command": repeatable(words),
        "device": device_name(device),
        "devices": str(max(counts)),
        "seconds": f"{time.monotonic() - start:.0f}",
        **{k: v for k, v in versions().items() if v},
    }
    text = markdown(results)
    print(text)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "ranks.md").write_text(text, encoding="utf-8")
        (args.output / "ranks.json").write_text(
            json.dumps(asdict(results), indent=1), encoding="utf-8"
        )
    return 0 if results.all_good and results.backends else 1
