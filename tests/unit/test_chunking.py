"""Chunk schedules, strips and sizes: pure arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_vae import geometry
from wan_vae.chunking import PassEnds, next_pass, schedule
from wan_vae.config import wan21, wan22
from wan_vae.errors import GeometryError


@given(total=st.integers(1, 300), size=st.integers(1, 40))
def test_chunks_cover_every_frame_once(total, size):
    chunks = schedule(total, size)
    assert [i for c in chunks for i in range(c.start, c.stop)] == list(range(total))
    assert [c.is_first for c in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [c.is_last for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[0].is_only_frame == (total == 1)


@pytest.mark.parametrize(
    "total, size", [(0, 1), (-1, 1), (5, 0), (5, [2, 2]), (5, [0, 5]), (3, [])]
)
def test_impossible_schedules_are_refused(total, size):
    with pytest.raises(GeometryError):
        schedule(total, size)


@given(t=st.integers(1, 200), h=st.integers(1, 100), w=st.integers(1, 100))
@pytest.mark.parametrize("config", [wan21(), wan22()], ids=["wan2.1", "wan2.2"])
def test_sizes_there_and_back(config, t, h, w):
    latent = (1, config.z_dim, t, h, w)
    pixels = geometry.pixel_shape(latent, config)
    assert pixels[2:] == (4 * t - 3, h * config.spatial_factor, w * config.spatial_factor)
    assert geometry.latent_shape(pixels, config) == latent


@given(rows=st.integers(1, 200), data=st.data())
def test_strips_cover_every_row_once(rows, data):
    count = data.draw(st.integers(1, rows))
    bands = geometry.strips(rows, count, wan21())
    assert [r for b in bands for r in range(b.start, b.stop)] == list(range(rows))
    assert max(b.stop - b.start for b in bands) - min(b.stop - b.start for b in bands) <= 1
    assert all(0 <= b.halo_start <= b.start < b.stop <= b.halo_stop <= rows for b in bands)


@pytest.mark.parametrize("count", [0, -1, 6])
def test_impossible_strip_counts_are_refused(count):
    with pytest.raises(GeometryError):
        geometry.strips(5, count, wan21())


def test_halos_of_the_real_architectures():
    """Counted by hand: 7 rows at full size (six convolutions and the head), then upwards."""
    assert geometry.strip_halos(wan21()) == (13, 12, 10, 7)
    assert geometry.strip_halos(wan22()) == (13, 12, 10, 7)


ENDS = PassEnds((5, 5, 9), 4)


@pytest.mark.parametrize(
    ("frames", "stage", "is_first", "is_last", "taken"),
    [
        (81, 2, True, False, 9),
        (81, 0, True, True, 5),
        (5, 2, True, False, 5),  # all of them
        (72, 2, False, False, 12),
        (24, 2, False, True, 12),
        (20, 2, False, True, 12),  # and 8, not 12 and 8 of which the last are 4
        (22, 1, False, True, 8),  # never more than the limit
        (8, 1, False, True, 8),  # not the last stage
        (12, 2, False, True, 8),
        (8, 2, False, True, 4),
        (4, 2, False, True, 4),
        (5, 2, True, True, 1),
        (1, 2, True, True, 1),
        (12, 2, False, False, 12),  # more frames come
    ],
)
def test_passes_begin_long_and_become_short(frames, stage, is_first, is_last, taken):
    assert next_pass(frames, stage, (8, 8, 12), ENDS, is_first, is_last) == taken


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_pass_takes_some_frames_and_none_takes_more_than_there_are(data):
    number = st.integers(1, 90)
    limits = tuple(data.draw(st.lists(number, min_size=3, max_size=3)))
    first = tuple(1 + data.draw(st.integers(0, n - 1)) for n in limits)
    ends = PassEnds(first, data.draw(st.integers(0, 200)))
    frames, stage = data.draw(number), data.draw(st.integers(0, 2))
    is_first, is_last = data.draw(st.booleans()), data.draw(st.booleans())
    taken = next_pass(frames, stage, limits, ends, is_first, is_last)
    assert 1 <= taken <= min(frames, limits[stage])


def test_without_ends_the_first_frame_goes_alone_and_no_pass_is_shorter():
    plain = PassEnds()
    assert next_pass(81, 2, (), ENDS, True, True) == 81
    assert next_pass(81, 2, (8, 8, 12), plain, True, True) == 1
    assert next_pass(80, 2, (8, 8, 12), plain, False, True) == 12
    assert next_pass(12, 2, (8, 8, 12), plain, False, True) == 12
