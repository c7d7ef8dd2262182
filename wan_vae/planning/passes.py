"""How many frames of features go through each stage of the decoder at a time.

A latent frame is small at the latent's resolution and takes gigabytes in the last stage. A chunk
therefore passes the trunk as a whole and the stages in passes of fewer frames.
"""

from __future__ import annotations

from ..config import WanVAEConfig
from ..network import architecture


def pass_frames(
    config: WanVAEConfig, latent_shape: tuple[int, ...], elements: int
) -> tuple[int, ...]:
    """Frames of features that enter each stage of the decoder together (`Step.pass_frames`).

    As many as keep the features that enter a stage, and those that it makes of them, below
    `elements` numbers; but at least two where a latent frame becomes several (see
    `decoder.first_pass`). latent_shape: [B, z, T, rows, W] of the picture, or of the rows that a
    strip reads.
    """
    b, _, _, h, w = latent_shape
    found: list[int] = []
    per_latent, pixels = 1, b * h * w
    for stage in architecture.stages(config):
        largest = max(stage.channels_in, stage.channels) * pixels
        factor = 2 if stage.temporal else 1
        if stage.up is not None:
            largest = max(largest, stage.up.channels * pixels * 4 * factor)
        frames = elements // largest
        found.append(max(1, frames) if per_latent == 1 else max(2, frames - frames % 2))
        pixels, per_latent = pixels * 4, per_latent * factor
    return tuple(found)
