"""The pictures of README and example workflows, made in ComfyUI's own frontend.

make pictures
python -m tests.browser.pictures readme        # only the README's; or thumbnails

The README's picture shows the report of a decode on a GPU, from a results file. The page gets it as
the server's answer; nothing is decoded for it.

A thumbnail shows our nodes and the result, after a run. No model is here: the sample latents of the
repository stand for what a sampler gives, and the miniature VAE for the real one.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, ViewportSize, sync_playwright

from tests.browser.frontend import CHROMIUM, FLAGS, SCREENSHOTS, TIMEOUT_MS, UNDISTURBED, Frontend
from tests.browser.workflows import decode_workflow
from tests.comfy.provision import provision
from tests.comfy.server import Comfy

REPOSITORY = Path(__file__).resolve().parents[2]
README_PICTURE = REPOSITORY / "docs/images/comfyui_nodes.png"
# Whose first row is a decode by Wan VAE Decode.
RESULTS = REPOSITORY / "benchmarks/results/2026-11-28-h200-nodes.json"
VAE, LATENT = "wan_2.1_vae.safetensors", "video_720p.latent"
WINDOW = ViewportSize(width=1420, height=760)
THUMBNAIL_WINDOW = ViewportSize(width=1420, height=1000)
THUMBNAIL_WIDTH, THUMBNAIL_RATIO = 640, 1.5


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
    _prepare(frontend)
    frontend.load(workflow, "Decode")
    _close_other_tabs(page)
    frontend.line("81 frames · ")
    frontend.open_tab()
    page.locator(".wan-vae-card").first.wait_for()
    frontend.fit()
    frontend.shot("readme")
    shot = Image.open(SCREENSHOTS / "readme-newest-nodes2.png").convert("RGB")
    shot.quantize(192).save(README_PICTURE, optimize=True)


def _prepare(frontend: Frontend) -> None:
    """Load the page, with Nodes 2.0 and nothing over the canvas."""
    frontend.open()
    frontend.setting("Comfy.TutorialCompleted", True)
    frontend.setting("Comfy.VueNodes.Enabled", True)
    frontend.setting("Comfy.Minimap.Visible", False)
    frontend.open()


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


# What is left of an example workflow in its thumbnail: nodes, and where they are drawn.
SHOWN: dict[str, dict[str, tuple[int, int]]] = {
    "qwen_image_decode": {"WanVAEDecode": (0, 0), "SaveImage": (360, 0)},
    "wan_decode_to_video": {"WanVAEDecodeToVideo": (0, 0)},
    "wan_image_to_video": {
        "WanVAEAccelerate": (0, 0),
        "VAEDecode": (0, 220),
        "CreateVideo": (0, 330),
        "SaveVideo": (360, 0),
    },
    "wan_inspect": {"WanVAEInspect": (0, 0), "PreviewAny": (380, 0)},
    "wan_sharded": {"WanVAEDecodeSharded": (0, 0), "CreateVideo": (0, 330), "SaveVideo": (360, 0)},
    "wan_text_to_video": {"WanVAEDecode": (0, 0), "CreateVideo": (0, 250), "SaveVideo": (360, 0)},
    "wan_try_it": {"WanVAEEncode": (0, 0), "WanVAEDecode": (0, 260), "PreviewImage": (360, 0)},
}
# Of the others, those that a run needs are drawn out of sight.
ASIDE = -3000
MINIATURE = "wan_vae_mini.safetensors"
IMAGE, CLIP = "image_320x240.latent", "cat_416x240_17f.latent"
PLAYING = """() => [...document.querySelectorAll("video")].every(
  (video) => video.readyState > 2 && video.videoWidth > 0)"""
# The middle of each clip.
PAUSE = """() => Promise.all([...document.querySelectorAll("video")].map((video) => {
  video.pause();
  video.controls = false;
  video.currentTime = video.duration / 2;
  return new Promise((done) => video.addEventListener("seeked", done, { once: true }));
}))"""
RUN = """() => new Promise((done, failed) => {
  const { api } = window.comfyAPI.api;
  api.addEventListener("execution_success", done, { once: true });
  api.addEventListener("execution_error", ({ detail }) => failed(new Error(
    detail.exception_message)), { once: true });
  window.app.queuePrompt(0, 1);
}).then(() => null)"""
# Zooms to the nodes of these classes, below what the frontend shows of runs.
CLOSE_UP = """(kinds) => {
  const { canvas, graph } = window.app;
  const nodes = graph.nodes.filter(({ type }) => kinds.includes(type));
  const low = (i) => Math.min(...nodes.map(({ pos }) => pos[i]));
  const high = (i) => Math.max(...nodes.map(({ pos, size }) => pos[i] + size[i]));
  const { ds } = canvas;
  ds.scale = Math.min(1.2, 1000 / (high(0) - low(0)), 560 / (high(1) - low(1)));
  ds.offset[0] = innerWidth / 2 / ds.scale - (low(0) + high(0)) / 2;
  ds.offset[1] = 250 / ds.scale - low(1);
  graph.setDirtyCanvas(true, true);
  return nodes.map(({ id }) => id);
}"""
# Where they are on the screen, with some room around, in the shape of a thumbnail.
BOX = """([ids, ratio]) => {
  const boxes = ids.map((id) =>
    document.querySelector(`[data-node-id="${id}"]`).getBoundingClientRect());
  const left = Math.min(...boxes.map((box) => box.left)) - 16;
  const top = Math.min(...boxes.map((box) => box.top)) - 16;
  const right = Math.max(...boxes.map((box) => box.right)) + 16;
  const height = Math.max(...boxes.map((box) => box.bottom)) + 16 - top;
  const width = Math.max(right - left, height * ratio);
  return { x: (left + right - width) / 2, y: top, width, height };
}"""
SETTLED = """() => [...document.images].every((image) => image.complete)"""


def thumbnails() -> None:
    """Run each example workflow with stand-ins and take the picture of what is SHOWN."""
    environment = provision()
    with tempfile.TemporaryDirectory(prefix="wan_vae_thumbnails_") as folder:
        root = environment.newest_frontend
        server = Comfy(environment, Path(folder), "--front-end-root", root)
        for sample in (REPOSITORY / "examples/latents").glob("*.latent"):
            shutil.copyfile(sample, server.base / "input" / sample.name)
        picture = Path(environment.comfyui) / "input" / "example.png"
        shutil.copyfile(picture, server.base / "input" / picture.name)
        with server, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
            page = browser.new_page(viewport=THUMBNAIL_WINDOW)
            page.set_default_timeout(TIMEOUT_MS)
            frontend = Frontend(page, server, [], "newest", "nodes2")
            _prepare(frontend)
            for name in SHOWN:
                _thumbnail(frontend, name)
            browser.close()


def _thumbnail(frontend: Frontend, name: str) -> None:
    page, shown = frontend.page, SHOWN[name]
    path = REPOSITORY / "example_workflows" / f"{name}.json"
    workflow = with_stand_ins(json.loads(path.read_text(encoding="utf-8")), name)
    frontend.load(workflow, name)
    page.evaluate(RUN)
    # The frontend's note about the run goes, and results come.
    page.wait_for_timeout(3000)
    page.wait_for_function(PLAYING)
    page.evaluate(PAUSE)
    page.wait_for_function(SETTLED)
    nodes = page.evaluate(CLOSE_UP, list(shown))
    page.wait_for_timeout(500)  # Nodes 2.0 follow the canvas
    box = page.evaluate(BOX, [nodes, THUMBNAIL_RATIO])
    shot = page.screenshot(clip=box, style=UNDISTURBED)
    image = Image.open(BytesIO(shot)).convert("RGB")
    height = round(image.height * THUMBNAIL_WIDTH / image.width)
    image = image.resize((THUMBNAIL_WIDTH, height), Image.Resampling.LANCZOS)
    image.save(path.with_suffix(".jpg"), quality=85, optimize=True)


def with_stand_ins(workflow: dict[str, Any], name: str) -> dict[str, Any]:
    """The nodes of `workflow` that its thumbnail shows, and those before them up to the latent."""
    shown = SHOWN[name]
    nodes = {node["id"]: node for node in workflow["nodes"]}
    wanted = [number for number, node in nodes.items() if node["type"] in shown]
    links = []
    for number in wanted:  # grows as nodes before it are found
        node = nodes[number]
        if node["type"] == "KSampler":
            sample = IMAGE if name == "qwen_image_decode" else CLIP
            node |= {"type": "LoadLatent", "inputs": [], "widgets_values": [sample]}
        elif node["type"] == "VAELoader":
            node["widgets_values"] = [MINIATURE]
        elif node["type"] == "WanVAEDecodeSharded":
            node["widgets_values"][0] = "cpu,cpu"
        node["pos"] = list(shown.get(node["type"], (ASIDE, 300 * number)))
        before = [link for link in workflow["links"] if link[3] == number and node["inputs"]]
        links += before
        wanted += [link[1] for link in before if link[1] not in wanted]
    for number in wanted:
        for output in nodes[number]["outputs"]:
            kept = {link[0] for link in links}
            output["links"] = [link for link in output["links"] or [] if link in kept]
    return workflow | {"nodes": [nodes[number] for number in wanted], "links": links}


if __name__ == "__main__":
    if sys.argv[1:] != ["thumbnails"]:
        readme_picture()
    if sys.argv[1:] != ["readme"]:
        thumbnails()
