"""How long our packed copies of weights live, and who shares them, in a running ComfyUI."""

import uuid

import pytest

from tests.comfy import graphs
from tests.comfy.graphs import VAES, decode, decode_and_compare, latent, load_vae, node
from tests.comfy.server import Comfy

pytestmark = pytest.mark.comfy


def looked_at(comfy, keep: dict | None = None) -> dict:
    """What ProbeCopies found; `keep`: nodes whose results stay."""
    prompt = {"99": node("ProbeCopies", salt=uuid.uuid4().int % 2**30), **(keep or {})}
    run = comfy.run(prompt)
    assert run.error is None, run.error
    assert run.outputs["99"]["collects"] == [True], "garbage, once the weights are copied"
    return run.outputs["99"]


def copies(comfy, keep: dict | None = None) -> list[tuple]:
    """(identity, dtype, a VAE is alive, loaded) of each copy."""
    return [tuple(one) for one in looked_at(comfy, keep).get("copies", [])]


def forget(comfy) -> None:
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    copies(comfy)  # what /free asks for is done after the next prompt at the latest


def held(name: str) -> dict:
    """A loader and something that wants its VAE, so that ComfyUI keeps it."""
    return {"1": load_vae(name), "5": node("ProbeSink", value=["1", 0])}


def run_right(comfy, prompt: dict):
    run = comfy.run(prompt)
    assert run.error is None, run.error
    return run


def test_no_garbage_is_collected_while_the_first_run_of_a_copy_computes(comfy):
    """Half a second of a process's first decode, in which the device waits."""
    forget(comfy)
    collected = []
    for seed in (410, 411):
        prompt = {
            "1": load_vae(),
            "2": latent(frames=3, seed=seed),
            "3": node("ProbeCollections", vae=["1", 0], salt=uuid.uuid4().int % 2**30),
            "4": node("WanVAEDecode", vae=["3", 0], samples=["2", 0]),
            "5": node("ProbeCollected", image=["4", 0]),
        }
        collected.append(run_right(comfy, prompt).outputs["5"])
    first, second = collected
    assert first["while_computing"] == [0] and first["all"] > [0]
    assert second["while_computing"] > [0]  # the copy was there
    looked_at(comfy)  # and garbage is collected again


def test_two_loaders_of_one_file_and_all_our_nodes_share_a_copy(comfy):
    forget(comfy)
    folder = comfy.base / "models" / "vae"
    (folder / "second.safetensors").write_bytes((folder / VAES[0]).read_bytes())
    prompt = {
        **decode(latent(frames=1, seed=400)),
        "6": load_vae("second.safetensors"),
        "7": node("WanVAEAccelerate", vae=["6", 0]),
        "8": node("VAEDecode", vae=["7", 0], samples=["2", 0]),
        "9": node("ProbeSink", value=["8", 0]),
        "10": node("ProbeFrames", frames=1, height=32, width=32, channels=3, seed=1),
        "11": node("WanVAEEncode", vae=["6", 0], pixels=["10", 0]),
        "12": node("ProbeSink", value=["11", 0]),
    }
    run_right(comfy, prompt)
    (one,) = copies(comfy, keep={"1": prompt["1"], "5": node("ProbeSink", value=["1", 0])})
    assert one[1:] == ("torch.float32", True, True)


def test_what_is_prepared_stays_until_the_weights_move(comfy):
    forget(comfy)
    run_right(comfy, decode(latent(frames=1, seed=440)))
    before = looked_at(comfy, held(VAES[0]))["marks"]
    run_right(comfy, decode(latent(frames=1, seed=441)))
    assert looked_at(comfy, held(VAES[0]))["marks"] == before
    # Unloaded in the middle of the prompt.
    run_right(
        comfy, {**decode(latent(frames=1, seed=442)), "6": node("ProbeUnload", image=["3", 0])}
    )
    run_right(comfy, decode(latent(frames=1, seed=443)))
    assert looked_at(comfy, held(VAES[0]))["marks"] != before


