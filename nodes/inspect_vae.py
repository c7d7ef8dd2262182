"""WanVAEInspect: what a VAE is and which layout a decode would choose, without decoding."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..wan_vae.commands.report_text import report_text
from .reports import HIDDEN
from .schema import schema, vae_input
from .session import session
from .weights import weight_dtypes


class WanVAEInspect(io.ComfyNode):
    """Looks at the weights; runs no convolution."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WanVAEInspect",
            display_name="Wan VAE Inspect",
            description="Says which Wan VAE this is, how its weights are stored, which memory "
            "layout a decode would use, and why. Decodes nothing.",
            search_aliases=["vae info", "memory format", "channels last", "wan inspect", "layout"],
            inputs=[vae_input()],
            outputs=[io.String.Output(display_name="report", tooltip="The report as text.")],
            hidden=list(HIDDEN),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, vae: Any) -> io.NodeOutput:
        with session(cls.hidden, vae, "auto", "inspect") as run:
            run.packed.load(0)
            report = run.with_notes(run.wan.inspect())
            text = report_text(report, dtypes=weight_dtypes(vae), all_layers=True)
            run.report = {**report.as_dict(), "text": text}  # shown on the node
        return io.NodeOutput(text, ui={**run.ui, "text": [text]})
