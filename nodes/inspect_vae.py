"""WanVAEInspect: what a VAE is and which layout a decode would choose, without decoding."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..wan_vae.commands.report_text import report_rows, rows_text
from ..wan_vae.said import worded
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
            rows = report_rows(report, dtypes=weight_dtypes(vae), all_layers=True)
            text = rows_text(rows)
            plain: dict[str, Any] = report.as_dict()
            # Shown on the node, in the language of the page.
            plain["rows"] = [[str.__str__(part) for part in row] for row in rows]
            plain["worded"] |= worded(part for row in rows for part in row)
            run.report = plain
        return io.NodeOutput(text, ui={**run.ui, "text": [text]})
