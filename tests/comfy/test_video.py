"""Videos out of a running ComfyUI, read back with PyAV: frames, colours, tags, names, sound."""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import wan_vae
from tests.comfy.graphs import decode, latent, load_vae, node, write_vaes
from tests.comfy.server import Comfy, Run
from tests.comfy.test_mini_vae import EXAMPLES, MINI
from tests.comfy.test_other_nodes import failed
from wan_vae.io.latents import load_latent, save_latent

pytestmark = pytest.mark.comfy

SMALL = "small.latent"


REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def sample(comfy) -> torch.Tensor:
    """The miniature VAE, and a corner of a sample latent; its frames [9, H, W, 3] in levels."""
    shutil.copyfile(EXAMPLES / MINI, comfy.base / "models" / "vae" / MINI)
    whole = load_latent(EXAMPLES / "latents" / "shapes_200x136_13f.latent")
    corner = whole[:, :, :3, 2:9, 4:14].contiguous()
    save_latent(comfy.base / "input" / SMALL, corner)
    pixels = wan_vae.load(EXAMPLES / MINI, "cpu").decode(corner)
    return (pixels[0].permute(1, 2, 3, 0) + 1).mul(127.5).numpy()


def prompt(class_type: str = "WanVAEDecodeToVideo", **inputs) -> dict:
    """A video of the sample (node 3)."""
    if class_type == "WanVAEDecodeToVideo":
        inputs = {"filename_prefix": f"video/{uuid.uuid4().hex}", **inputs}
    return {
        "1": load_vae(MINI),
        "2": node("LoadLatent", latent=SMALL),
        "3": node(class_type, vae=["1", 0], samples=["2", 0], **{"fps": 16.0, **inputs}),
    }


def saved(comfy, run: Run, place: str = "3") -> Path:
    """The only file that a node says it has saved."""
    assert run.error is None, run.error
    (shown,) = run.outputs[place]["images"]
    return comfy.base / shown["type"] / shown["subfolder"] / shown["filename"]


def frames(path: Path) -> np.ndarray:
    """[t, H, W, 3] in levels, read as ComfyUI reads videos."""
    with av.open(str(path)) as file:
        return np.stack([f.to_ndarray(format="gbrpf32le") for f in file.decode(video=0)]) * 255


PNGINFO = {"workflow": {"id": "w", "nodes": [{"title": "ä"}]}}


def test_the_file_holds_frames_colours_workflow_and_prompt(comfy, sample):
    made = prompt()
    run = comfy.run(made, pnginfo=PNGINFO)
    path = saved(comfy, run)
    assert np.abs(frames(path) - sample).mean() < 2
    assert frames(path).shape == sample.shape
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "it plays while it loads"
    with av.open(str(path)) as file:
        assert json.loads(file.metadata["workflow"]) == PNGINFO["workflow"]
        assert json.loads(file.metadata["prompt"])["3"]["inputs"] == made["3"]["inputs"]
        assert file.streams.video[0].codec.name == "h264"
        assert float(file.duration / av.time_base) == pytest.approx(9 / 16, abs=0.01)
    video = run.report("3")["video"]
    assert (video["encoder"], video["frames"], video["fps"]) == ("libx264", 9, 16)


@pytest.mark.parametrize(
    ("options", "suffix", "codec", "pixel_format"),
    [
        ({"format": "webm", "crf": 12.0}, ".webm", "av1", "yuv420p"),
        ({"format": "mkv", "bit_depth": 10, "save_to": "temp"}, ".mkv", "h264", "yuv420p10le"),
    ],
)
def test_the_options_of_save_video(comfy, sample, options, suffix, codec, pixel_format):
    made = prompt(**options, audio=["4", 0])
    made["4"] = node("ProbeSound", seconds=9.0, rate=22050)
    path = saved(comfy, comfy.run(made))
    assert path.suffix == suffix
    assert np.abs(frames(path) - sample).mean() < 2
    with av.open(str(path)) as file:
        assert file.streams.video[0].codec.canonical_name == codec
        assert file.streams.video[0].codec_context.pix_fmt == pixel_format
        sound = file.streams.audio[0]
        assert sum(f.samples for f in file.decode(sound)) / sound.rate == pytest.approx(
            9 / 16, abs=0.1
        )


