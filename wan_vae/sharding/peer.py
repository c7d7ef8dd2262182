"""Messages between two ranks of one host by writes into the other's device memory.

Each rank has an inbox for each neighbour, which the neighbour has mapped into its own address
space: a number (the flag), and two slots for rows. To send, a rank's stream writes rows into a slot
of the neighbour's inbox, and then the number of the exchange into its flag. To receive, the stream
waits until its own flag has that number. The host waits for nothing.

Why two slots are enough: exchange n of a link writes to slot n % 2, and so over the rows of n - 2.
It is queued behind the wait for the neighbour's n - 1, which the neighbour's stream sends after all
that it has queued before its exchange n - 1, hence after its last use of n - 2. For this both sides
of a link take part in each exchange of theirs, also one in which a side has nothing to send, and
received rows are used before the next exchange.

A stream that waits for a process that is gone waits for ever. So this is for ranks whose parent
ends all of them (`workers`), and `Links.overdue` tells it of one that has waited for long.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Protocol

import torch

from ..clock import Mark
from ..errors import ShardingError
from ..layout import in_wide_words
from ..said import said

SLOTS = 2
# Bytes of a flag, in a line of its own; and where slots begin.
_FLAG_BYTES = 512
_HANDLE_BYTES = 64
_WORD = 1 << 32
# Of a slot at first, which most videos stay below. It grows when a larger message comes, to at most
# LARGEST_BYTES: larger ones are bound by the bandwidth of the link, which NCCL uses as well.
FIRST_BYTES = 8 << 20
LARGEST_BYTES = 32 << 20
# What the proof sends: whole words and odd ends, and a whole slot.
_PROOF_BYTES = (1, 15, 16, 4097, 65536, 1 << 20, FIRST_BYTES)
_PROOF_TURNS = 3
# Of both ends of a slot, where a pattern is written before a first use.
_END_BYTES = 1 << 16

# Gathers a text of every rank, in rank order. A collective; waits.
Tell = Callable[[str], list[str]]
# Sends bytes to each rank of a mapping, and returns what each of them sent: as many bytes. Waits.
Swap = Callable[[Mapping[int, bytes]], dict[int, bytes]]


class Driver(Protocol):
    """Memory of a device that other processes can map, and the order of a stream's work on it.

    `copy`, `signal` and `wait` are queued on the current stream. All raise ShardingError.
    """

    @property
    def place(self) -> int:
        """The number of the device on this host."""
        ...

    def can_reach(self, place: int) -> bool:
        """Whether this device can write to the memory of that one."""
        ...

    def allocate(self, size: int) -> int:
        """The address of `size` bytes of this device, all zero."""
        ...

    def free(self, address: int) -> None:
        """Give back what `allocate` returned; no other process may have it mapped."""
        ...

    def export(self, address: int) -> bytes:
        """A handle of 64 bytes with which another process can `open` an allocation."""
        ...

    def open(self, handle: bytes) -> int:
        """The address here of another process's allocation."""
        ...

    def close(self, address: int) -> None:
        """Undo `open`."""
        ...

    def tensor(self, address: int, size: int) -> torch.Tensor:
        """Bytes at `address`, also those of another device, as a uint8 tensor of this device."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Write `source` into `target`, of the same shape and dtype."""
        ...

    def signal(self, address: int, value: int) -> None:
        """Write a 32-bit number, seen by others after all that was written before."""
        ...

    def wait(self, address: int, value: int) -> None:
        """Have the stream wait until the number there has reached `value`, counted modulo 2^32."""
        ...

    def synchronise(self) -> None:
        """Wait on the host until the stream has done all of it."""
        ...


def message(
    buffer: torch.Tensor, start: int, dtype: torch.dtype, shape: Sequence[int]
) -> torch.Tensor:
    """The tensor of `shape` that begins `start` bytes into `buffer`."""
    size = prod(shape) * dtype.itemsize
    return buffer[start : start + size].view(dtype).view(tuple(shape))


@dataclass(frozen=True)
class Side:
    """One end of a link: the address of the flag, and the slots."""

    flag: int
    slots: tuple[torch.Tensor, ...]


