"""WanVAEDecodeSharded in a running ComfyUI with two CPU workers: the picture, cancel, kill."""

import os
import select
import signal
import time
import uuid
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.comfy import graphs
from tests.comfy.graphs import latent, load_vae, node
from tests.comfy.server import Comfy, Run
from tests.conftest import PATIENCE_S
from tests.dist.sockets import local_addresses

pytestmark = pytest.mark.comfy


def sharded(samples: dict, **options) -> dict:
    """The sharded decode (node 3) with something that wants its image (5)."""
    options = {"devices": "cpu,cpu", "axis": "auto", "gather": "shared", **options}
    return {
        "1": load_vae(),
        "2": samples,
        "3": node("WanVAEDecodeSharded", vae=["1", 0], samples=["2", 0], **options),
        "5": node("ProbeSink", value=["3", 0]),
    }


def workers(comfy) -> list[int]:
    """Process ids of the server's worker processes."""
    found = []
    for task in Path(f"/proc/{comfy.pid}/task").iterdir():
        # Threads and processes may end while this reads.
        with suppress(FileNotFoundError, ProcessLookupError):
            for pid in (task / "children").read_text().split():
                if "workers.begin" in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(int(pid))
    return sorted(found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": "height", "gather": "rank0"},
        {"axis": "width", "gather": "all", "normalized": True},
    ],
)
def test_the_picture_is_that_of_one_device(comfy, options):
    prompt = sharded(latent(frames=3, height=6, width=16, seed=31), chunk_frames=1, **options)
    kind = {"normalized": options.get("normalized", False)}
    prompt["4"] = node("WanVAEDecode", vae=["1", 0], samples=["2", 0], chunk_frames=1, **kind)
    prompt["5"] = node("ProbeCompareImages", a=["3", 0], b=["4", 0])
    run = comfy.run(prompt)
    assert run.error is None, run.error
    found = run.outputs["5"]
    assert found["a"] == found["b"]
    # Bits are compared in tests/dist; at this size the CPU takes other kernels for half a picture.
    assert found["difference"][0] < 1e-5
    assert found["spread"][0] > 0.01
    report = run.report("3")
    assert report["fallbacks"] == [] and report["layout"]["mixed_calls"] == 0
    assert [s["rank"] for s in report["shards"]] == [0, 1]
    assert all(s["halo_bytes"] > 0 for s in report["shards"])
    assert report["shards"][0]["axis"] == options.get("axis", "width")


def test_workers_stay_warm(comfy):
    comfy.run(sharded(latent(seed=32)))
    before = workers(comfy)
    assert len(before) == 2
    comfy.run(sharded(latent(seed=33)))
    assert workers(comfy) == before


def assert_they_end(pids: list[int]) -> None:
    """Wait for processes that are not our children."""
    assert pids
    ends = [os.pidfd_open(pid) for pid in pids if Path(f"/proc/{pid}").exists()]
    for end in ends:
        assert select.select([end], [], [], 30)[0], f"one of {pids} is still there"
        os.close(end)


def test_unloading_models_gives_the_workers_back(comfy):
    comfy.run(sharded(latent(seed=51)))
    before = workers(comfy)
    assert len(before) == 2
    comfy.post("/free", {"unload_models": True})
    assert_they_end(before)
    # Under memory pressure, in the middle of a prompt: the same.
    prompt = sharded(latent(seed=52))
    prompt["6"] = node("ProbeUnload", image=["3", 0])
    run = comfy.run(prompt)
    assert run.error is None, run.error
    assert run.outputs["6"].get("left", []) == [] and workers(comfy) == []
    assert comfy.run(sharded(latent(seed=53))).report("3")["fallbacks"] == []
    assert len(workers(comfy)) == 2 and not set(before) & set(workers(comfy))


def test_room_is_made_for_workers_that_ended_or_hold_a_smaller_vae(comfy):
    """They ended for want of work, or get other weights: ComfyUI makes room for those."""
    prompt = sharded(latent(seed=58))
    prompt["4"] = node("WanVAEDecode", vae=["1", 0], samples=["2", 0])
    prompt["5"] = node("ProbeWorkersCounted", image=["3", 0], other=["4", 0])
    run = comfy.run(prompt)
    assert run.error is None, run.error
    assert run.outputs["5"]["models"][0] > 1, "the order of one tells nothing"
    more_than_is_free, no_more, ended = run.outputs["5"]["asked"]
    assert more_than_is_free and ended and not no_more


