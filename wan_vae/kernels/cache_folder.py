"""Where verdicts and compiled kernels are kept between processes, and how."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path | None:
    """`WAN_VAE_CACHE`, or `wan_vae` in the user's cache folder. May not exist yet.

    None if there is no such place, because the user has no home folder.
    """
    named = os.environ.get("WAN_VAE_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    if base:
        return Path(base) / "wan_vae"
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry for this user
        return None
    return home / ".cache" / "wan_vae"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, for several processes; makes its folder.

    Raises OSError, and leaves nothing behind then: on Windows a file that another process reads
    cannot be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content)
        os.replace(name, path)
    except OSError:
        with suppress(OSError):  # the error that led here is the one to report
            os.unlink(name)
        raise
