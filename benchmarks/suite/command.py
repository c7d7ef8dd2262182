"""The command `wan-vae bench`: sends its words to the part that they name."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import (
    card_predictions,
    chunk_profile,
    conv_forms,
    emulated_scaling,
    encode,
    host_memory,
    small_cards,
    winograd_error,
)
from benchmarks.suite import compare
from benchmarks.suite.parts import OTHER_PARTS
from benchmarks.suite.ranks import command as ranks
from benchmarks.suite.ranks import rounds
from wan_vae.errors import WanVAEError

_SCRIPTS = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the part that the first word names, or the comparison; returns its exit code.

    argv: the words after `wan-vae bench`; None takes those of this process after its first.
    """
    argv = sys.argv[2:] if argv is None else argv
    if argv and argv[0] in OTHER_PARTS:
        return _RUN[argv[0]](argv[1:])
    if any(word.partition("=")[0] == "--ranks" for word in argv):
        return ranks.main(argv)
    return compare.main(argv)


class PackageMissing(WanVAEError):
    """A part of the benchmarks needs a package that is not installed."""


def _own_process(script: str, **packages: str) -> Callable[[Sequence[str]], int]:
    """For scripts about Triton, which reads its environment when it is imported, and for those
    that need packages which the other parts do without.

    packages: what it imports, and how that is installed.
    """

    def run(argv: Sequence[str]) -> int:
        for package, how in packages.items():
            if importlib.util.find_spec(package) is None:
                raise PackageMissing(f"bench: {script} needs the package {package}: {how}")
        return subprocess.call([sys.executable, str(_SCRIPTS / script), *argv])

    return run


_RUN: dict[str, Callable[[Sequence[str]], int]] = {
    "ranks": ranks.main,
    "faults": rounds.main,
    "encode": encode.main,
    "scaling": emulated_scaling.main,
    "predictions": card_predictions.main,
    "profile": chunk_profile.main,
    "kernels": _own_process(
        "kernels.py", triton="PyTorch's CUDA builds for Linux bring it, or pip install triton"
    ),
    "winograd": winograd_error.main,
    "resources": _own_process("kernel_resources.py"),
    "nodes": _own_process(
        "comfyui_nodes.py", websocket="pip install -e '.[bench]' in the clone, or websocket-client"
    ),
    "small": small_cards.main,
    "host": host_memory.main,
    "start": _own_process("next_process.py"),
    "video": _own_process("video.py"),
    "forms": conv_forms.main,
}
