"""The line, its node and its card: sizes, what a click does, what the frontend makes of them."""

from __future__ import annotations

import json
import re

import pytest

from tests.browser.test_panel import assert_shown_whole
from tests.browser.test_switching import in_subgraph
from tests.browser.workflows import accelerated_workflow, workflow

pytestmark = pytest.mark.browser

OURS = (
    "WanVAEDecode",
    "WanVAEDecodeSharded",
    "WanVAEEncode",
    "WanVAEAccelerate",
    "WanVAEInspect",
    "WanVAEDecodeToVideo",
    "WanVAECreateVideo",
)
SIZES = """() => Object.fromEntries(
  window.app.graph.nodes.map((node) => [node.type, [...node.size].map(Math.round)]))"""
# Pairs of texts of the panel that lie over each other, and what reaches out of it.
OVERPRINTED = """() => {
  const panel = document.querySelector("wan-vae-panel");
  const texts = [...panel.querySelectorAll("p, dt, dd, li, h4, summary > span, button, td")]
    .filter((element) => element.textContent.trim() && element.checkVisibility());
  const boxes = texts.map((element) => {
    const range = document.createRange();
    range.selectNodeContents(element);
    return [element, range.getBoundingClientRect()];
  });
  const found = [];
  boxes.forEach(([a, one], i) => {
    if (one.right > panel.getBoundingClientRect().right + 1) found.push(`out: ${a.textContent}`);
    for (const [b, other] of boxes.slice(i + 1)) {
      if (a.contains(b) || b.contains(a) || a.closest(".wan-vae-scrolled")) continue;
      const width = Math.min(one.right, other.right) - Math.max(one.left, other.left);
      const height = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
      if (width > 2 && height > 4) found.push(`${a.textContent} | ${b.textContent}`);
    }
  });
  return found;
}"""


def message(node: str, kind: str, identity: str, **report) -> dict:
    """What the server would send about a decode on a GPU."""
    done = {
        "schema": "wan_vae.report/1",
        "operation": "decode",
        "status": "done",
        "device": "cuda:0",
        "dtype": "bfloat16",
        "pixel_shape": [1, 3, 161, 1080, 1920],
        "done_frames": 161,
        "total_frames": 161,
        "duration_ms": 125_400,
        "frames_per_s": 12.34,
        "layout": {
            "chosen": "channels_last_3d",
            "reason": "cuDNN's half-precision kernels are faster in NDHWC",
            "weights_found": {"contiguous": 55, "channels_last_3d": 1, "either": 6},
            "weights_used": {"channels_last_3d": 56, "either": 6},
            "mixed_calls": 0,
        },
        "memory": {"peak_bytes": 7 << 30, "planned_bytes": 8 << 30},
        "warnings": ["a warning that is long enough to need more than one row of the panel"],
        "fallbacks": ["said twice", "said twice"],
        "chunks": [
            {"start": 0, "stop": 1, "is_first": True, "frames": 1, "duration_ms": 300.0},
            {"start": 1, "stop": 21, "is_first": False, "frames": 80, "duration_ms": 4000.0},
        ],
        "backends": {"used": {"conv3d": "cuda"}, "off": []},
        "layers": [
            {"name": "conv1", "op": "conv3d", "shape": [8], "format": "contiguous", "backend": "a"}
        ],
    }
    return {
        "node": node,
        "workflow": identity,
        "kind": kind,
        "vae": None,
        "cached": False,
        "sent_s": 1e12,
        "report": done | report,
    }


def send(frontend, told: dict) -> None:
    """As if the server had sent `told`."""
    frontend.page.evaluate(
        """(told) => window.comfyAPI.api.api.dispatchEvent(
          new CustomEvent("wan_vae.report", { detail: told }))""",
        told,
    )


def identity_of(frontend) -> str:
    return frontend.page.evaluate("() => window.app.graph.id")


def close_tab(frontend) -> None:
    frontend.page.evaluate(
        """() => {
          const tabs = window.app.extensionManager.sidebarTab;
          if (tabs.activeSidebarTabId) tabs.toggleSidebarTab(tabs.activeSidebarTabId);
        }"""
    )


