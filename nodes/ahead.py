"""Compiles kernels while a prompt waits and samples, so that its first decode need not; and gets
this process ready for them.

As soon as a prompt with one of our nodes is queued, a process of low priority compiles for the card
and the VAE; see `wan_vae/workers/ahead.py`. `WAN_VAE_AHEAD=0` switches it off.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import comfy.model_management as model_management
import folder_paths
import torch
from server import PromptServer

from ..wan_vae import BackendError, WanVAEConfig
from ..wan_vae.device import DTYPES, dtype_name
from ..wan_vae.kernels import registry
from ..wan_vae.kernels.device import Device
from ..wan_vae.kernels.proof.cache import environment
from ..wan_vae.options import Part
from ..wan_vae.runs.ahead import AheadJob, get_ready, jobs_of_work
from ..wan_vae.workers.ahead import BUSY, AheadCompiler, Ended
from .queued import wishes

SWITCH = "WAN_VAE_AHEAD"
# Where a VAE's file may lie.
_FOLDERS = ("vae", "checkpoints")
# The order in which ComfyUI chooses for a Wan VAE.
_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _tell(ended: Ended) -> None:
    count = sum(len(outcome["wanted"]) for outcome in ended.outcomes)
    seconds = sum(outcome["seconds"] for outcome in ended.outcomes)
    if ended.code == 0 and count:
        logging.info("Wan VAE: %d kernels are compiled ahead (%.0f s)", count, seconds)
    elif ended.code not in (0, BUSY) and ended.said:
        logging.info("Wan VAE: no kernels were compiled ahead: %s", ended.said)


# Outlives a prompt, as COPIES does. Its process ends with this one.
COMPILER = AheadCompiler(_tell)


class Readiness:
    """This process gets ready for its first decode, in a thread, once; see `runs.ahead.get_ready`.

    Importing a family and hashing a compiler take 1 to 2 seconds, which a sampler does not notice.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def begin(self, device: torch.device) -> None:
        """Start the thread, unless it was; returns at once."""
        if self._thread is not None:
            return
        try:
            card, known = Device.chosen_for(device), environment(device)
        except BackendError:
            return  # of what the environment says of the card: the node will say so
        name = "wan_vae_get_ready"
        self._thread = threading.Thread(
            target=get_ready, args=(card, known), name=name, daemon=True
        )
        self._thread.start()


READINESS = Readiness()


def on_prompt(data: dict[str, Any]) -> dict[str, Any]:
    """For `PromptServer.add_on_prompt_handler`: looks at a prompt, and changes nothing in it."""
    wanted, device = wishes(data.get("prompt"), _path_of), model_management.vae_device()
    if wanted:
        READINESS.begin(device)
    if os.environ.get(SWITCH) != "0":
        for wish in wanted:
            ask(wish.file, device, wish.precision, wish.parts, wish.images_first)
    return data


def ask(
    source: str | WanVAEConfig,
    device: torch.device,
    precision: str,
    parts: Sequence[Part],
    images_first: bool = False,
) -> None:
    """Have the kernels of a VAE (its file, or what it is) compiled for `device`, if there are any.

    Returns at once.
    """
    if precision not in ("auto", *DTYPES):
        return  # the node will say so
    try:
        card = Device.chosen_for(device)
        # Not the families: that would import them, in the thread of the server.
        if registry.auto_reason(card) is not None:
            return
        known = environment(device)
    except BackendError:
        return  # of what the environment says of the card: the node will say so
    if precision == "auto":
        dtype = model_management.vae_dtype(device, _DTYPES)
    else:
        dtype = DTYPES[precision]
    work = jobs_of_work(parts, images_first)
    COMPILER.ask(AheadJob(source, card, dtype_name(dtype), known, work))


def _path_of(name: str) -> str | None:
    for folder in _FOLDERS:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return str(path)
    return None


def add_handler() -> None:
    """Look at each prompt that is queued. Without a server (a tool that lists nodes), at none."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(on_prompt)
