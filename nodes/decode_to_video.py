"""WanVAEDecodeToVideo: LATENT and VAE to a video file, without the frames ever being one IMAGE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import InputImpl, io

from ..wan_vae import geometry
from ..wan_vae.options import MemoryFormat
from . import inputs
from .reports import HIDDEN
from .schema import chunk_input, latent_input, layout_input, precision_input, schema, vae_input
from .session import session


class WanVAEDecodeToVideo(io.ComfyNode):
    """Streams each chunk of frames into the encoder of a file in ComfyUI's output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WanVAEDecodeToVideo",
            display_name="Wan VAE Decode to Video",
            description="Decodes a Wan latent straight into a video file in the output folder. "
            "Frames are written as they are decoded, so a long clip needs no more memory than a "
            "short one.",
            search_aliases=[
                "save video",
                "vae decode video",
                "wan video",
                "long video",
                "mp4",
                "latent to video",
                "video combine",
                "vhs",
                "out of memory",
            ],
            inputs=[
                latent_input(),
                vae_input(),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=0.01,
                    max=1000.0,
                    step=0.01,
                    tooltip="Frames per second: 16 for Wan 2.1, 24 for Wan 2.2 5B.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="video/WanVAE",
                    tooltip="Folder and name in the output folder, as in Save Video.",
                ),
                layout_input(),
                precision_input(),
                chunk_input(),
            ],
            outputs=[
                io.Video.Output(
                    display_name="VIDEO",
                    is_output_list=True,
                    tooltip="The video file. A batch gives one file for each latent.",
                )
            ],
            hidden=list(HIDDEN),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        samples: Mapping[str, Any],
        vae: Any,
        fps: float,
        filename_prefix: str,
        memory_layout: MemoryFormat = "auto",
        precision: str = "auto",
        chunk_frames: int = 0,
    ) -> io.NodeOutput:
        from ..wan_vae.io.video_write import VideoFileSink

        files: list[SavedFile] = []
        with session(cls.hidden, vae, precision, "decode") as run:
            config = run.wan.config
            for latent in run.one_by_one(inputs.latent_5d(samples)):
                plan = run.plan(
                    tuple(latent.shape),
                    memory_format=memory_layout,
                    chunk_frames=chunk_frames,
                    whole_frames=True,
                )
                shape = geometry.pixel_shape(tuple(latent.shape), config)
                file = SavedFile.new(filename_prefix, width=shape[4], height=shape[3])
                sink = VideoFileSink(file.path, shape[3], shape[4], fps)
                run.decode_into(sink, latent, plan)
                files.append(file)
        videos = [InputImpl.VideoFromFile(str(file.path)) for file in files]
        shown = [file.as_ui() for file in files]
        # `images` with `animated` is how ComfyUI's own Save Video has its file shown on the node.
        ui = {"images": shown, "animated": (True,), **run.ui}
        return io.NodeOutput(videos, ui=ui)


class SavedFile:
    """A new file in the output folder, numbered as ComfyUI numbers its files."""

    def __init__(self, folder: str, name: str, subfolder: str):
        self.path = Path(folder) / name
        self._subfolder = subfolder

    @classmethod
    def new(cls, prefix: str, width: int, height: int) -> SavedFile:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory(), width, height
        )
        return cls(folder, f"{name}_{counter:05}_.mp4", subfolder)

    def as_ui(self) -> dict[str, str]:
        return {"filename": self.path.name, "subfolder": self._subfolder, "type": "output"}
