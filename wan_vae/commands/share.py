"""`wan-vae doctor --share`: what this card does, as Markdown to paste into an issue.

Holds no path and no name of a user or a machine.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from ..device import device_name, pick_device, versions
from ..errors import first_line
from ..io.sink import NullSink
from ..kernels.cuda.driver import nvrtc_version
from ..kernels.device import Device
from ..options import RunOptions
from ..pipeline import WanVAE, load
from ..report import DecodeReport
from ..runs.engine import SetupRequest
from .kernel_rows import KernelRow, float16_sums_note, kernel_rows
from .outlook import random_vae
from .report_text import gibibytes

# Latent frames, and pixels of the picture: 17 frames of 480p; where no GPU is, 5 small ones.
_FRAMES, _HEIGHT, _WIDTH = 5, 480, 832
_FRAMES_ELSEWHERE, _SIDE_ELSEWHERE = 2, 64
# Folders in front of a file's name, on any system.
_FOLDERS = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[\\/](?:[^\\/\s'\"]+[\\/])+")


def run_share(requested: str | None, file: str | None) -> int:
    """Decode once to warm up and once under the clock, and print the block; returns 0.

    requested: the device, None for the best one. file: weights; None takes random ones. Raises
    what `load` and `WanVAE.decode` raise.
    """
    device = pick_device(requested)
    print(share_text(device, file))
    return 0


def share_text(device: torch.device, file: str | None) -> str:
    """The block of Markdown."""
    vae = random_vae(device) if file is None else load(file, device)
    shape = _latent_shape(vae)
    rows = _rows(vae, shape)
    latent = torch.randn(shape, device=device)
    for _ in range(2):  # the first loads libraries and fills the allocator
        vae.decode(latent, sink=NullSink())
    report = vae.last_report
    assert report is not None  # a decode that returns has one
    weights = "random weights" if file is None else "weights from a file"
    lines = [
        f"### wan-vae {versions()['wan_vae']} on {report.device_name}",
        "",
        *_table(("", ""), _facts(device, report, weights)),
        "",
        *_table(("layers", "", "runs", "ms", "eager ms", "gain"), map(_cells, rows)),
        "",
        *[f"- not used: {off.op} {off.backend}: {off.reason}" for off in report.backends_off],
        *[f"- fallback: {text}" for text in report.fallbacks],
        *[f"- warning: {text}" for text in report.warnings],
    ]
    note = float16_sums_note(rows)
    if note is not None:
        lines.append(f"- {note}")
    return without_folders("\n".join(lines).rstrip())


def without_folders(text: str) -> str:
    """`text` without the folders of the paths in it, which name users and machines.

    The user's own folder first: its name may hold spaces.
    """
    with suppress(RuntimeError):  # neither HOME nor an entry for this user
        home = Path.home()
        # With the system's own strokes, and with those that libraries write on Windows too.
        text = text.replace(str(home), "").replace(home.as_posix(), "")
    return _FOLDERS.sub("", text)


def _latent_shape(vae: WanVAE) -> tuple[int, ...]:
    factor = vae.config.decoded_factor
    if vae.device.type == "cpu":
        size = (_FRAMES_ELSEWHERE, _SIDE_ELSEWHERE // factor, _SIDE_ELSEWHERE // factor)
    else:
        size = (_FRAMES, _HEIGHT // factor, _WIDTH // factor)
    return (1, vae.config.z_dim, *size)


def _rows(vae: WanVAE, shape: tuple[int, ...]) -> tuple[KernelRow, ...]:
    setup = vae.engine.setup(SetupRequest("decode", shape, RunOptions()))
    return kernel_rows(setup.model, "decoder", False, setup.ops)


def _facts(device: torch.device, report: DecodeReport, weights: str) -> list[tuple[str, str]]:
    found = versions()
    names = ("torch", "cuda", "cudnn", "triton")
    known = [f"{name} {found[name]}" for name in names if found[name]]
    if torch.version.hip is not None:
        known.append(f"hip {torch.version.hip}")
    system = (platform.system(), platform.release(), platform.machine())
    _, _, frames, height, width = report.pixel_shape or (0,) * 5
    seconds, memory = (report.duration_ms or 0) / 1e3, report.memory
    rate = report.frames_per_s or 0
    return [
        ("card", _card(device)),
        ("driver", _driver_version() if device.type == "cuda" else "none"),
        ("versions", ", ".join([*known, _nvrtc()])),
        ("platform", f"{' '.join(system)}, Python {platform.python_version()}"),
        ("model", f"{report.config['family']}, {weights}, {report.dtype}"),
        (f"decode of {width} x {height} x {frames}", f"{seconds:.3f} s, {rate:.1f} frames/s"),
        (
            "memory",
            f"planned {gibibytes(memory.planned_bytes)}, peak {gibibytes(memory.peak_bytes)}",
        ),
    ]


def _card(device: torch.device) -> str:
    parts = [device_name(device)]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        parts += [
            f"{properties.multi_processor_count} multiprocessors",
            gibibytes(properties.total_memory),
        ]
    card = Device.of(device)
    if card.capability is not None:
        parts.append(f"compute capability {card.capability[0]}.{card.capability[1]}")
    elif device.type == "cuda":
        parts.append(card.architecture)
    imitation = Device.chosen_for(device).imitation
    return ", ".join(parts) + ("" if imitation is None else f", {imitation}")


def _driver_version() -> str:
    """What nvidia-smi says; the library has no way to ask the driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {first_line(error)}"
    return done.stdout.partition("\n")[0].strip()


def _nvrtc() -> str:
    try:
        return "nvrtc {}.{}".format(*nvrtc_version())
    except OSError:
        return "no nvrtc"


def _cells(row: KernelRow) -> tuple[str, ...]:
    choice = row.choice
    times = (None, None) if choice is None else (choice.ms, choice.eager_ms)
    return (
        str(row.layers),
        row.problem,
        row.runs,
        *("" if ms is None else f"{ms:.3f}" for ms in times),
        row.gain,
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
