"""An encode: pixels to the posterior's mean, chunk by chunk, in strips where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, nan, prod

import torch

from .. import geometry, layout
from ..chunking import Chunk
from ..config import WanVAEConfig
from ..errors import DecodeMemoryError, ShardingError
from ..geometry import Strip
from ..hooks import Hooks, OwnMemory
from ..io.latents import (
    WHAT,
    as_batch,
    check_pixels,
    check_video_shape,
    not_finite,
    range_warning,
)
from ..io.pixels import FrameReader, Part, PixelSource, ReadWindow, WaitForFrames
from ..io.tensors import Extremes
from ..network.blocks import Step
from ..network.cache import FeatureCache
from ..network.model import result_of
from ..options import Gather, RunOptions
from ..planning.passes import encoder_latent_rows, encoder_pass_frames
from ..planning.plan import Plan
from ..said import said
from ..sharding.context import SINGLE, ShardContext
from .decode import join_ranks, shards_of
from .engine import Engine, SetupRequest, latent_statistics, options_of
from .run import Piece, Run, granted, in_memory, latent_frames_of, ready


@dataclass(frozen=True)
class EncodeRequest:
    """What is to be encoded and how; see `WanVAE.encode`.

    await_frames: for pixels that another process still writes; see `PixelSource`.
    """

    pixels: torch.Tensor | FrameReader
    normalized: bool = False
    options: RunOptions = field(default_factory=RunOptions)
    hooks: Hooks = field(default_factory=Hooks)
    plan: Plan | None = None
    context: ShardContext = SINGLE
    gather: Gather = "all"
    unit_range: bool = False
    await_frames: WaitForFrames | None = None


class EncodeRun(Run):
    """One encode under way."""

    def __init__(self, engine: Engine, request: EncodeRequest) -> None:
        """Check the request and make the model ready. A collective where ranks share the picture.

        Raises LatentError, GeometryError, LayoutError, BackendError, CheckpointError,
        ShardingError.
        """
        pixels = _checked(request, engine.config)
        shape = geometry.latent_shape(tuple(pixels.shape), engine.config)
        shards = shards_of(request.context, shape)
        options = options_of(request.plan, request.options)
        memory = request.hooks.memory or OwnMemory(engine.device)
        setup, ranks = ready(engine, SetupRequest("encode", shape, options, shards), memory), None
        pixel_format = "contiguous"  # as pieces of a file are read
        if isinstance(pixels, torch.Tensor):
            pixel_format = str(layout.detect(pixels))
            pixels = geometry.crop_for_encode(pixels, engine.config)
            setup, ranks = join_ranks(engine, setup, pixels, request.context, request.gather)
        super().__init__(engine, setup, request.hooks, ranks)
        self.request, self.latent_shape = request, shape
        # What values that are not finite are looked for in: whole numbers of a file have none.
        self._pixels = pixels if isinstance(pixels, torch.Tensor) else None
        source: torch.Tensor | ReadWindow
        if isinstance(pixels, torch.Tensor):
            self._size = tuple(pixels.shape)
            source = self.ranks.own_part(pixels, self.config.spatial_factor)
        else:
            window = geometry.encode_window(tuple(pixels.shape), engine.config)
            source = ReadWindow(pixels, window)
            self._size = source.shape
        self.source = PixelSource(
            source,
            self.device,
            self.ops.pixels or setup.dtype,
            unit_range=request.unit_range,
            await_frames=request.await_frames,
        )
        self.builder.layout["latent_format"] = pixel_format
        self.builder.pixel_shape = self._size

    def encode(self) -> torch.Tensor | None:
        """The latent of this rank's result, None where it gets none; sets `report`."""
        own = self.ranks.part_shape(self.latent_shape)
        result: torch.Tensor | None = None
        try:
            make = partial(torch.empty, own, dtype=torch.float32, device=self.device)
            latent = granted(self.device, self.memory, prod(own) * 4, WHAT["latent"], make)
            self.builder.memory["output_bytes"] = latent.numel() * latent.element_size()
            self._latent = latent
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
            self.source.release()
            result = self.ranks.gather(latent, 1, "latent")

        self.execute(put, close)
        if self.request.normalized and result is not None:
            mean, std = latent_statistics(self.config, result)
            result = (result - mean) / std
        return result

    # -- the way through -----------------------------------------------------------------------

    def _whole(self) -> Iterator[Piece]:
        self.source.expect(self._parts([None]))
        for chunk, step in self.chunks(self.source.rows // self.config.spatial_factor):
            what = latent_frames_of(chunk)
            if self.ranks.exchange is None:
                features = self._features(chunk, step, what)
                mean = self.timed(chunk, what, partial(self._mean, features, step))
                del features
            else:
                mean = self.timed(chunk, what, partial(self._mean_of_shard, chunk, step))
            _, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, self.config)
            self.done_frames = max(self.done_frames, last)
            yield Piece(mean, chunk.start, 0)

    def _mean_of_shard(self, chunk: Chunk, step: Step) -> torch.Tensor:
        """This rank's part of `chunk` in one go, as ranks agree to go on once a chunk; no values
        on an idle rank."""
        if not self.ranks.has_rows:
            return torch.empty(0, device=self.device)
        source, frames = self._source_of(chunk, None), self.frames_of(chunk)
        return self._mean(result_of(self.model.encode_stages(source, frames, step)), step)

    def _in_strips(self, count: int) -> Iterator[Piece]:
        """Each strip through all chunks before the next; then the trunk, which sees all of them.

        The features of all frames, at the latent's resolution, wait for it on the device: they are
        small. History shrinks by `count`.
        """
        self.done_frames = 0
        height = self.plan.latent_shape[3]
        collected: dict[Chunk, torch.Tensor] = {}
        nothing = torch.empty(0, device=self.device)
        strips = geometry.strips(height, count, self.config)
        self.source.expect(self._parts(strips))
        for i, strip in enumerate(strips):
            cache, rows = FeatureCache(), encoder_latent_rows(self.config, strip)
            for chunk, _ in self.chunks(rows):
                step = self.step(cache, chunk, rows)
                part = self._features(
                    chunk, step, said("run.strip", "strip of {rows} latent rows", rows=rows), strip
                )
                if not collected:
                    # For all chunks at once. If each came between the passes of the first strip, it
                    # would stay in memory that they need as one piece: an encode of 720p in 16
                    # strips lost 0.18 GiB of 1.1 so, in a model of PyTorch's allocator.
                    frames = self.plan.latent_shape[2]
                    collected = in_memory(
                        said("run.features", "features of {frames} frames", frames=frames),
                        partial(self._room_for_features, part, height),
                    )
                collected[chunk][:, :, :, strip.start : strip.stop] = part
                del part
                _, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, self.config)
                # As in a decode, each strip counts as its share of the frames.
                self.done_frames = (i * self.total_frames + last) // count
                yield Piece(nothing, chunk.start, 0)
        for chunk, step in self.chunks(height):
            features = collected.pop(chunk)
            mean = self.timed(chunk, latent_frames_of(chunk), partial(self._mean, features, step))
            del features
            yield Piece(mean, chunk.start, 0)

    def _room_for_features(self, part: torch.Tensor, rows: int) -> dict[Chunk, torch.Tensor]:
        """Memory for the features of every chunk, of so many latent rows, in the format of `part`,
        which is of one of them."""
        b, c, _, _, width = part.shape
        return {
            chunk: layout.empty_like_format(part, (b, c, chunk.frames, rows, width))
            for chunk in self._schedule()
        }

    def _features(
        self, chunk: Chunk, step: Step, what: str, strip: Strip | None = None
    ) -> torch.Tensor:
        """The result of the stages for `chunk`, of the whole picture or of `strip`.

        Between passes a run can be stopped. Raises DecodeCancelled, DecodeMemoryError.
        """
        stages = self.model.encode_stages(
            self._source_of(chunk, strip), self.frames_of(chunk), step, strip
        )
        while True:
            done, features = self.timed(chunk, what, partial(_next_pass, stages))
            if done:
                assert features is not None
                return features

    def _source_of(self, chunk: Chunk, strip: Strip | None) -> Callable[[int, int], torch.Tensor]:
        """What gives the pixels of `chunk` and of the rows of `strip`; see `PixelSource`."""
        start, _ = geometry.chunk_frames_slice(chunk.start, chunk.stop, self.config)
        rows = self._rows_of(strip)

        def pixels(first: int, last: int) -> torch.Tensor:
            x = self.source.fetch(start + first, start + last, rows)
            return x if self.ranks.exchange is None else layout.to_format(x, "contiguous")

        return pixels

    def _rows_of(self, strip: Strip | None) -> slice:
        """The rows of pixels that `strip` reads."""
        if strip is None:
            return slice(None)
        patch, halo = self.config.patch_size, geometry.encoder_halos(self.config)[0]
        top, bottom = strip.bounds(self.config.spatial_factor // patch, halo)
        return slice(top * patch, bottom * patch)

    def _parts(self, strips: Sequence[Strip | None]) -> Iterator[Part]:
        """All pixels that this attempt will fetch, in its order."""
        for strip in strips:
            latent_rows = self.source.rows // self.config.spatial_factor
            if strip is not None:
                latent_rows = encoder_latent_rows(self.config, strip)
            rows = self._rows_of(strip)
            for chunk, step in self.chunks(latent_rows):
                start, _ = geometry.chunk_frames_slice(chunk.start, chunk.stop, self.config)
                for one in self.model.encode_passes(self.frames_of(chunk), step):
                    yield start + one.first, start + one.last, rows

    def _mean(self, features: torch.Tensor, step: Step) -> torch.Tensor:
        mean, _ = self.model.moments(features, step)
        return mean

    def _pass_frames(self, shape: tuple[int, ...], elements: int, together: int) -> tuple[int, ...]:
        return encoder_pass_frames(self.config, shape, elements, together)

    def _release(self) -> None:
        self.source.release()

    # -- the end ---------------------------------------------------------------------------------

    def _is_finite(self) -> bool:
        extremes = self.source.extremes()
        if extremes is None:
            return True  # an idle rank
        if not all(map(isfinite, extremes)):
            return False
        if warning := range_warning(max(map(abs, extremes))):
            self.builder.warnings.append(warning)
        latent = Extremes()
        latent.see(self._latent)
        return latent.are_finite()

    def _is_not_finite(self) -> None:
        wrong = None
        if self._pixels is not None:
            wrong = not_finite(
                (nan,),
                self._pixels,
                WHAT["video"],
                said("encode.nothing", "nothing can be encoded from it"),
            )
        if wrong is not None:
            raise wrong
        advice = said("run.encode_in_fp32", "encode with precision='fp32'")
        if self.builder.dtype == torch.float32:
            advice = said("run.look_at_weights", "look for a damaged checkpoint")
        self.builder.warnings.append(
            said(
                "run.latent_not_finite",
                "the encoded latent holds NaN or inf (computed in {dtype}): the weights overflow "
                "this precision; {advice}",
                dtype=self.builder.dtype,
                advice=advice,
            )
        )

    def _out_of_memory(self, reason: str) -> DecodeMemoryError | None:
        return self._does_not_fit("", reason)

    def _does_not_fit(self, tried: str, reason: str) -> DecodeMemoryError:
        _, _, _, height, width = self._size
        error = self.ranks.out_of_memory(reason)
        tried = said("run.and_tried", ", {tried}", tried=tried) if tried else ""
        return error or DecodeMemoryError(
            said(
                "run.encode_out_of_memory",
                "out of memory on {device} while encoding {frames} frames of {size}{tried}: "
                "{reason}; {shortage}free device memory, encode a smaller video, or encode on the "
                "CPU",
                device=self.device,
                frames=self.total_frames,
                size=f"{height}x{width}",
                tried=tried,
                reason=reason,
                shortage=self.shortage(),
            )
        )


def _checked(request: EncodeRequest, config: WanVAEConfig) -> torch.Tensor | FrameReader:
    """The video of `request`, which this VAE can encode. Raises LatentError, ShardingError."""
    pixels = request.pixels
    if isinstance(pixels, torch.Tensor) or not isinstance(pixels, FrameReader):
        pixels = as_batch(pixels, WHAT["video"])
        check_pixels(pixels, config)
        return pixels
    if not request.context.is_single:
        raise ShardingError(
            said(
                "encode.pieces", "a video that is read piece by piece has no shards: pass a tensor"
            )
        )
    check_video_shape(tuple(pixels.shape), config)
    return pixels


def _next_pass(
    stages: Generator[None, None, torch.Tensor],
) -> tuple[bool, torch.Tensor | None]:
    """Run one pass of `stages`: whether it was the last, and then the features."""
    try:
        next(stages)
    except StopIteration as stop:
        return True, stop.value
    return False, None
