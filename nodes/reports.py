"""Reports on their way to the panel: sent while a node runs, kept for pages that ask later."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from aiohttp import web
from comfy_api.latest import io
from comfy_execution.graph_utils import is_link
from server import PromptServer

from ..wan_vae.report import SCHEMA
from ..wan_vae.said import worded
from .twice import NOTICES

# A report as plain values: `DecodeReport.as_dict`.
Report = dict[str, Any]
K = TypeVar("K", bound=Hashable)

EVENT = "wan_vae.report"
ROUTE = "/wan_vae/reports"
CACHED_ROUTE = "/wan_vae/cached"
# Enough for every node of a few workflows; a report is some 10 KB.
MAX_REPORTS = 64
# A person reads no faster, and the websocket also carries previews.
MIN_INTERVAL_S = 0.2
# What the history and the `executed` message of a node say of its report.
SUMMARY = (
    "schema",
    "operation",
    "status",
    "error",
    "device",
    "dtype",
    "pixel_shape",
    "done_frames",
    "total_frames",
    "duration_ms",
    "frames_per_s",
)
# Operations of our nodes, to say what a result from ComfyUI's cache is.
OPERATIONS = {
    "WanVAEAccelerate": "accelerate",
    "WanVAECreateVideo": "video",
    "WanVAEDecode": "decode",
    "WanVAEDecodeSharded": "decode",
    "WanVAEDecodeToVideo": "decode",
    "WanVAEEncode": "encode",
    "WanVAEInspect": "inspect",
}

# Nodes that make what other nodes decode with; these report for both.
MAKERS = ("WanVAEAccelerate", "WanVAECreateVideo")

HIDDEN = (io.Hidden.unique_id, io.Hidden.dynprompt, io.Hidden.extra_pnginfo)


def summary(report: Report) -> Report:
    """The numbers of `report` that fit into a line: some 300 bytes of 10 KB."""
    layout = report.get("layout") or {}
    short = {key: report[key] for key in SUMMARY if report.get(key) is not None}
    return {
        **short,
        "layout": layout.get("chosen"),
        "mixed_calls": layout.get("mixed_calls", 0),
        "notes": len(report.get("warnings") or ()) + len(report.get("fallbacks") or ()),
    }


def signature(prompt: Mapping[str, Any], node: str) -> str | None:
    """Names what a node computes: its class and inputs, and those of every node before it.

    The ids of nodes do not count, so it is the same in a copy of a workflow. None where a node is
    not in `prompt`.
    """
    numbers, order = {node: 0}, [node]
    described = []
    for current in order:  # grows as nodes before it are found
        entry = prompt.get(current)
        if entry is None:
            return None
        inputs = {}
        for name, value in sorted(entry["inputs"].items()):
            if is_link(value):
                source = str(value[0])
                if source not in numbers:
                    numbers[source] = len(order)
                    order.append(source)
                value = ["link", numbers[source], value[1]]
            inputs[name] = value
        described.append([entry["class_type"], inputs])
    return hashlib.blake2b(json.dumps(described, default=str).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class NodeId:
    """Which node of which workflow a report belongs to; `workflow` is None for API prompts.

    kind: the node's class, which tells a page whether its node with this id is meant. vae: the id
    of the node of MAKERS through which another node got here. signature: see `signature`.
    What API clients send is theirs to choose: anything but a workflow with an id is none.
    """

    node: str
    workflow: str | None
    kind: str | None = field(default=None, compare=False)
    vae: str | None = field(default=None, compare=False)
    signature: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, hidden: Any, vae: str | None = None) -> NodeId | None:
        """From a node's hidden inputs. A node made by expansion is its visible parent.

        None where no node is executed.
        """
        if hidden.unique_id is None:
            return None
        node, kind, signed = str(hidden.unique_id), None, None
        if hidden.dynprompt is not None:
            node = str(hidden.dynprompt.get_display_node_id(node))
            signed = signature(hidden.dynprompt.get_original_prompt(), node)
            if hidden.dynprompt.has_node(node):
                kind = str(hidden.dynprompt.get_node(node)["class_type"])
        return cls(node, workflow_id(hidden.extra_pnginfo), kind, vae, signed)


def workflow_id(extra_pnginfo: Any) -> str | None:
    """The id of the workflow that a page sent beside its prompt; None for anything else."""
    found = extra_pnginfo
    for key in ("workflow", "id"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


@dataclass(frozen=True)
class Kept:
    """One report as the server keeps it: of which node, for which client, and when it was made.

    cached: the node did not run. Its result came from ComfyUI's cache, and the report is that of
    the run that made it.
    """

    node: NodeId
    client: str | None
    report: Report
    sent_s: float
    cached: bool = False

    def message(self) -> Report:
        """What a page gets."""
        place = asdict(self.node)
        del place["signature"]
        return {**place, "cached": self.cached, "sent_s": self.sent_s, "report": self.report}


class ReportStore:
    """The last report of each node for each client, and the last for each signature.

    Of each, the oldest are dropped first. Safe for several threads.
    """

    def __init__(self, limit: int = MAX_REPORTS):
        self._limit = limit
        self._lock = threading.Lock()
        self._of_nodes: OrderedDict[tuple[str | None, NodeId], Kept] = OrderedDict()
        self._made: OrderedDict[str, Kept] = OrderedDict()

    def put(self, kept: Kept) -> None:
        with self._lock:
            self._keep(self._of_nodes, (kept.client, kept.node), kept)
            signed = kept.node.signature
            if signed is not None and kept.report.get("status") == "done" and not kept.cached:
                self._keep(self._made, signed, kept)

    def _keep(self, kept: OrderedDict[K, Kept], key: K, value: Kept) -> None:
        kept.pop(key, None)
        kept[key] = value
        while len(kept) > self._limit:
            kept.popitem(last=False)

    def of_client(self, client: str) -> list[Kept]:
        """The reports of prompts that `client` has queued, the oldest first."""
        with self._lock:
            return [kept for kept in self._of_nodes.values() if kept.client == client]

    def of_node(self, client: str, node: NodeId) -> Kept | None:
        with self._lock:
            return self._of_nodes.get((client, node))

    def made(self, signed: str) -> Kept | None:
        """The report of the last run that computed what `signed` names."""
        with self._lock:
            return self._made.get(signed)


STORE = ReportStore()


class Reporter:
    """Tells the panel about one run of one node; nobody, if there is no node."""

    def __init__(self, node: NodeId | None, store: ReportStore = STORE):
        self.node = node
        self._store = store
        self.has_sent = False
        # From here on: a run that is done before has nothing to say meanwhile.
        self._last_sent_s = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for another live report."""
        return time.monotonic() - self._last_sent_s >= MIN_INTERVAL_S

    def send(self, report: Report) -> None:
        """To the page that queued the prompt, and to the store for a page that loads later.

        Without a page (an API prompt of no client) nobody listens.
        """
        self._last_sent_s, self.has_sent = time.monotonic(), True
        if self.node is None:
            return
        server = PromptServer.instance
        kept = Kept(self.node, server.client_id, report, time.time())
        self._store.put(kept)
        if server.client_id is not None:
            server.send_sync(EVENT, kept.message(), server.client_id)


