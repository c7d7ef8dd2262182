"""Compile the Triton kernels for a card that need not be there; say what each costs.

    python benchmarks/kernel_resources.py                     # Hopper: all configurations
    python benchmarks/kernel_resources.py --first --json      # those that are tried first

Registers a thread, bytes of stack (spilled registers), shared memory of a program, how many
tensor core instructions the loop has and how often it waits for them. As many waits as
instructions means that the compiler serialised them, for want of registers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wan_vae.config import wan21, wan22
from wan_vae.kernels.layer import fit_channels
from wan_vae.kernels.triton import attention as triton_attention
from wan_vae.kernels.triton import conv3d as triton_conv3d
from wan_vae.kernels.triton import head as triton_head
from wan_vae.kernels.triton import norm as triton_norm
from wan_vae.kernels.triton import strided as triton_strided
from wan_vae.kernels.triton.attention import AttentionConfig
from wan_vae.kernels.triton.configs import attention_candidates, conv_candidates
from wan_vae.kernels.triton.conv3d import Config
from wan_vae.kernels.triton.strided import StridedConfig, strided_candidates
from wan_vae.network.model import WanVAEModel
from wan_vae.network.sites import decoder_sites, encoder_sites

PROGRAMS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    kernel: str
    config: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    waits: int


@dataclass(frozen=True)
class Fixed:
    """The one configuration of a kernel that has no others."""

    name: str
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Kernel:
    """A kernel to compile: its function, types of its arguments, and compile-time constants."""

    name: str
    config: Config | AttentionConfig | StridedConfig | Fixed
    function: triton.JITFunction
    types: dict[str, str]
    constants: dict[str, object]


FAMILIES = {"wan2.1": wan21, "wan2.2": wan22}


def kernels(families: list[str], first: bool) -> Iterator[Kernel]:
    """Every kernel of the full-width models, each configuration once; `first`: the best ones."""
    seen = set()
    for family in families:
        config = FAMILIES[family]()
        with torch.device("meta"):
            model = WanVAEModel(config)
        for site in (*decoder_sites(model), *encoder_sites(model)):
            o, c = fit_channels(site.weight).shape[:2]
            narrow = site.kind == "head" and o * 9 <= 128
            if narrow:
                found = []
            elif site.kind == "strided":
                found = [_strided(site, o, c, k) for k in strided_candidates(c, o)]
            elif site.kind == "attention":
                found = [_attention(c, k) for k in attention_candidates(c)]
            else:
                found = [_conv(site, o, c, k) for k in conv_candidates(c, o, site.frames)]
            found = found[:1] if first else found
            if site.gamma is not None:
                found += _norms(c, silu=site.kind != "attention")
            if narrow:
                found += _head(c, o)
            for kernel in found:
                if (kernel.name, kernel.config) not in seen:
                    seen.add((kernel.name, kernel.config))
                    yield kernel


def _conv(site, o: int, c: int, config: Config) -> Kernel:
    up = site.kind == "upsample"
    kt, kh, kw = (1, 2, 2) if up else site.weight.shape[2:]
    operand = {"stream": "bf16", "upsample": "bf16"}.get(site.kind, "fp16")
    operand = "fp32" if site.kind in ("latent", "moments") else operand
    constants = dict(
        CIN=c, F=config.F, PH=config.PH, PW=config.PW, N0=config.N0, N1=config.N1, BK=config.BK,
        KT=kt, KH=kh, KW=kw, PAD_Y=kh // 2, PAD_X=kw // 2, TAP0=0, UP=up,
        PRECISION=triton_conv3d.FLOAT32_PRECISION, HAS_BIAS=True, HAS_RESIDUAL=not up,
    )  # fmt: skip
    types = {
        "x": f"tensordesc<{operand}[1, {config.PH}, {config.PW}, {config.BK}]>",
        "w0": f"tensordesc<{operand}[{config.N0}, {config.BK}]>",
        "w1": f"tensordesc<{operand}[{config.N1 or config.N0}, {config.BK}]>",
        **dict.fromkeys(("bias", "residual"), "*bf16"),
        "out": "*fp32" if site.kind in ("head", "moments") else "*bf16",
    }
    name = f"{site.kind} {c}x{o} {kt}x{kh}x{kw}"
    return Kernel(name, config, triton_conv3d._conv, types, constants)


def _strided(site, o: int, c: int, config: StridedConfig) -> Kernel:
    """Over every second pixel of each frame, or over every second frame."""
    kt, kh, kw = (1, 3, 3) if site.weight.ndim == 4 else (3, 1, 1)
    st, sy, sx = (1, 2, 2) if site.weight.ndim == 4 else (2, 1, 1)
    constants = dict(
        CIN=c, COUT=o, M=config.M, N0=config.N0, N1=config.N1, BK=config.BK, KT=kt, KH=kh, KW=kw,
        ST=st, SY=sy, SX=sx, PRECISION=triton_conv3d.FLOAT32_PRECISION, HAS_BIAS=True,
    )  # fmt: skip
    types = dict.fromkeys(("x", "weight", "bias", "out"), "*bf16")
    name = f"strided {c}x{o} {kt}x{kh}x{kw}"
    return Kernel(name, config, triton_strided._strided, types, constants)


def _attention(c: int, config: AttentionConfig) -> Kernel:
    constants = dict(D=c, DC=config.DC, NC=config.NC, M=config.M, BN=config.BN)
    types = {
        "q": f"tensordesc<fp16[1, {config.M}, {config.DC}]>",
        **dict.fromkeys(("k", "v"), f"tensordesc<fp16[1, {config.BN}, {config.DC}]>"),
        "out": "*fp16",
        "scale": "fp32",
    }
    return Kernel(f"attention {c}", config, triton_attention._attention, types, constants)


def _norms(c: int, silu: bool) -> list[Kernel]:
    """A bfloat16 stream, float16 operands and history: what a decode in bf16 launches."""
    types = {
        "x": "*bf16", "scale": "*fp32",
        **dict.fromkeys(("has_x", "has_history", "keep"), "fp32"),
        **dict.fromkeys(("history", "buffer", "out", "kept"), "*fp16"),
    }  # fmt: skip
    common = dict(C=c, BLOCK_C=triton.next_power_of_2(c))
    found = []
    for placed in (False, True) if silu else (False,):
        shard = " of a shard" if placed else ""
        joined = dict(ROWS=32, PAST_FRAMES=2 if silu else 0, SILU=silu, PLACED=placed)
        join = Fixed(f"join silu={silu}{shard}", 8 if c > 256 else 4)
        function = triton_norm._norm_silu_join
        found.append(Kernel(f"norm {c}", join, function, types, common | joined))
        if silu:
            paired = dict(ROWS=triton_norm.pair_rows(c), PLACED=placed)
            function, pairs = triton_norm._norm_silu_pairs, Fixed(f"pairs{shard}")
            found.append(Kernel(f"norm {c}", pairs, function, types, common | paired))
    return found


def _head(c: int, o: int) -> list[Kernel]:
    types = {
        "buffer": "*fp16", "weight": "*fp16", "partial": "*fp32", "bias": "*fp32", "out": "*fp32",
    }  # fmt: skip
    sums = dict(
        C=c, BLOCK_C=32, COLS=max(16, triton.next_power_of_2(9 * o)), USED=9 * o, M=128, KT=3
    )
    gather = dict(OUT=o, M=1024, PAD_Y=1, PAD_X=1, HAS_BIAS=True)
    return [
        Kernel(f"head {c}x{o}", Fixed("partials"), triton_head._partials, types, sums),
        Kernel(f"head {c}x{o}", Fixed("gather"), triton_head._gather, types, gather),
    ]


def compile_kernel(kernel: Kernel, capability: int) -> Resources:
    """Compile for `capability` (90 is Hopper). Raises what Triton's compiler raises."""
    names = kernel.function.arg_names
    signature = {
        name: "constexpr" if name in kernel.constants else kernel.types.get(name, "i32")
        for name in names
    }
    # What Triton finds out at a launch: widths are multiples of 16, and pointers are aligned.
    aligned = [i for i, n in enumerate(names) if n == "cout" or signature[n].startswith("*")]
    source = ASTSource(
        kernel.function,
        signature,
        constexprs={(names.index(name),): value for name, value in kernel.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": kernel.config.warps, "num_stages": kernel.config.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    return Resources(
        kernel.name,
        kernel.config.name,
        int(re.search(r"REG:(\d+)", usage)[1]),
        int(re.search(r"STACK:(\d+)", usage)[1]),
        made.metadata.shared,
        len(re.findall(r"\b[HIQ]?G?MMA\.", code)),
        code.count("WARPGROUP.DEPBAR"),
    )


def _run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(PROGRAMS / program), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90, help="90 is Hopper (default)")
    parser.add_argument("--first", action="store_true", help="only what is tried first")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: both")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = kernels(args.family or list(FAMILIES), args.first)
    rows = [compile_kernel(kernel, args.capability) for kernel in found]
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return 0
    print("| kernel | configuration | registers | stack | shared KiB | tensor core | waits |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for r in rows:
        print(
            f"| {r.kernel} | {r.config} | {r.registers} | {r.stack_bytes} | "
            f"{r.shared_bytes / 1024:.0f} | {r.tensor_core_instructions} | {r.waits} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
