"""A latent goes in, one layout decision is made, the causal decoder runs chunk by chunk, pixels
stream out, and a report says what happened. This file reads in that order.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from pathlib import Path

import torch

from . import geometry, layout
from .arithmetic import own_arithmetic
from .chunking import Chunk, schedule
from .config import WanVAEConfig, detect_config
from .device import DTYPES, is_out_of_memory, pick_device, pick_dtype
from .device import free_bytes as device_memory
from .errors import (
    BackendError,
    CheckpointError,
    DecodeCancelled,
    DecodeMemoryError,
    GeometryError,
    LatentError,
    OutputError,
    first_line,
)
from .hooks import OnProgress, ShouldStop
from .io.checkpoint import canonical_state_dict, load_checkpoint
from .io.latents import (
    as_batch,
    check_latent_shape,
    check_latent_values,
    check_pixels,
    range_warning,
)
from .io.sink import Sink, TensorSink, check_out, sink_bytes
from .kernels.cache_folder import cache_folder
from .kernels.proof.cache import ProofCache, environment
from .layout import LayoutCounter
from .network.blocks import Step
from .network.cache import FeatureCache
from .network.model import WanVAEModel, build_model, tensor_version
from .ops.opset import OpSet, eager_ops
from .options import Axis, Backend
from .planning import memory
from .report import BackendOff, ChunkRecord, DecodeReport, LayerRecord, ReportBuilder
from .runs.kernel_choice import select_ops
from .runs.sharded import decode_shard, encode_shard
from .sharding.context import SINGLE, ShardContext
from .sharding.gather import Gather
from .sharding.plan import plan_shards


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
) -> WanVAE:
    """Load a Wan 2.1 or 2.2 VAE from a checkpoint file or a diffusers folder.

    device: None takes the first CUDA device, else MPS, else the CPU. dtype: "auto", "fp32",
    "bf16", "fp16" or a torch dtype; auto is bf16 on CUDA and fp32 elsewhere.
    Raises CheckpointError (NotAWanVAEError for another model).
    """
    return WanVAE.from_state_dict(load_checkpoint(path).state, device=device, dtype=dtype)


@dataclass(frozen=True)
class _Piece:
    """Final pixels [B, 3, t, rows, W'] on the device, and where they belong."""

    pixels: torch.Tensor
    start_frame: int
    first_row: int


class WanVAE:
    """A Wan VAE ready to decode and encode on one device.

    Holds the model and the report of its last operation; everything a decode changes lives in
    that decode. Not thread-safe: use one WanVAE a thread.
    """

    def __init__(self, model: WanVAEModel, weights_found: dict[str, dict[str, int]] | None = None):
        """Wrap `model`, whose parameters decide device and dtype.

        `weights_found`: counts of memory formats ("decoder" / "encoder" -> `layout.count_formats`)
        in the checkpoint before it was packed, for the report.
        """
        self.model = model
        self.config: WanVAEConfig = model.config
        # Of the last operation; None if that was refused before it began.
        self.last_report: DecodeReport | None = None
        self.weights_found = weights_found or _weights_found(model.state_dict())
        self._cast: tuple[tuple, WanVAEModel] | None = None
        self._proofs: ProofCache | None = None

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, torch.Tensor],
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
    ) -> WanVAE:
        """Build from tensors in native, diffusers or prefixed keys, of any dtype, format, device.

        The tensors are copied, never kept. Raises CheckpointError (NotAWanVAEError).
        """
        canonical = canonical_state_dict(state).state
        hollow = [name for name, value in canonical.items() if value.is_meta]
        if hollow:
            raise CheckpointError(
                f"{hollow[0]} is meta ({len(hollow)} tensors are): expected tensors with data"
            )
        config = detect_config(canonical)
        device = pick_device(device)
        model = build_model(config, canonical, device, pick_dtype(dtype, device))
        return cls(model, _weights_found(canonical))

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where decodes run."""
        return self.model.conv2.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; a decode at precision "auto" computes in it."""
        return self.model.conv2.weight.dtype

    @property
    def decoder(self) -> torch.nn.Module:
        return self.model.decoder

    @property
    def encoder(self) -> torch.nn.Module | None:
        return self.model.encoder

    def decode(
        self,
        latent: torch.Tensor,
        *,
        normalized: bool = False,
        chunk_frames: int | Sequence[int] | None = None,
        memory_format: layout.Requested = "auto",
        precision: str = "auto",
        out: torch.Tensor | None = None,
        sink: Sink | None = None,
        on_progress: OnProgress | None = None,
        should_stop: ShouldStop | None = None,
        strips: int | None = None,
        backend: Backend = "auto",
        free_bytes: int | None = None,
        shard: ShardContext = SINGLE,
        gather: Gather = "all",
    ) -> torch.Tensor | None:
        """Decode a latent to pixels.

        latent: [B, z, T, H, W] or [z, T, H, W], any dtype, format and device, as a ComfyUI LATENT
        holds it; `normalized=True` for diffusers' normalised ones.
        Returns float32 [B, 3, 4T-3, 8H, 8W] (16H, 16W for Wan 2.2) in [-1, 1] on the VAE's device,
        or `out` (preallocated, any device), or None with a `sink`.
        chunk_frames: latent frames a call, or the list of all chunk lengths; None plans it. Any
        schedule gives the same pixels. strips: decode the picture in so many exact bands in turn;
        None plans them where not even one latent frame a chunk fits. free_bytes: device memory
        that the plan may count on, where that is less than the device has free.
        precision: compute dtype, "auto" (that of the weights), "fp32", "bf16" or "fp16".
        backend: "auto", "eager" (plain PyTorch), "triton" or "cuda" (see `ops.select`).
        on_progress(done_frames, total_frames, report) follows each pass (a chunk, or a part of
        one); should_stop() is asked before each. A collective exactly with a `shard`: every rank of
        its group must call it with equal arguments, and decodes its rows. `gather` then says who
        gets the pixels: "all" ranks, "rank0" (the others get None), or each rank its "own" rows.

        Raises LatentError, GeometryError, LayoutError, BackendError, OutputError,
        DecodeCancelled, DecodeMemoryError,
        ShardingError.
        """
        self.last_report = None
        if not shard.is_single:
            if strips is not None:
                raise GeometryError("strips divide one device's picture: not possible with a shard")
            return decode_shard(
                self, latent, shard, gather, normalized=normalized, chunk_frames=chunk_frames,
                memory_format=memory_format, precision=precision, out=out, sink=sink,
                on_progress=on_progress, should_stop=should_stop, backend=backend,
            )  # fmt: skip
        run: _DecodeRun | None = None
        try:
            if sink is not None and out is not None:
                raise OutputError("decode got both out= and sink=: expected one of them")
            run = self._start_decode(
                latent, normalized, chunk_frames, memory_format, precision, should_stop, strips,
                backend,
            )  # fmt: skip
            if sink is None:
                if out is None:
                    out = torch.empty(run.pixel_shape, dtype=torch.float32, device=self.device)
                check_out(out, run.pixel_shape)
                sink = TensorSink(out)
            run.builder.memory["output_bytes"] = sink_bytes(sink)
            run.plan(sink.needs_whole_frames, free_bytes)
            with own_arithmetic(self.device):
                for piece in run.pieces():
                    sink.write(piece.pixels, piece.start_frame, piece.first_row)
                    if on_progress is not None:
                        on_progress(run.done_frames, run.total_frames, run.progress_report())
            sink.close()
            self.last_report = run.finish("done")
        except BaseException as error:
            if run is not None:
                self.last_report = run.finish_failed(error)
            if sink is not None:
                _abort(sink, error)
            raise
        return out

    def decode_stream(
        self,
        latent: torch.Tensor,
        *,
        normalized: bool = False,
        chunk_frames: int | Sequence[int] | None = None,
        memory_format: layout.Requested = "auto",
        precision: str = "auto",
        should_stop: ShouldStop | None = None,
        strips: int | None = None,
        backend: Backend = "auto",
        free_bytes: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield pixels [B, 3, t, H', W'] float32 in [-1, 1] as soon as frames are final, in order.

        Arguments, results and errors are those of `decode`; arguments are checked at the call,
        before the first chunk is asked for. `last_report` is set when the stream ends.
        """
        self.last_report = None
        run = self._start_decode(
            latent, normalized, chunk_frames, memory_format, precision, should_stop, strips,
            backend,
        )  # fmt: skip
        run.plan(whole_frames=True, free_bytes=free_bytes)
        return self._stream(run)

    def _stream(self, run: _DecodeRun) -> Iterator[torch.Tensor]:
        pieces = run.pieces()
        try:
            while True:
                # Entered for each pass anew: a context left open across a yield would leak into
                # the caller's code.
                with own_arithmetic(self.device):
                    piece = next(pieces, None)
                if piece is None:
                    break
                yield piece.pixels
            self.last_report = run.finish("done")
        except BaseException as error:
            self.last_report = run.finish_failed(error)
            raise

    def encode(
        self,
        pixels: torch.Tensor,
        *,
        normalized: bool = False,
        chunk_frames: int | Sequence[int] | None = None,
        memory_format: layout.Requested = "auto",
        precision: str = "auto",
        on_progress: OnProgress | None = None,
        should_stop: ShouldStop | None = None,
        backend: Backend = "auto",
        shard: ShardContext = SINGLE,
        gather: Gather = "all",
    ) -> torch.Tensor | None:
        """Encode pixels to the mean of the posterior.

        pixels: [B, 3, T, H, W] or [3, T, H, W] in [-1, 1]. Frames past 4n + 1 are dropped; rows and
        columns past a multiple of the spatial factor are cropped evenly from both sides.
        Returns float32 [B, z, (T-1)//4+1, H//8, W//8] (16 for Wan 2.2) on the VAE's device;
        `normalized=True` gives diffusers' normalised latents.
        chunk_frames: latent frames a call. Any schedule gives the same latent.
        backend: as in `decode`.
        A collective exactly with a `shard`; `gather` says who gets the latent (see `decode`).

        Raises LatentError, GeometryError, LayoutError, BackendError, DecodeCancelled,
        DecodeMemoryError; CheckpointError if the checkpoint had no encoder.
        """
        return _encode(
            self, pixels, normalized, chunk_frames, memory_format, precision, on_progress,
            should_stop, backend, shard, gather,
        )  # fmt: skip

    def inspect(self) -> DecodeReport:
        """What the weights are and which layout a decode would choose; runs nothing."""
        builder = ReportBuilder("inspect", self.config, self.device, self.dtype)
        decision = layout.decide("auto", self.device, self.dtype)
        self._describe(builder, self.model, ("decoder", "encoder"), decision, eager_ops())
        self.last_report = builder.build("done")
        return self.last_report

    # -- the steps before the first chunk ----------------------------------------------------

    def _start_decode(
        self, latent, normalized, chunk_frames, memory_format, precision, should_stop, strips,
        backend, axis: Axis | None = None,
    ) -> _DecodeRun:  # fmt: skip
        latent = as_batch(latent, "latent")
        check_latent_shape(latent, self.config)
        model, decision = self._prepare(precision, memory_format, "decoder")
        dtype = model.conv2.weight.dtype
        builder = ReportBuilder("decode", self.config, self.device, dtype)
        ops = select_ops(backend, model, latent.shape[2] == 1, self._proof_book, axis)
        self._describe(builder, model, ("decoder",), decision, ops)
        builder.layout["latent_format"] = layout.detect(latent)
        builder.values["precision_requested"] = precision

        # A copy: a stream reads it long after the call, when the caller's may have changed.
        z = latent.to(device=self.device, dtype=torch.float32, copy=True)
        check_latent_values(z)  # where that takes no time
        if normalized:
            mean, std = _statistics(self.config, z)
            z = z * std + mean
        z = z.to(dtype)

        run = _DecodeRun(model, z, chunk_frames, strips, decision.chosen, ops, builder, should_stop)
        builder.values["latent_shape"] = tuple(z.shape)
        builder.values["pixel_shape"] = run.pixel_shape
        builder.total_frames = run.total_frames
        return run

    def _proof_book(self) -> ProofCache:
        """The verdicts on kernels for this device; read once."""
        wanted = environment(self.device)
        if self._proofs is None or self._proofs.environment != wanted:
            self._proofs = ProofCache(wanted, cache_folder())
        return self._proofs

    def _prepare(self, precision: str, memory_format, part: str):
        """The model in the wanted precision, and `part` of it in the wanted memory format."""
        if precision != "auto" and (not isinstance(precision, str) or precision not in DTYPES):
            raise BackendError(
                f"precision is {precision!r}: expected 'auto', 'fp32', 'bf16' or 'fp16'"
            )
        dtype = self.dtype if precision == "auto" else DTYPES[precision]
        decision = layout.decide(memory_format, self.device, dtype)
        with torch.inference_mode(False), torch.no_grad():
            model = self.model if dtype == self.dtype else self._in_dtype(dtype)
            layout.pack_weights(getattr(model, part), decision.chosen)
        return model, decision

    def _in_dtype(self, dtype: torch.dtype) -> WanVAEModel:
        """A copy of the model in `dtype`; the last one, unless the weights were changed since."""
        state = (dtype, [(p.data_ptr(), tensor_version(p)) for p in self.model.parameters()])
        if self._cast is None or self._cast[0] != state:
            self._cast = state, copy.deepcopy(self.model).to(dtype)
        return self._cast[1]

    def _describe(self, builder, model, parts, decision, ops: OpSet) -> None:
        """Put weights, formats and backends into the report."""
        found = {
            fmt: sum(self.weights_found[p].get(fmt, 0) for p in parts) for fmt in layout.FORMATS
        }
        modules = [(p, getattr(model, p)) for p in parts if getattr(model, p) is not None]
        weights = [
            (f"{part}.{name.removesuffix('.weight')}", p)
            for part, module in modules
            for name, p in module.named_parameters()
            if name.endswith("weight") and p.ndim in (4, 5)
        ]
        builder.layout.update(
            requested=decision.requested,
            chosen=decision.chosen,
            reason=decision.reason,
            weights_found=found,
            weights_used=layout.count_formats(p for _, p in weights),
        )
        for name, p in weights:
            op = "conv3d" if p.ndim == 5 else "conv2d"
            builder.layers.append(
                LayerRecord(name, op, tuple(p.shape), layout.detect(p), ops.backend_of(p))
            )
        builder.backends_used = dict(ops.used)
        builder.backends_off = [BackendOff(r.op, r.family, r.text) for r in ops.refusals]
        builder.memory["weights_bytes"] = sum(
            p.numel() * p.element_size() for _, m in modules for p in m.parameters()
        )


class _DecodeRun:
    """One decode under way: the chunks still to do, what was done, and the report so far."""

    def __init__(self, model, z, chunk_frames, strips, memory_format, ops, builder, should_stop):
        self.model: WanVAEModel = model
        self.config: WanVAEConfig = model.config
        self.z: torch.Tensor = z
        self.chunk_frames: int | Sequence[int] | None = chunk_frames
        self.strips: int | None = strips
        self.memory_format: str = memory_format
        self.ops: OpSet = ops
        self.counter = LayoutCounter()
        self.builder: ReportBuilder = builder
        self.should_stop: ShouldStop | None = should_stop
        self.pixel_shape = geometry.pixel_shape(tuple(z.shape), self.config)
        self.total_frames = self.pixel_shape[2]
        self.done_frames = 0
        self.clock = _Clock(z.device)
        self.pixels_finite = torch.ones((), dtype=torch.bool, device=z.device)
        # Refuse what is impossible at the call, before an output is allocated.
        if chunk_frames is not None:
            schedule(z.shape[2], chunk_frames)
        if strips is not None:
            geometry.strips(z.shape[3], strips, self.config)

    def plan(self, whole_frames: bool, free_bytes: int | None = None) -> None:
        """Fix chunks and strips. Before the first chunk, after everything else was allocated.

        whole_frames: what the sink needs. free_bytes: see `WanVAE.decode`.
        """
        device, frames = self.z.device, self.chunk_frames
        number = free_bytes is None or isinstance(free_bytes, Real)
        if not number or (free_bytes is not None and not isfinite(free_bytes)):
            raise GeometryError(f"free_bytes is {free_bytes!r}: expected a number of bytes")
        counts = (device_memory(device), free_bytes)
        free = min((n for n in counts if n is not None), default=None)
        plan = memory.plan_decode(
            self.config, tuple(self.z.shape), self.z.dtype, self.memory_format, free,
            whole_frames=whole_frames, chunk_frames=frames, strips=self.strips,
            backend=self.ops.used["conv3d"],
        )  # fmt: skip
        self.lengths, self.whole_frames = plan.lengths, whole_frames
        self.pass_elements = plan.pass_elements
        # Strips that were asked for are taken even if there is only one.
        self.strip_count = plan.strips if plan.strips > 1 or self.strips else None
        self.builder.memory.update(free_bytes=free, planned_bytes=plan.planned_bytes)
        self.builder.values["strips"] = plan.strips
        if plan.note is not None:
            self.builder.fallbacks.append(plan.note)
        self.clock = _Clock(device)  # its peak is above what is allocated now

    def pieces(self) -> Iterator[_Piece]:
        """Every piece of the picture once. Memory permitting in whole chunks, else in strips.

        Whatever runs out of memory starts over with less at a time: history was written over as it
        went on. Frames that came out before are made again, the same, and not given out twice.
        """
        height = self.z.shape[3]
        while self.strip_count is None:
            try:
                yield from self._chunks()
                return
            except DecodeMemoryError as error:
                failure = str(error)
            # Out of the except block, so that the traceback no longer holds the tensors.
            if not self._halve():
                self._fall_back(failure)
                break
            self._fall_back(f"{failure}; started again with {max(self.lengths)}")
        counts = [self.strip_count] if self.strip_count else []
        if self.strips is None:  # planned or none: more of them where memory runs out all the same
            counts += [n for n in _strip_counts(height) if n > (self.strip_count or 0)]
        while counts:
            count = counts[0]
            self.builder.values["strips"] = count
            try:
                if self.whole_frames:
                    yield from self._strips_in_each_chunk(count)
                else:
                    yield from self._strips_one_after_another(count)
                return
            except DecodeMemoryError as error:
                failure = str(error)
            text = f"{count} strips: {failure}"
            if self._halve() and len(counts) == 1:
                text += f"; started again with {max(self.lengths)}"
            else:
                del counts[0]
            self._fall_back(text)
        raise DecodeMemoryError(
            f"out of memory on {self.z.device} even with one latent frame a chunk and "
            f"{count} strip(s): {failure}; free device memory, or decode on the CPU"
        )

    def _halve(self) -> bool:
        """Take half as much at a time from here on; False if chunks have one frame already."""
        self.pass_elements = max(1, self.pass_elements // 2)
        half = (max(self.lengths) + 1) // 2
        smaller = tuple(
            part
            for length in self.lengths
            for part in ([half] * (length // half) + [length % half])
            if part
        )
        changed, self.lengths = smaller != self.lengths, smaller
        return changed

    def _chunks(self) -> Iterator[_Piece]:
        """The normal way: the whole picture, chunk after chunk."""
        cache, done_before = FeatureCache(), self.done_frames
        height = self.z.shape[3]
        for chunk in schedule(self.z.shape[2], self.lengths):
            z = self.z[:, :, chunk.start : chunk.stop]
            step = self._step(cache, chunk, height)
            frame, _ = geometry.chunk_frames_slice(chunk.start, chunk.stop, self.config)
            passes = self.model.decode_passes(z, step)
            for pixels in self._passes(chunk, passes, _latents(chunk)):
                start, frame = frame, frame + pixels.shape[2]
                if frame > done_before:
                    new = max(start, done_before)
                    yield self._piece(pixels[:, :, new - start :], new, frame)

    def _strips_in_each_chunk(self, count: int) -> Iterator[_Piece]:
        """Strips inside each chunk: whole frames in order; history of all strips is kept."""
        bands = geometry.strips(self.z.shape[3], count, self.config)
        caches = [FeatureCache() for _ in bands]
        done_before = self.done_frames
        b, _, _, height, width = self.pixel_shape
        for chunk, features in self._trunk():
            first, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, self.config)
            size = (b, 3, last - first, height, width)
            frame = _guarded(
                f"{last - first} whole frames",
                lambda f=features, size=size: f.new_empty(size, dtype=torch.float32),
            )
            for band, cache in zip(bands, caches, strict=True):
                top, at = band.start * self.config.spatial_factor, 0
                for rows in self._band_passes(features, band, cache, chunk):
                    frame[:, :, at : at + rows.shape[2], top : top + rows.shape[3]] = rows
                    at += rows.shape[2]
            if last > done_before:
                new = max(first, done_before)
                yield self._piece(frame[:, :, new - first :], new, last)

    def _strips_one_after_another(self, count: int) -> Iterator[_Piece]:
        """Each strip through all chunks before the next: history shrinks by `count` too."""
        features = list(self._trunk())
        self.done_frames = 0
        for i, band in enumerate(geometry.strips(self.z.shape[3], count, self.config)):
            cache, frame = FeatureCache(), 0
            top = band.start * self.config.spatial_factor
            for chunk, feature in features:
                for rows in self._band_passes(feature, band, cache, chunk):
                    start, frame = frame, frame + rows.shape[2]
                    # Progress counts frames: each strip contributes its share of them.
                    self.done_frames = (i * self.total_frames + frame) // count
                    yield _Piece(rows, start, top)

    def _trunk(self) -> Iterator[tuple[Chunk, torch.Tensor]]:
        """The features [B, C, T, H, W] of every chunk."""
        cache = FeatureCache()
        for chunk in schedule(self.z.shape[2], self.lengths):
            z, step = self.z[:, :, chunk.start : chunk.stop], self._step(cache, chunk, 1)
            what = _latents(chunk)
            yield chunk, self._run(chunk, what, lambda z=z, step=step: self.model.trunk(z, step))

    def _band_passes(self, features, band, cache, chunk) -> Iterator[torch.Tensor]:
        """Pixels of one strip of one chunk, pass after pass."""
        rows = features[:, :, :, band.halo_start : band.halo_stop]
        step = self._step(cache, chunk, rows.shape[3])
        passes = self.model.finish_passes(rows, step, band)
        return self._passes(chunk, passes, f"strip of {rows.shape[3]} latent rows")

    def _passes(
        self, chunk: Chunk, passes: Iterator[torch.Tensor], what: str
    ) -> Iterator[torch.Tensor]:
        """The `passes` of a chunk, each by `_run`, until its frames are complete."""
        missing = self._frames_of(chunk)

        def next_pass() -> torch.Tensor:
            pixels = next(passes)
            # Here, where they are few: it takes their memory once more.
            self.pixels_finite = self.pixels_finite & torch.isfinite(pixels).all()
            return pixels

        while missing:
            pixels = self._run(chunk, what, next_pass)
            missing -= pixels.shape[2]
            yield pixels

    def _run(self, chunk: Chunk, what: str, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`work()` of `chunk`, timed, unless the caller wants to stop.

        Raises DecodeMemoryError, which says `what` did not fit.
        """
        self._ask_to_stop()
        with self.clock.measure(chunk, self._frames_of(chunk)):
            return _guarded(what, work)

    def _step(self, cache: FeatureCache, chunk: Chunk, rows: int) -> Step:
        """The step of `chunk`, in which features of so many latent rows go through the stages."""
        shape = (*self.z.shape[:3], rows, self.z.shape[4])
        frames = memory.pass_frames(self.config, shape, self.pass_elements)
        return Step(cache, chunk, ops=self.ops, counter=self.counter, pass_frames=frames)

    def _piece(self, pixels: torch.Tensor, start: int, stop: int) -> _Piece:
        """Whole frames [start, stop)."""
        self.done_frames = stop
        return _Piece(pixels, start, 0)

    def _frames_of(self, chunk: Chunk) -> int:
        first, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, self.config)
        return last - first

    def _ask_to_stop(self) -> None:
        if self.should_stop is not None and self.should_stop():
            raise DecodeCancelled(
                f"cancelled after {self.done_frames} of {self.total_frames} frames"
            )

    def _fall_back(self, text: str) -> None:
        self.builder.fallbacks.append(text)
        self.clock.restart()
        if self.z.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks cut for the larger chunk are of no use to a smaller

    # -- the report ----------------------------------------------------------------------------

    def progress_report(self) -> DecodeReport:
        """The report of this moment, status "running". Does not wait for the device."""
        self._fill(wait=False)
        return self.builder.build("running")

    def finish(self, status: str, error: str | None = None) -> DecodeReport:
        """The final report; waits for the device, so that its times are true."""
        self._fill(wait=True)
        if status == "done" and not bool(self.pixels_finite):
            advice = "decode with precision='fp32'"
            if self.builder.dtype == torch.float32:
                advice = "look at the latent's largest values, and for a damaged checkpoint"
            self.builder.warnings.append(
                f"the decoded pixels hold NaN or inf (computed in {self.builder.dtype}): weights "
                f"or latent overflow this precision; {advice}"
            )
        return self.builder.build(status, error)

    def finish_failed(self, error: BaseException) -> DecodeReport:
        """The report of a decode that ended early; never itself fails on a broken device."""
        stopped = isinstance(error, (DecodeCancelled, GeneratorExit, KeyboardInterrupt))
        self._fill(wait=False)
        return self.builder.build("cancelled" if stopped else "failed", str(error) or None)

    def _fill(self, wait: bool) -> None:
        self.builder.layout["conversions"] = self.counter.conversions
        self.builder.layout["mixed_calls"] = self.counter.mixed_calls
        self.builder.done_frames = self.done_frames
        self.builder.chunks = self.clock.records(wait)
        self.builder.memory["peak_bytes"] = self.clock.peak_bytes()


class _Clock:
    """Time of each chunk and peak memory, by device events where there are any.

    Events do not stop the device: asking for times early gives those that are ready.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.is_cuda = device.type == "cuda"
        self._marks: list[tuple[Chunk, int, object, object]] = []
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(device)
            self._base_bytes = torch.cuda.memory_allocated(device)

    def measure(self, chunk: Chunk, frames: int) -> _Measure:
        return _Measure(self, chunk, frames)

    def mark(self):
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def add(self, chunk: Chunk, frames: int, start, stop) -> None:
        self._marks.append((chunk, frames, start, stop))

    def restart(self) -> None:
        """Forget what was timed: the chunks are done again. The peak stays."""
        self._marks.clear()

    def records(self, wait: bool) -> list[ChunkRecord]:
        """One record a chunk, of all its passes (and strips) so far."""
        if wait and self.is_cuda:
            torch.cuda.synchronize(self.device)
        done: dict[Chunk, ChunkRecord] = {}
        for chunk, frames, start, stop in self._marks:
            if self.is_cuda:
                if not stop.query():
                    break
                ms = start.elapsed_time(stop)
            else:
                ms = (stop - start) * 1e3
            if chunk in done:
                ms += done[chunk].duration_ms
            done[chunk] = ChunkRecord(chunk.start, chunk.stop, chunk.is_first, frames, ms)
        return list(done.values())

    def peak_bytes(self) -> int | None:
        """Peak of allocated device memory above the start; None on the CPU."""
        if not self.is_cuda:
            return None
        return torch.cuda.max_memory_allocated(self.device) - self._base_bytes


class _Measure:
    """Context of one pass's time, or of another part of a chunk's."""

    def __init__(self, clock: _Clock, chunk: Chunk, frames: int):
        self.clock, self.chunk, self.frames = clock, chunk, frames

    def __enter__(self) -> None:
        self.start = self.clock.mark()

    def __exit__(self, *_) -> None:
        self.clock.add(self.chunk, self.frames, self.start, self.clock.mark())


def _encode(
    vae: WanVAE,
    pixels,
    normalized,
    chunk_frames,
    memory_format,
    precision,
    on_progress,
    should_stop,
    backend: Backend,
    shard: ShardContext,
    gather: Gather,
) -> torch.Tensor | None:
    """`WanVAE.encode`; see there."""
    vae.last_report = None
    pixels = as_batch(pixels, "video")
    check_pixels(pixels, vae.config)
    config = vae.config
    out_shape = geometry.latent_shape(tuple(pixels.shape), config)
    if vae.encoder is None:
        raise CheckpointError("this checkpoint has no encoder: load a full VAE file to encode")
    model, decision = vae._prepare(precision, memory_format, "encoder")
    dtype = model.conv2.weight.dtype
    builder = ReportBuilder("encode", config, vae.device, dtype)
    axis: Axis | None = None
    if not shard.is_single:
        axis = plan_shards(*out_shape[3:], shard.world_size, shard.axis).axis
    ops = select_ops(backend, model, out_shape[2] == 1, vae._proof_book, axis, "encoder")
    counter, clock = LayoutCounter(), _Clock(vae.device)
    vae._describe(builder, model, ("encoder",), decision, ops)
    builder.layout["latent_format"] = layout.detect(pixels)
    builder.values.update(precision_requested=precision, latent_shape=out_shape)
    if warning := range_warning(pixels):
        builder.warnings.append(warning)

    pixels = crop_for_encode(pixels, config)
    builder.values["pixel_shape"] = tuple(pixels.shape)
    builder.total_frames = pixels.shape[2]
    latent = torch.empty(out_shape, dtype=torch.float32, device=vae.device)
    builder.memory["output_bytes"] = latent.numel() * latent.element_size()
    cache = FeatureCache()

    def fill() -> None:
        builder.layout.update(conversions=counter.conversions, mixed_calls=counter.mixed_calls)
        builder.chunks = clock.records(wait=False)
        builder.memory["peak_bytes"] = clock.peak_bytes()

    def progress(last: int) -> None:
        if on_progress is not None:
            fill()
            on_progress(last, builder.total_frames, builder.build("running"))

    try:
        with own_arithmetic(vae.device):
            if not shard.is_single:
                latent = encode_shard(
                    vae, pixels, shard, gather, clock, builder, ops, counter, model,
                    chunk_frames=chunk_frames, on_progress=progress, should_stop=should_stop,
                )  # fmt: skip
            for chunk in (
                schedule(out_shape[2], 1 if chunk_frames is None else chunk_frames)
                if shard.is_single
                else ()
            ):
                if should_stop is not None and should_stop():
                    raise DecodeCancelled(
                        f"cancelled after {builder.done_frames} of {builder.total_frames} frames"
                    )
                first, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, config)
                x = pixels[:, :, first:last].to(device=vae.device, dtype=ops.pixels or dtype)
                with clock.measure(chunk, last - first):
                    mean, _ = model.encode_chunk(x, Step(cache, chunk, ops=ops, counter=counter))
                latent[:, :, chunk.start : chunk.stop] = mean
                builder.done_frames = last
                progress(last)
    except BaseException as error:
        failure = error
        if is_out_of_memory(error):
            failure = DecodeMemoryError(
                f"out of memory on {vae.device} while encoding {builder.total_frames} frames of "
                f"{pixels.shape[3]}x{pixels.shape[4]}: {first_line(error)}; encode a smaller "
                "video, or encode on the CPU"
            )
        fill()
        status = (
            "cancelled" if isinstance(error, (DecodeCancelled, KeyboardInterrupt)) else "failed"
        )
        vae.last_report = builder.build(status, str(failure) or None)
        if failure is error:
            raise
        raise failure from None
    if vae.device.type == "cuda":
        torch.cuda.synchronize(vae.device)
    fill()
    vae.last_report = builder.build("done")
    if normalized and latent is not None:
        mean, std = _statistics(config, latent)
        latent = (latent - mean) / std
    return latent


def crop_for_encode(pixels: torch.Tensor, config: WanVAEConfig) -> torch.Tensor:
    """The part of `pixels` [B, 3, T, H, W] that has a latent: 4n + 1 frames, whole latent pixels.

    Rows and columns are cropped evenly from both sides (the extra one at the end). A view.
    """
    _, _, t, h, w = geometry.latent_shape(tuple(pixels.shape), config)
    frames = geometry.pixel_frames(t, config)
    height, width = h * config.spatial_factor, w * config.spatial_factor
    top, left = (pixels.shape[3] - height) // 2, (pixels.shape[4] - width) // 2
    return pixels[:, :, :frames, top : top + height, left : left + width]


def _abort(sink: Sink, error: BaseException) -> None:
    """Abort `sink` because of `error`, which is what the caller must see whatever happens here."""
    try:
        sink.abort()
    except Exception as trouble:
        error.add_note(f"the output could not be cleaned up either: {trouble}")


def _statistics(config: WanVAEConfig, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each latent channel as [1, z, 1, 1, 1]."""
    if config.latents_mean is None or config.latents_std is None:
        raise LatentError(
            f"no statistics are known for latents of {config.z_dim} channels, so normalized=True "
            "is impossible: pass the latent as ComfyUI holds it"
        )
    shape = (1, config.z_dim, 1, 1, 1)
    return (
        like.new_tensor(config.latents_mean).view(shape),
        like.new_tensor(config.latents_std).view(shape),
    )


def _weights_found(state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, int]]:
    return {
        part: layout.count_formats(v for k, v in state.items() if k.startswith(f"{part}."))
        for part in ("decoder", "encoder")
    }


def _guarded(what: str, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`work()`; DecodeMemoryError, which says `what` did not fit, if it runs out of memory."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = first_line(error)
    # Out of the except block, so that no traceback holds the tensors of the failed attempt.
    raise DecodeMemoryError(f"{what}: {failure}")


def _latents(chunk: Chunk) -> str:
    return f"chunk of {chunk.frames} latent frame{'s' if chunk.frames > 1 else ''}"


def _strip_counts(rows: int) -> list[int]:
    """Strip counts to try after the whole picture failed: doubling, up to strips of one row."""
    counts, n = [], 2
    while n < rows:
        counts.append(n)
        n *= 2
    return [*counts, rows] if rows > 1 else [1]
