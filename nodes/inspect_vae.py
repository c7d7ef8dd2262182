"""WanVAEInspect: what a VAE is and which layout a decode would choose, without decoding."""

from __future__ import annotations

from comfy_api.latest import io

from .packed import weight_dtypes
from .report_text import report_text
from .reports import HIDDEN
from .schema import schema, vae_input
from .session import session


class WanVAEInspect(io.ComfyNode):
    """Looks at the weights; runs no convolution."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WanVAEInspect",
            display_name="Wan VAE Inspect",
            description="Says what a Wan VAE is, in which memory layout its weights came, which "
            "one a decode would choose and why. Decodes nothing.",
            search_aliases=["vae info", "memory format", "channels last", "wan inspect", "layout"],
            inputs=[vae_input()],
            outputs=[io.String.Output(display_name="report", tooltip="The report as text.")],
            hidden=list(HIDDEN),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, vae) -> io.NodeOutput:
        with session(cls.hidden, vae, "auto", "inspect") as run:
            run.packed.load(0)
            run.wan.inspect()
        text = report_text(run.report, weight_dtypes(vae))
        return io.NodeOutput(text, ui={**run.ui, "text": [text]})
