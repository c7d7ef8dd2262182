"""The line and the panel in the real frontends, in canvas and Nodes 2.0."""

import json
import re
import urllib.parse

import pytest

from tests.browser.workflows import (
    accelerated_workflow,
    cat_workflow,
    doubled_workflow,
    sharded_workflow,
    workflow,
)

pytestmark = pytest.mark.browser

DONE = re.compile(r"9 frames · [\d.]+ m?s · [\d.]+ frames/s · 96×64 · cpu · fp32 · NCDHW$")


def text_of(frontend):
    return frontend.page.locator("wan-vae-line .wan-vae-text").first.inner_text()


def assert_shown_whole(frontend):
    """The text of the first line fits into its box."""
    cut = frontend.page.locator("wan-vae-line .wan-vae-text").first.evaluate(
        "(text) => [text.scrollHeight - text.clientHeight, text.scrollWidth - text.clientWidth]"
    )
    assert max(cut) <= 1, f"{cut} pixels are cut off"


def finished(frontend, text="✓9 frames"):
    """A workflow whose node has a report: from this run, or from the cache of an earlier one."""
    frontend.load(workflow(seed=2, identity=f"reload-{frontend.mode}"))
    frontend.queue()
    frontend.line(text)


def test_line_and_panel_follow_a_run(frontend):
    frontend.load(workflow(seed=1, identity=f"run-{frontend.mode}"))
    frontend.line("No report yet")
    frontend.open_tab()
    frontend.page.get_by_text("Add a Wan VAE Decode node").wait_for()
    frontend.queue()
    frontend.line("✓9 frames")
    assert DONE.match(text_of(frontend)), text_of(frontend)
    assert_shown_whole(frontend)
    assert frontend.page.locator("wan-vae-line").first.get_attribute("data-tone") == "good"
    card = frontend.page.locator(".wan-vae-card").first
    card.wait_for()
    assert card.get_attribute("data-tone") == "good"
    assert card.locator("> summary").inner_text().startswith("Wan VAE Decode #3")
    assert frontend.page.locator(".wan-vae-strip .wan-vae-cell").count() > 30
    body = card.inner_text()
    # What is looked for first stands first; detected and chosen layout are open, the rest folded.
    order = ("RESULT", "Size", "MEMORY", "LAYOUT", "as loaded", "Chosen", "KERNELS", "LAYERS")
    places = [body.index(word) for word in order]
    assert places == sorted(places)
    assert "1 × 16 × 3 × 8 × 12" in body
    layers = card.locator(".wan-vae-layers")
    assert not layers.locator(".wan-vae-strip").is_visible()
    layers.locator("summary").click()
    layers.locator(".wan-vae-strip").wait_for()
    # One meaning, one number: the legend of the strip and the counts above it agree.
    used = card.locator("dt", has_text="Conv3d weights as used").locator("+ dd").inner_text()
    legend = card.locator(".wan-vae-legend span").all_inner_texts()
    conv3d = [text.replace("conv3d ", "") for text in legend if " conv3d " in text]
    assert sorted(conv3d) == sorted(used.split(", "))
    # Here is no GPU, which is one reason for all kernels.
    kernels = card.locator(".wan-vae-backends")
    kernels.locator("summary").click()
    assert [text.split(": ")[-1] for text in kernels.locator("li").all_inner_texts()] == ["no GPU"]
    frontend.shot("panel")


@pytest.mark.quick_in("newest")
def test_a_node_of_core_has_a_card_and_the_vae_node_a_line(frontend):
    """VAE Decode is not ours: it gets no line, and the panel shows its report all the same."""
    frontend.load(accelerated_workflow(seed=3, identity=f"accelerated-{frontend.mode}"))
    frontend.open_tab()
    frontend.line("No report yet")
    frontend.queue()
    frontend.line("✓9 frames")
    assert frontend.page.locator("wan-vae-line").count() == 1
    assert DONE.match(text_of(frontend)), text_of(frontend)
    titles = frontend.page.locator(".wan-vae-card > summary")
    titles.nth(1).wait_for()
    found = [text.split("\n")[0] for text in titles.all_inner_texts()]
    assert [re.match("(.*) #", text)[1] for text in found] == [
        "VAE Decode",
        "Wan VAE, fast everywhere",
    ]
    frontend.shot("accelerated")


