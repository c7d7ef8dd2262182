"""Reports on their way to the panel: sent while a node runs, kept for pages that load later."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from typing import Any

from aiohttp import web
from comfy_api.latest import io
from server import PromptServer

# A report as plain values: `DecodeReport.as_dict`.
Report = dict[str, Any]

EVENT = "wan_vae.report"
ROUTE = "/wan_vae/reports"
# Enough for every node of a few workflows; a report is some 10 KB.
MAX_REPORTS = 64
# A person reads no faster, and the websocket also carries previews.
MIN_INTERVAL_S = 0.2

HIDDEN = (io.Hidden.unique_id, io.Hidden.dynprompt, io.Hidden.extra_pnginfo)


@dataclass(frozen=True)
class NodeId:
    """Which node of which workflow a report belongs to; `workflow` is None for API prompts.

    kind: the node's class, which tells a page whether its node with this id is meant. vae: the id
    of the WanVAEAccelerate node through which another node got here. What API clients send is
    theirs to choose: anything but a workflow with an id is none.
    """

    node: str
    workflow: str | None
    kind: str | None = field(default=None, compare=False)
    vae: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, hidden: Any, vae: str | None = None) -> NodeId | None:
        """From a node's hidden inputs. A node made by expansion is its visible parent.

        None where no node is executed.
        """
        if hidden.unique_id is None:
            return None
        node, kind = str(hidden.unique_id), None
        if hidden.dynprompt is not None:
            node = str(hidden.dynprompt.get_display_node_id(node))
            if hidden.dynprompt.has_node(node):
                kind = str(hidden.dynprompt.get_node(node)["class_type"])
        found = hidden.extra_pnginfo
        for key in ("workflow", "id"):
            found = found.get(key) if isinstance(found, dict) else None
        return cls(node, found if isinstance(found, str) else None, kind, vae)


class ReportStore:
    """The last report of each node, the oldest dropped first. Safe for several threads."""

    def __init__(self, limit: int = MAX_REPORTS):
        self._limit = limit
        self._lock = threading.Lock()
        self._reports: OrderedDict[NodeId, Report] = OrderedDict()

    def put(self, node: NodeId, report: Report) -> None:
        with self._lock:
            self._reports.pop(node, None)
            self._reports[node] = report
            while len(self._reports) > self._limit:
                self._reports.popitem(last=False)

    def messages(self) -> list[Report]:
        """All reports as the panel gets them, the oldest first."""
        with self._lock:
            return [message(node, report) for node, report in self._reports.items()]


def message(node: NodeId, report: Report) -> Report:
    return {**asdict(node), "report": report}


STORE = ReportStore()


class Reporter:
    """Tells the panel about one run of one node; nobody, if there is no node."""

    def __init__(self, node: NodeId | None, store: ReportStore = STORE):
        self.node = node
        self._store = store
        self._last_sent_s = 0.0

    def due(self) -> bool:
        """Whether it is time for another live report."""
        return time.monotonic() - self._last_sent_s >= MIN_INTERVAL_S

    def send(self, report: Report) -> None:
        """To the page that queued the prompt. Without one (an API prompt) nobody listens."""
        self._last_sent_s = time.monotonic()
        if self.node is None:
            return
        server = PromptServer.instance
        if server.client_id is not None:
            server.send_sync(EVENT, message(self.node, report), server.client_id)

    def finish(self, report: Report) -> None:
        """Send the final report and keep it."""
        if self.node is not None:
            self._store.put(self.node, report)
        self.send(report)


def add_route() -> None:
    """GET /wan_vae/reports: the kept reports. Without a server (a tool that lists nodes), none."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    async def reports(_request: web.Request) -> web.Response:
        return web.json_response({"reports": STORE.messages()})

    server.routes.get(ROUTE)(reports)
