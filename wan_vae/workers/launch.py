"""Starting a worker process, and the pipe to it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ShardingError
from ..said import said
from ..sharding.transport import group_environment
from .joining import WorkerSettings
from .pipe import PipeEnd

# Both names that PyTorch reads.
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@dataclass
class WorkerProcess:
    """A worker as its parent sees it."""

    rank: int
    device: torch.device
    process: subprocess.Popen[bytes]
    pipe: PipeEnd[Any, Any]

    @property
    def name(self) -> str:
        return said("worker.name", "rank {rank} ({device})", rank=self.rank, device=self.device)


def spawn(rank: int, device: torch.device) -> WorkerProcess:
    """Start the process of one worker with an inherited pipe. It imports, and waits for `settle`.

    It takes no device memory until then. Raises ShardingError if the system refuses.
    """
    ours, theirs = multiprocessing.Pipe()
    handle = theirs.fileno()
    package = __package__.rpartition(".")[0]
    library = Path(__file__).parents[1]
    # The package by its folder's name, from its own parent folder: inside ComfyUI, ours is a
    # sub-package of a folder whose name is not importable.
    code = (
        f"import sys; sys.path.insert(0, {str(library.parent)!r}); "
        f"from {library.name}.workers.begin import main; main({handle})"
    )
    environment = worker_environment(os.environ)
    inherit: dict[str, Any] = {"pass_fds": (handle,)}
    if sys.platform == "win32":
        os.set_handle_inheritable(handle, True)
        startup = subprocess.STARTUPINFO(lpAttributeList={"handle_list": [handle]})
        inherit = {"startupinfo": startup, "creationflags": subprocess.CREATE_NO_WINDOW}
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            env=environment,
            **inherit,
        )
    except OSError as error:
        raise ShardingError(
            said(
                "worker.not_started",
                "rank {rank} ({device}) of {package} cannot start: {error}",
                rank=rank,
                device=device,
                package=package,
                error=error,
            ),
            rank=rank,
        ) from error
    finally:
        theirs.close()
    return WorkerProcess(rank, device, process, ours)


def settle(worker: WorkerProcess, settings: WorkerSettings) -> None:
    """Tell a new process which rank it is: it takes its device and joins the others."""
    try_send(worker.pipe, ("settings", asdict(settings)))


def worker_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of a worker, from those of this process.

    ComfyUI has PyTorch allocate by cudaMallocAsync. In a worker, where NCCL reads memory on a
    stream of its own, that waits at each message; PyTorch's own allocator does not.
    """
    # As PyTorch sets it before it asks the driver for anything, which `begin` does before PyTorch.
    found = {"CUDA_MODULE_LOADING": "LAZY", **ours, **group_environment()}
    for name in _ALLOCATOR_VARIABLES:
        items = [item for item in found.pop(name, "").split(",") if item.strip()]
        kept = [item for item in items if item.strip() != "backend:cudaMallocAsync"]
        if kept:
            found[name] = ",".join(kept)
    return found


def try_send(pipe: PipeEnd[Any, Any], message: tuple[str, Any]) -> None:
    """Send; a worker that is gone is noticed where its answer is awaited."""
    try:
        pipe.send(message)
    except (BrokenPipeError, ConnectionResetError):
        return


def receive(rank: WorkerProcess) -> tuple[str, Any]:
    """One message of a worker; its end is an error message too."""
    try:
        message: tuple[str, Any] = rank.pipe.recv()
        return message
    except (EOFError, ConnectionResetError):
        code = rank.process.wait()
        text = said("worker.exit_code", "exit code {code}", code=code)
        return "error", {"kind": "died", "text": text, "rank": rank.rank}
