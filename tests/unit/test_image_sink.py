"""ImageSink against TensorSink: the same decode, as frames with channels last in [0, 1]."""

import mmap
import os
import sys
import tempfile
import threading
import weakref
from functools import partial

import numpy as np
import pytest
import torch

from tests.conftest import PATIENCE_S
from wan_vae.config import wan21
from wan_vae.errors import DecodeMemoryError, ShardingError
from wan_vae.io import image as image_module
from wan_vae.io import pages
from wan_vae.io.image import (
    EndFrames,
    FollowingCopy,
    HostWriter,
    ImageSink,
    bits,
    copy_threads,
    frames_to_pixels,
)
from wan_vae.io.staging import PieceThreads


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


class Computed:
    """A block that is computed; for one thread only once `other` is set."""

    def __init__(self, held: str = "", other: threading.Event | None = None):
        self.held, self.other = held, other

    def synchronize(self):
        if self.other is not None and threading.current_thread().name == self.held:
            assert self.other.wait(PATIENCE_S)


def writer_of(threads, **options):
    """A writer whose blocks are on the host already."""
    return HostWriter(threads, lambda: lambda piece: piece, **options)


def write_blocks(writer, image, blocks, ready):
    """Queue `blocks` [1, t, rows, W, 3] one after another."""
    at = 0
    for block, event in zip(blocks, ready, strict=True):
        stop = at + block.shape[1]
        writer.put(event, block, image[:, at:stop], image[:, stop:][:, : block.shape[1]])
        at = stop


def in_pieces_of(monkeypatch, size):
    monkeypatch.setattr(image_module, "_PIECE_BYTES", size)


@pytest.mark.parametrize("can_map", [True, False])
@pytest.mark.parametrize("size", [1, 60, 240, 10**6])
@pytest.mark.parametrize("threads", [1, 3, 7])
def test_threads_fill_and_prepare_without_overtaking(threads, size, can_map, monkeypatch):
    """One thread is held back in the first block until another one has the last but one."""
    in_pieces_of(monkeypatch, size)
    if not can_map:
        monkeypatch.setattr(pages, "_madvise", None)
    blocks = [torch.rand(1, t, 5, 4, 3) for t in (1, 3, 3, 2)]
    image, late = torch.full((1, 9, 5, 4, 3), float("nan")), threading.Event()

    class Late(Computed):
        def synchronize(self):
            late.set()

    is_many = threads > 1 and size < 240
    first = Computed("wan_vae_copy_0", late if is_many else None)
    writer = writer_of(threads, is_new=True)
    write_blocks(writer, image, blocks[:2], [first, Late()])
    write_blocks(writer, image[:, 4:], blocks[2:], [Computed()] * 2)
    writer.finish()
    assert torch.equal(image, torch.cat(blocks, dim=1))


def test_no_more_than_two_blocks_are_under_way():
    go, queued = threading.Event(), []
    image, blocks = torch.empty(1, 3, 4, 2, 3), [torch.rand(1, 1, 4, 2, 3) for _ in range(3)]
    writer = writer_of(2)

    def write():
        for frame, block in enumerate(blocks):
            target = image[:, frame : frame + 1]
            writer.put(Computed("wan_vae_copy_0", go), block, target, target[:, :0])
            queued.append(frame)

    thread = threading.Thread(target=write)
    thread.start()
    while len(queued) < 2:
        thread.join(0.01)
    assert thread.is_alive() and queued == [0, 1]
    go.set()
    thread.join(PATIENCE_S)
    writer.finish()
    assert queued == [0, 1, 2] and torch.equal(image, torch.cat(blocks, dim=1))


def test_a_thread_lets_go_of_what_is_copied():
    """Device memory, which the next chunk may need."""
    image, block = torch.empty(1, 1, 4, 2, 3), torch.rand(1, 1, 4, 2, 3)
    alive = weakref.ref(block)
    writer = writer_of(1)
    writer.put(Computed(), block, image, image[:, :0])
    del block
    writer.put(Computed(), image.clone(), image, image[:, :0])
    writer.put(Computed(), image.clone(), image, image[:, :0])  # waits for the first
    assert alive() is None
    writer.finish()


def test_a_block_without_rows_takes_no_place():
    """As an idle rank gives them."""
    image, done = torch.zeros(1, 4, 0, 2, 3), []
    writer = writer_of(1)
    for frame in range(4):
        part = image[:, frame : frame + 1]
        writer.put(Computed(), part, part, part[:, :0], [(1, partial(done.append, frame))])
    writer.finish()
    assert done == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [1, 100, 700, 10**6])  # a row, a frame, several, all
