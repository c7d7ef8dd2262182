"""A page with ComfyUI's frontend in headless Chromium, and what tests and pictures do with it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page

from tests.comfy.server import Comfy
from tests.conftest import PATIENCE_S

SCREENSHOTS = Path(os.environ.get("WAN_VAE_SCREENSHOTS", "test-results/browser"))
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# What comes and goes by itself, or hides nodes.
UNDISTURBED = """
  .p-toast, .p-tooltip, .p-dialog-mask, .minimap-main-container { visibility: hidden !important }
"""
FIT = """() => {
  const graph = window.app.rootGraph ?? window.app.graph;
  const { ds } = window.app.canvas;
  const boxes = graph.nodes.map(({ pos, size }) =>
    [pos[0], pos[1] - 30, pos[0] + size[0], pos[1] + size[1]]);
  const low = (i) => Math.min(...boxes.map((box) => box[i]));
  const high = (i) => Math.max(...boxes.map((box) => box[i]));
  const side = document.querySelector("wan-vae-panel")?.getBoundingClientRect().right ?? 60;
  const [left, top, right, bottom] = [side + 20, 120, innerWidth - 20, innerHeight - 30];
  ds.scale = Math.min(
    1, (right - left) / (high(2) - low(0)), (bottom - top) / (high(3) - low(1)));
  ds.offset[0] = left / ds.scale - low(0);
  ds.offset[1] = top / ds.scale - low(1);
  graph.setDirtyCanvas(true, true);
}"""
# Everything on a busy machine with two cores, first load of the frontend included.
TIMEOUT_MS = 1000 * PATIENCE_S


@dataclass
class Frontend:
    """A page with the frontend loaded, and what tests do with it."""

    page: Page
    server: Comfy
    errors: list[str]
    name: str
    mode: str

    def open(self) -> None:
        """Load (or reload) and wait until the graph of the frontend has settled."""
        self.page.goto(self.server.url, timeout=TIMEOUT_MS)
        self.page.wait_for_function(
            "() => window.app?.vueAppReady && window.app.extensionManager", timeout=TIMEOUT_MS
        )
        # The default graph loads late: wait until it stayed the same for a second.
        self.page.wait_for_function(
            """() => {
              const graph = window.app.rootGraph ?? window.app.graph;
              const now = JSON.stringify(graph.serialize().nodes.map((node) => node.id));
              if (window.__graph?.nodes !== now) window.__graph = { nodes: now, at: Date.now() };
              return Date.now() - window.__graph.at > 1000;
            }""",
            timeout=TIMEOUT_MS,
        )

    def setting(self, name: str, value: object) -> None:
        self.page.evaluate(
            "([name, value]) => window.app.extensionManager.setting.set(name, value)", [name, value]
        )

    def load(self, workflow: dict[str, Any], name: str | None = None) -> None:
        """Put `workflow` on screen, in a tab of its own called `name`."""
        self.page.evaluate(
            "([workflow, name]) => window.app.loadGraphData(workflow, true, true, name)",
            [workflow, name],
        )

    def shot(self, name: str, locator: Locator | None = None) -> None:
        """A screenshot of the page or one element, for people to look at (see `pictures`)."""
        path = SCREENSHOTS / f"{name}-{self.name}-{self.mode}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        (locator or self.page).screenshot(path=path, style=UNDISTURBED)

    def fit(self) -> None:
        """Zoom and pan so that every node is in the free part of the window, and wait for it."""
        self.page.evaluate(FIT)
        self.page.wait_for_timeout(300)  # the canvas draws on its own clock, Nodes 2.0 follow it

    def queue(self) -> None:
        self.page.evaluate("() => window.app.queuePrompt(0, 1)")

    def line(self, text: str) -> None:
        """Wait for a line on a node that holds `text`."""
        self.page.locator("wan-vae-line", has_text=text).first.wait_for(timeout=TIMEOUT_MS)

    def open_tab(self) -> None:
        self.page.evaluate(
            """() => {
              const tabs = window.app.extensionManager.sidebarTab;
              if (tabs.activeSidebarTabId !== "wan-vae") tabs.toggleSidebarTab("wan-vae");
            }"""
        )
        self.page.locator("wan-vae-panel").wait_for(timeout=TIMEOUT_MS)
