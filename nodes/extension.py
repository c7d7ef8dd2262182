"""The V3 extension that ComfyUI asks for its nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .accelerate import WanVAEAccelerate
from .ahead import add_handler
from .create_video import WanVAECreateVideo
from .decode import WanVAEDecode
from .decode_sharded import WanVAEDecodeSharded
from .decode_to_video import WanVAEDecodeToVideo
from .encode import WanVAEEncode
from .inspect_vae import WanVAEInspect
from .reports import add_routes


class WanVAEExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            WanVAEDecode,
            WanVAEDecodeSharded,
            WanVAEEncode,
            WanVAEInspect,
            WanVAEDecodeToVideo,
            WanVAECreateVideo,
            WanVAEAccelerate,
        ]


async def comfy_entrypoint() -> WanVAEExtension:
    """Called by ComfyUI once, at start. Adds the routes of the panel, and looks at queued
    prompts."""
    # Not in `on_load`: ComfyUI 0.8 does not call it.
    add_routes()
    add_handler()
    return WanVAEExtension()
