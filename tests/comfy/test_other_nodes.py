"""Encode, Inspect, Decode to Video, errors and cancel in a running ComfyUI."""

import pytest

from tests.comfy.graphs import OTHER_VAE, decode, latent, load_vae, node

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("frames", [1, 5, 7])
def test_encode_is_that_of_core(comfy, frames):
    pixels = node("ProbeFrames", frames=frames, height=67, width=90, channels=3, seed=frames)
    run = comfy.run({
        "1": load_vae(),
        "2": pixels,
        "3": node("WanVAEEncode", vae=["1", 0], pixels=["2", 0]),
        "4": node("VAEEncode", vae=["1", 0], pixels=["2", 0]),
        "5": node("ProbeCompareLatents", a=["3", 0], b=["4", 0]),
    })  # fmt: skip
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
    assert "decoder.conv1" in run.outputs["3"]["text"][0]


def test_video_is_streamed_into_the_output_folder(comfy):
    run = comfy.run({
        "1": load_vae(),
        "2": latent(frames=3, seed=11),
        "3": node("WanVAEDecodeToVideo", vae=["1", 0], samples=["2", 0], fps=16.0,
                  filename_prefix="video/test"),
    })  # fmt: skip
    assert run.error is None, run.error
    (shown,) = run.outputs["3"]["images"]
    path = comfy.base / "output" / shown["subfolder"] / shown["filename"]
    assert path.stat().st_size > 500
    assert run.report("3")["done_frames"] == 9


def test_another_vae_is_named(comfy):
    run = comfy.run(decode(latent(channels=4), load_vae(OTHER_VAE)))
    assert run.error["exception_type"].endswith("NotAWanVAEError")
    assert "Stable Diffusion" in run.error["exception_message"]
    assert "own VAE nodes" in run.error["exception_message"]


def test_cancel_at_the_third_chunk_and_run_again(comfy):
    cancelled_then_right(comfy)


def cancelled_then_right(comfy) -> None:
    """Interrupt a decode at its third chunk: the server says so, and decodes the next one."""
    sent = []

    def stop(message):
        if message["type"] == "progress" and message["data"]["value"] >= 9 and not sent:
            sent.append(message)
            comfy.post("/interrupt", {})

    run = comfy.run(decode(latent(frames=40, seed=12), chunk_frames=1), on_message=stop)
    assert run.interrupted
    assert run.error is None
    kept = comfy.get("/wan_vae/reports")["reports"][-1]["report"]
    assert kept["status"] == "cancelled"
    assert 9 <= kept["done_frames"] < 30
    again = comfy.run(decode(latent(frames=2, seed=13)))
    assert again.report("3")["status"] == "done"
