"""Encode, Inspect, Decode to Video, errors and cancel in a running ComfyUI."""

import json
import re
import shutil
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter

import pytest

from tests.comfy.graphs import (
    OTHER_VAE,
    VAES,
    decode,
    decode_and_compare,
    latent,
    load_vae,
    node,
)
from tests.comfy.server import Run
from tests.conftest import PATIENCE_S

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("frames", [1, 5, 7])
def test_encode_is_that_of_core(comfy, frames):
    pixels = node("ProbeFrames", frames=frames, height=67, width=90, channels=3, seed=frames)
    run = comfy.run(
        {
            "1": load_vae(),
            "2": pixels,
            "3": node("WanVAEEncode", vae=["1", 0], pixels=["2", 0]),
            "4": node("VAEEncode", vae=["1", 0], pixels=["2", 0]),
            "5": node("ProbeCompareLatents", a=["3", 0], b=["4", 0]),
        }
    )
    assert run.error is None, run.error
    found = run.outputs["5"]
    assert found["a"] == found["b"]
    assert found["difference"][0] < 1e-4
    assert found["spread"][0] > 0.01


def test_inspect_reports_without_decoding(comfy):
    run = comfy.run({"1": load_vae(), "3": node("WanVAEInspect", vae=["1", 0])})
    assert run.error is None, run.error
    report = run.report("3")
    assert (report["operation"], report["chunks"]) == ("inspect", [])
    text = run.outputs["3"]["text"][0]
    assert "decoder.conv1" in text
    layers = report["layers"]
    kinds = Counter(f"{e['op']} {e['format']} {e['backend']}" for e in layers)
    for kind, number in kinds.items():
        assert f" {number} {kind.replace(' either ', ' layout-free (1x1x1) ')}\n" in text
    assert text.count("\nlayer  ") == len(layers) > 30
    # The page words the rows itself.
    assert "\n".join(f"{label:<9} {said}" for label, said in report["rows"]) == text
    labels = {label for label, _ in report["rows"] if label}  # a row that goes on has none
    assert {report["worded"][label]["key"] for label in labels} > {"row.model"}


def test_inspect_tells_the_numbers_of_the_file_from_those_of_the_computation(comfy):
    folder = comfy.base / "models" / "vae"
    shutil.copyfile(folder / VAES[0], folder / "halved.safetensors")
    run = comfy.run(
        {
            "1": load_vae("halved.safetensors"),
            "2": node("ProbeVAEWeights", vae=["1", 0], kind="bfloat16"),
            "3": node("WanVAEInspect", vae=["2", 0]),
        }
    )
    assert run.error is None, run.error
    lines = run.outputs["3"]["text"][0].splitlines()
    assert "compute   float32 on cpu (CPU)" in lines
    assert "weights   as loaded: 194 bfloat16" in lines


def failed(comfy, prompt: dict) -> tuple[str, str]:
    """Type and message of a decode that fails after one that was done; the panel hears of it."""
    assert comfy.run(decode(latent(frames=1, seed=60))).error is None
    sent = []
    run = comfy.run(prompt, on_message=sent.append)
    report = run.report("3")
    live = [m["data"]["report"] for m in sent if m["type"] == "wan_vae.report"]
    assert report["status"] == "failed"
    assert live[-1] == report
    assert "\n" not in report["error"]
    return run.error["exception_type"], report["error"]


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ({"batch": 0}, r"empty, its shape is \(0, 16, 3, 8, 12\)"),
        ({"frames": 0}, r"empty, its shape is \(1, 16, 0, 8, 12\)"),
        ({"kind": "flat"}, r"has shape \(16, 8, 12\): expected \[B, C, T, H, W\]"),
        ({"kind": "none"}, r"no LATENT \(NoneType\)"),
        ({"kind": "keyless"}, r"no LATENT \(keys \[\]\)"),
        ({"kind": "unfilled"}, r"'samples' is a NoneType"),
    ],
)
@pytest.mark.parametrize("decoder", ["WanVAEDecode", "WanVAEDecodeSharded", "WanVAEDecodeToVideo"])
def test_what_is_no_latent_is_refused_in_words(comfy, decoder, samples, words):
    prompt = decode(latent(**samples))
    prompt["3"]["class_type"] = decoder
    if decoder == "WanVAEDecodeToVideo":
        prompt["3"]["inputs"] |= {"fps": 16.0, "filename_prefix": "video/refused"}
    elif decoder == "WanVAEDecodeSharded":
        prompt["3"]["inputs"] |= {"devices": "cpu,cpu", "axis": "auto", "gather": "shared"}
    kind, message = failed(comfy, prompt)
    assert kind.endswith("LatentError")
    assert re.search(words, message), message


