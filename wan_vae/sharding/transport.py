"""Sends tensors to other processes; nothing else does. Tensors are made dense NCDHW first.

Sender and receiver compare a header before the bytes are used.

Why: NCCL checks that a tensor is dense, but not in which order. The bytes of a dense NDHWC tensor
are read as NCDHW, and the picture is silently garbled. Gloo copies correctly, so tests with Gloo do
not show the fault.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from math import prod
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist

from ..clock import Mark, Spans
from ..errors import ShardingError, first_line
from ..layout import contiguous_for_collective, detect
from ..said import said, together
from .context import Headers, ShardContext

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64)
# The backend of a group in which each rank has a CUDA device.
HOST_AND_DEVICE = "cpu:gloo,cuda:nccl"
_MAGIC = 0x57414E31
_DENSE_NCDHW = 1
_HEADER_WORDS = 12
# Where a message begins in a buffer that it shares with others: kernels read such addresses best.
_MESSAGE_ALIGNMENT = 512


# No name of torch.distributed is looked up at import: a torch that was built without it has the
# module, and nothing in it.
def all_gather_flat(
    out: torch.Tensor, x: torch.Tensor, group: dist.ProcessGroup | None
) -> dist.Work:
    """Start to gather every rank's `x` into `out`, in rank order. A collective of the group."""
    # Renamed in PyTorch 2.13, where the old name warns.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work = gather(out, x, group=group, async_op=True)
    return work


def group_environment() -> dict[str, str]:
    """Environment variables for a process whose ranks are all on one machine.

    Ranks meet on the loopback interface, so no port is open to other machines (Gloo on Windows has
    no such setting). If a NCCL message times out, its process ends and the other ranks notice.
    NVLink multicast is off: it helps large reductions, which are not used here.
    """
    found = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "NCCL_NVLS_ENABLE": "0",
    }
    if sys.platform != "win32":
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        found.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)
    return found


@dataclass(frozen=True)
class Outgoing:
    """A tensor to send to `peer` (a rank of the context), in any memory format."""

    peer: int
    tensor: torch.Tensor


@dataclass(frozen=True)
class Incoming:
    """A tensor that `peer` is expected to send."""

    peer: int
    shape: tuple[int, ...]


