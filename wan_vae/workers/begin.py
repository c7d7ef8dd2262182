"""How a worker's process begins: it imports PyTorch while it waits to hear which rank it is.

Started by `launch.spawn` as `python -c "..."`, not by multiprocessing's spawn, which would import
the main module of the parent again: in ComfyUI that is a second server. Only plain values cross the
pipe. Ends when the pipe closes (the parent is gone) or on "stop".

PyTorch takes seconds to import, so nothing here imports it before a second thread reads the pipe.
That thread ends the process as soon as nobody wants it. Told its rank, it joins the others once
PyTorch is there, while the main thread imports what a run needs, and reads the weights.
"""

from __future__ import annotations

import ctypes
import gc
import os
import queue
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from .pipe import Commands, PipeEnd


def main(handle: int) -> None:
    """Serve until told to stop. `handle` is this end of the pipe, inherited from the parent."""
    pipe: PipeEnd[Any, Any] = PipeEnd(handle)
    commands: Commands = queue.SimpleQueue()
    imported: Future[float] = Future()
    threading.Thread(target=_hear, args=(pipe, commands, imported), daemon=True).start()
    # Modules are no garbage. To look for some among 250000 new objects, again and again, takes a
    # tenth of the time of the imports; and later a tenth of a second in the middle of a run.
    gc.disable()
    import torch  # noqa: F401

    imported_s = time.monotonic()
    # Before the other thread needs it: two threads that import modules of ours may wait for each
    # other.
    from . import joining  # noqa: F401

    imported.set_result(imported_s)
    from .worker import serve

    gc.freeze()
    gc.enable()
    serve(pipe, commands)
    # All is closed. Python would take a second to let go of what PyTorch has imported, and whoever
    # ends a worker waits, because the memory of its device is wanted.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # without a console there is none
            stream.flush()
    os._exit(0)


def _hear(pipe: PipeEnd[Any, Any], commands: Commands, imported: Future[float]) -> None:
    """Read the first message, which says which rank this is, and join the others.

    imported: when PyTorch was, by `time.monotonic`. The clock is that of the machine, equal in all
    of its processes.
    """
    message: tuple[str, Any] = "stop", None
    with suppress(EOFError, OSError):  # the parent is gone
        message = pipe.recv()
    kind, settings = message
    if kind == "stop":
        os._exit(0)
    context = threading.Thread(target=take_context, args=(settings["device"],), daemon=True)
    if settings["has_nvidia_driver"]:
        context.start()  # while PyTorch is imported
    imported_s = imported.result()
    from .joining import WorkerSettings, join

    # From now on the parent copies the weights.
    pipe.send(("began", imported_s))
    if settings["has_nvidia_driver"]:
        context.join()
    commands.put((kind, settings))
    joined = None
    try:
        joined = join(WorkerSettings(**settings))
    finally:
        commands.put(("joined", joined))


def take_context(device: str) -> None:
    """Have NVIDIA's driver make the context of `device` ("cuda:1"), which PyTorch then finds.

    Takes a part of a second, in which others hold Python's lock. What fails here fails in PyTorch
    too, which says why.
    """
    index, number, context = int(device.partition(":")[2] or 0), ctypes.c_int(), ctypes.c_void_p()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(number), index) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)
