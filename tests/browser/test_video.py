"""Videos in the real frontends: shown, played, dropped, and the line of the node that makes one."""

from __future__ import annotations

import pytest

from tests.browser.workflows import video_workflow

pytestmark = pytest.mark.browser

# Plays the file of a node in a <video> of the page, and says what came of it.
PLAY = """async (shown) => {
  const query = new URLSearchParams({ ...shown, t: Date.now() });
  const video = document.createElement("video");
  video.muted = true;
  video.src = `/view?${query}`;
  document.body.append(video);
  try {
    await video.play();
    await new Promise((resolve) => video.addEventListener("ended", resolve));
    const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight).getContext("2d");
    canvas.drawImage(video, 0, 0);
    const data = canvas.getImageData(0, 0, video.videoWidth, video.videoHeight).data;
    const levels = [...data].filter((_, index) => index % 4 !== 3);
    return {
      size: [video.videoWidth, video.videoHeight],
      seconds: video.duration,
      darkest: Math.min(...levels),
      brightest: Math.max(...levels),
    };
  } finally {
    video.remove();
  }
}"""
DROP = """async (shown) => {
  const answer = await fetch(`/view?${new URLSearchParams(shown)}`);
  const file = new File([await answer.blob()], shown.filename, { type: "video/mp4" });
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(file);
  window.app.canvas.canvas.dispatchEvent(
    new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
}"""
BLANK = {"nodes": [], "links": [], "last_node_id": 0, "last_link_id": 0, "version": 0.4}


def saved_by(frontend, kind: str) -> dict:
    """What the node of class `kind` says it has saved."""
    shown: dict = frontend.page.evaluate(
        """(kind) => {
          const node = window.app.graph.nodes.find(({ type }) => type === kind);
          return window.app.nodeOutputs[node.id].images[0];
        }""",
        kind,
    )
    return shown


def test_a_video_is_shown_plays_and_gives_its_workflow_back(frontend):
    """Decode to Video: on the node, in a <video> of Chromium, and dropped on an empty canvas."""
    identity = f"video-{frontend.name}-{frontend.mode}"
    made = video_workflow("WanVAEDecodeToVideo", identity)
    frontend.load(made)
    frontend.queue()
    frontend.line("✓9 frames")
    frontend.page.wait_for_function(
        """() => [...document.querySelectorAll("video")].some((video) => video.videoWidth > 0)"""
    )
    shown = saved_by(frontend, "WanVAEDecodeToVideo")
    played = frontend.page.evaluate(PLAY, shown)
    assert played["size"] == [96, 64]
    assert played["seconds"] == pytest.approx(9 / 16, abs=0.05)
    assert played["brightest"] - played["darkest"] > 20, "a picture, and no black frame"
    frontend.load(BLANK)
    frontend.page.evaluate(DROP, shown)
    frontend.page.wait_for_function(
        """() => window.app.graph.nodes.some(({ type }) => type === "WanVAEDecodeToVideo")"""
    )
    assert frontend.page.evaluate("() => window.app.graph.id") == made["id"]
    frontend.line("✓9 frames")


# Values as pages save them: fps and four others, format and what is in it, bit_depth and others.
SAVED = {
    "before there was a choice": (["auto", "auto"], {}),
    "flat": (["mkv", "av1", 30, 10, "temp", True], {"codec": "av1", "crf": 30}),
    "flat, crf alone": (["auto", "auto", 20, 10, "temp", True], {"codec": "h264", "crf": 20}),
    "nested": (
        ["mkv", "av1", "re-encode", 30, "auto", "auto", 16, 10, "temp", True],
        {"codec": "av1", "crf": 30},
    ),
}
INPUTS = """async () => {
  const { output } = await window.app.graphToPrompt();
  return Object.values(output).find((node) => node.class_type === "WanVAEDecodeToVideo").inputs;
}"""