def from_cache(client: str, prompt_id: str, nodes: Iterable[str]) -> list[Kept]:
    """What is known of those of `nodes` that ComfyUI took from its cache in a prompt of `client`.

    They are kept for that client from now on. A node that ran in the same place to its end is left
    out: its report is there. One of ours of which nothing is known gets a report that says no more
    than that.
    """
    item = _prompt(prompt_id)
    if item is None or item[3].get("client_id") != client:
        return []
    prompt, workflow = item[2], workflow_id(item[3].get("extra_pnginfo"))
    found = []
    for node in nodes:
        signed = signature(prompt, node)
        if signed is None:
            continue
        kind = str(prompt[node]["class_type"])
        place = NodeId(node, workflow, kind, None, signed)
        own, made = STORE.of_node(client, place), STORE.made(signed)
        if own is not None and own.node.signature == signed and own.report["status"] == "done":
            continue
        if made is not None:
            vae = made.node.vae
            if vae is not None and prompt.get(vae, {}).get("class_type") in MAKERS:
                place = replace(place, vae=vae)
            report = made.report
        elif kind in OPERATIONS:
            report = {"schema": SCHEMA, "operation": OPERATIONS[kind], "status": "done"}
        else:
            continue
        kept = Kept(place, client, report, time.time(), cached=True)
        STORE.put(kept)
        found.append(kept)
    return found


def _prompt(prompt_id: str) -> Any:
    """The entry of a prompt in ComfyUI's queue: (number, id, prompt, extra data, ...); or None."""
    queue = PromptServer.instance.prompt_queue
    for item in list(queue.currently_running.values()):
        if item[1] == prompt_id:
            return item
    history = queue.get_history(prompt_id=prompt_id).get(prompt_id)
    return None if history is None else history["prompt"]


def add_routes() -> None:
    """The panel's routes. Without a server (a tool that lists nodes), none.

    GET /wan_vae/reports?client_id=: the kept reports of that client's prompts, and what a user of
    this server should know (another copy of the pack).
    POST /wan_vae/cached {client_id, prompt_id, nodes}: see `from_cache`.
    """
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    def answer(kept: Iterable[Kept], **more: object) -> web.Response:
        return web.json_response({"reports": [one.message() for one in kept], **more})

    async def reports(request: web.Request) -> web.Response:
        kept = STORE.of_client(request.query.get("client_id", ""))
        return answer(kept, notices=NOTICES, worded=worded(NOTICES))

    async def cached(request: web.Request) -> web.Response:
        asked = None
        with suppress(ValueError):  # no JSON, or no text
            asked = await request.json()
        match asked:
            case {"client_id": str(client), "prompt_id": str(prompt), "nodes": list(nodes)}:
                return answer(from_cache(client, prompt, map(str, nodes)))
        return web.json_response({"error": "expected client_id, prompt_id, nodes"}, status=400)

    server.routes.get(ROUTE)(reports)
    server.routes.post(CACHED_ROUTE)(cached)
