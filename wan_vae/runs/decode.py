"""A decode: latents to pixels, chunk by chunk, in passes, in strips where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from math import prod

import torch

from .. import geometry, layout
from ..arithmetic import own_arithmetic
from ..chunking import Chunk
from ..errors import DecodeMemoryError, LatentError, OutputError
from ..geometry import Strip
from ..hooks import DeviceMemory, Hooks, OwnMemory
from ..io.latents import WHAT, as_batch, check_latent_shape, wrong_values
from ..io.sink import NullSink, Sink, TensorSink, check_out, is_copying, sink_bytes, sink_video
from ..io.tensors import Extremes
from ..network.blocks import Step
from ..network.cache import FeatureCache
from ..options import Gather, RunOptions
from ..planning.passes import frames_of_passes, pass_frames
from ..planning.plan import Plan
from ..said import said
from ..sharding.context import SINGLE, ShardContext
from ..sharding.plan import ShardPlan, plan_shards
from .engine import Engine, Setup, SetupRequest, latent_statistics, options_of
from .parked import (
    DeviceFeatures,
    Features,
    HostFeatures,
    HostFrames,
    StripHistories,
    WholeFrames,
)
from .ranks import Ranks
from .run import (
    Piece,
    Run,
    forget_failure,
    granted,
    in_memory,
    latent_frames_of,
    plan_in_room,
    ready,
)


@dataclass(frozen=True)
class DecodeRequest:
    """What is to be decoded, how, and where the pixels go; see `WanVAE.decode`.

    notes: sentences for `report.fallbacks`, from a caller that tried something else first.
    await_latent: of a `latent` that another process still writes: returns when all of it is there.
    """

    latent: torch.Tensor
    normalized: bool = False
    options: RunOptions = field(default_factory=RunOptions)
    hooks: Hooks = field(default_factory=Hooks)
    plan: Plan | None = None
    out: torch.Tensor | None = None
    sink: Sink | None = None
    context: ShardContext = SINGLE
    gather: Gather = "all"
    notes: tuple[str, ...] = ()
    await_latent: Callable[[], None] | None = None


class DecodeRun(Run):
    """One decode under way."""

    def __init__(self, engine: Engine, request: DecodeRequest, ranks: Ranks | None = None) -> None:
        """Check the request and make the model ready. A collective where ranks share the picture.

        ranks: this process's part of the picture; None takes it from `request.context`.
        Raises LatentError, GeometryError, LayoutError, BackendError, ShardingError.
        """
        if request.sink is not None and request.out is not None:
            raise OutputError("decode got both out= and sink=: expected one of them")
        latent = as_batch(request.latent, WHAT["latent"])
        check_latent_shape(latent, engine.config)
        shape = tuple(latent.shape)
        shards = shards_of(request.context, shape)
        options = options_of(request.plan, request.options)
        memory = request.hooks.memory or OwnMemory(engine.device)
        setup = ready(engine, SetupRequest("decode", shape, options, shards), memory)
        z: torch.Tensor | None = None
        if ranks is None and request.context.same_input:
            # All ranks will find the same in the latent, and get ready while it is on its way.
            setup, ranks, early = _join_early(engine, setup, latent, request, memory)
            super().__init__(engine, setup, request.hooks, ranks)
            self._early_plan = early
        else:
            z, wrong = _received(request, latent, engine.device, memory)
            if ranks is None:
                # Also where values are wrong: ranks that raise the same are ready for the next run.
                is_finite = wrong is None
                setup, ranks = join_ranks(
                    engine, setup, latent, request.context, request.gather, is_finite
                )
            if wrong is not None:
                raise wrong
            super().__init__(engine, setup, request.hooks, ranks)
        self.request = request
        self.pixel_shape = geometry.pixel_shape(shape, self.config)
        self.builder.layout["latent_format"] = layout.detect(latent)
        self.builder.pixel_shape = self.pixel_shape
        self.builder.fallbacks.extend(request.notes)
        self._z = None if z is None else self._own_latent(z)
        self._extremes = Extremes()
        # Frames that were yielded and taken, which a new start does not yield again.
        self._given_frames = 0

    @property
    def z(self) -> torch.Tensor:
        """The latent of this rank's part, as the network takes it, on the device."""
        if self._z is None:
            raise RuntimeError("a run has no latent before it was received")
        return self._z

    def _receive(self) -> None:
        """Wait for a latent that was still on its way. Raises LatentError for wrong values."""
        if self._z is not None:
            return
        latent = as_batch(self.request.latent, WHAT["latent"])
        z, wrong = _received(self.request, latent, self.device, self.memory)
        if wrong is not None:
            raise wrong
        self._z = self._own_latent(z)

    def _own_latent(self, z: torch.Tensor) -> torch.Tensor:
        if self.request.normalized:
            mean, std = latent_statistics(self.config, z)
            z = z * std + mean
        own = self.ranks.own_part(z.to(self.setup.dtype))
        return own if self.ranks.exchange is None else own.contiguous()

    def decode(self) -> torch.Tensor | None:
        """Decode to `out`, to the sink, or to a new tensor, which is returned; sets `report`."""
        request, out, sink = self.request, self.request.out, self.request.sink
        try:
            if sink is None and self.ranks.receives:
                shape = self.ranks.result_shape(self.pixel_shape, self.config.decoded_factor)
                if out is None:
                    make = partial(torch.empty, shape, dtype=torch.float32, device=self.device)
                    out = granted(
                        self.device,
                        self.memory,
                        prod(shape) * 4,
                        said("run.output", "output"),
                        make,
                    )
                check_out(out, shape)
                sink = TensorSink(out)
            sink = NullSink() if sink is None else sink
            self.builder.memory["output_bytes"] = sink_bytes(sink)
            self.begin(sink.needs_whole_frames, request.plan)
        except BaseException as error:
            self.fail(error)
            abort(sink, error)
            raise
        try:
            self._receive()
        except BaseException as error:  # without a report, as of a latent that is refused at once
            abort(sink, error)
            raise
        try:
            # A sink that takes whole frames in order may have taken a part of those that failed.
            puts_again = not sink.needs_whole_frames
            self.execute(self._put_into(sink), partial(self._close, sink), puts_again)
        except BaseException as error:
            abort(sink, error)
            # Whoever keeps the error does not keep the output.
            forget_failure(error)
            del out, sink
            raise
        return out

    def _put_into(self, sink: Sink) -> Callable[[Piece], None]:
        def put(piece: Piece) -> None:
            if piece.values.numel():  # none on a rank that gets no result
                sink.write(piece.values, piece.start_frame, piece.first_row)

        return put

    def _close(self, sink: Sink) -> None:
        if is_copying(sink):
            # While the last pixels are copied: the ranks' messages take the host a millisecond.
            self._agree_on_end()
        sink.close()
        self.builder.video = sink_video(sink)

    def stream(self) -> Iterator[torch.Tensor]:
        """Pixels [B, 3, t, H', W'] as soon as frames are final; sets `report` at the end.

        `begin` must have been called.
        """
        try:
            with closing(self.pieces()) as pieces:
                while True:
                    # Entered for each pass: a context left open across a yield would leak into the
                    # caller's code.
                    with own_arithmetic(self.device):
                        piece = next(pieces, None)
                    if piece is None:
                        break
                    values = piece.values
                    del piece
                    if values.numel():  # none where a strip is done, which is no frame yet
                        yield values
                    del values
            self.complete()
        except BaseException as error:
            self.fail(error)
            forget_failure(error)
            raise

    # -- the way through -----------------------------------------------------------------------

    def _whole(self) -> Iterator[Piece]:
        done_before = self._given_frames
        for chunk, step in self.chunks(self.z.shape[3]):
            z = self.z[:, :, chunk.start : chunk.stop]
            frame, _ = geometry.chunk_frames_slice(chunk.start, chunk.stop, self.config)
            passes = (
                self.model.decode_passes(z, step)
                if self.ranks.has_rows
                else self._no_rows(chunk, step)
            )
            for part in self._passes(chunk, passes, latent_frames_of(chunk)):
                factor = self.config.decoded_factor
                pixels = self.ranks.gather(part, factor, "pixels")
                start, frame = frame, frame + part.shape[2]
                if frame > done_before:
                    new = max(start, done_before)
                    self.done_frames = frame
                    if pixels is None:
                        pixels = part[:, :, :, :0]
                    yield Piece(pixels[:, :, new - start :], new, 0)
                    self._given_frames = frame

    def _no_rows(self, chunk: Chunk, step: Step) -> Iterator[torch.Tensor]:
        """The pixels of an idle rank: frames without rows, in the passes of the other ranks."""
        b, c, _, *size = self.ranks.part_shape(self.pixel_shape, self.config.decoded_factor)
        for frames in frames_of_passes(self.config, chunk, step.pass_frames, step.pass_ends):
            yield torch.empty((b, c, frames, *size), device=self.device)

    def _in_strips(self, count: int) -> Iterator[Piece]:
        if self.plan.whole_frames:
            way = self._parked_strips if self.plan.parked else self._strips_in_each_chunk
            return way(count)
        return self._strips_one_after_another(count)

    def _strips_in_each_chunk(self, count: int) -> Iterator[Piece]:
        """Strips inside each chunk: whole frames in order; history of all strips is kept."""
        strips = geometry.strips(self.z.shape[3], count, self.config)
        caches = [FeatureCache() for _ in strips]
        done_before = self._given_frames
        b, colours, _, height, width = self.pixel_shape
        for chunk, features in self._trunk():
            first, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, self.config)
            size = (b, colours, last - first, height, width)
            frame = in_memory(
                said("run.whole_frames", "{count} whole frames", count=last - first),
                partial(features.new_empty, size, dtype=torch.float32),
            )
            for strip, cache in zip(strips, caches, strict=True):
                top, at = strip.start * self.config.decoded_factor, 0
                band = features[:, :, :, strip.halo_start : strip.halo_stop]
                for rows in self._strip_passes(band, strip, cache, chunk):
                    frame[:, :, at : at + rows.shape[2], top : top + rows.shape[3]] = rows
                    at += rows.shape[2]
            if last > done_before:
                new = max(first, done_before)
                self.done_frames = last
                yield Piece(frame[:, :, new - first :], new, 0)
                self._given_frames = last

    def _parked_strips(self, count: int) -> Iterator[Piece]:
        """Each strip through a part of the video before the next. Pixels of all strips but the last
        wait on the host, and the history of the others if there is another part. Whole frames in
        order, as the last strip makes their rows; see `parked`."""
        strips = geometry.strips(self.z.shape[3], count, self.config)
        parts = self._parts()
        longest = max(sum(self.frames_of(chunk) for chunk in part) for part in parts)
        b, colours, _, _, width = self.pixel_shape
        rows = strips[-1].start * self.config.decoded_factor
        frames = in_memory(
            said("run.host_frames", "{count} frames in host memory", count=longest),
            partial(HostFrames, (b, colours, longest, rows, width), self.device),
        )
        histories = StripHistories(count, self.device)
        try:
            trunk, cache = self._trunk(), histories.first()
            for part in parts:
                features: Features = (
                    HostFeatures(self.device) if self.plan.features_wait else DeviceFeatures()
                )
                try:
                    self._collect(trunk, len(part), features)
                    for i, strip in enumerate(strips):
                        if len(parts) == 1:
                            cache = FeatureCache()
                        done = i / len(strips)
                        yield from self._strip_of_part(part, strip, features, cache, frames, done)
                        # Behind the last strip of the last part comes nobody.
                        if len(parts) > 1 and not (part is parts[-1] and strip is strips[-1]):
                            cache = in_memory(
                                said("run.host_history", "history in host memory"),
                                partial(histories.after, i, cache),
                            )
                finally:
                    features.close()
            self._tell_of_pageable(histories)
        finally:
            histories.close()
            frames.close()

    def _parts(self) -> list[list[Chunk]]:
        """The chunks of each part of the video that all parked strips go through together."""
        chunks, stops = iter(self._schedule()), accumulate(self.plan.parts)
        found = []
        for stop in stops:
            part = [next(chunks)]
            while part[-1].stop < stop:
                part.append(next(chunks))
            found.append(part)
        return found

    def _collect(
        self, trunk: Iterator[tuple[Chunk, torch.Tensor]], chunks: int, features: Features
    ) -> None:
        """Put what the trunk makes of the next `chunks` into `features`."""
        for _ in range(chunks):
            # No variable holds what the trunk made while it makes the next.
            in_memory(
                said("run.host_features", "features in host memory"),
                partial(features.put, next(trunk)[1]),
            )

    def _strip_of_part(
        self,
        part: list[Chunk],
        strip: Strip,
        features: Features,
        cache: FeatureCache,
        frames: HostFrames,
        done: float,
    ) -> Iterator[Piece]:
        """One strip through a part. Its pixels go to `frames`, those of the last strip into whole
        frames; yields these, and pieces without pixels for progress, which counts frames. done: the
        share of the part that strips before it were."""
        first, last = self._frames_in(part)
        nothing = torch.empty(0, device=self.device)
        top, at = strip.start * self.config.decoded_factor, 0
        whole = self._whole_frames_of(part, frames, top) if strip.stop == strip.rows else None
        for number, chunk in enumerate(part):
            rows = in_memory(
                said("run.strip_rows", "rows of a strip"),
                partial(features.rows, number, strip.halo_start, strip.halo_stop),
            )
            passes = self._strip_passes(rows, strip, cache, chunk)
            del rows
            for pixels in passes:
                start, at = at, at + pixels.shape[2]
                share = done * (last - first) + at * (strip.stop - strip.start) / strip.rows
                self.done_frames = max(self.done_frames, min(first + int(share), last - 1))
                given = self._given_frames
                if whole is None:
                    frames.write(pixels, start, top)
                else:
                    yield from self._whole_with(pixels, start, whole, first)
                if self._given_frames == given:
                    yield Piece(nothing, first, top)

    def _whole_frames_of(self, part: list[Chunk], frames: HostFrames, top: int) -> WholeFrames:
        """The frames of a part that were not given yet, a latent frame's at a time. top: the first
        row of the last strip."""
        first, _ = self._frames_in(part)
        start = max(first, self._given_frames)
        latent = range(part[0].start, part[-1].stop)
        stops = [geometry.chunk_frames_slice(t, t + 1, self.config)[1] for t in latent]
        b, colours, _, height, width = self.pixel_shape
        return WholeFrames(
            frames,
            (b, colours, height, width),
            top,
            start - first,
            [stop - first for stop in stops if stop > start],
        )

    def _whole_with(
        self, pixels: torch.Tensor, start: int, whole: WholeFrames, first: int
    ) -> Iterator[Piece]:
        """The frames that are whole with `pixels` of the last strip, of frames from `start` on of a
        part that begins with frame `first`."""
        ready = whole.with_rows(pixels, start)
        what = said("run.whole_frames", "{count} whole frames", count=self.config.temporal_factor)
        while (found := in_memory(what, partial(next, ready, None))) is not None:
            values, start = found[1], first + found[0]
            del found
            stop = start + values.shape[2]
            self.done_frames = max(self.done_frames, stop)
            yield Piece(values, start, 0)
            del values
            self._given_frames = stop

    def _frames_in(self, part: list[Chunk]) -> tuple[int, int]:
        """Pixel frames [first, last) of the chunks of a part."""
        return geometry.chunk_frames_slice(part[0].start, part[-1].stop, self.config)

    def _tell_of_pageable(self, histories: StripHistories) -> None:
        if self.device.type == "cuda" and not histories.is_locked:
            self.builder.fallbacks.append(
                said(
                    "run.pageable",
                    "history waited in pageable host memory, which is slower: no more could be "
                    "locked",
                )
            )

    def _strips_one_after_another(self, count: int) -> Iterator[Piece]:
        """Each strip through all chunks before the next: history shrinks by `count` too."""
        features = list(self._trunk())
        self.done_frames = 0
        for i, strip in enumerate(geometry.strips(self.z.shape[3], count, self.config)):
            cache, frame = FeatureCache(), 0
            top = strip.start * self.config.decoded_factor
            for chunk, feature in features:
                band = feature[:, :, :, strip.halo_start : strip.halo_stop]
                for rows in self._strip_passes(band, strip, cache, chunk):
                    start, frame = frame, frame + rows.shape[2]
                    # Progress counts frames: each strip contributes its share of them.
                    self.done_frames = (i * self.total_frames + frame) // count
                    yield Piece(rows, start, top)

    def _trunk(self) -> Iterator[tuple[Chunk, torch.Tensor]]:
        """The features [B, C, T, H, W] of every chunk."""
        for chunk, step in self.chunks(1):
            z = self.z[:, :, chunk.start : chunk.stop]
            yield (
                chunk,
                self.timed(chunk, latent_frames_of(chunk), partial(self.model.trunk, z, step)),
            )

    def _strip_passes(
        self, rows: torch.Tensor, strip: Strip, cache: FeatureCache, chunk: Chunk
    ) -> Iterator[torch.Tensor]:
        """Pixels of one strip of one chunk, pass after pass. rows: of the features, with halo."""
        step = self.step(cache, chunk, rows.shape[3])
        passes = self.model.finish_passes(rows, step, strip)
        return self._passes(chunk, passes, f"strip of {rows.shape[3]} latent rows")

    def _passes(
        self, chunk: Chunk, passes: Iterator[torch.Tensor], what: str
    ) -> Iterator[torch.Tensor]:
        """The `passes` of a chunk, each under the clock, until its frames are complete."""
        missing = self.frames_of(chunk)

        def next_pass() -> torch.Tensor:
            pixels = next(passes)
            # Here, where they are few: of strips, whose rows are cut out of others, it takes their
            # memory once more.
            self._extremes.see(pixels)
            return pixels

        while missing:
            pixels = self.timed(chunk, what, next_pass)
            missing -= pixels.shape[2]
            yield pixels

    def _release(self) -> None:
        """Nothing: what a failed attempt holds ends with its generators."""

    def _pass_frames(self, shape: tuple[int, ...], elements: int, together: int) -> tuple[int, ...]:
        return pass_frames(self.config, shape, elements, together)

    def _does_not_fit(self, tried: str, reason: str) -> DecodeMemoryError:
        error = self.ranks.out_of_memory(reason)
        return error or DecodeMemoryError(
            said(
                "run.decode_out_of_memory",
                "out of memory on {device} {tried}: {reason}; {shortage}free device memory, or "
                "decode on the CPU",
                device=self.device,
                tried=tried,
                reason=reason,
                shortage=self.shortage(),
            )
        )

    # -- the end ---------------------------------------------------------------------------------

    def _is_finite(self) -> bool:
        return self._extremes.are_finite()

    def _is_not_finite(self) -> None:
        advice = said("run.use_fp32", "decode with precision='fp32'")
        if self.builder.dtype == torch.float32:
            advice = said(
                "run.look_for_damage",
                "look at the latent's largest values, and for a damaged checkpoint",
            )
        self.builder.warnings.append(
            said(
                "run.not_finite",
                "the decoded pixels hold NaN or inf (computed in {dtype}): weights or latent "
                "overflow this precision; {advice}",
                dtype=self.builder.dtype,
                advice=advice,
            )
        )


