"""The command line: decode, encode, inspect, demo, doctor, bench.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 3 some of several latents
failed, 130 interrupted. WAN_VAE_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import OutputError, WanVAEError
from .version import __version__


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        return args.run(args)
    except WanVAEError as error:
        if os.environ.get("WAN_VAE_DEBUG"):
            raise
        print(f"wan-vae: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output (head, say) has left. Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("wan-vae: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wan-vae", description="Wan 2.1 / 2.2 latents to pixels and back."
    )
    parser.add_argument("--version", action="version", version=f"wan-vae {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str, example: str, **more):
        sub = commands.add_parser(
            name, help=text, description=text, epilog=f"example: {example}", **more
        )
        sub.set_defaults(run=run)
        return sub

    def backend_option(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--backend",
            default="auto",
            choices=("auto", "eager", "triton"),
            help="triton: our own kernels, each proven on this device first",
        )

    def model_options(sub: argparse.ArgumentParser, vae_required: bool = True) -> None:
        if vae_required:
            sub.add_argument("--vae", type=Path, required=True, help="checkpoint file or folder")
        sub.add_argument("--device", help="cuda:0, cpu, mps (default: the best one here)")
        sub.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
        sub.add_argument(
            "--memory-format", default="auto", choices=("auto", "contiguous", "channels_last_3d")
        )
        sub.add_argument(
            "--chunk-frames", type=int, help="latent frames a chunk (default: planned)"
        )

    sub = command(
        "decode", _decode, "Decode latents to video, image, frames or tensors.",
        "wan-vae decode my.latent --vae wan_2.1_vae.safetensors -o out.mp4",
    )  # fmt: skip
    sub.add_argument("latents", nargs="+", type=Path, metavar="LATENT",
                     help=".latent, .safetensors or .npy")  # fmt: skip
    sub.add_argument("-o", "--output", type=Path, required=True,
                     help=".mp4, .png, .safetensors or a folder of frames; for several latents, "
                     "a folder that gets one .mp4 each")  # fmt: skip
    sub.add_argument("--fps", type=float, default=16.0)
    sub.add_argument("--strips", type=int, help="decode in so many exact bands to save memory")
    sub.add_argument("--normalized", action="store_true", help="latents as diffusers holds them")
    model_options(sub)
    backend_option(sub)

    sub = command(
        "encode", _encode, "Encode a video or an image to a latent.",
        "wan-vae encode in.mp4 --vae wan_2.1_vae.safetensors -o my.latent",
    )  # fmt: skip
    sub.add_argument("video", type=Path)
    sub.add_argument("-o", "--output", type=Path, required=True, help=".latent file")
    model_options(sub)

    sub = command(
        "inspect", _inspect, "Say what a checkpoint is: config, dtype, each layer's memory format.",
        "wan-vae inspect wan_2.1_vae.safetensors",
    )  # fmt: skip
    sub.add_argument("file", type=Path)
    sub.add_argument("--json", action="store_true", help="the report as JSON")

    sub = command(
        "demo", _demo, "Decode the sample latents of the repository with its miniature VAE.",
        "wan-vae demo --output demo_output",
    )  # fmt: skip
    sub.add_argument("--output", type=Path, default=Path("demo_output"))
    sub.add_argument("--garble", action="store_true",
                     help="also draw raw NDHWC bytes that are read as NCDHW")  # fmt: skip
    model_options(sub, vae_required=False)
    backend_option(sub)

    sub = command(
        "doctor", _doctor, "Check which layouts are right on this machine, and say why any is off.",
        "wan-vae doctor",
    )  # fmt: skip
    sub.add_argument("--device", help="check only this device")

    sub = command(
        "bench", _bench, "Compare with fastvae, diffusers and ComfyUI; see wan-vae bench --help.",
        "wan-vae bench --repeats 5 --output results", add_help=False,
    )  # fmt: skip
    return parser


def _load(args, path: Path):
    from .pipeline import PRECISIONS, load

    vae = load(path, device=args.device)
    if args.precision in ("fp32",) and vae.dtype != PRECISIONS["fp32"]:
        # Weights rounded at loading would not be the file's: load them as asked.
        vae = load(path, device=args.device, dtype=args.precision)
    return vae


class _Bar:
    """A progress bar of frames on stderr."""

    def __init__(self, label: str):
        from tqdm import tqdm

        self._bar = tqdm(desc=label, unit="frame", file=sys.stderr, leave=True)

    def __call__(self, done: int, total: int, report) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def _decode_one(vae, latent, output: Path, args, extra=()) -> None:
    from . import geometry
    from .latents import check_latent
    from .video import TeeSink, open_sink

    check_latent(latent, vae.config)
    shape = geometry.pixel_shape(tuple(latent.shape), vae.config)
    sink = open_sink(output, shape, getattr(args, "fps", 16.0))
    bar = _Bar(output.name)
    try:
        vae.decode(
            latent,
            normalized=getattr(args, "normalized", False),
            chunk_frames=args.chunk_frames,
            memory_format=args.memory_format,
            precision=args.precision,
            strips=getattr(args, "strips", None),
            backend=args.backend,
            sink=TeeSink(sink, *extra),
            on_progress=bar,
        )
    finally:
        bar.close()
    for text in (*getattr(sink, "warnings", ()), *vae.last_report.warnings):
        print(f"wan-vae: warning: {text}", file=sys.stderr)


def _outputs(args) -> list[Path]:
    """The output of each latent: the one that was named, or a video each in a folder."""
    if len(args.latents) == 1:
        return [args.output]
    if args.output.suffix:
        raise OutputError(f"{args.output}: several latents need a folder as output")
    stems = [path.stem for path in args.latents]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise OutputError(
            f"several latents would be written to {args.output / twice[0]}.mp4: decode them to "
            "different folders"
        )
    return [args.output / f"{stem}.mp4" for stem in stems]


def _decode(args) -> int:
    from .latents import load_latent
    from .sharding.torchrun import Place, decode_list

    outputs = _outputs(args)
    place = Place.of(os.environ)
    if place is not None:
        if args.strips is not None:
            raise OutputError("--strips is for one device: leave it out under torchrun")
        return decode_list(args, _load, outputs, place, _Bar)
    if len(args.latents) == 1:
        latent = load_latent(args.latents[0])
        vae = _load(args, args.vae)
        _decode_one(vae, latent, args.output, args)
        print(report_table(vae.last_report))
        return 0
    vae, failed = _load(args, args.vae), []
    for path, output in zip(args.latents, outputs, strict=True):
        try:
            _decode_one(vae, load_latent(path), output, args)
        except WanVAEError as error:
            failed.append(path)
            print(f"wan-vae: {error}", file=sys.stderr)
    print(f"{len(args.latents) - len(failed)} of {len(args.latents)} latents decoded")
    return 3 if failed else 0


def _encode(args) -> int:
    from .latents import save_latent
    from .video import partial_path, read_pixels

    if args.output.suffix not in (".latent", ".safetensors"):
        raise OutputError(f"{args.output}: a latent is written as .latent or .safetensors")
    partial = partial_path(args.output)  # an impossible place is refused before minutes are spent
    pixels = read_pixels(args.video)
    vae, bar = _load(args, args.vae), _Bar(args.output.name)
    try:
        latent = vae.encode(
            pixels,
            chunk_frames=args.chunk_frames,
            memory_format=args.memory_format,
            precision=args.precision,
            on_progress=bar,
        )
    finally:
        bar.close()
    save_latent(partial, latent)
    partial.replace(args.output)
    for text in vae.last_report.warnings:
        print(f"wan-vae: warning: {text}", file=sys.stderr)
    print(f"{args.output}: latent {list(latent.shape)}")
    return 0


def _inspect(args) -> int:
    import json

    from .pipeline import load

    vae = load(args.file, device="cpu")
    report = vae.inspect()
    if args.json:
        print(json.dumps(report.as_dict(), indent=1))
        return 0
    print(report_table(report))
    for layer in report.layers:
        shape = "x".join(map(str, layer.shape))
        print(f"  {layer.name:<52} {layer.op}  {shape:<20} {layer.format}")
    return 0


def _demo(args) -> int:
    from .demo import run_demo

    return run_demo(args, _load, _decode_one, report_table)


def _doctor(args) -> int:
    from .doctor import run_doctor

    return run_doctor(args.device)


def _bench(args) -> int:
    if any(word.partition("=")[0] == "--ranks" for word in args.rest):
        from .bench.ranks import main as bench
    else:
        from .bench import main as bench
    return bench(args.rest)


def report_table(report) -> str:
    """A report as a few readable lines: what, where, which layout and why, how fast."""
    layout = report.layout
    config = report.config
    used = ", ".join(f"{n} {fmt}" for fmt, n in layout.weights_used.items() if n)
    found = ", ".join(f"{n} {fmt}" for fmt, n in layout.weights_found.items() if n)
    lines = [
        f"model     {config['family']}, z {config['z_dim']}, width {config['decoder_dim']}, "
        f"{report.dtype} on {report.device} ({report.device_name})",
        f"layout    {layout.chosen} (asked: {layout.requested}; {layout.reason})",
        f"weights   found: {found}; used: {used}",
    ]
    if report.operation != "inspect":
        ours = sum(layer.backend != "eager" for layer in report.layers)
        lines += [
            f"latent    {list(report.latent_shape)} {layout.latent_format} "
            f"-> pixels {list(report.pixel_shape)}",
            f"formats   {layout.conversions} inputs matched to their weight, "
            f"{layout.mixed_calls} mixed calls",
            f"time      {report.duration_ms / 1e3:.2f} s, {report.frames_per_s or 0:.1f} frames/s, "
            f"{len(report.chunks)} chunks, {report.strips} strip(s)",
        ]
        if ours:
            lines.append(f"kernels   {ours} of {len(report.layers)} layers on proven kernels")
            lines += [f"          {o.op} off: {o.reason}" for o in report.backends_off]
        if report.memory.peak_bytes is not None:
            lines.append(f"memory    peak {report.memory.peak_bytes / 2**30:.2f} GiB on the device")
    lines += [f"fallback  {text}" for text in report.fallbacks]
    lines += [f"warning   {text}" for text in report.warnings]
    return "\n".join(lines)