def test_copies_are_bounded_and_the_oldest_leaves(comfy):
    forget(comfy)
    for seed, precision in enumerate(("fp32", "bf16", "fp16", "fp32", "bf16")):
        run_right(
            comfy, decode(latent(frames=1, height=2, width=3, seed=410 + seed), precision=precision)
        )
    before = copies(comfy, held(VAES[0]))
    assert [one[1] for one in before] == ["torch.float16", "torch.float32", "torch.bfloat16"]
    run_right(comfy, decode(latent(frames=1, seed=416), load_vae(VAES[1])))
    after = copies(comfy, held(VAES[1]))
    assert len(after) == 3
    assert after[0][0] == before[1][0] or not after[0][2]


@pytest.mark.parametrize(("runs", "kind"), [(1, "scaled"), (3, "scaled"), (3, "negative")])
def test_a_copy_of_weights_that_were_changed_leaves(comfy, runs, kind):
    """runs: before they change; from the third on a quicker look at the weights is taken."""
    forget(comfy)
    name = f"changed_copy_{runs}_{kind}.safetensors"
    folder = comfy.base / "models" / "vae"
    (folder / name).write_bytes((folder / VAES[1]).read_bytes())
    prompt = {
        "1": load_vae(name),
        "2": latent(frames=1, seed=420),
        "3": node("WanVAEDecode", vae=["1", 0], samples=["2", 0]),
        "6": node("ProbeVAEWeights", vae=["1", 0], kind=kind, after=["3", 0]),
        "7": node("WanVAEDecode", vae=["6", 0], samples=["2", 0]),
        "5": node("ProbeCompareImages", a=["7", 0], b=["3", 0]),
    }
    for seed in range(1, runs):
        run_right(comfy, decode(latent(frames=1, seed=420 + seed), load_vae(name)))
    run = run_right(comfy, prompt)
    assert run.outputs["5"]["difference"][0] > 1e-3
    assert len(copies(comfy, held(name))) == 1


def test_a_copy_is_not_right_because_another_thread_has_looked(comfy):
    """It looked at weights that were changed since the copy was taken for right."""
    forget(comfy)
    name = "changed_meanwhile.safetensors"
    folder = comfy.base / "models" / "vae"
    (folder / name).write_bytes((folder / VAES[1]).read_bytes())
    run = run_right(comfy, {"1": load_vae(name), "2": node("ProbeAssumed", vae=["1", 0])})
    assert run.outputs["2"]["right"] == [True, False, True]


# What each node makes, and what ComfyUI's own node makes of the weights as they are.
NODES = {
    "decode": ("WanVAEDecode", "VAEDecode", {}),
    "sharded": ("WanVAEDecodeSharded", "VAEDecode", {"devices": "cpu,cpu"}),
    "video": ("WanVAEDecodeToVideo", "VAEDecode", {"fps": 16.0, "filename_prefix": "changed"}),
    "encode": ("WanVAEEncode", "VAEEncode", {}),
    "accelerated": ("VAEDecode", "VAEDecode", {}),
    "accelerated encode": ("VAEEncode", "VAEEncode", {}),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.full if kind not in ("decode", "sharded") else ())
        for kind in NODES
    ],
)
def test_each_node_sees_weights_that_were_changed(comfy, kind):
    """After three runs the copy is used before the weights are looked at."""
    forget(comfy)
    name = f"changed_under_{kind.replace(' ', '_')}.safetensors"
    folder = comfy.base / "models" / "vae"
    (folder / name).write_bytes((folder / VAES[1]).read_bytes())
    ours, core, options = NODES[kind]
    is_encode = core == "VAEEncode"

    def work(vae: str, class_type: str, others: dict) -> dict:
        return node(
            class_type, vae=[vae, 0], **others, **{"pixels" if is_encode else "samples": ["2", 0]}
        )

    def prompt(seed: int) -> dict:
        given = latent(frames=2, seed=seed)
        if is_encode:
            given = node("ProbeFrames", frames=5, height=32, width=48, channels=3, seed=seed)
        found = {"1": load_vae(name), "2": given, "4": node("WanVAEAccelerate", vae=["1", 0])}
        found["3"] = work("4" if "accelerated" in kind else "1", ours, options)
        found["5"] = node("ProbeSink", value=["3", 0])
        return found

    for seed in range(3):
        run_right(comfy, prompt(460 + seed))
    changed = {"6": node("ProbeVAEWeights", vae=["1", 0], kind="scaled")}
    again = {**prompt(463), **changed, "7": work("6", core, {})}
    again["4"] = node("WanVAEAccelerate", vae=["6", 0])
    again["3"]["inputs"]["vae"] = ["4" if "accelerated" in kind else "6", 0]
    compare = node("ProbeCompareImages", a=["3", 0], b=["7", 0])
    if kind == "video":  # its first frame
        again["8"] = node("ImageFromBatch", image=["7", 0], batch_index=0, length=1)
        compare = node("ProbeCompareImages", a=["3", 1], b=["8", 0])
    if is_encode:
        compare = node("ProbeCompareLatents", a=["3", 0], b=["7", 0])
    again["5"] = compare
    run = run_right(comfy, again)
    assert run.outputs["5"]["difference"][0] < 1e-4


