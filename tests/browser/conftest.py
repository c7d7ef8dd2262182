"""The real frontends in headless Chromium, each on a ComfyUI of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, sync_playwright

from tests.browser import pictures
from tests.comfy import graphs
from tests.comfy.provision import provision
from tests.comfy.server import Comfy
from tests.conftest import PATIENCE_S

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MINI = EXAMPLES / "wan_vae_mini.safetensors"
CAT = EXAMPLES / "latents" / "cat_416x240_17f.latent"
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
  .p-toast, .p-tooltip, .minimap-main-container { visibility: hidden !important }
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
TIMEOUT_MS = 1000 * PATIENCE_S


@pytest.fixture(scope="session", params=["pinned", "newest"])
def server(request, tmp_path_factory) -> Iterator[Comfy]:
    """ComfyUI with the frontend that it pins. Then with the newest one."""
    environment = provision()
    root = {"pinned": environment.pinned_frontend, "newest": environment.newest_frontend}
    flags = ("--front-end-root", root[request.param])
    server = Comfy(environment, tmp_path_factory.mktemp(request.param), *flags)
    graphs.write_vaes(server.base / "models" / "vae")
    server.install_probe()
    shutil.copyfile(MINI, server.base / "models" / "vae" / MINI.name)
    shutil.copyfile(CAT, server.base / "input" / CAT.name)
    server.frontend = request.param
    with server:
        yield server


@pytest.fixture(scope="session")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@dataclass
class Frontend:
    """A page with the frontend loaded, and what tests do with it."""

    page: Page
    server: Comfy
    errors: list[str]
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

    def setting(self, name: str, value) -> None:
        self.page.evaluate(
            "([name, value]) => window.app.extensionManager.setting.set(name, value)", [name, value]
        )

    def load(self, workflow: dict) -> None:
        self.page.evaluate("(workflow) => window.app.loadGraphData(workflow)", workflow)

    def shot(self, name: str, locator: Locator | None = None) -> None:
        """A screenshot of the page or one element, for people to look at (see `pictures`)."""
        path = pictures.FOLDER / f"{name}-{self.server.frontend}-{self.mode}.png"
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


@pytest.fixture(scope="session", params=["canvas", "nodes2"])
def frontend(request, server, chromium) -> Iterator[Frontend]:
    """One page for all tests of a frontend and a way to draw nodes; loading it is what costs."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    front = Frontend(page, server, errors, request.param)
    front.open()
    front.setting("Comfy.TutorialCompleted", True)
    front.setting("Comfy.VueNodes.Enabled", request.param == "nodes2")
    front.open()
    yield front
    context.close()


@pytest.fixture(autouse=True)
def no_page_errors(frontend):
    """No test may leave an uncaught error of the page behind."""
    frontend.errors.clear()
    yield
    assert frontend.errors == []
