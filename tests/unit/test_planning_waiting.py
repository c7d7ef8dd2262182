"""What is chosen for whole frames on a card with little memory, and how long that takes."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from tests.unit.fake_layers import fake_layers
from wan_vae.chunking import schedule
from wan_vae.config import wan21
from wan_vae.planning import choose as choosing
from wan_vae.planning import peak
from wan_vae.planning.choose import PASSES, PlanRequest, choice_of, choose
from wan_vae.planning.waiting import WORK_RATE, Waiting

GIB = 2**30
# What an H200 had free with 6 and 8 GB that no other process held.
FREE = {6: 3.85 * GIB, 8: 5.7 * GIB}
HEIGHTS = {720: (90, 160), 1080: (135, 240)}


def stream(height=720, frames=21, **changes):
    """Whole frames of a video with our kernels."""
    layers = fake_layers(wan21(), "cuda", torch.bfloat16)
    latent = (1, 16, frames, *HEIGHTS[height])
    wanted = PlanRequest(wan21(), latent, torch.bfloat16, "channels_last_3d", layers)
    return replace(wanted, whole_frames=True, staged=True, **changes)


def pixel_bytes(height, frames, strips=None):
    """Of whole frames; or of the rows that wait, which are those of all strips but the last."""
    rows, columns = HEIGHTS[height]
    rows -= 0 if strips is None else rows // strips
    return (4 * frames - 3) * 8 * rows * 8 * columns * 3 * 4


def waiting_of(height, strips, lengths, parts, elements):
    """What 81 frames do in so many strips."""
    wanted = stream(height)
    size = (wanted.config, wanted.latent_shape, wanted.dtype, "channels_last_3d", wanted.layers)
    found = peak.DecodeMemory(*size).of_parked_strips(
        strips, schedule(21, lengths), elements, parts, False
    )
    return found.waiting


@pytest.mark.parametrize(
    "card_gb, allocator, height, strips",
    [
        (6, "caching", 720, 3),
        (6, "caching", 1080, 8),
        (6, "cudaMallocAsync", 720, 4),
        (6, "cudaMallocAsync", 1080, 12),
        (8, "caching", 720, 2),
        (8, "caching", 1080, 5),
        (8, "cudaMallocAsync", 720, 3),
        (8, "cudaMallocAsync", 1080, 6),
    ],
)
@pytest.mark.parametrize("host_gib", [None, 8], ids=["host", "host of 8 GiB"])
def test_whole_frames_of_81_go_as_an_image_does(card_gb, allocator, height, strips, host_gib):
    """In its chunks, passes and strips. All frames of a strip before the next: no history waits,
    only pixels, which come back beside the last strip. Two times four whole frames are added where
    that strip takes most."""
    host = None if host_gib is None else host_gib * GIB
    wanted = stream(height, free_bytes=FREE[card_gb], allocator=allocator, host_free_bytes=host)
    image, video = choose(replace(wanted, whole_frames=False)), choose(wanted)
    same = ("strips", "lengths", "pass_elements", "extra_work")
    assert [getattr(video, name) for name in same] == [getattr(image, name) for name in same]
    assert video.strips == strips and video.parts == (21,) and not video.features_wait
    added = video.planned_bytes - image.planned_bytes
    assert 0 <= added <= 8 * pixel_bytes(height, 21) / 81
    assert added == 0 or strips < 4
    assert video.host_bytes == pixel_bytes(height, 21, strips)
    assert f"frames of strips wait in {video.host_bytes / GIB:.1f} GiB" in video.note
    way = waiting_of(height, strips, video.lengths, video.parts, video.pass_elements)
    assert video.seconds == way.seconds < 1.05 * replace(way, pixels_bytes=0).seconds
    assert strips > 6 or way.seconds == replace(way, pixels_bytes=0).seconds


@pytest.mark.parametrize(
    "height, strips, lengths, parts, elements, milliseconds",
    [
        (720, 3, (21,), (21,), PASSES[1], 1103),
        (1080, 8, (6, 6, 6, 3), (6, 6, 6, 3), PASSES[1], 8912),
    ],
)
def test_the_model_gives_the_times_that_were_measured(
    height, strips, lengths, parts, elements, milliseconds
):
    """On an H200 with 6 GB free: of an IMAGE, as nothing else takes time where the way back of the
    pixels is hidden; and of a plan of before, with history."""
    waiting = waiting_of(height, strips, lengths, parts, elements)
    assert waiting.seconds == pytest.approx(milliseconds / 1e3, rel=0.1)


def test_history_costs_its_locking_and_each_boundary():
    one = Waiting(0, 0, 0, 0, 0, 0)
    assert one.seconds == 0
    history = [replace(one, history_bytes=10**10, boundaries=n).seconds for n in (1, 2, 3)]
    assert 3 < history[0] < 6
    assert history[2] - history[1] == pytest.approx(history[1] - history[0]) == pytest.approx(0.4)


def test_pixels_come_back_beside_the_last_strip_and_cost_what_that_does_not_hide():
    one = Waiting(0, 0, 0, 0, 10**9, 0)
    assert one.seconds == pytest.approx(0.2)
    assert replace(one, work=WORK_RATE, last_work=WORK_RATE / 10).seconds == pytest.approx(1.1)
    assert replace(one, work=WORK_RATE, last_work=WORK_RATE / 4).seconds == 1
    # Features come back before a strip needs them.
    assert replace(one, work=WORK_RATE, last_work=WORK_RATE, features_bytes=10**9).seconds > 1.1


def test_the_last_strip_is_a_part_of_the_work_and_its_rows_do_not_wait():
    """90 rows in four strips: 23, 23, 22 and 22, of which the last has a halo on one side."""
    way = waiting_of(720, 4, (21,), (21,), PASSES[1])
    assert way.pixels_bytes == pixel_bytes(720, 21, 4) == pixel_bytes(720, 21) * 68 / 90
    assert way.work / 6 < way.last_work < way.work / 4
    one = waiting_of(720, 1, (21,), (21,), PASSES[1])
    assert one.pixels_bytes == 0 and one.work / 2 < one.last_work < one.work


@pytest.mark.parametrize("height, frames", [(720, 81), (720, 161), (1080, 81)])
def test_a_long_video_is_one_part_where_the_host_has_room(height, frames):
    """321 frames of 1080p: what the trunk makes of them is 2 GB, for which this card has no room.
    It waits on the host, so that as many strips as for 81 frames are enough."""
    choice = choose(stream(height, frames, free_bytes=FREE[6]))
    assert choice.parked and choice.parts == (frames,)
    assert choice.planned_bytes <= 0.75 * FREE[6]
    features = 0
    if choice.features_wait:
        features = 384 * frames * HEIGHTS[height][0] * HEIGHTS[height][1] * 2
    pixels = pixel_bytes(height, frames, choice.strips)
    assert choice.host_bytes == pytest.approx(pixels + features, rel=0.01)
    assert choice.features_wait == (height == 1080 or frames == 161)
    image = choose(replace(stream(height, frames, free_bytes=FREE[6]), whole_frames=False))
    assert choice.strips <= image.strips


@pytest.mark.parametrize("height, frames, host_gib", [(720, 401, 20), (1080, 161, 24)])
def test_a_longer_video_goes_in_as_few_parts_as_the_host_has_room_for(height, frames, host_gib):
    choice = choose(stream(height, frames, free_bytes=FREE[6], host_free_bytes=host_gib * GIB))
    assert choice.parked and len(choice.parts) > 1 and sum(choice.parts) == frames
    assert choice.host_bytes <= 0.6 * host_gib * GIB
    assert choice.planned_bytes <= 0.75 * FREE[6]
    assert "frames and history of strips wait" in choice.note
    # Parts are of whole chunks.
    assert set(accumulate(choice.parts)) <= set(accumulate(choice.lengths))
    assert max(choice.parts) - min(choice.parts) <= 2 * choice.chunk_frames
    more = choose(stream(height, frames, free_bytes=FREE[6], host_free_bytes=2 * host_gib * GIB))
    assert len(more.parts) < len(choice.parts) and more.seconds < choice.seconds


def test_strips_that_are_made_because_memory_ran_out_find_their_parts():
    """Their number is given, not chosen."""
    request = stream(1080, 241, chunk_frames=2)
    for host, is_one in ((None, True), (64 * GIB, True), (30 * GIB, False)):
        choice = choice_of(replace(request, host_free_bytes=host), 16, PASSES[1], True)
        assert choice.parked and sum(choice.parts) == 241
        assert (len(choice.parts) == 1) == is_one
        assert host is None or choice.host_bytes <= 0.6 * host
    given = choice_of(request, 16, PASSES[1], True, (120, 121), True)
    assert given.parts == (120, 121) and given.features_wait


def test_a_device_holds_only_the_rows_of_a_chunk_of_features_that_wait():
    """Ten strips of 720p, which read 9 rows and a halo of 13 on each side."""
    request, rows, row = stream(720, 81, chunk_frames=2), 9 + 2 * 13, 384 * 160 * 2
    taken = [choice_of(request, 10, PASSES[1], True, (81,), wait) for wait in (False, True)]
    saved = taken[0].planned_bytes - taken[1].planned_bytes
    assert (81 * 90 - 2 * rows) * row <= saved < 81 * 90 * row
    assert taken[1].host_bytes - taken[0].host_bytes == 81 * 90 * row


def test_parts_are_of_whole_chunks_and_as_even_as_those_allow():
    chunks = schedule(21, 2)
    assert choosing._parts(chunks, 1) == (21,)
    assert choosing._parts(chunks, 2) == (10, 11)
    assert choosing._parts(chunks, 64) == tuple(chunk.frames for chunk in chunks)
    assert choosing._parts(schedule(21, [5, 16]), 3) == (5, 16)
    assert choosing._parts(schedule(1, 1), 4) == (1,)


def test_a_choice_for_whole_frames_takes_few_walks(monkeypatch):
    walks, real = [], peak.Walk.__init__

    def counted(self, *arguments):
        walks.append(1)
        real(self, *arguments)

    monkeypatch.setattr(peak.Walk, "__init__", counted)
    assert choose(stream(1080, 161, free_bytes=FREE[6], host_free_bytes=20 * GIB)).strips > 1
    assert len(walks) < 400
