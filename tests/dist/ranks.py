"""Real processes that are ranks of a Gloo group, started once for the whole test session.

The parent sends jobs (a function of `jobs` by name, and its arguments) over pipes and gets results
back; the ranks talk to one another only through torch.distributed on the loopback interface.
"""

from __future__ import annotations

import os
import traceback
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

from tests.conftest import PATIENCE_S

RANKS = 4
LOOPBACK = "lo" if os.name == "posix" and os.uname().sysname == "Linux" else "lo0"


def _serve(rank: int, rendezvous: str, pipe) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    import torch
    import torch.distributed as dist

    from tests.dist import jobs

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # for jobs that ask for our kernels
    torch.set_num_threads(1)
    patience = timedelta(seconds=PATIENCE_S)
    dist.init_process_group("gloo", f"file://{rendezvous}", patience, RANKS, rank)
    groups = {n: dist.new_group(list(range(n))) for n in range(2, RANKS + 1)}
    while (job := pipe.recv()) is not None:
        name, ranks, arguments = job
        try:
            pipe.send((True, getattr(jobs, name)(rank, ranks, groups[ranks], **arguments)))
        except Exception as error:  # the test sees it: type, text, traceback
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))


class RankFailed(Exception):
    """A job raised on a rank; `errors` maps rank -> (type, message, traceback)."""

    def __init__(self, errors):
        super().__init__("\n".join(f"rank {r}: {e[0]}: {e[1]}\n{e[2]}" for r, e in errors.items()))
        self.errors = errors


class Ranks:
    """The processes; `run` gives a job to the first n of them and collects the results."""

    def __init__(self, folder: Path):
        context = get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, str(folder / "rendezvous"), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, job: str, ranks: int, **arguments) -> list:
        """Results of `jobs.job(rank, ranks, group, **arguments)` in rank order."""
        pipes = self.pipes[:ranks]
        for pipe in pipes:
            pipe.send((job, ranks, arguments))
        results, errors = {}, {}
        while len(results) + len(errors) < ranks:
            left = [p for r, p in enumerate(pipes) if r not in results and r not in errors]
            ready = wait(left, PATIENCE_S)
            assert ready, f"ranks {[pipes.index(p) for p in left]} gave no result of {job}"
            for pipe in ready:
                good, value = pipe.recv()
                (results if good else errors)[pipes.index(pipe)] = value
        if errors:
            raise RankFailed(errors)
        return [results[r] for r in range(ranks)]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(PATIENCE_S)
            assert process.exitcode == 0, f"rank process ended with {process.exitcode}"
