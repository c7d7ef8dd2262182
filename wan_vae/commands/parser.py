"""The arguments of all commands. Needs no PyTorch, so --help and wrong usage are quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..options import BACKENDS, MEMORY_FORMATS, PRECISIONS, RunOptions
from ..version import __version__
from .requests import DecodeRequest, DemoRequest, EncodeRequest, InspectRequest, PlanRequest

Options = argparse.ArgumentParser | argparse._ArgumentGroup


def parse(argv: Sequence[str] | None) -> Callable[[], int]:
    """Parse the arguments; returns what runs the command and gives its exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    return partial(args.run, args)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `wan-vae`; each command sets `run`, which takes the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="wan-vae", description="Decode and encode latents of Wan 2.1, Wan 2.2 and Qwen-Image."
    )
    parser.add_argument("--version", action="version", version=f"wan-vae {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, text: str, example: str, *, add_help: bool = True
    ) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=text, epilog=f"example: {example}", add_help=add_help
        )

    _add_decode(
        command(
            "decode",
            "Decode latents to a video, an image, frames or tensors.",
            "wan-vae decode my.latent --vae wan_2.1_vae.safetensors -o out.mp4",
        )
    )
    _add_encode(
        command(
            "encode",
            "Encode a video, an animation or a picture to a latent.",
            "wan-vae encode in.mp4 --vae wan_2.1_vae.safetensors -o encoded.latent",
        )
    )
    _add_inspect(
        command(
            "inspect",
            "Print what a checkpoint is (configuration, dtypes, memory formats), or with --plan "
            "how a latent would be decoded with it.",
            "wan-vae inspect wan_2.1_vae.safetensors --plan my.latent",
        )
    )
    _add_demo(
        command(
            "demo",
            "Decode the sample latents of the repository with its miniature VAE.",
            "wan-vae demo --output demo_output",
        )
    )
    _add_doctor(
        command(
            "doctor",
            "Check which memory formats and kernels give correct results on this machine.",
            "wan-vae doctor",
        )
    )
    _add_warm(
        command(
            "warm",
            "Compile the kernels of a VAE now, and with a card prove and time them, so that no "
            "decode has to.",
            "wan-vae warm wan_2.1_vae.safetensors",
        )
    )
    bench = command(
        "bench",
        "Compare with fastvae, diffusers and ComfyUI; see wan-vae bench --help.",
        "wan-vae bench --repeats 5 --output results",
        add_help=False,
    )
    bench.set_defaults(run=_bench)
    return parser


# -- options that several commands have -----------------------------------------------------------


def _add_model_options(options: Options) -> list[argparse.Action]:
    return [
        options.add_argument("--device", help="cuda:0, xpu, mps, cpu (default: the best one here)"),
        options.add_argument(
            "--precision",
            default="auto",
            choices=PRECISIONS,
            help="compute dtype (default: auto, which is bf16 on a GPU that has it, and fp32 on "
            "the CPU; wan-vae doctor says which)",
        ),
        options.add_argument(
            "--memory-format",
            default="auto",
            choices=MEMORY_FORMATS,
            help="memory format of weights and activations; the picture is the same with each "
            "(default: auto, the faster one of those that give correct results on the device)",
        ),
        options.add_argument(
            "--chunk-frames",
            type=int,
            metavar="N",
            help="latent frames per chunk (default: planned)",
        ),
        options.add_argument(
            "--backend",
            default="auto",
            choices=BACKENDS,
            help="eager: plain PyTorch; triton, cuda: our kernels; kitchen: comfy-kitchen's; each "
            "is checked on this device before its first use (default: auto, which is our kernels "
            "on the cards that they are for, and eager elsewhere)",
        ),
    ]


def _add_strips(options: Options) -> argparse.Action:
    return options.add_argument(
        "--strips",
        type=int,
        metavar="N",
        help="go through the picture in N strips of rows to save memory, with the same result "
        "(default: planned)",
    )


