"""Faults, counted: every kind for many rounds, unattended. `wan-vae bench faults`.

Each one must end as docs/sharding.md says, within its time; nothing may stay behind (no process, no
file, no shared memory), and the next decode must have the bits of the one before. `--at-once` lets
several processes share the rounds (`at_once.py`): most of a round is waiting.
"""

from __future__ import annotations

import argparse
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.suite.ballast import Ballast
from benchmarks.suite.facts import Facts, repeatable
from benchmarks.suite.ranks import faults
from benchmarks.suite.ranks.at_once import Share, run_children
from benchmarks.suite.ranks.cases import full_sizes, small_sizes
from benchmarks.suite.ranks.correct import exact_float32
from benchmarks.suite.ranks.counted import Counted, Counts
from benchmarks.suite.ranks.results import Fault
from benchmarks.suite.weights import random_vae
from wan_vae.errors import ShardingError
from wan_vae.hooks import Hooks
from wan_vae.pipeline import WanVAE
from wan_vae.workers.pool import WorkerPool
from wan_vae.workers.shared import default_folders

SCHEMA = "wan_vae.bench.faults/1"
# How long a rank may be silent in a pool of this process alone, where nothing else is busy.
_TIMEOUT_S = 10.0
# As WorkerPool has it by itself, and docs/sharding.md: a busy machine keeps a rank waiting.
DOCUMENTED_S = 30.0
_ROOT = Path(__file__).resolve().parents[3]


if sys.platform != "win32":
    import resource

    class Ground:
        """Where the faults are planted: two devices or more, a VAE, and folders of their own."""

        def __init__(
            self, devices: Sequence[str], on_cpu: bool, folder: Path, timeout_s: float
        ) -> None:
            sizes = small_sizes() if on_cpu else full_sizes()
            self.devices, self.on_cpu, self.folder = list(devices), on_cpu, folder
            self.timeout_s = timeout_s
            self.config = sizes.faults.config
            self.vae = random_vae(self.config, torch.device("cpu" if on_cpu else "cuda:0"))
            self.z = sizes.faults.random_latent()
            self.shared = folder / "shared"
            self.shared.mkdir()
            self.pool = self.new_pool()
            self.expected = self.decode(self.pool)

        @property
        def limit_s(self) -> float:
            """What a fault may take: the time-out, and as long again until processes are gone.

            That is the parent's grace of 2 s and the end of each process, for which a machine that
            may keep a rank waiting for the time-out may take as long.
            """
            return 2 * self.timeout_s

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

        attempt = faults.Attempt("shared memory is full", limited, "no room for", blamed=0)
        # Larger than the memory of the run before, which would be used again.
        return ground.attempt(attempt, ground.z.repeat(3, 1, 1, 1, 1))

    def _absent(ground: Ground) -> Fault:
        with ground.new_pool(faults.AbsentRank) as pool:
            pool.check_wire()
            # They get the weights and choose kernels before the clock runs: it is for the time-out.
            pool.plan(ground.vae, ground.z.shape, chunk_frames=1)
            return faults.ABSENT.run(pool, ground.vae, ground.z)

    def decode_until_killed(argv: Sequence[str]) -> None:
        """The program that `_parent_killed` kills: says who its workers are, and decodes.

        argv: its folder, "cpu" or "cuda", the time-out, and the devices.
        """

        def end_with_parent() -> None:
            sys.stdin.read()
            os._exit(1)

        # Its parent may be ended, too.
        threading.Thread(target=end_with_parent, daemon=True).start()
        folder, where, timeout_s, *devices = argv
        ground = Ground(devices, where == "cpu", Path(folder), float(timeout_s))
        print(*ground.pool.pids, flush=True)
        while True:
            ground.decode(ground.pool)

    def _parent_killed(ground: Ground) -> Fault:
        """A program of its own, killed in the middle of its decode: its workers must end."""
        code = (
            "import sys; from benchmarks.suite.ranks.rounds import decode_until_killed; "
            "decode_until_killed(sys.argv[1:])"
        )
        folder = Path(tempfile.mkdtemp(dir=ground.folder))
        where = "cpu" if ground.on_cpu else "cuda"
        words = [str(folder), where, str(ground.timeout_s), *ground.devices]
        parent = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        ends = [os.pidfd_open(pid) for pid in pids]
        start = time.perf_counter()
        parent.kill()
        parent.wait()
        # Without a time-out: they notice it. As long as processes may take to be gone.
        until = start + ground.timeout_s
        gone = [
            bool(select.select([end], [], [], max(0.0, until - time.perf_counter()))[0])
            for end in ends
        ]
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
        ground: Ground, counts: Counts, limit_s: float, after: Callable[[], None] = lambda: None
    ) -> None:
        """All kinds that `counts` wants, in turn, round after round, until they or the time are
        over. after: called after each round of a kind."""
        until = time.monotonic() + limit_s
        for number in range(1, max(counts.wanted.values()) + 1):
            for kind in [kind for kind, rounds in counts.wanted.items() if number <= rounds]:
                if time.monotonic() > until:
                    return
                # What comes of it follows in this line, so that a run that ends here says where.
                print(f"round {number}, {kind}: ", end="", file=sys.stderr, flush=True)
                what = _one_round(ground, kind, counts)
                after()
                print(what, file=sys.stderr, flush=True)

    def _one_round(ground: Ground, kind: str, counts: Counts) -> str:
        """Count one round; what came of it in words."""
        fault = kinds(len(ground.devices))[kind](ground)
        if fault.seconds > ground.limit_s and kind != "pools":
            fault = replace(fault, passed=False, said=f"{fault.said}; too late")
        # The folder's name is another in each run.
        fault = replace(fault, said=fault.said.replace(str(ground.folder), "FOLDER"))
        left = ground.left_behind()
        start = time.perf_counter()
        is_right = torch.equal(ground.decode(ground.pool), ground.expected)
        next_s = time.perf_counter() - start
        one = counts.found.setdefault(kind, Counted(fault.name))
        word = "right" if one.add(fault, left, next_s, is_right) else "WRONG"
        return f"{word}, {fault.seconds:.1f} s, next decode {next_s:.1f} s: {fault.said}"

    def _count_here(
        counts: Counts, args: argparse.Namespace, devices: Sequence[str], folder: Path
    ) -> None:
        """Count in this process; --output has the page after each round."""

        def keep() -> None:
            if args.output is not None:
                counts.write(args.output)

        exact_float32()
        before, tempfile.tempdir = tempfile.tempdir, str(folder)
        try:
            ground = Ground(devices, _on_cpu(args), folder, counts.timeout_s)
            counts.transport = ground.pool.transport
            with ground.pool:
                count(ground, counts, args.limit_s, keep)
        finally:
            tempfile.tempdir = before
        counts.is_done = True
        keep()


