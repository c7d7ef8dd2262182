"""Shards give the bits of one process: real processes, Gloo, decode and encode.

`torch.equal` wherever the CPU's kernels allow it. They do not for a handful of tiny shapes: oneDNN
takes another 1x1 kernel below 16 pixels and another 3x3 kernel for some widths, which sums in
another order. Those cases are named, and held to 1e-5 of the largest value (float32).
"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.suite.exchanges import halo_bytes
from tests.dist import jobs
from tests.dist.ranks import RankFailed
from wan_vae.chunking import schedule
from wan_vae.geometry import latent_shape
from wan_vae.sharding.plan import plan_shards

MODELS = ("wan2.1", "wan2.2", "mini")
FULL = pytest.mark.full


def latent_of(name, frames, height, width):
    return (1, jobs.model(name).config.z_dim, frames, height, width)


def whole(results, axis, gather):
    """The picture from all ranks' results, checked for who should have what."""
    parts = [pixels for pixels, _ in results]
    if gather == "own":
        return np.concatenate(parts, axis=3 if axis == "height" else 4)
    if gather == "rank0":
        assert all(p is None for p in parts[1:])
    else:
        assert all(np.array_equal(p, parts[0]) for p in parts)
    return parts[0]


def assert_close(found, expected):
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= 1e-5, f"relative error {error:.2e}"


@pytest.mark.parametrize(
    ("name", "gather", "axis"),
    [
        ("wan2.1", "all", "height"),
        ("wan2.1", "rank0", "width"),
        ("wan2.1", "own", "height"),
        ("wan2.1", "own", "width"),
        ("wan2.2", "all", "width"),
        ("wan2.2", "own", "height"),
        ("mini", "all", "height"),
        *(
            pytest.param(*case, marks=FULL)
            for case in (
                ("wan2.1", "all", "width"),
                ("wan2.2", "all", "height"),
                ("wan2.2", "rank0", "width"),
                ("wan2.2", "own", "width"),
                ("mini", "all", "width"),
                ("mini", "rank0", "width"),
                ("mini", "own", "height"),
                ("mini", "own", "width"),
            )
        ),
    ],
)
def test_every_gather_and_axis_gives_the_bits_of_one_process(ranks, name, axis, gather):
    # 7 over 3 is 3, 2, 2: uneven; the other axis is long enough for oneDNN's usual kernels.
    shape = latent_of(name, 3, *((7, 16) if axis == "height" else (16, 7)))
    expected = jobs.model(name).decode(jobs.noise(shape), chunk_frames=2).numpy()
    results = ranks.run(
        "decode", 3, name=name, shape=shape, axis=axis, gather=gather, chunk_frames=2
    )
    assert np.array_equal(whole(results, axis, gather), expected)


@pytest.mark.parametrize(
    ("height", "count"),
    [
        (5, 2),
        (7, 4),
        *(pytest.param(*case, marks=FULL) for case in ((4, 2), (4, 4), (5, 4), (7, 3))),
    ],
)
def test_even_odd_and_one_row_remainders(ranks, height, count):
    # 7 over 4 is 2, 2, 2, 1. Frames and width enough for oneDNN's usual kernels on a single row.
    shape = latent_of("wan2.1", 3, height, 16)
    expected = jobs.model("wan2.1").decode(jobs.noise(shape), chunk_frames=2).numpy()
    results = ranks.run("decode", count, name="wan2.1", shape=shape, axis="height", chunk_frames=2)
    assert np.array_equal(whole(results, "height", "all"), expected)