class Wire:
    """Messages between the ranks of one decode, with counters for the report.

    Gloo sends host memory only, so tensors on a device are copied to the host first. With Gloo a
    header precedes each message and is compared before the data is sent. With NCCL that happens
    once for each (place, shape, dtype), of a decode or of all decodes with the same
    `ShardContext.agreed`. Later messages follow from the same plan, so every rank skips the same
    headers; `begin` makes sure of it. If the group has Gloo too (`HOST_AND_DEVICE`), headers and
    numbers for the host travel by Gloo, because on the device they would stop it.

    With NCCL the messages of an exchange are one call (`_at_once`), which needs no answer of the
    ranks that have none. Order on a CUDA device: it starts after the work queued on the current
    stream, and that stream continues after it. Buffers may be freed when `exchange` returns,
    because the next use of their memory is queued later on the same stream. No pair of ranks has
    two messages in the same direction. `connect` comes first. It is a collective of all ranks, also
    idle ones, which NCCL needs before messages between some of them.
    """

    def __init__(self, context: ShardContext, device: torch.device):
        if not dist.is_initialized() and context.group is None:
            raise ShardingError(
                said(
                    "shard.no_group",
                    "rank {rank} of {ranks}: torch.distributed has no process group; "
                    "start the program with torchrun, or pass ShardContext(group=...)",
                    rank=context.rank,
                    ranks=context.world_size,
                ),
                rank=context.rank,
            )
        if dist.get_world_size(context.group) != context.world_size:
            raise ShardingError(
                said(
                    "shard.group",
                    "the context says {ranks} ranks, its process group has {size}",
                    ranks=context.world_size,
                    size=dist.get_world_size(context.group),
                ),
                rank=context.rank,
            )
        if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
            # NCCL's grouped messages and Triton use the current device, not that of the tensors.
            raise ShardingError(
                said(
                    "shard.current_device",
                    "rank {rank} decodes on {device}, the current device of its thread is"
                    " cuda:{current}: call torch.cuda.set_device({index})",
                    rank=context.rank,
                    device=device,
                    current=torch.cuda.current_device(),
                    index=device.index,
                ),
                rank=context.rank,
            )
        self.context = context
        self.device = device
        self.host_staged = dist.get_backend(context.group) == "gloo"
        self._transport = torch.device("cpu") if self.host_staged else device
        on_host = "cpu:" in dist.get_backend_config(context.group)
        self._control = torch.device("cpu") if on_host else self._transport
        self._headers = Headers()
        self._waits: Spans[None] = Spans()
        self._stream: torch.cuda.Stream | None = None
        self._count = 0
        self.received_bytes = 0
        self.received_messages = 0

    # -- point to point ---------------------------------------------------------------------

    def exchange(
        self, site: str, dtype: torch.dtype, out: Sequence[Outgoing], into: Sequence[Incoming]
    ) -> list[torch.Tensor]:
        """Send `out` and receive `into`; returns the received tensors, contiguous on this device.

        Every peer must make the matching call at the same `site` with the same shapes. Headers are
        compared; a difference raises ShardingError on both sides before any data is used.
        """
        if not out and not into:
            return []
        self._count += 1
        start = self._mark()
        self._agree_on_headers(site, dtype, out, into)
        send = self._one_by_one if self.host_staged else self._at_once
        buffers = send(site, dtype, out, into)
        self._add_wait(start)
        for buffer in buffers:
            if buffer.ndim in (4, 5) and detect(buffer) not in ("contiguous", "either"):
                raise ShardingError(
                    said(
                        "shard.format",
                        "rank {rank}: rows received for {site} are {format}, expected contiguous",
                        rank=self.context.rank,
                        site=site,
                        format=detect(buffer),
                    ),
                    rank=self.context.rank,
                )
            self.received_bytes += buffer.numel() * buffer.element_size()
            self.received_messages += 1
        return [b.to(self.device) for b in buffers]

    def begin_exchange(
        self, site: str, dtype: torch.dtype, out: Sequence[Outgoing], into: Sequence[Incoming]
    ) -> tuple[list[torch.Tensor], Callable[[], None] | None]:
        """`exchange` that goes on while the device computes what does not need it.

        Returns the tensors and what must be called before anybody reads them, and before the
        tensors of `out` are let go of; None where they are there. With NCCL messages travel on a
        stream of their own, behind what is launched already; there, too, is the memory of what was
        received, which the next exchange may have once all that was launched before it is done.
        """
        if self.device.type != "cuda" or self.host_staged:
            return self.exchange(site, dtype, out, into), None
        if self._stream is None:
            # Its few programs go before those of a norm, which fill the device.
            self._stream = torch.cuda.Stream(self.device, priority=-1)
        stream, current = self._stream, torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            received = self.exchange(site, dtype, out, into)
        return received, lambda: current.wait_stream(stream)

    def _one_by_one(
        self, site: str, dtype: torch.dtype, out: Sequence[Outgoing], into: Sequence[Incoming]
    ) -> list[torch.Tensor]:
        """The messages of an exchange as one operation each, which Gloo needs."""
        packed = [contiguous_for_collective(o.tensor).to(self._transport) for o in out]
        buffers = [torch.empty(i.shape, dtype=dtype, device=self._transport) for i in into]
        ops = [self._op(dist.isend, _as_bytes(p), o.peer) for p, o in zip(packed, out, strict=True)]
        ops += [
            self._op(dist.irecv, _as_bytes(b), i.peer) for b, i in zip(buffers, into, strict=True)
        ]
        self._finish(site, ops, _peers(out, into), self._transport)
        return buffers

    def _at_once(
        self, site: str, dtype: torch.dtype, out: Sequence[Outgoing], into: Sequence[Incoming]
    ) -> list[torch.Tensor]:
        """The messages of an exchange in one call, which takes the host a quarter of the time.

        They share a buffer in each direction, in the order of their ranks; a rank that has no
        message gets none and need not call.
        """
        world, group = self.context.world_size, self.context.group
        outgoing, sent = _in_one([o.peer for o in out], [o.tensor.shape for o in out], dtype, world)
        incoming, got = _in_one([i.peer for i in into], [i.shape for i in into], dtype, world)
        sending = torch.empty(sum(sent), dtype=torch.uint8, device=self._transport)
        receiving = torch.empty(sum(got), dtype=torch.uint8, device=self._transport)
        for place, o in zip(outgoing, out, strict=True):
            _message(sending, place, dtype, o.tensor.shape).copy_(o.tensor)
        try:
            dist.all_to_all_single(receiving, sending, got, sent, group=group)
        except RuntimeError as error:
            raise self._no_answer(site, _peers(out, into), error) from error
        return [
            _message(receiving, place, dtype, i.shape)
            for place, i in zip(incoming, into, strict=True)
        ]

    def _agree_on_headers(
        self, site: str, dtype: torch.dtype, out: Sequence[Outgoing], into: Sequence[Incoming]
    ) -> None:
        sent = tuple((o.peer, o.tensor.shape) for o in out)
        key = (site, dtype, sent, tuple((i.peer, i.shape) for i in into))
        if not self.host_staged and key in self._headers.keys:
            return
        mine = [self._header(site, o.tensor.dtype, tuple(o.tensor.shape)) for o in out]
        wanted = [self._header(site, dtype, i.shape) for i in into]
        theirs = [h.new_empty(h.shape, device=self._control) for h in wanted]
        ops = [
            self._op(dist.isend, _as_bytes(h.to(self._control)), o.peer)
            for h, o in zip(mine, out, strict=True)
        ]
        ops += [
            self._op(dist.irecv, _as_bytes(h), i.peer) for h, i in zip(theirs, into, strict=True)
        ]
        self._finish(site, ops, _peers(out, into), self._control)
        for header, expected, i in zip(theirs, wanted, into, strict=True):
            if header.tolist() != expected.tolist():
                raise ShardingError(
                    said(
                        "shard.refused",
                        "rank {rank} refused what rank {peer} sends at {site}: {header}, "
                        "expected {expected}",
                        rank=self.context.rank,
                        peer=i.peer,
                        site=site,
                        header=_describe(header),
                        expected=_describe(expected),
                    ),
                    rank=i.peer,
                )
        self._headers.add(key, f"{site} {dtype}")

    def _header(self, site: str, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        sizes = [*shape, *([0] * (_HEADER_WORDS - 6 - len(shape)))]
        count = self._count if self.host_staged else 0
        words = [_MAGIC, count, crc32(site.encode()), len(shape), *sizes]
        return torch.tensor([*words, DTYPES.index(dtype), _DENSE_NCDHW])

    def _op(self, kind: Callable[..., Any], tensor: torch.Tensor, peer: int) -> dist.P2POp:
        group = self.context.group
        if group is not None:
            peer = dist.get_global_rank(group, peer)
        return dist.P2POp(kind, tensor, peer, group)

    def _finish(
        self, site: str, ops: list[dist.P2POp], peers: list[int], transport: torch.device
    ) -> None:
        try:
            works = dist.batch_isend_irecv(ops)
            for work in works:
                self._wait(work, transport)
        except RuntimeError as error:
            raise self._no_answer(site, peers, error) from error

    def _no_answer(self, site: str, peers: Sequence[int], error: RuntimeError) -> ShardingError:
        others = ", ".join(map(str, sorted(set(peers))))
        return ShardingError(
            said(
                "shard.no_answer",
                "rank {rank} has no answer from rank {peers} at {site} (waits at most "
                "{seconds} s): {error}",
                rank=self.context.rank,
                peers=others,
                site=site,
                seconds=f"{self.context.timeout_s:g}",
                error=first_line(error),
            ),
            rank=peers[0] if len(set(peers)) == 1 else None,
        )

    def _wait(self, work: dist.Work, transport: torch.device) -> None:
        if transport.type == "cpu":
            work.wait(timedelta(seconds=self.context.timeout_s))
        else:
            work.wait()  # orders the device's stream; NCCL's watchdog applies the time-out

    # -- collectives --------------------------------------------------------------------------

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Gather `x` of every rank, in rank order, dense NCDHW on this device. A collective.

        `x` may have any memory format. Its shape and dtype must be equal on every rank; call
        `agree` first if that is not certain.
        """
        start = self._mark()
        parts = self._gather(x, self._transport)
        self._add_wait(start)
        return [p.to(self.device) for p in parts]

    def _gather(self, x: torch.Tensor, transport: torch.device) -> list[torch.Tensor]:
        """`all_gather`, with results that stay on `transport`."""
        packed = contiguous_for_collective(x).to(transport)
        flat = _as_bytes(packed)
        gathered = torch.empty(
            self.context.world_size * flat.numel(), dtype=torch.uint8, device=transport
        )
        try:
            work = all_gather_flat(gathered, flat, self.context.group)
            self._wait(work, transport)
        except RuntimeError as error:
            raise ShardingError(
                said(
                    "shard.no_gather",
                    "rank {rank} got no gather over {ranks} ranks (waits at most "
                    "{seconds} s): {error}",
                    rank=self.context.rank,
                    ranks=self.context.world_size,
                    seconds=f"{self.context.timeout_s:g}",
                    error=first_line(error),
                )
            ) from error
        parts = gathered.view(self.context.world_size, -1).unbind(0)
        return [p.view(x.dtype).view(x.shape) for p in parts]

    def all_gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Gather equally many integers from every rank, in rank order. A collective; waits."""
        mine = torch.tensor(list(numbers), dtype=torch.int64, device=self._control)
        return [part.tolist() for part in self._gather(mine, self._control)]

    def all_gather_texts(self, text: str) -> list[str]:
        """Gather a text of any length from every rank, in rank order. A collective; waits."""
        content = text.encode()
        lengths = [row[0] for row in self.all_gather_numbers([len(content)])]
        if not any(lengths):
            return [""] * len(lengths)
        mine = torch.zeros(max(lengths), dtype=torch.uint8)
        mine[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
        parts = self._gather(mine.to(self._control), self._control)
        return [
            bytes(part[:length].tolist()).decode()
            for part, length in zip(parts, lengths, strict=True)
        ]

    def connect(self) -> None:
        """Make the transport connect all ranks. A collective; waits."""
        self._gather(torch.zeros(1, device=self._transport), self._transport)

    def greet(self) -> None:
        """Have each rank send each other one a first message. A collective; waits for the others.

        NCCL connects two ranks when they first send each other something, and loads its kernels.
        """
        others = [rank for rank in range(self.context.world_size) if rank != self.context.rank]
        self.connect()
        byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
        out = [Outgoing(rank, byte) for rank in others]
        self.exchange("greeting", byte.dtype, out, [Incoming(rank, (1,)) for rank in others])

    def begin(self, facts: Mapping[str, int], own: Sequence[int] = ()) -> list[list[int]]:
        """`agree`, and take the headers of earlier runs with the same `facts` as compared.

        facts: all that decides which messages there are, except for frames. No header is taken
        where the ranks remember different exchanges, or one has no memory.
        """
        if self.context.agreed is not None:
            self._headers = self.context.agreed.headers(tuple(facts.values()))
        rows = self.agree(facts, [self._headers.digest, *own])
        if len({row[0] for row in rows}) > 1:
            self._headers.clear()
        return [row[1:] for row in rows]

    def agree(self, facts: Mapping[str, int], own: Sequence[int] = ()) -> list[list[int]]:
        """The numbers `own` of each rank, which may differ. A collective; waits.

        Raises ShardingError on every rank unless all have the same `facts`.
        """
        rows = self.all_gather_numbers([*facts.values(), *own])
        for name, values in zip(facts, zip(*rows, strict=True), strict=False):
            if len(set(values)) > 1:
                each = together(
                    said("shard.has", "rank {rank} has {value}", rank=rank, value=value)
                    for rank, value in enumerate(values)
                )
                raise ShardingError(
                    said(
                        "shard.disagree",
                        "ranks disagree about {name}: {values}; give every rank the same "
                        "latent, weights and options",
                        name=name,
                        values=each,
                    )
                )
        return [row[len(facts) :] for row in rows]

    # -- time ---------------------------------------------------------------------------------

    def _mark(self) -> Mark:
        return Mark.now(self._transport if self.host_staged else self.device)

    def _add_wait(self, start: Mark) -> None:
        self._waits.add(None, start, self._mark())

    def read_waits(self, wait: bool) -> None:
        """Read the times of exchanges that are over, so that `wait_ms` has less to read; with
        `wait` all but the last one's, as the device comes to their ends."""
        if wait:
            self._waits.read_all(but=1)
        else:
            self._waits.read_past()

    def wait_ms(self) -> float:
        """Milliseconds in exchanges so far, including waits for slower ranks. Synchronises."""
        self._waits.read_all()
        return self._waits.ms.get(None, 0.0)


def _peers(out: Sequence[Outgoing], into: Sequence[Incoming]) -> list[int]:
    return [o.peer for o in out] + [i.peer for i in into]


def _in_one(
    peers: Sequence[int], shapes: Sequence[Sequence[int]], dtype: torch.dtype, world_size: int
) -> tuple[list[int], list[int]]:
    """Where each message begins in a buffer for all of them, and the bytes for every rank."""
    sizes = [0] * world_size
    for peer, shape in zip(peers, shapes, strict=True):
        size = prod(shape) * dtype.itemsize
        sizes[peer] = -(-size // _MESSAGE_ALIGNMENT) * _MESSAGE_ALIGNMENT
    starts = list(accumulate(sizes, initial=0))
    return [starts[peer] for peer in peers], sizes


def _message(
    buffer: torch.Tensor, start: int, dtype: torch.dtype, shape: Sequence[int]
) -> torch.Tensor:
    """The tensor of `shape` that begins `start` bytes into `buffer`."""
    size = prod(shape) * dtype.itemsize
    return buffer[start : start + size].view(dtype).view(tuple(shape))


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    """View of a dense tensor as flat bytes, so that a transport need not know its dtype."""
    return x.view(-1).view(torch.uint8)


def _describe(header: torch.Tensor) -> str:
    magic, count, site, ndim, *rest = header.tolist()
    *sizes, dtype, fmt = rest
    if magic != _MAGIC or not 0 <= ndim <= len(sizes) or not 0 <= dtype < len(DTYPES):
        return "bytes that are no header"
    name = str(DTYPES[dtype]).removeprefix("torch.")
    order = "dense NCDHW" if fmt == _DENSE_NCDHW else f"format {fmt}"
    return f"{sizes[:ndim]} {name} {order} (message {count}, place {site:08x})"