def _on_cpu(args: argparse.Namespace) -> bool:
    return str(args.devices).startswith("cpu")


def _count_at_once(counts: Counts, args: argparse.Namespace, folder: Path) -> None:
    """Count in processes that run this command without --at-once."""

    def command(share: Share, left_s: float, output: Path, temporary: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "wan_vae", "bench", "faults", "--devices", args.devices),
            *("--rounds", str(share.rounds), "--limit-s", f"{left_s:.1f}"),
            *("--timeout-s", f"{counts.timeout_s:g}", "--folder", str(temporary)),
            *("--output", str(output), "--only", *share.kinds),
        ]

    run_children(counts, command, folder, args.limit_s, args.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wan-vae bench faults",
        description="Faults planted in decodes over several devices, counted, unattended.",
        epilog="With --output, faults.md and faults.json are written again after each round.",
    )
    parser.add_argument("--devices", default="0,1", help="0,1 (default) or cpu,cpu")
    parser.add_argument("--rounds", type=int, default=20, help="of each kind (default: 20)")
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the rounds on the same devices; after them one alone does those "
        "of `memory` (default: 1)",
    )
    parser.add_argument("--limit-s", type=float, default=3600.0, help="seconds for everything")
    parser.add_argument(
        "--timeout-s",
        type=float,
        help="how long a rank may be silent; a fault may take twice as long (default: "
        f"{_TIMEOUT_S:g}; with --at-once {DOCUMENTED_S:g}, as a pool has by itself)",
    )
    parser.add_argument("--only", nargs="*", help="these kinds (default: all of them)")
    parser.add_argument("--folder", type=Path, help="for files while it runs (default: /dev/shm)")
    parser.add_argument("--output", type=Path, help="folder for faults.md and faults.json")
    return parser


def main(argv: Sequence[str]) -> int:
    """Count and write; 1 if a round was not right."""
    args = _parser().parse_args(argv)
    if sys.platform == "win32":
        print(f"faults: {faults.unavailable_reason()}", file=sys.stderr)
        return 1
    devices = [f"cuda:{d}" if d.strip().isdigit() else d.strip() for d in args.devices.split(",")]
    known = kinds(len(devices))
    names = args.only or list(known)
    if unknown := set(names) - set(known):
        raise ShardingError(f"--only {' '.join(sorted(unknown))}: expected {', '.join(known)}")
    if args.rounds < 1 or args.at_once < 1:
        raise ShardingError("--rounds and --at-once: expected 1 or more")
    timeout_s = args.timeout_s or (_TIMEOUT_S if args.at_once == 1 else DOCUMENTED_S)
    counts = Counts(
        Facts.begin(SCHEMA, repeatable(["faults", *argv]), torch.device(devices[0])),
        len(devices),
        dict.fromkeys(names, args.rounds),
        timeout_s,
        args.at_once,
    )
    # Folders of its own: what stays in them is ours.
    base = args.folder or next(folder for folder in default_folders() if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix="wan_vae_faults_", dir=base) as name:
        if args.at_once > 1:
            _count_at_once(counts, args, Path(name))
        else:
            _count_here(counts, args, devices, Path(name))
    print(counts.markdown())
    return 0 if counts.is_right else 1
