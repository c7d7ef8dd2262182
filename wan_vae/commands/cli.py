"""The command line: decode, encode, inspect, demo, doctor, bench.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 3 some of several latents
failed, 130 interrupted, 143 ended by SIGTERM, 129 by SIGHUP. WAN_VAE_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError, WanVAEError
from ..version import __version__
from .console import Bar as _Bar
from .console import drop_stdout, say, spell_anything


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    spell_anything()
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    is_debugged = bool(os.environ.get("WAN_VAE_DEBUG"))
    try:
        with _signals_interrupt():
            code = args.run(args)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a full disk behind it can still be told
            return code
    except WanVAEError as error:
        if is_debugged:
            raise
        say(f"wan-vae: {error}")
        return 1
    except _Ended as ended:
        say(f"wan-vae: ended by {ended.signal.name}")
        return 128 + ended.signal
    except KeyboardInterrupt:
        say("wan-vae: interrupted")
        return 130
    except BrokenPipeError:
        drop_stdout()  # the reader of our output (head, say) has left
        return 1
    except OSError as error:
        # Files are opened and written where OutputError is raised; what remains is stdout.
        if is_debugged:
            raise
        drop_stdout()
        say(f"wan-vae: {error.filename or 'standard output'}: {error.strerror or error}")
        return 1


class _Ended(KeyboardInterrupt):
    """A signal that asks the program to end; cleaned up after as after Ctrl-C."""

    def __init__(self, number: int):
        super().__init__()
        self.signal = signal.Signals(number)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise like Ctrl-C, so that no partial file stays behind.

    A signal that somebody ignores (nohup) or handles is left alone. So are ranks other than a
    node's first: they write no files, and one that waits in a collective must end at once.
    """
    found = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    is_main = threading.current_thread() is threading.main_thread()
    ours = [
        number
        for number in found
        if number is not None
        and is_main
        and os.environ.get("LOCAL_RANK", "0") == "0"
        and signal.getsignal(number) == signal.SIG_DFL
    ]

    def end(number: int, frame) -> None:
        for other in ours:  # a second one must not interrupt the cleaning up
            signal.signal(other, signal.SIG_IGN)
        raise _Ended(number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


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
            choices=("auto", "eager", "triton", "cuda"),
            help="eager: plain PyTorch; triton, cuda: our own kernels, each proven on this device "
            "first; auto: the fastest that was measured on such a card (default: auto)",
        )

    def model_options(sub: argparse.ArgumentParser, vae_required: bool = True) -> None:
        if vae_required:
            sub.add_argument("--vae", type=Path, required=True, help="checkpoint file or folder")
        sub.add_argument("--device", help="cuda:0, cpu, mps (default: the best one here)")
        sub.add_argument(
            "--precision",
            default="auto",
            choices=("auto", "fp32", "bf16", "fp16"),
            help="compute dtype (default: auto, bf16 on a CUDA device and fp32 elsewhere)",
        )
        sub.add_argument(
            "--memory-format",
            default="auto",
            choices=("auto", "contiguous", "channels_last_3d"),
            help="of weights and activations; any gives the same picture (default: auto, the "
            "faster one where the device is right with it)",
        )
        sub.add_argument(
            "--chunk-frames", type=int, metavar="N", help="latent frames a chunk (default: planned)"
        )

    def output_options(sub: argparse.ArgumentParser, text: str) -> None:
        sub.add_argument(
            "-o", "--output", type=Path, required=True, help=f"{text}; required, no default"
        )
        sub.add_argument(
            "--force",
            action="store_true",
            help="overwrite an output that exists (default: refuse; torchrun skips it)",
        )

    sub = command(
        "decode", _decode, "Decode latents to video, image, frames or tensors.",
        "wan-vae decode my.latent --vae wan_2.1_vae.safetensors -o out.mp4",
    )  # fmt: skip
    sub.add_argument("latents", nargs="+", type=Path, metavar="LATENT",
                     help=".latent, .safetensors or .npy")  # fmt: skip
    output_options(
        sub, ".mp4, .mkv, .mov, .png (one frame), .safetensors (float pixels), or a folder of PNG "
        "frames; for several latents, a folder that gets one .mp4 each",
    )  # fmt: skip
    sub.add_argument("--fps", type=float, default=16.0, metavar="RATE",
                     help="frames a second of a video (default: 16)")  # fmt: skip
    sub.add_argument(
        "--strips",
        type=int,
        metavar="N",
        help="decode in so many exact bands to save memory (default: planned)",
    )
    sub.add_argument(
        "--normalized",
        action="store_true",
        help="latents are as diffusers holds them (default: as ComfyUI does)",
    )
    model_options(sub)
    backend_option(sub)

    sub = command(
        "encode", _encode, "Encode a video or an image to a latent.",
        "wan-vae encode in.mp4 --vae wan_2.1_vae.safetensors -o encoded.latent",
    )  # fmt: skip
    sub.add_argument("video", type=Path,
                     help="a video, or an image: .png, .jpg, .webp, .bmp")  # fmt: skip
    output_options(sub, ".latent or .safetensors file")
    model_options(sub)
    backend_option(sub)

    sub = command(
        "inspect", _inspect, "Say what a checkpoint is: config, dtypes, memory formats.",
        "wan-vae inspect wan_2.1_vae.safetensors",
    )  # fmt: skip
    sub.add_argument("file", type=Path, help="checkpoint file or folder")
    sub.add_argument("--layers", action="store_true",
                     help="list every convolution (default: count them)")  # fmt: skip
    sub.add_argument("--json", action="store_true",
                     help="the whole report as JSON (default: text)")  # fmt: skip

    sub = command(
        "demo", _demo, "Decode the sample latents of the repository with its miniature VAE.",
        "wan-vae demo --output demo_output",
    )  # fmt: skip
    sub.add_argument("-o", "--output", type=Path, default=Path("demo_output"), metavar="FOLDER",
                     help="where videos, pictures and layout_report.json go, over those of an "
                     "earlier demo (default: demo_output)")  # fmt: skip
    sub.add_argument(
        "--garble",
        action="store_true",
        help="also draw raw NDHWC bytes that are read as NCDHW (default: no)",
    )
    model_options(sub, vae_required=False)
    backend_option(sub)

    sub = command(
        "doctor", _doctor, "Check which layouts are right on this machine, and say why any is off.",
        "wan-vae doctor",
    )  # fmt: skip
    sub.add_argument("--device", help="check only this device (default: all)")

    sub = command(
        "bench", _bench, "Compare with fastvae, diffusers and ComfyUI; see wan-vae bench --help.",
        "wan-vae bench --repeats 5 --output results", add_help=False,
    )  # fmt: skip
    return parser


