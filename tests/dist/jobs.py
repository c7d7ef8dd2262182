"""What ranks do in tests: (rank, ranks, group, **arguments) -> picklable result."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch

import wan_vae
from tests.conftest import PATIENCE_S, SMALL_CONFIGS, pass_elements, random_state
from tests.dist.two_ways import lying_clock, two_ways
from tests.unit.behind import behind
from wan_vae import WanVAE
from wan_vae.chunking import schedule
from wan_vae.config import wan21, wan22
from wan_vae.errors import DecodeCancelled
from wan_vae.io.pixels import PixelSource
from wan_vae.io.sink import NullSink
from wan_vae.network.blocks import Step
from wan_vae.network.cache import FeatureCache
from wan_vae.planning import choose
from wan_vae.planning import passes as planning_passes
from wan_vae.runs.shard_ranks import ShardRanks, own_part
from wan_vae.sharding import ShardContext, plan_shards
from wan_vae.sharding.context import SINGLE, Agreed
from wan_vae.sharding.halo import Shard
from wan_vae.sharding.transport import Incoming, Outgoing, Wire

# The narrowest for which every layer has a kernel.
KERNELS = {"kernels": wan21(dim=16), "kernels 2.2": wan22(dim=16, decoder_dim=16)}
MINI = Path(__file__).parents[2] / "examples" / "wan_vae_mini.safetensors"


@cache
def model(name: str, weight_format: str = "contiguous") -> WanVAE:
    """A small VAE by name, with checkpoint weights in a memory format."""
    if name == "mini":
        return wan_vae.load(MINI, device="cpu")
    config = (KERNELS | SMALL_CONFIGS)[name]
    state = random_state(config)
    if weight_format == "channels_last_3d":
        state = {
            k: v.contiguous(memory_format=torch.channels_last_3d) if v.ndim == 5 else v
            for k, v in state.items()
        }
    return WanVAE.from_state_dict(state, device="cpu")


def noise(shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _context(rank, ranks, group, axis="auto") -> ShardContext:
    """A rank's place; on a busy machine it may wait for another one."""
    return ShardContext(rank, ranks, axis, group, timeout_s=PATIENCE_S)


def _to_numpy(x):
    return None if x is None else x.numpy()


def decode(rank, ranks, group, *, name, shape, axis="auto", gather="all", formats=None, **options):
    """Decode noise with shards: (pixels or None, report)."""
    wanted = formats[rank] if formats else "contiguous"
    vae = model(name, wanted)
    context = _context(rank, ranks, group, axis)
    if formats:
        options["memory_format"] = wanted
    pixels = vae.decode(noise(shape), shard=context, gather=gather, **options)
    return _to_numpy(pixels), vae.last_report.as_dict()


