"""Memory, unloading, queues and many runs in one server: what a day of use does to the nodes."""

import uuid
from contextlib import closing

import pytest

from tests.comfy.graphs import VAES, decode, decode_and_compare, latent, load_vae, node
from tests.comfy.server import Run

pytestmark = pytest.mark.comfy
TOLERANCE = 1e-4


def assert_as_core(run):
    assert run.error is None, run.error
    found = run.outputs["5"]
    assert found["a"] == found["b"]
    assert found["difference"][0] < TOLERANCE


def memory(comfy, keep: str | None = None) -> dict:
    """Bytes of all live tensors in the server, and the models that ComfyUI holds loaded.

    ComfyUI drops the results of nodes that are not in the prompt; `keep` names a VAE whose loader
    is in it.
    """
    prompt = {"9": node("ProbeMemory", salt=uuid.uuid4().int % 2**30)}
    if keep is not None:
        prompt |= {"1": load_vae(keep), "5": node("ProbeSink", value=["1", 0])}
    run = comfy.run(prompt)
    assert run.error is None, run.error
    found = run.outputs["9"]
    return {"bytes": found["tensor_bytes"][0], "models": found.get("models", [])}


def forget(comfy) -> None:
    """Have ComfyUI drop models and cached results; newer ones keep those of earlier prompts."""
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    memory(comfy)  # what /free asks for is done after the next prompt at the latest


def test_comfyui_accounts_for_our_weights_unloads_them_and_brings_them_back(comfy):
    assert_as_core(comfy.run(decode_and_compare(latent(seed=100))))
    assert "WanVAEModel" in memory(comfy, keep=VAES[0])["models"]
    unloaded = comfy.run(
        {
            **decode(latent(frames=1, seed=101)),
            "6": node("ProbeUnload", image=["3", 0]),
        }
    )
    assert unloaded.error is None, unloaded.error
    assert unloaded.outputs["6"].get("left", []) == []
    assert "WanVAEModel" not in memory(comfy, keep=VAES[0])["models"]
    assert_as_core(comfy.run(decode_and_compare(latent(seed=102))))
    assert "WanVAEModel" in memory(comfy, keep=VAES[0])["models"]


def test_free_memory_between_runs(comfy):
    assert_as_core(comfy.run(decode_and_compare(latent(seed=110))))
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    assert_as_core(comfy.run(decode_and_compare(latent(seed=110))))


def test_a_vae_that_nobody_holds_takes_our_copy_with_it(comfy):
    """The packed copy lives as long as the VAE object of the loader, not a moment longer."""
    weights = (comfy.base / "models" / "vae" / VAES[1]).stat().st_size
    forget(comfy)
    base = memory(comfy)["bytes"]
    assert comfy.run(decode(latent(frames=1, seed=121), load_vae(VAES[1]))).error is None
    held = memory(comfy, keep=VAES[1])["bytes"]
    assert held > base + 1.5 * weights, "core's weights and our decoder and encoder"
    forget(comfy)
    assert memory(comfy)["bytes"] <= base + 100_000


def test_two_queued_prompts_both_finish_right(comfy):
    client = uuid.uuid4().hex
    first = decode_and_compare(latent(frames=4, seed=130), chunk_frames=1)
    second = decode_and_compare(latent(frames=2, seed=131), load_vae(VAES[1]))
    with closing(comfy.listen(client)) as stream:
        runs = [Run(comfy.queue(prompt, client)) for prompt in (first, second)]
        for run in runs:
            comfy.follow(stream, run)
    for run in runs:
        assert_as_core(run)


def test_two_vaes_alternating(comfy):
    for i in range(3):
        name = VAES[i % 2]
        run = comfy.run(decode_and_compare(latent(seed=140 + i), load_vae(name)))
        assert_as_core(run)


def test_two_vaes_in_one_prompt(comfy):
    prompt = decode_and_compare(latent(seed=150))
    other = decode_and_compare(latent(seed=151), load_vae(VAES[1]))

    def renamed(value):
        return [f"1{value[0]}", value[1]] if isinstance(value, list) else value

    for name, made in other.items():
        inputs = {key: renamed(value) for key, value in made["inputs"].items()}
        prompt[f"1{name}"] = {**made, "inputs": inputs}
    run = comfy.run(prompt)
    assert_as_core(run)
    found = run.outputs["15"]
    assert found["a"] == found["b"]
    assert found["difference"][0] < TOLERANCE


def test_one_vae_at_two_sizes(comfy):
    for i, (height, width) in enumerate([(8, 12), (5, 7), (8, 12)]):
        shape = latent(frames=2, height=height, width=width, seed=160 + i)
        assert_as_core(comfy.run(decode_and_compare(shape)))


@pytest.mark.full
def test_one_vae_in_two_precisions_and_layouts(comfy):
    for i, options in enumerate(
        [
            {"precision": "bf16"},
            {},
            {"memory_layout": "channels_last_3d"},
            {"precision": "fp16"},
            {},
        ]
    ):
        run = comfy.run(decode_and_compare(latent(seed=170 + i), **options))
        assert run.error is None, run.error
        bound = 0.2 if "precision" in options else TOLERANCE
        assert run.outputs["5"]["difference"][0] < bound


