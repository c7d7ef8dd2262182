"""Previews: the frame just made, small, seldom, and without a change to what the sink gets."""

from __future__ import annotations

import pytest
import torch

from wan_vae.io.preview import PreviewSink
from wan_vae.io.sink import TensorSink

FRAMES, HEIGHT, WIDTH = 5, 24, 48


def previewed(pixels, *, most=12, interval_s=0.0, rows=HEIGHT):
    """What is shown while `pixels` are written frame after frame, in blocks of `rows`."""
    shown: list[torch.Tensor] = []
    out = torch.empty_like(pixels)
    sink = PreviewSink(
        TensorSink(out), shown.append, height=HEIGHT, most=most, interval_s=interval_s
    )
    assert sink.output_bytes == out.nbytes and not sink.needs_whole_frames
    for start in range(pixels.shape[2]):
        for top in range(0, HEIGHT, rows):
            sink.write(pixels[:, :, start : start + 1, top : top + rows], start, top)
    sink.close()
    assert torch.equal(out, pixels)
    return shown


@pytest.fixture
def pixels():
    """Each frame is one level, lighter than the one before."""
    levels = torch.linspace(-1, 1, FRAMES).view(1, 1, FRAMES, 1, 1)
    return levels.expand(2, 3, FRAMES, HEIGHT, WIDTH).contiguous()


def test_each_frame_is_shown_small_where_time_allows(pixels):
    shown = previewed(pixels)
    assert [frame.shape for frame in shown] == [(6, 12, 3)] * FRAMES
    assert [int(frame.unique()) for frame in shown] == [0, 64, 128, 191, 255]
    assert {frame.dtype for frame in shown} == {torch.uint8}


@pytest.mark.parametrize(
    ("channels", "shown"),
    [([0.0], [128, 128, 128]), ([1.0, -1.0, 0.0, 0.0], [255, 128, 191])],
    ids=["grey", "alpha"],
)
def test_a_frame_of_any_colours_is_shown_in_three(channels, shown):
    """ComfyUI sends it as a JPEG, which knows no alpha; alpha of a half lies on white."""
    values = torch.tensor(channels).view(1, -1, 1, 1, 1)
    frames = previewed(values.expand(1, -1, 2, HEIGHT, WIDTH).contiguous())
    assert [frame[0, 0].tolist() for frame in frames] == [shown] * 2


def test_no_more_often_than_asked(pixels):
    assert len(previewed(pixels, interval_s=3600.0)) == 1


def test_a_small_frame_keeps_its_size(pixels):
    assert previewed(pixels, most=512)[0].shape == (HEIGHT, WIDTH, 3)


def test_strips_are_no_frames(pixels):
    assert previewed(pixels, rows=HEIGHT // 2) == []


@pytest.mark.gpu
def test_on_a_gpu_a_preview_waits_for_nobody_and_comes(pixels):
    """The copy to the host is asynchronous: what is shown is whole all the same."""
    shown = previewed(pixels.cuda())
    assert shown, "the last one is shown when the sink is closed"
    assert all(not frame.is_cuda and len(frame.unique()) == 1 for frame in shown)
