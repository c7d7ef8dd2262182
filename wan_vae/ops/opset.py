"""The operations of a run: which function computes each layer, and what a kernel must offer.

An `OpSet` is chosen once for a run and passed to every block, so that nothing depends on ambient
state and the report can say what ran, what did not, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Protocol

import torch

from ..options import Axis
from ..said import said
from .eager.attention import attention
from .eager.conv3d import conv2d, conv3d
from .eager.forms import EagerForms
from .eager.norm import rms_norm, rms_norm_silu
from .eager.upsample import upsample_conv2d


class HaloRows:
    """What lies around a shard's features: a row above and below, or a column left and right.

    before, after: [B, T, 1, W, C] (axis "height") or [B, T, H, 1, C] ("width"), dense; None beyond
    the edge of the picture, where there are zeros. arrive: has what is launched afterwards find
    them there, where they are still on their way.
    """

    def __init__(
        self,
        axis: Axis,
        before: torch.Tensor | None,
        after: torch.Tensor | None,
        arrive: Callable[[], None] | None = None,
    ) -> None:
        self.axis = axis
        self._rows, self._arrive = (before, after), arrive

    @property
    def on_their_way(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Both, to be read behind `arrive`."""
        return self._rows

    def arrive(self) -> None:
        """What is launched from here on finds the rows. Whoever got them calls it or reads them, so
        that nobody overwrites what is still being sent."""
        arrive, self._arrive = self._arrive, None
        if arrive is not None:
            arrive()

    @property
    def before(self) -> torch.Tensor | None:
        """The row above or the column left, which have arrived."""
        self.arrive()
        return self._rows[0]

    @property
    def after(self) -> torch.Tensor | None:
        """The row below or the column right, which have arrived."""
        self.arrive()
        return self._rows[1]


