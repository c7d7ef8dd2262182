"""WanVAEAccelerate in a running ComfyUI: core's VAE and ours get the same questions, from the VAE
object itself and from core's own nodes, and their answers are compared."""

import re
import uuid
from contextlib import closing

import pytest

from tests.comfy.graphs import VAES, latent, load_vae, node
from tests.comfy.server import Run

pytestmark = pytest.mark.comfy

# Two float32 implementations that sum in different orders, beside numbers of the size of `spread`.
TOLERANCE = 1e-4
HALF_TOLERANCE = 5e-4
SIZES = {"width": 64, "height": 48, "length": 9, "batch_size": 1}


def accelerate(vae: dict | None = None, **options) -> dict:
    """Core's VAE (node 1) and ours (2)."""
    return {"1": vae or load_vae(), "2": node("WanVAEAccelerate", vae=["1", 0], **options)}


def assert_same(found: list[dict]) -> None:
    assert found
    for one in found:
        assert one["core"] == one["ours"], one
        if "difference" in one:
            # ComfyUI scales pixels in the dtype that they have, we in float32.
            tolerance = HALF_TOLERANCE if "float16" in one["name"] else TOLERANCE
            assert one["difference"] <= tolerance * max(1.0, one["spread"]), one


def frames(count=9, height=48, width=64, channels=3, seed=0) -> dict:
    return node(
        "ProbeFrames", frames=count, height=height, width=width, channels=channels, seed=seed
    )


def test_every_method_and_attribute_is_that_of_core(comfy):
    prompt = {**accelerate(), "3": node("ProbeSameVAE", core=["1", 0], ours=["2", 0])}
    run = comfy.run(prompt)
    assert run.error is None, run.error
    said = run.outputs["3"]
    assert_same(said["found"])
    compared = [one for one in said["found"] if "difference" in one]
    assert len(compared) >= 20, "answers that are errors compare nothing"
    assert all(one["spread"] > 0.01 for one in compared)
    assert_same(said["exact"])
    # Bits are compared on a GPU: the CPU takes other kernels for chunks of other lengths.
    assert all(one["difference"] < 1e-5 for one in said["exact"]), said["exact"]
    for name, (core, ours) in said["answers"][0].items():
        assert core == ours, name
    assert said["same"] == [[]]
    assert said["is_a_vae"] == said["copies"] == said["untouched"] == [True]


CONDITIONED = {"positive": ["c", 0], "negative": ["c", 0]}
INPUTS = {
    "c": node("ProbeConditioning"),
    "clip": node("ProbeClip"),
    "image": frames(1, seed=1),
    "end": frames(1, seed=2),
    "video": frames(9, seed=3),
    "odd": frames(5, 53, 70, seed=4),
    "mask": node("ProbeMask", frames=1, height=53, width=70),
    "z": latent(frames=3, height=6, width=8, seed=5),
}
# Core's node, how many outputs it has, and its inputs beside `vae`.
NODES = {
    "image to video": ("WanImageToVideo", 3, {**CONDITIONED, **SIZES, "start_image": ["image", 0]}),
    "first and last frame": (
        "WanFirstLastFrameToVideo",
        3,
        {**CONDITIONED, **SIZES, "start_image": ["image", 0], "end_image": ["end", 0]},
    ),
    "fun inpaint": (
        "WanFunInpaintToVideo",
        3,
        {**CONDITIONED, **SIZES, "start_image": ["image", 0], "end_image": ["end", 0]},
    ),
    "fun control": (
        "WanFunControlToVideo",
        3,
        {**CONDITIONED, **SIZES, "start_image": ["image", 0], "control_video": ["video", 0]},
    ),
    "vace": (
        "WanVaceToVideo",
        4,
        {
            **CONDITIONED,
            **SIZES,
            "strength": 1.0,
            "control_video": ["video", 0],
            "reference_image": ["image", 0],
        },
    ),
    "animate": (
        "WanAnimateToVideo",
        6,
        {
            **CONDITIONED,
            **SIZES,
            "continue_motion_max_frames": 5,
            "video_frame_offset": 0,
            "reference_image": ["image", 0],
            "pose_video": ["video", 0],
        },
    ),
    "phantom": ("WanPhantomSubjectToVideo", 4, {**CONDITIONED, **SIZES, "images": ["video", 0]}),
    "inpaint conditioning": (
        "InpaintModelConditioning",
        3,
        {**CONDITIONED, "pixels": ["odd", 0], "mask": ["mask", 0], "noise_mask": True},
    ),
    "inpaint": (
        "VAEEncodeForInpaint",
        1,
        {"pixels": ["odd", 0], "mask": ["mask", 0], "grow_mask_by": 6},
    ),
    "qwen image edit": (
        "TextEncodeQwenImageEdit",
        1,
        {"clip": ["clip", 0], "prompt": "", "image": ["image", 0]},
    ),
    "encode": ("VAEEncode", 1, {"pixels": ["odd", 0]}),
    "tiled encode": (
        "VAEEncodeTiled",
        1,
        {
            "pixels": ["odd", 0],
            "tile_size": 512,
            "overlap": 64,
            "temporal_size": 64,
            "temporal_overlap": 8,
        },
    ),
    "decode": ("VAEDecode", 1, {"samples": ["z", 0]}),
    "tiled decode": (
        "VAEDecodeTiled",
        1,
        {
            "samples": ["z", 0],
            "tile_size": 512,
            "overlap": 64,
            "temporal_size": 64,
            "temporal_overlap": 8,
        },
    ),
}


