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
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PLATFORMS = ("linux", "win32", "darwin")
PACK = "pack"
CACHE = REPOSITORY / ".mypy_cache"
LINK = CACHE / "root" / PACK


def start(platform: str) -> subprocess.Popen[str]:
    """Start mypy for one platform."""
    command = [
        *(sys.executable, "-m", "mypy", "--config-file", str(REPOSITORY / "pyproject.toml")),
        # A cache for each: mypy keeps what it found for one platform only.
        *("--cache-dir", str(CACHE / platform), "--platform", platform),
        *("--package", f"{PACK}.wan_vae", "--package", f"{PACK}.nodes"),
    ]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "MYPYPATH": str(LINK.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def main() -> int:
    """Check the platforms that the command line names, or all; 0 if there was no error."""
    platforms = sys.argv[1:] or PLATFORMS
    unknown = sorted(set(platforms) - set(PLATFORMS))
    if unknown:
        print(f"no such platform: {', '.join(unknown)}; one of {', '.join(PLATFORMS)}")
        return 2
    LINK.parent.mkdir(parents=True, exist_ok=True)
    if not LINK.is_symlink():
        LINK.symlink_to(REPOSITORY, target_is_directory=True)
    # One process each, side by side: a core checks a platform in some fifteen seconds.
    running = {platform: start(platform) for platform in platforms}
    for platform, process in running.items():
        out, _ = process.communicate()
        # Paths as the reader knows them, not through the link.
        print(f"{platform}: {out.replace(f'{LINK.relative_to(REPOSITORY)}/', '')}", end="")
    return max(process.returncode for process in running.values())


if __name__ == "__main__":
    sys.exit(main())
