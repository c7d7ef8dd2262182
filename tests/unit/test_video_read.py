"""What is read from videos, animations and pictures: frames, colours, alpha; and never all at once.

Runs on the oldest PyAV that ComfyUI allows and on the newest one: `make test-video`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, features
from safetensors.torch import save_file

from tests.conftest import random_state
from wan_vae import WanVAE
from wan_vae.commands.cli import main
from wan_vae.config import wan21
from wan_vae.errors import LatentError, ShardingError
from wan_vae.io import video_read
from wan_vae.io.latents import load_latent
from wan_vae.io.video_read import Clip, open_clip, read_pixels
from wan_vae.io.video_write import VideoFileSink
from wan_vae.sharding.context import ShardContext

av = pytest.importorskip("av")
HEIGHT, WIDTH = 48, 64
COLOURS = [(254, 0, 0), (224, 172, 105), (16, 64, 250)]


def luma_of(rgb, kr: float, kb: float) -> tuple[float, float, float]:
    """Y in [0, 1], Cb and Cr in [-0.5, 0.5], by the definition of a matrix."""
    r, g, b = (x / 255 for x in rgb)
    y = kr * r + (1 - kr - kb) * g + kb * b
    return y, (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))


def write(path, rgb, number, full, pix_fmt, codec, size=(HEIGHT, WIDTH), weights=None, frames=2):
    """A video of one colour; `number` is FFmpeg's number of the matrix, whose weights these are."""
    kr, kb = weights or {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}[number]
    bits = 10 if "10" in pix_fmt else 8
    scale, most = 1 << (bits - 8), (1 << bits) - 1
    y, cb, cr = luma_of(rgb, kr, kb)
    if full:
        values = (y * most, cb * most + 128 * scale, cr * most + 128 * scale)
    else:
        values = ((16 + 219 * y) * scale, (128 + 224 * cb) * scale, (128 + 224 * cr) * scale)
    dtype = np.uint16 if bits > 8 else np.uint8
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=16)
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        if codec == "libx264":
            stream.options = {"crf": "1"}
        stream.codec_context.colorspace = number
        stream.codec_context.color_range = 2 if full else 1
        for _ in range(frames):
            frame = av.VideoFrame(size[1], size[0], pix_fmt)
            for plane, value in zip(frame.planes, values, strict=True):
                shape = (plane.height, plane.line_size // dtype().itemsize)
                plane.update(np.full(shape, min(round(value), most), dtype).tobytes())
            frame.colorspace, frame.color_range = number, 2 if full else 1
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode(None):
            file.mux(packet)


def levels(clip: Clip) -> torch.Tensor:
    """The colour in the middle of the first frame, in levels of 8 bits."""
    x = clip.read(0, 1)[0, :, 0, clip.height // 2, clip.width // 2]
    return x.float() / clip.white * 255


@pytest.mark.parametrize("rgb", COLOURS, ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [1, 6, 9], ids=["709", "601", "2020"])
@pytest.mark.parametrize(
    ("pix_fmt", "codec"),
    [("yuv420p", "libx264"), ("yuv444p", "ffv1"), ("yuv422p10le", "ffv1")],
)
def test_colours_are_right_in_every_matrix_and_range(rgb, full, matrix, pix_fmt, codec, tmp_path):
    write(tmp_path / "v.mkv", rgb, matrix, full, pix_fmt, codec)
    clip = open_clip(tmp_path / "v.mkv")
    assert clip.shape == (1, 3, 2, HEIGHT, WIDTH)
    # Two levels: Y, Cb and Cr were rounded to 8 bits. Of 10 bits less is lost.
    bound = 1.0 if "10" in pix_fmt else 2.1
    assert (levels(clip) - torch.tensor(rgb, dtype=torch.float32)).abs().max() <= bound
    assert clip.white == (65535 if "10" in pix_fmt else 255)
    assert not clip.warnings


@pytest.mark.parametrize(
    "pix_fmt",
    [
        *("yuv420p", "yuv422p", "yuv444p", "yuva420p", "yuva444p"),
        *("yuv420p10le", "yuv422p10le", "yuv444p16le", "yuva444p10le", "gbrp10le", "gbrap10le"),
    ],
)
def test_every_row_and_column_is_where_it_was(pix_fmt, tmp_path):
    """FFmpeg 8 gets the rows of packed 16-bit colours wrong, which one colour does not show."""
    y, x = np.mgrid[0:HEIGHT, 0:80] / 80
    want = np.stack((x, y, 1 - (x + y) / 2), axis=-1)
    picture = np.round(want * 65535).astype("<u2")
    with av.open(str(tmp_path / "v.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=16)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, 80, pix_fmt
        if not pix_fmt.startswith("gbr"):
            stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        frame = planar(picture, pix_fmt)
        for packet in (*stream.encode(frame), *stream.encode(None)):
            file.mux(packet)
    clip = open_clip(tmp_path / "v.mkv")
    got = clip.read(0, 1)[0, :, 0].permute(1, 2, 0).float().numpy() / clip.white
    assert np.abs(got - want).max() < (0.01 if "444" in pix_fmt or "gbr" in pix_fmt else 0.03)


def planar(picture: np.ndarray, pix_fmt: str) -> av.VideoFrame:
    """16-bit colours [H, W, 3] as planes of `pix_fmt`, by the definition of BT.709 (limited)."""
    frame = av.VideoFrame(picture.shape[1], picture.shape[0], pix_fmt)
    bits = frame.format.components[0].bits
    most = (1 << bits) - 1
    r, g, b = np.moveaxis(picture / 65535, -1, 0)
    if pix_fmt.startswith("gbr"):
        planes = [g * most, b * most, r * most, np.full(g.shape, most)]
    else:
        luma, scale = 0.2126 * r + 0.7152 * g + 0.0722 * b, 1 << (bits - 8)
        cb, cr = (b - luma) / 1.8556, (r - luma) / 1.5748
        planes = [(16 + 219 * luma) * scale, (128 + 224 * cb) * scale, (128 + 224 * cr) * scale]
        planes.append(np.full(luma.shape, most))
    for plane, values in zip(frame.planes, planes, strict=False):
        rows, columns = values.shape[0] // plane.height, values.shape[1] // plane.width
        values = values.reshape(plane.height, rows, plane.width, columns).mean((1, 3))
        dtype = np.dtype("u1" if bits == 8 else "<u2")
        padded = np.zeros((plane.height, plane.line_size // dtype.itemsize), dtype)
        padded[:, : plane.width] = np.round(values)
        plane.update(padded.tobytes())
    return frame


def test_white_and_black_of_ten_bits_are_the_ends(tmp_path):
    for full in (False, True):
        for rgb in ((255, 255, 255), (0, 0, 0)):
            write(tmp_path / "v.mkv", rgb, 1, full, "yuv420p10le", "ffv1")
            pixels = read_pixels(tmp_path / "v.mkv")
            expected = 1.0 if rgb[0] else -1.0
            assert (pixels - expected).abs().max() < 2e-4


@pytest.mark.parametrize(
    ("size", "number", "words"), [((720, 1280), 1, "BT.709 is taken"), ((480, 640), 6, None)]
)
def test_untagged_videos_are_hd_in_709_and_small_in_601(size, number, words, tmp_path):
    weights = {1: (0.2126, 0.0722), 6: (0.299, 0.114)}[number]
    write(tmp_path / "v.mkv", (224, 172, 105), 2, False, "yuv420p", "ffv1", size, weights, 1)
    clip = open_clip(tmp_path / "v.mkv")
    assert (levels(clip) - torch.tensor([224.0, 172, 105])).abs().max() <= 2.1
    assert [words in text for text in clip.warnings] == ([True] if words else [])


def test_an_unknown_matrix_is_refused_by_its_number(tmp_path):
    write(tmp_path / "v.mkv", (9, 9, 9), 8, False, "yuv444p", "ffv1", weights=(0.25, 0.25))
    with pytest.raises(LatentError, match="matrix 8 of FFmpeg"):
        open_clip(tmp_path / "v.mkv")


def test_our_own_video_comes_back(tmp_path):
    sink = VideoFileSink(tmp_path / "o.mp4", HEIGHT, WIDTH, 16)
    colour = torch.tensor([254.0, 0, 0]).view(1, 3, 1, 1, 1) / 127.5 - 1
    sink.write(colour.expand(1, 3, 5, HEIGHT, WIDTH), 0, 0)
    sink.close()
    got = levels(open_clip(tmp_path / "o.mp4"))
    assert (got - torch.tensor([254.0, 0, 0])).abs().max() <= 2


# -- animations and pictures ----------------------------------------------------------------------


def pictures(count: int = 9, alpha: bool = False) -> list[Image.Image]:
    made = []
    for i in range(count):
        array = np.full((32, 32, 4 if alpha else 3), 255, np.uint8)
        array[..., :3] = (20 * i, 255 - 20 * i, 128)
        if alpha:
            array[:16, :, 3] = 0
        made.append(Image.fromarray(array))
    return made


ANIMATIONS = {"WEBP": {"lossless": True}, "PNG": {}, "GIF": {}, "TIFF": {}}
if features.check("avif"):
    ANIMATIONS["AVIF"] = {"quality": 100}


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a"])
@pytest.mark.parametrize("form", ANIMATIONS)
def test_what_animates_is_a_video_of_its_frames(form, name, tmp_path):
    first, *more = pictures()
    options = {"save_all": True, "append_images": more, **ANIMATIONS[form]}
    first.save(tmp_path / name, format=form, **options)
    clip = open_clip(tmp_path / name)
    assert clip.shape == (1, 3, 9, 32, 32)
    x = clip.read(0, 9)[0, :, :, 16, 16].float()
    expected = torch.tensor([[20.0 * i, 255 - 20 * i, 128] for i in range(9)]).T
    assert (x - expected).abs().max() <= (6 if form in ("GIF", "AVIF") else 0)


def test_the_picture_of_an_apng_for_other_viewers_is_no_frame(tmp_path):
    first, *more = pictures(4)
    first.save(
        tmp_path / "a.png", save_all=True, append_images=more, default_image=True, duration=50
    )
    clip = open_clip(tmp_path / "a.png")
    assert clip.frames == 3
    assert clip.read(0, 1)[0, 0, 0, 0, 0] == 20


@pytest.mark.parametrize("form", [*ANIMATIONS, "still PNG", "still WEBP"])
def test_alpha_is_flattened_on_white_or_kept(form, tmp_path):
    bound = 8 if form in ("GIF", "AVIF") else 0  # a palette, or losses
    first, *more = pictures(3, alpha=True)
    still = form.startswith("still")
    options = {} if still else {"save_all": True, "append_images": more}
    form = form.removeprefix("still ")
    options |= {"disposal": 2} if form == "GIF" else ANIMATIONS[form]
    first.save(tmp_path / "a", format=form, **options)
    flat = open_clip(tmp_path / "a").with_colours(3)
    assert "flattened on white" in " ".join(flat.warnings)
    x = flat.read(0, 1)[0, :, 0].float()
    assert (x[:, 4, 4] - 255).abs().max() <= bound
    assert (x[:, 28, 28] - torch.tensor([0.0, 255, 128])).abs().max() <= max(bound, 1)
    kept = open_clip(tmp_path / "a").with_colours(4)
    assert not kept.warnings and kept.shape[1] == 4
    alpha = kept.read(0, 1)[0, 3, 0]
    assert (alpha[4, 4], alpha[28, 28]) == (0, 255)


def test_pictures_that_look_alike_give_the_same_pixels(tmp_path):
    """What colour a transparent pixel hides does not matter (mflux #722)."""
    a = np.zeros((16, 16, 4), np.uint8)
    b = a.copy()
    b[..., :3] = 77
    for name, array in (("a.png", a), ("b.png", b)):
        Image.fromarray(array).save(tmp_path / name)
    assert torch.equal(read_pixels(tmp_path / "a.png"), read_pixels(tmp_path / "b.png"))


def test_a_video_without_alpha_is_opaque_for_a_vae_with_it(tmp_path):
    pictures(1)[0].save(tmp_path / "a.png")
    assert read_pixels(tmp_path / "a.png", colours=4)[0, 3].eq(1).all()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "ICO", "PPM", "TGA"])
def test_stills_of_every_format_whatever_they_are_called(form, tmp_path):
    pictures(3)[2].save(tmp_path / "x.bin", format=form)
    got = read_pixels(tmp_path / "x.bin")
    assert got.shape == (1, 3, 1, 32, 32)
    expected = torch.tensor([40.0, 215, 128]) / 127.5 - 1
    assert (got[0, :, 0, 9, 9] - expected).abs().max() < 0.05


def test_sixteen_bits_of_colour_are_kept(tmp_path):
    with av.open(str(tmp_path / "p.png"), "w", format="image2") as file:
        stream = file.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = 8, 8, "rgb48be"
        frame = av.VideoFrame(8, 8, "rgb48be")
        row = np.zeros((8, frame.planes[0].line_size // 2), ">u2")
        row[:, :24] = np.tile([1000, 30001, 65535], 8)
        frame.planes[0].update(row.tobytes())
        for packet in (*stream.encode(frame), *stream.encode(None)):
            file.mux(packet)
    clip = open_clip(tmp_path / "p.png")
    assert clip.white == 65535
    assert clip.read(0, 1)[0, :, 0, 3, 3].tolist() == [1000, 30001, 65535]


@pytest.mark.skipif("AVIF" not in ANIMATIONS, reason="this Pillow reads no AVIF")
def test_an_avif_with_exif_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray(np.zeros((16, 32, 3), np.uint8))
    wide.save(tmp_path / "p.avif", exif=exif)
    assert open_clip(tmp_path / "p.avif").shape == (1, 3, 1, 32, 16)


def test_of_a_stereo_picture_the_first_is_taken_and_said(tmp_path):
    first, second = pictures(2)
    first.save(tmp_path / "p.jpg", format="MPO", save_all=True, append_images=[second])
    clip = open_clip(tmp_path / "p.jpg")
    assert clip.frames == 1
    assert "the first of 2 pictures in the MPO file" in clip.warnings[0]


# -- piece by piece -------------------------------------------------------------------------------


@pytest.fixture
def clip_file(tmp_path) -> Path:
    sink = VideoFileSink(tmp_path / "v.mp4", 34, 44, 16)
    noise = torch.rand(1, 3, 11, 34, 44, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sink.write(noise, 0, 0)
    sink.close()
    return tmp_path / "v.mp4"


@pytest.mark.parametrize("options", [{}, {"chunk_frames": 1}, {"strips": 2, "chunk_frames": 2}])
def test_a_clip_that_is_read_gives_the_latent_of_the_whole_one(options, clip_file, monkeypatch):
    vae = WanVAE.from_state_dict(random_state(wan21(dim=8)), device="cpu")
    expected = vae.encode(read_pixels(clip_file), **options)
    clip, sizes, real = open_clip(clip_file), [], Clip.read

    def read(self, first, last):
        sizes.append(last - first)
        return real(self, first, last)

    monkeypatch.setattr(Clip, "read", read)
    assert torch.equal(vae.encode(clip, **options), expected)
    assert vae.last_report.total_frames == 9
    if options.get("chunk_frames") == 1:
        assert max(sizes) == 4, "no more than a chunk is read at once"


def test_frames_can_be_read_again_and_a_file_that_shrank_is_named(clip_file):
    clip = open_clip(clip_file)
    all_frames = clip.read(0, 11)
    assert torch.equal(clip.read(3, 5), all_frames[:, :, 3:5])
    assert torch.equal(clip.read(9, 10), all_frames[:, :, 9:10])
    clip.frames = 20
    with pytest.raises(LatentError, match="ended after 11 of 20 frames"):
        clip.read(10, 20)


def test_a_clip_has_no_shards(clip_file):
    vae = WanVAE.from_state_dict(random_state(wan21(dim=8)), device="cpu")
    with pytest.raises(ShardingError, match="piece by piece"):
        vae.encode(open_clip(clip_file), shard=ShardContext(0, 2))


def test_encode_says_what_it_crops(clip_file, tmp_path, capfd):
    save_file(random_state(wan21(dim=8)), str(tmp_path / "vae.safetensors"))
    argv = ["encode", str(clip_file), "--vae", str(tmp_path / "vae.safetensors"), "--device", "cpu"]
    assert main([*argv, "-o", str(tmp_path / "z.latent")]) == 0
    said = capfd.readouterr().err
    assert "9 of 11 frames are encoded: latents hold 4n + 1 frames" in said
    assert "44x34 is cropped to 40x32" in said
    assert load_latent(tmp_path / "z.latent").shape == (1, 16, 3, 4, 5)


def test_encode_with_alpha(tmp_path, capfd):
    config = replace(wan21(dim=8), colours=4, decoder_colours=4)
    vae = WanVAE.from_state_dict(random_state(config), device="cpu")
    save_file(random_state(config), str(tmp_path / "vae.safetensors"))
    pictures(1, alpha=True)[0].save(tmp_path / "p.png")
    argv = ["encode", str(tmp_path / "p.png"), "--vae", str(tmp_path / "vae.safetensors")]
    assert main([*argv, "-o", str(tmp_path / "z.latent"), "--device", "cpu"]) == 0
    assert "flattened" not in capfd.readouterr().err
    expected = vae.encode(read_pixels(tmp_path / "p.png", colours=4))
    assert torch.equal(load_latent(tmp_path / "z.latent"), expected)


# -- what is there and is not read by itself ------------------------------------------------------


def write_frames(path, codec, pix_fmt, planes, count=5, options=None, tags=None) -> None:
    """A video of 48 x 64 whose frames are all alike: a level for each plane."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=16, options=options or {})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pix_fmt
        stream.metadata.update(tags or {})
        for _ in range(count):
            frame = av.VideoFrame(WIDTH, HEIGHT, pix_fmt)
            for plane, level in zip(frame.planes, planes, strict=True):
                plane.update(np.full((plane.height, plane.line_size), level, np.uint8).tobytes())
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode(None):
            file.mux(packet)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_alpha_of_a_webm_is_kept_or_flattened_and_said(codec, tmp_path):
    """FFmpeg's own decoders of VP8 and VP9 leave alpha out without a word."""
    options = {"auto-alt-ref": "0", "crf": "4", "b": "4M"}
    planes, tags = (235, 128, 128, 0), {"alpha_mode": "1"}
    write_frames(tmp_path / "v.webm", codec, "yuva420p", planes, options=options, tags=tags)
    kept = open_clip(tmp_path / "v.webm").with_colours(4)
    assert kept.shape == (1, 4, 5, HEIGHT, WIDTH) and kept.has_alpha
    assert kept.read(0, 5)[0, 3].max() <= 4
    flat = open_clip(tmp_path / "v.webm").with_colours(3)
    assert "flattened on white" in " ".join(flat.warnings)


def test_alpha_that_cannot_be_read_is_said(tmp_path, monkeypatch):
    options = {"auto-alt-ref": "0"}
    write_frames(
        tmp_path / "v.webm", "libvpx", "yuva420p", (9, 9, 9, 9), options=options,
        tags={"alpha_mode": "1"},
    )  # fmt: skip
    monkeypatch.setitem(video_read._WITH_ALPHA, "vp8", "no_such_decoder")
    clip = open_clip(tmp_path / "v.webm")
    assert clip.frames == 5 and "no no_such_decoder" in clip.warnings[0]


def write_noise(file, stream) -> None:
    """16 frames that compress badly, so that each has its share of the file."""
    stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
    noise = np.random.default_rng(0)
    for _ in range(16):
        picture = noise.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        for packet in stream.encode(frame):
            file.mux(packet)
    for packet in stream.encode(None):
        file.mux(packet)


@pytest.mark.parametrize(
    ("name", "codec"), [("v.mkv", "ffv1"), ("v.webm", "libvpx-vp9"), ("v.avi", "mpeg4")]
)
def test_a_video_that_is_cut_short_says_so(name, codec, tmp_path):
    with av.open(str(tmp_path / name), "w") as file:
        write_noise(file, file.add_stream(codec, rate=16))
    assert open_clip(tmp_path / name).warnings == []
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 6 // 10])
    clip = open_clip(tmp_path / name)
    assert 0 < clip.frames < 16
    assert f"{clip.frames} frames could be read" in clip.warnings[0]
    assert "cut short" in clip.warnings[0]


def test_a_damaged_mp4_says_after_how_many_frames(tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w", options={"movflags": "faststart"}) as file:
        write_noise(file, file.add_stream("libx264", rate=16, options={"bf": "0"}))
    whole = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "v.mp4").write_bytes(whole[: len(whole) * 8 // 10])
    with pytest.raises(LatentError, match=r"after \d+ frames: damaged or cut short") as caught:
        open_clip(tmp_path / "v.mp4")
    assert "Errno" not in str(caught.value)


def test_a_video_with_damaged_frames_says_so(tmp_path):
    """A decoder fills in what it cannot read, and gives the frame as if nothing were wrong."""
    with av.open(str(tmp_path / "v.mp4"), "w") as file:
        write_noise(file, file.add_stream("libx264", rate=16, options={"bf": "0"}))
    whole = bytearray((tmp_path / "v.mp4").read_bytes())
    assert open_clip(tmp_path / "v.mp4").warnings == []
    middle = len(whole) // 2
    whole[middle] ^= 0xFF
    whole[middle + 40] ^= 0xFF
    (tmp_path / "v.mp4").write_bytes(whole)
    clip = open_clip(tmp_path / "v.mp4")
    assert clip.frames == 16
    (warning,) = clip.warnings
    assert re.match(r"1 of 16 frames are damaged, the first is number (\d+)", warning)
    clip.read(0, 16)
    assert clip.warnings == [warning], "said once"


def deep_and_shallow(folder: Path, form: str, first: str) -> Path:
    """A clip of a grey of 200 / 255, whose frames have 8 bits and more; its name."""
    if form == "tiff":
        shallow = Image.fromarray(np.full((32, 32, 3), 200, np.uint8))
        deep = Image.fromarray(np.full((32, 32), 200 * 257, np.uint16))
        pages = [shallow, deep] if first == "shallow" else [deep, shallow]
        pages[0].save(folder / "a.tif", save_all=True, append_images=pages[1:])
        return folder / "a.tif"
    parts = {}
    for depth, pixel_format in (("shallow", "yuv420p"), ("deep", "yuv420p10le")):
        with av.open(str(folder / f"{depth}.ts"), "w") as file:
            stream = file.add_stream("libx264", rate=16)
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pixel_format
            grey = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
            for frame in (av.VideoFrame.from_ndarray(grey, format="rgb24"), None):
                for packet in stream.encode(frame):
                    file.mux(packet)
        parts[depth] = (folder / f"{depth}.ts").read_bytes()
    other = {"shallow": "deep", "deep": "shallow"}[first]
    (folder / "a.ts").write_bytes(parts[first] + parts[other])
    return folder / "a.ts"


@pytest.mark.parametrize("first", ["shallow", "deep"])
@pytest.mark.parametrize("form", ["tiff", "ts"])
def test_frames_of_different_depth_are_equally_bright(form, first, tmp_path):
    clip = open_clip(deep_and_shallow(tmp_path, form, first))
    assert (clip.frames, clip.white, clip.has_alpha) == (2, 65535, False)
    for colours in (3, 4, 3):  # also when it is read again
        x = clip.with_colours(colours).read(0, 2)[0, :3].float() / clip.white
        assert (x - 200 / 255).abs().max() < 0.01


def test_a_song_has_no_pictures(tmp_path):
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 44100
        for packet in (*stream.encode(frame), *stream.encode(None)):
            file.mux(packet)
    with pytest.raises(LatentError, match="has sound and no pictures"):
        open_clip(tmp_path / "a.m4a")


@pytest.mark.skipif("AVIF" not in ANIMATIONS, reason="this Pillow writes no AVIF")
def test_an_animated_avif_without_pillows_help_is_no_still(tmp_path, monkeypatch):
    """Its first picture lies beside the animation; older Pillow reads neither."""
    first, *more = pictures()
    first.save(tmp_path / "a.avif", save_all=True, append_images=more, quality=100)
    monkeypatch.setattr(video_read, "_pillow_reads", lambda path: False)
    assert open_clip(tmp_path / "a.avif").frames == 9


def parts(*titles: str) -> SimpleNamespace:
    """A file as PyAV opens it, with a stream for each of `titles`, of a picture's single frame."""
    streams = [
        SimpleNamespace(
            metadata={"title": title}, frames=1, disposition=0, sample_aspect_ratio=None
        )
        for title in titles
    ]
    return SimpleNamespace(streams=SimpleNamespace(video=streams, audio=[]))


def test_a_picture_of_tiles_is_refused_and_not_read_as_its_first_one(tmp_path):
    """As HEIC photos are; Pillow reads them with a plug-in."""
    (tmp_path / "p.heic").write_bytes(b"\x00\x00\x00\x20ftypheic" + bytes(40))
    clip = video_read.VideoClip(tmp_path / "p.heic", may_be_picture=True)
    with pytest.raises(LatentError, match="a picture of 4 parts"):
        clip._stream(parts("", "", "", ""))
    assert clip._stream(parts("Color")).metadata == {"title": "Color"} and not clip.warnings
    assert clip._stream(parts("Color", "Alpha")).metadata == {"title": "Color"}
    assert "transparency is not read" in clip.warnings[0]


def test_pixels_that_are_not_square_are_said(tmp_path):
    with av.open(str(tmp_path / "v.mkv"), "w") as file:
        stream = file.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for packet in (*stream.encode(av.VideoFrame(WIDTH, HEIGHT, "yuv420p")), *stream.encode()):
            file.mux(packet)
    assert "not square (4/3)" in open_clip(tmp_path / "v.mkv").warnings[0]