def decode_in_passes(rank, ranks, group, *, frames, **arguments):
    """`decode` in passes of so many frames of each rank in the last stage, and of a latent frame at
    the end: (pixels or None, report, passes)."""
    config, shape, passes = model(arguments["name"]).config, arguments["shape"], []
    part = plan_shards(*shape[3:], ranks, arguments["axis"]).pixel_shape_of(0, shape, 1)
    elements = pass_elements(config, part, frames[rank])
    agree = ShardRanks.agree_to_stop

    def count(own, chunk, stop):
        passes.append(chunk)
        return agree(own, chunk, stop)

    with (
        # A shard takes twice as many.
        patch.object(choose, "PASSES", (elements // 2, elements // 2)),
        patch.object(planning_passes, "_LAST_BYTES", 0),
        patch.object(ShardRanks, "agree_to_stop", count),
    ):
        return (*decode(rank, ranks, group, **arguments), len(passes))


def decode_with_kernels(rank, ranks, group, *, cache, **arguments):
    """`decode` with verdicts on kernels in the folder `cache`."""
    os.environ["WAN_VAE_CACHE"] = cache
    return decode(rank, ranks, group, **arguments)


def encode(rank, ranks, group, *, name, shape, axis="auto", gather="all", **options):
    """Encode noise with shards: (latent or None, report)."""
    vae = model(name)
    context = _context(rank, ranks, group, axis)
    latent = vae.encode(noise(shape).tanh(), shard=context, gather=gather, **options)
    return _to_numpy(latent), asdict(vae.last_report)


def encode_with_kernels(rank, ranks, group, *, cache, **arguments):
    """`encode` with verdicts on kernels in the folder `cache`."""
    os.environ["WAN_VAE_CACHE"] = cache
    return encode(rank, ranks, group, **arguments)


def decode_with_a_difference(
    rank,
    ranks,
    group,
    *,
    seed_of_rank_1=0,
    frames_of_rank_1=2,
    chunks_of_rank_1=1,
    precision_of_rank_1="fp32",
    nan_on_rank_1=False,
):
    """Rank 1 is given another latent or other options than rank 0."""
    odd = rank == 1
    latent = noise((1, 16, frames_of_rank_1 if odd else 2, 4, 4), seed_of_rank_1 if odd else 0)
    if odd and nan_on_rank_1:
        latent[0, 0, 0, 0, 0] = float("nan")
    model("wan2.1").decode(
        latent,
        shard=_context(rank, ranks, group, "height"),
        chunk_frames=chunks_of_rank_1 if odd else 1,
        precision=precision_of_rank_1 if odd else "fp32",
    )


def send_something_else(rank, ranks, group, *, kind):
    """Both ranks exchange rows; rank 1's differ in shape, dtype, place or count."""
    context, cpu = _context(rank, ranks, group, "height"), torch.device("cpu")
    wire = Wire(context, cpu)
    shape, dtype, site = (1, 2, 1, 1, 5), torch.float32, "decoder.conv1"
    peer = 1 - rank
    if kind == "order":
        wire.exchange(site, dtype, [Outgoing(peer, torch.zeros(shape))], [Incoming(peer, shape)])
    if rank == 1:
        shape = (1, 2, 1, 1, 6) if kind == "shape" else shape
        dtype = torch.bfloat16 if kind == "dtype" else dtype
        site = "decoder.head.2" if kind == "site" else site
        # This one counts from the start, as if it had skipped a convolution.
        wire = Wire(context, cpu) if kind == "order" else wire
    out = [Outgoing(peer, torch.zeros(shape, dtype=dtype))]
    wire.exchange(site, dtype, out, [Incoming(peer, shape)])


class _CountingWire(Wire):
    """A wire of CPU ranks that sends as with NCCL: all messages of an exchange in one call."""

    headers = 0

    def __init__(self, context):
        super().__init__(context, torch.device("cpu"))
        self.host_staged = False

    def _header(self, *arguments):
        self.headers += 1
        return super()._header(*arguments)


def exchange_at_once(rank, ranks, group, *, forgetful=None):
    """Three runs of the same exchanges: (was everything right, headers of each run).

    forgetful: a rank that has lost its memory before the third run.
    """
    agreed, counts, right = Agreed(), [], True
    for run in range(3):
        if run == 2 and rank == forgetful:
            agreed = Agreed()
        context = ShardContext(rank, ranks, "height", group, PATIENCE_S, agreed=agreed)
        wire = _CountingWire(context)
        wire.connect()
        wire.begin({"a kind of run": 1})
        for site, dtype, size in (("a", torch.float32, 5), ("b", torch.bfloat16, 7)):
            # An odd number of bytes for each message, and other numbers for each pair of ranks.
            peers = [p for p in (rank - 1, rank + 1) if 0 <= p < ranks]
            numbers = torch.arange(3.0 * size).view(1, 3, 1, size)
            out = [Outgoing(p, (numbers + 10 * rank + p + run).to(dtype)) for p in peers]
            into = [Incoming(p, (1, 3, 1, size)) for p in peers]
            for p, x in zip(peers, wire.exchange(site, dtype, out, into), strict=True):
                right &= torch.equal(x, (numbers + 10 * p + rank + run).to(dtype))
        counts.append(wire.headers)
    return right, counts


def decode_and_cancel(rank, ranks, group, *, stop_rank, after):
    """One rank is asked to stop after some chunks; what each rank then says."""
    asked = []

    def should_stop():
        asked.append(True)
        return rank == stop_rank and len(asked) > after

    vae = model("wan2.1")
    try:
        vae.decode(
            noise((1, 16, 5, 4, 4)),
            shard=_context(rank, ranks, group, "height"),
            chunk_frames=1,
            should_stop=should_stop,
        )
    except DecodeCancelled as error:
        return str(error), vae.last_report.status
    return "not cancelled", vae.last_report.status


class _Sink(NullSink):
    """As of threads that copy, of which the last have come when `on_close` returns."""

    is_copying = True

    def __init__(self, on_close):
        self.close = on_close


def run_behind(rank, ranks, group, *, operation, shape):
    """Run noise on a device that is behind: spans, those of exchanges, and those that were read,
    when the host was about to wait for the device's last work; how many were read in all; and the
    report's `wait_ms`, in which each exchange has one."""
    vae, context = model("wan2.1"), _context(rank, ranks, group, "height")
    with behind() as device:
        seen, exchanges, extremes = [], [], PixelSource.extremes
        add_wait = Wire._add_wait

        def count(wire, start):
            exchanges.append(None)
            add_wait(wire, start)

        def waits(*source):
            seen.append((device.spans, len(exchanges), len(device.read)))
            device.catch_up()
            return extremes(*source) if source else None

        with patch.object(Wire, "_add_wait", count), patch.object(PixelSource, "extremes", waits):
            if operation == "encode":
                vae.encode(noise(shape).tanh(), shard=context, gather="rank0")
            else:
                sink = _Sink(waits)
                vae.decode(noise(shape), shard=context, gather="own", sink=sink, chunk_frames=1)
        (at_end,) = seen
        return at_end, len(device.read), vae.last_report.shards[rank].wait_ms


def count_messages(rank, ranks, group, *, name, shape, chunk_frames):
    """Decode with a wire of our own: (messages, bytes) that this rank received in each chunk."""
    vae = model(name)
    plan = plan_shards(shape[3], shape[4], ranks)
    context = _context(rank, ranks, group)
    wire = Wire(context, torch.device("cpu"))
    shard, cache, counts = Shard(context, plan, wire), FeatureCache(), []
    z = own_part(noise(shape), plan, rank).contiguous()
    with torch.inference_mode():
        for chunk in schedule(shape[2], chunk_frames):
            before = wire.received_messages, wire.received_bytes
            vae.model.decode_chunk(z[:, :, chunk.start : chunk.stop], Step(cache, chunk, shard))
            after = wire.received_messages, wire.received_bytes
            counts.append((after[0] - before[0], after[1] - before[1]))
    return counts


def greet(rank, ranks, group):
    """How many bytes and messages this rank got."""
    wire = Wire(_context(rank, ranks, group), torch.device("cpu"))
    wire.greet()
    return wire.received_bytes // wire.received_messages, wire.received_messages


def gather_every_format(rank, ranks, group):
    """Each rank gathers its number in another memory format; all must arrive as NCDHW."""
    wire = Wire(_context(rank, ranks, group, "height"), torch.device("cpu"))
    steps = torch.arange(2 * 3 * 2 * 4 * 5.0).view(2, 3, 2, 4, 5)
    x = [
        steps.contiguous(memory_format=torch.channels_last_3d),
        steps.contiguous(),
        steps.transpose(3, 4).contiguous().transpose(3, 4),
    ][rank]
    gathered = wire.all_gather(x)
    return [torch.equal(g, steps) for g in gathered]


def run_with_a_clock(
    rank, ranks, group, *, caches, fastest, operation="decode", missing=(), times=1
):
    """Decode or encode noise with kernels that this rank's clock chose: for each run the result
    and the backends; and the configurations that ran."""
    os.environ["WAN_VAE_CACHE"] = caches[rank]
    vae = WanVAE.from_state_dict(random_state(SMALL_CONFIGS["wan2.1"]), device="cpu")
    with two_ways(missing[rank] if missing else ()) as kernel:
        vae.engine.timer_of = lambda device: lying_clock(kernel, fastest[rank])
        context = SINGLE if ranks == 1 else _context(rank, ranks, group, "height")
        results = []
        for _ in range(times):
            if operation == "encode":
                pixels = noise((1, 3, 5, 32, 16)).tanh()
                results.append(vae.encode(pixels, shard=context, backend="cuda"))
            else:
                results.append(vae.decode(noise((1, 16, 2, 4, 2)), shard=context, backend="cuda"))
        (kept,) = vae.model.prepared.values()
    choices = {name: choice.config for name, choice in kept[1].choices.items()}
    return [_to_numpy(result) for result in results], choices