def test_frames_of_a_block_are_there_when_it_is_told(size, monkeypatch):
    """Also where a piece holds the end of one part and the begin of the next."""
    in_pieces_of(monkeypatch, size)
    block, image, told = torch.rand(2, 10, 4, 2, 3), torch.full((2, 10, 4, 2, 3), float("nan")), []
    writer = writer_of(3)

    def tell(start, stop):
        part = slice(start, stop)
        told.append((stop, torch.equal(image[:, part], block[:, part])))

    parts = [(4, partial(tell, 0, 4)), (8, partial(tell, 4, 8)), (10, partial(tell, 8, 10))]
    writer.put(Computed(), block, image, image[:, :0], parts)
    writer.finish()
    assert sorted(told) == [(4, True), (8, True), (10, True)]


def test_a_sink_tells_of_the_first_frames_of_a_long_block():
    told, pixels = [], torch.rand(1, 3, 14, 4, 6) * 2 - 1
    sink = ImageSink(torch.empty(1, 15, 4, 6, 3), on_written=told.append)
    sink.write(pixels[:, :, :1], 0, 0)
    sink.write(pixels, 1, 0)
    assert told == [1, 5, 9, 13, 15]


def test_what_has_arrived_is_told_in_the_order_of_the_frames():
    told = []
    arrivals = image_module._Arrivals(told.append)
    first, second, third, fourth = (arrivals.expect(stop) for stop in (1, 5, 9, 13))
    second()
    assert told == []
    first()
    assert told == [5]
    fourth()
    third()
    assert told == [5, 13]


def test_a_sink_tells_what_has_arrived_unless_it_comes_in_strips():
    told, pixels = [], torch.rand(1, 3, 5, 4, 6) * 2 - 1
    sink = ImageSink(torch.empty(1, 5, 4, 6, 3), on_written=told.append)
    sink.write(pixels[:, :, :1], 0, 0)
    sink.write(pixels[:, :, 1:], 1, 0)
    assert told == [1, 5]
    for top in (0, 2):
        sink.write(pixels[:, :, :, top : top + 2], 0, top)
    sink.close()
    assert told == [1, 5] and torch.equal(sink.image, expected(pixels))


@pytest.mark.parametrize("steps", [(1, 5, 9), (9,), (), (3, 3, 2, 7)])
def test_a_copy_follows_frames_that_others_write(steps, monkeypatch):
    in_pieces_of(monkeypatch, 300)
    frames, source = torch.full((1, 9, 4, 6, 3), float("nan")), torch.rand(1, 9, 4, 6, 3)
    with FollowingCopy(frames) as copy:
        at = 0
        for step in steps:
            frames[:, at:step] = source[:, at:step]
            at = max(at, step)
            copy.follow(step)
        frames[:, at:] = source[:, at:]
        image = copy.finish()
    assert torch.equal(image, source) and image.data_ptr() != frames.data_ptr()


def test_memory_ahead_is_not_cleared_when_a_later_block_has_filled_it(monkeypatch):
    """Where pages cannot be mapped they are written: by a thread that is late with a long block,
    while a short one and the block behind it have come."""
    monkeypatch.setattr(pages, "_madvise", None)
    in_pieces_of(monkeypatch, 4 * 4 * 2 * 3 * 4)  # four frames
    source, late = torch.rand(1, 20, 4, 2, 3) + 1, threading.Event()
    image, queued = torch.zeros(1, 20, 4, 2, 3), []
    writer = writer_of(2, is_new=True)

    def write():
        at = 0
        for frames in (8, 4, 8):
            stop = at + frames
            ready = Computed("wan_vae_copy_1", late if not at else None)
            writer.put(ready, source[:, at:stop], image[:, at:stop], image[:, stop : stop + frames])
            queued.append(stop)
            at = stop

    thread = threading.Thread(target=write)
    thread.start()
    while len(queued) < 2:
        thread.join(0.01)
    late.set()
    thread.join(PATIENCE_S)
    writer.finish()
    assert queued == [8, 12, 20] and torch.equal(image, source)


@pytest.mark.parametrize("mistake", [ValueError, OSError, MemoryError])
def test_no_error_of_a_thread_leaves_the_caller_waiting(mistake):
    """Neither of a piece, nor of what is called when a block is there."""
    image = torch.zeros(1, 1, 4, 2, 3)

    def fails(*_):
        raise mistake("planted")

    writer = HostWriter(1, lambda: fails)
    with pytest.raises(mistake, match="planted"):
        for _ in range(4):
            writer.put(Computed(), image, image, image[:, :0])
    writer.stop()
    writer = writer_of(1)
    with pytest.raises(mistake, match="planted"):
        for _ in range(4):
            writer.put(Computed(), image.clone(), image, image[:, :0], [(1, fails)])
    writer.stop()


