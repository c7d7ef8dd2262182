"""Videos: the encoder beside the decode, what is in the file, how either side ends the other."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from tests.conftest import PATIENCE_S, random_state
from wan_vae import DecodeCancelled, OutputError, WanVAE
from wan_vae.config import wan21
from wan_vae.io import video_sink
from wan_vae.io.video_encode import Sound, VideoEncoder, VideoSettings
from wan_vae.io.video_read import open_clip
from wan_vae.io.video_sink import VideoFileSink, VideoStreamSink
from wan_vae.io.video_write import TeeSink, to_uint8
from wan_vae.io.yuv import to_yuv420

# Older SVT-AV1 takes no side below 64.
HEIGHT, WIDTH = 64, 80


def clip(frames: int = 9) -> torch.Tensor:
    """Pixels [1, 3, t, H, W]: smooth colours that move, as x264 keeps them well."""
    y, x = torch.meshgrid(torch.linspace(0, 1, HEIGHT), torch.linspace(0, 1, WIDTH), indexing="ij")
    waves = [
        torch.stack([(x + k + 0.1 * t).sin(), (y - 0.1 * t).cos(), (x + y + k).sin()])
        for k, t in enumerate(range(frames))
    ]
    return torch.stack(waves, dim=1)[None] * 0.9


def written(path: Path, pixels: torch.Tensor, parts=(1, 4, 4), **options) -> VideoFileSink:
    sink = VideoFileSink(path, HEIGHT, WIDTH, 16, **options)
    at = 0
    for frames in parts:
        sink.write(pixels[:, :, at : at + frames], at, 0)
        at += frames
    sink.close()
    return sink


def levels(path: Path) -> np.ndarray:
    """The frames [t, H, W, 3] of a video in levels, by its own matrix."""
    video = open_clip(path)
    x = video.read(0, video.frames)[0].float() * (255 / video.white)
    return x.permute(1, 2, 3, 0).numpy()


def planes_of(path: Path | io.BytesIO) -> np.ndarray:
    """The planes of a video's frames, as they are stored."""
    return np.stack([f.to_ndarray() for f in frames(path)]).astype(int)


def frames(path: Path | io.BytesIO) -> list[av.VideoFrame]:
    with av.open(path if isinstance(path, io.BytesIO) else str(path)) as file:
        return list(file.decode(video=0))


def no_threads_are_left() -> bool:
    return not [t for t in threading.enumerate() if t.name == "wan_vae_encode"]


# -- what is in the file ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "codec", "pixel_format"),
    [
        ("o.mp4", VideoSettings(), "h264", "yuv420p"),
        ("o.mov", VideoSettings(crf=None), "h264", "yuv420p"),
        ("o.mkv", VideoSettings(bit_depth=10), "h264", "yuv420p10le"),
        ("o.webm", VideoSettings(crf=20), "av1", "yuv420p"),
        ("o.mp4", VideoSettings("av1", 20, 10), "av1", "yuv420p10le"),
    ],
)
def test_colours_frames_and_tags(name, settings, codec, pixel_format, tmp_path):
    pixels = clip()
    sink = written(tmp_path / name, pixels, settings=settings)
    got, expected = levels(tmp_path / name), to_uint8(pixels[0]).astype(int)
    assert got.shape == expected.shape
    assert np.abs(got - expected).mean() < 2
    with av.open(str(tmp_path / name)) as file:
        stream = file.streams.video[0]
        assert stream.codec.canonical_name == codec
        assert stream.average_rate == 16
        assert float(file.duration / av.time_base) == pytest.approx(9 / 16, abs=0.01)
        context = stream.codec_context
        assert context.pix_fmt == pixel_format
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert [int(tag) for tag in tags] == [1, 1, 1, 1]
    assert sink.video.encoder == {"h264": "libx264", "av1": "libsvtav1"}[codec]
    assert sink.video.frames == 9
    assert not sink.warnings