def _add_vae(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--vae", type=Path, required=True, help="checkpoint file or folder")


def _add_output(sub: argparse.ArgumentParser, text: str) -> None:
    sub.add_argument(
        "-o", "--output", type=Path, required=True, help=f"{text}; required, no default"
    )
    sub.add_argument(
        "--force",
        action="store_true",
        help="overwrite an output that exists (default: refuse; under torchrun, skip it)",
    )


def _add_key(sub: argparse.ArgumentParser | argparse._ArgumentGroup) -> argparse.Action:
    return sub.add_argument(
        "--key",
        metavar="NAME",
        help="the tensor in a file of several (default: the one that is named as a latent)",
    )


def _options(args: argparse.Namespace) -> RunOptions:
    return RunOptions(
        chunk_frames=args.chunk_frames,
        memory_format=args.memory_format,
        precision=args.precision,
        backend=args.backend,
    )


# -- the commands: their options, and the request that a parsed command makes ---------------------


def _add_decode(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "latents",
        nargs="+",
        type=Path,
        metavar="LATENT",
        help=".latent, .safetensors, .pt, .npy, .npz",
    )
    _add_output(
        sub,
        ".mp4, .mkv, .mov, .png (one frame), .safetensors (float pixels), or a folder of PNG "
        "frames; for several latents, a folder that gets an .mp4 for each",
    )
    sub.add_argument(
        "--fps",
        type=float,
        metavar="RATE",
        help="frames per second of a video (default: the model's: 24 for Wan 2.2 5B, else 16)",
    )
    _add_key(sub)
    sub.add_argument(
        "--normalized",
        action="store_true",
        help="the latents are normalised, as in diffusers (default: as in ComfyUI, unless the file "
        "says that they are)",
    )
    _add_vae(sub)
    _add_model_options(sub)
    _add_strips(sub)
    sub.set_defaults(run=_decode)


def _decode(args: argparse.Namespace) -> int:
    from .decode import run_decode

    options = replace(_options(args), strips=args.strips)
    return run_decode(
        DecodeRequest(
            latents=tuple(args.latents),
            vae=args.vae,
            output=args.output,
            device=args.device,
            options=options,
            normalized=args.normalized,
            fps=args.fps,
            overwrite=args.force,
            key=args.key,
        )
    )


def _add_encode(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("video", type=Path, help="a video, an animation or a picture")
    _add_output(sub, ".latent or .safetensors file")
    _add_vae(sub)
    _add_model_options(sub)
    _add_strips(sub)
    sub.set_defaults(run=_encode)


def _encode(args: argparse.Namespace) -> int:
    from .encode import run_encode

    return run_encode(
        EncodeRequest(
            video=args.video,
            vae=args.vae,
            output=args.output,
            device=args.device,
            options=replace(_options(args), strips=args.strips),
            overwrite=args.force,
        )
    )


def _add_inspect(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("file", type=Path, help="checkpoint file or folder")
    sub.add_argument("--layers", action="store_true", help="list each layer (default: count them)")
    sub.add_argument("--json", action="store_true", help="print JSON (default: text)")
    sub.add_argument(
        "--plan",
        type=Path,
        metavar="LATENT",
        help="print the plan of decoding this latent, without decoding it: memory format, kernels, "
        "chunks, strips and memory (default: describe the checkpoint)",
    )
    group = sub.add_argument_group("options of the plan")
    options = _add_model_options(group)
    options.append(_add_strips(group))
    options.append(_add_key(group))
    options.append(
        group.add_argument(
            "--free-bytes",
            type=float,
            metavar="N",
            help="plan for N bytes of free device memory (default: what the device has free)",
        )
    )
    sub.set_defaults(run=partial(_inspect, sub, options))


def _inspect(
    sub: argparse.ArgumentParser, plan_options: list[argparse.Action], args: argparse.Namespace
) -> int:
    if args.plan is None:
        for option in plan_options:
            if getattr(args, option.dest) != option.default:
                sub.error(f"{option.option_strings[0]} is an option of --plan LATENT")
    from .inspect import run_inspect, run_plan

    if args.plan is None:
        return run_inspect(
            InspectRequest(file=args.file, all_layers=args.layers, as_json=args.json)
        )
    options = RunOptions(
        chunk_frames=args.chunk_frames,
        memory_format=args.memory_format,
        precision=args.precision,
        strips=args.strips,
        backend=args.backend,
        free_bytes=args.free_bytes,
    )
    return run_plan(
        PlanRequest(
            file=args.file,
            latent=args.plan,
            device=args.device,
            options=options,
            all_layers=args.layers,
            as_json=args.json,
            key=args.key,
        )
    )


def _add_demo(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("demo_output"),
        metavar="FOLDER",
        help="the folder for videos, pictures and layout_report.json; files of an earlier demo are "
        "overwritten (default: demo_output)",
    )
    sub.add_argument(
        "--garble",
        action="store_true",
        help="also draw what NDHWC bytes look like when they are read as NCDHW (default: no)",
    )
    _add_model_options(sub)
    sub.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    from .demo import run_demo

    return run_demo(
        DemoRequest(
            output=args.output, device=args.device, options=_options(args), garble=args.garble
        )
    )


def _add_doctor(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", help="check only this device (default: all)")
    _add_share(sub)
    sub.set_defaults(run=partial(_doctor, sub))


def _add_warm(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="checkpoint file or folder (default: Wan 2.1 and Wan 2.2, with random weights)",
    )
    where = sub.add_mutually_exclusive_group()
    where.add_argument("--device", help="cuda:0 (default: the best one here)")
    where.add_argument(
        "--card",
        metavar="NAME",
        help='compile for a card that is not here: its name ("RTX 4090"), compute capability (8.9) '
        "or architecture (gfx1100); nothing is proven then (default: for the device)",
    )
    sub.set_defaults(run=_warm)


def _warm(args: argparse.Namespace) -> int:
    from .warm import run_warm

    return run_warm(args.files, args.device, args.card)


def share_parser() -> argparse.ArgumentParser:
    """The parser of `wan-vae bench --share`, which is `wan-vae doctor --share`."""
    parser = argparse.ArgumentParser(prog="wan-vae bench --share")
    parser.add_argument("--device", help="measure this device (default: the best one)")
    _add_share(parser)
    return parser


def _add_share(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--share",
        action="store_true",
        help="print card, versions, kernels and the time of a short decode as Markdown to paste "
        "into an issue, without paths or names of users (default: no)",
    )
    sub.add_argument(
        "--vae", metavar="FILE", help="with --share: the weights (default: random ones)"
    )


def _doctor(sub: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.vae is not None and not args.share:
        sub.error("--vae is an option of --share")
    if args.share:
        from .share import run_share

        return run_share(args.device, args.vae)
    from .doctor import run_doctor

    return run_doctor(args.device)


def _bench(args: argparse.Namespace) -> int:
    if "--share" in args.rest:  # needs no benchmarks, so no clone
        parser = share_parser()
        return _doctor(parser, parser.parse_args(args.rest))
    from .bench import run_bench

    return run_bench(args.rest)
