"""A latent to an mp4: ours beside x264 alone, and beside an IMAGE that is saved as core saves it.

    wan-vae bench video [--case wan2.1-720p-81] [--mini] [--device cpu] [--output FILE.json]
    python benchmarks/video.py                # the same

Five ways, all in one process and on the same pictures. *x264*: frames that lie ready as YUV through
the encoder of our sink, which is the least that a video takes. *decode*: the decode alone, its
pixels dropped. *stream*: the decode with the encoder beside it, to a file. *image*: the decode to
an IMAGE in host memory. *save*: that IMAGE to a file, frame by frame through 8-bit RGB and FFmpeg's
scaler with PyAV's default threads, as ComfyUI's Save Video does. Every file has one crf.

Random weights make random pictures, on which x264 takes several times as long. --vae and --latent
take real ones. --mini takes the miniature VAE of examples/ and its sample latent, repeated to the
size of the case: real pictures, but a decode by a model of a sixth of the width.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import wan_vae
from benchmarks.suite.cases import CASES
from benchmarks.suite.weights import random_vae
from wan_vae import geometry
from wan_vae.device import pick_device
from wan_vae.io.image import ImageSink
from wan_vae.io.latents import load_latent
from wan_vae.io.sink import CallbackSink, NullSink
from wan_vae.io.video_encode import VideoEncoder, VideoSettings
from wan_vae.io.video_sink import VideoFileSink
from wan_vae.io.yuv import even, to_yuv420
from wan_vae.pipeline import WanVAE

_FPS = 16
_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
_MINI = _EXAMPLES / "wan_vae_mini.safetensors"
_SAMPLE = _EXAMPLES / "latents" / "cat_416x240_17f.latent"
_MINI_NOTE = (
    "Weights of the miniature VAE, a sixth as wide as Wan 2.1: times of decodes are not those of "
    "Wan 2.1, times of x264 are those of real pictures."
)


@dataclass(frozen=True)
class Times:
    """Medians in milliseconds of each way, and what the stream said of its waits.

    over_least: the stream's time by that of x264 alone, or of the decode alone where that is more.
    """

    case: str
    x264_ms: float
    decode_ms: float
    stream_ms: float
    image_ms: float
    save_ms: float
    waited_for: str
    waited_for_encoder_ms: float
    waited_for_decoder_ms: float
    file_bytes: int

    @property
    def over_least(self) -> float:
        return self.stream_ms / max(self.x264_ms, self.decode_ms)


def median_ms(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of `work`, which is not warmed up here; waits for the device."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def measure(name: str, vae: WanVAE, latent: torch.Tensor, crf: float, repeats: int) -> Times:
    """Each way in turn, `repeats` times, after one decode that keeps the pictures as YUV.

    Prints each time as it comes.
    """
    print(name, file=sys.stderr, flush=True)
    shape = geometry.pixel_shape(tuple(latent.shape), vae.config)
    size, settings = (shape[3], shape[4]), VideoSettings(crf=crf)
    ready: list[torch.Tensor] = []

    def keep(pixels: torch.Tensor, _start: int, _row: int) -> None:
        ready.extend(to_yuv420(frame).cpu() for frame in pixels[0].unbind(1))

    vae.decode(latent, sink=CallbackSink(keep))
    with tempfile.TemporaryDirectory(prefix="wan_vae_video_") as folder:
        file = Path(folder) / "video.mp4"

        def alone() -> None:
            encoder = VideoEncoder(file, "mp4", (even(size[0]), even(size[1])), _FPS, settings)
            for planes in ready:
                encoder.put(planes.numpy())
            encoder.finish()

        def stream() -> None:
            vae.decode(latent, sink=VideoFileSink(file, *size, _FPS, settings))

        def image() -> torch.Tensor:
            sink = ImageSink.allocate(tuple(latent.shape), vae.config, torch.device("cpu"))
            vae.decode(latent, sink=sink)
            return sink.image

        frames = image()[0]
        ways: dict[str, Callable[[], object]] = {
            "x264_ms": alone,
            "decode_ms": lambda: vae.decode(latent, sink=NullSink()),
            "image_ms": image,
            "save_ms": lambda: save_as_core(frames, file, crf),
            "stream_ms": stream,
        }
        times = {}
        for way, work in ways.items():
            times[way] = median_ms(work, vae.device, repeats)
            said = f"  {way.removesuffix('_ms')}: {times[way] / 1e3:.2f} s"
            print(said, file=sys.stderr, flush=True)
        assert vae.last_report is not None and vae.last_report.video is not None
        video = vae.last_report.video
        return Times(
            case=name,
            waited_for=video.waited_for,
            waited_for_encoder_ms=video.waited_for_encoder_ms,
            waited_for_decoder_ms=video.waited_for_decoder_ms,
            file_bytes=file.stat().st_size,
            **times,
        )


def save_as_core(frames: torch.Tensor, path: Path, crf: float) -> None:
    """Write frames [T, H, W, 3] in [0, 1] one after another: 8-bit RGB, the scaler, the encoder."""
    with av.open(str(path), mode="w", options={"movflags": "use_metadata_tags+faststart"}) as file:
        stream: Any = file.add_stream("h264", rate=_FPS, options={"crf": f"{crf:g}"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            levels = (frame * 255).clamp(0, 255).byte().numpy()
            picture = av.VideoFrame.from_ndarray(levels, format="rgb24")
            file.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
        file.mux(stream.encode(None))


def mini_latent(shape: Sequence[int]) -> torch.Tensor:
    """The sample latent, repeated to `shape` [B, z, T, H, W], which has its channels."""
    sample = load_latent(_SAMPLE)
    times = [-(-wanted // has) for wanted, has in zip(shape, sample.shape, strict=True)]
    return sample.repeat(times)[tuple(slice(wanted) for wanted in shape)].contiguous()


def table(rows: Sequence[Times]) -> str:
    """The rows as Markdown, in seconds."""
    lines = [
        "| case | x264 alone | decode alone | stream to mp4 | over the slower | IMAGE, then save | "
        "waited for | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        x264, decode, stream, image, save = (
            ms / 1e3
            for ms in (row.x264_ms, row.decode_ms, row.stream_ms, row.image_ms, row.save_ms)
        )
        lines.append(
            f"| {row.case} | {x264:.2f} s | {decode:.2f} s | {stream:.2f} s | "
            f"{row.over_least - 1:+.0%} | {image:.2f} + {save:.2f} s | {row.waited_for} | "
            f"{row.file_bytes / 1e6:.1f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="wan-vae bench video",
        description="A latent to an mp4: ours beside x264 alone and beside an IMAGE that is saved.",
        epilog="Random weights make random pictures, on which x264 takes several times as long. "
        "For real ones, name a checkpoint and a latent that was made for it (--vae, --latent), or "
        "take those of the examples (--mini).",
    )
    parser.add_argument("--device", help="cuda:0, cpu (default: the best one here)")
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated")
    parser.add_argument("--vae", type=Path, help="a checkpoint, in place of random weights")
    parser.add_argument("--latent", type=Path, help="a latent for --vae")
    parser.add_argument(
        "--mini",
        action="store_true",
        help="the miniature VAE of examples/ and its sample latent, repeated to the size of the "
        "case: real pictures, but a narrow model, which decodes in another time (Wan 2.1 only)",
    )
    parser.add_argument("--crf", type=float, default=16.0)
    parser.add_argument("--repeats", type=int, default=3, help="of each way; 1 or more")
    parser.add_argument(
        "--output", type=Path, help="write the rows to this JSON file, too, after each case"
    )
    args = parser.parse_args(argv)
    if (args.vae is None) != (args.latent is None):
        parser.error("--vae and --latent belong together")
    if args.mini and args.vae is not None:
        parser.error("--mini has a VAE and a latent of its own")
    if args.repeats < 1:
        parser.error("--repeats must be 1 or more")
    device = pick_device(args.device)
    is_cuda = device.type == "cuda"
    default = ("wan2.1-720p-81", "wan2.1-480p-81") if is_cuda else ("wan2.1-narrow",)
    names = args.case or default
    unfit = [name for name in names if CASES[name].config.family != "wan2.1"]
    if args.mini and unfit:
        parser.error(f"--mini is a VAE of Wan 2.1, which does not fit {', '.join(unfit)}")
    device_name = torch.cuda.get_device_name(device) if is_cuda else str(device)
    weights = "miniature" if args.mini else "random" if args.vae is None else args.vae.name
    rows = []
    for name, vae, latent in _inputs(args, device, names):
        rows.append(measure(name, vae, latent, args.crf, args.repeats))
        if args.output is not None:  # for who ends this before the last case
            plain = {"device": device_name, "weights": weights, "rows": list(map(asdict, rows))}
            args.output.write_text(json.dumps(plain, indent=1), encoding="utf-8")
    note = f"{_MINI_NOTE}\n\n" if args.mini else ""
    print(f"{device_name}, torch {torch.__version__}, av {av.__version__}\n\n{note}{table(rows)}")
    return 0


def _inputs(
    args: argparse.Namespace, device: torch.device, names: Sequence[str]
) -> Iterator[tuple[str, WanVAE, torch.Tensor]]:
    """Name, VAE and latent of each measurement; each is made when it is asked for."""
    if args.vae is not None:
        yield args.latent.stem, wan_vae.load(args.vae, device), load_latent(args.latent)
    elif args.mini:
        vae = wan_vae.load(_MINI, device)
        for name in names:
            yield f"{name}, miniature VAE", vae, mini_latent(CASES[name].latent)
    else:
        for name in names:
            yield name, random_vae(CASES[name].config, device), CASES[name].random_latent()


if __name__ == "__main__":
    raise SystemExit(main())