def abort(sink: Sink | None, error: BaseException) -> None:
    """Abort `sink` because of `error`, which the caller must see even if the sink fails too."""
    try:
        if sink is not None:
            sink.abort()
    except Exception as trouble:
        # A note, as `add_note` of Python 3.11 makes it.
        notes = vars(error).setdefault("__notes__", [])
        notes.append(f"the output could not be cleaned up either: {trouble}")


def _received(
    request: DecodeRequest, latent: torch.Tensor, device: torch.device, memory: DeviceMemory
) -> tuple[torch.Tensor, LatentError | None]:
    """The `latent` of `request` in float32 on `device`, and what is wrong with its values."""
    if request.await_latent is not None:
        request.await_latent()
    # A copy: a stream reads it long after the call, when the caller's may have changed.
    z = granted(
        device,
        memory,
        latent.numel() * 4,
        "latent",
        partial(latent.to, device=device, dtype=torch.float32, copy=True),
    )
    return z, wrong_values(z)  # here, on the device, it takes no time


def _join_early(
    engine: Engine,
    setup: Setup,
    latent: torch.Tensor,
    request: DecodeRequest,
    memory: DeviceMemory,
) -> tuple[Setup, Ranks | None, Plan | None]:
    """`join_ranks` of ranks that tell each other in the same message how they would go on; and this
    rank's plan. None where the caller made one, or the rank has to take other kernels."""
    context, gather, should_stop = request.context, request.gather, request.hooks.should_stop
    if request.plan is not None:
        return *join_ranks(engine, setup, latent, context, gather), None
    plan, stop = plan_in_room(engine, setup, memory), should_stop is not None and should_stop()
    joined, ranks = join_ranks(engine, setup, latent, context, gather, plan=plan, stop=stop)
    return joined, ranks, plan if joined is setup else None


