"""The real frontends in headless Chromium, each on a ComfyUI of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, sync_playwright

from tests.browser.frontend import CHROMIUM, FLAGS, TIMEOUT_MS, Frontend
from tests.comfy import graphs
from tests.comfy.provision import provision
from tests.comfy.server import Comfy

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MINI = EXAMPLES / "wan_vae_mini.safetensors"
CAT = EXAMPLES / "latents" / "cat_416x240_17f.latent"


# What `make test` runs: an old frontend and the newest, each in one of the ways in which it draws.
# `make test-all` has both ways of all.
# `quick_in` leaves one of the two to tests of what is the same in each.
QUICK = {("pinned", "canvas"), ("newest", "nodes2")}


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    for item in items:
        names = getattr(getattr(item, "callspec", None), "params", {})
        drawn = (names.get("frontend_name"), names.get("frontend"))
        if None in drawn:
            continue
        only = item.get_closest_marker("quick_in")
        if drawn not in QUICK or (only is not None and drawn[0] not in only.args):
            item.add_marker(pytest.mark.full)


@pytest.fixture(scope="session", params=["pinned", "usual", "newest"])
def frontend_name(request) -> str:
    """Of the frontend: the one that this ComfyUI pins, the one of most users, the newest one."""
    return request.param


@pytest.fixture(scope="session")
def server(frontend_name, tmp_path_factory) -> Iterator[Comfy]:
    """ComfyUI with that frontend."""
    environment = provision()
    root = {
        "pinned": environment.pinned_frontend,
        "usual": environment.usual_frontend,
        "newest": environment.newest_frontend,
    }
    flags = ("--front-end-root", root[frontend_name])
    server = Comfy(environment, tmp_path_factory.mktemp(frontend_name), *flags)
    graphs.write_vaes(server.base / "models" / "vae")
    server.install_probe()
    shutil.copyfile(MINI, server.base / "models" / "vae" / MINI.name)
    shutil.copyfile(CAT, server.base / "input" / CAT.name)
    picture = Path(environment.comfyui) / "input" / "example.png"  # which ComfyUI ships
    shutil.copyfile(picture, server.base / "input" / picture.name)
    with server:
        yield server


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


def counts(error: Error) -> bool:
    """Whether an uncaught error of the page is not known to be the frontend's own.

    From 1.49 on, its renderer of 3D scenes fetches WebAssembly from a data: URL as the page loads.
    ComfyUI up to 0.3 forbids that where it runs without API nodes, as it does here.
    """
    return "/assets/vendor-three-" not in (error.stack or "")


@pytest.fixture(scope="session", params=["canvas", "nodes2"])
def frontend(request, server, frontend_name, chromium) -> Iterator[Frontend]:
    """One page for all tests of a frontend and a way to draw nodes; loading it is what costs."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)) if counts(error) else None)
    front = Frontend(page, server, errors, frontend_name, request.param)
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