def test_the_shards_of_a_run_are_a_table(frontend):
    if (frontend.name, frontend.mode) != ("newest", "canvas"):
        return  # two workers start slowly, and the panel is the same in each
    frontend.load(sharded_workflow(seed=1, identity="shards"))
    frontend.open_tab()
    frontend.queue()
    frontend.line("✓9 frames")
    table = frontend.page.locator(".wan-vae-card .wan-vae-shards table").first
    table.wait_for()
    assert table.locator("th").all_inner_texts() == ["Rank", "Device", "Rows", "Halo", "Waited"]
    rows = [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]
    assert [row[:2] for row in rows] == [["0", "cpu"], ["1", "cpu"]]
    # Twelve columns of the latent, six for each.
    assert [row[2] for row in rows] == ["width 0–6", "width 6–12"]
    assert all(re.fullmatch(r"[1-9]\d* \([\d.]+ [KM]iB\)", row[3]) for row in rows), rows
    frontend.shot("shards")


@pytest.mark.full
def test_the_sample_that_the_repository_ships(frontend):
    """Node, preview and panel after a decode of a real picture."""
    frontend.load(cat_workflow())
    frontend.open_tab()
    frontend.queue()
    frontend.line("✓17 frames")
    # Seventeen frames, as the preview node shows them.
    frontend.page.wait_for_function(
        """() => {
          const graph = window.app.rootGraph ?? window.app.graph;
          return graph.getNodeById(4)?.imgs?.length === 17 ||
            document.querySelectorAll(".image-preview img, .image-preview button").length > 1;
        }"""
    )
    frontend.page.wait_for_function(
        "() => [...document.images].every((image) => image.complete && image.naturalWidth > 0)"
    )
    bars = frontend.page.locator(".wan-vae-card").first.locator(".wan-vae-bar")
    assert bars.count() == 5, "one bar a chunk of one latent frame"
    frontend.fit()
    frontend.shot("sample")


def test_line_has_the_height_it_asks_for_and_stays_inside_the_node(frontend):
    frontend.load(workflow(seed=1, identity=f"run-{frontend.mode}"))
    box = frontend.page.locator("wan-vae-line button").first.bounding_box()
    assert 20 <= box["height"] <= 48
    assert box["width"] > 150
    frontend.shot("node")


@pytest.mark.quick_in("newest")
def test_report_survives_reload_and_a_cached_run(frontend):
    frontend.load(workflow(seed=2, identity=f"reload-{frontend.mode}"))
    frontend.queue()
    frontend.line("✓9 frames")
    before = text_of(frontend)
    frontend.open()
    frontend.load(workflow(seed=2, identity=f"reload-{frontend.mode}"))
    frontend.line("✓9 frames")
    assert text_of(frontend) == before
    with frontend.page.expect_response(re.compile("/wan_vae/cached")) as answer:
        frontend.queue()
    assert answer.value.json()["reports"] == [], "the run of this very node is known already"
    assert text_of(frontend) == before
    frontend.open_tab()
    frontend.page.locator(".wan-vae-card").first.wait_for()


@pytest.mark.quick_in("pinned")
def test_another_workflow_with_the_same_node_ids_shows_nothing(frontend):
    finished(frontend)
    frontend.load(workflow(seed=2, identity="somebody-elses"))
    frontend.line("No report yet")


@pytest.mark.quick_in("pinned")
def test_a_result_from_the_cache_says_so_in_a_copy_of_the_workflow(frontend):
    """Save As, Duplicate, a template that was opened again: another id, nothing runs."""
    finished(frontend)
    took = text_of(frontend)
    frontend.load(workflow(seed=2, identity=f"copy-{frontend.name}-{frontend.mode}"))
    frontend.line("No report yet")
    frontend.queue()
    frontend.line("✓from the cache: 9 frames")
    assert text_of(frontend) == f"from the cache: {took}"
    if frontend.mode == "nodes2":
        return  # what the server keeps does not depend on how nodes are drawn
    frontend.open()
    frontend.load(workflow(seed=2, identity=f"copy-{frontend.name}-{frontend.mode}"))
    frontend.line("✓from the cache: 9 frames")


@pytest.mark.quick_in("newest")
def test_of_two_nodes_that_are_the_same_both_have_a_line(frontend):
    """ComfyUI executes one of them; the other one gets its result, and sends no report."""
    frontend.load(doubled_workflow(seed=23, identity=f"double-{frontend.name}-{frontend.mode}"))
    frontend.line("No report yet")
    frontend.queue()
    frontend.line("✓9 frames")
    frontend.line("✓from the cache: 9 frames")


@pytest.mark.quick_in("newest")
def test_the_report_of_an_api_prompt_belongs_to_no_node_on_screen(frontend):
    """Prompts of the same client without a workflow: of an extension, or of a script."""
    frontend.load(workflow(seed=21, identity=f"api-{frontend.mode}"))
    frontend.line("No report yet")
    seen = frontend.page.evaluate(
        """async () => {
          const { api } = window.comfyAPI.api;
          const { output } = await window.app.graphToPrompt();
          const told = new Promise((resolve) => {
            api.addEventListener("wan_vae.report", ({ detail }) => {
              if (detail.report.status === "done") resolve(detail);
            });
          });
          await fetch("/prompt", {
            method: "POST",
            headers: { "Content-Type": "application/json" },
            body: JSON.stringify({ prompt: output, client_id: api.clientId }),
          });
          return told;
        }"""
    )
    assert (seen["node"], seen["workflow"]) == ("3", None)
    assert text_of(frontend) == "No report yet: run the workflow"


