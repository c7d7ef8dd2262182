"""Rows by writes into a neighbour's memory: two slots are enough, and nobody hangs without them.

First with streams whose work happens in any order that their waits allow, then between processes.
"""

from __future__ import annotations

import json
import queue
from random import Random
from types import SimpleNamespace

import pytest
import torch

from tests.dist import jobs
from tests.dist.peers import Deadlock, Machine, linked, slots_of
from wan_vae.sharding.peer import SLOTS, Link, Links
from wan_vae.workers import WorkerPool, worker
from wan_vae.workers.worker import WorkerSettings

SEEDS = range(60)


class OnlyWithRows(Link):
    """Broken: a side that has nothing to send says nothing, and the other does not wait for it."""

    def send(self, x):
        if x is not None:
            super().send(x)
        else:
            self._count += 1

    def receive(self, dtype, shape):
        return None if shape is None else super().receive(dtype, shape)


class FlagFirst(Link):
    """Broken: the number is written before the rows."""

    def send(self, x):
        super().send(None)
        if x is not None:
            slot = self._theirs.slots[self._count % SLOTS]
            self._driver.copy(slot[: x.numel()], x)


def rows_that_arrive(seed, ranks, slots=SLOTS, kind=Link, late=False, count=0):
    """Random exchanges of `ranks` in a row, all queued before any is done: those that came out
    wrong. late: received rows are used only after the next exchange has been queued."""
    random, machine = Random(seed), Machine()
    devices = [machine.device() for _ in range(ranks)]
    ends = [
        linked(machine, one, other, 32, slots, kind)
        for one, other in zip(devices, devices[1:], strict=False)
    ]
    for pair in ends:
        for end in pair:
            end._count = count
            machine.tensor(end._ours.flag, 4).view(torch.int32).fill_(
                count - (1 << 32) if count >> 31 else count
            )
    got: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number in range(random.randrange(1, 25)):
        if random.random() < 0.1:  # both sides grow alike
            pair = random.choice(ends)
            size = 2 * pair[0].capacity
            first, second = slots_of(machine, slots, size), slots_of(machine, slots, size)
            pair[0].grow(first, second)
            pair[1].grow(second, first)
        sends, uses = [], []
        for place, (up, down) in enumerate(ends):
            if random.random() < 0.2:  # this pair has no part in it
                continue
            kind_of = random.choice(["both", "up", "down", "neither"])
            size = random.randrange(1, up.capacity + 1)
            ways = ((up, down, devices[place + 1], "up"), (down, up, devices[place], "down"))
            for sender, receiver, device, name in ways:
                rows = torch.full((size,), (7 * number + place + len(name)) % 251).to(torch.uint8)
                has_rows = kind_of in ("both", name)
                sends.append((sender, rows if has_rows else None))
                uses.append((receiver, device, rows if has_rows else None))
        for sender, rows in sends:
            sender.send(rows)
        for receiver, device, rows in uses:
            found = receiver.receive(torch.uint8, None if rows is None else rows.shape)
            if found is not None:
                kept = torch.empty_like(rows)
                got.append((kept, rows))
                use = lambda kept=kept, found=found: kept.copy_(found)
                if not late:
                    device.do(use)
                else:
                    device.later = [*getattr(device, "later", []), (number, use)]
        if late:
            for device in devices:
                waiting = getattr(device, "later", [])
                for at, use in waiting:
                    if at < number:
                        device.do(use)
                device.later = [item for item in waiting if item[0] == number]
    for device in devices:
        for _, use in getattr(device, "later", []):
            device.do(use)
    machine.run(random)
    return [index for index, (kept, rows) in enumerate(got) if not torch.equal(kept, rows)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_rows_arrive_in_any_order_of_the_streams(ranks):
    for seed in SEEDS:
        assert rows_that_arrive(seed, ranks) == [], f"seed {seed}"


def test_the_number_of_an_exchange_may_wrap():
    for seed in SEEDS:
        assert rows_that_arrive(seed, 3, count=(1 << 32) - 5) == [], f"seed {seed}"
        assert rows_that_arrive(seed, 3, count=(1 << 31) - 5) == [], f"seed {seed}"


@pytest.mark.parametrize(
    "fault",
    [{"slots": 1}, {"kind": OnlyWithRows}, {"kind": FlagFirst}, {"late": True}],
    ids=["one slot", "no number without rows", "number first", "used too late"],
)
def test_what_the_rules_are_for(fault):
    """Each of them broken: some order of the streams gives wrong rows."""
    assert any(rows_that_arrive(seed, 3, **fault) for seed in SEEDS)


def test_a_side_that_leaves_an_exchange_out_is_a_deadlock():
    machine = Machine()
    one, other = linked(machine, machine.device(), machine.device(), 8, SLOTS)
    one.send(None)
    one.receive(torch.uint8, None)
    with pytest.raises(Deadlock):
        machine.run(Random(0))
    assert other._count == 0


# -- processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_picture_is_that_of_the_group(ranks, tmp_path, count):
    shape = (1, 16, 3, 6, 5)
    arguments = {"shape": shape, "axis": "height", "chunk_frames": 1}
    whole = torch.from_numpy(ranks.run("decode", count, name="wan2.1", **arguments)[0][0])
    found = ranks.run(
        "decode_by_links", count, shape=shape, folder=str(tmp_path), axis="height", times=2
    )
    for pictures, links in found:
        assert links["reason"] == "" and links["exchanges"] > 0
        # What is late would be named.
        assert {"the proof", "decoder.conv1", "attention", "upsample"} <= links["waits"]
        for pixels in pictures:
            assert torch.equal(torch.from_numpy(pixels), whole)


@pytest.mark.parametrize("axis", ["height", "width"])
def test_an_encode_sends_rows_one_way(ranks, tmp_path, axis):
    shape = (1, 3, 5, 48, 32)
    expected = ranks.run("encode", 2, name="wan2.1", shape=shape, axis=axis)[0][0]
    found = ranks.run("encode_by_links", 2, shape=shape, folder=str(tmp_path), axis=axis)
    for latent, links in found:
        assert links["reason"] == "" and links["exchanges"] > 0
        assert (latent == expected).all()


def test_a_cancel_leaves_the_links_in_step(ranks, tmp_path):
    shape = (1, 16, 5, 4, 4)
    arguments = {"shape": shape, "axis": "height", "chunk_frames": 1}
    whole = torch.from_numpy(ranks.run("decode", 3, name="wan2.1", **arguments)[0][0])
    for status, pixels in ranks.run("cancel_by_links", 3, shape=shape, folder=str(tmp_path)):
        assert status == "cancelled"
        assert torch.equal(torch.from_numpy(pixels), whole)


def test_headers_are_compared_once_with_links_too(ranks, tmp_path):
    """Sent as with NCCL, where the rows of an exchange are not awaited."""
    found = ranks.run("exchange_at_once", 3, folder=str(tmp_path))
    assert found == [(True, [4, 0, 0]), (True, [8, 0, 0]), (True, [4, 0, 0])]


def test_a_pool_asks_for_links_only_where_nobody_has_named_a_transport():
    assert not WorkerPool("cpu,cpu").direct, "Gloo has none"
    assert not WorkerPool("cpu,cpu", transport="nccl").direct


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("driver", "planted: driver"),
        ("allocate", "planted: allocate"),
        ("reach", "does not reach"),
        ("open", "planted: open"),
        ("garbled", "does not find what rank 1 has written"),
        ("swapped", "does not find what rank 1 has written"),
    ],
)
def test_one_rank_that_cannot_is_enough(ranks, tmp_path, fault, reason):
    """All ranks say so, take the group, and leave no memory."""
    found = ranks.run("exchange_by_links", 3, folder=str(tmp_path), faults=["", fault, ""])
    for right, links in found:
        assert right
        assert reason in links["reason"] and links["exchanges"] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("allocations", "large"),
    [((1000, 1000, 1000), True), ((1000, 2, 1000), False), ((1, 1000, 1000), None)],
)
def test_slots_grow_where_both_sides_have_room(ranks, tmp_path, allocations, large):
    """large: of which pairs the larger messages go by links: all, none, or all but the first."""
    found = ranks.run(
        "exchange_by_links", 3, folder=str(tmp_path), faults=["", "", ""], allocations=allocations
    )
    for rank, (right, links) in enumerate(found):
        assert right and links["reason"] == ""
        for peer, size in links["capacity"].items():
            grown = (rank, peer) in ((1, 2), (2, 1)) if large is None else large
            assert size == (16 << 20 if grown else 8 << 20)


