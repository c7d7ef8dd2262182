"""Engine: the model of a VAE made ready for a run: dtype, memory format, kernels, and the plan.

What a run needs before its first chunk is decided here and nowhere else, so that a plan made for a
caller and a run describe the same thing.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from numbers import Real
from typing import Any

import torch

from .. import geometry, layout
from ..chunking import chunk_lengths, whole_number
from ..config import WanVAEConfig
from ..device import DTYPES, allocator_of, dtype_name, has_own_memory, host_free_bytes
from ..errors import BackendError, CheckpointError, GeometryError, LatentError
from ..hooks import DeviceMemory, OwnMemory
from ..kernels.cache_folder import cache_folder
from ..kernels.proof.cache import ProofCache, environment
from ..kernels.proof.formats import must_prove_formats, wrong_formats
from ..kernels.proof.timing import device_timer
from ..layout import LayoutDecision
from ..libraries import Libraries
from ..network.model import NO_ENCODER, WanVAEModel, weight_state
from ..ops.eager.forms import EagerForms, choose_forms
from ..ops.opset import LayerChoice, OpSet, eager_ops
from ..options import PARTS, Operation, Part, RunOptions
from ..planning.choose import Choice, PlanRequest, choice_of, choose
from ..planning.plan import LayerChoices, Plan
from ..report import LayerRecord
from ..said import expected_one_of, said
from ..sharding.plan import ShardPlan
from ..walk import named_parameters, parameters
from .kernel_choice import OpsRequest, may_prove, select_ops, weights_state

# Device memory for proving and timing kernels, which comes before anybody knows what the run will
# take. Proofs took 1.27 GiB for Wan 2.2 and 0.20 GiB for Wan 2.1 on an NVIDIA H200, with a first
# small decode. Timed layers have 4 x 512 x 512 x 96 numbers on such a card, of which operand, eager
# intermediates and results are about ten: counted, not measured.
PROOF_BYTES = 5 << 29


# A workflow has a few sizes.
_CHOICES_KEPT = 16


@dataclass(frozen=True)
class SetupRequest:
    """What is to be set up: an operation on a latent [B, z, T, H, W], whole or over `shards`."""

    operation: Operation
    latent_shape: tuple[int, ...]
    options: RunOptions
    shards: ShardPlan | None = None


@dataclass(frozen=True)
class Setup:
    """A model ready for one run: in its dtype and memory format, with a function for each layer."""

    request: SetupRequest
    model: WanVAEModel
    ops: OpSet
    layout: LayoutDecision

    @property
    def device(self) -> torch.device:
        return self.model.conv2.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.model.conv2.weight.dtype

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the latent that one rank holds: the tallest part, or the whole picture."""
        request = self.request
        if request.shards is None:
            return request.latent_shape
        return request.shards.pixel_shape_of(0, request.latent_shape, 1)


