"""What runs each class of layers of a model, and what that gained: rows for doctor and --share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..network.model import WanVAEModel
from ..network.sites import layer_sites
from ..ops.opset import LayerChoice, OpSet
from ..options import Part

# Configurations that add up in float16, as `kernels.bounds` allows, have names that end so; so do
# all kernels of this family.
_HALF_SUMS, _KITCHEN = "_halfsums", "kitchen"


@dataclass(frozen=True)
class KernelRow:
    """Layers of one class: how many, and the kernel that runs them; None is eager."""

    problem: str
    layers: int
    choice: LayerChoice | None

    @property
    def runs(self) -> str:
        """What runs them, in words."""
        return "eager" if self.choice is None else self.choice.text

    @property
    def gain(self) -> str:
        """How many times faster than eager, "2.8x"; empty where that was not measured."""
        gain = None if self.choice is None else self.choice.gain
        return "" if gain is None else f"{gain:.1f}x"

    @property
    def times(self) -> str:
        """Milliseconds of the kernel and of eager; empty where they were not measured."""
        choice = self.choice
        if choice is None or choice.ms is None or choice.eager_ms is None:
            return ""
        return f"{choice.ms:.3f} ms, eager {choice.eager_ms:.3f} ms"


def kernel_rows(
    model: WanVAEModel, part: Part, only_frame: bool, ops: OpSet
) -> tuple[KernelRow, ...]:
    """The classes of layers of `part`, in the order in which they run."""
    counts: dict[tuple[str, LayerChoice | None], int] = {}
    for site in layer_sites(model, part, only_frame):
        key = site.problem.key(), ops.choices.get(site.name)
        counts[key] = counts.get(key, 0) + 1
    return tuple(KernelRow(problem, n, choice) for (problem, choice), n in counts.items())


def float16_sums_note(rows: Iterable[KernelRow]) -> str | None:
    """A sentence where a layer adds up in float16; None where none does."""
    choices = [row.choice for row in rows if row.choice is not None]
    notes = []
    if any(choice.config.endswith(_HALF_SUMS) for choice in choices):
        notes.append(
            f"{_HALF_SUMS}: 288 products at a time are added up in float16, the rest in float32"
        )
    if any(choice.family == _KITCHEN for choice in choices):
        notes.append(
            f"{_KITCHEN}: all is added up in float16, and the bits may depend on the size of the "
            "picture"
        )
    if not notes:
        return None
    return "; ".join([*notes, "the weights show that these sums cannot overflow"])
