"""WanVAEDecode in a running ComfyUI, against core's VAE Decode on the same latent."""

import pytest

from tests.comfy.graphs import decode, decode_and_compare, latent, load_vae, node, wan22

pytestmark = pytest.mark.comfy

# Two float32 implementations that sum in different orders; pixels are in [0, 1].
TOLERANCE = 1e-4


def assert_same(run):
    assert run.error is None, run.error
    found = run.outputs["5"]
    ours, core = found["a"][0], found["b"][0]
    assert ours == core  # shape, dtype, device
    assert found["difference"][0] < TOLERANCE
    assert found["spread"][0] > 0.01  # the reference is a picture, not a flat grey
    return ours


@pytest.mark.parametrize(
    ("family", "shape", "expected"),
    [
        ("2.1", {"frames": 3}, [9, 64, 96, 3]),
        ("2.1", {"frames": 1}, [1, 64, 96, 3]),
        ("2.1", {"frames": 2, "batch": 2, "height": 5, "width": 7}, [10, 40, 56, 3]),
        ("2.2", {"frames": 3, "channels": 48, "height": 4, "width": 6}, [9, 64, 96, 3]),
        ("2.2", {"frames": 1, "channels": 48, "height": 3, "width": 5}, [1, 48, 80, 3]),
    ],
)
def test_same_picture_as_core(comfy, family, shape, expected):
    prompt = decode_and_compare(latent(**shape, seed=1))
    run = comfy.run(wan22(prompt) if family == "2.2" else prompt)
    assert assert_same(run)["shape"] == expected
    report = run.report("3")
    assert report["schema"] == "wan_vae.report/1"
    assert report["config"]["family"] == f"wan{family}"
    assert report["status"] == "done"
    assert report["done_frames"] == report["total_frames"] == expected[0]
    assert len(report["layers"]) > 20


@pytest.mark.parametrize(
    "options",
    [
        {"memory_layout": "contiguous"},
        {"memory_layout": "channels_last_3d"},
        {"chunk_frames": 1},
        {"chunk_frames": 4},
        {"precision": "fp32"},
    ],
)
def test_options_change_no_pixel(comfy, options):
    run = comfy.run(decode_and_compare(latent(frames=4, seed=2), **options))
    assert_same(run)


def test_a_lower_precision_is_close_and_said(comfy):
    run = comfy.run(
        decode_and_compare(latent(frames=2, height=4, width=6, seed=3), precision="bf16")
    )
    assert run.report("3")["dtype"] == "bfloat16"
    assert TOLERANCE < run.outputs["5"]["difference"][0] < 0.2


def test_nested_latent_takes_the_video(comfy):
    """Core of 0.3.75 cannot decode a nested latent, so the plain one is the reference."""
    prompt = decode_and_compare(latent(seed=4))
    prompt["6"] = latent(seed=4, kind="nested")
    prompt["3"]["inputs"]["samples"] = ["6", 0]
    assert_same(comfy.run(prompt))


def test_image_latent_without_time(comfy):
    prompt = decode_and_compare(latent(frames=1, batch=3, seed=5))
    prompt["6"] = latent(frames=1, batch=3, seed=5, kind="image")
    prompt["3"]["inputs"]["samples"] = ["6", 0]
    assert assert_same(comfy.run(prompt))["shape"] == [3, 64, 96, 3]


def test_channels_last_latent_and_weights(comfy):
    prompt = decode_and_compare(latent(seed=6, kind="channels_last"))
    prompt["6"] = node("ProbeVAEWeights", vae=["1", 0], kind="channels_last_3d")
    # Core decodes with the plain weights first, from a loader that the cache keeps apart.
    prompt["7"] = load_vae("wan21_other.safetensors")
    prompt["6"]["inputs"]["vae"] = ["7", 0]
    for name in ("3", "4"):
        prompt[name]["inputs"]["vae"] = ["6", 0]
    run = comfy.run(prompt)
    assert_same(run)
    found = run.report("3")["layout"]["weights_found"]
    assert found["channels_last_3d"] > 0
    assert found["contiguous"] == 0
    assert run.report("3")["layout"]["latent_format"] == "channels_last_3d"
    assert run.report("3")["layout"]["mixed_calls"] == 0


def test_nan_latent_is_an_error_that_says_so(comfy):
    run = comfy.run(decode(latent(seed=8, kind="nan")))
    assert run.error["exception_type"].endswith("LatentError")
    assert "NaN" in run.error["exception_message"]
