"""ImageSink against TensorSink: the same decode, as frames with channels last in [0, 1]."""

import threading

import pytest
import torch

from tests.conftest import PATIENCE_S
from wan_vae.config import wan21
from wan_vae.errors import DecodeMemoryError, ShardingError
from wan_vae.io.image import (
    EndFrames,
    HostWriter,
    ImageSink,
    copy_threads,
    frames_of_parts,
    frames_to_pixels,
)


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


class Arrived:
    """A copy to the host that is done; for one thread only once `other` is set."""

    def __init__(self, held: str = "", other: threading.Event | None = None):
        self.held, self.other = held, other

    def synchronize(self):
        if self.other is not None and threading.current_thread().name == self.held:
            assert self.other.wait(PATIENCE_S)


def write_blocks(writer, image, blocks, frames, arrivals):
    """Queue `blocks` [1, frames, rows, W, 3] one after another, in parts of one frame."""
    for number, block in enumerate(blocks):
        first = number * frames
        target = image[:, first : first + frames]
        ahead = image[:, first + frames : first + 2 * frames]
        parts = [
            (arrivals[number], block[:, i : i + 1], target[:, i : i + 1], ahead[:, i : i + 1])
            for i in range(frames)
        ]
        writer.put(block, parts)


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_threads_fill_and_touch_without_overtaking(threads):
    """One thread is held back in the first block until the others are done with the last one."""
    blocks = [torch.rand(1, 2, 5, 4, 3) for _ in range(3)]
    image, freed, last = torch.full((1, 6, 5, 4, 3), float("nan")), [], threading.Event()

    class Last(Arrived):
        def synchronize(self):
            last.set()

    first = Arrived("wan_vae_copy_0", last if threads > 1 else None)
    writer = HostWriter(threads, freed.append, is_new=True)
    write_blocks(writer, image, blocks, 2, [first, Arrived(), Last()])
    writer.finish()
    assert torch.equal(image, torch.cat(blocks, dim=1))
    assert sorted(map(id, freed)) == sorted(map(id, blocks)), "each buffer is free, once"


def test_room_is_reserved_before_it_is_written_and_its_error_is_raised():
    reserved = []

    def reserve(part):
        reserved.append((part.shape[2], bool(part.isnan().all())))
        if len(reserved) > 4:
            raise ShardingError("no room")

    image = torch.full((1, 4, 4, 2, 3), float("nan"))
    blocks, freed = [torch.rand(1, 2, 4, 2, 3) for _ in range(2)], []
    writer = HostWriter(2, freed.append, reserve)
    write_blocks(writer, image, blocks, 2, [Arrived()] * 2)
    with pytest.raises(ShardingError, match="no room"):
        writer.finish()
    assert len(freed) == 2, "a failure keeps no buffer"
    assert all(empty for _, empty in reserved) and {rows for rows, _ in reserved} == {2}


def test_large_blocks_go_in_parts_and_small_machines_copy_with_one_thread():
    large = torch.empty(1, 16, 720, 640, 3, device="meta")  # 88 MB
    parts = frames_of_parts(large)
    assert len(parts) == 6 and parts[0] == slice(0, 3) and parts[-1] == slice(15, 16)
    assert frames_of_parts(large.expand(2, -1, -1, -1, -1)) == [slice(0, 16)]
    assert frames_of_parts(torch.empty(1, 1, 4096, 4096, 3, device="meta")) == [slice(0, 1)]
    assert [copy_threads(n) for n in (None, 1, 8, 16, 192)] == [1, 1, 2, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_for_which_there_is_no_room_are_an_error_in_words(dtype):
    """A petabyte, which is more than any computer can address."""
    with pytest.raises(DecodeMemoryError, match=r"take [\d.]+ GiB, and that much memory is not"):
        ImageSink.allocate((1, 16, 1000, 20000, 20000), wan21(), torch.device("cpu"), dtype)