@pytest.fixture(scope="module")
def nested(comfy) -> bool:
    """Whether this ComfyUI's Save Video nests its options, and so our node too."""
    kinds = [
        comfy.get(f"/object_info/{name}")[name]["input"][place]["format"][0]
        for name, place in (("SaveVideo", "required"), ("WanVAEDecodeToVideo", "optional"))
    ]
    forms = [kind == "COMFY_DYNAMICCOMBO_V3" for kind in kinds]
    assert forms[0] == forms[1], "the options have the form of core's"
    return forms[0]


def slots(inputs: dict, before: str = "") -> Iterator[str]:
    """The names of all inputs of a definition, also of those that a choice brings."""
    for part in ("required", "optional"):
        for name, (kind, *rest) in inputs.get(part, {}).items():
            yield before + name
            if kind == "COMFY_DYNAMICCOMBO_V3":
                for option in rest[0]["options"]:
                    yield from slots(option["inputs"], f"{before}{name}.")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_inputs_that_a_choice_brings_have_words(comfy, nested, language):
    """Under their path, with underscores: so the frontend looks for the words of a widget."""
    names = set(
        slots(comfy.get("/object_info/WanVAEDecodeToVideo")["WanVAEDecodeToVideo"]["input"])
    )
    deepest = {"format.codec.encoding.crf", "format.codec.encoding.color_space"}
    assert deepest <= names or not nested
    words = json.loads((REPOSITORY / f"locales/{language}/nodeDefs.json").read_text("utf-8"))
    entries = words["WanVAEDecodeToVideo"]["inputs"]
    keys = {name.replace(".", "_") for name in names}
    assert keys <= set(entries)
    if nested:
        assert set(entries) == keys, "no words of inputs that there are not"


def settings_of(path: Path) -> str | None:
    """What x264 writes into a stream of the settings that it was given; None for other encoders.

    Not the frames: where float32 rounds one number of a decode otherwise, and so one pixel to
    another level, x264 decides otherwise too, and the frames differ by up to half as much as those
    of the next crf. Of the same frames it makes the same bits.
    """
    found = re.search(rb"x264 - core [^\x00]* crf=[\d.]+[^\x00]*", path.read_bytes())
    return None if found is None else found[0].decode("ascii", "replace")


def alike(one: Path, other: Path) -> bool:
    """Whether two videos were encoded in the same way."""
    settings, a, b = settings_of(one), frames(one), frames(other)
    if settings is not None:
        return settings == settings_of(other) and a.shape == b.shape
    # AV1: a crf of 16 instead of 50 is some levels away.
    return a.shape == b.shape and bool(np.abs(a - b).mean() < 1)


def nest(format: str, codec: str, crf: float | None = None) -> dict:
    """Inputs as core's Save Video has them: a codec of a format, and crf of what is encoded."""
    made = {"format": format, "format.codec": codec}
    if codec != "auto":
        made["format.codec.encoding"] = "auto" if crf is None else "re-encode"
    if crf is not None:
        made |= {
            "format.codec.encoding.crf": crf,
            "format.codec.encoding.color_space": "auto",
        }
    return made


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({}, ("auto", "auto")),
        ({"format": "webm", "codec": "av1", "crf": 50.0}, ("webm", "av1", 50.0)),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ({"format": "mkv", "crf": 45.0}, ("mkv", "h264", 45.0)),
                ({"format": "mp4", "codec": "h264"}, ("mp4", "h264")),
            )
        ),
    ],
)
def test_flat_names_mean_what_those_of_core_mean(comfy, nested, flat, words):
    """What a prompt of before says, and what a page says since core nests its options."""
    paths = [saved(comfy, comfy.run(prompt(**flat)))]
    if nested:
        paths.append(saved(comfy, comfy.run(prompt(**nest(*words)))))
        # A page also sends the flat names, which it does not show.
        both = prompt(**nest(*words), codec="auto", crf=16.0)
        paths.append(saved(comfy, comfy.run(both)))
    wanted = ".mp4" if words[0] == "auto" else f".{words[0]}"
    assert {path.suffix for path in paths} == {wanted}
    assert all(alike(path, paths[0]) for path in paths)
    settings = settings_of(paths[0])
    assert (settings is None) == ("av1" in words)
    if settings is not None:
        assert f" crf={flat.get('crf', 16.0):.1f} " in settings
    if "crf" in flat:
        assert not alike(saved(comfy, comfy.run(prompt(**flat | {"crf": 16.0}))), paths[0])


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"format": "avi"}, "format is 'avi': expected one of 'auto', 'mp4'"),
        (nest("mp4", "vp9"), "format.codec is 'vp9': expected one of 'auto', 'h264', 'av1'"),
        (nest("webm", "h264"), "format.codec is 'h264': expected one of 'auto', 'av1'"),
    ],
)
def test_an_option_that_is_none_is_refused_and_not_left_out(comfy, nested, told, words):
    """ComfyUI leaves nested options out that it does not know, without a word."""
    if not nested and "format.codec" in told:
        return  # nobody sends these names
    kind, message = failed(comfy, prompt(**told))
    assert kind.endswith("OutputError") and words in message