def test_a_block_that_runs_out_of_memory_is_not_expected(monkeypatch):
    """The run comes back with its frames, in smaller blocks."""
    told, pixels = [], torch.rand(1, 3, 4, 4, 6)
    sink = ImageSink(torch.zeros(1, 4, 4, 6, 3), on_written=told.append)
    with monkeypatch.context() as patch:

        def add(*_):
            raise torch.OutOfMemoryError("planted")

        patch.setattr(torch.Tensor, "add", add)
        with pytest.raises(torch.OutOfMemoryError):
            sink.write(pixels, 0, 0)
    sink.write(pixels[:, :, :2], 0, 0)
    assert told == [2]
    sink.write(pixels[:, :, 2:], 2, 0)
    assert told == [2, 4]


def test_a_copy_that_is_left_early_ends_its_threads():
    with FollowingCopy(torch.zeros(1, 9, 4, 6, 3)) as copy:
        copy.follow(4)
    assert not any(thread.is_alive() for thread in copy._writer._threads)


def test_room_is_reserved_before_it_is_written_and_its_error_is_raised(monkeypatch):
    in_pieces_of(monkeypatch, 96)
    reserved = []

    def reserve(part):
        reserved.append(bool(part.isnan().all()))
        if len(reserved) > 4:
            raise ShardingError("no room")

    image = torch.full((1, 4, 4, 2, 3), float("nan"))
    blocks = [torch.rand(1, 2, 4, 2, 3) for _ in range(2)]
    writer = writer_of(1, reserve=reserve)
    with pytest.raises(ShardingError, match="no room"):
        write_blocks(writer, image, blocks, [Computed()] * 2)
        writer.finish()
    # Two pieces, and the memory ahead of each; what has no room is not written.
    assert reserved == [True] * 5 and image[:, 2:].isnan().all()
    with pytest.raises(ShardingError, match="no room"):
        writer.put(Computed(), blocks[0], image[:, :2], image[:, :0])


@pytest.mark.parametrize(
    "shape, size",
    [
        ((1, 16, 720, 640, 3), None),
        ((1, 1, 4096, 4096, 3), None),
        ((2, 3, 5, 4, 3), 100),
        ((2, 3, 5, 4, 3), 500),
        ((4, 3, 5, 7), 60),
        ((1, 0, 5, 4, 3), 60),
    ],
)
def test_pieces_are_dense_small_and_each_number_once(shape, size, monkeypatch):
    if size is not None:
        in_pieces_of(monkeypatch, size)
    block = torch.zeros(shape, dtype=torch.int32, device="meta" if size is None else "cpu")
    pieces = list(image_module.pieces_of(block))
    for _, place in pieces:
        assert block[place].is_contiguous()
        assert 0 < 4 * block[place].numel() <= (size or 4 << 20)
        if size is not None:
            block[place] += 1
    assert size is None or bool((block == 1).all())
    # A longer block is cut and numbered alike from its start on.
    for dim in (0, 1):
        longer = torch.cat((block, block), dim)
        more = list(image_module.pieces_of(longer))
        for number, place in pieces:
            last = place[dim].stop >= shape[dim] > 1
            assert last or (number, place) in more


@pytest.mark.skipif(sys.platform != "linux", reason="Linux maps pages ahead")
def test_pages_are_mapped_and_keep_what_is_there():
    with tempfile.TemporaryFile() as file:
        file.truncate(64 * mmap.PAGESIZE)
        with mmap.mmap(file.fileno(), 0) as memory:
            array = np.frombuffer(memory, np.uint8)
            part = torch.from_numpy(array).view(1, 4, 16, -1)[:, 1:3]
            part[0, 1, 2, 3] = 7
            before = os.fstat(file.fileno()).st_blocks
            if not pages.populate(part):
                pytest.skip("this kernel is older than Linux 5.14")
            assert os.fstat(file.fileno()).st_blocks - before >= 31 * mmap.PAGESIZE // 512
            assert part[0, 1, 2, 3] == 7 and part.sum() == 7
            # Beyond the end of the file a write would end the process.
            file.truncate(0)
            with pytest.raises(OSError, match="No space"):
                pages.populate(part)
            del array, part


def test_small_machines_copy_with_one_thread():
    assert [copy_threads(n) for n in (None, 1, 8, 16, 192)] == [1, 1, 2, 4, 4]
    # Where a caller waits for the last frames, more do.
    assert [copy_threads(n, 8) for n in (None, 1, 16, 32, 192)] == [1, 1, 4, 8, 8]