def two_decodes(frontend) -> str:
    """Two Wan VAE Decode nodes of default size, 3 and 6, both with a report; the workflow's id."""
    frontend.load(workflow(seed=1, identity=f"two-{frontend.mode}"))
    frontend.page.evaluate(
        """() => {
          const { graph } = window.app;
          const made = window.LiteGraph.createNode("WanVAEDecode");
          made.pos = [800, 300];
          graph.add(made);
          const first = graph.nodes.find((node) => node.type === "WanVAEDecode");
          first.setSize(made.size);
          window.__second = String(made.id);
        }"""
    )
    identity = identity_of(frontend)
    send(frontend, message("3", "WanVAEDecode", identity))
    second = frontend.page.evaluate("() => window.__second")
    send(frontend, message(second, "WanVAEDecode", identity, done_frames=81, total_frames=81))
    frontend.line("161 frames")
    return identity


def test_what_is_looked_for_first_is_whole_at_the_default_width(frontend):
    two_decodes(frontend)
    assert_shown_whole(frontend)
    text = frontend.page.locator("wan-vae-line .wan-vae-text").first.inner_text()
    assert text.startswith("161 frames · 2:05 min · 12.3 frames/s · 1920×1080 ·"), text
    chip = frontend.page.locator("wan-vae-line .wan-vae-chip").first
    assert chip.inner_text() == "mixed"
    assert chip.get_attribute("data-mixed") is not None, "amber"
    frontend.fit()
    frontend.shot("default-width")


def test_the_line_opens_the_card_of_its_own_node(frontend):
    two_decodes(frontend)
    close_tab(frontend)
    lines = frontend.page.locator("wan-vae-line button")
    second = frontend.page.locator("wan-vae-line", has_text="81 frames ·").filter(
        has_not_text="161 frames"
    )
    # By its own listener: where nodes lie on the screen is not what is tested here.
    second.locator("button").evaluate("(button) => button.click()")
    card = frontend.page.locator(".wan-vae-card", has_text="81 frames ·").filter(
        has_not_text="161 frames"
    )
    card.locator("> summary").wait_for()
    assert card.evaluate("(card) => card.open && card.contains(document.activeElement)")
    frontend.page.locator("wan-vae-line", has_text="161 frames").locator("button").evaluate(
        "(button) => button.click()"
    )
    other = frontend.page.locator(".wan-vae-card", has_text="161 frames")
    frontend.page.wait_for_function(
        "() => document.activeElement.closest('.wan-vae-card')?.textContent.includes('161 frames')"
    )
    top = other.evaluate(
        """(card) => card.getBoundingClientRect().top -
          card.closest("wan-vae-panel").getBoundingClientRect().top"""
    )
    panel = frontend.page.locator("wan-vae-panel")
    at_the_end = panel.evaluate(
        "(panel) => panel.scrollTop + panel.clientHeight >= panel.scrollHeight - 2"
    )
    assert abs(top) < 20 or at_the_end, "scrolled to it, as far as there is room"
    assert lines.count() == 2


def test_no_text_lies_over_another_in_a_narrow_panel(frontend):
    two_decodes(frontend)
    frontend.open_tab()
    panel = frontend.page.locator("wan-vae-panel")
    panel.locator("details").evaluate_all("(all) => all.forEach((one) => { one.open = true })")
    # Narrower than the frontend lets a user make it.
    panel.evaluate("(panel) => { panel.style.width = '190px'; }")
    try:
        assert frontend.page.evaluate(OVERPRINTED) == []
        said = frontend.page.locator(".wan-vae-card").first.inner_text()
        assert said.count("said twice") == 1
        assert "Time a frame" in said and "50 ms" in said
        frontend.shot("least-width", panel)
    finally:
        panel.evaluate("(panel) => { panel.style.width = ''; }")