@pytest.mark.quick_in("newest")
def test_cancel_shows_live_progress_then_where_it_stopped(frontend):
    identity = f"cancel-{frontend.mode}"
    frontend.load(workflow(seed=3, frames=60, height=16, width=16, chunk=1, identity=identity))
    frontend.queue()
    frontend.line(" left · ")  # from the second pass on
    assert re.search(r"^\d+ of 237 frames · \d:\d\d left · 128×128 · cpu", text_of(frontend))
    running = frontend.page.locator("wan-vae-line").first
    assert running.get_attribute("data-tone") == "running"
    frontend.page.evaluate("() => window.app.api.interrupt(null)")
    frontend.line("cancelled after")
    done = int(re.search(r"cancelled after (\d+) of 237", text_of(frontend))[1])
    assert 0 < done < 237
    frontend.load(workflow(seed=4, identity=identity))
    frontend.queue()
    frontend.line("✓9 frames")


@pytest.mark.quick_in("newest")
def test_an_error_is_on_the_line_and_in_the_panel(frontend):
    frontend.load(workflow(seed=5, channels=4, identity=f"bad-{frontend.mode}"))
    frontend.queue()
    frontend.line("failed: the latent has 4 channels")
    assert frontend.page.locator("wan-vae-line").first.get_attribute("data-tone") == "bad"
    frontend.page.keyboard.press("Escape")
    frontend.open_tab()
    notes = frontend.page.locator(".wan-vae-card .wan-vae-notes").first
    assert "VAE decodes 16" in notes.inner_text()
    card = frontend.page.locator(".wan-vae-card").first
    assert card.inner_text().count("the latent has 4 channels") == 1, "said once"
    frontend.open()  # leave ComfyUI's own error dialog behind


@pytest.mark.quick_in("newest")
def test_the_layer_strip_works_from_the_keyboard(frontend):
    finished(frontend)
    frontend.open_tab()
    layers = frontend.page.locator(".wan-vae-card").first.locator(".wan-vae-layers details")
    layers.evaluate("(details) => { details.open = true; }")
    strip = frontend.page.locator(".wan-vae-strip").first
    assert strip.get_attribute("role") == "toolbar"
    cells = strip.locator(".wan-vae-cell")
    cells.first.focus()
    readout = frontend.page.locator(".wan-vae-readout").first
    first = readout.inner_text()
    frontend.page.keyboard.press("ArrowRight")
    second = readout.inner_text()
    assert first != second
    assert cells.nth(1).get_attribute("aria-label") == second
    frontend.page.keyboard.press("End")
    assert cells.last.get_attribute("tabindex") == "0"
    assert strip.locator("[tabindex='0']").count() == 1


@pytest.mark.quick_in("pinned")
def test_copy_report_copies_the_wire_format(frontend):
    finished(frontend)
    frontend.open_tab()
    frontend.page.get_by_role("button", name="Copy report").first.click()
    frontend.page.get_by_text("Copied", exact=True).first.wait_for()
    copied = json.loads(frontend.page.evaluate("() => navigator.clipboard.readText()"))
    assert copied["schema"] == "wan_vae.report/1"


def test_line_button_opens_the_panel(frontend):
    finished(frontend)
    frontend.page.evaluate(
        """() => {
          const tabs = window.app.extensionManager.sidebarTab;
          if (tabs.activeSidebarTabId) tabs.toggleSidebarTab(tabs.activeSidebarTabId);
        }"""
    )
    frontend.page.locator("wan-vae-panel").wait_for(state="detached")
    frontend.page.locator("wan-vae-line button").first.click()
    frontend.page.locator("wan-vae-panel").wait_for()


def test_line_is_absent_from_saved_workflows_and_prompts(frontend):
    finished(frontend)
    saved, prompt = frontend.page.evaluate(
        """async () => {
          const graph = window.app.rootGraph ?? window.app.graph;
          const { output } = await window.app.graphToPrompt();
          return [graph.serialize(), output];
        }"""
    )
    node = next(node for node in saved["nodes"] if node["type"] == "WanVAEDecode")
    assert node["widgets_values"] == ["auto", "auto", 0, False]
    assert "wan_vae_line" not in json.dumps([saved, prompt])