def test_the_copy_that_a_caller_waits_for_has_more_threads(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    in_pieces_of(monkeypatch, 1)
    source = torch.rand(1, 16, 4, 2, 3)
    with FollowingCopy(source) as copy:
        assert torch.equal(copy.finish(), source)
    assert len(copy._writer._threads) == 8


def test_all_threads_are_there_before_the_first_of_them_works(monkeypatch):
    """While pages are mapped, the system starts no thread of the same process."""
    in_pieces_of(monkeypatch, 1)
    done = []

    class Watched(HostWriter):
        def _start_thread(self):
            done.append("start")
            super()._start_thread()

        def _queue(self, number, piece):
            done.append("queue")
            super()._queue(number, piece)

    image = torch.zeros(1, 3, 4, 2, 3)
    for first in ("expect", "put"):
        done.clear()
        writer = Watched(5, lambda: lambda piece: piece, is_new=True)
        if first == "expect":
            writer.expect(image)
        else:
            writer.put(Computed(), image.clone(), image, image[:, :0])
        writer.finish()
        assert done == ["start"] * 5 + ["queue"] * 12


@pytest.mark.skipif(sys.platform != "linux", reason="Linux maps pages ahead")
@pytest.mark.parametrize("first", [3, 48])
def test_memory_for_a_copy_is_mapped_before_anything_is_written(first, monkeypatch):
    """Of a latent all of it, whose 48 channels stand where a video has its frames."""
    mapped = []
    monkeypatch.setattr(pages, "populate", lambda part: mapped.append(part.numel()) or True)
    written = torch.rand(1, 48, 3, 4, 5)
    with FollowingCopy(written, first) as copy:
        copy.prepare()
    assert sum(mapped) == first * 60


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [16, 200, 10**6])
def test_pieces_of_any_numbers_arrive_in_their_place(dtype, size, monkeypatch):
    """From columns of a picture, as a shard reads them, and from one value for all."""
    in_pieces_of(monkeypatch, size)
    moved = []

    def move(source, target):
        moved.append(target.shape)
        np.copyto(bits(target), bits(source))

    threads = PieceThreads(3, move)
    picture = torch.randint(0, 250, (1, 3, 5, 8, 3)).to(dtype)
    for source in (picture[:, :, :, 2:7], torch.tensor(7).to(dtype).expand(1, 3, 5, 5, 3)):
        target = torch.zeros(1, 3, 5, 5, 3, dtype=dtype)
        threads.copy(source, target)
        assert torch.equal(target, source)
    assert len(moved) == 2 * len(list(image_module.pieces_of(target)))
    threads.close()


def test_all_pieces_are_done_before_an_error_is_raised():
    done = []

    def move(source, target):
        done.append(int(source[0, 0, 0]))
        if done[-1] == 1:
            raise RuntimeError("planted")

    threads = PieceThreads(2, move)
    pieces = torch.arange(5).view(5, 1, 1)
    with pytest.raises(RuntimeError, match="planted"):
        threads.copy(pieces, pieces)
    assert sorted(done) == [0, 1, 2, 3, 4]
    threads.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_for_which_there_is_no_room_are_an_error_in_words(dtype):
    """A petabyte, which is more than any computer can address."""
    with pytest.raises(DecodeMemoryError, match=r"take [\d.]+ GiB, and that much memory is not"):
        ImageSink.allocate((1, 16, 1000, 20000, 20000), wan21(), torch.device("cpu"), dtype)


@pytest.mark.parametrize("is_refused", [False, True])
def test_locked_memory_is_that_of_the_piece_before_unless_it_is_too_small(is_refused, monkeypatch):
    """And other memory where the system allows no more of it; any other error is one."""
    empty, asked = torch.empty, []

    def allocate(size, dtype, pin_memory=False):
        if pin_memory:
            asked.append(size)
            if is_refused:
                raise RuntimeError("CUDA error: out of memory")
        return empty(size, dtype=dtype)

    memory = image_module.LockedMemory()
    monkeypatch.setattr(image_module.torch, "empty", allocate)
    large = memory.like(torch.zeros(1, 3, 4, dtype=torch.float64))
    small = memory.like(torch.zeros(2, 5, dtype=torch.bfloat16))
    assert (large.shape, large.dtype) == ((1, 3, 4), torch.float64) and large.is_contiguous()
    assert (small.shape, small.dtype) == ((2, 5), torch.bfloat16) and small.is_contiguous()
    assert small.data_ptr() == large.data_ptr() and asked == [96]

    def fails(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(image_module.torch, "empty", fails)
    with pytest.raises(RuntimeError, match="illegal"):
        memory.like(torch.zeros(100))
