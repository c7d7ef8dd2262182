"""Checks the types of the library and of the nodes, as on Linux, Windows and macOS.

    python -m tests.architecture.check_types [linux] [win32] [darwin]

mypy's settings are in pyproject.toml. The nodes import the library relative to the repository's
root, which ComfyUI loads as a package under the name of its folder. mypy needs a name that Python
accepts, so it gets one: a link to the repository in mypy's own cache folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PLATFORMS = ("linux", "win32", "darwin")
PACK = "pack"


def check(platform: str, arguments: Sequence[str] = ()) -> int:
    """Run mypy for one platform; returns its exit status. `arguments` are more of mypy's own."""
    cache = REPOSITORY / ".mypy_cache"
    root = cache / "root"
    root.mkdir(parents=True, exist_ok=True)
    link = root / PACK
    if not link.is_symlink():
        link.symlink_to(REPOSITORY, target_is_directory=True)
    command = [
        *(sys.executable, "-m", "mypy", "--config-file", str(REPOSITORY / "pyproject.toml")),
        # A cache for each: mypy keeps what it found for one platform only.
        *("--cache-dir", str(cache / platform), "--platform", platform),
        *("--package", f"{PACK}.wan_vae", "--package", f"{PACK}.nodes"),
        *arguments,
    ]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "MYPYPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # Paths as the reader knows them, not through the link.
    out = done.stdout.replace(f"{link.relative_to(REPOSITORY)}/", "")
    print(f"{platform}: {out}", end="", flush=True)
    return done.returncode


def main() -> int:
    """Check the platforms that the command line names, or all; 0 if there was no error."""
    platforms = sys.argv[1:] or PLATFORMS
    unknown = sorted(set(platforms) - set(PLATFORMS))
    if unknown:
        print(f"no such platform: {', '.join(unknown)}; one of {', '.join(PLATFORMS)}")
        return 2
    return max([check(platform) for platform in platforms])


if __name__ == "__main__":
    sys.exit(main())
