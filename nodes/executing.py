"""The node that ComfyUI executes now: a VAE that works inside another node reports for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from server import PromptServer


@dataclass(frozen=True)
class Executing:
    """What ComfyUI gives a node that asks for its hidden inputs, for one that did not ask.

    `unique_id` is None where no node is executed.
    """

    unique_id: str | None
    dynprompt: Any
    extra_pnginfo: Any


def executing_node() -> Executing:
    """The node that asks our VAE for something."""
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if server is None:  # ComfyUI is used as a library
        return Executing(None, None, None)
    # A thread that the node has started has no context. The last node that began is then the best
    # guess: ComfyUI executes one after another, except for those that wait for the network.
    node = server.last_node_id if context is None else context.node_id
    pnginfo = None
    for item in list(server.prompt_queue.currently_running.values()):
        if context is None or item[1] == context.prompt_id:
            pnginfo = item[3].get("extra_pnginfo")
    return Executing(node, get_progress_state().dynprompt, pnginfo)
