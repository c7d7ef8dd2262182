"""Files that are something else, under the name of a VAE, a latent or a video: they say what."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tests.unit.malformed.cases import check, decode_argv, encode_argv
from wan_vae.errors import CheckpointError, LatentError, NotAWanVAEError
from wan_vae.io.checkpoint import load_checkpoint
from wan_vae.io.kinds import kind_of
from wan_vae.io.latents import load_latent, read_latent


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("readme"))
    return buffer.getvalue()


LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:2fc39d31359a4b0a64f55876d8ff7fa8d7"
    b"\nsize 253806278\n"
)
# What it is -> its bytes, and words of the error.
KINDS: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "nothing": (b"", "an empty file"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(99), "a GGUF file"),
    "GGML": (b"lmgg" + bytes(99), "a GGML file"),
    "HTML": (b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title>", "a web page"),
    "HTML with a comment": (b"<!-- x -->\n<HTML>", "a web page"),
    "HTML with a byte order mark": (b"\xef\xbb\xbf<html>", "a web page"),
    "Git LFS": (LFS, "a Git LFS pointer (to a file of 253806278 bytes), not a"),
    "Xet": (b"# xet version 0\nfilesize = 1", "an Xet pointer"),
    "JSON error": (b'{"error":"Repository not found"}', "'Repository not found'"),
    "JSON message": (b'{"message": "API rate limit exceeded"}', "rate limit"),
    "JSON list": (b"[1, 2]", "a JSON text"),
    "JSON cut": (b'{"error": "Invalid', "a damaged JSON text"),
    "workflow": (b'{"last_node_id": 9, "nodes": []}', "a ComfyUI workflow"),
    "configuration": (b'{"_class_name": "AutoencoderKLWan"}', "the configuration of a model"),
    "index": (b'{"weight_map": {"a": "b"}}', "the index of a checkpoint of several files"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "AccessDenied"),
    "text": (b"Invalid username or password.", "a text ('Invalid username or password.')"),
    "text with umlauts": ("Zugriff verweigert für Müller".encode(), "a text"),
    "Markdown": (b"---\nlicense: apache-2.0\n---\n# Wan2.1", "a text"),
    "shortcut": (b"[InternetShortcut]\r\nURL=https://example.org/", "a shortcut to a page"),
    "shortcut of Linux": (b"[Desktop Entry]\nType=Link\n", "a shortcut to a page"),
    "drawing": (b'<?xml version="1.0"?>\n<svg xmlns="http://x.org"/>', "an SVG drawing"),
    "playlist": (b"#EXTM3U\n#EXT-X-VERSION:3", "a playlist"),
    "zeros": (bytes(9000), "9000 bytes that begin with zeros"),
    "zip": (lambda: zipped(readme_dot_txt=b"x"), "a zip archive with readme.txt"),
    "zip cut": (lambda: zipped(readme_dot_txt=b"x" * 99)[:60], "cut short"),
    "TorchScript": (lambda: zipped(m__data_dot_pkl=b"", m__constants_dot_pkl=b""), "TorchScript"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(99), "a 7z archive"),
    "RAR": (b"Rar!\x1a\x07\x01\x00" + bytes(99), "a RAR archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "a gzip archive"),
    "xz": (b"\xfd7zXZ\x00" + bytes(99), "an xz archive"),
    "zstd": (b"(\xb5/\xfd" + bytes(99), "a zstd archive"),
    "bzip2": (b"BZh91AY&SY\x00\xff" + bytes(9), "a bzip2 archive"),
    "tar": (tarred, "a tar archive"),
    "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:\x99\x01" + bytes(99), "an ONNX model"),
    "TensorRT": (b"ftrt" + bytes(99), "a TensorRT engine"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    "TFLite": (b"\x1c\x00\x00\x00TFL3" + bytes(99), "a TensorFlow Lite model"),
    "SQLite": (b"SQLite format 3\x00" + bytes(99), "an SQLite database"),
    "PDF": (b"%PDF-1.7\n\x00\xff", "a PDF document"),
    "Windows program": (b"MZ\x90\x00\x03" + bytes(99), "a Windows program"),
    "Linux program": (b"\x7fELF\x02\x01" + bytes(99), "a Linux program"),
    "MP3": (b"ID3\x04\x00" + bytes(99), "an MP3 sound"),
    "WAV": (b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(99), "a WAV sound"),
}  # fmt: skip
PICTURES: dict[str, tuple[bytes, str]] = {
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG picture"),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(99), "a JPEG picture"),
    "GIF": (b"GIF89a" + bytes(99), "a GIF picture"),
    "WebP": (b"RIFF\x24\x00\x00\x00WEBPVP8 " + bytes(99), "a WebP picture"),
    "AVIF": (b"\x00\x00\x00\x20ftypavif" + bytes(99), "an AVIF picture"),
    "HEIC": (b"\x00\x00\x00\x20ftypheic" + bytes(99), "a HEIC picture"),
    "BMP": (b"BM\x36\x00\x00\x00" + bytes(99), "a BMP picture"),
    "TIFF": (b"II*\x00" + bytes(99), "a TIFF picture"),
    "PSD": (b"8BPS" + bytes(99), "a Photoshop picture"),
    "EXR": (b"v/1\x01" + bytes(99), "an OpenEXR picture"),
    "JPEG XL": (b"\xff\x0a\x00" + bytes(99), "a JPEG XL picture"),
    "MP4": (b"\x00\x00\x00\x20ftypisom" + bytes(99), "an MP4 or MOV video"),
    "Matroska": (b"\x1aE\xdf\xa3" + bytes(99), "a Matroska or WebM video"),
    "AVI": (b"RIFF\x24\x00\x00\x00AVI LIST" + bytes(99), "an AVI video"),
    "FLV": (b"FLV\x01" + bytes(99), "a Flash video"),
    "MPEG": (b"\x00\x00\x01\xba" + bytes(99), "an MPEG video"),
}
ALL = {**KINDS, **PICTURES}


def bytes_of(kind: str) -> bytes:
    content, _ = ALL[kind]
    return content if isinstance(content, bytes) else content()


@pytest.mark.parametrize("name", ["v.safetensors", "v.pth"])
@pytest.mark.parametrize("kind", ALL)
def test_as_a_vae(kind, name, tmp_path, capfd, monkeypatch):
    (tmp_path / name).write_bytes(bytes_of(kind))
    check(["inspect", str(tmp_path / name)], CheckpointError, ALL[kind][1], capfd, monkeypatch)


@pytest.mark.parametrize("name", ["z.latent", "z.npy"])
@pytest.mark.parametrize("kind", ALL)
def test_as_a_latent(kind, name, tmp_path):
    (tmp_path / name).write_bytes(bytes_of(kind))
    with pytest.raises(LatentError) as caught:
        load_latent(tmp_path / name)
    assert ALL[kind][1] in str(caught.value)
    assert ("encode it first" in str(caught.value)) == (kind in PICTURES)


def test_through_the_whole_command(tmp_path, good, capfd, monkeypatch):
    (tmp_path / "z.latent").write_bytes(bytes_of("GGUF"))
    argv = decode_argv(tmp_path / "z.latent", good, tmp_path / "o.mp4")
    check(argv, LatentError, "a GGUF file", capfd, monkeypatch)
    (tmp_path / "v.mp4").write_bytes(LFS)
    argv = encode_argv(tmp_path / "v.mp4", good, tmp_path / "o.latent")
    check(argv, LatentError, "a Git LFS pointer", capfd, monkeypatch)


# Another model by its keys and shapes: key, shape, words.
MODELS = [
    ("decoder.up_blocks.0.upsamplers.0.upscale_conv.weight", (4, 4), "a SeedVR2 VAE"),
    ("decoder.conv_in.weight", (512, 4, 3, 3), "a Stable Diffusion VAE"),
    ("decoder.conv_in.weight", (512, 16, 3, 3), "a Flux or Stable Diffusion 3"),
    ("vae.decoder.conv_in.weight", (512, 32, 3, 3), "a Flux 2"),
    ("decoder.conv_in.weight", (512, 64, 3, 3), "a HunyuanImage VAE"),
    ("decoder.conv_in.weight", (512, 32, 3, 3, 3), "a HunyuanVideo 1.5"),
    ("first_stage_model.decoder.up.0.block.0.norm1.weight", (4,), "a Stable Diffusion, SDXL"),
    ("decoder.up.0.block.0.conv1.conv.weight", (4, 4), "a HunyuanVideo VAE"),
    ("decoder.mid_block.resnets.0.norm1.norm_layer.weight", (4,), "a CogVideoX VAE"),
    ("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight", (4, 4), "an LTX-Video VAE"),
    ("decoder.mid_block.resnets.4.conv1.conv.weight", (4, 4), "an LTX-2 VAE"),
    ("decoder.22.bias", (3,), "a TAEHV preview decoder"),
    ("model.diffusion_model.blocks.0.self_attn.q.weight", (4, 4), "a Wan diffusion transformer"),
    ("blocks.0.attn1.to_q.weight", (4, 4), "a Wan diffusion transformer"),
    ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", (4, 4), "a Flux diffusion"),
    ("model.diffusion_model.input_blocks.0.0.weight", (4, 4), "a Stable Diffusion checkpoint"),
    ("lora_unet_blocks_0_self_attn_q.lora_down.weight", (4, 4), "a LoRA"),
    ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", (4, 4), "a LoRA"),
    ("text_encoder.shared.weight", (4, 4), "a T5 text encoder"),
    ("vision_model.embeddings.patch_embedding.weight", (4, 4), "a CLIP vision encoder"),
    ("model.embed_tokens.weight", (4, 4), "a language model"),
    ("latent_tensor", (1, 16, 1, 4, 4), "a latent"),
]


@pytest.mark.parametrize(("key", "shape", "words"), MODELS)
def test_another_model_by_its_own_name(key, shape, words, tmp_path):
    (tmp_path / "v.safetensors").write_bytes(save({key: torch.ones(shape)}))
    with pytest.raises(NotAWanVAEError) as caught:
        load_checkpoint(tmp_path / "v.safetensors")
    assert f"this is {words}" in str(caught.value)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(sorted(ALL)),
    tail=st.binary(max_size=40),
    cut=st.integers(0, 60),
    name=st.sampled_from(["v.safetensors", "v.pth", "v.gguf", "v.bin", "v", "ä v.npz", "v.npy"]),
)
def test_whatever_follows_every_reader_has_a_typed_error(kind, tail, cut, name, tmp_path):
    path = tmp_path / name
    content = bytes_of(kind)
    path.write_bytes(content[: len(content) - cut] + tail)
    kind_of(path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    with pytest.raises(LatentError):
        load_latent(path)


# -- formats x dtypes x layouts x names ------------------------------------------------------------

WRITERS: dict[str, Callable[[torch.Tensor], bytes]] = {
    "comfyui": lambda z: save({"latent_tensor": z, "latent_format_version_0": torch.empty(0)}),
    "one tensor": lambda z: save({"video_latent": z}),
    "pt": lambda z: _saved(z),
    "pt of a dict": lambda z: _saved({"latents": z, "fps": 16}),
    "pt of a list": lambda z: _saved([z]),
    "pt of a dict in a dict": lambda z: _saved({"seed": 1, "latent": {"samples": z}}),
    "pt of a LATENT with a mask": lambda z: _saved(
        {"latent": {"samples": z, "noise_mask": torch.ones(1, 1, 1, 2, 2)}}
    ),
    "npy": lambda z: _numpy(np.save, z),
    "npz": lambda z: _numpy(np.savez, z),
}


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _numpy(write: Callable[..., None], z: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    write(buffer, z.numpy() if z.dtype != torch.bfloat16 else z.float().numpy())
    return buffer.getvalue()


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    writer=st.sampled_from(sorted(WRITERS)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    shape=st.sampled_from([
        ((1, 16, 2, 3, 4), (1, 16, 2, 3, 4)),
        ((2, 48, 1, 3, 4), (2, 48, 1, 3, 4)),
        ((3, 16, 5, 4), (3, 16, 1, 5, 4)),
        ((16, 3, 5, 4), (1, 16, 3, 5, 4)),
        ((64, 5, 4), (1, 64, 1, 5, 4)),
    ]),
    name=st.sampled_from(["z.latent", "z.safetensors", "z.pt", "z", "my clip ü.bin", "z.npy"]),
)  # fmt: skip
def test_a_latent_is_read_for_what_it_is(writer, dtype, shape, name, tmp_path):
    stored, expected = shape
    if writer == "comfyui" and stored == (16, 3, 5, 4):
        expected = (16, 3, 1, 5, 4)  # ComfyUI writes no video without a batch
    z = torch.arange(float(np.prod(stored))).view(stored).to(dtype)
    (tmp_path / name).write_bytes(WRITERS[writer](z))
    got = load_latent(tmp_path / name)
    assert got.shape == expected and got.dtype == torch.float32
    assert torch.equal(got.flatten(), z.float().flatten())


def graph(source: str, **inputs: str) -> dict[str, str]:
    """The graph that ComfyUI writes beside a latent which node `source` made."""
    nodes = {
        "3": {"class_type": source, "inputs": inputs},
        "4": {"class_type": "SaveLatent", "inputs": {"samples": ["3", 0]}},
    }
    return {"prompt": json.dumps(nodes)}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (graph("WanVideoSampler"), True),
        (graph("WanVideoSamplerv2"), True),
        (graph("WanVideoEncode"), True),
        (graph("WanVideoLatentReScale", direction="comfy_to_wrapper"), True),
        (graph("WanVideoLatentReScale", direction="wrapper_to_comfy"), None),
        (graph("WanVideoLatentReScale"), None),
        (graph("KSampler"), None),
        ({"prompt": "[" * 5000}, None),
        ({"prompt": '{"4": {"class_type": "SaveLatent"}}'}, None),
        ({}, None),
    ],
    ids=str,
)
def test_latents_of_the_wrapper_are_read_as_normalised(metadata, expected, tmp_path):
    tensors = {"latent_tensor": torch.zeros(1, 16, 1, 4, 4), "latent_format_version_0": Z0}
    (tmp_path / "z.latent").write_bytes(save(tensors, metadata))
    found = read_latent(tmp_path / "z.latent")
    assert found.is_normalized is expected
    assert len(found.notes) == (1 if expected else 0)


Z0 = torch.empty(0)


def test_what_musubi_tuner_generates_is_normalised(tmp_path):
    """`--output_type latent`: [z, T, H, W] under "latent", with its settings."""
    settings = {"seeds": "1", "infer_steps": "20", "guidance_scale": "5.0", "prompt": "a cat"}
    z = torch.randn(16, 2, 4, 4)
    (tmp_path / "z.safetensors").write_bytes(save({"latent": z}, settings))
    found = read_latent(tmp_path / "z.safetensors")
    assert torch.equal(found.latent, z[None]) and found.is_normalized is True
    (tmp_path / "other.safetensors").write_bytes(save({"latent": z}, {"prompt": "a cat"}))
    assert read_latent(tmp_path / "other.safetensors").is_normalized is None
