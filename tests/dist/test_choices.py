"""Ranks whose clocks do not agree run the same kernels all the same: those of rank 0."""

from __future__ import annotations

import numpy as np
import pytest

from tests.dist.ranks import RankFailed


def folders(tmp_path, count):
    """As on hosts that share no disk."""
    return [str(tmp_path / f"host {i}") for i in range(count)]


@pytest.mark.full
@pytest.mark.parametrize("operation", ["decode", "encode"])
def test_ranks_with_other_clocks_run_the_kernels_of_rank_0(ranks, tmp_path, operation):
    def run(*fastest):
        caches = folders(tmp_path / "-".join(fastest), 2)
        return ranks.run(
            "run_with_a_clock", 2, caches=caches, fastest=fastest, operation=operation, times=2
        )

    alike = {name: run(name, name)[0][0] for name in ("whole", "halves")}
    # Else equal results would show nothing.
    assert not np.array_equal(alike["whole"][0], alike["halves"][0])
    for first, second in (("whole", "halves"), ("halves", "whole")):
        for results, choices in run(first, second):
            assert set(choices.values()) == {first}
            assert all(np.array_equal(result, alike[first][0]) for result in results)


def test_ranks_of_one_host_share_their_choices(ranks, tmp_path):
    shared = [str(tmp_path)] * 3
    results = ranks.run("run_with_a_clock", 3, caches=shared, fastest=["whole", "halves", "whole"])
    assert len({tuple(choices.items()) for _, choices in results}) == 1


def test_a_rank_that_cannot_run_the_kernels_of_rank_0_is_named_on_every_rank(ranks, tmp_path):
    with pytest.raises(RankFailed) as caught:
        ranks.run(
            "run_with_a_clock",
            2,
            caches=folders(tmp_path, 2),
            fastest=["halves", "whole"],
            missing=[(), ("halves",)],
        )
    for kind, text, _ in caught.value.errors.values():
        assert kind == "ShardingError"
        assert "rank 1 cannot run the kernels that rank 0 has chosen" in text
        assert "no halves on this rank" in text and "backend='eager'" in text