# -- late rows ------------------------------------------------------------------------------------


class AMark(SimpleNamespace):
    def is_past(self):
        return self.past


def test_a_wait_is_overdue_only_while_the_stream_is_in_it():
    links = Links(lambda: None)
    first = AMark(past=False), AMark(past=False)
    second = AMark(past=False), AMark(past=False)
    links.note("one", (1,), *first)
    links.note("two", (0, 2), *second)
    assert links.overdue(5.0, 100.0) is None, "the stream is not there yet"
    assert links.overdue(5.0, 200.0) is None
    first[0].past = True
    assert links.overdue(5.0, 300.0) is None, "seen for the first time"
    assert links.overdue(5.0, 305.0) is None
    assert links.overdue(5.0, 305.1).site == "one"
    first[1].past = second[0].past = True
    assert links.overdue(5.0, 400.0) is None, "the next one begins anew"
    assert links.overdue(5.0, 405.1).peers == (0, 2)
    second[1].past = True
    assert links.overdue(5.0, 500.0) is None


def test_an_error_of_the_device_is_left_to_the_thread_that_uses_it():
    def is_past():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    links = Links(lambda: None)
    links.note("one", (1,), SimpleNamespace(is_past=is_past), SimpleNamespace(is_past=is_past))
    assert links.overdue(0.0, 1.0) is None


def test_a_worker_answers_a_ping_with_the_rows_that_it_misses():
    """The main thread cannot: it waits for the device."""
    links = Links(lambda: None)
    links.note("decoder.conv1", (1,), AMark(past=True), AMark(past=False))
    settings = WorkerSettings(0, 2, "cpu", "nccl", "", 1.0, -1.0, 1, direct=True)
    sent, commands = [], iter([("ping", None), ("ping", None)])

    def receive():
        for command in commands:
            return command
        raise EOFError

    pipe = SimpleNamespace(receive=receive, send=lambda *message: sent.append(message))
    with pytest.raises(EOFError):
        worker._receive_all(pipe, queue.SimpleQueue(), lambda: worker._late_rows(links, settings))
    kind, value = sent[0]
    assert kind == "error" and value["kind"] == "ShardingError" and value["rank"] == 1
    assert "rank 0 has no answer from rank 1 at decoder.conv1" in value["text"]
    json.dumps(value)
    assert worker._late_rows(None, settings) is None
