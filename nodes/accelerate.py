"""WanVAEAccelerate: VAE to VAE, one that decodes and encodes with our network in every node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..wan_vae.device import dtype_name
from ..wan_vae.options import MemoryFormat
from ..wan_vae.report import SCHEMA
from ..wan_vae.workers.devices import parse_devices
from . import hand_over
from .accelerated import Options, accelerated
from .ahead import ask
from .reports import HIDDEN, NodeId
from .schema import advanced, layout_input, precision_input, schema, vae_input
from .session import session
from .shards import POOLS, Sharding

# What `devices` says if the VAE's own device is meant.
ONE_DEVICE = "one"


class WanVAEAccelerate(io.ComfyNode):
    """Gives a VAE for all nodes that take one; the one that it gets stays as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WanVAEAccelerate",
            display_name="Wan VAE, fast everywhere",
            description="Gives a VAE that every node can use: image to video, VACE, inpainting, "
            "VAE Decode, tiled nodes, and nodes of other packs. It decodes and encodes as Wan VAE "
            "Decode and Encode do, and the panel shows a report for each node.",
            search_aliases=[
                "vae speed",
                "patch vae",
                "fast vae",
                "image to video",
                "vae encode",
                "vae encode tiled",
                "qwen vae",
                "out of memory",
            ],
            inputs=[
                vae_input(),
                layout_input(),
                precision_input(),
                advanced(
                    io.String.Input,
                    "devices",
                    default=ONE_DEVICE,
                    tooltip="one: the device of the VAE. Several GPUs share the work with all, or "
                    "a list of them such as 0,1,3. With cpu,cpu you can try it without a GPU.",
                ),
            ],
            outputs=[
                io.Vae.Output(
                    display_name="VAE", tooltip="The same VAE, for any node that takes one."
                )
            ],
            hidden=list(HIDDEN),
        )

    @classmethod
    def execute(
        cls,
        vae: Any,
        memory_layout: MemoryFormat = "auto",
        precision: str = "auto",
        devices: str = ONE_DEVICE,
    ) -> io.NodeOutput:
        with session(cls.hidden, vae, precision, "accelerate") as run:
            # Packs the weights: what is wrong with them is said here, not later in the workflow.
            if hand_over.unchanged(run):
                made = vae
            else:
                node, sharding = NodeId.of(cls.hidden), _sharding(devices, vae)
                if sharding is not None:
                    POOLS.start_ahead(devices, vae.device)
                own = None if node is None else node.node
                made = accelerated(vae, Options(memory_layout, precision, sharding, own))
                # Where no file was found behind the prompt, what the VAE is known now.
                ask(run.wan.config, vae.device, precision, ("decoder", "encoder"))
                run.report = {
                    "schema": SCHEMA,
                    "operation": "accelerate",
                    "status": "done",
                    "dtype": dtype_name(run.wan.dtype),
                    "device": str(vae.device),
                }
        return io.NodeOutput(made, ui=run.ui)


def _sharding(devices: str, vae: Any) -> Sharding | None:
    """What `devices` asks for; None for one. Raises ShardingError for one that is missing."""
    own = getattr(vae, "device", None)  # what is no VAE is refused in a moment
    if devices.strip() in ("", ONE_DEVICE) or len(parse_devices(devices, own)) < 2:
        return None
    return Sharding(devices)