def test_the_index_is_in_front_and_tags_are_read_back(tmp_path):
    tags = {"prompt": '{"1": "ä"}', "workflow": "x" * 100_000}
    written(tmp_path / "o.mp4", clip(), settings=VideoSettings(metadata=tags))
    data = (tmp_path / "o.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(tmp_path / "o.mp4")) as file:
        assert {key: file.metadata[key] for key in tags} == tags


def test_a_tag_that_utf_8_cannot_hold_does_not_cost_the_video(tmp_path):
    """Half a surrogate pair, as a program that cuts texts sends it in a workflow."""
    tags = {"a\ud800": "b\udc00c", "prompt": "{}"}
    written(tmp_path / "o.mp4", clip(), settings=VideoSettings(metadata=tags))
    with av.open(str(tmp_path / "o.mp4")) as file:
        assert (file.metadata["a?"], file.metadata["prompt"]) == ("b?c", "{}")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's list of open files")
def test_an_encoder_that_cannot_begin_closes_its_file(tmp_path):
    class Broken(Mapping):
        def __getitem__(self, key):
            raise KeyError(key)

        def __iter__(self):
            raise ZeroDivisionError("whatever")

        def __len__(self):
            return 1

    with pytest.raises(ZeroDivisionError) as caught:
        VideoFileSink(tmp_path / "o.mp4", HEIGHT, WIDTH, 16, VideoSettings(metadata=Broken()))
    assert caught.traceback  # its frames are alive, and with them what they hold
    # Of the listing itself, which is closed again, there is a number and no name.
    numbers = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    opened = [os.readlink(number) for number in numbers if os.path.lexists(number)]
    assert not [name for name in opened if str(tmp_path) in name]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["o.mp4", "o.webm"])
@pytest.mark.parametrize(("channels", "rate"), [(1, 16000), (2, 44100), (2, 12345)])
def test_sound_lies_beside_the_pictures_and_ends_with_them(name, channels, rate, tmp_path):
    time = torch.arange(3 * rate) / rate
    samples = (time * 2 * np.pi * 440).sin().expand(channels, -1) * 0.5
    pixels = clip(32)
    written(
        tmp_path / name,
        pixels,
        parts=(32,),
        settings=VideoSettings(sound=Sound(samples, rate)),
    )
    with av.open(str(tmp_path / name)) as file:
        sound = file.streams.audio[0]
        heard = [f.to_ndarray() for f in file.decode(sound)]
        assert heard[0].shape[0] == channels or sound.codec_context.channels == channels
        seconds = sum(f.shape[1] for f in heard) / sound.codec_context.sample_rate
        assert seconds == pytest.approx(2, abs=0.1)
        middle = np.concatenate(heard, axis=1)[0]
        middle = middle[len(middle) // 4 : len(middle) // 2]
        tone = np.abs(np.fft.rfft(middle)).argmax() * sound.codec_context.sample_rate / len(middle)
        assert tone == pytest.approx(440, abs=10)
    with av.open(str(tmp_path / name)) as file:
        kinds = [p.stream.type for p in file.demux() if p.dts is not None]
    assert "audio" in kinds[: len(kinds) // 2], "the sound is not written after all pictures"


def test_x264_begins_early_in_a_usual_clip(tmp_path, monkeypatch):
    """What it looks ahead is what the decode must make before x264 has work for its threads."""
    encoder = VideoEncoder(tmp_path / "clip.mp4", "mp4", (HEIGHT, WIDTH), 16, VideoSettings())
    encoder._stream.codec_context.thread_count = 1
    file, packets = encoder._file, []
    monkeypatch.setattr(encoder, "_file", SimpleNamespace(mux=packets.append, close=file.close))
    given, planes = 0, to_yuv420(clip(1)[0, :, 0]).numpy()
    while not packets:
        encoder.put(planes)
        given += 1
    assert 20 < given < 30, "of 81"
    encoder.finish()
    assert len(packets) == given


def test_an_open_file_gets_the_same_video(tmp_path):
    pixels, target = clip(), io.BytesIO()
    sink = VideoStreamSink(target, "mp4", HEIGHT, WIDTH, 16, VideoSettings())
    sink.write(pixels, 0, 0)
    sink.close()
    written(tmp_path / "o.mp4", pixels)
    target.seek(0)
    assert np.array_equal(planes_of(target), planes_of(tmp_path / "o.mp4"))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("o.webm", VideoSettings("h264"), "webm cannot hold H.264"),
        ("o.mp4", VideoSettings("vp9"), "codec is 'vp9': expected"),
        ("o.mp4", VideoSettings(crf=52), "crf is 52: expected 0 to 51 for h264"),
        ("o.mp4", VideoSettings(bit_depth=12), "bit_depth is 12: expected 8 or 10"),
        ("o.avi", VideoSettings(), "avi is no container"),
        ("o.mp4", VideoSettings(sound=Sound(torch.zeros(3, 9), 8000)), "1, 2 or 6 channels"),
        ("o.mp4", VideoSettings([]), r"codec is \[\]: expected"),
        ("o.mp4", VideoSettings(crf="fine"), "crf is 'fine': expected 0 to 51"),
        ("o.mp4", VideoSettings(crf=float("nan")), "crf is nan: expected 0 to 51"),
        ("o.mp4", VideoSettings(sound=Sound(torch.zeros(2, 9), 0)), "has 0 samples a second"),
        ("o.mp4", VideoSettings(sound=Sound(torch.zeros(2, 9), 2**40)), "expected 1 to 10000000"),
        ("o.webm", VideoSettings(sound=Sound(torch.zeros(2, 9) / 0, 8000)), "18 of the sound's 18"),
        ("o.mkv", VideoSettings(sound=Sound(torch.ones(1, 9) / 0, 8000)), "are NaN or inf"),
        (
            "o.mp4",
            VideoSettings(sound=Sound(torch.ones(2, 9, dtype=torch.int16), 8000)),
            "samples are torch.int16: expected floating numbers",
        ),
        ("o.mp4", VideoSettings(sound=Sound(torch.ones(2, 9).to("meta"), 8000)), "are meta"),
    ],
)
def test_what_cannot_be_encoded_is_refused_in_words(name, settings, words, tmp_path):
    with pytest.raises(OutputError, match=words):
        VideoFileSink(tmp_path / name, HEIGHT, WIDTH, 16, settings)
    assert not list(tmp_path.iterdir()) and no_threads_are_left()


