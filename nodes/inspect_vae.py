"""WanVAEInspect: what a VAE is and which layout a decode would choose, without decoding."""

from __future__ import annotations

from comfy_api.latest import io

from ..wan_vae.commands.report_text import report_text
from ..wan_vae.report import DecodeReport
from . import bridge
from .reports import HIDDEN
from .schema import schema, vae_input


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
        def inspect(packed, _hooks):
            packed.load(0)
            return packed.wan.inspect()

        result = bridge.run(cls.hidden, "inspect", lambda: bridge.COPIES.get(vae, "auto"), inspect)
        report = DecodeReport.from_dict(result.report)
        text = report_text(report, dtypes=bridge.weight_dtypes(vae), all_layers=True)
        return io.NodeOutput(text, ui={"wan_vae": [result.report], "text": [text]})