class Engine:
    """Prepares one model for its runs; keeps a copy in another dtype and the verdicts on kernels.

    `weights_found`: counts of memory formats ("decoder" / "encoder" -> `layout.count_formats`) in
    the checkpoint before it was packed, for the report. Not thread-safe.
    """

    def __init__(
        self, model: WanVAEModel, weights_found: dict[str, dict[str, int]] | None = None
    ) -> None:
        self.model = model
        self.config: WanVAEConfig = model.config
        self.weights_found = weights_found or count_weight_formats(model.state_dict())
        self._cast: tuple[object, WanVAEModel] | None = None
        self._proofs: ProofCache | None = None
        # Of the last run with kernels: they are chosen anew where a weight has changed, and go with
        # the model.
        self._choices: tuple[weakref.ref[OpSet], LayerChoices] | None = None
        # What runs without regard to free memory take, for the last run's kernels: a node asks in
        # each run, and counting takes milliseconds.
        self._choices_in_full: tuple[weakref.ref[OpSet], dict[tuple[object, ...], Choice]] | None
        self._choices_in_full = None
        self._bytes: dict[tuple[Part, torch.dtype], int] = {}
        # As what each part was packed last, and its weights then; see `weights_state`.
        self._packed_as: dict[Part, tuple[str, list[tuple[object, ...]]]] = {}
        # What times kernels on a device; tests put a clock of their own here.
        self.timer_of = device_timer

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles start without what is known of these weights, which theirs are not.
        fresh = Engine(self.model, self.weights_found)
        return vars(fresh) | {"timer_of": self.timer_of}

    @property
    def device(self) -> torch.device:
        return self.model.conv2.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.model.conv2.weight.dtype

    # -- before the first chunk ----------------------------------------------------------------

    def setup(
        self, request: SetupRequest, prescribed: Mapping[str, LayerChoice] | None = None
    ) -> Setup:
        """Make the model ready: convert, pack, choose and prove kernels.

        prescribed: kernels that another rank has chosen, by the name of their layer.
        Raises BackendError, LayoutError, GeometryError; CheckpointError without an encoder.
        """
        request = replace(request, options=checked_options(request.options))
        options, part = request.options, PARTS[request.operation]
        if request.operation == "encode" and self.model.encoder is None:
            raise CheckpointError(NO_ENCODER)
        libraries = Libraries.of(self.device)
        model, decision, forms = self._in_precision(options, part, libraries)
        wanted = replace(_ops_request(request, model, forms), weights=self._packed_as[part][1])
        ops = select_ops(wanted, self._proof_cache, self.timer_of, prescribed)
        # What is impossible is refused at the call, before an output is allocated.
        frames, rows = request.latent_shape[2:4]
        if options.chunk_frames is not None:
            chunk_lengths(frames, options.chunk_frames)
        if options.strips is not None:
            if request.shards is not None:
                raise GeometryError(
                    said(
                        "plan.strips_of_shard",
                        "strips divide one device's picture: not possible with a shard",
                    )
                )
            geometry.strips(rows, options.strips, self.config)
        return Setup(request, model, ops, decision)

    def may_prove(self, request: SetupRequest, device: torch.device) -> bool:
        """Whether `setup`, once the weights are on `device`, may have to prove kernels.

        That takes device memory before anybody knows what the run will take.
        """
        return may_prove(_ops_request(request, self.model, EagerForms()), device)

    def known_verdicts(self, device: torch.device) -> int:
        """How many verdicts on kernels are kept for cards like `device`; reads the file anew."""
        return len(ProofCache(environment(device), cache_folder()))

    def plan(
        self,
        setup: Setup,
        *,
        whole_frames: bool = False,
        memory: DeviceMemory | None = None,
    ) -> Plan:
        """Decide chunks, passes and strips in the memory that is free now. Allocates nothing.

        whole_frames: the pixels are wanted as whole frames in order, also where strips are needed.
        memory: who says how much is free; None is the process itself.
        """
        request, options = setup.request, setup.request.options
        free = self.free_bytes(setup, memory or OwnMemory(self.device))
        choice = self._choice(setup, free, whole_frames)
        part = PARTS[request.operation]
        # Strips that were asked for are taken even if there is only one.
        strips = choice.strips if choice.strips > 1 or options.strips else None
        return Plan(
            operation=request.operation,
            latent_shape=request.latent_shape,
            pixel_shape=geometry.pixel_shape(request.latent_shape, self.config),
            device=str(setup.device),
            dtype=dtype_name(setup.dtype),
            options=options,
            layout=setup.layout,
            choices=self.layer_choices(setup),
            lengths=choice.lengths,
            pass_elements=choice.pass_elements,
            strips=strips,
            whole_frames=whole_frames,
            shards=request.shards,
            free_bytes=free,
            planned_bytes=choice.planned_bytes,
            weights_bytes=self._weights_bytes(setup, part),
            extra_work=choice.extra_work,
            notes=() if choice.note is None else (choice.note,),
            parked=choice.parked,
            parts=choice.parts,
            features_wait=choice.features_wait,
            host_bytes=choice.host_bytes,
            needed_bytes=choice.needed_bytes,
            wanted_bytes=choice.wanted_bytes,
        )

    def _choice(self, setup: Setup, free: int | None, whole_frames: bool) -> Choice:
        """Chunks, passes and strips in `free` bytes; the choice with memory to spare is kept."""
        request, ops = setup.request, setup.ops
        options = replace(request.options, free_bytes=None)
        if not ops.layers or options.strips is not None:
            return choose(self._plan_request(setup, free, whole_frames))
        if self._choices_in_full is None or self._choices_in_full[0]() is not ops:
            self._choices_in_full = weakref.ref(ops), {}
        kept = self._choices_in_full[1]
        key = (replace(request, options=options), setup.layout.chosen, whole_frames)
        if key not in kept:
            if len(kept) >= _CHOICES_KEPT:
                kept.clear()
            kept[key] = choose(self._plan_request(setup, None, whole_frames))
        if free is None or kept[key].needed_bytes <= free:
            return kept[key]
        return choose(self._plan_request(setup, free, whole_frames))

    def _weights_bytes(self, setup: Setup, part: Part) -> int:
        """Bytes of the weights of `part`, which are counted once: their shapes stay."""
        key = part, setup.dtype
        if key not in self._bytes:
            self._bytes[key] = weights_bytes(setup.model, (part,))
        return self._bytes[key]

    def free_bytes(self, setup: Setup, memory: DeviceMemory) -> int | None:
        """Bytes that a plan may count on: what is free now, at most what the caller allows. None:
        nobody can say, or it is to be planned as if all of it fitted."""
        asked = setup.request.options.free_bytes
        if asked == inf:
            return None
        counts = (memory.free_bytes(), asked)
        free = min((n for n in counts if n is not None), default=None)
        return None if free is None else int(free)

    def layer_choices(self, setup: Setup) -> LayerChoices:
        """Which function runs each layer of a run."""
        part, ops = PARTS[setup.request.operation], setup.ops
        if self._choices is not None and self._choices[0]() is ops:
            return self._choices[1]
        layers = layer_records(setup.model, (part,), ops)
        found = LayerChoices(layers, dict(ops.used), ops.refusals)
        if ops.layers:
            self._choices = weakref.ref(ops), found
        return found

    def least_bytes(self, setup: Setup, whole_frames: bool) -> int:
        """What the smallest way through takes, by the plan: for the message that even this failed.

        What the caller asked for (chunks, strips) is kept.
        """
        return choose(self._plan_request(setup, 0, whole_frames)).planned_bytes

    def counted(self, setup: Setup, plan: Plan) -> Plan:
        """`plan`, whose chunks, passes or strips were changed, with the bytes that it takes now."""
        request = self._plan_request(setup, None, plan.whole_frames, plan.lengths)
        choice = choice_of(
            request,
            plan.strips,
            plan.pass_elements,
            plan.parked,
            plan.parts,
            plan.features_wait,
        )
        return replace(
            plan,
            planned_bytes=choice.planned_bytes,
            needed_bytes=choice.needed_bytes,
            parts=choice.parts,
            features_wait=choice.features_wait,
            host_bytes=choice.host_bytes,
            extra_work=choice.extra_work,
        )

    def may_park(self, setup: Setup, whole_frames: bool) -> bool:
        """Whether strips of this run may leave frames and history on the host."""
        return self._plan_request(setup, None, whole_frames).may_park

    def describe(self, plan: Plan) -> dict[str, object]:
        """The layout of `plan` as a report has it: `LayoutRecord` without what a run counts."""
        part = PARTS[plan.operation]
        return self.layout_facts(plan.layout, (part,), plan.choices.layers)

    def layout_facts(
        self,
        decision: LayoutDecision,
        parts: tuple[Part, ...],
        layers: tuple[LayerRecord, ...],
    ) -> dict[str, object]:
        """Formats asked for, chosen, found in the file and used, for a `LayoutRecord`."""
        used: dict[str, int] = dict.fromkeys(layout.FORMATS, 0)
        for layer in layers:
            if len(layer.shape) == 5:
                used[layer.format] += 1
        return {
            "requested": decision.requested,
            "chosen": decision.chosen,
            "reason": decision.reason,
            "weights_found": {
                fmt: sum(self.weights_found[p].get(fmt, 0) for p in parts) for fmt in layout.FORMATS
            },
            "weights_used": used,
        }

    # -- the pieces ----------------------------------------------------------------------------

    def _in_precision(
        self, options: RunOptions, part: Part, libraries: Libraries
    ) -> tuple[WanVAEModel, LayoutDecision, EagerForms]:
        """The model in the wanted precision, `part` of it in the wanted memory format, and the
        forms of its eager operations."""
        precision = options.precision
        if precision != "auto" and (not isinstance(precision, str) or precision not in DTYPES):
            raise BackendError(
                expected_one_of("precision", precision, ("auto", "fp32", "bf16", "fp16"))
            )
        dtype = self.dtype if precision == "auto" else DTYPES[precision]
        wrong = self.wrong_formats(dtype)
        decision = layout.decide(options.memory_format, self.device, dtype, libraries, wrong)
        forms = choose_forms(libraries, dtype, decision.chosen, decision.is_wrong)
        with torch.inference_mode(False), torch.no_grad():
            model = self.model if dtype == self.dtype else self._in_dtype(dtype)
            packed = decision.chosen, weights_state(model, part)
            if self._packed_as.get(part) != packed:
                layout.pack_weights(getattr(model, part), decision.chosen)
                self._packed_as[part] = decision.chosen, weights_state(model, part)
        return model, decision, forms

    def wrong_formats(self, dtype: torch.dtype) -> dict[str, str]:
        """Memory formats in which 3-D convolutions of this device give wrong results, and how.

        Proven once for a device and dtype, where that has been seen; see `proof.formats`.
        """
        if not must_prove_formats(self.device):
            return {}
        return wrong_formats(self.device, dtype, self._proof_cache())

    def _in_dtype(self, dtype: torch.dtype) -> WanVAEModel:
        """A copy of the model in `dtype`; the last one, unless the weights were changed since."""
        state = dtype, [weight_state(p) for p in parameters(self.model)]
        if self._cast is None or self._cast[0] != state:
            self._cast = state, copy.deepcopy(self.model).to(dtype)
            # Its weights may lie where those of the copy before lay.
            self._packed_as.clear()
        return self._cast[1]

    def _proof_cache(self) -> ProofCache:
        """The verdicts on kernels for this device; read once."""
        wanted = environment(self.device)
        if self._proofs is None or self._proofs.environment != wanted:
            self._proofs = ProofCache(wanted, cache_folder())
        return self._proofs

    def _plan_request(
        self,
        setup: Setup,
        free: int | None,
        whole_frames: bool,
        lengths: tuple[int, ...] | None = None,
    ) -> PlanRequest:
        request, options = setup.request, setup.request.options
        asked = lengths if lengths is not None else options.chunk_frames
        return PlanRequest(
            config=self.config,
            latent_shape=setup.part_shape,
            dtype=setup.dtype,
            memory_format=setup.layout.chosen,
            layers=setup.ops.layers,
            forms=setup.ops.forms,
            free_bytes=free,
            whole_frames=whole_frames,
            chunk_frames=asked,
            strips=options.strips,
            shards=request.shards is not None,
            operation=request.operation,
            # Device memory is worth a copy for each pass only where it is another memory.
            staged=has_own_memory(setup.device),
            allocator=allocator_of(setup.device),
            host_free_bytes=host_free_bytes(),
        )