def join_ranks(
    engine: Engine,
    setup: Setup,
    tensor: torch.Tensor,
    context: ShardContext,
    gather: Gather,
    is_finite: bool = True,
    plan: Plan | None = None,
    stop: bool = False,
) -> tuple[Setup, Ranks | None]:
    """This process's part among the ranks of `context`, None for one rank; and `setup` with the
    kernels that all ranks run. A collective.

    tensor: the latent or the pixels, which all ranks must hold alike. is_finite: whether this rank
    found all its values to be so. plan, stop: see `ShardRequest`. Raises ShardingError.
    """
    if setup.request.shards is None:
        return setup, None
    # Not before: the transport needs torch.distributed, which not every PyTorch has.
    from .shard_ranks import ShardRanks, ShardRequest

    ranks = ShardRanks.join(
        ShardRequest(
            context=context,
            shards=setup.request.shards,
            operation=setup.request.operation,
            tensor=tensor,
            device=setup.device,
            dtype=setup.dtype,
            gather=gather,
            choices=setup.ops.choices,
            is_finite=is_finite,
            plan=plan,
            stop=stop,
        )
    )
    theirs = ranks.agree_on_kernels(partial(engine.setup, setup.request))
    return setup if theirs is None else theirs, ranks


def shards_of(context: ShardContext, latent_shape: tuple[int, ...]) -> ShardPlan | None:
    """The rows of each rank of `context`; None for one rank. Raises GeometryError."""
    if context.is_single:
        return None
    height, width = latent_shape[3:]
    return plan_shards(height, width, context.world_size, context.axis)
