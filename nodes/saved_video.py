"""Video files as ComfyUI saves them: numbered names that no other writer takes, tags, settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal

import folder_paths
from comfy.cli_args import args

from ..wan_vae import OutputError
from ..wan_vae.io.files import check_output, writing
from ..wan_vae.said import expected_one_of, said

# The words of core's Save Video: containers, of which auto is mp4.
FORMATS = ("auto", "mp4", "mkv", "webm")
# Where a file goes: what ComfyUI calls its folders.
FOLDERS = ("output", "temp")
Folder = Literal["output", "temp"]


class SavedVideo:
    """A new file in one of ComfyUI's folders, numbered as ComfyUI numbers its files.

    `names` are the numbers from the next free one on. The file takes the first of them that is free
    when it is complete: two servers that count at the same time lose no file.
    """

    def __init__(self, prefix: str, folder: Folder, container: str, width: int, height: int):
        """Raises OutputError for a prefix that names no file in the folder, for one that cannot be
        written, and for a folder that is none of FOLDERS."""
        if folder not in FOLDERS:
            raise OutputError(expected_one_of("save_to", folder, FOLDERS))
        if container not in FORMATS:
            raise OutputError(expected_one_of("format", container, FORMATS))
        if os.path.basename(os.path.normpath(prefix.strip())) in ("", ".", ".."):
            raise OutputError(
                said(
                    "video.no_name",
                    "filename_prefix is {prefix}, which names no file: expected a name, or a "
                    "folder and a name, such as video/WanVAE",
                    prefix=repr(prefix),
                )
            )
        root = {
            "output": folder_paths.get_output_directory,
            "temp": folder_paths.get_temp_directory,
        }[folder]()
        self._folder: Folder = folder
        self._suffix = "mp4" if container == "auto" else container
        wanted = Path(os.path.abspath(os.path.join(root, os.path.normpath(prefix.strip()))))
        if not wanted.is_relative_to(os.path.abspath(root)):
            raise OutputError(
                said(
                    "video.outside",
                    "filename_prefix is {prefix}, which is outside the {folder} folder: expected a "
                    "name in it, such as video/WanVAE",
                    prefix=repr(prefix),
                    folder=folder,
                )
            )
        check_output(wanted.with_name(f"{wanted.name}_00001_.{self._suffix}"))
        with writing(wanted, RecursionError):  # thousands of folders, each made by another call
            self._place, self._name, self._counter, self._subfolder, _ = (
                folder_paths.get_save_image_path(prefix.strip(), root, width, height)
            )

    @property
    def names(self) -> Iterator[Path]:
        return (
            Path(self._place) / f"{self._name}_{number:05}_.{self._suffix}"
            for number in count(self._counter)
        )

    def as_ui(self, path: Path) -> dict[str, str]:
        """What tells the page where the file `path` is."""
        return {"filename": path.name, "subfolder": self._subfolder, "type": self._folder}


def metadata(hidden: Any) -> dict[str, str]:
    """Workflow and prompt as core's Save Video writes them; nothing with --disable-metadata.

    hidden: the node's hidden inputs. What API clients send as extra data is theirs to choose.
    """
    if args.disable_metadata:
        return {}
    found: dict[str, Any] = {}
    if isinstance(hidden.extra_pnginfo, dict):
        found |= hidden.extra_pnginfo
    if hidden.prompt is not None:
        found["prompt"] = hidden.prompt
    return {str(key): json.dumps(value) for key, value in found.items()}