def test_no_image_is_refused_in_words(comfy):
    prompt = {
        "1": load_vae(),
        "2": node("ProbeFrames", frames=0, height=64, width=64, channels=3, seed=0),
        "3": node("WanVAEEncode", vae=["1", 0], pixels=["2", 0]),
        "5": node("ProbeSink", value=["3", 0]),
    }
    kind, message = failed(comfy, prompt)
    assert kind.endswith("LatentError")
    assert "(0, 64, 64, 3)" in message


def test_an_error_that_is_not_ours_reaches_the_panel_too(comfy):
    prompt = {**decode(latent(seed=61)), "0": load_vae()}
    prompt["1"] = node("ProbeBrokenVAE", vae=["0", 0])
    kind, message = failed(comfy, prompt)
    assert kind == "ZeroDivisionError"
    assert message == "ZeroDivisionError: first line"


def test_an_unknown_precision_is_refused_in_words(comfy):
    prompt = {**decode(latent(seed=62), precision=["6", 0]), "6": node("ProbeChoice", value="fp8")}
    kind, message = failed(comfy, prompt)
    assert kind.endswith("BackendError")
    assert "precision is 'fp8'" in message and "'bf16'" in message


@pytest.mark.parametrize(
    "pnginfo",
    [
        "text",
        ["workflow"],
        {"workflow": "text"},
        {"workflow": ["id"]},
        {"workflow": {"id": 7}},
        {"workflow": {"id": ["a"]}},
    ],
)
def test_any_workflow_that_an_api_client_sends_is_decoded(comfy, pnginfo):
    seed = 1000 + sum(map(ord, str(pnginfo)))
    run = comfy.run(decode(latent(frames=1, seed=seed)), pnginfo=pnginfo)
    assert run.error is None, run.error
    assert run.report("3")["status"] == "done"
    assert run.message("3")["workflow"] is None


def test_video_is_streamed_into_the_output_folder(comfy):
    run = comfy.run(
        {
            "1": load_vae(),
            "2": latent(frames=3, seed=11),
            "3": node(
                "WanVAEDecodeToVideo",
                vae=["1", 0],
                samples=["2", 0],
                fps=16.0,
                filename_prefix="video/test",
            ),
        }
    )
    assert run.error is None, run.error
    (shown,) = run.outputs["3"]["images"]
    path = comfy.base / "output" / shown["subfolder"] / shown["filename"]
    assert path.stat().st_size > 500
    assert run.report("3")["done_frames"] == 9


def test_a_batch_becomes_a_file_for_each_latent(comfy):
    run = comfy.run(
        {
            "1": load_vae(),
            "2": latent(frames=2, batch=2, seed=14),
            "3": node(
                "WanVAEDecodeToVideo",
                vae=["1", 0],
                samples=["2", 0],
                fps=16.0,
                filename_prefix="video/batch",
            ),
        }
    )
    assert run.error is None, run.error
    names = [shown["filename"] for shown in run.outputs["3"]["images"]]
    assert len(set(names)) == 2
    assert all((comfy.base / "output" / "video" / name).stat().st_size > 500 for name in names)
    assert run.report("3")["status"] == "done"


