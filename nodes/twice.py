"""The pack in two folders (a Git clone and the Registry's, a zip's "-main", a link): one is loaded.

ComfyUI imports each folder of custom_nodes as a package of its own. A route that is registered
twice would keep it from starting, and two sets of scripts would break the page.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

from comfy_api.latest import ComfyExtension, io

# Under this name the first copy is found by the others, whose own names are paths.
_FIRST = "comfyui_wan_vae.first_copy"
FOLDER = Path(__file__).parents[1]
# What the first copy says of others to whoever asks; see `reports.add_routes`.
NOTICES: list[str] = []


def is_first_copy() -> bool:
    """Whether this is the copy to be loaded. Of any other, the log says which folder to delete."""
    first = sys.modules.setdefault(_FIRST, sys.modules[__name__])
    if first is sys.modules[__name__]:
        return True
    loaded: Path = first.FOLDER
    notice = first.advice(loaded, FOLDER)
    logging.error(notice)
    first.NOTICES.append(notice)
    return False


def advice(loaded: Path, other: Path) -> str:
    """A sentence for the user: where the two copies are, and which of them to delete."""
    # Not above: a copy that is not loaded leaves its library alone.
    from ..wan_vae.said import said

    delete = min((other, loaded), key=_worth)
    kept = loaded if delete == other else other
    return said(
        "pack.twice",
        "Wan VAE is installed twice: {loaded} {about_loaded} is loaded, {other} {about_other} is "
        "not. Delete {delete} and keep {kept}, then start ComfyUI again.",
        loaded=loaded,
        about_loaded=_words(loaded),
        other=other,
        about_other=_words(other),
        delete=delete,
        kept=kept,
    )


def _worth(folder: Path) -> tuple[list[int], bool, bool]:
    """What is deleted first: the older version, then a link, then a downloaded zip."""
    numbers = [int(number) for number in re.findall(r"\d+", _version(folder))]
    is_zip = folder.name.endswith(("-main", "-master"))
    return numbers, not os.path.islink(folder), not is_zip


def _version(folder: Path) -> str:
    try:
        text = (folder / "wan_vae" / "version.py").read_text(encoding="utf-8")
    except OSError:  # it has gone since, or is of another shape
        return "0"
    match = re.search(r'__version__ = "([^"]+)"', text)
    return match[1] if match else "0"


def _words(folder: Path) -> str:
    link = ", a link" if os.path.islink(folder) else ""
    return f"(version {_version(folder)}{link})"


class NothingMore(ComfyExtension):
    """What ComfyUI gets of a copy that is not the first: no nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return []


async def comfy_entrypoint() -> NothingMore:
    """Called by ComfyUI in place of `extension.comfy_entrypoint`."""
    return NothingMore()
