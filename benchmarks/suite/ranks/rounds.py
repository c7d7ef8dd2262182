"""Faults, counted: every kind for many rounds, unattended. `wan-vae bench faults`.

Each one must end as docs/sharding.md says, within its time; nothing may stay behind (no process, no
file, no shared memory), and the next decode must have the bits of the one before.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.suite.ballast import Ballast
from benchmarks.suite.facts import Facts, repeatable
from benchmarks.suite.ranks import faults
from benchmarks.suite.ranks.cases import full_sizes, small_sizes
from benchmarks.suite.ranks.correct import exact_float32
from benchmarks.suite.ranks.results import Fault
from benchmarks.suite.weights import random_vae
from wan_vae.errors import ShardingError
from wan_vae.hooks import Hooks
from wan_vae.pipeline import WanVAE
from wan_vae.workers.pool import WorkerPool
from wan_vae.workers.shared import default_folders

SCHEMA = "wan_vae.bench.faults/1"
# What a fault may take beyond the time-out: the grace of the parent, and the end of the processes.
_SLACK_S = 10.0


@dataclass
class Counted:
    """All rounds of one kind of fault. said: what was said, and how often."""

    name: str
    rounds: int = 0
    right: int = 0
    seconds: list[float] = field(default_factory=list)
    next_s: list[float] = field(default_factory=list)
    said: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, fault: Fault, left: Sequence[str], next_s: float, is_right: bool) -> None:
        """Count one round. left: what stayed behind. next_s, is_right: of the next decode."""
        self.rounds += 1
        self.seconds.append(fault.seconds)
        self.next_s.append(next_s)
        self.said[fault.said] = self.said.get(fault.said, 0) + 1
        if not fault.passed:
            self.wrong.append(f"round {self.rounds}: {fault.said} after {fault.seconds:.1f} s")
        if left:
            self.wrong.append(f"round {self.rounds}: left behind: {', '.join(left)}")
        if not is_right:
            self.wrong.append(f"round {self.rounds}: the next decode was wrong")
        self.right += fault.passed and not left and is_right


if sys.platform != "win32":
    import resource

    class Ground:
        """Where the faults are planted: two devices or more, a VAE, and folders of their own."""

        def __init__(self, devices: Sequence[str], on_cpu: bool, folder: Path) -> None:
            sizes = small_sizes() if on_cpu else full_sizes()
            self.devices, self.on_cpu, self.folder = list(devices), on_cpu, folder
            # A busy CPU keeps a rank waiting for seconds.
            self.timeout_s = max(10.0, sizes.timeout_s)
            self.config = sizes.faults.config
            self.vae = random_vae(self.config, torch.device("cpu" if on_cpu else "cuda:0"))
            self.z = sizes.faults.random_latent()
            self.shared = folder / "shared"
            self.shared.mkdir()
            self.pool = self.new_pool()
            self.expected = self.decode(self.pool)

        def new_pool(self, kind: type[WorkerPool] = WorkerPool) -> WorkerPool:
            return kind(self.devices, timeout_s=self.timeout_s, shared_folders=[self.shared])

        def decode(self, pool: WorkerPool) -> torch.Tensor:
            # A copy: the result of a pool keeps its memory.
            return pool.decode(self.vae, self.z, chunk_frames=1).clone()

        def attempt(self, attempt: faults.Attempt, z: torch.Tensor | None = None) -> Fault:
            return attempt.run(self.pool, self.vae, self.z if z is None else z)

        def left_behind(self) -> list[str]:
            """Files of pools whose workers are gone, and memory of theirs that is still mapped."""
            found = [str(path) for path in self.folder.rglob("*") if path != self.shared]
            if self.pool.pids:  # the file where they met stays as long as they
                found = [path for path in found if "wan_vae_ranks_" not in path]
            maps = Path("/proc/self/maps")
            if maps.is_file() and not self.pool.pids:
                lines = maps.read_text().splitlines()
                found += [line.split()[-2] for line in lines if f"{self.shared}/" in line]
            return found

    def _out_of_memory(ground: Ground) -> Fault:
        """On a GPU another process takes the memory; on the CPU the system gives no more."""
        last = len(ground.devices) - 1
        if not ground.on_cpu:

            @contextmanager
            def full(_: list[int]) -> Iterator[Hooks]:
                with Ballast(0.25, ground.devices[last]):
                    yield Hooks()

            frames = ground.z.shape[2]
            attempt = faults.Attempt(
                "a rank is out of memory", full, "is out of memory", chunk_frames=frames
            )
            return ground.attempt(attempt)

        def starve(pid: int) -> None:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + (16 << 20)
            resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))

        act = faults.at_first_chunk(starve, last)
        large = torch.randn((1, ground.config.z_dim, 9, 32, 48))
        return ground.attempt(
            faults.Attempt("a rank is out of memory", act, "is out of memory"), large
        )

    def _no_room(ground: Ground) -> Fault:
        """A limit on the size of files stands for a full /dev/shm."""

        @contextmanager
        def limited(_: list[int]) -> Iterator[Hooks]:
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
            try:
                yield Hooks()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        attempt = faults.Attempt("shared memory is full", limited, "no room for", blames_last=False)
        # Larger than the memory of the run before, which would be used again.
        return ground.attempt(attempt, ground.z.repeat(3, 1, 1, 1, 1))

    def _absent(ground: Ground) -> Fault:
        with ground.new_pool(faults.AbsentRank) as pool:
            pool.check_wire()
            return faults.ABSENT.run(pool, ground.vae, ground.z)

    def _parent_killed(ground: Ground) -> Fault:
        """A program of its own, killed in the middle of its decode: its workers must end."""
        code = (
            "import sys, torch; from pathlib import Path; "
            "from benchmarks.suite.ranks.rounds import Ground; "
            "ground = Ground(sys.argv[3:], sys.argv[2] == 'cpu', Path(sys.argv[1])); "
            "print(*ground.pool.pids, flush=True); "
            "[ground.decode(ground.pool) for _ in range(1000)]"
        )
        folder = Path(tempfile.mkdtemp(dir=ground.folder))
        where = "cpu" if ground.on_cpu else "cuda"
        parent = subprocess.Popen(
            [sys.executable, "-c", code, str(folder), where, *ground.devices],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        ends = [os.pidfd_open(pid) for pid in pids]
        start = time.perf_counter()
        parent.kill()
        parent.wait()
        gone = [bool(select.select([end], [], [], _SLACK_S)[0]) for end in ends]
        seconds = time.perf_counter() - start
        for end in ends:
            os.close(end)
        said = f"{sum(gone)} of {len(ground.devices)} workers ended"
        # What a killed program leaves in its own folders: a name, and no memory.
        shared = list((folder / "shared").iterdir())
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
        if shared:
            said += f"; shared memory stayed: {len(shared)} files"
        passed = len(gone) == len(ground.devices) and all(gone) and not shared
        return Fault(len(ground.devices), "the parent is killed", passed, seconds, said)

    def _two_pools(ground: Ground) -> Fault:
        """Two pools on the same devices decode at the same time: both are right."""
        results: list[torch.Tensor] = []
        start = time.perf_counter()
        with ground.new_pool() as other:
            other_vae = WanVAE(ground.vae.model)
            threads = [
                threading.Thread(target=lambda: results.append(ground.decode(ground.pool))),
                threading.Thread(
                    target=lambda: results.append(
                        other.decode(other_vae, ground.z, chunk_frames=1).clone()
                    )
                ),
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        right = [torch.equal(result, ground.expected) for result in results]
        seconds = time.perf_counter() - start
        said = f"{sum(right)} of {len(threads)} decodes are right"
        return Fault(len(ground.devices), "two pools at once", right == [True] * 2, seconds, said)

    def kinds(ranks: int) -> dict[str, Callable[[Ground], Fault]]:
        """Every kind of fault by its name."""
        last = ranks - 1
        return {
            "killed": lambda ground: ground.attempt(faults.killed(last)),
            "stopped": lambda ground: ground.attempt(faults.stopped(last)),
            "memory": _out_of_memory,
            "cancel": lambda ground: ground.attempt(faults.CANCEL),
            "abort": _absent,
            "room": _no_room,
            "parent": _parent_killed,
            "pools": _two_pools,
        }

    def count(
        ground: Ground, names: Sequence[str], rounds: int, limit_s: float
    ) -> dict[str, Counted]:
        """All kinds in turn, round after round, until the rounds or the time are over."""
        found: dict[str, Counted] = {}
        until = time.monotonic() + limit_s
        for number in range(rounds):
            for name in names:
                if time.monotonic() > until:
                    return found
                print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
                fault = kinds(len(ground.devices))[name](ground)
                if fault.seconds > ground.timeout_s + _SLACK_S and name != "pools":
                    fault = replace(fault, passed=False, said=f"{fault.said}; too late")
                # The folder's name is another in each run.
                fault = replace(fault, said=fault.said.replace(str(ground.folder), "FOLDER"))
                left = ground.left_behind()
                start = time.perf_counter()
                right = torch.equal(ground.decode(ground.pool), ground.expected)
                next_s = time.perf_counter() - start
                found.setdefault(name, Counted(fault.name)).add(fault, left, next_s, right)
        return found


def faults_markdown(found: Sequence[Counted], facts: Facts, transport: str, devices: int) -> str:
    """The counts as Markdown."""
    lines = [
        "# Faults in decodes over several devices, counted",
        "",
        *facts.lines(),
        f"- devices: {devices}, transport {transport}",
        "- right: it ended as documented and in time, nothing was left behind (no process, file or",
        "  shared memory), and the next decode had the bits of the first",
        "- seconds: until the error (or the end), and of the next decode with the start of workers",
        "",
        "| fault | rounds | right | seconds, median (longest) | next decode, s | said |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for one in found:
        often = sorted(one.said, key=one.said.__getitem__, reverse=True)
        said = "; ".join(f"{text} ({one.said[text]})" for text in often[:2])
        lines.append(
            f"| {one.name} | {one.rounds} | {one.right} | {statistics.median(one.seconds):.1f} "
            f"({max(one.seconds):.1f}) | {statistics.median(one.next_s):.1f} | {said} |"
        )
    lines += [f"- **{one.name}**: {text}" for one in found for text in one.wrong]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Count and write; 1 if a round was not right."""
    parser = argparse.ArgumentParser(
        prog="wan-vae bench faults",
        description="Faults planted in decodes over several devices, counted, unattended.",
    )
    parser.add_argument("--devices", default="0,1", help="0,1 (default) or cpu,cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--limit-s", type=float, default=3600.0, help="seconds for everything")
    parser.add_argument("--only", nargs="*", help="these kinds (default: all of them)")
    parser.add_argument("--output", type=Path, help="folder for faults.md and faults.json")
    args = parser.parse_args(argv)
    if sys.platform == "win32":
        print(f"faults: {faults.unavailable_reason()}", file=sys.stderr)
        return 1
    on_cpu = args.devices.startswith("cpu")
    devices = [f"cuda:{d}" if d.strip().isdigit() else d.strip() for d in args.devices.split(",")]
    known = kinds(len(devices))
    names = args.only or list(known)
    if unknown := set(names) - set(known):
        raise ShardingError(f"--only {' '.join(sorted(unknown))}: expected {', '.join(known)}")
    exact_float32()
    facts = Facts.begin(SCHEMA, repeatable(["faults", *argv]), torch.device(devices[0]))
    # Folders of its own: what stays in them is ours.
    base = next(folder for folder in default_folders() if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix="wan_vae_faults_", dir=base) as folder:
        before, tempfile.tempdir = tempfile.tempdir, folder
        try:
            ground = Ground(devices, on_cpu, Path(folder))
            with ground.pool:
                found = list(count(ground, names, args.rounds, args.limit_s).values())
        finally:
            tempfile.tempdir = before
    text = faults_markdown(found, facts, ground.pool.transport, len(devices))
    print(text)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "faults.md").write_text(text, encoding="utf-8")
        data = {
            **facts.as_dict(),
            "devices": len(devices),
            "transport": ground.pool.transport,
            "faults": [asdict(one) for one in found],
        }
        (args.output / "faults.json").write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    return 1 if not found or any(one.right < one.rounds for one in found) else 0
