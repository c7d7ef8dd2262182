"""Structure may change, pictures may not: the grid of `same_pictures` against its file."""

from __future__ import annotations

import json

import pytest
import torch

from tests.unit import same_pictures

CONTENT = json.loads(same_pictures.FILE.read_text(encoding="utf-8"))
SAME_ENVIRONMENT = CONTENT["environment"] == same_pictures.environment()
# Of a projection, whose size is about 1: float32 sums in another order, or bfloat16 ones.
TOLERANCES = {"fp32": 1e-5, "bf16": 3e-2}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The file was made by one thread; how threads share a convolution may change its bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(cases) -> set[str]:
    """Compare every case with the file; all that differ are named together."""
    different, names = [], set()
    for name, make in cases:
        names.add(name)
        expected, result = CONTENT["cases"][name], same_pictures.describe(make())
        assert result["shape"] == expected["shape"], name
        if SAME_ENVIRONMENT:
            if result["digest"] != expected["digest"]:
                different.append(name)
            continue
        tolerance = TOLERANCES["bf16" if " bf16 " in name else "fp32"]
        if not (
            result["norm"] == pytest.approx(expected["norm"], rel=tolerance)
            and result["projections"] == pytest.approx(expected["projections"], abs=tolerance)
        ):
            different.append(name)
    assert not different, f"{len(different)} of {len(names)} cases changed: {different[:8]}"
    return names


@pytest.mark.full
def test_decodes_encodes_strips_and_streams_keep_their_bits_and_so_do_shards():
    names = check(same_pictures.cases()) | check(same_pictures.sharded_cases())
    assert names == set(CONTENT["cases"])


def test_a_changed_bit_is_seen():
    x = torch.randn(1, 3, 2, 4, 4)
    y = x.clone()
    y[0, 0, 0, 0, 0] = torch.nextafter(y[0, 0, 0, 0, 0], torch.tensor(9.0))
    assert same_pictures.describe(x)["digest"] != same_pictures.describe(y)["digest"]
    assert same_pictures.describe(x)["projections"] == pytest.approx(
        same_pictures.describe(y)["projections"], abs=1e-6
    )