def needed(inputs: dict) -> dict:
    """The nodes of INPUTS that `inputs` link to."""
    names = {value[0] for value in inputs.values() if isinstance(value, list)}
    return {name: INPUTS[name] for name in names}


# It scales every image to a megapixel.
SLOW = ("qwen image edit",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] if n in SLOW else []) for n in NODES]
)
def test_core_nodes_give_the_same_with_our_vae(comfy, name):
    kind, outputs, inputs = NODES[name]
    prompt = {
        **accelerate(),
        **needed(inputs),
        "core": node(kind, vae=["1", 0], **inputs),
        "ours": node(kind, vae=["2", 0], **inputs),
    }
    for slot in range(outputs):
        prompt[f"s{slot}"] = node("ProbeCompare", core=["core", slot], ours=["ours", slot])
    run = comfy.run(prompt)
    if run.error is not None:
        # In 0.3.75 this node divides by Wan's three ratios: what core's VAE cannot, ours need not.
        assert (kind, run.error["exception_type"]) == ("VAEEncodeForInpaint", "TypeError")
        alone = {key: made for key, made in prompt.items() if key not in ("2", "ours", "s0")}
        again = comfy.run({**alone, "s": node("ProbeSink", value=["core", 0])})
        assert again.error["exception_type"] == "TypeError"
        return
    found = [one for slot in range(outputs) for one in run.outputs[f"s{slot}"].get("found", [])]
    assert_same(found)
    assert any(one.get("spread", 0) > 0.01 for one in found), "numbers, not zeros alone"
    report = run_report(comfy, "ours")
    assert (report["kind"], report["vae"]) == (kind, "2")
    operation = "decode" if "Decode" in kind else "encode"
    assert (report["report"]["operation"], report["report"]["status"]) == (operation, "done")
    assert run_report(comfy, "2")["report"]["status"] == "done"


def test_wan_22_encodes_an_image_and_decodes_for_core_nodes(comfy):
    size = {"width": 64, "height": 64, "length": 9, "batch_size": 1}
    prompt = {
        "0": load_vae(),
        "1": node("ProbeWan22VAE", vae=["0", 0]),
        "2": node("WanVAEAccelerate", vae=["1", 0]),
        "image": frames(1, seed=6),
        "z": latent(channels=48, frames=2, height=3, width=4, seed=7),
    }
    for name, vae in (("core", "1"), ("ours", "2")):
        prompt[f"{name} i2v"] = node(
            "Wan22ImageToVideoLatent", vae=[vae, 0], start_image=["image", 0], **size
        )
        prompt[f"{name} decode"] = node("VAEDecode", vae=[vae, 0], samples=["z", 0])
    for what in ("i2v", "decode"):
        links = {"core": [f"core {what}", 0], "ours": [f"ours {what}", 0]}
        prompt[what] = node("ProbeCompare", **links)
    run = comfy.run(prompt)
    assert run.error is None, run.error
    for what in ("i2v", "decode"):
        assert_same(run.outputs[what]["found"])
        assert max(one["spread"] for one in run.outputs[what]["found"]) > 0.01