@pytest.mark.parametrize(
    ("missing", "ran", "words"),
    [
        (("libx264", "libopenh264", "h264"), "mpeg4", "MPEG-4 part 2, which browsers do not play"),
        (("libx264", "libopenh264"), "libx264", "has no libx264: h264 encoded"),
    ],
)
def test_another_encoder_is_named(missing, ran, words, tmp_path, monkeypatch):
    """As if PyAV lacked `missing`. FFmpeg takes any encoder of H.264 for the name h264."""
    real = av.Codec

    def codec(name, mode):
        if name in missing:
            raise ValueError(name)
        return real(name, mode)

    monkeypatch.setattr(av, "Codec", codec)
    sink = written(tmp_path / "o.mp4", clip())
    assert any(words in text for text in sink.warnings)
    assert sink.video.encoder == ran
    assert len(levels(tmp_path / "o.mp4")) == 9
    with pytest.raises(OutputError, match="cannot encode 10 bits"):
        VideoFileSink(tmp_path / "p.mp4", HEIGHT, WIDTH, 16, VideoSettings(bit_depth=10))


# -- names -----------------------------------------------------------------------------------------


def test_many_writers_of_one_name_lose_no_video(tmp_path):
    """All of them take the names from the first one on, as two servers do that both counted."""

    def names():
        return (tmp_path / f"clip_{n:05}_.mp4" for n in count(1))

    sinks = [VideoFileSink(next(names()), HEIGHT, WIDTH, 16, names=names()) for _ in range(4)]
    for i, sink in enumerate(sinks):
        sink.write(torch.full((1, 3, 1, HEIGHT, WIDTH), i / 4), 0, 0)
    closing = [threading.Thread(target=sink.close) for sink in sinks]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(PATIENCE_S)
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == [f"clip_{n:05}_.mp4" for n in range(1, 5)]
    assert sorted(sink.path for sink in sinks) == files
    for i, sink in enumerate(sinks):
        assert levels(sink.path).mean() == pytest.approx((i / 4 + 1) * 127.5, abs=2)


