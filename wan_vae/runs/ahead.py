"""Compiles the kernels of a model ahead of its runs, without the card that they are for.

A run compiles what it finds in no cache: 10 to 25 seconds on a new machine. The same can be done
before, in a process of low priority (`workers/ahead.py`) or by hand (`wan-vae warm`), because a
compiler needs to know a card and not to have it. Proofs and times need the card: they stay with the
run.

What is compiled is what a run asks for: `kernels/contenders.py` lists it for both, and the network
then runs on `meta` tensors, where the launches of a decode or an encode compile and do no more.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from .. import geometry
from ..chunking import schedule
from ..config import WanVAEConfig
from ..device import DTYPES
from ..errors import BackendError, first_line
from ..io.checkpoint import load_checkpoint
from ..kernels import registry
from ..kernels.cache_folder import cache_folder, write_whole
from ..kernels.contenders import (
    Builds,
    Contenders,
    LayerClass,
    Wanted,
    class_of,
    wanted_builds,
)
from ..kernels.device import Device
from ..kernels.kernel import BuildError, Family
from ..kernels.proof.cache import ProofCache
from ..kernels.table import LayerTable
from ..network.blocks import Step
from ..network.cache import FeatureCache
from ..network.model import WanVAEModel
from ..network.sites import layer_sites
from ..ops.opset import LayerChoice, OpSet
from ..ops.problem import LayerSite
from ..options import Backend, Part

# Rows and columns of the latent with which the network runs on `meta`; sizes compile nothing anew.
_SIDE = 8
# Latent frames of its chunks: those of a video's first one, and of one behind it.
_CHUNKS = (2, 2)


@dataclass(frozen=True)
class Work:
    """One part of a model, for videos or for images (`only_frame`): layers with kernels of their
    own."""

    part: Part
    only_frame: bool


@dataclass(frozen=True)
class AheadJob:
    """What is compiled: for which model and card, and in which order.

    source: the configuration of a VAE, or the file of one (whose header alone is read).
    environment: of `proof.cache.environment`, to find what is chosen already; None without a card.
    """

    source: WanVAEConfig | str
    device: Device
    dtype: str
    environment: Mapping[str, str] | None
    work: tuple[Work, ...]
    backend: Backend = "auto"

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for another process."""
        source = self.source if isinstance(self.source, str) else asdict(self.source)
        return {**asdict(self), "source": source, "device": _plain(self.device)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> AheadJob:
        """The job that `as_dict` wrote."""
        source = plain["source"]
        if not isinstance(source, str):
            lists = {k: tuple(v) for k, v in source.items() if isinstance(v, list)}
            source = WanVAEConfig(**{**source, **lists})
        return cls(
            source,
            _device(plain["device"]),
            plain["dtype"],
            plain["environment"],
            tuple(Work(**work) for work in plain["work"]),
            plain["backend"],
        )

    @property
    def config(self) -> WanVAEConfig:
        """The model's configuration; of a file, as its header says. Raises CheckpointError,
        NotAWanVAEError."""
        if not isinstance(self.source, str):
            return self.source
        return load_checkpoint(self.source, check_numbers=False).config

    def of_config(self) -> AheadJob:
        """The same job of a configuration, so that two files of one model are the same work.

        Raises CheckpointError, NotAWanVAEError.
        """
        return replace(self, source=self.config)

    # -- what is done already ------------------------------------------------------------------

    def left(self) -> AheadJob:
        """The job without the work that an earlier one has done: nothing is compiled to see it.

        For a job of a configuration, see `of_config`.
        """
        return replace(self, work=tuple(w for w in self.work if not self._is_done(w)))

    def _is_done(self, work: Work) -> bool:
        note = self._note(work)
        return note is not None and note.is_file()

    def note_done(self, work: Work) -> None:
        """Let `left` know. A folder that cannot be written to costs the next prompt a process."""
        note = self._note(work)
        if note is not None:
            try:
                write_whole(note, b"")
            except OSError:
                return

    def _note(self, work: Work) -> Path | None:
        folder = cache_folder()
        if folder is None:
            return None
        plain = replace(self, work=(work,)).as_dict()
        facts: list[object] = [sorted(plain.items(), key=str), _digest_of_sources()]
        name = sha256(repr(facts).encode()).hexdigest()[:24]
        # Beside the kernels, so that it goes when they go.
        return folder / "kernels" / f"{name}.done"


def _plain(device: Device) -> dict[str, Any]:
    runs_on = None if device.runs_on is None else _plain(device.runs_on)
    return {**asdict(device), "features": sorted(device.features), "runs_on": runs_on}


def _device(plain: Mapping[str, Any]) -> Device:
    capability, runs_on = plain["capability"], plain["runs_on"]
    return Device(
        **{
            **plain,
            "features": frozenset(plain["features"]),
            "capability": None if capability is None else tuple(capability),
            "runs_on": None if runs_on is None else _device(runs_on),
        }
    )


def _digest_of_sources() -> str:
    """Of the kernels' sources: another version of this package compiles others."""
    digest = sha256()
    folder = files(registry.__package__)
    for family in registry.FAMILIES:
        for file in sorted(folder.joinpath(family).iterdir(), key=lambda file: file.name):
            if file.name.endswith((".py", ".cu", ".cuh")):
                digest.update(file.read_bytes())
    return digest.hexdigest()


# -- in the process that decodes -----------------------------------------------------------------


def get_ready(device: Device, environment: Mapping[str, str], backend: Backend = "auto") -> None:
    """Do what the first decode of this process would do and needs no card for: import the families
    of kernels for `device`, and let those get ready whose kernels are chosen, or all of them where
    nothing is chosen yet.

    For a thread beside other work. environment: see `AheadJob`. Raises BackendError for an unknown
    backend.
    """
    chosen = ProofCache(environment, cache_folder()).families
    for name in registry.families_of(backend, device):
        family = registry.load(name)
        if isinstance(family, Family) and (not chosen or name in chosen):
            family.get_ready()


# -- what is compiled ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layers:
    """The layers of a piece of work, each with its class, of a model without numbers."""

    model: WanVAEModel
    work: Work
    sites: tuple[LayerSite, ...]
    classes: tuple[LayerClass, ...]


class Ahead:
    """The builds of a job, on a model without numbers.

    Nothing here touches a card. Raises BackendError where no kernel is asked for on the card, and
    CheckpointError or NotAWanVAEError for its file.
    """

    def __init__(self, job: AheadJob) -> None:
        self.job, self.config = job, job.config
        self.families = registry.families_of(job.backend, job.device)
        if not self.families:
            raise BackendError(f"no kernels to compile: {registry.auto_reason(job.device)}")
        names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
        with torch.device("meta"):
            self._model = WanVAEModel(self.config).to(names[job.dtype])
        self._proofs = None
        if job.environment is not None:
            self._proofs = ProofCache(job.environment, cache_folder())

    def builds(self, work: Work) -> list[Wanted]:
        """What a run of `work` would build now, in its order."""
        return wanted_builds(self._layers(work).classes, self._winner_of, is_timed=True)

    def _winner_of(self, one: LayerClass) -> str | None:
        choice = None if self._proofs is None else self._proofs.choice(one.key)
        return None if choice is None else choice.winner

    def _layers(self, work: Work) -> _Layers:
        sites = tuple(layer_sites(self._model, work.part, work.only_frame))
        asked = Contenders(sites, self.families, self.job.device).all()
        classes = tuple(class_of(site, own) for site, own in zip(sites, asked, strict=True))
        return _Layers(self._model, work, sites, classes)

    def compile(self, threads: int | None = None) -> Iterator[Outcome]:
        """Build everything, the work in its order; yields each piece of work as it is done.

        threads: compilers at a time; None takes all cores.
        """
        for work in self.job.work:
            if work.part == "encoder" and not self.config.has_encoder:
                self.job.note_done(work)
                continue
            began, refused = time.perf_counter(), dict[str, str]()
            wanted = self.builds(work)
            with Builds(self.job.device, threads) as builds:
                for build in builds.in_turn(wanted):
                    reason = builds.failure(build)
                    if reason is not None:
                        refused[build.key] = reason
                try:
                    run_on_meta(self._layers(work), self._ops(work, refused))
                except BuildError as error:
                    refused["a launch that no proof makes"] = first_line(error)
            seconds = time.perf_counter() - began
            yield Outcome(work, tuple(build.key for build in wanted), refused, seconds)
            self.job.note_done(work)

    def _ops(self, work: Work, refused: Mapping[str, str]) -> OpSet:
        """The operations of a run in which each class takes what is chosen, or else the first
        that can be built."""
        layers, table = self._layers(work), LayerTable(self.families)
        for site, one in zip(layers.sites, layers.classes, strict=True):
            winner = self._winner_of(one)
            for contender in one.contenders:
                key = one.key_of(contender)
                if key not in refused and winner in (None, key):
                    kernel, config = contender.kernel, contender.config
                    layer = kernel.prepare(site.weights, site.problem, config, self.job.device)
                    table.bind(site, kernel, layer, LayerChoice(kernel.family, kernel.name, config))
                    break
        return table.ops()


@dataclass(frozen=True)
class Outcome:
    """What became of a piece of work. wanted: proof keys; refused: why some cannot be built."""

    work: Work
    wanted: Sequence[str]
    refused: Mapping[str, str]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for another process."""
        return asdict(self)


def run_on_meta(layers: _Layers, ops: OpSet) -> None:
    """Decode or encode a small video, or an image, without numbers."""
    model, work = layers.model, layers.work
    lengths = (1,) if work.only_frame else _CHUNKS
    cache, config = FeatureCache(), model.config
    dtype, device = model.conv2.weight.dtype, torch.device("meta")
    for chunk in schedule(sum(lengths), lengths):
        step = Step(cache, chunk, ops=ops)
        if work.part == "decoder":
            size = 1, config.z_dim, chunk.frames, _SIDE, _SIDE
            model.decode_chunk(torch.empty(size, dtype=dtype, device=device), step)
        else:
            first, last = geometry.chunk_frames_slice(chunk.start, chunk.stop, config)
            side = _SIDE * config.spatial_factor
            size = 1, config.colours, last - first, side, side
            pixels = torch.empty(size, dtype=dtype, device=device)
            model.encode_chunk(pixels, step)


def jobs_of_work(parts: Sequence[Part], images_first: bool = False) -> tuple[Work, ...]:
    """Videos and images of each of `parts`, what is wanted first first."""
    order = (True, False) if images_first else (False, True)
    return tuple(Work(part, only) for only in order for part in parts)