@pytest.mark.parametrize(
    "told",
    [
        {"format": "mkv", "format.codec": ["5", 0]},
        {"format": ["4", 0], "format.codec": "av1"},
        {"format": "mkv", "format.codec": "av1", "format.codec.encoding": ["5", 0]},
        {"format.codec": "av1"},
        {"format": "mkv", "format.codec": "auto", "format.codec.encoding": "re-encode"},
        {"format": "mkv", "format.codec": "av1", "format.codec.encoding.crf": 45.0},
    ],
)
def test_a_nested_option_that_does_not_arrive_is_refused(comfy, told):
    """A video with another codec or quality than the prompt asks for is a wrong one."""
    made = prompt(**told)
    made["4"], made["5"] = node("ProbeChoice", value="mkv"), node("ProbeChoice", value="av1")
    kind, message = failed(comfy, made)
    assert kind.endswith("OutputError")
    assert any(f"{name} is {value!r}, which" in message for name, value in told.items()), message


@pytest.mark.parametrize("value", [7, {"format": "mkv"}])
def test_a_format_that_is_no_word_is_refused(comfy, nested, value):
    if not nested:
        return  # ComfyUI refuses the prompt
    kind, message = failed(comfy, prompt(format=value))
    assert kind.endswith("OutputError") and f"format is {value!r}: expected one of" in message


def test_what_is_left_out_and_usual_is_no_error(comfy):
    told = {"format.codec": "auto", "format.codec.encoding": "auto"}
    path = saved(comfy, comfy.run(prompt(format="mkv", **told)))
    assert path.suffix == ".mkv"


def test_format_and_codec_can_be_linked(comfy):
    made = prompt(format=["4", 0], codec=["5", 0], crf=["6", 0])
    made["4"], made["5"] = node("ProbeChoice", value="webm"), node("ProbeChoice", value="av1")
    made["6"] = node("PrimitiveFloat", value=50.0)
    path = saved(comfy, comfy.run(made))
    given = saved(comfy, comfy.run(prompt(format="webm", codec="av1", crf=50.0)))
    assert path.suffix == ".webm" and alike(path, given)


def test_the_first_and_the_last_frame_are_those_of_the_decode(comfy):
    made = prompt()
    made["4"] = node("WanVAEDecode", vae=["1", 0], samples=["2", 0])
    for place, output, first in (("5", 1, 0), ("6", 2, 8)):
        made[f"{place}b"] = node("ImageFromBatch", image=["4", 0], batch_index=first, length=1)
        made[place] = node("ProbeCompareImages", a=["3", output], b=[f"{place}b", 0])
    run = comfy.run(made)
    assert run.error is None, run.error
    for place in ("5", "6"):
        assert run.outputs[place]["a"] == run.outputs[place]["b"]
        assert run.outputs[place]["difference"] == [0.0]


