"""What all kernels of the CUDA family have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...ops.problem import LayerWeights, Operation
from ..bounds import Bound
from ..device import Device
from ..kernel import BuildError, Requires
from .program import Program, build


@dataclass(frozen=True)
class CudaKernel(ABC):
    """A kernel that is some programs. `used`: see `Kernel`."""

    name: str
    operation: Operation
    requires: Requires
    used: Mapping[str, str]
    family: str = "cuda"
    build_failures: tuple[type[Exception], ...] = (BuildError,)
    sums_error: float = 0.0
    compiles_at_launch: bool = False

    def bound(self, weights: LayerWeights, problem: Any, config: str) -> Bound | None:
        """See `Kernel`. Sums are float32."""
        return None

    @abstractmethod
    def programs(self, problem: Any, config: str, device: Device) -> tuple[Program, ...]:
        """See `CompiledKernel`."""

    def build(self, problem: Any, config: str, device: Device) -> None:
        """See `Kernel`."""
        for program in self.programs(problem, config, device):
            build(program)
