"""An encode: pixels to the mean of the posterior, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from .. import geometry, layout
from ..chunking import Chunk
from ..errors import CheckpointError, DecodeMemoryError
from ..hooks import Hooks
from ..io.latents import as_batch, check_pixels, range_warning
from ..network.blocks import Step
from ..network.model import NO_ENCODER
from ..options import Gather, RunOptions
from ..planning.plan import Plan
from ..sharding.context import SINGLE, ShardContext
from .decode import join_ranks, shards_of
from .engine import Engine, SetupRequest, latent_statistics, options_of
from .run import Piece, Run


@dataclass(frozen=True)
class EncodeRequest:
    """What is to be encoded and how; see `WanVAE.encode`."""

    pixels: torch.Tensor
    normalized: bool = False
    options: RunOptions = field(default_factory=RunOptions)
    hooks: Hooks = field(default_factory=Hooks)
    plan: Plan | None = None
    context: ShardContext = SINGLE
    gather: Gather = "all"


class EncodeRun(Run):
    """One encode under way."""

    def __init__(self, engine: Engine, request: EncodeRequest) -> None:
        """Check the request and make the model ready. A collective where ranks share the picture.

        Raises LatentError, GeometryError, LayoutError, BackendError, CheckpointError,
        ShardingError.
        """
        pixels = as_batch(request.pixels, "video")
        check_pixels(pixels, engine.config)
        shape = geometry.latent_shape(tuple(pixels.shape), engine.config)
        if engine.model.encoder is None:
            raise CheckpointError(NO_ENCODER)
        shards = shards_of(request.context, shape)
        options = options_of(request.plan, request.options)
        setup = engine.setup(SetupRequest("encode", shape, options, shards))
        pixel_format, warning = layout.detect(pixels), range_warning(pixels)
        pixels = geometry.crop_for_encode(pixels, engine.config)
        setup, ranks = join_ranks(engine, setup, pixels, request.context, request.gather)
        super().__init__(engine, setup, request.hooks, ranks)
        self.request, self.latent_shape = request, shape
        self.pixels = self.ranks.own_part(pixels, self.config.spatial_factor)
        self._size = tuple(pixels.shape)
        self.builder.layout["latent_format"] = pixel_format
        self.builder.pixel_shape = self._size
        if warning:
            self.builder.warnings.append(warning)

    def encode(self) -> torch.Tensor | None:
        """The latent of this rank's result, None where it gets none; sets `report`."""
        own = self.ranks.part_shape(self.latent_shape)
        result: torch.Tensor | None = None
        try:
            latent = torch.empty(own, dtype=torch.float32, device=self.device)
            self.builder.memory["output_bytes"] = latent.numel() * latent.element_size()
            self.begin(plan=self.request.plan)
        except BaseException as error:
            self.fail(error)
            raise

        def put(piece: Piece) -> None:
            start, values = piece.start_frame, piece.values
            if values.numel():
                latent[:, :, start : start + values.shape[2]] = values

        def close() -> None:
            nonlocal result
            result = self.ranks.gather(latent, 1, "latent")

        self.execute(put, close)
        if self.request.normalized and result is not None:
            mean, std = latent_statistics(self.config, result)
            result = (result - mean) / std
        return result

    def _whole(self) -> Iterator[Piece]:
        for chunk, step in self.chunks(self.pixels.shape[3]):
            _, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, self.config)
            mean = self.timed(
                chunk,
                f"{self.frames_of(chunk)} frames",
                partial(self._mean_of, chunk, step),
            )
            self.done_frames = last
            yield Piece(mean, chunk.start, 0)

    def _mean_of(self, chunk: Chunk, step: Step) -> torch.Tensor:
        """The mean of the posterior of `chunk`; no values on an idle rank."""
        first, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, self.config)
        x = self.pixels[:, :, first:last]
        if not self.ranks.has_rows:
            return torch.empty(0, device=self.device)
        x = x.to(device=self.device, dtype=self.ops.pixels or self.setup.dtype)
        if self.ranks.exchange is not None:
            x = layout.to_format(x, "contiguous")
        mean, _ = self.model.encode_chunk(x, step)
        return mean

    def _in_strips(self, count: int) -> Iterator[Piece]:
        raise NotImplementedError("an encode plans no strips")

    def _strip_counts(self) -> list[int]:
        return []

    @property
    def may_start_over(self) -> bool:
        return False

    def _out_of_memory(self, reason: str) -> DecodeMemoryError | None:
        return self._does_not_fit("", reason)

    def _does_not_fit(self, tried: str, reason: str) -> DecodeMemoryError:
        _, _, _, height, width = self._size
        error = self.ranks.out_of_memory(reason)
        return error or DecodeMemoryError(
            f"out of memory on {self.device} while encoding {self.total_frames} frames of "
            f"{height}x{width}: {reason}; encode a smaller video, or encode on the CPU"
        )
