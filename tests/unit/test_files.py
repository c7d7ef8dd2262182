"""Outputs appear complete or not at all and remove no other file; inputs are read as viewers show
them."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from wan_vae.errors import DecodeMemoryError, LatentError, OutputError
from wan_vae.io import video_read, video_write
from wan_vae.io.files import Partial, reserved
from wan_vae.io.latents import load_latent

SHAPE = (1, 3, 2, 16, 32)
SINKS = {
    "o.mp4": lambda path: video_write.open_sink(path, SHAPE, 16),
    "o.safetensors": lambda path: video_write.open_sink(path, SHAPE, 16),
    "frames": lambda path: video_write.open_sink(path, SHAPE, 16),
    "o.png": lambda path: video_write.open_sink(path, (1, 3, 1, 16, 32), 16),
    "sheet.png": lambda path: video_write.ContactSheetSink(path, 2),
}


def pixels(value: float) -> torch.Tensor:
    return torch.full(SHAPE, value)


def mean_of(path: Path) -> float:
    if path.suffix == ".safetensors":
        return float(load_file(path)["pixels"].mean())
    file = path / "frame_000000.png" if path.is_dir() else path
    return float(video_read.read_pixels(file).mean())


# -- outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SINKS)
def test_two_writers_of_one_output_do_not_mix(name, tmp_path):
    """The second one is aborted, or closes last: never a file of both."""
    first, second, third = (SINKS[name](tmp_path / name) for _ in range(3))
    for sink, value in ((first, -0.5), (second, 0.0), (third, 0.5)):
        sink.write(pixels(value), 0, 0)
    second.abort()
    first.close()
    assert mean_of(tmp_path / name) == pytest.approx(-0.5, abs=0.02)
    third.close()
    assert mean_of(tmp_path / name) == pytest.approx(0.5, abs=0.02)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", SINKS)
def test_an_abort_leaves_nothing_of_its_own_and_may_come_twice(name, tmp_path):
    sink = SINKS[name](tmp_path / "new" / "deep" / name)
    assert (tmp_path / "new" / "deep").is_dir()
    sink.write(pixels(0), 0, 0)
    sink.abort()
    sink.abort()
    assert not list(tmp_path.iterdir())
    kept = SINKS[name](tmp_path / name)
    kept.write(pixels(0), 0, 0)
    kept.close()
    kept.abort()
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "mine", ["frame_notes.txt", "frame_1.png", "frame_000001.png.bak", "frame_000001.jpg"]
)
def test_a_folder_with_somebodys_own_files_is_refused(mine, tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / mine).write_text("mine")
    with pytest.raises(OutputError, match="not a folder of frames"):
        video_write.FrameFolderSink(tmp_path / "f")
    assert (tmp_path / "f" / mine).read_text() == "mine"


def link(path: Path, target: Path) -> None:
    """Make a symbolic link, or skip the test: Windows lets few users make one, and Wine nobody."""
    try:
        path.symlink_to(target, target_is_directory=True)
    except OSError:
        if sys.platform != "win32":
            raise
    if not path.is_symlink():
        pytest.skip("no symbolic links can be made here")


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_frame_that_is_no_regular_file_is_refused(kind, tmp_path):
    place = tmp_path / "f" / "frame_000001.png"
    place.parent.mkdir()
    if kind == "folder":
        place.mkdir()
    else:
        link(place, tmp_path / "f")
    with pytest.raises(OutputError, match="not a folder of frames"):
        video_write.FrameFolderSink(tmp_path / "f")


def test_a_file_put_among_the_frames_during_a_decode_survives(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "frame_000007.png").write_bytes(b"old")
    sink = video_write.FrameFolderSink(tmp_path / "f")
    sink.write(pixels(0), 0, 0)
    (tmp_path / "f" / "frame_notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a folder of frames"):
        sink.close()
    sink.abort()
    assert {p.name for p in (tmp_path / "f").iterdir()} == {"frame_000007.png", "frame_notes.txt"}


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stands_for_its_folder(exists, tmp_path):
    target = tmp_path / "elsewhere"
    if exists:
        target.mkdir()
        (target / "frame_000009.png").write_bytes(b"old")
    link(tmp_path / "link", target)
    sink = video_write.FrameFolderSink(tmp_path / "link")
    sink.write(pixels(0), 0, 0)
    sink.close()
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in target.iterdir()) == ["frame_000000.png", "frame_000001.png"]


def test_a_reserved_name_is_counted_and_goes_after_an_error(tmp_path):
    """Core has chosen a name for a video that is still being decoded."""
    path, mine = tmp_path / "clip_00001_.mp4", tmp_path / "mine.mp4"
    mine.write_bytes(b"mine")
    with reserved(path), reserved(tmp_path / "no" / "folder.mp4"):
        assert [p.name for p in tmp_path.iterdir() if p != mine] == [path.name]
        path.write_bytes(b"the result")
    assert path.read_bytes() == b"the result"
    for name, left in ((tmp_path / "clip_00002_.mp4", False), (mine, True)):
        with pytest.raises(OutputError), reserved(name):
            raise OutputError("cancelled")
        assert name.exists() == left
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["x" * 300 + ".mp4", "a\0b.mp4", "a\ud800b.mp4"])
def test_a_name_that_no_file_can_have_is_not_reserved_but_refused(name, tmp_path):
    with pytest.raises(OutputError, match="cannot be written"), reserved(tmp_path / name):
        raise AssertionError("nothing is decoded")


def test_a_link_to_itself_is_refused_in_words(tmp_path):
    link(tmp_path / "link", tmp_path / "link")
    with pytest.raises(OutputError, match="link"):
        video_write.FrameFolderSink(tmp_path / "link")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".", "not a file name"),
        ("/", "not a file name"),
        ("", "not a file name"),
        ("..", "not a file name"),
        (".mp4", "incomplete file name"),
        ("out.", "incomplete file name"),
        ("x" * 300, "too long"),
        ("new/" + "x" * 5000 + ".mp4", "too long"),
        ("ä" * 130 + ".mp4", "too long"),
        ("a\0b.mp4", "cannot be written"),
        ("a\ud800b.mp4", r"cannot contain '\\ud800'"),
        ("o.gif", "unknown kind"),
    ],
)
def test_an_impossible_name_is_refused_before_anything_is_made(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for refuse in (video_write.check_sink, lambda path: video_write.open_sink(path, SHAPE, 16)):
        with pytest.raises(OutputError, match=words):
            refuse(Path(name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [None, "16", "fast", float("nan"), 0, 1e9, [16]])
def test_an_impossible_rate_is_refused_and_makes_no_folder(fps, tmp_path):
    with pytest.raises(OutputError, match="frames a second: expected a number"):
        video_write.open_sink(tmp_path / "new" / "o.mp4", SHAPE, fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [np.float32(24), np.int64(24), torch.tensor(24.0)])
def test_a_rate_of_another_library_is_a_rate(fps, tmp_path):
    import av

    sink = video_write.open_sink(tmp_path / "o.mp4", SHAPE, fps)
    sink.write(pixels(0), 0, 0)
    sink.close()
    with av.open(str(tmp_path / "o.mp4")) as file:
        assert file.streams.video[0].average_rate == 24


@pytest.mark.parametrize("name", ["10:30.mp4", "O.MP4", "pipe:1.mkv", "%d.mov", "file:x.mp4"])
def test_names_that_ffmpeg_or_we_could_mistake(name, tmp_path, monkeypatch):
    if ":" in name and sys.platform == "win32":
        pytest.skip("no name on Windows")
    monkeypatch.chdir(tmp_path)
    sink = video_write.open_sink(Path(name), SHAPE, 16)
    sink.write(pixels(0.25), 0, 0)
    sink.close()
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert video_read.read_pixels(Path(name)).shape == SHAPE


def test_a_long_name_that_fits_is_written(tmp_path):
    path = tmp_path / ("x" * 251 + ".png")
    partial = Partial(path)
    partial.publish()
    assert path.exists()


class FullDisk:
    """A sink whose last bytes cannot be written."""

    needs_whole_frames = True
    aborted = 0

    def write(self, pixels, start_frame, first_row):
        pass

    def finish(self):
        raise OutputError("full")

    def close(self):
        raise AssertionError("finish comes first")

    def abort(self):
        self.aborted += 1
        raise ZeroDivisionError


@pytest.mark.parametrize("place", [0, 1])
def test_of_two_outputs_none_appears_if_one_fails(place, tmp_path):
    others = [SINKS["o.mp4"](tmp_path / "o.mp4")]
    others.insert(place, FullDisk())
    tee = video_write.TeeSink(*others)
    tee.write(pixels(0), 0, 0)
    with pytest.raises(OutputError, match="full"):
        tee.close()
    assert not (tmp_path / "o.mp4").exists()
    with pytest.raises(ZeroDivisionError):
        tee.abort()
    assert not list(tmp_path.iterdir()), "an abort that fails keeps no other from its own"


@pytest.mark.parametrize("surroundings", ["float64", "meta"])
def test_stored_pixels_are_float32_whatever_the_caller_set(surroundings, tmp_path):
    if surroundings == "float64":
        torch.set_default_dtype(torch.float64)
    else:
        torch.set_default_device("meta")
    try:
        sink = SINKS["o.safetensors"](tmp_path / "o.safetensors")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    sink.write(pixels(0.5), 0, 0)
    sink.close()
    assert torch.equal(load_file(tmp_path / "o.safetensors")["pixels"], pixels(0.5))


# -- pictures and videos --------------------------------------------------------------------------


def test_sixteen_bit_grey_keeps_its_scale(tmp_path):
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "g.png")
    got = video_read.read_pixels(tmp_path / "g.png")
    expected = torch.from_numpy(grey.astype(np.float32) / 32767.5 - 1)
    assert torch.allclose(got[0, :, 0], expected.expand(3, 8, 8), atol=1e-6)


@pytest.mark.parametrize("mode", ["I;16B", "I"])
def test_other_spellings_of_sixteen_bits(mode, tmp_path):
    grey = np.full((8, 8), 32768, np.dtype(">u2" if mode == "I;16B" else "i4"))
    Image.frombytes(mode, (8, 8), grey.tobytes()).save(tmp_path / "g.png", format="TIFF")
    got = video_read.read_pixels(tmp_path / "g.png")
    assert got.abs().max() < 1e-4


@pytest.mark.parametrize("array", [np.full((8, 8), 0.5, np.float32), np.full((8, 8), -7, np.int32)])
def test_a_grey_whose_white_is_unknown_is_refused_by_name(array, tmp_path):
    Image.fromarray(array).save(tmp_path / "g.png", format="TIFF")
    with pytest.raises(LatentError, match=r"mode [FI], whose value of white is unknown"):
        video_read.read_pixels(tmp_path / "g.png")


def corner(height: int = 16, width: int = 32) -> np.ndarray:
    """Black, with a red corner at the top left and green along the rest of the top."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 4] = (0, 200, 0)
    picture[: height // 4, : width // 4] = (200, 0, 0)
    return picture


# What EXIF says -> how numpy turns the stored picture upright. Source: the EXIF standard's table.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_read_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(corner()).save(tmp_path / "p.png", exif=exif)
    got = video_write.to_uint8(video_read.read_pixels(tmp_path / "p.png")[0])[0]
    assert np.array_equal(got, UPRIGHT[orientation](corner()))


# Matrix (a, b, c, d) of a track -> the same turns, by the rule of QuickTime's file format:
# x' = a x + c y, y' = b x + d y.
MATRICES = {
    (1, 0, 0, 1): 1,
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}


def turned_video(path: Path, matrix: tuple[float, ...]) -> None:
    sink = video_write.VideoFileSink(path, 32, 64, 16)
    still = torch.from_numpy(corner(32, 64)).permute(2, 0, 1)[None, :, None]
    sink.write(still.float() / 127.5 - 1, 0, 0)
    sink.close()
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    a, b, c, d = (round(x * 65536) for x in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("matrix", MATRICES)
def test_videos_are_read_upright(matrix, tmp_path):
    turned_video(tmp_path / "v.mp4", matrix)
    got = video_write.to_uint8(video_read.read_pixels(tmp_path / "v.mp4")[0])[0].astype(int)
    expected = UPRIGHT[MATRICES[matrix]](corner(32, 64)).astype(int)
    assert got.shape == expected.shape
    assert np.abs(got - expected).mean() < 8


def test_a_video_turned_by_an_odd_angle_is_refused(tmp_path):
    turned_video(tmp_path / "v.mp4", (0.8, 0.6, -0.6, 0.8))
    with pytest.raises(LatentError, match="multiple of 90"):
        video_read.read_pixels(tmp_path / "v.mp4")


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    Image.fromarray(corner()).save(tmp_path / "p.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(LatentError, match="decompression bomb"):
        video_read.read_pixels(tmp_path / "p.png")


def test_frames_of_two_sizes_are_refused(tmp_path, monkeypatch):
    frames = [np.zeros((16, 32, 3), np.uint8), np.zeros((16, 16, 3), np.uint8)]
    monkeypatch.setattr(video_read.VideoClip, "_read_all", lambda clip: iter(frames))
    (tmp_path / "v.mp4").write_bytes(b"\x00\x00\x00\x20ftypisom")
    with pytest.raises(LatentError, match=r"2 sizes \(16x16, 32x16\)"):
        video_read.read_pixels(tmp_path / "v.mp4")


# -- latents --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("z.latent", (2, 16, 1, 4, 6)),
        ("Z.LATENT", (2, 16, 1, 4, 6)),
        ("z.safetensors", (2, 16, 1, 4, 6)),
        ("z", (2, 16, 1, 4, 6)),
        ("Z.NPY", (2, 16, 1, 4, 6)),
    ],
)
def test_four_dimensions_mean_what_their_writer_means(name, shape, tmp_path):
    """ComfyUI's LATENT of images is [B, z, H, W], whatever the file is called; elsewhere the number
    of channels tells."""
    z = torch.randn(2, 16, 4, 6)
    if name == "Z.NPY":
        np.save((tmp_path / name).open("wb"), z.numpy())
    else:
        marker = {"latent_format_version_0": torch.empty(0)}
        save_file({"latent_tensor": z, **marker}, str(tmp_path / name))
    got = load_latent(tmp_path / name)
    assert got.shape == shape
    assert torch.equal(got.flatten(), z.flatten())


def test_whole_numbers_of_an_old_latent_are_refused_too(tmp_path):
    z = torch.zeros(1, 16, 1, 4, 6, dtype=torch.int32)
    save_file({"latent_tensor": z}, str(tmp_path / "z.latent"))
    with pytest.raises(LatentError, match="int32"):
        load_latent(tmp_path / "z.latent")
    save_file({"latent_tensor": z.half() + 1}, str(tmp_path / "z.latent"))
    assert load_latent(tmp_path / "z.latent").mean() == pytest.approx(1 / 0.18215)


def test_pixels_for_which_there_is_no_room_leave_no_file(tmp_path):
    with pytest.raises(DecodeMemoryError, match="that much memory is not free"):
        video_write.open_sink(tmp_path / "new" / "o.safetensors", (1, 3, 4000, 2**17, 2**17), 16)
    assert not list(tmp_path.iterdir())