def run_report(comfy, name: str) -> dict:
    """What the server keeps for the panel about node `name` of the last prompt."""
    return comfy.last_run.message(name)


def test_the_report_and_the_progress_belong_to_the_node_that_asked(comfy):
    """Live messages name the node on screen, its class, and the workflow of the page."""
    kind, _, inputs = NODES["image to video"]
    prompt = {
        **accelerate(),
        **needed(inputs),
        "7": node(kind, vae=["2", 0], **{**inputs, "length": 13}),
        "8": node("ProbeSink", value=["7", 2]),
    }
    run = comfy.run(prompt, pnginfo={"workflow": {"id": "a-workflow"}})
    assert run.error is None, run.error
    sent = [m["data"] for m in run.messages if m["type"] == "wan_vae.report"]
    seen = [(m["node"], m["workflow"], m["kind"], m["vae"]) for m in sent]
    own = ("2", "a-workflow", "WanVAEAccelerate", None)  # unless ComfyUI still has its result
    assert set(seen) - {own} == {("7", "a-workflow", kind, "2")}
    last = sent[-1]["report"]
    assert (last["status"], last["done_frames"]) == ("done", 13)
    progress = [m["data"] for m in run.messages if m["type"] == "progress"]
    assert progress and {p["node"] for p in progress} == {"7"}
    assert progress[-1]["value"] == progress[-1]["max"] == 13


def test_a_node_that_was_expanded_reports_as_the_one_on_screen(comfy):
    prompt = {**accelerate(), "2x": latent(seed=71), "7": node("ProbeExpand", vae=["2", 0])}
    prompt["7"]["inputs"]["samples"] = ["2x", 0]
    prompt["8"] = node("ProbeSink", value=["7", 0])
    run = comfy.run(prompt)
    assert run.error is None, run.error
    assert run_report(comfy, "7")["kind"] == "ProbeExpand"


def test_cancel_within_a_node_of_core_and_run_again(comfy):
    sent = []

    def stop(message):
        if message["type"] == "progress" and message["data"]["value"] >= 9 and not sent:
            sent.append(message)
            comfy.post("/interrupt", {})

    def prompt(count: int, seed: int) -> dict:
        return {
            **accelerate(),
            "z": latent(frames=count, seed=seed),
            "d": node("VAEDecodeTiled", vae=["2", 0], samples=["z", 0], **SMALL_TILES),
            "s": node("ProbeSink", value=["d", 0]),
        }

    run = comfy.run(prompt(60, 72), on_message=stop)
    assert run.interrupted and run.error is None
    kept = run_report(comfy, "d")["report"]
    assert kept["status"] == "cancelled" and 9 <= kept["done_frames"] < 100
    assert comfy.run(prompt(2, 73)).error is None
    assert run_report(comfy, "d")["report"]["status"] == "done"


SMALL_TILES = {"tile_size": 64, "overlap": 0, "temporal_size": 8, "temporal_overlap": 4}


def test_tiles_that_are_asked_for_take_less_memory_and_compute_nothing_twice(comfy):
    def planned(kind: str, **options) -> dict:
        prompt = {
            # Float32 takes one latent frame at a time in any case.
            **accelerate(precision="bf16"),
            "z": latent(frames=6, height=1, width=12, seed=74),
            "d": node(kind, vae=["2", 0], samples=["z", 0], **options),
            "s": node("ProbeSink", value=["d", 0]),
        }
        assert comfy.run(prompt).error is None
        return run_report(comfy, "d")["report"]

    tiled, whole = planned("VAEDecodeTiled", **SMALL_TILES), planned("VAEDecode")
    assert tiled["memory"]["planned_bytes"] < 0.6 * whole["memory"]["planned_bytes"]
    assert tiled["strips"] == whole["strips"] == 1
    assert len(tiled["chunks"]) > len(whole["chunks"])


