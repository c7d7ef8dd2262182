"""`wan-vae warm`: compiles the kernels of a VAE now, and with a card also proves and times them.

A decode does the same when it first needs them, which takes 10 to 25 seconds on a new machine.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import layout
from ..config import WanVAEConfig, wan21, wan22
from ..device import auto_dtype, dtype_name, dtype_of_amd, dtype_of_nvidia, pick_device
from ..errors import BackendError, CheckpointError
from ..kernels import registry
from ..kernels.cache_folder import cache_folder
from ..kernels.cuda.driver import compiler_missing
from ..kernels.device import CARDS, Device, amd, nvidia
from ..kernels.proof.cache import ProofCache, environment
from ..network.model import WanVAEModel
from ..options import PARTS
from ..pipeline import load
from ..runs.ahead import Ahead, AheadJob, Outcome, Work, jobs_of_work
from ..runs.kernel_choice import OpsRequest, own_modules, select_ops, unavailable_reason
from ..workers.ahead import compile_here


def run_warm(paths: Sequence[Path], device: str | None, card: str | None) -> int:
    """Warm the caches for the VAEs in `paths`, or for Wan 2.1 and 2.2; prints what was done.

    device: proves and times too. card: compiles for a card that is not here, by its name
    ("RTX 4090"), capability ("8.9") or architecture ("gfx1100"). Returns the exit code.
    Raises BackendError, CheckpointError, NotAWanVAEError.
    """
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file")
    here = None if card is not None else pick_device(device)
    target = Device.chosen_for(here) if here is not None else card_named(str(card))
    families = registry.families_of("auto", target)
    name = target.name if here is None else f"{here} ({target.name})"
    if not families:
        print(f"{name}: nothing to compile ({registry.auto_reason(target)})")
        return 0
    if here is None:
        dtype = _dtype_of(target)
        missing = None if target.capability is None else compiler_missing()
        if missing is not None:
            raise BackendError(f"{target.name}: {missing}")
    else:
        dtype = auto_dtype(here)[0]
        reason = unavailable_reason("auto", here, dtype)
        if reason is not None:
            print(f"{name}: no kernels ({reason})")
            return 1
    print(f"{name}, {dtype_name(dtype)}, kept in {cache_folder()}")
    known = None if here is None else environment(here)
    for source in paths or (None,):
        for config in (wan21(), wan22()) if source is None else (str(source),):
            job = AheadJob(config, target, dtype_name(dtype), known, _WORK).of_config()
            _compile(job, in_this_process=here is not None)
            if here is not None:
                _prove(job.config, source, here, dtype)
    return 0


_WORK = jobs_of_work(tuple(PARTS.values()))


def card_named(name: str) -> Device:
    """The card of this name, compute capability or architecture. Raises BackendError."""
    if name in CARDS:
        return CARDS[name]
    if re.fullmatch(r"gfx[0-9a-f]+", name):
        return amd(name, name, 1)
    match = re.fullmatch(r"(\d+)\.(\d)", name)
    if match is None:
        known = ", ".join(CARDS)
        raise BackendError(
            f"card is {name!r}: expected a compute capability such as 8.9, an AMD architecture "
            f"such as gfx1100, or one of {known}"
        )
    return nvidia(f"compute capability {name}", (int(match[1]), int(match[2])), 1)


def _dtype_of(card: Device) -> torch.dtype:
    """That of "auto" on such a card."""
    if card.capability is not None:
        return dtype_of_nvidia(card.capability)[0]
    return dtype_of_amd(card.architecture)[0]


def _compile(job: AheadJob, in_this_process: bool) -> None:
    """Compile with all cores, and say what was found and what was made.

    in_this_process: kernels are launched in it later, so that Triton must see the real card.
    """
    before, began = _kept(), time.perf_counter()
    print(f"{job.config.family}:")
    if in_this_process:
        for outcome in Ahead(job).compile():
            before = _tell(outcome, before)
    else:
        for outcome in compile_here(job, None):
            before = _tell(outcome, before)
    print(f"  compiled in {time.perf_counter() - began:.1f} s")


def _tell(outcome: Outcome, before: int) -> int:
    after = _kept()
    line = f"  {_what(outcome.work)}: {len(outcome.wanted)} configurations, {after - before} files"
    print(f"{line} new, {outcome.seconds:.1f} s", flush=True)
    for key, reason in outcome.refused.items():
        print(f"    refused: {key}: {reason}")
    return after


def _what(work: Work) -> str:
    return f"{work.part}, {'one image' if work.only_frame else 'video'}"


def _kept() -> int:
    """How many programs in CUDA C++ are in the cache folder. Triton keeps its own elsewhere."""
    folder = cache_folder()
    kept = () if folder is None else (folder / "kernels").glob("*.*")
    return sum(path.suffix in (".cubin", ".ptx") for path in kept)


def _prove(
    config: WanVAEConfig, file: Path | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Prove and time on the card what was compiled; with random weights if there is no `file`."""
    if file is None:
        with torch.device(device):
            model = WanVAEModel(config).to(dtype)
    else:
        model = load(file, device=device, dtype=dtype).model
    layout.pack_weights(model, "channels_last_3d")
    proofs = ProofCache(environment(device), cache_folder())
    for work in _WORK:
        if work.part == "encoder" and not config.has_encoder:
            continue
        before, began = len(proofs), time.perf_counter()
        request = OpsRequest("auto", model, work.only_frame, work.part)
        ops = select_ops(request, lambda: proofs)
        seconds = time.perf_counter() - began
        weights = [
            p
            for module in own_modules(model, work.part)
            for name, p in module.named_parameters()
            if name.endswith("weight")
        ]
        counts = Counter(ops.backend_of(p) for p in weights)
        layers = ", ".join(f"{n} {family}" for family, n in sorted(counts.items()))
        proven = len(proofs) - before
        print(f"  {_what(work)}: {proven} proven and timed in {seconds:.1f} s; layers: {layers}")
        for refusal in ops.refusals:
            print(f"    {refusal.op} off: {refusal.text}")
    for note in proofs.notes:
        print(f"  {note}")
