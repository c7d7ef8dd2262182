"""ImageSink against TensorSink: the same decode, as frames with channels last in [0, 1]."""

import pytest
import torch

from wan_vae.config import wan21
from wan_vae.io.image import EndFrames, ImageSink, frames_to_pixels


def expected(pixels):
    return ((pixels + 1) / 2).movedim(1, -1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pieces_land_in_their_place(device):
    sink = ImageSink.allocate((2, 16, 3, 2, 3), wan21(16), torch.device("cpu"))
    assert sink.image.shape == (2, 9, 16, 24, 3)
    sink.image.fill_(float("nan"))
    pixels = torch.rand(2, 3, 9, 16, 24) * 2 - 1
    for start, stop in ((0, 1), (1, 5), (5, 9)):
        for top, bottom in ((0, 8), (8, 16)):
            sink.write(pixels[:, :, start:stop, top:bottom].to(device), start, top)
    sink.close()
    assert torch.equal(sink.image, expected(pixels))


@pytest.mark.parametrize("parts", [(1, 4, 4), (9,), (2, 7)])
def test_the_ends_of_a_clip_are_kept(parts):
    pixels, at = torch.rand(2, 3, 9, 4, 6) * 2 - 1, 0
    sink = EndFrames(9, torch.device("cpu"), torch.float16)
    for frames in parts:
        part = pixels[:, :, at : at + frames].clone()
        sink.write(part, at, 0)
        assert torch.equal(part, pixels[:, :, at : at + frames]), "other sinks get it too"
        part.fill_(float("nan"))  # its memory may be used again
        at += frames
    image = expected(pixels)
    assert torch.equal(sink.first, image[:, 0].half())
    assert torch.equal(sink.last, image[:, 8].half())
    one = EndFrames(1, torch.device("cpu"))
    one.write(pixels[:, :, :1], 0, 0)
    assert one.first is one.last


@pytest.mark.gpu
def test_many_large_chunks_do_not_overtake_each_other():
    sink = ImageSink(torch.full((1, 64, 256, 256, 3), float("nan")))
    for frame in range(0, 64, 4):
        # The device memory of each chunk is free for the next as soon as write returns.
        sink.write(torch.full((1, 3, 4, 256, 256), frame / 64, device="cuda"), frame, 0)
    sink.close()
    for frame in range(64):
        assert (sink.image[0, frame] == (frame // 4 * 4 / 64 + 1) / 2).all()


def test_half_precision_output_is_rounded_once():
    sink = ImageSink(torch.empty(1, 1, 2, 2, 3, dtype=torch.float16))
    pixels = torch.rand(1, 3, 1, 2, 2) * 2 - 1
    sink.write(pixels, 0, 0)
    sink.close()
    assert torch.equal(sink.image, expected(pixels).half())


def test_frames_and_pixels_are_inverse():
    image = torch.rand(5, 4, 6, 4)
    pixels = frames_to_pixels(image)
    assert pixels.shape == (1, 3, 5, 4, 6)
    assert torch.allclose(expected(pixels)[0], image[..., :3], atol=1e-6)
