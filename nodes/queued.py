"""What a queued prompt will want of a VAE: which files, which parts, in which precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..wan_vae.options import Part

# The parts of a VAE that our nodes run.
PARTS: Mapping[str, tuple[Part, ...]] = {
    "WanVAEDecode": ("decoder",),
    "WanVAEDecodeSharded": ("decoder",),
    "WanVAEDecodeToVideo": ("decoder",),
    "WanVAECreateVideo": ("decoder",),
    "WanVAEEncode": ("encoder",),
    "WanVAEAccelerate": ("decoder", "encoder"),
}
# Inputs by which nodes say how many frames a video has.
_LENGTHS = ("length", "frames", "num_frames", "video_length")
# Those of its header tell what a VAE is; other formats have none.
_SUFFIXES = (".safetensors", ".sft")


@dataclass(frozen=True)
class Wish:
    """A VAE file and what a prompt will do with it. precision: "auto" is ComfyUI's choice."""

    file: str
    parts: tuple[Part, ...]
    precision: str
    images_first: bool


def wishes(prompt: object, path_of: Callable[[str], str | None]) -> list[Wish]:
    """The VAE files behind our nodes in an API prompt; those of one file and precision are one.

    path_of: the path of a file that ComfyUI has under a name, or None. A prompt is what a client
    sent: anything but nodes with inputs is passed over.
    """
    nodes = {
        str(name): node
        for name, node in (prompt.items() if isinstance(prompt, dict) else ())
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }
    images = not any(_is_video(node) for node in nodes.values())
    found: dict[tuple[str, str], tuple[Part, ...]] = {}
    for node in nodes.values():
        parts = PARTS.get(str(node.get("class_type")), ())
        if not parts:
            continue
        precision = node["inputs"].get("precision", "auto")
        for file in _files(nodes, node["inputs"].get("vae"), path_of):
            key = file, precision if isinstance(precision, str) else "auto"
            found[key] = tuple(dict.fromkeys((*found.get(key, ()), *parts)))
    return [
        Wish(file, tuple(sorted(parts)), precision, images)
        for (file, precision), parts in found.items()
    ]


def _is_video(node: Mapping[str, Any]) -> bool:
    lengths = (node["inputs"].get(name) for name in _LENGTHS)
    return any(isinstance(length, int) and length > 1 for length in lengths)


def _files(
    nodes: Mapping[str, Mapping[str, Any]], link: object, path_of: Callable[[str], str | None]
) -> Iterator[str]:
    """Of the nodes behind `link`, the one nearest to it whose values name files."""
    waiting, seen = [link], set[str]()
    while waiting:
        link = waiting.pop(0)
        if not isinstance(link, list) or not link or str(link[0]) in seen:
            continue
        seen.add(str(link[0]))
        inputs = nodes.get(str(link[0]), {}).get("inputs", {})
        values = [value for value in inputs.values() if isinstance(value, str)]
        named = [path for v in values if v.endswith(_SUFFIXES) and (path := path_of(v))]
        yield from named
        if not named:
            waiting += inputs.values()
