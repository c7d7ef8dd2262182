"""Plan: all that a run will do, and why, fixed before its first chunk. One frozen value.

`Engine.plan` makes it, `Run` executes it, the parent sends it to workers, and the report prints it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import Any

from ..chunking import chunk_lengths
from ..layout import LayoutDecision
from ..ops.opset import Refusal
from ..options import Operation, RunOptions
from ..report import LayerRecord
from ..said import reworded, worded
from ..sharding.plan import ShardPlan


@dataclass(frozen=True)
class LayerChoices:
    """Which function runs each layer: every convolution, the family of each operation, and why
    kernels were refused."""

    layers: tuple[LayerRecord, ...] = ()
    used: Mapping[str, str] = field(default_factory=dict, hash=False)
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Pace:
    """How much of a video goes at a time: `lengths` and `pass_elements` of a plan."""

    lengths: tuple[int, ...]
    pass_elements: int | None


@dataclass(frozen=True)
class Plan:
    """How one decode or encode goes, and the device memory that it takes.

    operation: "decode" or "encode". latent_shape, pixel_shape: of the whole picture, [B, z, T, H,
    W] and [B, 3, T', H', W']. device, dtype: where and in what it computes. options: what the
    caller asked for. layout: the memory format and why. choices: the backend of each layer.
    lengths: latent frames of each chunk. pass_elements: numbers that the features of a pass may
    hold; None takes each chunk whole. strips: bands of rows decoded one after another; None
    decodes the whole picture. whole_frames: strips are taken inside each chunk, so that frames are
    complete. shards: the rows of each rank; None on one device. free_bytes: device memory that the
    plan could count on; None where nobody can say. planned_bytes: predicted peak above weights,
    latent and output, of one rank. extra_work: share of the multiplications that strips do twice.
    notes: sentences for the report, such as why strips were planned. parked: strips of whole frames
    leave frames and history on the host, where they take host_bytes. parts: latent frames of each
    part of the video that all parked strips go through before the next one begins. features_wait:
    what the trunk has made of a part waits on the host too. needed_bytes: what must be free for
    this plan to be made. wanted_bytes: what the fastest way takes, however little is free.
    """

    operation: Operation
    latent_shape: tuple[int, ...]
    pixel_shape: tuple[int, ...]
    device: str
    dtype: str
    options: RunOptions
    layout: LayoutDecision
    choices: LayerChoices
    lengths: tuple[int, ...]
    pass_elements: int | None
    strips: int | None
    whole_frames: bool
    shards: ShardPlan | None
    free_bytes: int | None
    planned_bytes: int
    weights_bytes: int
    extra_work: float = 0.0
    notes: tuple[str, ...] = ()
    parked: bool = False
    parts: tuple[int, ...] = ()
    features_wait: bool = False
    host_bytes: int = 0
    needed_bytes: int = 0
    wanted_bytes: int = 0

    @property
    def chunk_frames(self) -> int:
        """Latent frames of the longest chunk."""
        return max(self.lengths)

    @property
    def pace(self) -> Pace:
        """Its chunks and passes."""
        return Pace(self.lengths, self.pass_elements)

    def pace_of_ranks(self, paces: Sequence[tuple[int, int | None]]) -> Pace:
        """The smallest passes and the shortest chunks of ranks that share this run; chunks that the
        caller asked for stay.

        paces: latent frames of a chunk and numbers of a pass, of each rank. Raises GeometryError.
        """
        passes = [elements for _, elements in paces]
        fewest = [elements for elements in passes if elements is not None]
        lengths = self.lengths
        if self.options.chunk_frames is None:
            lengths = chunk_lengths(self.latent_shape[2], min(frames for frames, _ in paces))
        return Pace(lengths, min(fewest) if len(fewest) == len(passes) else None)

    def paced(self, pace: Pace) -> Plan:
        """This plan with the chunks and passes of `pace`; the bytes are as they were."""
        return replace(self, lengths=pace.lengths, pass_elements=pace.pass_elements)

    def halved(self) -> Plan:
        """A plan that takes half as much at a time: shorter chunks, smaller passes.

        `lengths` do not change if each chunk has one latent frame already.
        """
        half = (max(self.lengths) + 1) // 2
        smaller = tuple(
            part
            for length in self.lengths
            for part in (*[half] * (length // half), length % half)
            if part
        )
        elements = None if self.pass_elements is None else max(1, self.pass_elements // 2)
        return replace(self, lengths=smaller, pass_elements=elements)

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON: dictionaries, lists, strings, numbers, booleans and None."""
        plain = asdict(self)
        if self.options.free_bytes == inf:  # which JSON has no number for
            plain["options"]["free_bytes"] = "inf"
        plain |= plain.pop("choices")
        plain["backends"] = {"used": plain.pop("used"), "refusals": plain.pop("refusals")}
        reasons = (refusal.reason for refusal in self.choices.refusals)
        plain["worded"] = worded((self.layout.reason, *self.notes, *reasons))
        return {name: _plain(value) for name, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Plan:
        """Make a plan from what `as_dict` returned, in this process or another."""
        values = dict(plain)
        words = values.pop("worded", {})
        backends, layers = values.pop("backends"), values.pop("layers")
        options, shards = values["options"], values["shards"]
        if options["free_bytes"] == "inf":
            options = {**options, "free_bytes": inf}
        if shards is not None:
            bounds = tuple((start, stop) for start, stop in shards["bounds"])
            shards = ShardPlan(shards["axis"], bounds, shards["world_size"])
        values |= {
            "options": RunOptions(**options),
            "shards": shards,
            "layout": LayoutDecision(
                **{**values["layout"], "reason": reworded(values["layout"]["reason"], words)}
            ),
            "choices": LayerChoices(
                tuple(LayerRecord(**{**layer, "shape": tuple(layer["shape"])}) for layer in layers),
                dict(backends["used"]),
                tuple(
                    Refusal(r["op"], r["family"], reworded(r["reason"], words), tuple(r["layers"]))
                    for r in backends["refusals"]
                ),
            ),
        }
        for name in ("latent_shape", "pixel_shape", "lengths", "parts", "notes"):
            values[name] = tuple(values[name])
        values["notes"] = tuple(reworded(note, words) for note in values["notes"])
        return cls(**values)

    def summary(self) -> dict[str, object]:
        """`as_dict` without what a report says elsewhere: layers, backends, layout, options."""
        elsewhere = ("layers", "backends", "layout", "options", "device", "dtype", "worded")
        # Made without the layers, of which there are so many that it takes milliseconds.
        rest = replace(self, choices=LayerChoices())
        return {k: v for k, v in rest.as_dict().items() if k not in elsewhere}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
