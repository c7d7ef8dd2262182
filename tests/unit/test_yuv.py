"""YUV 4:2:0 made by torch: what FFmpeg's scaler makes of the same pixels, within one level."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch

from wan_vae.io.video_write import to_uint8
from wan_vae.io.yuv import to_yuv420

SIZES = ((16, 16), (64, 96), (50, 82), (8, 8), (8, 24), (33, 47), (90, 8))


def pictures(height: int, width: int) -> dict[str, torch.Tensor]:
    """Frames [3, H, W]: noise, beyond the range, black, white, edges of colour, ramps."""
    noise = torch.rand((3, height, width), generator=torch.Generator().manual_seed(0)) * 2 - 1
    stripes = torch.ones(3, height, width)
    stripes[0, ::2], stripes[1, :, ::2], stripes[2, : height // 2] = -1, -1, -1
    ramp = torch.linspace(-1, 1, width).expand(3, height, width).clone()
    ramp[1] = ramp[1].flip(1)
    return {
        "noise": noise,
        "overshoot": noise * 1.5,
        "black": torch.full((3, height, width), -1.0),
        "white": torch.full((3, height, width), 1.0),
        "stripes": stripes,
        "ramp": ramp,
    }


def by_ffmpeg(frame: torch.Tensor) -> np.ndarray:
    """What was written before the conversion moved to the device: 8-bit RGB through swscale."""
    picture = to_uint8(frame[:, None])[0]
    pad = [(0, n % 2) for n in picture.shape[:2]]
    picture = np.pad(picture, (*pad, (0, 0)), "edge")
    made = av.VideoFrame.from_ndarray(picture, format="rgb24")
    return made.reformat(format="yuv420p", dst_colorspace="ITU709").to_ndarray(format="yuv420p")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", pictures(2, 2))
def test_it_is_what_ffmpeg_makes_within_one_level(name, size):
    frame = pictures(*size)[name]
    got, expected = to_yuv420(frame).numpy().astype(int), by_ffmpeg(frame).astype(int)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1
    assert abs((got - expected).mean()) < 0.15


def test_the_ends_of_the_range():
    """Limited range: black 16, white 235, grey chroma 128; full red and blue reach 240."""
    planes = {name: to_yuv420(x) for name, x in pictures(4, 4).items()}
    assert planes["black"][:4].eq(16).all() and planes["white"][:4].eq(235).all()
    assert planes["black"][4:].eq(128).all() and planes["white"][4:].eq(128).all()
    red = torch.full((3, 4, 4), -1.0)
    red[0] = 1
    assert to_yuv420(red)[4:].flatten().tolist() == [102] * 4 + [240] * 4
    assert to_yuv420(red.flip(0))[4:].flatten().tolist() == [240] * 4 + [118] * 4


def test_ten_bits_are_finer_than_eight():
    frame = pictures(16, 480)["ramp"]
    eight, ten = to_yuv420(frame).int(), to_yuv420(frame, 10)
    assert ten.dtype == torch.int16
    assert (ten.int() - 4 * eight).abs().max() <= 2
    assert len(ten[:16].unique()) > 1.5 * len(eight[:16].unique())
    assert to_yuv420(pictures(4, 4)["white"], 10)[:4].eq(940).all()


def test_strides_and_dtype_do_not_matter():
    frame = pictures(34, 46)["noise"]
    plain = to_yuv420(frame)
    last = frame.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(to_yuv420(last), plain)
    assert torch.equal(to_yuv420(frame.double()), plain)
    assert not frame.eq(plain.new_zeros(())).all(), "the frame itself stays as it is"


@pytest.mark.gpu
def test_the_card_makes_what_the_cpu_makes():
    for frame in pictures(90, 158).values():
        on_card = to_yuv420(frame.cuda()).cpu().int()
        assert (on_card - to_yuv420(frame).int()).abs().max() <= 1