def test_new_nodes_keep_their_size_when_the_workflow_is_loaded_again(frontend):
    if (frontend.name, frontend.mode) == ("pinned", "nodes2"):
        return  # that frontend scales every node, core's too, each time it loads them
    frontend.load({"nodes": [], "links": [], "last_node_id": 0, "last_link_id": 0, "version": 0.4})
    frontend.page.evaluate(
        """(kinds) => kinds.forEach((kind, index) => {
          const node = window.LiteGraph.createNode(kind);
          node.pos = [100 + 400 * (index % 3), 60 + 420 * Math.floor(index / 3)];
          window.app.graph.add(node);
        })""",
        list(OURS),
    )
    frontend.page.wait_for_timeout(400)  # a few frames, in which it grew
    before = frontend.page.evaluate(SIZES)
    assert set(before) == set(OURS)
    frontend.page.evaluate("() => window.app.loadGraphData(window.app.graph.serialize())")
    frontend.page.wait_for_timeout(400)
    assert frontend.page.evaluate(SIZES) == before


def test_the_line_is_no_input_of_the_node(frontend):
    frontend.load(workflow(seed=1, identity=f"inputs-{frontend.mode}"))
    widget = frontend.page.evaluate(
        """() => {
          const node = window.app.graph.nodes.find(({ type }) => type === "WanVAEDecode");
          const { options, serialize } = node.widgets.find(({ name }) => /line/.test(name));
          return [options.hideInPanel, serialize, node.inputs.map(({ name }) => name)];
        }"""
    )
    assert widget[:2] == [True, False]
    assert not [name for name in widget[2] if "line" in name]
    if frontend.name == "pinned":  # it has no panel of parameters
        return
    frontend.setting("Comfy.RightSidePanel.IsOpen", True)
    try:
        frontend.page.evaluate(
            """() => window.app.canvas.selectNode(
              window.app.graph.nodes.find(({ type }) => type === "WanVAEDecode"), false)"""
        )
        # Folded, on the node too.
        frontend.page.get_by_text(re.compile("^Advanced inputs$", re.IGNORECASE)).click()
        frontend.page.get_by_text("chunk_frames", exact=True).wait_for()
        assert frontend.page.get_by_text("wan_vae_line").count() == 0
        assert frontend.page.locator("wan-vae-line").count() == 1
        frontend.shot("parameters")
    finally:
        frontend.setting("Comfy.RightSidePanel.IsOpen", False)


def test_show_puts_a_node_of_a_subgraph_into_the_free_part(frontend):
    frontend.load(in_subgraph(f"show-{frontend.mode}"))
    frontend.page.evaluate(
        """() => {
          const inner = window.app.graph.nodes.find((node) => node.subgraph).subgraph.nodes[0];
          inner.pos = [3000, 2000];
          window.__inner = inner;
        }"""
    )
    inner = frontend.page.evaluate(
        "() => `${window.app.graph.nodes.find((node) => node.subgraph).id}:${window.__inner.id}`"
    )
    send(frontend, message(inner, "VAEDecode", identity_of(frontend)))
    frontend.open_tab()
    frontend.page.locator(".wan-vae-card").first.get_by_role("button", name="Show").click()
    frontend.page.wait_for_function(
        """() => {
          const { canvas } = window.app;
          const node = canvas.graph?.nodes.find(({ type }) => type === "VAEDecode");
          if (!node || canvas.graph === window.app.graph) return false;
          const { ds } = canvas;
          const x = (node.pos[0] + node.size[0] / 2 + ds.offset[0]) * ds.scale;
          const y = (node.pos[1] + node.size[1] / 2 + ds.offset[1]) * ds.scale;
          const area = canvas.canvas.getBoundingClientRect();
          const panel = document.querySelector("wan-vae-panel").getBoundingClientRect();
          const middle = (Math.max(area.left, panel.right) + area.right) / 2 - area.left;
          window.__where = [x, y, middle, area.height / 2];
          return Math.abs(x - middle) < 40 && Math.abs(y - area.height / 2) < 40;
        }"""
    )
    frontend.page.wait_for_timeout(400)  # the frontend does not move it away again
    x, y, middle, height = frontend.page.evaluate("() => window.__where")
    assert abs(x - middle) < 40 and abs(y - height) < 40
    frontend.page.evaluate("() => window.app.canvas.setGraph(window.app.graph)")