def _ops_request(request: SetupRequest, model: WanVAEModel, forms: EagerForms) -> OpsRequest:
    return OpsRequest(
        request.options.backend,
        model,
        only_frame=request.latent_shape[2] == 1,
        part=PARTS[request.operation],
        axis=None if request.shards is None else request.shards.axis,
        forms=forms,
    )


def checked_options(options: RunOptions) -> RunOptions:
    """`options` with plain numbers, also where those of another library were given.

    Raises GeometryError for what is no number of frames, strips or bytes.
    """
    frames, strips, free = options.chunk_frames, options.strips, options.free_bytes
    if frames is not None:
        if isinstance(frames, Sequence) and not isinstance(frames, str):
            frames = tuple(whole_number(n, "a chunk length") for n in frames)
        else:
            frames = whole_number(frames, "chunk_frames")
    if strips is not None:
        strips = whole_number(strips, "strips")
    if free is not None:
        if isinstance(free, bool) or not isinstance(free, Real) or not free >= 0:
            raise GeometryError(
                said(
                    "input.free_bytes",
                    "free_bytes is {value}: expected a number of bytes, 0 or more",
                    value=repr(free),
                )
            )
        free = inf if free > 1 << 62 else int(free)
    return replace(options, chunk_frames=frames, strips=strips, free_bytes=free)