def test_a_name_is_taken_before_the_video_gets_it(tmp_path, monkeypatch):
    """Another writer publishes just before the first one's rename: both videos are there."""
    names = [tmp_path / f"clip_{n}.mp4" for n in range(3)]
    first, other = (VideoFileSink(names[0], HEIGHT, WIDTH, 16, names=iter(names)) for _ in range(2))
    for sink, grey in ((first, -0.5), (other, 0.5)):
        sink.write(torch.full((1, 3, 1, HEIGHT, WIDTH), grey), 0, 0)
    rename, waiting = Path.replace, [other]

    def replace(path, target):
        while waiting:
            waiting.pop().close()
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    first.close()
    assert [first.path, other.path] == names[:2]
    assert levels(first.path).mean() < 100 < levels(other.path).mean()


def test_a_video_whose_rename_fails_keeps_no_name(tmp_path):
    sink = VideoFileSink(tmp_path / "o.mp4", HEIGHT, WIDTH, 16, names=[tmp_path / "o.mp4"])
    sink.write(clip(1), 0, 0)
    sink.finish()
    (partial,) = tmp_path.iterdir()
    partial.unlink()
    with pytest.raises(OutputError, match="cannot be written"):
        sink.close()
    assert not list(tmp_path.iterdir())


# -- the two threads -------------------------------------------------------------------------------


class SlowEncoder:
    """An encoder that takes a frame when it is told to, or fails."""

    bit_depth, encoder, fps = 8, "slow", 16.0

    def __init__(self):
        self.go, self.taken = threading.Semaphore(0), 0
        self.began, self.failure = threading.Event(), None
        self.finished = False

    def put(self, planes):
        self.began.set()
        assert self.go.acquire(timeout=PATIENCE_S)
        if self.failure is not None:
            raise self.failure
        self.taken += 1

    def finish(self):
        self.finished = True


