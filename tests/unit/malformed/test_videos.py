"""Videos and images that cannot be encoded."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.malformed.cases import check, encode_argv
from wan_vae.errors import CheckpointError, GeometryError, LatentError, OutputError
from wan_vae.io.video_write import save_png


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("v.mp4", b"", "an empty file"),
        ("v.mp4", b"this is text, not a video" * 9, "this is a text"),
        ("v.mp4", "cut", "not a readable video"),
        ("v.png", b"\x89PNG\r\n\x1a\n broken", "not a readable image"),
        ("v.jpg", b"\xff\xd8\xff\xe0 broken", "not a readable image"),
        ("v.xyz", b"\x07\x01what is this", "not a readable video"),
        ("v.gif", b"GIF89a" + bytes(3), "not a readable image"),
        ("v.webp", b"RIFF\x24\x00\x00\x00WEBPVP8 " + bytes(40), "not a readable image"),
        ("v.avif", b"\x00\x00\x00\x20ftypavif" + bytes(40), "not a readable image"),
        ("v.tif", b"II*\x00" + bytes(40), "not a readable image"),
        ("v.mkv", b"\x1aE\xdf\xa3" + bytes(40), "not a readable video"),
        ("v.mp3", b"ID3\x04\x00" + bytes(40), "an MP3 sound file, not a video"),
        ("v.safetensors", b"\x40\x00\x00\x00\x00\x00\x00\x00{", "a safetensors file, not a video"),
    ],
)
def test_malformed_video(name, content, words, tmp_path, good, capfd, monkeypatch):
    if content == "cut":
        content = (good / "clip.mp4").read_bytes()[:200]
    path = tmp_path / name
    path.write_bytes(content)
    argv = encode_argv(path, good, tmp_path / "z.latent")
    check(argv, LatentError, words, capfd, monkeypatch)
    assert not (tmp_path / "z.latent").exists()


def test_missing_video(tmp_path, good, capfd, monkeypatch):
    argv = encode_argv(tmp_path / "none.mp4", good, tmp_path / "z.latent")
    check(argv, LatentError, "no such file", capfd, monkeypatch)


def test_a_picture_smaller_than_a_latent_pixel(tmp_path, good, capfd, monkeypatch):
    save_png(np.zeros((4, 4, 3), np.uint8), tmp_path / "v.png")
    argv = encode_argv(tmp_path / "v.png", good, tmp_path / "z.latent")
    check(argv, GeometryError, "too small", capfd, monkeypatch)


def test_encoding_without_an_encoder(tmp_path, good, capfd, monkeypatch):
    argv = encode_argv(good / "clip.mp4", good, tmp_path / "z.latent", "decoder_only.safetensors")
    check(argv, CheckpointError, "no encoder", capfd, monkeypatch)


@pytest.mark.parametrize("name", ["z.mp4", "z", "x" * 300 + ".latent"])
def test_encode_to_an_impossible_file(name, tmp_path, good, capfd, monkeypatch):
    argv = encode_argv(good / "clip.mp4", good, tmp_path / name)
    check(argv, OutputError, "", capfd, monkeypatch)