def test_another_vae_is_named(comfy):
    prompt = {"1": load_vae(OTHER_VAE), "3": node("WanVAEInspect", vae=["1", 0])}
    run = comfy.run(prompt)
    assert run.error["exception_type"] == "wan_vae.NotAWanVAEError", "no folder of the user"
    assert "Stable Diffusion" in run.error["exception_message"]
    assert "own VAE nodes" in run.error["exception_message"]


def watched(comfy, seed: int) -> Run:
    """A run that decodes a video in several chunks."""
    prompt = decode(latent(frames=6, height=16, width=16, seed=seed), chunk_frames=1)
    run = comfy.run(prompt)
    assert run.error is None, run.error
    return run


def test_a_node_says_what_it_does_from_the_start_and_how_long_it_will_take(comfy):
    run = watched(comfy, 82)
    reports = [m["report"] for m in run.of_type("wan_vae.report")]
    assert run.previews == 0, "ComfyUI's own setting: it shows none of a sampler either"
    assert reports[0]["phase"] == {"name": "planning"}
    assert {report["status"] for report in reports[:-1]} == {"running"}
    assert reports[-1]["status"] == "done"
    lefts = [report["left_ms"] for report in reports if report.get("left_ms") is not None]
    assert lefts and all(left >= 0 for left in lefts)


def test_one_image_in_a_copy_that_is_there_sends_its_report_and_nothing_else(comfy):
    """Each message wakes the server's thread, for which the node waits."""
    for seed in (90, 91):
        run = comfy.run(decode(latent(frames=1, seed=seed)))
        assert run.error is None, run.error
    statuses = [m["report"]["status"] for m in run.of_type("wan_vae.report")]
    assert statuses == ["done"]
    assert [m for m in run.of_type("progress") if m["node"] == "3"] == []


@pytest.mark.parametrize("frames", [1, 6])
def test_the_phases_of_a_report_are_all_of_the_nodes_time(comfy, frames):
    began, missing, unnamed = {}, [1.0], [1.0]

    def hear(message):
        if message["type"] == "executing":
            began.setdefault(message["data"]["node"], time.perf_counter())

    # A few hundredths, of a run that no other process disturbs; here the machine may be busy, and
    # the best of up to four runs counts.
    for seed in range(92, 96):
        if abs(min(missing, key=abs)) < 0.5 and min(unnamed) < 0.3:
            break
        began.clear()
        samples = latent(frames=frames, height=16, width=16, seed=seed)
        run = comfy.run(decode(samples), on_message=hear)
        phases = run.report("3")["host_ms"]
        node_ms = (began["5"] - began["3"]) * 1e3
        missing.append(1 - sum(phases.values()) / node_ms)
        unnamed.append(phases["node: rest"] / node_ms)
        assert {"node: look", "node: plan", "node: set up", "chunks"} <= phases.keys()
    assert abs(min(missing, key=abs)) < 0.5, (missing, phases)
    assert min(unnamed) < 0.3, (unnamed, phases)


def test_a_cancelled_batch_of_clips_counts_all_of_them(comfy):
    """Two clips of 13 frames go into two files; the second one is stopped."""
    sent = []

    def stop(message):
        if message["type"] == "progress" and message["data"]["value"] > 17 and not sent:
            sent.append(message)
            comfy.post("/interrupt", {})

    clips = latent(batch=2, frames=4, height=16, width=16, seed=83)
    inputs = {"fps": 16.0, "filename_prefix": "video/batch", "chunk_frames": 1}
    prompt = {"1": load_vae(), "2": clips}
    prompt["3"] = node("WanVAEDecodeToVideo", vae=["1", 0], samples=["2", 0], **inputs)
    run = comfy.run(prompt, on_message=stop)
    assert run.interrupted
    report = run.report("3")
    assert report["status"] == "cancelled"
    assert 13 < report["done_frames"] < report["total_frames"] == 26
    assert report["pixel_shape"] == [2, 3, 13, 128, 128]
    done = {m["data"]["max"] for m in run.messages if m["type"] == "progress"}
    assert 26 in done, "the bar is that of the batch"


