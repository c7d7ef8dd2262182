"""Checks what git tracks: no large files, no conflict markers.

python -m tests.architecture.check_files
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
MAX_BYTES = 300_000
# The miniature VAE of the demo.
LARGE = {"examples/wan_vae_mini.safetensors": 8_000_000}
# Spelled so that this file does not hold them.
MARKERS = tuple((sign * 7 + " ").encode() for sign in "<>")


def faults(root: Path, names: list[str]) -> Iterator[str]:
    """What is wrong with the files `names` below `root`, one line each."""
    for name in names:
        path = root / name
        if not path.is_file():
            continue  # deleted, and not committed yet
        content = path.read_bytes()
        limit = LARGE.get(name, MAX_BYTES)
        if len(content) > limit:
            yield f"{name}: {len(content)} bytes; at most {limit}"
        if any(line.startswith(MARKERS) for line in content.splitlines()):
            yield f"{name}: a conflict marker"
    yield from (f"{name}: listed as large, but gone" for name in LARGE.keys() - set(names))


def tracked(root: Path) -> list[str]:
    """The files that git tracks in `root`, relative to it."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z"], check=True, capture_output=True, text=True
    )
    return [name for name in listed.stdout.split("\0") if name]


if __name__ == "__main__":
    lines = list(faults(REPOSITORY, tracked(REPOSITORY)))
    print("\n".join(lines), end="\n" if lines else "")
    sys.exit(bool(lines))
