"""The pictures of README and example workflows, made in ComfyUI's own frontend.

make pictures        # runs the browser tests that take screenshots, then this
python -m tests.browser.pictures readme        # only the README's, which needs no test

The README's picture shows the report of a decode on a GPU, from a results file. The page gets it as
the server's answer; nothing is decoded here.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, ViewportSize, sync_playwright

from tests.browser.frontend import CHROMIUM, FLAGS, SCREENSHOTS, TIMEOUT_MS, Frontend
from tests.browser.workflows import decode_workflow
from tests.comfy.provision import provision
from tests.comfy.server import Comfy

REPOSITORY = Path(__file__).resolve().parents[2]
README_PICTURE = REPOSITORY / "docs/images/comfyui_nodes.png"
# Whose first row is a decode by Wan VAE Decode.
RESULTS = REPOSITORY / "benchmarks/results/2026-11-28-h200-nodes.json"
VAE, LATENT = "wan_2.1_vae.safetensors", "video_720p.latent"
WINDOW = ViewportSize(width=1420, height=886)
THUMBNAIL_WIDTH = 640


def report_of_a_gpu() -> dict[str, Any]:
    """The report that the README's picture shows."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    report: dict[str, Any]
    (report,) = (row["report"] for row in rows if row["class_type"] == "WanVAEDecode")
    return report


def readme_picture() -> None:
    """Draw the nodes and the panel with that report in the newest frontend."""
    environment = provision()
    with tempfile.TemporaryDirectory(prefix="wan_vae_picture_") as folder:
        root = environment.newest_frontend
        server = Comfy(environment, Path(folder), "--front-end-root", root)
        # Only their names are shown.
        (server.base / "models" / "vae" / VAE).touch()
        (server.base / "input" / LATENT).touch()
        with server, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
            page = browser.new_page(viewport=WINDOW)
            page.set_default_timeout(TIMEOUT_MS)
            _draw(Frontend(page, server, [], "newest", "nodes2"))
            browser.close()


def _draw(frontend: Frontend) -> None:
    page = frontend.page
    workflow = decode_workflow(VAE, LATENT)
    message = {
        "node": "3",
        "workflow": workflow["id"],
        "kind": "WanVAEDecode",
        "vae": None,
        "cached": False,
        "sent_s": 0.0,
        "report": report_of_a_gpu(),
    }
    page.route("**/wan_vae/reports?*", lambda route: route.fulfill(json={"reports": [message]}))
    frontend.open()
    frontend.setting("Comfy.TutorialCompleted", True)
    frontend.setting("Comfy.VueNodes.Enabled", True)
    frontend.setting("Comfy.Minimap.Visible", False)
    frontend.open()
    frontend.load(workflow, "Decode")
    _close_other_tabs(page)
    frontend.line("81 frames · ")
    frontend.open_tab()
    page.locator(".wan-vae-card").first.wait_for()
    frontend.fit()
    frontend.shot("readme")
    shot = Image.open(SCREENSHOTS / "readme-newest-nodes2.png").convert("RGB")
    shot.quantize(192).save(README_PICTURE, optimize=True)


def _close_other_tabs(page: Page) -> None:
    """Close every workflow but the one on screen."""
    page.evaluate(
        """async () => {
          const workflows = window.app.extensionManager.workflow;
          for (const one of [...workflows.openWorkflows]) {
            if (one !== workflows.activeWorkflow) await workflows.closeWorkflow(one);
          }
        }"""
    )


def thumbnails() -> None:
    """The thumbnails of the example workflows, from screenshots that tests took.

    Raises FileNotFoundError if the tests have not run.
    """
    for workflow in sorted((REPOSITORY / "example_workflows").glob("*.json")):
        name = f"workflow-{workflow.stem}-pinned-nodes2.png"
        shot = Image.open(SCREENSHOTS / name).convert("RGB")
        _nodes(shot).save(workflow.with_suffix(".jpg"), quality=82, optimize=True)


def _nodes(shot: Image.Image) -> Image.Image:
    """The part of a screenshot where the nodes are, reduced to a thumbnail."""
    canvas = shot.crop((62, 92, shot.width, shot.height - 110))  # less bars and buttons
    bright = canvas.convert("L").point(lambda value: 255 if value > 60 else 0)
    box = bright.getbbox()
    if box is None:
        raise ValueError("the screenshot shows no node")
    nodes = canvas.crop((0, 0, canvas.width, min(box[3] + 24, canvas.height)))
    height = round(nodes.height * THUMBNAIL_WIDTH / nodes.width)
    return nodes.resize((THUMBNAIL_WIDTH, height), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    readme_picture()
    if sys.argv[1:] != ["readme"]:
        thumbnails()