@pytest.mark.full
def test_twenty_runs_do_not_grow(comfy):
    def one(seed: int):
        run = comfy.run(decode(latent(frames=2, seed=seed)))
        assert run.error is None, run.error

    for seed in (180, 181, 182):
        one(seed)
    before = memory(comfy)["bytes"]
    for seed in range(200, 220):
        one(seed)
    after = memory(comfy)["bytes"]
    # One IMAGE of [5, 64, 96, 3] float32 is 368 kB; a leak of any one tensor a run exceeds this.
    assert after <= before + 200_000, f"{before} bytes of tensors before, {after} after 20 runs"


@pytest.mark.full
def test_a_cancelled_decode_gives_its_memory_back(comfy):
    comfy.run(decode(latent(frames=2, seed=230)))
    before = memory(comfy)["bytes"]
    for attempt in range(3):
        sent = []

        def stop(message, sent=sent):
            if message["type"] == "progress" and message["data"]["value"] >= 9 and not sent:
                sent.append(message)
                comfy.post("/interrupt", {})

        shape = latent(frames=60, height=12, width=12, seed=231 + attempt)
        run = comfy.run(decode(shape, chunk_frames=1), on_message=stop)
        assert run.interrupted
    # What the loop made: the cached latent of the last prompt, [1, 16, 60, 12, 12] float32.
    after = memory(comfy)["bytes"]
    assert after <= before + 60 * 16 * 144 * 4 + 200_000, f"{before} before, {after} after"
    assert_as_core(comfy.run(decode_and_compare(latent(seed=240))))


@pytest.mark.parametrize("kind", ["scaled", "one_channel"])
def test_weights_that_another_node_changes_between_two_decodes(comfy, kind):
    """Our copy was packed before; a picture of the old weights would be wrong without a word."""
    name = f"changed_{kind}.safetensors"
    folder = comfy.base / "models" / "vae"
    (folder / name).write_bytes((folder / VAES[1]).read_bytes())
    run = comfy.run(
        {
            "1": load_vae(name),
            "2": latent(frames=2, seed=255),
            "3": node("WanVAEDecode", vae=["1", 0], samples=["2", 0]),
            "6": node("ProbeVAEWeights", vae=["1", 0], kind=kind, after=["3", 0]),
            "7": node("WanVAEDecode", vae=["6", 0], samples=["2", 0]),
            "4": node("VAEDecode", vae=["6", 0], samples=["2", 0]),
            "5": node("ProbeCompareImages", a=["7", 0], b=["4", 0]),
            "8": node("ProbeCompareImages", a=["7", 0], b=["3", 0]),
        }
    )
    assert_as_core(run)
    assert run.outputs["8"]["difference"][0] > 100 * TOLERANCE, "the change shows in the picture"


@pytest.mark.parametrize(
    "kind", ["channels_last_3d", "float16", pytest.param("bfloat16", marks=pytest.mark.full)]
)
def test_weights_as_other_packs_leave_them(comfy, kind):
    """Another node changed format or dtype of the VAE's own weights before ours sees them."""
    prompt = {
        "0": load_vae(VAES[1]),
        "1": node("ProbeVAEWeights", vae=["0", 0], kind=kind),
        "2": latent(frames=2, seed=250),
        "3": node("WanVAEDecode", vae=["1", 0], samples=["2", 0]),
        "5": node("ProbeCompareImages", a=["3", 0], b=["4", 0]),
        "4": node("WanVAEDecode", vae=["6", 0], samples=["2", 0]),
        "6": load_vae(VAES[1]),
    }
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    # Two loads of one file: the cache would make them one, so the second comes through a copy.
    comfy.base.joinpath("models/vae/again.safetensors").write_bytes(
        comfy.base.joinpath("models/vae", VAES[1]).read_bytes()
    )
    prompt["6"] = load_vae("again.safetensors")
    run = comfy.run(prompt)
    assert run.error is None, run.error
    assert run.outputs["5"]["difference"][0] < (0.05 if "float" in kind else TOLERANCE)


def test_what_a_warm_run_does_beside_the_decode(comfy):
    """Each of these was seen to take milliseconds; an image is decoded in ten."""
    prompt = {
        "1": load_vae(),
        "2": latent(frames=1, seed=17),
        "3": node("ProbeCounts", samples=["2", 0], vae=["1", 0]),
    }
    run = comfy.run(prompt)
    assert run.error is None, run.error
    (counts,) = run.outputs["3"]["counts"]
    once = ("asks for free memory", "looks at all weights", "plans")
    assert {what: counts.pop(what, 0) for what in once} == dict.fromkeys(once, 1)
    assert counts.pop("asks for free host memory", 0) <= 1
    # One, and live ones where the machine is so busy that an image takes long.
    assert counts.pop("reports sent") == counts.pop("reports made") >= 1
    # Nothing is hashed, read, copied, built or started again.
    assert counts == {}


def test_the_process_gets_ready_for_its_first_decode_once(comfy):
    def threads():
        run = comfy.run({"9": node("ProbeReady", salt=uuid.uuid4().int % 2**30)})
        assert run.error is None, run.error
        assert run.outputs["9"].get("alive") == [False]
        return run.outputs["9"]["threads"]

    comfy.run(decode(latent(frames=1, seed=18)))
    first = threads()
    comfy.run(decode(latent(frames=1, seed=19)))
    assert threads() == first and len(first) == 1