def _load(args, path: Path):
    from ..device import DTYPES
    from ..pipeline import load

    vae = load(path, device=args.device)
    if args.precision in ("fp32",) and vae.dtype != DTYPES["fp32"]:
        # Weights rounded at loading would not be the file's: load them as asked.
        vae = load(path, device=args.device, dtype=args.precision)
    return vae


def _decode_one(vae, latent, output: Path, args, extra=()) -> None:
    """Decode to `output` and to the sinks of `extra`; whatever fails leaves none of them behind."""
    from .. import geometry
    from ..io.latents import check_latent
    from ..io.video import TeeSink, open_sink

    sinks, bar = list(extra), None
    try:
        check_latent(latent, vae.config)
        shape = geometry.pixel_shape(tuple(latent.shape), vae.config)
        bar = _Bar(output.name, total=shape[2])
        sinks.insert(0, open_sink(output, shape, getattr(args, "fps", 16.0)))
        vae.decode(
            latent,
            normalized=getattr(args, "normalized", False),
            chunk_frames=args.chunk_frames,
            memory_format=args.memory_format,
            precision=args.precision,
            strips=getattr(args, "strips", None),
            backend=args.backend,
            sink=TeeSink(*sinks),
            on_progress=bar,
            should_stop=bar.begin,
        )
    except BaseException:
        TeeSink(*sinks).abort()
        raise
    finally:
        if bar is not None:
            bar.close()
    for text in (*getattr(sinks[0], "warnings", ()), *vae.last_report.warnings):
        say(f"wan-vae: warning: {text}")


def _refuse_to_overwrite(outputs: list[Path]) -> None:
    """Raise OutputError if there is something at one of them; an empty folder is nothing."""
    there = [
        path
        for path in outputs
        if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path))
    ]
    if there:
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise OutputError(
            f"{there[0]}{more}: exists: name another output, or overwrite it with --force"
        )


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
    from ..io.latents import load_latent
    from ..io.video import check_sink
    from .torchrun import Place, decode_list

    outputs = _outputs(args)
    place = Place.of(os.environ)
    if place is not None:
        if args.strips is not None:
            raise OutputError("--strips is for one device: leave it out under torchrun")
        return decode_list(args, _load, outputs, place, _Bar)
    for output in outputs:  # an impossible one is refused before anything is loaded
        check_sink(output)
    if not args.force:
        _refuse_to_overwrite(outputs)
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
            say(f"wan-vae: {error}")
    print(f"{len(args.latents) - len(failed)} of {len(args.latents)} latents decoded")
    return 3 if failed else 0


