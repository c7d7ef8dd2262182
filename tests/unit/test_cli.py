"""The command line as a user types it: files in, files out, exit codes, one progress bar."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import wan_vae
from tests.conftest import random_state
from wan_vae.commands import console
from wan_vae.commands.cli import main
from wan_vae.config import WAN21_MEAN, WAN21_STD, wan21, wan22
from wan_vae.errors import OutputError
from wan_vae.io import video_read, video_write
from wan_vae.io.latents import load_latent, save_latent

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """vae.safetensors, clip.latent (9 frames, 48x40), image.latent, and their pixels."""
    folder = tmp_path_factory.mktemp("files")
    save_file(random_state(wan21(dim=8)), str(folder / "vae.safetensors"))
    vae = wan_vae.load(folder / "vae.safetensors", device="cpu")
    normal = torch.randn(1, 16, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    save_file({"latents": normal}, str(folder / "normalized.safetensors"))
    # With the statistics of a real one, or each decode would say that it has others.
    mean, std = (torch.tensor(x).view(1, 16, 1, 1, 1) for x in (WAN21_MEAN, WAN21_STD))
    z = normal * std + mean
    for name, latent in (("clip", z), ("image", z[:, :, :1])):
        save_latent(folder / f"{name}.latent", latent)
        save_file({"pixels": vae.decode(latent)}, str(folder / f"{name}_pixels.safetensors"))
    np.save(folder / "clip.npy", z.numpy())
    save_file({"samples": z}, str(folder / "clip.safetensors"))
    return folder


def decode(files: Path, latent: str, output: Path, *options: str) -> int:
    vae = str(files / "vae.safetensors")
    return main(["decode", str(files / latent), "--vae", vae, "-o", str(output), *CPU, *options])


def test_a_latent_of_the_other_kind_is_told(files, tmp_path, capfd):
    """Colours would be off by 19 levels without a word."""
    assert decode(files, "normalized.safetensors", tmp_path / "a.safetensors") == 0
    assert "warning: the latent looks normalised" in capfd.readouterr().err
    assert decode(files, "normalized.safetensors", tmp_path / "b.safetensors", "--normalized") == 0
    assert decode(files, "clip.latent", tmp_path / "c.safetensors") == 0
    assert "looks" not in capfd.readouterr().err
    right, wrong = (load_file(tmp_path / f"{name}.safetensors")["pixels"] for name in "ba")
    assert torch.allclose(right, pixels_of(files, "clip"), atol=1e-4)
    assert not torch.allclose(wrong, right, atol=0.1)


def pixels_of(files: Path, name: str) -> torch.Tensor:
    return load_file(files / f"{name}_pixels.safetensors")["pixels"]


@pytest.mark.parametrize("latent", ["clip.latent", "clip.npy", "clip.safetensors"])
def test_decode_to_tensors_is_exact_for_each_kind_of_latent(latent, files, tmp_path):
    assert decode(files, latent, tmp_path / "new" / "out.safetensors") == 0
    got = load_file(tmp_path / "new" / "out.safetensors")["pixels"]
    assert torch.equal(got, pixels_of(files, "clip"))


def test_decode_to_a_folder_of_frames_is_exact_to_eight_bits(files, tmp_path):
    assert decode(files, "clip.latent", tmp_path / "frames") == 0
    names = sorted(p.name for p in (tmp_path / "frames").iterdir())
    assert names == [f"frame_{i:06d}.png" for i in range(9)]
    expected = video_write.to_uint8(pixels_of(files, "clip")[0])
    for name, frame in zip(names, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "frames" / name)), frame)


def test_decode_replaces_an_older_folder_of_frames(files, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    (frames / "frame_000099.png").write_bytes(b"of an earlier, longer clip")
    assert decode(files, "clip.latent", frames, "--force") == 0
    assert len(list(frames.iterdir())) == 9


def test_decode_to_one_image(files, tmp_path):
    assert decode(files, "image.latent", tmp_path / "out.png") == 0
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    assert np.array_equal(picture, video_write.to_uint8(pixels_of(files, "image")[0])[0])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_decode_to_video_and_back(suffix, files, tmp_path):
    import av

    assert decode(files, "clip.latent", tmp_path / f"out{suffix}", "--fps", "23.976") == 0
    with av.open(str(tmp_path / f"out{suffix}")) as file:
        stream = file.streams.video[0]
        assert (stream.width, stream.height, stream.pix_fmt) == (40, 48, "yuv420p")
        assert float(stream.average_rate) == pytest.approx(23.976, abs=1e-3)
        assert stream.codec_context.colorspace == 1, "players must not guess BT.601"
    read = video_read.read_pixels(tmp_path / f"out{suffix}")
    expected = pixels_of(files, "clip")
    assert read.shape == expected.shape
    # Random weights give noise, and yuv420p keeps colour at half size: compare brightness.
    luma = torch.tensor([0.2126, 0.7152, 0.0722]).view(1, 3, 1, 1, 1)
    difference = ((read - expected) * luma).sum(1)
    assert difference.abs().mean() < 0.04
    swapped = ((read.flip(1) - expected) * luma).sum(1)
    assert swapped.abs().mean() > 2 * difference.abs().mean(), "the bound tells colours apart"


def test_strips_chunks_and_formats_of_the_command_line_give_the_same_picture(files, tmp_path):
    options = ("--strips", "3", "--chunk-frames", "1", "--memory-format", "channels_last_3d")
    assert decode(files, "clip.latent", tmp_path / "out.safetensors", *options) == 0
    got = load_file(tmp_path / "out.safetensors")["pixels"]
    expected = pixels_of(files, "clip")
    assert (got - expected).norm() / expected.norm() < 1e-5


def test_normalized_latents_differ_by_the_models_statistics(files, tmp_path):
    z = load_latent(files / "clip.latent")
    config = wan21()
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    save_latent(tmp_path / "n.latent", (z - mean) / std)
    argv = ["decode", str(tmp_path / "n.latent"), "--vae", str(files / "vae.safetensors")]
    assert main([*argv, "-o", str(tmp_path / "o.safetensors"), "--normalized", *CPU]) == 0
    got = load_file(tmp_path / "o.safetensors")["pixels"]
    assert torch.allclose(got, pixels_of(files, "clip"), atol=1e-4)


def video_facts(path: Path) -> tuple[float, int]:
    import av

    with av.open(str(path)) as file:
        return float(file.streams.video[0].average_rate), sum(1 for _ in file.decode(video=0))


@pytest.mark.parametrize(("suffix", "names"), [
    (".mp4", ["out_000.mp4", "out_001.mp4"]), ("", ["out_000", "out_001"]),
    (".safetensors", ["out.safetensors"]),
])  # fmt: skip
def test_a_batch_gets_an_output_each(suffix, names, files, tmp_path):
    z = load_latent(files / "clip.latent")
    save_latent(tmp_path / "two.latent", torch.cat((z, -z)))
    output = tmp_path / "new" / f"out{suffix}"
    vae = str(files / "vae.safetensors")
    argv = ["decode", str(tmp_path / "two.latent"), "--vae", vae, "-o", str(output), *CPU]
    assert main(argv) == 0
    assert sorted(p.name for p in output.parent.iterdir()) == names
    if suffix == ".safetensors":
        assert load_file(output)["pixels"].shape == (2, 3, 9, 48, 40)
    elif not suffix:
        right = video_write.to_uint8(wan_vae.load(vae, device="cpu").decode(-z)[0])
        shown = np.asarray(Image.open(output.parent / "out_001" / "frame_000008.png"))
        assert np.array_equal(shown, right[8])


@pytest.mark.parametrize(("config", "rate"), [(wan21(dim=8), 16), (wan22(8, 16), 24)])
def test_the_frame_rate_is_the_models(config, rate, tmp_path, capfd):
    save_file(random_state(config), str(tmp_path / "vae.safetensors"))
    save_latent(tmp_path / "z.latent", torch.zeros(1, config.z_dim, 2, 2, 2))
    argv = ["decode", str(tmp_path / "z.latent"), "--vae", str(tmp_path / "vae.safetensors"), *CPU]
    assert main([*argv, "-o", str(tmp_path / "o.mp4")]) == 0
    assert video_facts(tmp_path / "o.mp4") == (rate, 5)
    assert f"{rate} frames per second, as {config.family} makes them" in capfd.readouterr().out
    assert main([*argv, "-o", str(tmp_path / "p.mp4"), "--fps", "12"]) == 0
    assert video_facts(tmp_path / "p.mp4") == (12, 5)
    assert "makes them" not in capfd.readouterr().out


def test_a_cache_of_musubi_tuner_is_denormalised(files, tmp_path, capfd):
    z = load_latent(files / "clip.latent")
    config = wan21()
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    cached = {
        "latents_3x6x5_float32": ((z - mean) / std)[0],
        "latents_image_3x6x5_float32": torch.zeros(16, 3, 6, 5),
        "clip_float32": torch.zeros(257, 8),
    }
    save_file(cached, tmp_path / "a_0000-009_0040x0048_wan.safetensors", {"architecture": "wan"})
    argv = ["decode", str(tmp_path / "a_0000-009_0040x0048_wan.safetensors")]
    argv += ["--vae", str(files / "vae.safetensors"), *CPU, "-o"]
    assert main([*argv, str(tmp_path / "o.safetensors")]) == 0
    got = load_file(tmp_path / "o.safetensors")["pixels"]
    assert torch.allclose(got, pixels_of(files, "clip"), atol=1e-4)
    assert "musubi-tuner cache: a normalised latent" in capfd.readouterr().err
    key = ["--key", "latents_image_3x6x5_float32"]
    assert main([*argv, str(tmp_path / "p.safetensors"), *key]) == 0
    vae = wan_vae.load(files / "vae.safetensors", device="cpu")
    expected = vae.decode(torch.zeros(1, 16, 3, 6, 5), normalized=True)
    assert torch.equal(load_file(tmp_path / "p.safetensors")["pixels"], expected)
    assert main([*argv, str(tmp_path / "q.safetensors"), "--key", "nothing"]) == 1
    assert "no tensor 'nothing': it holds clip_float32 [257, 8]" in capfd.readouterr().err


@pytest.mark.parametrize(("channels", "kept"), [(1, (3, 3)), (4, (3, 4))])
def test_grey_pictures_and_alpha_in_files(channels, kept, tmp_path, capfd):
    """A video is flattened on white, and says so; frames keep their alpha; grey is repeated."""
    config = replace(wan21(dim=8), decoder_colours=channels)
    save_file(random_state(config), str(tmp_path / "vae.safetensors"))
    vae = wan_vae.load(tmp_path / "vae.safetensors", device="cpu")
    z = torch.randn(1, 16, 1, 4, 4)
    save_latent(tmp_path / "z.latent", z)
    argv = ["decode", str(tmp_path / "z.latent"), "--vae", str(tmp_path / "vae.safetensors"), *CPU]
    for name in ("o.mp4", "o.png", "o.safetensors"):
        assert main([*argv, "-o", str(tmp_path / name)]) == 0
    pixels = vae.decode(z)
    assert torch.equal(load_file(tmp_path / "o.safetensors")["pixels"], pixels)
    levels = video_write.to_uint8(pixels[0])[0]
    picture = np.asarray(Image.open(tmp_path / "o.png"))
    assert picture.shape[2] == kept[1]
    assert np.array_equal(picture, levels if channels == 4 else np.repeat(levels, 3, axis=2))
    said = capfd.readouterr().err
    assert ("flattened on white" in said) == (channels == 4)
    shown = video_read.read_pixels(tmp_path / "o.mp4")
    if channels == 4:
        opacity = (pixels[:, 3:] + 1) / 2
        pixels = pixels[:, :3] * opacity + 1 - opacity
    assert (shown.mean() - pixels.mean()).abs() < 0.02


def test_encode_writes_a_latent_that_decode_takes(files, tmp_path):
    video_file, latent = tmp_path / "v.mp4", tmp_path / "new" / "z.latent"
    assert decode(files, "clip.latent", video_file) == 0
    vae = str(files / "vae.safetensors")
    assert main(["encode", str(video_file), "--vae", vae, "-o", str(latent), *CPU]) == 0
    expected = wan_vae.load(vae, device="cpu").encode(video_read.read_pixels(video_file))
    assert torch.equal(load_latent(latent), expected)
    assert expected.shape == (1, 16, 3, 6, 5)
    assert decode(files, "clip.latent", tmp_path / "p.safetensors") == 0
    # Whoever may read the video may read these.
    modes = {path.stat().st_mode for path in (video_file, latent, tmp_path / "p.safetensors")}
    assert len(modes) == 1


def test_several_latents_one_bad(files, tmp_path, capsys):
    bad = tmp_path / "bad.latent"
    bad.write_bytes(b"nothing")
    vae = str(files / "vae.safetensors")
    latents = [str(files / "clip.latent"), str(bad), str(files / "image.latent")]
    assert main(["decode", *latents, "--vae", vae, "-o", str(tmp_path / "out"), *CPU]) == 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["clip.mp4", "image.mp4"]
    captured = capsys.readouterr()
    assert "2 of 3 latents decoded" in captured.out
    assert f"wan-vae: {bad}: " in captured.err


def test_progress_counts_frames_on_stderr_and_the_report_goes_to_stdout(files, tmp_path, capfd):
    assert decode(files, "clip.latent", tmp_path / "o.mp4", "--chunk-frames", "1") == 0
    captured = capfd.readouterr()
    assert "9/9" in captured.err
    for word in ("wan2.1", "layout", "contiguous", "(should be 0): 0", "frames/s"):
        assert word in captured.out


@pytest.mark.parametrize("output", ["o.mp4", "o.safetensors", "frames"])
def test_interrupting_leaves_nothing_behind(output, files, tmp_path, monkeypatch, capsys):
    def interrupted(self, done, total, report):
        raise KeyboardInterrupt

    monkeypatch.setattr(console.ProgressBar, "__call__", interrupted)
    assert decode(files, "clip.latent", tmp_path / output, "--chunk-frames", "1") == 130
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err.strip().endswith("wan-vae: interrupted")


def test_an_odd_sized_video_gains_a_row_and_says_so(tmp_path):
    sink = video_write.VideoFileSink(tmp_path / "o.mp4", 5, 7, 16)
    sink.write(torch.zeros(1, 3, 2, 5, 7), 0, 0)
    sink.close()
    assert video_read.read_pixels(tmp_path / "o.mp4").shape == (1, 3, 2, 6, 8)
    assert "7x5 is odd" in sink.warnings[0]


def test_inspect_as_text_and_as_json(files, capsys):
    assert main(["inspect", str(files / "vae.safetensors"), "--layers"]) == 0
    text = capsys.readouterr().out
    assert "decoder.conv1" in text and "contiguous" in text
    assert main(["inspect", str(files / "vae.safetensors"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == "wan_vae.report/1"
    assert report["config"]["family"] == "wan2.1"
    assert len(report["layers"]) > 60


def test_doctor_says_what_is_right_here(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out
    assert out.count("right") >= 4
    assert "WRONG" not in out


def test_doctor_reports_a_wrong_convolution(monkeypatch, capsys):
    """Planted: a convolution that is wrong for NDHWC input, as MPS had it."""
    from wan_vae.commands import doctor

    real = doctor.F.conv3d

    def broken(x, weight, **options):
        y = real(x, weight, **options)
        wrong = x.dtype == torch.float32 and not x.is_contiguous()
        return y.roll(1, dims=-1) if wrong else y

    monkeypatch.setattr(doctor.F, "conv3d", broken)
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(("fails", "code"), [("channels last", 0), ("all", 1), ("kernels", 0)])
def test_doctor_reports_what_cannot_run(fails, code, monkeypatch, capsys):
    """Planted: a device without an operator, and kernels that cannot be checked."""
    from wan_vae.commands import doctor

    real = doctor.F.conv3d

    def missing(x, weight, **options):
        if x.dtype == torch.float32 and (fails == "all" or not x.is_contiguous()):
            raise NotImplementedError("conv3d is not here\nmore lines")
        return real(x, weight, **options)

    def broken(device):
        raise RuntimeError("CUDA error: no kernel image")

    if fails == "kernels":
        monkeypatch.setattr(doctor, "check_kernels", broken)
    else:
        monkeypatch.setattr(doctor.F, "conv3d", missing)
    assert main(["doctor", "--device", "cpu"]) == code
    out = capsys.readouterr().out
    number = {"channels last": 2, "all": 4, "kernels": 0}[fails]
    assert out.count("cannot run: conv3d is not here\n") == number
    assert out.count("right") == 4 - number
    assert ("kernels: cannot be checked: CUDA error: no kernel image" in out) == (not number)


def test_inspect_prints_the_plan_that_a_decode_executes(files, capsys):
    argv = ["inspect", str(files / "vae.safetensors"), "--plan", str(files / "clip.latent"), *CPU]
    options = ["--chunk-frames", "1", "--strips", "2", "--free-bytes", "1e9"]
    assert main([*argv, *options, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    vae = wan_vae.load(files / "vae.safetensors", device="cpu")
    latent = load_latent(files / "clip.latent")
    expected = vae.plan(tuple(latent.shape), chunk_frames=1, strips=2, free_bytes=1e9)
    assert plan == json.loads(json.dumps(expected.as_dict()))
    vae.decode(latent, plan=expected)
    assert vae.last_report.memory.planned_bytes == plan["planned_bytes"]
    assert main([*argv, *options, "--layers"]) == 0
    text = capsys.readouterr().out
    for words in (
        "chunks    3 (latent frames: 3 x 1)",
        "strips    2, ",
        "layer     decoder.conv1 ",
    ):
        assert words in text


def test_a_latent_of_another_model_has_no_plan(files, tmp_path, capsys):
    save_latent(tmp_path / "z.latent", torch.zeros(1, 48, 1, 2, 2))
    argv = ["inspect", str(files / "vae.safetensors"), "--plan", str(tmp_path / "z.latent"), *CPU]
    assert main(argv) == 1
    assert "48 channels" in capsys.readouterr().err


def test_options_of_a_plan_without_a_plan_are_wrong_usage(files, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(files / "vae.safetensors"), "--strips", "2"])
    assert stopped.value.code == 2
    assert "--strips is an option of --plan LATENT" in capsys.readouterr().err


def test_a_vae_without_a_measurement_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--vae", "v.safetensors"])
    assert stopped.value.code == 2
    assert "--vae is an option of --share" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "advice"),
    [
        ("--device", "gpu", "expected cpu, cuda,"),
        ("--backend", "triton", "take auto, or eager"),
    ],
)
def test_what_is_not_here_is_said_with_what_to_take_instead(
    option, value, advice, files, tmp_path, capsys
):
    assert decode(files, "clip.latent", tmp_path / "out.mp4", option, value) == 1
    assert advice in capsys.readouterr().err


@pytest.mark.parametrize("name", ["decode", "encode", "inspect", "demo", "doctor", "warm", "bench"])
def test_help_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"wan-vae {name}" in capsys.readouterr().out.split("example")[-1]


@pytest.mark.parametrize(
    "module, package, command",
    [
        ("av", "av", ["demo", "--output", "out"]),
        ("PIL.Image", "Pillow", ["demo", "--output", "out"]),
        ("av", "av", ["decode", "z.latent", "--vae", "v.safetensors", "-o", "out/o.mp4"]),
        (
            "PIL.Image",
            "Pillow",
            ["decode", "z.latent", "--vae", "v.safetensors", "-o", "out/o.png"],
        ),
        ("PIL.Image", "Pillow", ["decode", "z.latent", "--vae", "v.safetensors", "-o", "out"]),
        ("av", "av", ["encode", "in.mp4", "--vae", "v.safetensors", "-o", "out/z.latent"]),
        (
            "PIL.Image",
            "Pillow",
            ["encode", "in.png", "--vae", "v.safetensors", "-o", "out/z.latent"],
        ),
    ],
)
def test_a_package_that_is_missing_is_one_line_that_says_what_to_install(
    module, package, command, tmp_path, monkeypatch, capsys
):
    """Before anything is loaded: of the files that these commands name, none is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    Path("in.mp4").write_bytes(b"\x00\x00\x00\x20ftypisom")
    Path("in.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert main([*command, *CPU]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wan-vae: ") and line.endswith(f": pip install {package}")
    assert f"needs {package}, which cannot be imported" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "in.png"]


