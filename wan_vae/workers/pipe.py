"""The pipe between a worker and its parent, whose class depends on the system."""

from __future__ import annotations

import queue
import sys
from collections.abc import Mapping
from multiprocessing.connection import wait
from typing import Any, TypeVar

if sys.platform == "win32":
    from multiprocessing.connection import PipeConnection as PipeEnd
else:
    from multiprocessing.connection import Connection as PipeEnd

__all__ = ["Commands", "PipeEnd", "ready_of"]

# What a worker's main thread works through: the settings, commands of the parent, and in their
# midst ("joined", `joining.Joined`), or None for a thread that failed.
Commands = queue.SimpleQueue[tuple[str, Any]]

T = TypeVar("T")


def ready_of(pipes: Mapping[PipeEnd[Any, Any], T], seconds: float) -> list[PipeEnd[Any, Any]]:
    """Those of `pipes` that have a message or were closed, waited for at most `seconds`."""
    ready = set(wait(list(pipes), seconds))
    return [pipe for pipe in pipes if pipe in ready]