def test_history_and_messages_carry_a_summary_and_the_route_the_report(comfy):
    run = comfy.run(decode(latent(seed=84)))
    shown = run.outputs["3"]["wan_vae"][0]
    assert len(json.dumps(shown)) < 500
    assert shown["done_frames"] == 9 and shown["layout"] == "contiguous"
    (executed,) = (m for m in run.of_type("executed") if m["node"] == "3")
    assert executed["output"]["wan_vae"] == [shown]
    assert len(run.report("3")["layers"]) > 20


def test_a_client_gets_the_reports_of_its_own_prompts_only(comfy):
    mine = comfy.run(decode(latent(seed=85)))
    assert mine.report("3")["status"] == "done"
    assert comfy.reports("somebody-else") == []
    assert comfy.get("/wan_vae/reports")["reports"] == []
    # Nor does it learn of another's prompt by its id.
    asked = {"client_id": "somebody else", "prompt_id": mine.prompt_id, "nodes": ["3"]}
    assert comfy.post("/wan_vae/cached", asked) == {"reports": []}


@pytest.mark.parametrize("body", [b"{", b"\xff", b"", b"[]"])
def test_what_a_client_sends_by_mistake_is_refused_and_no_failure(comfy, body):
    request = urllib.request.Request(
        f"{comfy.url}/wan_vae/cached", body, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=PATIENCE_S)
    assert caught.value.code == 400
    caught.value.close()


def test_modules_that_another_pack_changed_are_named(comfy):
    """Hooks and methods of ComfyUI's network, as packs for seamless textures put there."""
    prompt = {**decode(latent(seed=87)), "0": load_vae()}
    prompt["1"] = node("ProbeOddVAE", vae=["0", 0], kind="hooked")
    run = comfy.run(prompt)
    assert run.error is None, run.error
    (warning,) = run.report("3")["warnings"]
    assert "2 modules" in warning
    assert "(decoder.conv1.forward, decoder.forward_hooks)" in warning
    assert comfy.run(decode(latent(seed=88))).report("3")["warnings"] == []


def test_a_result_from_the_cache_is_known_under_another_workflow(comfy):
    prompt = decode(latent(seed=86))
    first = comfy.run(prompt, pnginfo={"workflow": {"id": "a"}})
    # The same nodes under other ids, as in a copy.
    copied = {f"1{name}": dict(entry) for name, entry in prompt.items()}
    for entry in copied.values():
        entry["inputs"] = {
            name: [f"1{value[0]}", value[1]] if isinstance(value, list) else value
            for name, value in entry["inputs"].items()
        }
    again = comfy.run(copied, pnginfo={"workflow": {"id": "b"}})
    message = again.message("13")
    assert (message["cached"], message["workflow"], message["kind"]) == (True, "b", "WanVAEDecode")
    assert message["report"] == first.report("3")
    assert first.message("3")["cached"] is False


def test_of_two_nodes_that_are_the_same_both_have_the_report_of_the_one_that_ran(comfy):
    """ComfyUI executes one of them, and gives the other one its result."""
    prompt = decode(latent(seed=89))
    prompt["13"], prompt["15"] = prompt["3"], node("ProbeSink", value=["13", 0])
    run = comfy.run(prompt)
    assert run.error is None, run.error
    messages = [run.message(place) for place in ("3", "13")]
    assert sorted(message["cached"] for message in messages) == [False, True]
    assert messages[0]["report"] == messages[1]["report"]


def test_a_node_that_was_cancelled_and_then_is_cached_is_done(comfy):
    """The same nodes: under other ids they ran to the end meanwhile."""
    sent = []

    def stop(message):
        if message["type"] == "progress" and message["data"]["value"] >= 9 and not sent:
            sent.append(message)
            comfy.post("/interrupt", {})

    client = uuid.uuid4().hex
    prompt = decode(latent(frames=20, seed=90), chunk_frames=1)
    assert comfy.run(prompt, on_message=stop, client=client).interrupted
    both = {**prompt, "13": prompt["3"], "15": node("ProbeSink", value=["13", 0])}
    run = comfy.run(both, client=client)
    assert run.error is None, run.error
    assert {run.report(place)["status"] for place in ("3", "13")} == {"done"}


