"""What a caller may ask of a run: names and options. Needs no PyTorch.

The command line and the nodes read their choices here, so that each list of names exists once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

Precision = Literal["auto", "fp32", "bf16", "fp16"]
MemoryFormat = Literal["auto", "contiguous", "channels_last_3d"]
Backend = Literal["auto", "eager", "triton", "cuda", "kitchen"]
# The axis along which a picture is cut into shards.
Axis = Literal["height", "width"]
AxisRequest = Literal["auto", "height", "width"]
# Who gets the result of a sharded run: all ranks, rank 0, or each rank its own part.
Gather = Literal["all", "rank0", "own"]
# How worker processes give the picture to their parent: each writes its own part, or rank 0 writes
# what it alone, or every rank, has gathered.
Collect = Literal["shared", "rank0", "all"]
Operation = Literal["decode", "encode"]
# The half of the model that a run needs.
Part = Literal["decoder", "encoder"]

# Which half each operation needs.
PARTS: Mapping[Operation, Part] = MappingProxyType({"decode": "decoder", "encode": "encoder"})

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
MEMORY_FORMATS: tuple[MemoryFormat, ...] = get_args(MemoryFormat)
BACKENDS: tuple[Backend, ...] = get_args(Backend)
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
AXES: tuple[AxisRequest, ...] = get_args(AxisRequest)
GATHERS: tuple[Gather, ...] = get_args(Gather)
COLLECTS: tuple[Collect, ...] = get_args(Collect)


@dataclass(frozen=True)
class RunOptions:
    """How a decode or encode is to be done; None and "auto" leave the choice to the plan.

    chunk_frames: latent frames a chunk, or the list of all chunk lengths. memory_format: of weights
    and features. precision: the compute dtype. strips: bands of rows to decode one after another.
    backend: the kernels to use. free_bytes: device memory to count on, where that is less than the
    device has free; infinity plans as if all of it fitted.
    """

    chunk_frames: int | Sequence[int] | None = None
    memory_format: MemoryFormat = "auto"
    precision: Precision = "auto"
    strips: int | None = None
    backend: Backend = "auto"
    free_bytes: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.chunk_frames, list):  # a value, which nobody can change later
            object.__setattr__(self, "chunk_frames", tuple(self.chunk_frames))