class HaloExchange(Protocol):
    """What blocks need of a shard: the neighbours' rows, and for attention the rows of all ranks.

    Every rank with rows must make the same calls in the same order.
    """

    def surround(self, x: torch.Tensor, site: str, before: int = 1, after: int = 1) -> torch.Tensor:
        """`x` [..., H, W] with `before` rows above and `after` below, zeros at the picture's edge.

        The result is dense in the memory format of `x`.
        """
        ...

    def halo_rows_of(self, x: torch.Tensor, site: str) -> HaloRows:
        """The neighbours' rows next to `x` [B, C, T, H, W], for a kernel that joins them itself."""
        ...

    def padding(self, padding: tuple[int, int]) -> tuple[int, int]:
        """`padding` (rows, columns) without the axis on which halo rows stand."""
        ...

    def own_rows(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of `x` [..., H, W] of the whole picture at latent resolution; a view."""
        ...

    def gather_rows(self, x: torch.Tensor, site: str) -> torch.Tensor:
        """`x` [..., H, W] of the whole picture at latent resolution, from all ranks' parts."""
        ...


@dataclass(frozen=True)
class CallSize:
    """Size of the input of one call of a layer. `only_frame`: a video of one frame, which has no
    history."""

    batch: int
    frames: int
    rows: int
    cols: int
    only_frame: bool = False


@dataclass(frozen=True)
class Workspace:
    """Bytes that one call of a prepared layer takes beside its input and its result.

    operand_bytes: from the norm until the convolution has read it. history_bytes: kept for the next
    pass. hidden_bytes: taken and given back inside the call.
    """

    operand_bytes: int = 0
    history_bytes: int = 0
    hidden_bytes: int = 0


class Prepared(Protocol):
    """A layer that a kernel runs: proven on this device, with its own copy of the weights."""

    @property
    def family(self) -> str:
        """The family of the kernel, such as "triton"."""
        ...

    @property
    def frames_together(self) -> int:
        """How many frames of a latent frame it makes from the same products, 1, 2 or 4: which they
        are must not depend on how a chunk is cut into passes."""
        ...

    def workspace(self, size: CallSize) -> Workspace:
        """What a call on an input of `size` takes. Allocates nothing."""
        ...


class FusedConv(Protocol):
    """SiLU(rms_norm(x)), joined with its history, through one causal convolution: two kernels.

    Holds gain, weight and bias. Two calls, so that a caller can let go of `x` and of the old
    history between them. `only_frame`: all history is zero and only the last temporal slice of the
    weight is used.
    """

    def operand(
        self,
        x: torch.Tensor,
        history: torch.Tensor | None,
        *,
        only_frame: bool,
        keep: bool,
        overwrite: bool = False,
        halo: HaloRows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `convolve` reads, and if `keep` the history for the next chunk, in its own memory
        or, with `overwrite`, in that of `history`.

        `x` [B, C, T, H, W]; `history` [B, C, kT - 1, H', W'] of an earlier call of the same kernel,
        or None for zeros. With a `halo` the result is of H' = H + 2 rows (or W' = W + 2 columns).
        """
        ...

    def convolve(
        self,
        operand: torch.Tensor,
        frames: int,
        residual: torch.Tensor | None,
        *,
        padding: tuple[int, int],
        only_frame: bool,
    ) -> torch.Tensor:
        """[B, O, frames, H', W'], with `residual` of the same shape added.

        `padding`: zero rows and columns on each side, 0 where `x` had halo rows.
        """
        ...


@dataclass(frozen=True)
class Refusal:
    """Why a family of kernels does not run some layers of an operation.

    `layers`: their native names, empty where the reason concerns the device.
    """

    op: str
    family: str
    reason: str
    layers: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The reason, with the number of layers that it concerns."""
        if not self.layers:
            return self.reason
        if len(self.layers) == 1:
            return said("kernel.one_layer", "{reason} (1 layer)", reason=self.reason)
        return said(
            "kernel.layers",
            "{reason} ({count} layers)",
            reason=self.reason,
            count=len(self.layers),
        )


@dataclass(frozen=True)
class LayerChoice:
    """The kernel that runs a layer, in which configuration.

    ms, eager_ms: milliseconds of a call of this class of layers here, and of the eager operations,
    where they were measured.
    """

    family: str
    kernel: str
    config: str
    ms: float | None = None
    eager_ms: float | None = None

    @property
    def gain(self) -> float | None:
        """How many times faster than eager."""
        return self.eager_ms / self.ms if self.ms and self.eager_ms is not None else None

    @property
    def text(self) -> str:
        """Family, kernel and configuration: "cuda wgmma winograd"."""
        return f"{self.family} {self.kernel} {self.config}"


OPERATIONS = ("norm", "norm_silu", "conv3d", "conv2d", "upsample_conv2d", "attention")


def no_fused_conv(weight: torch.Tensor) -> FusedConv | None:
    """The eager reference fuses nothing."""
    return None


def no_choice(weight: torch.Tensor) -> LayerChoice | None:
    """The eager reference runs no layer in a kernel."""
    return None


@dataclass(frozen=True)
class OpSet:
    """One callable for each operation, and what a plan and a report need to know of them.

    Signatures are those of the eager functions in `eager/`.
    """

    norm: Callable[..., torch.Tensor] = rms_norm
    norm_silu: Callable[..., torch.Tensor] = rms_norm_silu
    conv3d: Callable[..., torch.Tensor] = conv3d
    conv2d: Callable[..., torch.Tensor] = conv2d
    upsample_conv2d: Callable[..., torch.Tensor] = upsample_conv2d
    attention: Callable[..., torch.Tensor] = attention
    # The kernel that runs norm, SiLU and the convolution of this weight in one, if there is one.
    fused_conv: Callable[[torch.Tensor], FusedConv | None] = no_fused_conv
    # The dtype in which an encode takes its pixels; None is that of the weights.
    pixels: torch.dtype | None = None
    # The kernel that runs the layer of this weight, or None for eager; for the report.
    choice_of: Callable[[torch.Tensor], LayerChoice | None] = no_choice
    # The family that runs each operation; "eager" where no layer of it has a kernel.
    used: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(OPERATIONS, "eager"))
    refusals: tuple[Refusal, ...] = ()
    # Layers that kernels run, by native name ("decoder.head.2"); the others run eager.
    layers: Mapping[str, Prepared] = field(default_factory=lambda: MappingProxyType({}))
    # Which kernels these are, by the same names.
    choices: Mapping[str, LayerChoice] = field(default_factory=lambda: MappingProxyType({}))
    # How layers without a kernel are computed.
    forms: EagerForms = field(default_factory=EagerForms)

    def backend_of(self, weight: torch.Tensor) -> str:
        """The family that runs the layer of `weight`, or "eager"."""
        choice = self.choice_of(weight)
        return "eager" if choice is None else choice.family


def eager_ops(forms: EagerForms | None = None) -> OpSet:
    """The reference: plain PyTorch, right on every device; also the one that training uses.

    forms: how it is computed; None takes what `torch.nn.functional` does.
    """
    if forms is None:
        return OpSet()
    return OpSet(
        conv3d=partial(conv3d, forms=forms),
        conv2d=partial(conv2d, forms=forms),
        upsample_conv2d=partial(upsample_conv2d, forms=forms),
        attention=partial(attention, forms=forms),
        forms=forms,
    )