def test_core_saves_our_video_while_it_is_decoded(comfy, sample):
    made = prompt("WanVAECreateVideo")
    made["4"] = node(
        "SaveVideo", video=["3", 0], filename_prefix="video/lazy", format="mp4", codec="h264"
    )
    # What core makes of the frames, at its default quality.
    made["5"] = node("WanVAEDecode", vae=["1", 0], samples=["2", 0])
    made["6"] = node("CreateVideo", images=["5", 0], fps=16.0)
    made["7"] = node(
        "SaveVideo", video=["6", 0], filename_prefix="video/core", format="mp4", codec="h264"
    )
    sent, held = [], []

    def listen(message):
        sent.append(message)
        if message["type"] == "wan_vae.report" and message["data"]["node"] == "4":
            held.append(len(list((comfy.base / "output" / "video").glob("lazy_*"))))

    run = comfy.run(made, on_message=listen, pnginfo=PNGINFO)
    path = saved(comfy, run, "4")
    assert held[0] == 1, "its name is taken before the decode: another server counts it"
    theirs = np.abs(frames(saved(comfy, run, "7")) - sample).mean()
    assert np.abs(frames(path) - sample).mean() < 1.1 * theirs < 5
    with av.open(str(path)) as file:
        assert json.loads(file.metadata["workflow"]) == PNGINFO["workflow"]
        assert "4" in json.loads(file.metadata["prompt"])
    reports = [m["data"] for m in sent if m["type"] == "wan_vae.report"]
    reports = [found for found in reports if found["node"] == "4"]
    assert (reports[-1]["node"], reports[-1]["vae"]) == ("4", "3")
    assert reports[-1]["report"]["status"] == "done"
    assert reports[-1]["report"]["video"]["frames"] == 9


def test_other_nodes_read_our_video(comfy):
    """Facts come without a decode; images are those of Wan VAE Decode."""
    made = prompt("WanVAECreateVideo", fps=24.0)
    made["4"] = node("GetVideoComponents", video=["3", 0])
    made["5"] = node("WanVAEDecode", vae=["1", 0], samples=["2", 0])
    made["6"] = node("ProbeCompareImages", a=["4", 0], b=["5", 0])
    made["7"] = node("ProbeVideo", video=["3", 0])
    if "Video Slice" in comfy.get("/object_info"):
        made["8"] = node(
            "Video Slice", video=["3", 0], start_time=0.1, duration=0.2, strict_duration=True
        )
        made["9"] = node("ProbeVideo", video=["8", 0])
    run = comfy.run(made)
    assert run.error is None, run.error
    assert run.outputs["6"]["difference"] == [0.0]
    assert run.outputs["6"]["a"] == run.outputs["6"]["b"]
    found = run.outputs["7"]
    assert found["kind"] == ["LazyVideo"]
    assert found["dimensions"] == [[80, 56]]
    assert found["frames"] == [9] and found["rate"] == [24.0]
    assert found["duration"][0] == pytest.approx(9 / 24)
    assert "mp4" in found["container"][0] and found["bytes"][0] > 500
    if "9" in made:
        assert run.outputs["9"]["duration"][0] == pytest.approx(0.2)


def test_a_batch_that_is_read_one_after_another_counts_together(comfy):
    """Save Video is executed for each video of the list: the line shows what it has done."""
    prefix = f"video/{uuid.uuid4().hex}"
    run = comfy.run(
        {
            "1": load_vae(),
            "2": latent(batch=2, frames=2, seed=91),
            "3": node("WanVAECreateVideo", vae=["1", 0], samples=["2", 0], fps=16.0),
            "4": node(
                "SaveVideo", video=["3", 0], filename_prefix=prefix, format="mp4", codec="h264"
            ),
        }
    )
    assert run.error is None, run.error
    assert len(run.outputs["4"]["images"]) == 2
    report = run.report("4")
    assert (report["status"], report["done_frames"], report["total_frames"]) == ("done", 10, 10)
    made = run.report("3")
    assert (made["operation"], made["pixel_shape"]) == ("video", [2, 3, 5, 64, 96])
    assert run.message("4")["vae"] == "3"