def _encode(args) -> int:
    from ..io.files import Partial, check_output
    from ..io.latents import save_latent
    from ..io.video import read_pixels

    check_output(args.output)
    if args.output.suffix.lower() not in (".latent", ".safetensors"):
        raise OutputError(f"{args.output}: a latent is written as .latent or .safetensors")
    if not args.force:
        _refuse_to_overwrite([args.output])
    pixels = read_pixels(args.video)
    vae, bar = _load(args, args.vae), _Bar(args.output.name)
    partial = Partial(args.output)  # a folder without rights is refused before minutes are spent
    try:
        latent = vae.encode(
            pixels,
            chunk_frames=args.chunk_frames,
            memory_format=args.memory_format,
            precision=args.precision,
            backend=args.backend,
            on_progress=bar,
            should_stop=bar.begin,
        )
        save_latent(partial.path, latent, name=args.output)
        partial.publish()
    except BaseException:
        partial.discard()
        raise
    finally:
        bar.close()
    for text in vae.last_report.warnings:
        say(f"wan-vae: warning: {text}")
    print(report_table(vae.last_report))
    print(f"written   {args.output}")
    return 0


def _inspect(args) -> int:
    import json
    from collections import Counter

    from ..io.checkpoint import load_checkpoint
    from ..pipeline import WanVAE

    checkpoint = load_checkpoint(args.file)
    report = WanVAE.from_state_dict(checkpoint.state, device="cpu").inspect()
    tensors = checkpoint.state.values()
    dtypes = dict(Counter(str(v.dtype).removeprefix("torch.") for v in tensors).most_common())
    size = sum(v.numel() * v.element_size() for v in tensors)
    if args.json:
        file = {"tensors": len(tensors), "dtypes": dtypes, "bytes": size,
                "keys": checkpoint.key_layout, "prefix": checkpoint.prefix}  # fmt: skip
        plain = {**report.as_dict(), "compute_dtype": report.dtype, "file": file}
        print(json.dumps(plain, indent=1))
        return 0
    stored = ", ".join(f"{_count(n, 'tensor')} of {dtype}" for dtype, n in dtypes.items())
    behind = f" behind {checkpoint.prefix!r}" if checkpoint.prefix else ""
    print(f"file      {stored}, {size / 1e6:.1f} MB, {checkpoint.key_layout} keys{behind}")
    print(f"compute   {report.dtype} on {report.device} (bfloat16 on a CUDA device; --precision)")
    print(report_table(report))
    if args.layers:
        for layer in report.layers:
            shape = "x".join(map(str, layer.shape))
            print(f"  {layer.name:<52} {layer.op}  {shape:<20} {layer.format}")
    else:
        kinds = Counter((layer.op, layer.format) for layer in report.layers)
        counts = ", ".join(f"{n} {op} {fmt}" for (op, fmt), n in kinds.items())
        print(f"layers    {counts} (each of them: --layers)")
    return 0


def _demo(args) -> int:
    from .demo import run_demo

    return run_demo(args, _load, _decode_one, report_table)


def _doctor(args) -> int:
    from .doctor import run_doctor

    return run_doctor(args.device)


def _bench(args) -> int:
    if any(word.partition("=")[0] == "--ranks" for word in args.rest):
        from benchmarks.suite.ranks import main as bench
    else:
        from benchmarks.suite import main as bench
    return bench(args.rest)


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def report_table(report) -> str:
    """A report as a few readable lines: what, where, which layout and why, how fast."""
    layout = report.layout
    config = report.config
    used = ", ".join(f"{n} {fmt}" for fmt, n in layout.weights_used.items() if n)
    found = ", ".join(f"{n} {fmt}" for fmt, n in layout.weights_found.items() if n)
    model = f"{config['family']}, z {config['z_dim']}, width {config['decoder_dim']}"
    if report.operation != "inspect":  # which computes nothing, anywhere
        model += f", {report.dtype} on {report.device} ({report.device_name})"
    lines = [
        f"model     {model}",
        f"layout    {layout.chosen} (asked: {layout.requested}; {layout.reason})",
        f"weights   found: {found}; used: {used}",
    ]
    if report.operation != "inspect":
        ours = sum(layer.backend != "eager" for layer in report.layers)
        latent, pixels = list(report.latent_shape), list(report.pixel_shape)
        if report.operation == "encode":
            shapes = f"pixels    {pixels} {layout.latent_format} -> latent {latent}"
        else:
            shapes = f"latent    {latent} {layout.latent_format} -> pixels {pixels}"
        lines += [
            shapes,
            f"formats   {layout.conversions} inputs matched to their weight, "
            f"{_count(layout.mixed_calls, 'mixed call')}",
            f"time      {report.duration_ms / 1e3:.2f} s, {report.frames_per_s or 0:.1f} frames/s, "
            f"{_count(len(report.chunks), 'chunk')}, {_count(report.strips, 'strip')}",
        ]
        if ours:
            lines.append(f"kernels   {ours} of {len(report.layers)} layers on proven kernels")
            lines += [f"          {o.op} off: {o.reason}" for o in report.backends_off]
        if report.memory.peak_bytes is not None:
            lines.append(f"memory    peak {report.memory.peak_bytes / 2**30:.2f} GiB on the device")
    lines += [f"fallback  {text}" for text in report.fallbacks]
    lines += [f"warning   {text}" for text in report.warnings]
    return "\n".join(lines)