def test_a_setting_hides_the_line(frontend):
    finished(frontend)
    line = frontend.page.locator("wan-vae-line").first
    line.wait_for()
    frontend.setting("WanVAE.NodeLine", False)
    line.wait_for(state="hidden")
    frontend.load(workflow(seed=2, identity="hidden-from-the-start"))
    frontend.page.wait_for_function(
        "() => (window.app.rootGraph ?? window.app.graph).getNodeById(3) !== null"
    )
    assert not line.is_visible()
    frontend.setting("WanVAE.NodeLine", True)
    line.wait_for()


@pytest.mark.quick_in("newest")
@pytest.mark.parametrize("palette", ["light", "dark"])
def test_text_is_readable_in_both_themes(frontend, palette):
    frontend.setting("Comfy.ColorPalette", palette)
    finished(frontend)
    frontend.open_tab()
    frontend.page.locator(".wan-vae-card").first.wait_for()
    worst = frontend.page.evaluate(CONTRAST)
    frontend.shot(f"theme-{palette}")
    assert worst["ratio"] >= 4.5, worst


def with_a_second_copy(route):
    """The server's answer, as if the pack were there twice."""
    notice = "Wan VAE is installed twice"
    values = {"loaded": "/a", "other": "/b", "delete": "/b", "kept": "/a"}
    values |= {"about_loaded": "", "about_other": ""}
    answer = route.fetch()
    told = {"notices": [notice], "worded": {notice: {"key": "pack.twice", "values": values}}}
    route.fulfill(response=answer, json=answer.json() | told)


def test_panel_speaks_chinese(frontend):
    if frontend.mode == "nodes2":
        return  # the words do not depend on how nodes are drawn
    frontend.setting("Comfy.Locale", "zh")
    frontend.page.route("**/wan_vae/reports?*", with_a_second_copy)
    try:
        frontend.open()
        # The last: a frontend may also say it to readers of the screen.
        frontend.page.get_by_text("请删除 /b,保留 /a,然后重新启动").last.wait_for()
        finished(frontend, "✓9 帧")
        frontend.open_tab()
        frontend.page.get_by_role("button", name="复制报告").first.wait_for()
    finally:
        frontend.page.unroute("**/wan_vae/reports?*")
        frontend.setting("Comfy.Locale", "en")
        frontend.open()


def test_tokens_in_the_name_of_a_video_are_replaced_as_in_core(frontend):
    """In the prompt only; the workflow keeps them for the next run. Core's node beside it."""
    name = "%date:yyyy-MM-dd%/%Wan VAE Decode to Video.fps%_%width%"
    ours, core, kept, expected = frontend.page.evaluate(
        """async (name) => {
          const { app, LiteGraph } = window;
          const graph = app.rootGraph ?? app.graph;
          const kinds = ["WanVAEDecodeToVideo", "SaveVideo"];
          const added = kinds.map((kind) => {
            const node = LiteGraph.createNode(kind);
            graph.add(node);
            node.widgets.find((widget) => widget.name === "filename_prefix").value = name;
            return node;
          });
          try {
            const { output, workflow } = await app.graphToPrompt();
            const kept = workflow.nodes.find((node) => node.type === kinds[0]).widgets_values;
            const now = new Date();
            const two = (n) => String(n).padStart(2, "0");
            const day = [now.getFullYear(), two(now.getMonth() + 1), two(now.getDate())].join("-");
            const made = added.map((node) => output[node.id].inputs.filename_prefix);
            return [...made, kept, `${day}/0_%width%`];
          } finally {
            for (const node of added) graph.remove(node);
          }
        }""",
        name,
    )
    assert ours == core == expected
    assert name in kept


def test_help_page_is_served(frontend):
    for name in (
        "WanVAEAccelerate",
        "WanVAEDecode",
        "WanVAEDecodeSharded",
        "WanVAEEncode",
        "WanVAEInspect",
        "WanVAEDecodeToVideo",
        "WanVAECreateVideo",
    ):
        path = urllib.parse.quote(f"/extensions/ComfyUI-WanVAE/docs/{name}.md")
        answer = frontend.page.request.get(frontend.server.url + path)
        assert answer.ok
        assert answer.text().startswith("# Wan VAE")


# WCAG contrast of the text of line and panel against the first opaque background behind it.
CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => {
    const [R, G, B] = [r, g, b].map((v) => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * R + 0.7152 * G + 0.0722 * B;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = rgba(getComputedStyle(at).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  let worst = { ratio: Infinity };
  const texts = ".wan-vae-text, .wan-vae-sign, .wan-vae-card :is(p, dt, dd, h4, button, span)";
  for (const element of document.querySelectorAll(texts)) {
    if (!element.textContent.trim()) continue;
    const [a, b] = [rgba(getComputedStyle(element).color), behind(element)].map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst.ratio) worst = { ratio, text: element.textContent, tag: element.className };
  }
  return worst;
}"""
