"""The V3 extension that ComfyUI asks for its nodes."""

from __future__ import annotations

from pathlib import Path

import folder_paths
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

# The miniature VAE, for the workflow that can be tried without a download.
EXAMPLES = Path(__file__).parents[1] / "examples"


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
    """Called by ComfyUI once, at start. Adds the routes of the panel and the miniature VAE to what
    Load VAE finds, and looks at queued prompts."""
    # Not in `on_load`: ComfyUI 0.8 does not call it.
    add_routes()
    add_handler()
    if any(EXAMPLES.glob("*.safetensors")):
        folder_paths.add_model_folder_path("vae", str(EXAMPLES))
    return WanVAEExtension()
