"""How many frames of features go through each stage of decoder and encoder at a time.

A latent frame is small at the latent's resolution and takes gigabytes at that of the pixels. A
chunk therefore passes the trunk as a whole and the stages in passes of fewer frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..chunking import Chunk, PassEnds, next_pass
from ..config import WanVAEConfig
from ..geometry import Halo, Strip, encoder_halos
from ..network import architecture
from ..ops.opset import Prepared

# So many bytes of pixels are left for the last pass of a shard, or one latent frame: four frames of
# 480p, which take a host a millisecond or two.
_LAST_BYTES = 20 << 20


def frames_together(layers: Mapping[str, Prepared]) -> int:
    """How many frames of a latent frame no pass may part: two, because down-samplers halve them and
    up-samplers double them, or more for a kernel that makes more together (`Prepared`)."""
    return max((2, *(layer.frames_together for layer in layers.values())))


def pass_frames(
    config: WanVAEConfig, latent_shape: tuple[int, ...], elements: int, together: int = 2
) -> tuple[int, ...]:
    """Frames of features that enter each stage of the decoder together (`Step.pass_frames`).

    As many as keep the features that enter a stage, and those that it makes of them, below
    `elements` numbers; but at least those that stay together (see `chunking.next_pass`).
    latent_shape: [B, z, T, rows, W] of the picture, or of the rows that a strip reads. together:
    from `frames_together`.
    """
    b, _, _, h, w = latent_shape
    found: list[int] = []
    per_latent, pixels = 1, b * h * w
    for stage in architecture.stages(config):
        largest = max(stage.channels_in, stage.channels) * pixels
        factor = 2 if stage.temporal else 1
        if stage.up is not None:
            largest = max(largest, stage.up.channels * pixels * 4 * factor)
        found.append(_multiple(elements // largest, min(per_latent, together)))
        pixels, per_latent = pixels * 4, per_latent * factor
    return tuple(found)


def pass_ends(
    config: WanVAEConfig, latent_shape: tuple[int, ...], limits: tuple[int, ...], together: int = 2
) -> PassEnds:
    """How the passes of a shard begin and end. limits, together: of its `pass_frames`.

    The first one takes as many frames as fit, because one frame alone leaves a device half empty,
    and waits for its neighbours as often. Few are left for the last, because no device has work any
    more while their pixels are copied. latent_shape: [B, z, T, H, W] of the whole picture.
    """
    first, per_latent = [], 1
    for stage, most in zip(architecture.stages(config), limits, strict=True):
        first.append(1 + most - min(per_latent, together))
        per_latent *= 2 if stage.temporal else 1
    b, _, _, h, w = latent_shape
    frame_bytes = b * config.decoder_colours * h * w * config.decoded_factor**2 * 4
    return PassEnds(tuple(first), _multiple(_LAST_BYTES // frame_bytes, per_latent))


def stage_passes(
    config: WanVAEConfig, chunk: Chunk, limits: tuple[int, ...], ends: PassEnds
) -> Iterator[tuple[int, int]]:
    """Each pass of `chunk` through a stage of the decoder, in the order of `Decoder.passes`: the
    stage, and the frames of features that enter it."""
    stages = architecture.stages(config)
    pending = [(0, chunk.frames, chunk)]
    while pending:
        stage, frames, part = pending.pop()
        taken = next_pass(frames, stage, limits, ends, part.is_first, part.is_last)
        if taken < frames:
            part, later = part.split()
            pending.append((stage, frames - taken, later))
        yield stage, taken
        if stages[stage].up is not None:
            alone = int(part.is_first)  # the video's first frame stays one frame
            made = alone + 2 * (taken - alone) if stages[stage].temporal else taken
            pending.append((stage + 1, made, part))


def frames_of_passes(
    config: WanVAEConfig, chunk: Chunk, limits: tuple[int, ...], ends: PassEnds
) -> Iterator[int]:
    """Pixel frames of each pass of `chunk`: of what `Decoder.passes` yields."""
    last = len(architecture.stages(config)) - 1
    passes = stage_passes(config, chunk, limits, ends)
    return (frames for stage, frames in passes if stage == last)


def encoder_pass_frames(
    config: WanVAEConfig, latent_shape: tuple[int, ...], elements: int, together: int = 2
) -> tuple[int, ...]:
    """Pixel frames or frames of features that enter each stage of the encoder but the last.

    As in `pass_frames`.
    """
    b, _, _, h, w = latent_shape
    stages = architecture.encoder_stages(config)[:-1]
    pixels, per_latent = b * h * w * 4 ** len(stages), config.temporal_factor
    found: list[int] = []
    for stage in stages:
        frames = elements // (max(stage.channels_in, stage.channels) * pixels)
        found.append(_multiple(frames, min(per_latent, together)))
        pixels, per_latent = pixels // 4, per_latent // (2 if stage.temporal else 1)
    return tuple(found)


def _multiple(frames: int, of: int) -> int:
    """At most `frames`, but at least `of`."""
    return max(of, frames - frames % of)


def encoder_rows(config: WanVAEConfig, strip: Strip) -> list[int]:
    """Rows that enter each stage of the encoder for `strip`; those of the last are its own."""
    halos = (*encoder_halos(config), Halo(0, 0))
    scales = (1 << i for i in reversed(range(len(halos))))
    bounds = (strip.bounds(scale, halo) for scale, halo in zip(scales, halos, strict=True))
    return [bottom - top for top, bottom in bounds]


def encoder_latent_rows(config: WanVAEConfig, strip: Strip) -> int:
    """Latent rows that hold what `strip` reads: for `encoder_pass_frames`."""
    rows = encoder_rows(config, strip)
    return -(-rows[0] // (1 << (len(rows) - 1)))
