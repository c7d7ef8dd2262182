"""The plan and what follows from it: arithmetic that every rank does alone and alike."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.suite.exchanges import halo_bytes
from benchmarks.suite.scaling import attention_bytes, cross_size, messages
from tests.dist import jobs
from wan_vae.chunking import schedule
from wan_vae.errors import GeometryError
from wan_vae.sharding.plan import plan_shards

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 30, 45, 60, 90])
@pytest.mark.parametrize("axis", ["height", "width"])
def test_every_row_goes_to_one_rank_for_every_rank_count(rows, axis):
    size = (rows, 5) if axis == "height" else (5, rows)
    picture = torch.arange(rows * 5).view(size)
    for ranks in range(1, rows + 4):
        plan = plan_shards(*size, ranks, axis)
        assert plan.axis == axis and plan.rows == rows
        assert plan.active == min(ranks, rows)
        assert plan.idle == tuple(range(rows, ranks))
        counts = [stop - start for start, stop in plan.bounds]
        assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)
        parts = [picture[plan.place(r)] for r in range(ranks)]
        assert torch.equal(torch.cat(parts, dim=plan.dim), picture)
        shapes = [plan.pixel_shape_of(r, (3, 8 * size[0], 8 * size[1]), 8) for r in range(ranks)]
        assert [s[plan.dim] for s in shapes] == [8 * n for n in counts] + [0] * len(plan.idle)


@pytest.mark.parametrize(
    ("height", "width", "ranks", "axis"),
    [
        (60, 104, 2, "width"),  # a row across the height is shorter
        (104, 60, 2, "height"),
        (60, 60, 4, "height"),
        (4, 3, 4, "height"),  # width would leave one rank idle
        (3, 40, 8, "width"),
    ],
)
def test_auto_takes_the_axis_that_leaves_less_halo(height, width, ranks, axis):
    assert plan_shards(height, width, ranks).axis == axis
    config = jobs.model("wan2.1").config
    chunk = schedule(1, 1)[0]
    received = {}
    for cut in ("height", "width"):
        plan = plan_shards(height, width, ranks, cut)
        if plan.active == min(ranks, max(height, width)):
            cross = cross_size(plan, height, width)
            received[cut] = sum(halo_bytes(config, plan, r, chunk, cross, 2) for r in range(ranks))
    assert received[axis] == min(received.values())


@pytest.mark.parametrize(
    ("height", "width", "ranks", "axis", "match"),
    [(0, 4, 2, "auto", "0x4"), (4, 4, 0, "auto", "0 ranks"), (4, 4, 2, "time", "'time'")],
)
def test_impossible_plans_are_refused(height, width, ranks, axis, match):
    with pytest.raises(GeometryError, match=match):
        plan_shards(height, width, ranks, axis)


@pytest.mark.parametrize(
    ("name", "size", "count"), [("wan2.1", (7, 12), 4), ("wan2.2", (5, 4), 2), ("mini", (6, 8), 3)]
)
def test_real_ranks_receive_what_the_scaling_model_counts(ranks, name, size, count):
    config, frames = jobs.model(name).config, 4
    shape = (1, config.z_dim, frames, *size)
    plan = plan_shards(*size, count)
    cross = cross_size(plan, *size)
    counted = ranks.run("count_messages", count, name=name, shape=shape, chunk_frames=2)
    for rank, chunks in enumerate(counted):
        expected = [
            (
                messages(config, plan, rank),
                halo_bytes(config, plan, rank, chunk, cross, 4)
                + attention_bytes(config, plan, rank, cross, 4, chunk.frames),
            )
            for chunk in schedule(frames, 2)
        ]
        assert chunks == expected


def test_the_documented_table_is_what_the_scaling_model_prints(monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "scaling_model", ROOT / "benchmarks" / "scaling_model.py"
    )
    scaling_model = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scaling_model", scaling_model)  # its dataclass looks it up
    spec.loader.exec_module(scaling_model)
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert f"\n\n{scaling_model.table()}\n\n" in text
