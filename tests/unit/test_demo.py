"""The miniature VAE and the sample latents: the picture that comes out is the one that went in."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import wan_vae
from examples import thumbnails
from examples.evaluate_mini_vae import psnr
from examples.scenes import Scenes
from wan_vae import geometry
from wan_vae.commands import demo as demo_command
from wan_vae.commands.cli import main
from wan_vae.io.latents import load_latent
from wan_vae.io.sink import TensorSink

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAMPLES = sorted(path.stem for path in (EXAMPLES / "latents").glob("*.latent"))
# The largest sample takes most of the time: of it, the first latent frames are decoded, and once.
# No frame depends on a later one.
LARGEST, BEGIN = "cat_416x240_17f", 2
QUICK = [name for name in SAMPLES if name != LARGEST]


@dataclass
class Demo:
    """One run of `wan-vae demo --garble`: its folder, what it printed, and the decoded pixels."""

    folder: Path
    stdout: str = ""
    stderr: str = ""
    pixels: dict[str, torch.Tensor] = field(default_factory=dict)


@pytest.fixture(scope="module")
def mini():
    return wan_vae.load(EXAMPLES / "wan_vae_mini.safetensors", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    """The demo, run once, with the start of the largest sample.

    The picture of garbled bytes is drawn from it.
    """
    run = Demo(tmp_path_factory.mktemp("demo"))
    decode_to_file = demo_command.decode_to_file

    def decode_and_keep(vae, latent, output, options, extra=()):
        shape = geometry.pixel_shape(tuple(latent.shape), vae.config)
        pixels = run.pixels[output.stem] = torch.empty(shape)
        extra = (*extra, TensorSink(pixels))
        return decode_to_file(vae, latent, output, options, extra=extra)

    def load_begin(path):
        latent = load_latent(path)
        return latent[:, :, :BEGIN] if path.stem == LARGEST else latent

    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(demo_command, "decode_to_file", decode_and_keep)
        patch.setattr(demo_command, "load_latent", load_begin)
        argv = ["demo", "--output", str(run.folder), "--garble", "--device", "cpu"]
        assert main(argv) == 0
    run.stdout, run.stderr = stdout.getvalue(), stderr.getvalue()
    return run


@pytest.fixture(scope="module")
def decoded(demo) -> dict[str, torch.Tensor]:
    """Name -> pixels of each sample."""
    assert sorted(demo.pixels) == SAMPLES
    return demo.pixels


def raw_bytes(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense NDHWC tensor read as NCDHW: what an unguarded collective delivers."""
    return x.permute(0, 2, 3, 4, 1).contiguous().view(x.shape)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, mini) -> dict[str, Path]:
    """Name -> thumbnails of each sample; of the largest one, those of the frames that we decode."""
    files = {name: EXAMPLES / "thumbnails" / f"{name}.png" for name in SAMPLES}
    begin = tmp_path_factory.mktemp("thumbnails") / f"{LARGEST}.png"
    with Image.open(files[LARGEST]) as frames:
        all_frames, some = (
            geometry.pixel_frames(count, mini.config)
            for count in (load_latent(EXAMPLES / "latents" / f"{LARGEST}.latent").shape[2], BEGIN)
        )
        frames.crop((0, 0, frames.width // all_frames * some, frames.height)).save(begin)
    return files | {LARGEST: begin}


def test_what_is_shipped_is_small_and_complete():
    assert len(SAMPLES) == 3
    assert (EXAMPLES / "wan_vae_mini.safetensors").stat().st_size < 8e6
    assert sum(p.stat().st_size for p in (EXAMPLES / "latents").iterdir()) < 500_000
    shapes = [load_latent(EXAMPLES / "latents" / f"{name}.latent").shape for name in SAMPLES]
    assert any(s[2] == 1 for s in shapes), "one sample is an image"
    assert any(s[3] % 2 and s[4] % 2 for s in shapes), "one sample has odd latent sides"


def test_the_demo_writes_what_the_readme_says(demo):
    names = {p.name for p in demo.folder.iterdir()}
    assert {n.split(".")[-1] for n in names} == {"mp4", "png", "json"}
    reports = json.loads((demo.folder / "layout_report.json").read_text())
    assert sorted(reports) == SAMPLES
    assert {r["layout"]["mixed_calls"] for r in reports.values()} == {0}
    assert "right_and_garbled.png" in names
    assert sum("contact_sheet" in n for n in names) == 2
    assert "layout" in demo.stdout and "(should be 0): 0" in demo.stdout
    assert "13/13" in demo.stderr


def test_the_garbled_picture_is_wrong_in_the_rows_of_the_second_rank_alone(demo):
    picture = np.asarray(Image.open(demo.folder / "right_and_garbled.png")).astype(np.float32)
    right, garbled = np.split(picture, 2, axis=1)
    difference, height = np.abs(right - garbled), len(right)
    assert difference[: height // 3].mean() < 1, "the first rank's rows are right"
    assert difference[2 * height // 3 :].mean() > 30, "the second rank's are not"


def test_the_miniature_has_the_real_architecture(mini):
    assert mini.config.family == "wan2.1"
    assert (mini.config.z_dim, mini.config.dim, mini.config.dim_mult) == (16, 16, (1, 2, 4, 4))


# Floors about 2 dB below what these weights gave on these clips in float32 on the CPU: 23.5 and
# 31.0 dB for the videos, 26.8 and 36.1 dB for the images.
@pytest.mark.parametrize(
    ("kind", "frames", "floor"),
    [
        ("shapes", 9, 21.5),
        pytest.param("textures", 9, 29.0, marks=pytest.mark.full),
        ("shapes", 1, 24.5),
        ("textures", 1, 34.0),
    ],
)
def test_decoding_an_encoded_clip_gives_the_clip(mini, kind, frames, floor):
    clip = getattr(Scenes(5_000_011, torch.device("cpu")), kind)(frames, 96, 128)[None]
    assert psnr(mini.decode(mini.encode(clip)), clip) > floor


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_decode_to_the_stored_thumbnails(decoded, stored, name):
    assert thumbnails.difference(stored[name], decoded[name]) < thumbnails.TOLERANCE_LEVELS


@pytest.mark.full
def test_the_largest_sample_decodes_to_its_thumbnails_to_the_end(mini):
    pixels = mini.decode(load_latent(EXAMPLES / "latents" / f"{LARGEST}.latent"))
    path = EXAMPLES / "thumbnails" / f"{LARGEST}.png"
    assert thumbnails.difference(path, pixels) < thumbnails.TOLERANCE_LEVELS


# The clip only where there is time: in bfloat16 a CPU takes ten times as long as in float32.
image_first = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.full if n.endswith("f") else ()) for n in QUICK]
)


@image_first
def test_bfloat16_stays_within_the_tolerance(mini, stored, name):
    latent = load_latent(EXAMPLES / "latents" / f"{name}.latent")
    pixels = mini.decode(latent, precision="bf16")
    assert thumbnails.difference(stored[name], pixels) < thumbnails.TOLERANCE_LEVELS


@image_first
def test_a_latent_garbled_as_raw_bytes_fails_the_comparison(mini, stored, name):
    latent = load_latent(EXAMPLES / "latents" / f"{name}.latent")
    pixels = mini.decode(raw_bytes(latent))
    assert thumbnails.difference(stored[name], pixels) > 2 * thumbnails.TOLERANCE_LEVELS


@pytest.mark.parametrize("name", SAMPLES)
def test_a_quarter_of_the_rows_garbled_fails_the_comparison(decoded, stored, name):
    pixels = decoded[name].clone()
    rows = 3 * pixels.shape[3] // 4
    pixels[:, :, :, rows:] = raw_bytes(pixels[:, :, :, rows:])
    assert thumbnails.difference(stored[name], pixels) > 2 * thumbnails.TOLERANCE_LEVELS


@pytest.mark.parametrize("name", SAMPLES)
def test_swapped_colours_fail_the_comparison(decoded, stored, name):
    wrong = decoded[name].flip(1)
    assert thumbnails.difference(stored[name], wrong) > 2 * thumbnails.TOLERANCE_LEVELS


def test_a_clip_of_another_length_is_refused(decoded, stored):
    name = next(n for n in SAMPLES if decoded[n].shape[2] > 1)
    with pytest.raises(ValueError, match="thumbnails are"):
        thumbnails.difference(stored[name], decoded[name][:, :, :-1])