@pytest.mark.parametrize("sharded", [False, True])
def test_another_vae_is_decoded_by_comfyui_itself(comfy, sharded):
    """One workflow with a switch between models: same picture as VAE Decode, and a note."""
    foreign = node("ProbeForeignVAE", vae=["0", 0])
    prompt = decode_and_compare(latent(channels=4, kind="image", seed=63), foreign)
    prompt["0"] = load_vae()
    if sharded:
        inputs = {
            "vae": ["1", 0],
            "samples": ["2", 0],
            "devices": "cpu,cpu",
            "axis": "auto",
            "gather": "shared",
        }
        prompt["3"] = node("WanVAEDecodeSharded", **inputs)
    run = comfy.run(prompt)
    assert run.error is None, run.error
    assert run.outputs["5"]["difference"] == [0.0]
    report = run.report("3")
    (note,) = report["fallbacks"]
    # What it is, and no advice: to the user of a switch nothing is wrong.
    assert "ComfyUI's own" in note and "not a Wan VAE" in note
    assert "use ComfyUI" not in note and "load a Wan" not in note
    assert report["worded"][note]["key"] == "vae.not_wan"
    shown = run.outputs["3"]["wan_vae"][0]
    assert shown["pixel_shape"] == [1, 3, 1, *run.outputs["5"]["a"][0]["shape"][1:3]]
    assert (shown["status"], shown["notes"], shown["done_frames"]) == ("done", 1, 1)


def test_a_latent_that_another_vae_cannot_decode_names_both(comfy):
    run = comfy.run(decode(latent(), load_vae(OTHER_VAE)))
    assert run.error["exception_type"] == "wan_vae.LatentError"
    told = run.error["exception_message"]
    assert told.startswith("the latent has 16 channels: this VAE decodes 4; this is a Stable Diff")
    assert run.report("3")["error"] == told.strip()


def test_another_vae_is_encoded_by_comfyui_itself(comfy):
    frames = node("ProbeFrames", frames=1, height=64, width=96, channels=4, seed=64)
    prompt = {
        "0": load_vae(),
        "1": node("ProbeForeignVAE", vae=["0", 0]),
        "2": frames,
        "3": node("WanVAEEncode", vae=["1", 0], pixels=["2", 0], normalized=True),
        "4": node("VAEEncode", vae=["1", 0], pixels=["2", 0]),
        "5": node("ProbeCompareLatents", a=["3", 0], b=["4", 0]),
    }
    run = comfy.run(prompt)
    assert run.error is None, run.error
    assert run.outputs["5"]["difference"] == [0.0]
    report = run.report("3")
    assert "ComfyUI's own" in report["fallbacks"][0]
    assert report["warnings"] == ["`normalized` is ignored: it is for latents of Wan VAEs"]
    phases = [m["report"].get("phase") for m in run.of_type("wan_vae.report")]
    assert {"name": "comfyui"} in phases, "who works"


def test_cancel_at_the_third_chunk_and_run_again(comfy):
    cancelled_then_right(comfy)


def cancelled_then_right(comfy) -> None:
    """Interrupt a decode at its third chunk: the server says so, and decodes the next one."""
    sent = []

    def stop(message):
        if message["type"] == "progress" and message["data"]["value"] >= 9 and not sent:
            sent.append(message)
            comfy.post("/interrupt", {})

    # Large enough for several chunks to be left when the message arrives.
    samples = latent(frames=40, height=16, width=16, seed=12)
    run = comfy.run(decode(samples, chunk_frames=1), on_message=stop)
    assert run.interrupted
    assert run.error is None
    kept = run.report("3")
    assert kept["status"] == "cancelled"
    assert 9 <= kept["done_frames"] < 30
    again = comfy.run(decode(latent(frames=2, seed=13)))
    assert again.report("3")["status"] == "done"