def test_a_sink_of_the_library_says_so_too(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(OutputError, match=r"o\.mp4: needs av.*pip install av"):
        video_write.VideoFileSink(tmp_path / "o.mp4", 16, 16, 16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "module", [pytest.param("tqdm", marks=pytest.mark.full), "numpy", "safetensors"]
)
def test_what_was_left_out_with_the_dependencies_is_one_line(module, files, tmp_path):
    (tmp_path / f"{module}.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{module}'\", name='{module}')\n"
    )
    root = Path(wan_vae.__file__).resolve().parents[1]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "wan_vae",
            "decode",
            str(files / "clip.latent"),
            "--vae",
            str(files / "vae.safetensors"),
            "-o",
            "o.mp4",
            *CPU,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])},
    )
    assert done.returncode == 1
    assert done.stderr == f"wan-vae: {module} is missing: pip install {module}\n"
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".mp4"] == []


def test_python_m_wan_vae_and_importing_it_is_quick_and_quiet():
    """The command starts without ComfyUI, PyAV or Triton being imported."""
    code = (
        "import sys, wan_vae; "
        "print([m for m in ('av', 'PIL', 'triton', 'diffusers', 'comfy') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
    done = subprocess.run(
        [sys.executable, "-m", "wan_vae", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"wan-vae {wan_vae.__version__}"
