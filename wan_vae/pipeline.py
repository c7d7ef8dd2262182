"""The interface of the library: `load`, and `WanVAE` with decode, encode, plan and inspect.

A latent goes in, one layout decision is made, the causal decoder runs chunk by chunk, pixels stream
out, and a report says what happened. `runs/` does that work; CONTRIBUTING.md shows the path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from . import layout
from .chunking import whole_number
from .config import WanVAEConfig
from .device import pick_device, pick_dtype
from .errors import CheckpointError, GeometryError
from .hooks import DeviceMemory, Hooks, OnProgress, OwnMemory, ShouldStop
from .io.checkpoint import Checkpoint, canonical_state_dict, load_checkpoint
from .io.latents import check_channels
from .io.pixels import FrameReader
from .io.sink import Sink
from .io.staging import CudaUpload
from .network.model import WanVAEModel, model_of
from .network.weights import copied
from .options import (
    AXES,
    OPERATIONS,
    AxisRequest,
    Backend,
    Gather,
    MemoryFormat,
    Operation,
    Precision,
    RunOptions,
)
from .planning.plan import Plan
from .report import DecodeReport, ReportBuilder
from .runs.decode import DecodeRequest, DecodeRun, abort, shards_of
from .runs.encode import EncodeRequest, EncodeRun
from .runs.engine import (
    Engine,
    SetupRequest,
    count_weight_formats,
    layer_records,
    weights_bytes,
)
from .runs.run import ready
from .said import expected_one_of, said
from .sharding.context import SINGLE, ShardContext


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
) -> WanVAE:
    """Load a Wan 2.1 or 2.2 VAE from a checkpoint file or a diffusers folder.

    device: None takes the first CUDA device, else XPU, MPS or the CPU. dtype: "auto", "fp32",
    "bf16", "fp16" or a torch dtype; auto is bf16 on CUDA and fp32 elsewhere.
    Raises CheckpointError (NotAWanVAEError for another model).
    """
    checkpoint = load_checkpoint(path, check_numbers=False)
    return WanVAE.from_checkpoint(checkpoint, device=device, dtype=dtype)


class WanVAE:
    """A Wan VAE ready to decode and encode on one device.

    Holds the model and the report of its last operation; everything that a decode changes lives in
    that decode. Not thread-safe: use one WanVAE per thread.
    """

    def __init__(
        self,
        model: WanVAEModel,
        weights_found: dict[str, dict[str, int]] | None = None,
        notes: Sequence[str] = (),
    ):
        """Wrap `model`, whose parameters decide device and dtype.

        `weights_found`: counts of memory formats ("decoder" / "encoder" -> `layout.count_formats`)
        in the checkpoint before it was packed, for the report. notes: what of it is not used.
        """
        self.notes = tuple(notes)
        self.engine = Engine(model, weights_found)
        self.model = model
        self.config: WanVAEConfig = model.config
        # Of the last operation; None if that was refused before it began.
        self.last_report: DecodeReport | None = None

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
        checkpoint = canonical_state_dict(state, check_numbers=False)
        return cls.from_checkpoint(checkpoint, device=device, dtype=dtype)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
    ) -> WanVAE:
        """Build from a checkpoint that was read, as `from_state_dict` does.

        NaN and inf are looked for in the copies, while they are made.
        """
        canonical = checkpoint.state
        without_data = [name for name, value in canonical.items() if value.is_meta]
        if without_data:
            raise CheckpointError(
                said(
                    "vae.meta",
                    "{name} is meta ({count} tensors are): expected tensors with data",
                    name=without_data[0],
                    count=len(without_data),
                )
            )
        device = pick_device(device)
        wanted = pick_dtype(dtype, device)
        if device.type == "cuda":
            with CudaUpload(device) as upload:
                copies = copied(canonical, device, wanted, upload)
        else:
            copies = copied(canonical, device, wanted)
        checkpoint.check_numbers(copies.suspects)
        model = model_of(checkpoint.config, copies.state)
        return cls(model, count_weight_formats(canonical), checkpoint.notes)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where decodes run."""
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; a decode at precision "auto" computes in it."""
        return self.engine.dtype

    @property
    def decoder(self) -> torch.nn.Module:
        return self.model.decoder

    @property
    def encoder(self) -> torch.nn.Module | None:
        return self.model.encoder

    @property
    def weights_found(self) -> dict[str, dict[str, int]]:
        """Counts of memory formats in the checkpoint, by part of the model."""
        return self.engine.weights_found

    def plan(
        self,
        latent_shape: Sequence[int],
        *,
        operation: Operation = "decode",
        chunk_frames: int | Sequence[int] | None = None,
        memory_format: MemoryFormat = "auto",
        precision: Precision = "auto",
        strips: int | None = None,
        backend: Backend = "auto",
        free_bytes: float | None = None,
        whole_frames: bool = False,
        ranks: int = 1,
        axis: AxisRequest = "auto",
    ) -> Plan:
        """Decide all that a decode or encode of a latent [B, z, T, H, W] will do, without doing it.

        Kernels that were never checked on this device are checked now, because the plan depends on
        them. free_bytes: None counts what is free now, infinity plans as if everything fitted.
        whole_frames: the pixels are wanted as whole frames (a video file, a stream). ranks, axis:
        plan for one of several ranks. The other options are those of `decode`. Give the plan to
        `decode` or `encode`, which executes it.
        Raises LatentError, GeometryError, LayoutError, BackendError, CheckpointError.
        """
        options = RunOptions(
            chunk_frames=chunk_frames,
            memory_format=memory_format,
            precision=precision,
            strips=strips,
            backend=backend,
            free_bytes=free_bytes,
        )
        shape = checked_shape(latent_shape, operation, axis, self.config)
        shards = shards_of(ShardContext(0, whole_number(ranks, "ranks"), axis), shape)
        request = SetupRequest(operation, shape, options, shards)
        setup = ready(self.engine, request, OwnMemory(self.device))
        return self.engine.plan(setup, whole_frames=whole_frames)

    def decode(
        self,
        latent: torch.Tensor,
        *,
        normalized: bool = False,
        chunk_frames: int | Sequence[int] | None = None,
        memory_format: MemoryFormat = "auto",
        precision: Precision = "auto",
        out: torch.Tensor | None = None,
        sink: Sink | None = None,
        on_progress: OnProgress | None = None,
        should_stop: ShouldStop | None = None,
        strips: int | None = None,
        backend: Backend = "auto",
        free_bytes: float | None = None,
        plan: Plan | None = None,
        memory: DeviceMemory | None = None,
        shard: ShardContext = SINGLE,
        gather: Gather = "all",
    ) -> torch.Tensor | None:
        """Decode a latent to pixels.

        latent: [B, z, T, H, W] or [z, T, H, W], any dtype, format and device, as a ComfyUI LATENT
        holds it; `normalized=True` for diffusers' normalised ones.
        Returns float32 [B, 3, 4T-3, 8H, 8W] (16H, 16W for Wan 2.2) in [-1, 1] on the VAE's device,
        or `out` (preallocated, any device), or None with a `sink`.

        chunk_frames: latent frames a chunk, or the list of all chunk lengths; None plans it. Any
        schedule gives the same pixels.
        memory_format: of weights and features: "auto", "contiguous" or "channels_last_3d".
        precision: compute dtype: "auto" (that of the weights), "fp32", "bf16" or "fp16".
        on_progress(done_frames, total_frames, report) follows each pass (a chunk, or a part of
        one) and counts the frames of all videos of a batch; should_stop() is asked before each,
        in an encode before each of its stages too. A GPU computes what it was given: where an
        encode is one pass, as on a large card, it is not stopped on its way; chunk_frames makes
        several of it.
        strips: decode the picture in that many exact bands of rows, one after another; None plans
        them where not even one latent frame a chunk fits.
        backend: "auto", "eager" (plain PyTorch), "triton", "cuda" or "kitchen".
        free_bytes: device memory that the plan may count on, where less than is free.
        memory: who manages the device's memory, where that is another program (`DeviceMemory`);
        None is this process. It is asked to give memory back before a decode takes less at a time.
        plan: a result of `plan`, which holds its options; only free_bytes may be given beside it.
        It is executed as it is; if it needs more memory than is free now, a new one is made.
        shard: this process's place among the ranks of a picture. The call is then a collective:
        every rank of the group makes it with the same arguments and decodes its own rows.
        `gather` says who gets the pixels: "all" ranks, "rank0" (the others get None), or each rank
        its "own" rows.

        Raises LatentError, GeometryError, LayoutError, BackendError, OutputError,
        DecodeCancelled, DecodeMemoryError, ShardingError.
        """
        options = RunOptions(chunk_frames, memory_format, precision, strips, backend, free_bytes)
        return self.run_decode(
            DecodeRequest(
                latent=latent,
                normalized=normalized,
                options=options,
                hooks=Hooks(on_progress, should_stop, memory),
                plan=plan,
                out=out,
                sink=sink,
                context=shard,
                gather=gather,
            )
        )

    def run_decode(self, request: DecodeRequest) -> torch.Tensor | None:
        """Decode as `decode` does, with the arguments in one `DecodeRequest`."""
        self.last_report = None
        try:
            run = DecodeRun(self.engine, request)
        except BaseException as error:
            abort(request.sink, error)
            raise
        try:
            return run.decode()
        finally:
            self.last_report = run.report

    def decode_stream(
        self,
        latent: torch.Tensor,
        *,
        normalized: bool = False,
        chunk_frames: int | Sequence[int] | None = None,
        memory_format: MemoryFormat = "auto",
        precision: Precision = "auto",
        should_stop: ShouldStop | None = None,
        strips: int | None = None,
        backend: Backend = "auto",
        free_bytes: float | None = None,
        memory: DeviceMemory | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield pixels [B, 3, t, H', W'] float32 in [-1, 1] as soon as frames are final, in order.

        Arguments, results and errors are those of `decode`; arguments are checked at the call,
        before the first chunk is asked for. `last_report` is set when the stream ends.
        """
        self.last_report = None
        options = RunOptions(chunk_frames, memory_format, precision, strips, backend, free_bytes)
        run = DecodeRun(
            self.engine,
            DecodeRequest(
                latent, normalized, options, Hooks(should_stop=should_stop, memory=memory)
            ),
        )
        run.begin(whole_frames=True)
        return self._stream(run)

    def _stream(self, run: DecodeRun) -> Iterator[torch.Tensor]:
        try:
            yield from run.stream()
        finally:
            self.last_report = run.report

    def encode(
        self,
        pixels: torch.Tensor | FrameReader,
        *,
        normalized: bool = False,
        chunk_frames: int | Sequence[int] | None = None,
        memory_format: MemoryFormat = "auto",
        precision: Precision = "auto",
        on_progress: OnProgress | None = None,
        should_stop: ShouldStop | None = None,
        backend: Backend = "auto",
        strips: int | None = None,
        free_bytes: float | None = None,
        unit_range: bool = False,
        plan: Plan | None = None,
        memory: DeviceMemory | None = None,
        shard: ShardContext = SINGLE,
        gather: Gather = "all",
    ) -> torch.Tensor | None:
        """Encode pixels to the mean of the posterior.

        pixels: [B, 3, T, H, W] or [3, T, H, W] in [-1, 1], or with `unit_range` in [0, 1]; any
        strides, such as those of IMAGE frames (`io.image.frames_view`). On another device than
        the VAE they stay there, and each pass fetches what it needs. Or a `FrameReader`, such as
        `io.video_read.open_clip` gives it, of which two passes at most are in memory. Frames past
        4n + 1 are dropped; rows and columns past a multiple of the spatial factor are cropped
        evenly from both sides.
        Returns float32 [B, z, (T-1)//4+1, H//8, W//8] (16 for Wan 2.2) on the VAE's device;
        `normalized=True` gives diffusers' normalised latents.
        chunk_frames: latent frames a chunk. Any schedule gives the same latent.
        strips: bands of rows to encode one after another, exactly, as in `decode`.
        The other arguments are those of `decode`; `gather` says who gets the latent.

        Raises LatentError, GeometryError, LayoutError, BackendError, DecodeCancelled,
        DecodeMemoryError, ShardingError; CheckpointError if the checkpoint had no encoder.
        """
        options = RunOptions(chunk_frames, memory_format, precision, strips, backend, free_bytes)
        request = EncodeRequest(
            pixels=pixels,
            normalized=normalized,
            options=options,
            hooks=Hooks(on_progress, should_stop, memory),
            plan=plan,
            context=shard,
            gather=gather,
            unit_range=unit_range,
        )
        return self.run_encode(request)

    def run_encode(self, request: EncodeRequest) -> torch.Tensor | None:
        """Encode as `encode` does, with the arguments in one `EncodeRequest`."""
        self.last_report = None
        run = EncodeRun(self.engine, request)
        try:
            return run.encode()
        finally:
            self.last_report = run.report

    def inspect(self) -> DecodeReport:
        """Report what the weights are and which layout a decode would choose. Decodes nothing."""
        builder = ReportBuilder("inspect", self.config, self.device, self.dtype)
        wrong = self.engine.wrong_formats(self.dtype)
        decision = layout.decide("auto", self.device, self.dtype, wrong=wrong)
        layers = layer_records(self.model, ("decoder", "encoder"))
        builder.layers = list(layers)
        builder.warnings += self.notes
        builder.layout = self.engine.layout_facts(decision, ("decoder", "encoder"), layers)
        builder.memory["weights_bytes"] = weights_bytes(self.model, ("decoder", "encoder"))
        self.last_report = builder.build("done")
        return self.last_report


def checked_shape(
    latent_shape: Sequence[int], operation: Operation, axis: AxisRequest, config: WanVAEConfig
) -> tuple[int, ...]:
    """The shape of a latent that is to be planned for. Raises LatentError, GeometryError."""
    if operation not in OPERATIONS:
        raise GeometryError(expected_one_of("operation", operation, OPERATIONS))
    if axis not in AXES:
        raise GeometryError(expected_one_of("axis", axis, AXES))
    if not isinstance(latent_shape, Sequence):
        raise GeometryError(
            said(
                "plan.latent_shape",
                "latent_shape is {shape}: expected [B, z, T, H, W]",
                shape=repr(latent_shape),
            )
        )
    shape = tuple(whole_number(n, "a size of latent_shape") for n in latent_shape)
    if len(shape) != 5 or min(shape) < 1:
        raise GeometryError(
            said(
                "plan.latent_sizes",
                "latent_shape is {shape}: expected [B, z, T, H, W], all above 0",
                shape=shape,
            )
        )
    check_channels(shape[1], config)
    return shape