@pytest.mark.full
def test_a_copy_whose_vae_is_gone_stays_until_memory_is_wanted(environment, tmp_path):
    """--cache-none: each prompt loads the VAE again and finds the copy of the last one."""
    server = Comfy(environment, tmp_path / "comfy", "--cache-none")
    graphs.write_vaes(server.base / "models" / "vae")
    server.install_probe()
    with server as comfy:
        errors = comfy.log_text().count("Traceback")  # of core nodes that need other packages
        run_right(comfy, decode(latent(frames=1, seed=430)))
        (first,) = copies(comfy)
        assert first[1:] == ("torch.float32", False, True)
        run_right(comfy, decode(latent(frames=1, seed=431)))
        assert [one[0] for one in copies(comfy)] == [first[0]], "the same copy, not a new one"
        comfy.post("/free", {"unload_models": True})
        copies(comfy)  # ComfyUI looks at what was asked of it after the next prompt at the latest
        assert copies(comfy) == []
        run = run_right(comfy, decode_and_compare(latent(frames=1, seed=432)))
        assert run.outputs["5"]["difference"][0] < 1e-4
        # In the middle of a prompt, while the VAE is alive, a copy only leaves the device.
        prompt = {**decode(latent(frames=1, seed=433)), "6": node("ProbeUnload", image=["3", 0])}
        run_right(comfy, prompt)
        assert copies(comfy) == [], "unloaded first, and then the VAE died"
        assert comfy.log_text().count("Traceback") == errors


def test_a_run_that_has_too_little_moves_other_models_away_and_keeps_its_own(environment, tmp_path):
    # A server of its own: the copies and models of other tests would count.
    server = Comfy(environment, tmp_path / "comfy")
    graphs.write_vaes(server.base / "models" / "vae")
    server.install_probe()

    def prompt(mib: int) -> dict:
        salt = uuid.uuid4().int % 2**30
        return {
            "1": load_vae(VAES[0]),
            "2": latent(frames=1, seed=450 + mib % 2),
            "3": node("VAEDecode", vae=["1", 0], samples=["2", 0]),  # loads ComfyUI's own
            "6": node("WanVAEDecode", vae=["1", 0], samples=["2", 0]),
            # Behind both, in whatever order ComfyUI takes them.
            "5": node("ProbeGiveBack", mib=mib, image=["6", 0], before=["3", 0], salt=salt),
        }

    with server as comfy:
        enough = run_right(comfy, prompt(0)).outputs["5"]
        # More than there is: all others go.
        short = run_right(comfy, prompt(1 << 30)).outputs["5"]
    (ours,) = enough["ours"]
    assert enough["after"] == enough["before"] and set(enough["before"]) > {ours}
    assert len(enough["held"]) == len(set(enough["before"]) - {ours}) and min(enough["bytes"]) > 0
    assert all(name.startswith("ComfyUI's ") and ours not in name for name in enough["held"])
    assert enough["free"][0] > 0
    assert ours in short["before"] and short["after"] == [ours]