def test_workers_load_nothing_of_the_server_and_listen_to_nobody_outside(comfy):
    comfy.run(sharded(latent(seed=54)))
    assert "aiohttp" in Path(f"/proc/{comfy.pid}/maps").read_text(), "what to look for"
    for pid in workers(comfy):
        assert "aiohttp" not in Path(f"/proc/{pid}/maps").read_text()
        found = local_addresses(pid)
        assert found and all(address.is_loopback for address in found), found


def test_two_queued_decodes_use_the_same_workers(comfy):
    client = uuid.uuid4().hex
    with closing(comfy.listen(client)) as stream:
        runs = [Run(comfy.queue(sharded(latent(seed=seed)), client)) for seed in (55, 56)]
        pids = []
        for run in runs:
            comfy.follow(stream, run)
            pids.append(workers(comfy))
    told = [run.of_type("wan_vae.report")[-1]["report"]["status"] for run in runs]
    assert told == ["done", "done"]
    assert pids[0] == pids[1] and len(pids[0]) == 2


def test_workers_end_with_their_server(environment, tmp_path):
    server = Comfy(environment, tmp_path)
    graphs.write_vaes(server.base / "models" / "vae")
    server.install_probe()
    with server:
        run = server.run(sharded(latent(seed=57)))
        assert run.error is None
        told = [m["report"].get("phase") for m in run.of_type("wan_vae.report")]
        starts = told.index({"name": "starting_workers", "count": 2})
        assert told[starts + 1] == {"name": "planning"}, "it says why, as long as that is so"
        pids = workers(server)
        assert len(pids) == 2
    assert_they_end(pids)


def test_cancel_within_a_chunk_and_run_again(comfy):
    sent = []

    def stop(message):
        if message["type"] == "progress" and message["data"]["value"] >= 9 and not sent:
            sent.append(message)
            comfy.post("/interrupt", {})

    run = comfy.run(sharded(latent(frames=60, seed=34), chunk_frames=1), on_message=stop)
    assert run.interrupted and run.error is None
    kept = run.report("3")
    assert kept["status"] == "cancelled"
    assert 9 <= kept["done_frames"] < 100
    assert comfy.run(sharded(latent(seed=35))).report("3")["status"] == "done"


def run_and_kill(comfy, **options):
    killed = []

    def kill(message):
        if message["type"] == "progress" and message["data"]["value"] >= 9 and not killed:
            killed.extend(workers(comfy))
            os.kill(killed[0], signal.SIGKILL)

    samples = latent(frames=40, **options.pop("samples"))
    run = comfy.run(sharded(samples, chunk_frames=1, **options), on_message=kill)
    return run, killed


def test_a_killed_worker_is_an_error_that_names_it_and_the_server_lives(comfy):
    run, killed = run_and_kill(comfy, samples={"seed": 36}, allow_fallback=False)
    assert run.error["exception_type"].endswith("ShardingError")
    assert "rank 0 (cpu) died (exit code -9)" in run.error["exception_message"]
    waiting = workers(comfy)
    assert len(waiting) == 2 and not set(killed) & set(waiting), "for the next run"
    again = comfy.run(sharded(latent(seed=37)))
    assert again.report("3")["status"] == "done" and workers(comfy) == waiting


@pytest.mark.full
def test_a_killed_worker_falls_back_to_one_device_and_says_so(comfy):
    run, _ = run_and_kill(comfy, samples={"seed": 38})
    assert run.error is None, run.error
    report = run.report("3")
    assert report["status"] == "done" and report["done_frames"] == 157
    assert "rank 0 (cpu) died" in report["fallbacks"][0]


def test_a_missing_gpu_is_named(comfy):
    run = comfy.run(sharded(latent(seed=39), devices="cpu,7", allow_fallback=False))
    assert "rank 1 cannot start: device cuda:7" in run.error["exception_message"]