@pytest.mark.parametrize("count", [pytest.param(2, marks=FULL), 4])
@pytest.mark.parametrize(("name", "axis"), [("wan2.2", "height"), ("mini", "width")])
def test_two_and_four_ranks_of_the_other_models(ranks, name, axis, count):
    # 6 over 4 is 2, 2, 1, 1.
    shape = latent_of(name, 2, *((6, 16) if axis == "height" else (16, 6)))
    expected = jobs.model(name).decode(jobs.noise(shape), chunk_frames=2).numpy()
    results = ranks.run("decode", count, name=name, shape=shape, axis=axis, chunk_frames=2)
    assert np.array_equal(whole(results, axis, "all"), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("axis", ["height", "width"])
def test_shards_of_a_few_pixels_are_equal_to_rounding(ranks, name, axis):
    shape = latent_of(name, 2, 4, 6)
    expected = jobs.model(name).decode(jobs.noise(shape)).numpy()
    results = ranks.run("decode", 4, name=name, shape=shape, axis=axis)
    assert_close(whole(results, axis, "all"), expected)


@pytest.mark.parametrize(
    ("name", "axis", "count", "size"),
    [
        ("wan2.1", "height", 3, 7),
        ("wan2.1", "width", 4, 5),
        ("wan2.2", "height", 4, 5),
        ("mini", "width", 2, 5),
        *(
            pytest.param(*case, marks=FULL)
            for case in (
                ("wan2.1", "height", 2, 4),
                ("wan2.1", "height", 2, 5),
                ("wan2.1", "height", 3, 4),
                ("wan2.2", "width", 3, 4),
                ("mini", "height", 4, 6),
            )
        ),
    ],
)
def test_encode_equals_one_process(ranks, name, axis, count, size):
    factor = jobs.model(name).config.spatial_factor
    # A few pixels over: cropped as in one process. 5 over 4 is 2, 1, 1, 1; 4 over 3 is 2, 1, 1.
    rows, columns = (size, 16) if axis == "height" else (16, size)
    shape = (1, 3, 5, rows * factor + 3, columns * factor + 1)
    expected = jobs.model(name).encode(jobs.noise(shape).tanh()).numpy()
    for gather in ("all", "rank0", "own"):
        results = ranks.run("encode", count, name=name, shape=shape, axis=axis, gather=gather)
        found = whole(results, axis, gather)
        assert found.shape == latent_shape(shape, jobs.model(name).config)
        # The stride-2 convolution: oneDNN chooses its kernel by size.
        assert_close(found, expected)


@pytest.mark.parametrize("frames", [1, 4])
def test_an_image_and_planned_chunks(ranks, frames):
    shape = latent_of("wan2.1", frames, 6, 16)
    results = ranks.run("decode", 2, name="wan2.1", shape=shape)
    # One device takes other chunks in float32, and the library's sums depend on them.
    chunks = [chunk["stop"] - chunk["start"] for chunk in results[0][1]["chunks"]]
    expected = jobs.model("wan2.1").decode(jobs.noise(shape), chunk_frames=chunks).numpy()
    assert np.array_equal(whole(results, "height", "all"), expected)


def test_surplus_ranks_stay_idle_and_the_report_says_so(ranks):
    shape = latent_of("wan2.1", 2, 2, 16)
    expected = jobs.model("wan2.1").decode(jobs.noise(shape), chunk_frames=1).numpy()
    for gather in ("all", "rank0", "own"):
        results = ranks.run(
            "decode", 4, name="wan2.1", shape=shape, axis="height", gather=gather, chunk_frames=1
        )
        assert np.array_equal(whole(results, "height", gather), expected)
    report = results[3][1]
    assert [s["stop_row"] - s["start_row"] for s in report["shards"]] == [1, 1, 0, 0]
    assert any("2 of 4 ranks stayed idle" in text for text in report["warnings"])


@pytest.mark.parametrize(
    ("name", "axis", "frames", "passes"),
    [
        # 17 frames: 5, 8 and 4. Two ranks have rows and two have none.
        ("wan2.1", "height", (8, 8, 8, 8), 3),
        ("wan2.2", "width", (8, 4, 8, 8), 5),  # one rank has less memory: 1 and four times 4
    ],
)
def test_all_ranks_take_the_same_passes_also_those_without_rows(ranks, name, axis, frames, passes):
    shape = latent_of(name, 5, *((2, 16) if axis == "height" else (16, 2)))
    expected = jobs.model(name).decode(jobs.noise(shape)).numpy()
    for gather in ("all", "rank0", "own"):
        found = ranks.run(
            "decode_in_passes", 4, name=name, shape=shape, axis=axis, gather=gather, frames=frames
        )
        assert [count for _, _, count in found] == [passes] * 4
        results = [(pixels, report) for pixels, report, _ in found]
        assert_close(whole(results, axis, gather), expected)
        assert [len(report["chunks"]) for _, report in results] == [1] * 4


def test_ranks_with_different_weight_formats_agree(ranks):
    shape = latent_of("wan2.1", 3, 5, 16)
    expected = jobs.model("wan2.1").decode(jobs.noise(shape), chunk_frames=2).numpy()
    formats = ["contiguous", "channels_last_3d", "contiguous"]
    results = ranks.run(
        "decode", 3, name="wan2.1", shape=shape, axis="height", formats=formats, chunk_frames=2
    )
    assert [r["layout"]["chosen"] for _, r in results] == formats
    assert_close(whole(results, "height", "all"), expected)
    assert all(report["layout"]["mixed_calls"] == 0 for _, report in results)


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_the_report_counts_the_halos_that_the_plan_predicts(ranks, name):
    shape = latent_of(name, 4, 7, 5)
    _, report = ranks.run("decode", 3, name=name, shape=shape, axis="height", chunk_frames=2)[0]
    plan = plan_shards(7, 5, 3, "height")
    config = jobs.model(name).config
    chunks = schedule(4, 2)
    predicted = [sum(halo_bytes(config, plan, r, c, 5, 4) for c in chunks) for r in range(3)]
    assert [s["halo_bytes"] for s in report["shards"]] == predicted
    assert [(s["start_row"], s["stop_row"]) for s in report["shards"]] == list(plan.bounds)
    assert [s["rank"] for s in report["shards"]] == [0, 1, 2]
    assert all(s["axis"] == "height" and s["device"] == "cpu" for s in report["shards"])
    assert all(s["wait_ms"] > 0 and s["halo_rows"] > 0 for s in report["shards"])


@pytest.mark.parametrize("operation", ["decode", "encode"])
def test_ranks_read_their_clocks_before_the_host_waits_for_the_last_work(ranks, operation):
    """An encode is one pass, whose exchanges are read one after another."""
    shape = (1, 3, 9, 48, 16) if operation == "encode" else latent_of("wan2.1", 3, 6, 4)
    for at_end, read, wait_ms in ranks.run("run_behind", 2, operation=operation, shape=shape):
        spans, exchanges, read_then = at_end
        assert spans > exchanges > 20
        # But the last pass, and of an encode, whose ranks gather first, the last exchange.
        assert read_then == spans - (2 if operation == "encode" else 1)
        assert read == spans and wait_ms == exchanges


@pytest.mark.parametrize(
    ("planted", "match"),
    [
        ({"seed_of_rank_1": 1}, "disagree about contents"),
        ({"frames_of_rank_1": 3}, "disagree about frames"),
        ({"chunks_of_rank_1": 2}, "disagree about schedule"),
        ({"precision_of_rank_1": "bf16"}, "disagree about precision"),
        ({"nan_on_rank_1": True}, "disagree about finite: rank 0 has 1"),
    ],
)
def test_ranks_that_disagree_are_refused_on_every_rank(ranks, planted, match):
    with pytest.raises(RankFailed) as caught:
        ranks.run("decode_with_a_difference", 2, **planted)
    assert {kind for kind, _, _ in caught.value.errors.values()} == {"ShardingError"}
    assert sorted(caught.value.errors) == [0, 1]
    assert all(match in text for _, text, _ in caught.value.errors.values())


@pytest.mark.parametrize("kind", ["shape", "dtype", "site", "order"])
def test_a_peer_that_sends_something_else_is_refused(ranks, kind):
    with pytest.raises(RankFailed) as caught:
        ranks.run("send_something_else", 2, kind=kind)
    kinds = {rank: error[0] for rank, error in caught.value.errors.items()}
    assert kinds == {0: "ShardingError", 1: "ShardingError"}
    assert "refused what rank 1 sends" in caught.value.errors[0][1]
    # The next decode on the same group is right again.
    test_an_image_and_planned_chunks(ranks, 1)


@pytest.mark.parametrize("forgetful", [None, 1])
def test_messages_in_one_call_and_headers_once_for_all_runs(ranks, forgetful):
    """As with NCCL: right, no header in a second run, and all of them again if a rank forgot."""
    found = ranks.run("exchange_at_once", 3, forgetful=forgetful)
    assert [right for right, _ in found] == [True] * 3
    for rank, (_, headers) in enumerate(found):
        messages = 8 if rank == 1 else 4  # two places, sent and received
        assert headers == [messages, 0, 0 if forgetful is None else messages]


def test_one_rank_asked_to_stop_stops_all_at_the_next_chunk(ranks):
    done = ranks.run("decode_and_cancel", 3, stop_rank=1, after=2)
    assert {text for text, _ in done} == {"cancelled after 5 of 17 frames"}
    assert all(status == "cancelled" for _, status in done)


def test_memory_formats_survive_the_wire(ranks):
    assert ranks.run("gather_every_format", 3) == [[True] * 3] * 3
