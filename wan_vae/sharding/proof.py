"""Checks that tensors of every memory format arrive unchanged, and compares an unguarded gather."""

from __future__ import annotations

import torch

from .context import ShardContext
from .transport import Incoming, Outgoing, Wire, all_gather_flat


def numbers(rank: int, device: torch.device) -> torch.Tensor:
    """The tensor that `rank` sends: [1, 8, 2, 6, 10] float32, every element different."""
    steps = torch.arange(8 * 2 * 6 * 10, dtype=torch.float32, device=device)
    return steps.view(1, 8, 2, 6, 10) + 10_000 * rank


def in_format(x: torch.Tensor, which: int) -> torch.Tensor:
    """Return `x` as dense NDHWC, dense NCDHW or a permuted view, depending on `which` modulo 3."""
    which %= 3
    if which == 0:
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x if which == 1 else x.transpose(3, 4).contiguous().transpose(3, 4)


def check_wire(context: ShardContext, device: torch.device) -> dict[str, object]:
    """Send `numbers` to all ranks, in another memory format on each; a collective of the group.

    `gather`, `exchange`: True if everything arrived unchanged through `Wire`. `unguarded`: the
    result of a plain flat gather of dense NDHWC tensors: "equal", "garbled", or the first line of
    the error.
    """
    wire, rank = Wire(context, device), context.rank
    wanted = [numbers(r, device) for r in range(context.world_size)]
    gathered = wire.all_gather(in_format(wanted[rank], rank))
    gather = all(torch.equal(g, w) for g, w in zip(gathered, wanted, strict=True))
    others = [r for r in range(context.world_size) if r != rank]
    exchange = True
    for turn in range(3):
        mine = in_format(wanted[rank], rank + turn)
        received = wire.exchange(
            f"proof {turn}",
            mine.dtype,
            [Outgoing(r, mine) for r in others],
            [Incoming(r, tuple(mine.shape)) for r in others],
        )
        exchange &= all(torch.equal(x, wanted[r]) for x, r in zip(received, others, strict=True))
    return {"gather": gather, "exchange": exchange, "unguarded": unguarded_gather(context, device)}


def unguarded_gather(context: ShardContext, device: torch.device) -> str:
    """Gather dense NDHWC tensors without the guard; see `check_wire`. A collective of the group."""
    wanted = [numbers(r, device) for r in range(context.world_size)]
    x = in_format(wanted[context.rank], 0)
    out = x.new_empty((context.world_size, *x.shape[1:]))
    try:
        all_gather_flat(out, x, context.group).wait()
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    return "equal" if torch.equal(out, torch.cat(wanted)) else "garbled"