def planes() -> torch.Tensor:
    return torch.zeros(HEIGHT * 3 // 2, WIDTH, dtype=torch.uint8)


def filled(encoder: SlowEncoder, should_stop=None) -> video_sink.EncodingThread:
    """A thread with as many frames as may be in flight."""
    thread = video_sink.EncodingThread(encoder, HEIGHT, WIDTH, should_stop)
    for _ in range(thread.flight_bytes // planes().numel()):
        thread.put(planes())
    return thread


def test_frames_in_flight_are_bounded():
    assert video_sink.frames_in_flight(1) == 32
    assert video_sink.frames_in_flight(12 << 20) == 10  # 4K
    assert video_sink.frames_in_flight(1 << 40) == 2


def test_a_cancel_while_the_encoder_is_behind_ends_both():
    """`should_stop` is asked although no frame can be sent, and no further one is encoded."""
    encoder, asked = SlowEncoder(), []

    def should_stop():
        asked.append(True)
        return len(asked) > 2

    thread = filled(encoder, should_stop)
    with pytest.raises(DecodeCancelled, match="waited for the video's encoder"):
        thread.put(planes())
    encoder.go.release(99)
    thread.stop()
    assert encoder.taken <= 1 and not encoder.finished
    assert no_threads_are_left()


def test_a_cancel_at_the_end_ends_the_wait_too():
    encoder = SlowEncoder()
    thread = filled(encoder, lambda: True)
    with pytest.raises(DecodeCancelled):
        thread.finish()
    encoder.go.release(99)
    thread.stop()
    assert not encoder.finished and no_threads_are_left()


@pytest.mark.parametrize("failure", [OutputError("disk full"), RuntimeError("card lost")])
def test_a_failure_of_the_encoder_reaches_the_decode(failure):
    encoder = SlowEncoder()
    encoder.failure = failure
    thread = filled(encoder)
    encoder.go.release()
    with pytest.raises(type(failure), match=str(failure)):
        thread.put(planes())
    with pytest.raises(type(failure), match=str(failure)):
        thread.put(planes())
    with pytest.raises(type(failure), match=str(failure)):
        thread.finish()
    thread.stop()
    assert no_threads_are_left()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_of_anything_does_not_hang_the_decode():
    encoder = SlowEncoder()
    encoder.failure = KeyError("unexpected")
    thread = filled(encoder)
    encoder.go.release()
    with pytest.raises(RuntimeError, match="has ended"):
        thread.put(planes())
    thread.stop()


def test_it_says_who_was_waited_for():
    slow = SlowEncoder()
    thread = filled(slow, lambda: slow.go.release(1) or False)
    thread.put(planes())
    slow.go.release(99)
    thread.finish()
    assert thread.record.waited_for == "encoder"
    assert thread.record.frames == slow.taken == 33
    fast = SlowEncoder()
    fast.go.release(99)
    thread = video_sink.EncodingThread(fast, HEIGHT, WIDTH, None)
    threading.Event().wait(0.3)  # the decode takes its time
    thread.put(planes())
    thread.finish()
    assert thread.record.waited_for == "decoder"
    assert thread.record.waited_for_decoder_ms > 200


# -- with a decode ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae():
    return WanVAE.from_state_dict(random_state(wan21(dim=8)), device="cpu")


def latent() -> torch.Tensor:
    return torch.randn(
        (1, 16, 3, HEIGHT // 8, WIDTH // 8), generator=torch.Generator().manual_seed(3)
    )


def test_a_decode_reports_its_video(vae, tmp_path):
    sink = TeeSink(VideoFileSink(tmp_path / "o.mp4", HEIGHT, WIDTH, 16))
    vae.decode(latent(), sink=sink)
    video = vae.last_report.video
    assert (video.encoder, video.frames) == ("libx264", 9)
    assert video.flight_bytes == 32 * HEIGHT * WIDTH * 3 // 2
    assert type(vae.last_report).from_dict(vae.last_report.as_dict()) == vae.last_report
    vae.decode(latent())
    assert vae.last_report.video is None


@pytest.mark.parametrize("frame", [0, 3])
def test_an_encoder_that_fails_ends_the_decode_and_leaves_nothing(
    frame, vae, tmp_path, monkeypatch
):
    real, calls = VideoEncoder.put, []

    def put(self, planes):
        calls.append(True)
        if len(calls) == frame + 1:
            raise OutputError("no space left on device")
        real(self, planes)

    monkeypatch.setattr(VideoEncoder, "put", put)
    sink = VideoFileSink(tmp_path / "o.mp4", HEIGHT, WIDTH, 16)
    with pytest.raises(OutputError, match="no space left"):
        vae.decode(latent(), sink=sink, chunk_frames=1)
    assert not list(tmp_path.iterdir()) and no_threads_are_left()
    assert vae.last_report.status == "failed"


def test_a_cancelled_decode_leaves_nothing(vae, tmp_path):
    asked = iter([False, False])
    sink = VideoFileSink(tmp_path / "new" / "o.mp4", HEIGHT, WIDTH, 16)
    with pytest.raises(DecodeCancelled):
        vae.decode(latent(), sink=sink, chunk_frames=1, should_stop=lambda: next(asked, True))
    assert not list(tmp_path.iterdir()) and no_threads_are_left()


@pytest.mark.gpu
def test_a_card_writes_the_video_of_the_cpu(tmp_path):
    """Frames come through pinned memory, each complete before it is encoded."""
    pixels = clip(81)
    written(tmp_path / "cpu.mp4", pixels, parts=(81,))
    written(tmp_path / "card.mp4", pixels.cuda(), parts=(81,))
    assert np.abs(planes_of(tmp_path / "card.mp4") - planes_of(tmp_path / "cpu.mp4")).mean() < 0.1
