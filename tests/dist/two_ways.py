"""A family of kernels in which every convolution has two right ways with different bits, for ranks
whose clocks do not agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F

from wan_vae.kernels import registry
from wan_vae.kernels.device import Device
from wan_vae.kernels.kernel import BuildError, Requires
from wan_vae.layout import LayoutCounter
from wan_vae.ops.opset import CallSize, Workspace
from wan_vae.ops.problem import ConvProblem, LayerWeights, Operation

_FP32 = torch.float32
_ON_THE_CPU = Requires(frozenset({"cpu"}), feature_dtypes=frozenset({_FP32}))


@dataclass(frozen=True)
class TwoWaysLayer:
    """The sum over the channels as they are, or "halves": in two parts."""

    config: str
    weight: torch.Tensor
    ran: list[str]
    family: str = "cuda"
    kernel: str = "two ways"
    operand_dtype: torch.dtype = _FP32
    frames_together: int = 1

    def run(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        counter: LayoutCounter,
        padding: tuple[int, int],
        last_slice: bool,
    ) -> torch.Tensor:
        self.ran.append(self.config)
        w = (self.weight[:, :, -1:] if last_slice else self.weight).float()
        x = x.float()  # pixels are float16 in a proof
        if self.config == "whole":
            return F.conv3d(x, w, bias, padding=(0, *padding))
        half = x.shape[1] // 2
        y = F.conv3d(x[:, :half], w[:, :half], bias, padding=(0, *padding))
        return y + F.conv3d(x[:, half:], w[:, half:], padding=(0, *padding))

    def workspace(self, size: CallSize) -> Workspace:
        return Workspace()


@dataclass(frozen=True)
class TwoWays:
    """missing: configurations that cannot be built."""

    ran: list[str]
    missing: tuple[str, ...] = ()
    requires: Requires = _ON_THE_CPU
    name: str = "two ways"
    family: str = "cuda"
    operation: Operation = "conv3d"
    build_failures: tuple[type[Exception], ...] = (BuildError,)
    sums_error: float = 0.0
    compiles_at_launch: bool = False

    @property
    def used(self) -> Mapping[str, str]:
        return {"conv3d": self.family}

    def candidates(self, problem: ConvProblem, device: Device) -> Sequence[str]:
        return ("whole", "halves")

    def bound(self, weights: LayerWeights, problem: ConvProblem, config: str) -> None:
        return None

    def build(self, problem: ConvProblem, config: str, device: Device) -> None:
        if config in self.missing:
            raise BuildError(f"no {config} on this rank")

    def prepare(
        self, weights: LayerWeights, problem: ConvProblem, config: str, device: Device
    ) -> TwoWaysLayer:
        return TwoWaysLayer(config, weights.weight.detach(), self.ran)


@contextmanager
def two_ways(missing: tuple[str, ...] = ()) -> Iterator[TwoWays]:
    """While it is entered, the backend "cuda" is this family, and the CPU can run it."""
    kernel = TwoWays([], missing)

    def kernels_of(operation: Operation, families: tuple[str, ...]) -> Iterator[TwoWays]:
        return iter([kernel] if operation == kernel.operation else [])

    with (
        patch.object(registry, "kernels_of", kernels_of),
        patch.object(registry, "unavailable_reason", lambda name, device, dtype: None),
        patch.dict("os.environ", {"TRITON_INTERPRET": "0"}),
    ):
        yield kernel


def lying_clock(kernel: TwoWays, fastest: str) -> Callable[[Callable[[], object]], float]:
    """A clock by which `fastest` is the fastest and eager the slowest."""

    def ms(run: Callable[[], object]) -> float:
        kernel.ran.clear()
        run()
        if not kernel.ran:
            return 10.0
        return 1.0 if kernel.ran[0] == fastest else 2.0

    return ms