def test_videos_of_a_vae_that_is_no_wan_vae(comfy):
    """ComfyUI decodes; both nodes make the files of it, and the notes say so."""
    prefix = f"video/{uuid.uuid4().hex}"
    inputs = {"vae": ["1", 0], "samples": ["2", 0], "fps": 0.0}
    made = {
        "0": load_vae(),
        "1": node("ProbeForeignVAE", vae=["0", 0]),
        "2": latent(batch=2, channels=4, frames=11, height=32, width=48, seed=92),
        "3": node("WanVAEDecodeToVideo", filename_prefix=prefix, **inputs),
        "4": node("WanVAECreateVideo", **inputs),
        "5": node(
            "SaveVideo", video=["4", 0], filename_prefix=f"{prefix}c", format="mp4", codec="h264"
        ),
        "6": node("VAEDecode", vae=["1", 0], samples=["2", 0]),
        "7": node("ImageFromBatch", image=["6", 0], batch_index=10, length=1),
        "8": node("ProbeCompareImages", a=["3", 2], b=["7", 0]),
    }
    run = comfy.run(made)
    assert run.error is None, run.error
    for place in ("3", "5"):
        shown = run.outputs[place]["images"]
        assert len(shown) == 2
        for one in shown:
            path = comfy.base / "output" / one["subfolder"] / one["filename"]
            assert frames(path).shape == (11, 32, 48, 3)
            with av.open(str(path)) as file:
                assert float(file.streams.video[0].average_rate) == 24
    for place in ("3", "4"):
        report = run.report(place)
        (note,) = report["fallbacks"]
        assert report["worded"][note]["key"] == "vae.not_wan"
        assert (report["done_frames"], report["pixel_shape"]) == (22, [2, 3, 11, 32, 48])


@pytest.mark.parametrize("prefix", ["", "  ", ".", "video/.."])
def test_a_prefix_without_a_name_is_refused_in_words(comfy, prefix):
    kind, message = failed(comfy, prompt(filename_prefix=prefix))
    assert kind.endswith("OutputError")
    assert message.startswith(f"filename_prefix is {prefix!r}, which names no file")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "webm", "codec": "h264"}, "webm cannot hold H.264"),
        ({"crf": 60.0}, "crf is 60: expected 0 to 51"),
        ({"audio": ["4", 0]}, "1, 2 or 6 channels"),
    ],
)
def test_what_cannot_be_encoded_is_refused_in_words(comfy, options, words):
    made = prompt(**options)
    if "audio" in options:
        made["4"] = node("ProbeSound", seconds=0.5, rate=0)
        words = "expected [batch, channels, samples]"
    kind, message = failed(comfy, made)
    assert kind.endswith("Error") and words in message
    prefix = made["3"]["inputs"]["filename_prefix"]
    assert not list((comfy.base / "output").glob(f"{prefix}*"))


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("../x", "is '../x', which is outside the output folder"),
        ("/elsewhere/x", "outside the output folder"),
        ("x" * 400, "file name too long"),
        ("x" * 400 + "/x", "file name too long"),
        ("a/" * 3000 + "x", "cannot be written"),
        ("a\ud800b", "a file name cannot contain"),
        ("a\0b", "a file name cannot contain NUL"),
        ("a_file.txt/x", "a_file.txt is a file, not a folder"),
    ],
)
def test_an_impossible_prefix_is_refused_in_words(comfy, prefix, words):
    (comfy.base / "output" / "a_file.txt").touch()
    kind, message = failed(comfy, prompt(filename_prefix=prefix))
    assert kind.endswith("OutputError") and words in message


ODD_SOUNDS = {
    "text": "the audio is a str: expected a dictionary",
    "empty": "the audio is a dict: expected a dictionary with 'waveform'",
    "rateless": "sample_rate is None: expected a number",
    "fast": "has 1099511627776 samples a second: expected 1 to",
    "whole": "samples are torch.int16: expected floating numbers",
    "nan": "16000 of the sound's 16000 samples are NaN or inf",
    "flat": "waveform is (2, 8000): expected [batch, channels, samples]",
}