# -- VAE objects of other packs --------------------------------------------------------------------


def patched(kind: str, name: str = VAES[0]) -> dict:
    """A VAE as another pack leaves it (node 1), and ours made of it (2)."""
    return {
        "0": load_vae(name),
        "1": node("ProbePatchedVAE", vae=["0", 0], kind=kind),
        "2": node("WanVAEAccelerate", vae=["1", 0]),
    }


def decoded(prompt: dict, seed: int, core: str = "0") -> dict:
    """Decode with ours and with the VAE of node `core`, and compare."""
    return {
        **prompt,
        "z": latent(frames=2, seed=seed),
        "core": node("VAEDecode", vae=[core, 0], samples=["z", 0]),
        "ours": node("VAEDecode", vae=["2", 0], samples=["z", 0]),
        "s": node("ProbeCompare", core=["core", 0], ours=["ours", 0]),
    }


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("object_patches", r"2 object patches of this VAE are ignored \(decoder\.middle\.0"),
        ("subclass", "another pack replaced decode of this VAE"),
        ("method", "another pack replaced decode of this VAE"),
    ],
)
def test_what_is_ignored_is_said_and_the_picture_is_that_of_the_weights(comfy, kind, words):
    prompt = decoded(patched(kind), seed=80)
    # Ours first and alone: core's decode with the unpatched VAE would take the patches off.
    alone = {name: made for name, made in prompt.items() if name not in ("core", "s")}
    run = comfy.run({**alone, "t": node("ProbeSink", value=["ours", 0])})
    assert run.error is None, run.error
    run = comfy.run(prompt)
    assert run.error is None, run.error
    assert_same(run.outputs["s"]["found"])
    for name in ("2", "ours"):
        (warning,) = run_report(comfy, name)["report"]["warnings"]
        assert re.search(words, warning)


def test_a_patch_that_comes_after_ours_is_said_too(comfy):
    prompt = {
        "0": load_vae(),
        "1": node("WanVAEAccelerate", vae=["0", 0]),
        "2": node("ProbePatchedVAE", vae=["1", 0], kind="object_patches"),
    }
    run = comfy.run(decoded(prompt, seed=81))
    assert run.error is None, run.error
    assert_same(run.outputs["s"]["found"])
    (warning,) = run_report(comfy, "ours")["report"]["warnings"]
    assert warning.startswith("2 object patches")


def test_what_another_pack_adds_to_its_class_stays(comfy):
    prompt = {**patched("subclass"), "3": node("ProbeExtra", vae=["2", 0])}
    run = comfy.run(prompt)
    assert run.error is None, run.error
    assert run.outputs["3"]["answer"] == ["extra"]


def test_another_scale_of_pixels_is_followed(comfy):
    run = comfy.run(decoded(patched("scaled"), seed=82, core="1"))
    assert run.error is None, run.error
    (found,) = run.outputs["s"]["found"]
    assert found["core"] == found["ours"]
    assert found["spread"] > 5, "pixels in [0, 255]"
    assert found["difference"] < 255 * TOLERANCE
    image = {"i": frames(5, seed=83)}
    both = {
        "core": node("VAEEncode", vae=["1", 0], pixels=["i", 0]),
        "ours": node("VAEEncode", vae=["2", 0], pixels=["i", 0]),
        "s": node("ProbeCompare", core=["core", 0], ours=["ours", 0]),
    }
    run = comfy.run({**patched("scaled"), **image, **both})
    assert run.error is None, run.error
    assert_same(run.outputs["s"]["found"])


@pytest.mark.parametrize(
    ("vae", "kind", "words"),
    [
        ("disguised", "NotAWanVAEError", "a _Disguised of .*expected one of ComfyUI's own"),
        ("weights", "CheckpointError", r"patched 1 weights of this VAE \(decoder\.head\.2"),
    ],
)
def test_what_we_cannot_do_is_refused_by_the_node_in_words(comfy, vae, kind, words):
    prompt = patched(vae) if isinstance(vae, str) else accelerate(vae)
    run = comfy.run({**prompt, "s": node("ProbeSink", value=["2", 0])})
    assert run.error["node_id"] == "2"
    assert run.error["exception_type"].endswith(kind)
    assert re.search(words, run.error["exception_message"], re.DOTALL)
    assert run_report(comfy, "2")["report"]["status"] == "failed"