def test_phases_come_before_the_first_frames(frontend):
    """In the real run of a sharded node workers are started; here in the words of the line."""
    frontend.load(workflow(seed=1, identity=f"phases-{frontend.mode}"))
    identity = identity_of(frontend)
    phases = {
        "preparing": {"name": "planning"},
        "compiling kernels": {"name": "compiling"},
        "starting 2 workers": {"name": "starting_workers", "count": 2},
    }
    for text, phase in phases.items():
        told = message("3", "WanVAEDecode", identity)
        told["report"] = {"operation": "decode", "status": "running", "phase": phase}
        send(frontend, told)
        frontend.line(f"▸{text}")
    running = {"status": "running", "done_frames": 33, "left_ms": 80_000}
    send(frontend, message("3", "WanVAEDecode", identity, **running))
    frontend.line("▸33 of 161 frames · 1:20 left · 1920×1080")


def test_the_channels_of_a_latent_are_a_folded_table(frontend):
    frontend.load(workflow(seed=1, identity=f"channels-{frontend.mode}"))
    channel = {"mean": -0.01, "deviation": 1.004, "vae_mean": 0.5, "vae_deviation": 2.75}
    told = message("3", "WanVAEDecode", identity_of(frontend), latent_channels=[channel] * 16)
    send(frontend, told)
    frontend.open_tab()
    section = frontend.page.locator(".wan-vae-card .wan-vae-channels").first
    section.locator("summary").wait_for()
    assert not section.locator("table").is_visible()
    section.locator("summary").click()
    rows = [row.locator("td").all_inner_texts() for row in section.locator("tbody tr").all()]
    assert len(rows) == 16 and rows[15] == ["15", "1.00", "2.75", "-0.01", "0.50"]
    frontend.shot("channels")
    # Of a run without a hint there is none.
    send(frontend, message("3", "WanVAEDecode", identity_of(frontend), latent_channels=[]))
    section.wait_for(state="detached")


@pytest.mark.quick_in("newest")
def test_inspect_shows_its_text_on_the_node(frontend):
    made = accelerated_workflow(seed=3, identity=f"inspect-{frontend.name}-{frontend.mode}")
    made["nodes"] = [made["nodes"][0], made["nodes"][2] | {}]
    made["nodes"][1] |= {"type": "WanVAEInspect", "widgets_values": [], "outputs": []}
    made["nodes"][1]["inputs"] = [{"name": "vae", "type": "VAE", "link": 1}]
    made["links"] = [[1, 1, 0, 3, 0, "VAE"]]
    made["nodes"][0]["outputs"][0]["links"] = [1]
    frontend.load(made)
    frontend.queue()
    shown = frontend.page.locator("wan-vae-text", has_text="wan2.1 VAE")
    shown.wait_for()
    assert "channels_last_3d" in shown.inner_text() or "contiguous" in shown.inner_text()
    saved = frontend.page.evaluate("() => JSON.stringify(window.app.graph.serialize())")
    assert "wan2.1 VAE" not in saved and json.loads(saved)
    frontend.fit()
    frontend.shot("inspect")


def test_nothing_of_ours_is_a_console_error_while_the_page_loads(frontend):
    if frontend.mode == "nodes2":
        return  # nothing is drawn yet
    # The frontend's own errors are not ours: the stack says who asked for what is not there.
    frontend.page.add_init_script(
        """
        const { error } = console;
        window.__stacks = [];
        console.error = (...said) => {
          window.__stacks.push(`${said.join(" ")} ${new Error().stack}`);
          error.apply(console, said);
        };
        """
    )
    frontend.open()
    stacks = frontend.page.evaluate("() => window.__stacks")
    assert [stack for stack in stacks if "/extensions/ComfyUI-WanVAE/" in stack] == []
