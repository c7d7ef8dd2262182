"""Reports and plans as text: what the command line and the inspect node print."""

from __future__ import annotations

from dataclasses import replace

from wan_vae.commands.report_text import counts, plan_text, report_text
from wan_vae.config import wan21
from wan_vae.layout import LayoutDecision
from wan_vae.ops.opset import Refusal
from wan_vae.options import RunOptions
from wan_vae.planning.plan import LayerChoices, Plan
from wan_vae.report import (
    BackendOff,
    ChunkRecord,
    DecodeReport,
    LayerRecord,
    LayoutRecord,
    MemoryRecord,
    VideoRecord,
)
from wan_vae.sharding.plan import ShardPlan

LAYERS = (
    LayerRecord("decoder.conv1", "conv3d", (384, 16, 3, 3, 3), "channels_last_3d", "cuda"),
    LayerRecord("conv2", "conv3d", (16, 16, 1, 1, 1), "either", "eager"),
    LayerRecord("decoder.head.2", "conv3d", (3, 96, 3, 3, 3), "channels_last_3d", "cuda"),
)


def report(**values) -> DecodeReport:
    """A report of a decode; `values` replace fields of it."""
    fields = {
        "operation": "decode",
        "status": "done",
        "config": wan21().as_dict(),
        "latent_shape": (1, 16, 3, 6, 5),
        "pixel_shape": (1, 3, 9, 48, 40),
        "device": "cuda:0",
        "device_name": "NVIDIA H100",
        "dtype": "bfloat16",
        "layout": LayoutRecord(
            "auto",
            "channels_last_3d",
            "faster here",
            weights_found={"contiguous": 2, "channels_last_3d": 0, "either": 1},
            weights_used={"contiguous": 0, "channels_last_3d": 2, "either": 1},
            conversions=7,
        ),
        "layers": LAYERS,
        "backends_used": {"norm": "triton", "conv3d": "cuda", "attention": "triton"},
        "chunks": (ChunkRecord(0, 3, True, 9, 20.0),),
        "memory": MemoryRecord(planned_bytes=3 << 29, peak_bytes=1 << 30),
        "duration_ms": 1500.0,
        "frames_per_s": 6.0,
    }
    return DecodeReport(**{**fields, **values})


def test_layers_say_what_runs_and_what_it_gained():
    first, pointwise, last = LAYERS
    layers = (
        replace(first, kernel="wgmma winograd", gain=2.84),
        replace(last, kernel="mma direct3", gain=1.2),
        pointwise,
    )
    lines = report_text(report(layers=layers), all_layers=True).splitlines()
    assert "layers    2 conv3d channels_last_3d cuda, 1.2x to 2.8x" in lines
    assert "          1 conv3d layout-free (1x1x1) eager" in lines
    listed = [line.split()[-4:] for line in lines if line.startswith("layer ")]
    assert listed[0] == ["cuda", "wgmma", "winograd,", "2.8x"]
    assert listed[2][-1] == "eager"


def test_a_report_of_an_older_version_is_read():
    """It says nothing of kernels, gains and videos."""
    plain = report().as_dict()
    del plain["video"]
    layers = plain["layers"]
    assert isinstance(layers, list) and all("gain" in layer for layer in layers)
    for layer in layers:
        del layer["kernel"], layer["gain"]
    assert DecodeReport.from_dict(plain) == report()
    # A gain is a measurement: two plans that differ in nothing else are the same.
    assert replace(LAYERS[0], gain=2.0) == LAYERS[0]
    assert replace(LAYERS[0], kernel="wgmma direct3") != LAYERS[0]


def test_the_report_of_a_decode():
    text = report_text(
        report(
            backends_off=(BackendOff("attention", "cuda", "not proven"),),
            fallbacks=("chunks were halved",),
            warnings=("pixels are not finite",),
        )
    )
    assert text.splitlines() == [
        "model     wan2.1 VAE: 16 latent channels, width 96 / 96, 8x8 pixels per latent pixel",
        "compute   bfloat16 on cuda:0 (NVIDIA H100)",
        "layout    channels_last_3d (requested: auto; faster here)",
        "conv3d    weights as loaded: 2 contiguous, 1 layout-free (1x1x1); "
        "as used: 2 channels_last_3d, 1 layout-free (1x1x1)",
        "latent    [1, 16, 3, 6, 5] contiguous -> pixels [1, 3, 9, 48, 40]",
        "formats   format conversions: 7",
        "          calls with mixed formats (should be 0): 0",
        "time      1.50 s, 6.0 frames/s, 1 chunk, 1 strip",
        "memory    peak 1.00 GiB (planned: 1.50 GiB)",
        "backends  triton: norm, attention",
        "          cuda: conv3d",
        "layers    2 conv3d channels_last_3d cuda",
        "          1 conv3d layout-free (1x1x1) eager",
        "not used  attention cuda: not proven",
        "fallback  chunks were halved",
        "warning   pixels are not finite",
    ]