def test_options_of_another_model_are_refused_and_not_passed_over(comfy):
    """A node for voxels made some of a video's frames; with core's own VAE it fails."""
    prompt = {**accelerate(), "z": INPUTS["z"]}
    inputs = {"vae": ["2", 0], "num_chunks": 8000, "octree_resolution": 64}
    prompt["3"] = node("VAEDecodeHunyuan3D", samples=["z", 0], **inputs)
    prompt["4"] = node("ProbeSink", value=["3", 0])
    run = comfy.run(prompt)
    assert run.error["exception_type"] == "wan_vae.LatentError"
    assert "num_chunks, octree_resolution" in run.error["exception_message"]
    assert run.report("3")["status"] == "failed"


def test_a_vae_that_is_no_wan_vae_goes_on_as_it_came(comfy):
    """One workflow with a switch between models works; the line says so in amber."""
    prompt = {
        "0": load_vae(),
        "1": node("ProbeForeignVAE", vae=["0", 0]),
        "2": node("WanVAEAccelerate", vae=["1", 0]),
        "z": latent(channels=4, kind="image", seed=90),
        "d": node("VAEDecode", vae=["2", 0], samples=["z", 0]),
        "e": node("VAEDecode", vae=["1", 0], samples=["z", 0]),
        "s": node("ProbeCompareImages", a=["d", 0], b=["e", 0]),
    }
    run = comfy.run(prompt)
    assert run.error is None, run.error
    assert run.outputs["s"]["difference"] == [0.0]
    report = run.report("2")
    (note,) = report["fallbacks"]
    assert note.startswith("the VAE goes on as it came: ")
    assert report["worded"][note]["key"] == "vae.unchanged"
    assert report["status"] == "done" and report["operation"] == "accelerate"


def test_a_missing_gpu_is_named_at_once(comfy):
    run = comfy.run(
        {**accelerate(devices="cpu,7"), "s": node("ProbeSink", value=["2", 0])},
    )
    assert run.error["node_id"] == "2"
    assert "rank 1 cannot start: device cuda:7" in run.error["exception_message"]


def test_two_devices_encode_and_decode_for_core_nodes(comfy):
    inputs = {**NODES["image to video"][2], "width": 96, "height": 64}
    prompt = {
        **accelerate(devices="cpu,cpu"),
        **needed(inputs),
        "z": latent(frames=2, seed=84),
        "d": node("VAEDecode", vae=["2", 0], samples=["z", 0]),
        "e": node("VAEDecode", vae=["1", 0], samples=["z", 0]),
        "ours": node("WanImageToVideo", vae=["2", 0], **inputs),
        "core": node("WanImageToVideo", vae=["1", 0], **inputs),
        "s": node("ProbeCompare", core=["core", 0], ours=["ours", 0]),
        "t": node("ProbeCompare", core=["e", 0], ours=["d", 0]),
    }
    run = comfy.run(prompt)
    assert run.error is None, run.error
    assert_same(run.outputs["s"]["found"])
    assert_same(run.outputs["t"]["found"])
    for name in ("ours", "d"):
        report = run_report(comfy, name)["report"]
        assert [shard["rank"] for shard in report["shards"]] == [0, 1]
        assert report["fallbacks"] == []


def test_two_prompts_in_a_row_use_the_vae_that_is_cached(comfy):
    client = uuid.uuid4().hex
    with closing(comfy.listen(client)) as stream:
        runs = [
            Run(comfy.queue(decoded(accelerate(), seed=seed, core="1"), client))
            for seed in (85, 86)
        ]
        for run in runs:
            comfy.follow(stream, run)
    for run in runs:
        assert run.error is None, run.error
        assert_same(run.outputs["s"]["found"])