@pytest.mark.parametrize("class_type", ["WanVAEDecodeToVideo", "WanVAECreateVideo"])
@pytest.mark.parametrize("kind", ODD_SOUNDS)
def test_what_is_no_sound_is_refused_in_words_by_the_node_that_gets_it(comfy, class_type, kind):
    made = prompt(class_type, audio=["4", 0])
    made["4"] = node("ProbeOddSound", kind=kind)
    made["5"] = node("ProbeSink", value=["3", 0])
    name, message = failed(comfy, made)
    assert name.endswith("LatentError") and ODD_SOUNDS[kind] in message
    assert not list((comfy.base / "output").rglob("*.partial.*"))


def test_a_rate_of_another_library_is_a_rate(comfy):
    made = prompt(audio=["4", 0])
    made["4"] = node("ProbeOddSound", kind="numpy")
    with av.open(str(saved(comfy, comfy.run(made)))) as file:
        assert file.streams.audio[0].rate == 8000


@pytest.mark.parametrize(
    ("options", "words"),
    [({"fps": float("nan")}, "nan frames a second"), ({"fps": 0.001}, "0.01 to 1000")],
)
def test_an_impossible_rate_is_refused_where_it_is_given(comfy, options, words):
    made = prompt("WanVAECreateVideo", **options)
    made["4"] = node("ProbeSink", value=["3", 0])
    kind, message = failed(comfy, made)
    assert kind.endswith("OutputError") and words in message


def test_alpha_of_another_vae_is_flattened_on_white(comfy):
    made = prompt("WanVAECreateVideo")
    made["0"], made["1"] = made["1"], node("ProbeOddVAE", vae=["0", 0], kind="alpha")
    made["4"] = node(
        "SaveVideo", video=["3", 0], filename_prefix="video/alpha", format="mp4", codec="h264"
    )
    made["5"] = {**prompt()["3"]}
    run = comfy.run(made)
    assert run.error is None, run.error
    for place in ("4", "5"):
        assert frames(saved(comfy, run, place)).min() > 250


@pytest.mark.parametrize("class_type", ["WanVAEDecode", "WanVAEDecodeToVideo", "WanVAECreateVideo"])
@pytest.mark.parametrize("kind", ["sound", "voxels"])
def test_a_vae_that_makes_no_pictures_is_refused_in_words(comfy, class_type, kind):
    made = prompt(class_type)
    if class_type == "WanVAEDecode":
        del made["3"]["inputs"]["fps"]
    made["0"], made["1"] = made["1"], node("ProbeOddVAE", vae=["0", 0], kind=kind)
    made["4"] = node("ProbeSink", value=["3", 0])
    name, message = failed(comfy, made)
    assert name.endswith("LatentError") and "and not to pictures" in message


def test_two_servers_that_write_one_name_lose_no_video(comfy, environment, tmp_path):
    """Both count before either has published; the other one also runs with --disable-metadata."""
    output = comfy.base / "output"
    other = Comfy(
        environment,
        tmp_path / "other",
        "--disable-metadata",
        "--output-directory",
        str(output),
    )
    write_vaes(other.base / "models" / "vae")
    other.install_probe()
    made = {
        "1": load_vae(),
        "2": latent(frames=6, height=4, width=6, seed=500),
        "3": node(
            "WanVAEDecodeToVideo",
            vae=["1", 0],
            samples=["2", 0],
            fps=16.0,
            filename_prefix="race/clip",
            chunk_frames=1,
        ),
    }
    with other:
        for server in (comfy, other):  # weights are packed, so that both take the same time
            warm = {**made, "3": {**made["3"], "inputs": {**made["3"]["inputs"]}}}
            warm["3"]["inputs"]["filename_prefix"] = f"race/warm_{server.port}"
            assert server.run(warm).error is None
        streams, runs = [], []
        for server in (comfy, other):
            client = uuid.uuid4().hex
            streams.append(server.listen(client))
            runs.append(Run(server.queue(made, client, PNGINFO)))
        for server, stream, run in zip((comfy, other), streams, runs, strict=True):
            with closing(stream):
                server.follow(stream, run)
    paths = [saved(comfy, run) for run in runs]
    assert len({os.fspath(path) for path in paths}) == 2
    assert sorted(p.name for p in paths) == ["clip_00001_.mp4", "clip_00002_.mp4"]
    assert sorted(p.name for p in (output / "race").glob("clip*")) == sorted(p.name for p in paths)
    tags = []
    for path in paths:
        assert len(frames(path)) == 21
        with av.open(str(path)) as file:
            tags.append(sorted({"workflow", "prompt"} & set(file.metadata)))
    assert tags == [["prompt", "workflow"], []]


