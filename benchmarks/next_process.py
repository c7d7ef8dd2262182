"""Where the seconds of a process's first decode go: phase by phase, in one process after another.

    wan-vae bench start [--model wan2.2] [--size 81 720 1280] [--empty] [--profile 20]

The first process finds the caches of this user as they are, or with `--empty` none; the next one
finds what the first has left, and so does the last one, which is what a user waits for after each
start of ComfyUI. Each does what a node does: it copies the weights of a file to the device, chooses
kernels, plans, and decodes a latent on the host to an IMAGE there. Without a GPU the model is
narrow and the picture small. `--profile`: the functions that took most of a phase, of the main
thread; it takes time too.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Phases that can be profiled.
_PROFILED = ("weights", "kernels", "first pass")


@dataclass
class Phases:
    """Milliseconds by phase, packages that a phase imported, and the functions that it spent most
    in. profile: how many of them; 0 for none.

    PyTorch and this package are imported while the clock runs: this module imports neither.
    """

    profile: int
    ms: dict[str, float] = field(default_factory=dict)
    imported: dict[str, list[str]] = field(default_factory=dict)
    functions: dict[str, list[str]] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str, wait: Any = None) -> Iterator[None]:
        """Measure what runs inside. wait: called at the end, so that a device is done."""
        before = _packages()
        profiler = cProfile.Profile() if self.profile and name in _PROFILED else None
        began = time.perf_counter()
        if profiler is not None:
            profiler.enable()
        yield
        if wait is not None:
            wait()
        if profiler is not None:
            profiler.disable()
            self.functions[name] = _longest(profiler, self.profile)
        self.ms[name] = (time.perf_counter() - began) * 1e3
        self.imported[name] = sorted(_packages() - before)


def _packages() -> set[str]:
    return {name.partition(".")[0] for name in list(sys.modules)}


def _longest(profiler: cProfile.Profile, count: int) -> list[str]:
    """The functions with most time of their own and of what they call, as lines."""
    stats: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    rows = sorted(stats.items(), key=lambda entry: -entry[1][3])[:count]
    return [
        f"{cumulative * 1e3:8.1f} ms, own {own * 1e3:7.1f}, {calls:6} x  {Path(file).name}:{name}"
        for (file, _, name), (_, calls, own, cumulative, _) in rows
    ]


def process(job: dict[str, Any]) -> dict[str, Any]:
    """The fresh process: what a node does, phase by phase. started_s: when it was started."""
    import torch

    phases = Phases(job["profile"])
    phases.ms["Python and PyTorch"] = (time.time() - job["started_s"]) * 1e3
    with phases.of("this package"):
        from wan_vae.io.checkpoint import load_checkpoint
        from wan_vae.io.image import ImageSink
        from wan_vae.kernels import registry
        from wan_vae.kernels.device import Device
        from wan_vae.options import RunOptions
        from wan_vae.pipeline import WanVAE
        from wan_vae.runs.engine import SetupRequest
    device = torch.device(job["device"])

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with phases.of("the device", wait):
        torch.zeros(1, device=device).add_(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with phases.of("weights", wait):
        # As of a VAE that ComfyUI has loaded, whose numbers are looked at while they are copied.
        checkpoint = load_checkpoint(job["file"], check_numbers=False)
        vae = WanVAE.from_checkpoint(checkpoint, device=device, dtype=dtype)
    shape = tuple(job["latent"])
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    card = Device.chosen_for(device)
    for family in registry.families_of("auto", card):
        with phases.of(f"family {family}"):
            registry.load(family)
    with phases.of("verdicts read"):
        verdicts = vae.engine.known_verdicts(device)
    request = SetupRequest("decode", shape, RunOptions())
    with phases.of("kernels", wait):
        setup = vae.engine.setup(request)
    with phases.of("plan"):
        plan = vae.engine.plan(setup)
    ends: list[float] = []

    def progress(done: int, total: int, report: object) -> None:
        if not ends:
            wait()
            ends.append(time.perf_counter())

    def image() -> ImageSink:
        """Where the nodes put frames: host memory."""
        return ImageSink.allocate(shape, vae.config, torch.device("cpu"))

    began = time.perf_counter()
    with phases.of("first pass", wait):  # of which the whole decode is profiled
        vae.decode(z, plan=plan, sink=image(), on_progress=progress)
    phases.ms["rest of the decode"] = (time.perf_counter() - ends[0]) * 1e3
    phases.ms["first pass"] = (ends[0] - began) * 1e3
    with phases.of("second decode", wait):
        vae.decode(z, plan=plan, sink=image())
    report = vae.last_report
    assert report is not None
    return {
        "ms": phases.ms,
        "imported": {name: found for name, found in phases.imported.items() if found},
        "functions": phases.functions,
        "verdicts": verdicts,
        "layers": sorted({f"{layer.backend} {layer.kernel}".strip() for layer in report.layers}),
        "device": report.device_name,
    }


def start(job: dict[str, Any], variables: dict[str, str]) -> dict[str, Any]:
    """One fresh process. Raises RuntimeError with its last line if it fails."""
    text = json.dumps({**job, "started_s": time.time()})
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "next_process.py"), "--process", text],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"a process failed: {(done.stderr.splitlines() or ['no message'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def lines_of(names: Sequence[str], found: Sequence[dict[str, Any]]) -> list[str]:
    """The processes side by side, and what is known of the last one."""
    phases = list(dict.fromkeys(name for one in found for name in one["ms"]))
    lines = [
        f"| phase, ms ({found[-1]['device']}) | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
        *(
            f"| {phase} | {' | '.join(_number(one['ms'].get(phase)) for one in found)} |"
            for phase in phases
        ),
    ]
    waited = [phase for phase in phases if phase not in ("Python and PyTorch", "second decode")]
    sums = (_number(sum(one["ms"].get(phase, 0.0) for phase in waited)) for one in found)
    lines += [f"| all but Python, PyTorch and the second decode | {' | '.join(sums)} |", ""]
    last = found[-1]
    lines.append(f"verdicts known at the start: {last['verdicts']}")
    lines.append(f"what runs layers: {', '.join(last['layers'])}")
    lines += [f"imported for {name}: {', '.join(new)}" for name, new in last["imported"].items()]
    for name, functions in last["functions"].items():
        lines += ["", f"{name}, main thread:", *functions]
    return lines


def _number(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="wan-vae bench start",
        description="Where the seconds of a process's first decode go.",
    )
    parser.add_argument("--model", choices=("wan2.1", "wan2.2"), default="wan2.1")
    parser.add_argument(
        "--size", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"), help="in pixels"
    )
    parser.add_argument("--empty", action="store_true", help="the first process finds no caches")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="functions of a phase")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.process is not None:
        print(json.dumps(process(json.loads(args.process))))
        return 0
    import torch
    from safetensors.torch import save_file

    from benchmarks.suite.cold_start import CACHE_VARIABLES
    from benchmarks.suite.weights import random_state
    from wan_vae.config import wan21, wan22
    from wan_vae.geometry import latent_shape

    make = {"wan2.1": wan21, "wan2.2": wan22}[args.model]
    on_card = torch.cuda.is_available()
    config = make() if on_card else make(dim=16)
    frames, height, width = args.size or ((81, 720, 1280) if on_card else (5, 64, 96))
    with tempfile.TemporaryDirectory(prefix="wan_vae_start_") as folder:
        file, caches = Path(folder) / "vae.safetensors", Path(folder) / "caches"
        save_file(random_state(config), file)
        job = {
            "file": str(file),
            "device": "cuda" if on_card else "cpu",
            "latent": latent_shape((1, 3, frames, height, width), config),
            "profile": 0,
        }
        own = {name: str(caches / name.lower()) for name in CACHE_VARIABLES}
        variables = own if args.empty else {}
        names = ("first process", "next", "the one after that")
        found = [start(job, variables) for _ in names[:2]]
        found.append(start({**job, "profile": args.profile}, variables))
    print("\n".join(lines_of(names, found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