class Link:
    """This rank's messages with one other rank. `ours`: where it writes, `theirs`: where we do."""

    def __init__(self, driver: Driver, ours: Side, theirs: Side):
        self._driver, self._ours, self._theirs = driver, ours, theirs
        self._count = 0
        self.may_grow = True

    @property
    def capacity(self) -> int:
        """Bytes of the largest message, the same on both sides."""
        return self._ours.slots[0].numel()

    @property
    def slots(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Where the other side writes, and where this one does."""
        return self._ours.slots, self._theirs.slots

    def grow(self, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
        """Use larger slots from the next exchange on. The old ones stay: rows may lie there, or
        be on their way."""
        self._ours = Side(self._ours.flag, tuple(ours))
        self._theirs = Side(self._theirs.flag, tuple(theirs))

    def last_flag(self) -> int:
        """The number of the last exchange that the other side has sent; waits for the stream."""
        return int(self._driver.tensor(self._ours.flag, 4).view(torch.int32).item()) % _WORD

    def send(self, x: torch.Tensor | None) -> None:
        """Begin an exchange: write `x` of any strides, if there is one, and say so."""
        self._count += 1
        if x is not None:
            slot = self._theirs.slots[self._count % len(self._theirs.slots)]
            self._driver.copy(*in_wide_words(message(slot, 0, x.dtype, x.shape), x))
        self._driver.signal(self._theirs.flag, self._count % _WORD)

    def receive(self, dtype: torch.dtype, shape: Sequence[int] | None) -> torch.Tensor | None:
        """End the exchange: what the other side has sent, valid until the next `send`."""
        self._driver.wait(self._ours.flag, self._count % _WORD)
        if shape is None:
            return None
        return message(self._ours.slots[self._count % len(self._ours.slots)], 0, dtype, shape)


@dataclass(frozen=True)
class Waiting:
    """A wait of the stream for the rows of `peers`, between two marks."""

    site: str
    peers: tuple[int, ...]
    start: Mark
    stop: Mark


@dataclass
class _Inbox:
    """Memory that one neighbour writes to: a flag at its beginning, unless it is for growth."""

    address: int
    size: int
    flag_bytes: int = _FLAG_BYTES

    @staticmethod
    def allocate(driver: Driver, size: int, flag_bytes: int = _FLAG_BYTES) -> _Inbox:
        return _Inbox(driver.allocate(flag_bytes + SLOTS * size), size, flag_bytes)

    def slots(self, driver: Driver, address: int | None = None) -> tuple[torch.Tensor, ...]:
        """Its slots, or those of the neighbour's memory of the same form at `address`."""
        at = (self.address if address is None else address) + self.flag_bytes
        whole = driver.tensor(at, SLOTS * self.size)
        return tuple(whole.view(SLOTS, self.size).unbind(0))


class Links:
    """The links of this rank with its neighbours, for as long as its process group lives.

    open_driver: makes the driver of this rank's device, in the thread that exchanges. `reason`: why
    there are no links; empty before `connect`, and where there are.
    """

    def __init__(self, open_driver: Callable[[], Driver]):
        self._open_driver = open_driver
        self.reason = ""
        self.is_connected = False
        self._driver: Driver | None = None
        self._links: dict[int, Link] = {}
        # What is mapped here of other processes.
        self._mapped: list[int] = []
        self._waits: deque[Waiting] = deque()
        self._late_since_s: float | None = None

    # -- connecting -------------------------------------------------------------------------

    def connect(self, rank: int, ranks: int, tell: Tell) -> None:
        """Link each rank with the next one, and prove it; or no rank, and `reason` says why.

        A collective of all ranks, once for a group; waits.
        """
        # Inside a run is inference mode, and what is made there could be written nowhere else.
        with torch.inference_mode(False):
            self._connect(rank, ranks, tell)
        self.is_connected = True

    def _connect(self, rank: int, ranks: int, tell: Tell) -> None:
        peers = [p for p in (rank - 1, rank + 1) if 0 <= p < ranks]
        inboxes: dict[int, _Inbox] = {}
        offer: dict[str, object] = {"problem": ""}
        try:
            self._driver = self._open_driver()
            for peer in peers:
                inboxes[peer] = _Inbox.allocate(self._driver, FIRST_BYTES)
            offer["place"] = self._driver.place
            offer["handles"] = {
                str(peer): self._driver.export(inbox.address).hex()
                for peer, inbox in inboxes.items()
            }
        except ShardingError as error:
            offer["problem"] = str(error)
        offers = [json.loads(text) for text in tell(json.dumps(offer))]
        self.reason = next((o["problem"] for o in offers if o["problem"]), "")
        if not self.reason:
            self.reason = _first(tell(_problem_of(partial(self._open, rank, inboxes, offers))))
        if not self.reason:
            self._prove(rank, tell)
        if self.reason:
            self.close()
            tell("")  # nobody has another's memory mapped any more
            self._give_up(inboxes)

    def _open(
        self, rank: int, inboxes: Mapping[int, _Inbox], offers: Sequence[Mapping[str, object]]
    ) -> None:
        driver = self._ready
        for peer, inbox in inboxes.items():
            place, handles = offers[peer]["place"], offers[peer]["handles"]
            assert isinstance(place, int) and isinstance(handles, dict)
            if not driver.can_reach(place):
                raise ShardingError(
                    said(
                        "peer.unreachable",
                        "cuda:{own} does not reach cuda:{other} over NVLink",
                        own=driver.place,
                        other=place,
                    )
                )
            address = driver.open(bytes.fromhex(handles[str(rank)]))
            self._mapped.append(address)
            self._links[peer] = Link(
                driver,
                Side(inbox.address, inbox.slots(driver)),
                Side(address, inbox.slots(driver, address)),
            )

    def _give_up(self, inboxes: Mapping[int, _Inbox]) -> None:
        # What cannot be given back is so at the end of the process.
        with suppress(ShardingError):
            for inbox in inboxes.values():
                self._ready.free(inbox.address)

    def close(self) -> None:
        """Let go of the neighbours' memory. Our own ends with the process: a neighbour may have it
        mapped for longer."""
        self._links.clear()
        mapped, self._mapped = self._mapped, []
        with suppress(ShardingError):
            for address in mapped:
                self._ready.close(address)

    @property
    def _ready(self) -> Driver:
        if self._driver is None:
            raise ShardingError(said("peer.no_driver", "there are no direct writes here"))
        return self._driver

    # -- proof ------------------------------------------------------------------------------

    def _prove(self, rank: int, tell: Tell) -> None:
        """Send known bytes: first without a wait, which would not end where nothing arrives."""
        for step in (self._send_first, self._receive_first, self._take_turns):
            self.reason = _first(tell(_problem_of(partial(step, rank))))
            if self.reason:
                return

    def _send_first(self, rank: int) -> None:
        self._fill(rank, {peer: theirs for peer, (_, theirs) in self._slots().items()})
        for link in self._links.values():
            link.send(None)
        self._ready.synchronise()

    def _receive_first(self, rank: int) -> None:
        self._check_filled(rank, {peer: ours for peer, (ours, _) in self._slots().items()})
        for peer, link in self._links.items():
            if link.last_flag() != 1:
                raise _garbled(rank, peer)
            link.receive(torch.uint8, None)
        self._ready.synchronise()

    def _slots(self) -> dict[int, tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]:
        return {peer: link.slots for peer, link in self._links.items()}

    def _fill(self, rank: int, slots: Mapping[int, Sequence[torch.Tensor]]) -> None:
        """Write a pattern to both ends of the other sides' slots, and wait until it is written."""
        for theirs in slots.values():
            for number, end in enumerate(_ends(theirs)):
                self._ready.copy(end, _pattern(end, end.numel(), rank, number))
        self._ready.synchronise()

    def _check_filled(self, rank: int, slots: Mapping[int, Sequence[torch.Tensor]]) -> None:
        """Raise ShardingError unless the patterns of the other sides are in our own slots."""
        for peer, ours in slots.items():
            for number, end in enumerate(_ends(ours)):
                if not torch.equal(end, _pattern(end, end.numel(), peer, number)):
                    raise _garbled(rank, peer)

    def _take_turns(self, rank: int) -> None:
        """Exchanges of many sizes without a pause, in both directions and in one, as in a run."""
        driver, sample = self._ready, next(iter(self._slots().values()))[0][0]
        start = Mark.now(sample.device)
        got: list[tuple[int, int, torch.Tensor]] = []
        for turn, size in enumerate(_PROOF_BYTES * _PROOF_TURNS):
            # Both directions, then only to the next rank, then only to the one before.
            way = turn % 3
            for peer, link in self._links.items():
                sends = way == 0 or (way == 1) == (peer > rank)
                link.send(_pattern(sample, size, rank, turn) if sends else None)
            for peer, link in self._links.items():
                receives = way == 0 or (way == 1) == (peer < rank)
                rows = link.receive(torch.uint8, (size,) if receives else None)
                if rows is not None:
                    kept = torch.empty_like(rows)
                    driver.copy(kept, rows)
                    got.append((peer, turn, kept))
        self.note("the proof", tuple(self._links), start, Mark.now(sample.device))
        driver.synchronise()
        for peer, turn, kept in got:
            if not torch.equal(kept, _pattern(kept, kept.numel(), peer, turn)):
                raise _garbled(rank, peer)

    # -- exchanges --------------------------------------------------------------------------

    def make_room(self, rank: int, sizes: Mapping[int, int], swap: Swap) -> None:
        """Have messages of so many bytes with each rank carried from now on, where they can be.

        Both sides of a link call it with the same size; waits for them where slots must grow.
        """
        growing = {
            peer: _Growth(1 << (size - 1).bit_length())
            for peer, size in sizes.items()
            if (link := self._links.get(peer)) is not None
            and link.may_grow
            and link.capacity < size <= LARGEST_BYTES
        }
        with torch.inference_mode(False):
            self._grow(rank, growing, swap)

    def _grow(self, rank: int, growing: dict[int, _Growth], swap: Swap) -> None:
        # Where one side has no room, or does not reach the other's, both go on with NCCL.
        self._agree(growing, swap, self._allocate)
        handles = swap({peer: growth.handle for peer, growth in growing.items()}) if growing else {}
        self._agree(growing, swap, lambda p, growth: self._map(rank, p, growth, handles[p]))
        self._agree(growing, swap, lambda p, growth: self._check_filled(rank, {p: growth.ours}))
        for peer, growth in growing.items():
            self._links[peer].grow(growth.ours, growth.theirs)

    def _agree(
        self, growing: dict[int, _Growth], swap: Swap, step: Callable[[int, _Growth], None]
    ) -> None:
        """Do `step` for each link, and drop those where it failed on one of the two sides."""
        if not growing:
            return
        mine = {p: not _problem_of(partial(step, p, growth)) for p, growth in growing.items()}
        theirs = swap({peer: bytes([well]) for peer, well in mine.items()})
        for peer, well in mine.items():
            if not (well and theirs[peer] == b"\1"):
                # What it has allocated may be mapped on the other side: it ends with the process.
                self._links[peer].may_grow = False
                del growing[peer]

    def _allocate(self, _peer: int, growth: _Growth) -> None:
        inbox = _Inbox.allocate(self._ready, growth.size, flag_bytes=0)
        growth.ours = inbox.slots(self._ready)
        growth.handle = self._ready.export(inbox.address)

    def _map(self, rank: int, peer: int, growth: _Growth, handle: bytes) -> None:
        address = self._ready.open(handle)
        self._mapped.append(address)
        growth.theirs = _Inbox(address, growth.size, flag_bytes=0).slots(self._ready)
        self._fill(rank, {peer: growth.theirs})

    def carries(self, peer: int, size: int) -> bool:
        """Whether the messages of an exchange with `peer`, of at most `size` bytes, go this way.

        Both sides say the same.
        """
        link = self._links.get(peer)
        return link is not None and size <= link.capacity

    def send(self, peer: int, x: torch.Tensor | None) -> None:
        """See `Link.send`."""
        self._links[peer].send(x)

    def receive(
        self, peer: int, dtype: torch.dtype, shape: Sequence[int] | None
    ) -> torch.Tensor | None:
        """See `Link.receive`."""
        return self._links[peer].receive(dtype, shape)

    # -- late rows --------------------------------------------------------------------------

    def note(self, site: str, peers: tuple[int, ...], start: Mark, stop: Mark) -> None:
        """Note that the stream waits for rows of `peers` between two marks."""
        self._waits.append(Waiting(site, peers, start, stop))

    @property
    def has_waits(self) -> bool:
        """Whether a wait was noted that `overdue` has not seen end."""
        return bool(self._waits)

    def overdue(self, seconds: float, now_s: float) -> Waiting | None:
        """The wait in which the stream has been for longer than `seconds`, if there is one.

        For another thread than the one that exchanges, which may wait for the device; the device
        must be current there. The time counts from when a call first saw the stream wait.
        """
        # After an error of the device, which the other thread will get too.
        with suppress(RuntimeError):
            while self._waits and self._waits[0].stop.is_past():
                self._waits.popleft()
                self._late_since_s = None
            if not self._waits or not self._waits[0].start.is_past():
                return None
            if self._late_since_s is None:
                self._late_since_s = now_s
            if now_s - self._late_since_s > seconds:
                return self._waits[0]
        return None


@dataclass
class _Growth:
    """Larger slots of a link while both sides make them."""

    size: int
    handle: bytes = b""
    ours: tuple[torch.Tensor, ...] = ()
    theirs: tuple[torch.Tensor, ...] = ()


def _first(texts: Sequence[str]) -> str:
    return next((text for text in texts if text), "")


def _problem_of(what: Callable[[], None]) -> str:
    """Do it; what went wrong as a text, or an empty one."""
    try:
        what()
    except ShardingError as error:
        return str(error)
    return ""


def _ends(slots: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The first and the last bytes of each slot."""
    return [end for slot in slots for end in (slot[:_END_BYTES], slot[-_END_BYTES:])]


def _pattern(like: torch.Tensor, size: int, sender: int, number: int) -> torch.Tensor:
    """Known bytes on the device of `like`, others for each sender and number."""
    steps = torch.arange(size, dtype=torch.int32, device=like.device)
    # 251 is prime, so that no shift by a power of two gives the same bytes.
    return steps.mul_(7).add_(31 * sender + 17 * number + 1).remainder_(251).to(torch.uint8)


def _garbled(rank: int, peer: int) -> ShardingError:
    return ShardingError(
        said(
            "peer.garbled",
            "rank {rank} does not find what rank {peer} has written to its memory",
            rank=rank,
            peer=peer,
        ),
        rank=peer,
    )
