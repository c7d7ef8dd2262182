"""Where verdicts and compiled kernels are kept between processes."""

from __future__ import annotations

import os
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