def options_of(plan: Plan | None, options: RunOptions) -> RunOptions:
    """The options of a run: those of `plan` if there is one, with the caller's free_bytes.

    Raises GeometryError if the caller gave other options beside a plan, or what is no plan.
    """
    if plan is None:
        return options
    if not isinstance(plan, Plan):
        raise GeometryError(
            said(
                "plan.no_plan",
                "plan is a {kind}: expected a Plan, from plan() or Plan.from_dict",
                kind=type(plan).__name__,
            )
        )
    free = options.free_bytes
    planned = replace(plan.options, free_bytes=free)
    if options not in (planned, RunOptions(free_bytes=free)):
        raise GeometryError(
            said(
                "plan.options",
                "a run got plan= and options that the plan has decided: give the options to plan()",
            )
        )
    return planned


def layer_records(
    model: WanVAEModel, parts: tuple[Part, ...], ops: OpSet | None = None
) -> tuple[LayerRecord, ...]:
    """Every convolution of `parts` of the model, with the format of its weight and its backend."""
    ops = eager_ops() if ops is None else ops
    return tuple(
        LayerRecord(
            name=f"{part}.{name.removesuffix('.weight')}",
            op="conv3d" if p.ndim == 5 else "conv2d",
            shape=tuple(p.shape),
            format=layout.detect(p),
            backend="eager" if choice is None else choice.family,
            kernel="" if choice is None else f"{choice.kernel} {choice.config}",
            gain=None if choice is None else choice.gain,
        )
        for part in parts
        if (module := getattr(model, part)) is not None
        for name, p in named_parameters(module)
        if name.endswith("weight") and p.ndim in (4, 5)
        for choice in (ops.choice_of(p),)
    )


def weights_bytes(model: WanVAEModel, parts: tuple[Part, ...]) -> int:
    """Bytes of the weights of `parts`."""
    modules = [getattr(model, part) for part in parts]
    return sum(p.nbytes for p in parameters(*(m for m in modules if m is not None)))


def count_weight_formats(state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, int]]:
    """How many 5-D weights of each part of a state dict are in each memory format."""
    return {
        part: layout.count_formats(v for k, v in state.items() if k.startswith(f"{part}."))
        for part in ("decoder", "encoder")
    }


def latent_statistics(
    config: WanVAEConfig, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each latent channel [1, z, 1, 1, 1], in the dtype of `like`.

    Raises LatentError where none are known.
    """
    if config.latents_mean is None or config.latents_std is None:
        raise LatentError(
            said(
                "latent.no_statistics",
                "no statistics are known for latents of {channels} channels, so "
                "normalized=True is impossible: pass the latent as ComfyUI holds it",
                channels=config.z_dim,
            )
        )
    shape = (1, config.z_dim, 1, 1, 1)
    return (
        like.new_tensor(config.latents_mean).view(shape),
        like.new_tensor(config.latents_std).view(shape),
    )