def test_a_video_says_who_waited_for_whom():
    slow = VideoRecord("libx264", 81, 2500.0, 40.0, 1 << 20)
    lines = report_text(report(video=slow)).splitlines()
    at = lines.index("video     81 frames by libx264")
    assert lines[at + 1].split(maxsplit=4)[:4] == ["waited", "for", "the", "encoder:"]
    assert lines[at + 1].endswith("2.50 s for the encoder, encoder 0.04 s for the decode")
    told = report_text(report(video=replace(slow, fps=16.0)))
    assert "video     81 frames at 16 frames/s by libx264\n" in told
    assert replace(slow, waited_for_decoder_ms=9999.0).waited_for == "decoder"


def test_the_report_of_an_inspection_has_no_run_and_may_list_layers():
    config = wan21(has_encoder=False).as_dict()
    text = report_text(
        report(operation="inspect", config=config), dtypes={"float16": 194}, all_layers=True
    )
    labels = [line.split()[0] for line in text.splitlines() if line[0] != " "]
    assert labels == [
        *("model", "compute", "layout", "weights", "conv3d", "backends", "layers"),
        *["layer"] * len(LAYERS),
    ]
    assert ", no encoder" in text and "weights   as loaded: 194 float16" in text
    for layer in LAYERS:
        assert f"layer     {layer.name} " in text
    assert "384x16x3x3x3" in text


def plan(**values) -> Plan:
    """A plan of a decode; `values` replace fields of it."""
    fields = {
        "operation": "decode",
        "latent_shape": (1, 16, 21, 90, 160),
        "pixel_shape": (1, 3, 81, 720, 1280),
        "device": "cuda:0",
        "dtype": "bfloat16",
        "options": RunOptions(),
        "layout": LayoutDecision("auto", "channels_last_3d", "faster here"),
        "choices": LayerChoices(
            LAYERS,
            {"conv3d": "cuda"},
            (Refusal("conv3d", "triton", "too slow", ("decoder.conv1", "decoder.head.2")),),
        ),
        "lengths": (1, 5, 5, 5, 5),
        "pass_elements": 1_000_000,
        "strips": None,
        "whole_frames": False,
        "shards": None,
        "free_bytes": 4 << 30,
        "planned_bytes": 3 << 30,
        "weights_bytes": 1 << 28,
    }
    return Plan(**{**fields, **values})


def test_the_plan_of_a_decode():
    assert plan_text(plan(notes=("planned again",))).splitlines() == [
        "plan      decode [1, 16, 21, 90, 160] -> [1, 3, 81, 720, 1280]",
        "compute   bfloat16 on cuda:0",
        "layout    channels_last_3d (requested: auto; faster here)",
        "backends  cuda: conv3d",
        "layers    2 conv3d channels_last_3d cuda",
        "          1 conv3d layout-free (1x1x1) eager",
        "not used  conv3d triton: too slow (2 layers)",
        "chunks    5 (latent frames: 1, 4 x 5)",
        "passes    at most 1,000,000 numbers in the features of one",
        "strips    none: the whole picture",
        "memory    planned peak: 3.00 GiB, above weights and result",
        "          weights: 0.25 GiB",
        "          result in float32: 0.83 GiB",
        "          free on the device: 4.00 GiB",
        "note      planned again",
    ]


def test_the_plan_of_strips_of_shards_and_of_an_encode():
    text = plan_text(plan(strips=3, extra_work=0.25, pass_elements=None, free_bytes=None))
    assert "strips    3, each with all chunks; 25% more multiplications than without" in text
    assert "passes    each chunk in one pass" in text
    assert "free on the device: unknown" in text
    assert "strips    3, inside each chunk; " in plan_text(plan(strips=3, whole_frames=True))
    shards = ShardPlan("height", ((0, 45), (45, 90)), 2)
    assert "shards    along the height, latent rows 0-45, 45-90" in plan_text(plan(shards=shards))
    encode = plan_text(plan(operation="encode"))
    assert "plan      encode [1, 3, 81, 720, 1280] -> [1, 16, 21, 90, 160]" in encode
    assert "result in float32: 0.02 GiB" in encode


def test_nothing_is_counted_as_none():
    assert counts({}) == counts({"contiguous": 0}) == "none"