def give_back_workers(comfy) -> None:
    """End the workers; the server does that in a moment, in its own thread."""
    comfy.run(sharded(latent(seed=60)))
    before = workers(comfy)
    comfy.post("/free", {"unload_models": True})
    assert_they_end(before)


def test_all_on_a_machine_without_gpus_is_a_plain_decode(comfy):
    """On the VAE's own device, in the server's process."""
    give_back_workers(comfy)
    run = comfy.run(sharded(latent(seed=41), devices="all"))
    assert run.error is None, run.error
    report = run.report("3")
    assert report["status"] == "done" and report["fallbacks"] == [] and report["shards"] == []
    assert [w for w in report["warnings"] if w.startswith("one device: nothing to shard")]
    assert workers(comfy) == []
    later = comfy.run(sharded(latent(seed=42))).report("3")["warnings"]
    assert not [w for w in later if w.startswith("one device")]


def test_workers_start_while_the_nodes_before_run(comfy, tmp_path):
    """They have joined nobody yet, and are those of the run."""
    give_back_workers(comfy)
    fifo, seen = tmp_path / "held", []
    os.mkfifo(fifo)
    prompt = sharded(latent(seed=61))
    prompt["6"] = node("ProbeHeld", samples=["2", 0], path=str(fifo))
    prompt["3"]["inputs"]["samples"] = ["6", 0]

    def look(message):
        if message["type"] == "executing" and message["data"]["node"] == "6":
            # The node runs until the FIFO has been written to. Linux tells nobody of a process
            # that starts, so this looks again and again.
            deadline = time.monotonic() + PATIENCE_S
            while len(seen) < 2 and time.monotonic() < deadline:
                seen[:] = workers(comfy)
            fifo.write_bytes(b"")

    run = comfy.run(prompt, on_message=look)
    assert run.error is None, run.error
    assert len(seen) == 2 and seen == workers(comfy)


def test_workers_that_make_room_for_a_node_before_theirs_are_replaced_at_once(comfy, tmp_path):
    """A sampler's model takes the memory of workers that the same prompt is to use."""
    comfy.run(sharded(latent(seed=62)))
    before, fifo, seen = workers(comfy), tmp_path / "held", []
    os.mkfifo(fifo)
    prompt = sharded(latent(seed=63))
    prompt["4"] = node("WanVAEDecode", vae=["1", 0], samples=["2", 0])
    prompt["6"] = node("ProbeUnload", image=["4", 0])
    prompt["7"] = node("ProbeHeld", samples=["2", 0], path=str(fifo), after=["6", 0])
    prompt["3"]["inputs"]["samples"] = ["7", 0]

    def look(message):
        if message["type"] == "executing" and message["data"]["node"] == "7":
            seen[:] = workers(comfy)
            fifo.write_bytes(b"")

    run = comfy.run(prompt, on_message=look)
    assert run.error is None, run.error
    assert len(before) == len(seen) == 2 and not set(before) & set(seen)
    assert seen == workers(comfy), "those of the run"


def test_only_devices_is_not_advanced_and_old_prompts_run(comfy):
    info = comfy.get("/object_info/WanVAEDecodeSharded")["WanVAEDecodeSharded"]["input"]
    assert list(info["required"]) == ["samples", "vae", "devices"]
    # In the order of the widgets in saved workflows.
    assert list(info["optional"]) == [
        "axis",
        "gather",
        "allow_fallback",
        "timeout_s",
        "memory_layout",
        "precision",
        "chunk_frames",
        "normalized",
    ]
    assert all(spec[1].get("advanced") is True for spec in info["optional"].values())
    prompt = sharded(latent(seed=62))
    del prompt["3"]["inputs"]["axis"], prompt["3"]["inputs"]["gather"]
    assert comfy.run(prompt).report("3")["status"] == "done"


def test_the_memory_of_the_last_image_is_used_again(comfy):
    """ComfyUI lets go of an image before the node makes the next: fresh memory costs 100 ms."""
    for seed in (63, 64, 65):
        report = comfy.run(sharded(latent(seed=seed))).report("3")
    assert report["host_ms"]["rank: open"] < report["host_ms"]["run"]
    shared = [
        line
        for line in Path(f"/proc/{comfy.pid}/maps").read_text().splitlines()
        if "/wan_vae_" in line
    ]
    assert len(shared) == 1, shared