@pytest.mark.parametrize("form", SAVED)
def test_a_workflow_saved_in_one_form_opens_in_the_other(frontend, form):
    values, meant = SAVED[form]
    made = video_workflow("WanVAEDecodeToVideo", f"saved-{frontend.name}-{frontend.mode}")
    (saved,) = (one for one in made["nodes"] if one["type"] == "WanVAEDecodeToVideo")
    saved["widgets_values"] = [16, "video/WanVAE", "auto", "auto", 0, *values]
    frontend.load(made)
    inputs = frontend.page.evaluate(INPUTS)
    nested = "format.codec" in inputs
    prefix = "format.codec.encoding." if nested else ""
    assert inputs["format"] == values[0]
    codec = inputs["format.codec" if nested else "codec"]
    # Where crf alone was chosen, only the nested form names the codec that auto stands for.
    assert codec == (meant.get("codec", "auto") if nested or form != "flat, crf alone" else "auto")
    assert inputs.get(f"{prefix}crf", 16) == meant.get("crf", 16)
    wanted = (10, "temp", True) if meant else (8, "output", False)
    assert tuple(inputs[name] for name in ("bit_depth", "save_to", "normalized")) == wanted
    # Saved again and opened again, as copies and undo do.
    frontend.page.evaluate("() => window.app.loadGraphData(window.app.graph.serialize())")
    assert frontend.page.evaluate(INPUTS) == inputs
    frontend.fit()
    frontend.shot(f"options-{'nested' if nested else 'flat'}")


def test_inputs_that_a_choice_brings_speak_chinese(frontend):
    if frontend.mode == "nodes2":
        return  # the words do not depend on how nodes are drawn
    made = video_workflow("WanVAEDecodeToVideo", f"words-{frontend.name}-{frontend.mode}")
    (saved,) = (one for one in made["nodes"] if one["type"] == "WanVAEDecodeToVideo")
    saved["widgets_values"] = [16, "video/WanVAE", "auto", "auto", 0, *SAVED["nested"][0]]
    frontend.setting("Comfy.Locale", "zh")
    try:
        frontend.open()
        frontend.load(made)
        labels = frontend.page.evaluate(
            """() => {
              const { nodes } = window.app.graph;
              const node = nodes.find((node) => node.type === "WanVAEDecodeToVideo");
              return node.widgets.map((widget) => [widget.name, widget.label]);
            }"""
        )
        labels = dict(labels)
        if "format.codec" in labels:  # else a ComfyUI whose choices bring no inputs
            assert labels["format"] == "格式"
            assert labels["format.codec"] == "编码"
            assert labels["format.codec.encoding"] == "编码方式"
            assert labels["format.codec.encoding.crf"] == "质量 (crf)"
            assert labels["format.codec.encoding.color_space"] == "色彩空间"
    finally:
        frontend.setting("Comfy.Locale", "en")
        frontend.open()


@pytest.mark.quick_in("newest")
def test_the_line_of_create_video_shows_what_the_reader_did(frontend):
    """It decodes nothing itself; Save Video, a node of core's, decodes as it saves."""
    frontend.load(video_workflow("WanVAECreateVideo", f"lazy-{frontend.name}-{frontend.mode}"))
    frontend.open_tab()
    frontend.line("No report yet")
    frontend.queue()
    frontend.line("✓9 frames")
    assert frontend.page.locator("wan-vae-line").count() == 1
    titles = frontend.page.locator(".wan-vae-card > summary")
    titles.nth(1).wait_for()
    found = [text.split(" #")[0] for text in titles.all_inner_texts()]
    assert found == ["Save Video", "Wan VAE Create Video"]
    cards = frontend.page.locator(".wan-vae-card")
    assert "Video encoder" in cards.first.inner_text() and "libx264" in cards.first.inner_text()
    ready = cards.nth(1).locator(".wan-vae-summary").text_content()
    assert ready.startswith("ready: decoded when a node reads it · 96×64"), ready
