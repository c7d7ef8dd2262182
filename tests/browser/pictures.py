"""The pictures of README and example workflows, from screenshots that the browser tests took.

make pictures        # runs those tests, then this
"""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("WAN_VAE_SCREENSHOTS", "test-results/browser"))
THUMBNAIL_WIDTH = 640


def main() -> None:
    """Reduce and copy the screenshots; raises FileNotFoundError if the tests have not run."""
    for look in ("canvas", "nodes2"):
        shot = Image.open(FOLDER / f"readme-newest-{look}.png").convert("RGB")
        shot.quantize(192).save(REPOSITORY / f"docs/images/comfyui_{look}.png", optimize=True)
    for workflow in sorted((REPOSITORY / "example_workflows").glob("*.json")):
        shot = Image.open(FOLDER / f"workflow-{workflow.stem}-pinned-nodes2.png").convert("RGB")
        _nodes(shot).save(workflow.with_suffix(".jpg"), quality=82, optimize=True)


def _nodes(shot: Image.Image) -> Image.Image:
    """The part of a screenshot where the nodes are, reduced to a thumbnail."""
    canvas = shot.crop((62, 92, shot.width, shot.height - 110))  # less bars and buttons
    bright = canvas.convert("L").point(lambda value: 255 if value > 60 else 0)
    bottom = bright.getbbox()[3] + 24
    nodes = canvas.crop((0, 0, canvas.width, min(bottom, canvas.height)))
    height = round(nodes.height * THUMBNAIL_WIDTH / nodes.width)
    return nodes.resize((THUMBNAIL_WIDTH, height), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
