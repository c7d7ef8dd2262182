"""The pipe between a worker and its parent, whose class depends on the system."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from multiprocessing.connection import wait
from typing import Any, TypeVar

if sys.platform == "win32":
    from multiprocessing.connection import PipeConnection as PipeEnd
else:
    from multiprocessing.connection import Connection as PipeEnd

__all__ = ["PipeEnd", "ready_of"]

T = TypeVar("T")


def ready_of(pipes: Mapping[PipeEnd[Any, Any], T], seconds: float) -> list[PipeEnd[Any, Any]]:
    """Those of `pipes` that have a message or were closed, waited for at most `seconds`."""
    ready = set(wait(list(pipes), seconds))
    return [pipe for pipe in pipes if pipe in ready]