# -- what Encode says, and the two kinds of latents ------------------------------------------------


def encode(frames: int, channels: int = 3, size=(64, 96), **options) -> dict:
    height, width = size
    return {
        "1": load_vae(),
        "2": node(
            "ProbeFrames", frames=frames, height=height, width=width, channels=channels, seed=frames
        ),
        "3": node("WanVAEEncode", vae=["1", 0], pixels=["2", 0], **options),
    }


def test_encode_says_what_it_does_not_use(comfy):
    made = encode(7, 4, (67, 90))
    made["5"] = node("ProbeSink", value=["3", 0])
    run = comfy.run(made)
    assert run.error is None, run.error
    assert run.report("3")["warnings"] == [
        "the images have 4 channels: red, green and blue are encoded, and alpha is ignored",
        "5 of 7 frames are encoded: the last 2 are past 4n + 1",
        "cropped from 90x67 to 88x64: sizes are multiples of 8",
    ]
    made = encode(5)
    made["5"] = node("ProbeSink", value=["3", 0])
    assert comfy.run(made).report("3")["warnings"] == []


def test_a_batch_of_images_is_no_video(comfy):
    """Each has a latent of its own, which is that of the image alone."""
    made = encode(3, batch=True)
    made["4"] = node("ImageFromBatch", image=["2", 0], batch_index=2, length=1)
    made["5"] = node("WanVAEEncode", vae=["1", 0], pixels=["4", 0])
    made["6"] = node("LatentFromBatch", samples=["3", 0], batch_index=2, length=1)
    made["7"] = node("ProbeCompareLatents", a=["6", 0], b=["5", 0])
    run = comfy.run(made)
    assert run.error is None, run.error
    assert run.outputs["7"]["difference"][0] < 1e-5
    assert run.outputs["7"]["a"][0]["shape"] == [1, 16, 1, 8, 12]
    assert run.report("3")["latent_shape"] == [3, 16, 1, 8, 12]
    assert run.report("3")["warnings"] == []


def test_normalized_latents_there_and_back(comfy):
    made = encode(5, size=(32, 40), normalized=True)
    made["4"] = node("WanVAEEncode", vae=["1", 0], pixels=["2", 0])
    made["5"] = node("WanVAEDecode", vae=["1", 0], samples=["3", 0], normalized=True)
    made["6"] = node("WanVAEDecode", vae=["1", 0], samples=["4", 0])
    made["7"] = node("ProbeCompareImages", a=["5", 0], b=["6", 0])
    made["8"] = node("ProbeCompareLatents", a=["3", 0], b=["4", 0])
    run = comfy.run(made)
    assert run.error is None, run.error
    assert run.outputs["7"]["difference"][0] < 1e-4
    assert run.outputs["8"]["difference"][0] > 0.1, "the two latents are different"


def test_a_latent_that_looks_normalised_gets_a_hint(comfy):
    """Random numbers of a normal distribution are what a normalised latent looks like."""
    hints = []
    for normalized in (False, True):
        samples = latent(frames=2, height=6, seed=77, kind="normalised")
        run = comfy.run(decode(samples, normalized=normalized))
        assert run.error is None, run.error
        hints.append(run.report("3")["warnings"])
        channels = run.report("3")["latent_channels"]
        # All of them, where there is a hint.
        assert len(channels) == (0 if normalized else 16)
        assert all(0.8 < channel["deviation"] < 1.2 for channel in channels)
    assert len(hints[0]) == 1 and hints[1] == []
    assert hints[0][0].startswith("the latent looks normalised")
    assert "1.13 to 3.27" in hints[0][0] and "channel 8: 1.0" in hints[0][0]
