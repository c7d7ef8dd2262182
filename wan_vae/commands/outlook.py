"""What a decode would do on a device, and what it would cost: the last part of `wan-vae doctor`.

It is the plan of the decodes themselves, made by the code that makes it for a run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from types import MappingProxyType

import torch

from ..config import wan21
from ..device import device_name, pick_dtype
from ..errors import WanVAEError, first_line
from ..network.model import WanVAEModel
from ..pipeline import WanVAE
from ..planning.plan import Plan
from .report_text import count, gibibytes

# What is planned: a name, frames, rows and columns of the pixels.
PICTURES = (
    ("480p x 81", 81, 480, 832),
    ("720p x 81", 81, 720, 1280),
    ("an image of 1024 x 1024", 1, 1024, 1024),
)
# Seconds of a decode with our kernels in bf16, latent and pixels on the card: the least and the
# most of the predictions that docs/cards.md explains, of which none was measured. By the end of the
# card's name and the picture.
PREDICTED_S = MappingProxyType(
    {
        ("RTX 3060", "480p x 81"): (5.0, 8.0),
        ("RTX 3060", "720p x 81"): (11.9, 18.6),
        ("RTX 3080", "480p x 81"): (2.2, 3.5),
        ("RTX 3080", "720p x 81"): (5.2, 8.1),
        ("RTX 3090", "480p x 81"): (1.8, 2.9),
        ("RTX 3090", "720p x 81"): (4.3, 6.8),
        ("RTX 4060", "480p x 81"): (4.7, 7.2),
        ("RTX 4060", "720p x 81"): (11.0, 16.8),
        ("RTX 4090", "480p x 81"): (0.9, 1.4),
        ("RTX 4090", "720p x 81"): (2.2, 3.3),
        ("RTX 5060 Ti", "480p x 81"): (2.9, 4.5),
        ("RTX 5060 Ti", "720p x 81"): (6.9, 10.5),
        ("RTX 5090", "480p x 81"): (0.7, 1.0),
        ("RTX 5090", "720p x 81"): (1.6, 2.4),
        ("L40S", "480p x 81"): (0.9, 0.9),
        ("L40S", "720p x 81"): (2.1, 2.1),
    }
)
# What runs most of the work, if our kernels do.
_OWN_FAMILIES = ("cuda", "triton")


def random_vae(device: torch.device) -> WanVAE:
    """Wan 2.1 with random weights, in the dtype of the device."""
    with torch.device(device):
        return WanVAE(WanVAEModel(wan21()).to(pick_dtype("auto", device)))


def outlook(vae: WanVAE) -> list[str]:
    """The lines. Kernels that were never checked on the device are checked now."""
    factor, lines = vae.config.decoded_factor, []
    found: dict[str, Plan | str] = {}
    for name, frames, height, width in PICTURES:
        latent = (1, vae.config.z_dim, 1 + (frames - 1) // vae.config.temporal_factor)
        try:
            found[name] = vae.plan((*latent, height // factor, width // factor))
        except WanVAEError as error:
            found[name] = f"refused: {first_line(error)}"
    plans = [plan for plan in found.values() if isinstance(plan, Plan)]
    if plans:
        free = plans[0].free_bytes
        room = "nobody says how much is free" if free is None else f"{gibibytes(free)} free"
        weights = gibibytes(plans[0].weights_bytes)
        lines.append(f"decode: {plans[0].dtype}, weights {weights}, {room}")
        lines.append(f"  {plans[0].layout.chosen}: {plans[0].layout.reason}")
        lines.append(f"  {_backends(plans[0])}")
        lines += _refusals(plans)
    for name, plan in found.items():
        lines.append(f"  {name}: {plan if isinstance(plan, str) else _cost(plan)}")
        if isinstance(plan, Plan):
            lines.append(f"    {_time(name, plan, device_name(vae.device))}")
    return lines


def _backends(plan: Plan) -> str:
    """Which family runs which operations: "eager: norm, conv3d"."""
    operations: defaultdict[str, list[str]] = defaultdict(list)
    for operation, family in plan.choices.used.items():
        operations[family].append(operation)
    return "; ".join(f"{family}: {', '.join(found)}" for family, found in operations.items())


def _refusals(plans: Iterable[Plan]) -> list[str]:
    """Each reason once."""
    texts = {f"{r.op} not in {r.family}: {r.text}": None for p in plans for r in p.choices.refusals}
    return [f"  {text}" for text in texts]


def _cost(plan: Plan) -> str:
    parts = [f"planned peak {gibibytes(plan.planned_bytes)}"]
    chunks = f"{count(plan.chunk_frames, 'latent frame')} a chunk"
    if len(plan.lengths) > 1:
        parts.append(chunks)
    if plan.strips is not None:
        parts.append(f"{plan.strips} strips, {plan.extra_work:.0%} of the work twice")
    if any("no number of strips" in note for note in plan.notes):
        parts.append("not sure to fit")
    return ", ".join(parts)


def _time(name: str, plan: Plan, card: str) -> str:
    """Seconds where there is a number for this card and picture."""
    seconds = next(
        (s for (end, picture), s in PREDICTED_S.items() if picture == name and card.endswith(end)),
        None,
    )
    if seconds is None or plan.strips or plan.choices.used["conv3d"] not in _OWN_FAMILIES:
        return "time: nothing was measured on such a device; `wan-vae doctor --share` measures"
    least, most = seconds
    return f"time: {least} to {most} s predicted, not measured (docs/cards.md)"
