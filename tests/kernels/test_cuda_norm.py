"""The norm in CUDA C++: on a CPU by the emulation, and the same on an NVIDIA card."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from wan_vae.kernels.cuda import driver
from wan_vae.kernels.cuda.norm import Variant, make_norm, program
from wan_vae.kernels.device import Device
from wan_vae.kernels.kernel import FusedNorm, NormCall
from wan_vae.kernels.weights import norm_scale
from wan_vae.kernels.winograd import POINTS
from wan_vae.ops.eager.norm import rms_norm, rms_norm_silu
from wan_vae.ops.opset import HaloRows

HALF, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
LAST = torch.channels_last_3d
WIDTHS = (16, 24, 96, 160, 384, 1024)
# Lanes that have nothing at the end; a thread with more vectors than elsewhere.
ODD_WIDTHS = (8, 40, 56, 88, 1000, 1536)
# Each is compiled once more: all dtypes for some of them.
JOINED = [(BF16, c) for c in (*WIDTHS, *ODD_WIDTHS)] + [
    (d, c) for d in (HALF, F32) for c in (24, 96)
]
PAIRED = [(BF16, c) for c in WIDTHS] + [(d, 160) for d in (HALF, F32)]
CARDS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, poisoned_outputs) -> torch.device:
    """Where the kernels run: under the emulation on the CPU."""
    if request.param == "cpu":
        request.getfixturevalue("emulated")
    torch.manual_seed(0)
    return torch.device(request.param)


def norm_of(device: torch.device) -> FusedNorm:
    return make_norm("sm_86" if device.type == "cpu" else Device.of(device).machine_code)


def features(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Random [B, C, T, H, W] in channels_last_3d, on the CPU."""
    return (3 * torch.randn(shape)).to(dtype).contiguous(memory_format=LAST)


def gain(channels: int) -> torch.Tensor:
    return 1 + 0.2 * torch.randn(channels)


def expected_join(
    x: torch.Tensor, gamma: torch.Tensor, history: torch.Tensor | None, past: int, silu: bool = True
) -> torch.Tensor:
    """In float32: [B, C, past + T, H, W]."""
    new = (rms_norm_silu if silu else rms_norm)(x.float(), gamma)
    if history is None:
        return F.pad(new, (0, 0, 0, 0, past, 0))
    return torch.cat([history.float(), new], 2)


def transformed(frames: torch.Tensor) -> torch.Tensor:
    """The operand of `pairs` for float16 frames with two of the past in front."""
    if frames.shape[2] % 2:
        frames = F.pad(frames, (0, 0, 0, 0, 1, 0))
    made = []
    for i in range(0, frames.shape[2] - 2, 2):
        d0, d1, d2, d3 = frames[:, :, i : i + 4].float().unbind(2)
        made += [d0 - d2, d1 + d2, d2 - d1, d1 - d3]
    return torch.stack(made, 2).to(frames.dtype)


def is_quads_of(operand: torch.Tensor, frames: torch.Tensor) -> bool:
    """Whether it is the operand of `quads` for these frames, with two of the past in front: each
    number as it is rounded from float64, or from a sum in float32."""
    frames = F.pad(frames, (0, 0, 0, 0, -(frames.shape[2] - 2) % 4, 0)).double()
    windows = [frames[:, :, i : i + 6] for i in range(0, frames.shape[2] - 2, 4)]
    into = POINTS.into.to(frames.device)
    exact = torch.cat([torch.einsum("pf,bcfhw->bcphw", into, w) for w in windows], 2)
    info = torch.finfo(operand.dtype)
    slack = 0.5 * info.eps * exact.abs().clamp(min=info.smallest_normal) + 1e-6 * frames.abs().max()
    return operand.shape == exact.shape and bool(((operand.double() - exact).abs() <= slack).all())


def close(y: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether it is `expected`, in float32, but for one rounding and errors that are far below."""
    error = (y.float() - expected).abs()
    info = torch.finfo(y.dtype)
    half_unit = 0.51 * info.eps * expected.abs().clamp(min=info.smallest_normal)
    return bool((error <= half_unit).all())


def call_on(device: torch.device, x: torch.Tensor, gamma: torch.Tensor, **options) -> NormCall:
    """Behind a norm with operands in float16, everything on `device`."""
    options = {"dtype": HALF, **options}
    if options.get("history") is not None:
        options["history"] = options["history"].to(device)
    return NormCall(x.to(device), norm_scale(gamma).to(device), **options)


@pytest.mark.parametrize("dtype,channels", JOINED)
def test_join(device, dtype, channels):
    x, gamma = features(2, channels, 3, 3, 5, dtype=dtype), gain(channels)
    history = features(2, channels, 2, 3, 5, dtype=HALF)
    call = call_on(device, x, gamma, history=history, keep=True)
    y, kept = norm_of(device).join(call)
    assert y.is_contiguous(memory_format=LAST) and kept.is_contiguous(memory_format=LAST)
    assert torch.equal(y[:, :, :2].cpu(), history)
    assert close(y[:, :, 2:].cpu(), expected_join(x, gamma, None, 0))
    assert torch.equal(kept, y[:, :, -2:]) and kept.data_ptr() != y.data_ptr()


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize("past", [0, 1, 2])
@pytest.mark.parametrize("has_history", [False, True])
@pytest.mark.parametrize("keep", ["", "apart", "overwrite"])
def test_join_behind_any_past(device, frames, past, has_history, keep):
    x, gamma = features(1, 24, frames, 5, 7), gain(24)
    old = features(1, 24, past, 5, 7, dtype=HALF) if has_history and past else None
    options = {"keep": bool(keep), "overwrite": keep == "overwrite", "past": past}
    call = call_on(device, x, gamma, **options, history=None if old is None else old.clone())
    y, kept = norm_of(device).join(call)
    assert close(y.cpu(), expected_join(x, gamma, old, past))
    if keep and past:
        assert torch.equal(kept, y[:, :, -past:])
    else:
        assert kept is None
    if old is not None:
        over = kept is not None and keep == "overwrite"
        assert (kept is not None and kept.data_ptr() == call.history.data_ptr()) == over
        assert over or torch.equal(call.history.cpu(), old)


@pytest.mark.parametrize("dtype,channels", PAIRED)
@pytest.mark.parametrize("frames", [1, 4])
def test_pairs_are_transformed_from_the_rounded_frames(device, dtype, channels, frames):
    x, gamma = features(2, channels, frames, 3, 5, dtype=dtype), gain(channels)
    call = call_on(device, x, gamma, history=features(2, channels, 2, 3, 5, dtype=HALF), keep=True)
    norm = norm_of(device)
    joined, also_kept = norm.join(call)
    y, kept = norm.pairs(call)
    assert y.is_contiguous(memory_format=LAST)
    assert torch.equal(y, transformed(joined)) and torch.equal(kept, also_kept)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("has_history", [False, True])
@pytest.mark.parametrize("keep", ["", "apart", "overwrite"])
def test_pairs_behind_any_past(device, frames, has_history, keep):
    x, gamma = features(1, 24, frames, 5, 7), gain(24)
    history = features(1, 24, 2, 5, 7, dtype=HALF) if has_history else None
    norm = norm_of(device)
    joined, _ = norm.join(call_on(device, x, gamma, history=history))
    options = {"keep": bool(keep), "overwrite": keep == "overwrite"}
    call = call_on(
        device, x, gamma, **options, history=None if history is None else history.clone()
    )
    y, kept = norm.pairs(call)
    assert torch.equal(y, transformed(joined))
    assert (kept is not None) == bool(keep)
    assert kept is None or torch.equal(kept, joined[:, :, -2:])
    if keep and history is not None:
        assert (kept.data_ptr() == call.history.data_ptr()) == (keep == "overwrite")


@pytest.mark.parametrize("dtype,channels", [(BF16, 96), (BF16, 256), (HALF, 40), (F32, 96)])
@pytest.mark.parametrize("frames", [1, 4])
def test_quads_are_transformed_from_the_rounded_frames(device, dtype, channels, frames):
    x, gamma = features(2, channels, frames, 3, 5, dtype=dtype), gain(channels)
    call = call_on(device, x, gamma, history=features(2, channels, 2, 3, 5, dtype=HALF), keep=True)
    norm = norm_of(device)
    joined, also_kept = norm.join(call)
    y, kept = norm.quads(call)
    assert y.is_contiguous(memory_format=LAST)
    assert is_quads_of(y, joined) and torch.equal(kept, also_kept)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("has_history", [False, True])
@pytest.mark.parametrize("keep", ["", "apart", "overwrite"])
def test_quads_behind_any_past(device, frames, has_history, keep):
    """The first quad may have frames of the past that no history reaches: they count as zeros."""
    x, gamma = features(1, 24, frames, 5, 7), gain(24)
    history = features(1, 24, 2, 5, 7, dtype=HALF) if has_history else None
    norm = norm_of(device)
    joined, _ = norm.join(call_on(device, x, gamma, history=history))
    options = {"keep": bool(keep), "overwrite": keep == "overwrite"}
    call = call_on(
        device, x, gamma, **options, history=None if history is None else history.clone()
    )
    y, kept = norm.quads(call)
    assert is_quads_of(y, joined)
    assert (kept is not None) == bool(keep)
    assert kept is None or torch.equal(kept, joined[:, :, -2:])
    if keep and history is not None:
        assert (kept.data_ptr() == call.history.data_ptr()) == (keep == "overwrite")
        assert keep == "overwrite" or torch.equal(call.history.cpu(), history)


@pytest.mark.parametrize("cuts", [(1,), (1, 5), (5,), (9,), (1, 9)], ids=str)
def test_quads_do_not_depend_on_the_cut_into_chunks(device, cuts):
    """As the decoder cuts: the video's first frame alone, then whole latent frames."""
    x, gamma = features(1, 96, 13, 2, 5), gain(96)
    norm = norm_of(device)
    whole, _ = norm.quads(call_on(device, x, gamma))
    history, made = None, []
    for start, stop in pairwise((0, *cuts, 13)):
        options = {"history": history, "keep": True, "overwrite": True}
        y, history = norm.quads(call_on(device, x[:, :, start:stop], gamma, **options))
        made.append(y)
    assert torch.equal(torch.cat(made, 2), whole)


@pytest.mark.parametrize("channels", [96, 160])
@pytest.mark.parametrize("cuts", [(1, 4, 8), (1, 2, 3, 5, 6), (4, 5)], ids=str)
def test_bits_do_not_depend_on_the_cut_into_chunks(device, channels, cuts):
    """Frames of an odd clip, one by one or many at once; history in place."""
    x, gamma = features(1, channels, 9, 2, 5), gain(channels)
    norm = norm_of(device)
    whole, _ = norm.join(call_on(device, x, gamma))
    history, made = None, []
    for start, stop in pairwise((0, *cuts, 9)):
        options = {"history": history, "keep": True, "overwrite": True}
        y, history = norm.join(call_on(device, x[:, :, start:stop], gamma, **options))
        assert torch.equal(y, whole[:, :, start : stop + 2])
        made.append(y[:, :, 2:])
    assert torch.equal(torch.cat(made, 2), whole[:, :, 2:])


@pytest.mark.parametrize("cuts", [(1,), (1, 5), (3, 7), (5,)], ids=str)
def test_pairs_do_not_depend_on_the_cut_into_chunks(device, cuts):
    """As the decoder cuts: behind the first chunk, an even number of frames each."""
    x, gamma = features(1, 96, 9, 2, 5), gain(96)
    norm = norm_of(device)
    whole, _ = norm.pairs(call_on(device, x, gamma))
    history, made = None, []
    for start, stop in pairwise((0, *cuts, 9)):
        options = {"history": history, "keep": True, "overwrite": True}
        y, history = norm.pairs(call_on(device, x[:, :, start:stop], gamma, **options))
        made.append(y)
    assert torch.equal(torch.cat(made, 2), whole)


def test_bits_do_not_depend_on_place_and_batch(device):
    """One pixel, alone and in planes of other sizes."""
    gamma, pixel = gain(160), features(1, 160, 1, 1, 1)
    alone, _ = norm_of(device).join(call_on(device, pixel, gamma, past=0))
    for size in ((3, 160, 2, 1, 3), (1, 160, 3, 9, 13)):
        x = pixel.expand(size).contiguous(memory_format=LAST)
        y, _ = norm_of(device).join(call_on(device, x, gamma, past=0))
        assert torch.equal(y, alone.expand(size))
        pairs, _ = norm_of(device).pairs(call_on(device, x, gamma))
        joined, _ = norm_of(device).join(call_on(device, x, gamma))
        assert torch.equal(pairs, transformed(joined))
        quads, _ = norm_of(device).quads(call_on(device, x, gamma))
        assert torch.equal(quads, quads[:1, :, :, :1, :1].expand(quads.shape))
        assert is_quads_of(quads, joined)


@pytest.mark.parametrize("kind", ["join", "pairs", "quads"])
@pytest.mark.parametrize("axis", ["height", "width"])
@pytest.mark.parametrize("place", ["first", "inner", "last"])
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_shards_halo_gives_the_bits_of_the_whole_picture(
    device, kind, axis, place, frames, overwrite
):
    """Its history too; at the picture's edge the halo is zero. Rows may come after the launch for
    the shard's own pixels."""
    dim, size = (3, 11) if axis == "height" else (4, 7)
    start, stop = {"first": (0, 4), "inner": (2, 5), "last": (size - 3, size)}[place]
    x, gamma = features(2, 24, frames, 11, 7), gain(24)
    frame = (0, 0, 1, 1) if axis == "height" else (1, 1)
    padded = F.pad(x, frame).contiguous(memory_format=LAST)
    history = F.pad(features(2, 24, 2, 11, 7, dtype=HALF), frame)
    run = getattr(norm_of(device), kind)

    def edge(index: int) -> torch.Tensor | None:
        inside = 0 <= index < size
        rows = x.narrow(dim, index, 1).permute(0, 2, 3, 4, 1) if inside else None
        return None if rows is None else rows.contiguous().to(device)

    rows = edge(start - 1), edge(stop)
    sent = [None if row is None else row.clone() for row in rows]

    def arrive() -> None:
        for row, values in zip(rows, sent, strict=True):
            if row is not None:
                row.copy_(values)

    for row in rows:
        if row is not None:
            row.fill_(torch.nan)
    halo = HaloRows(axis, *rows, arrive)
    own = x.narrow(dim, start, stop - start)
    past = history.narrow(dim, start, stop - start + 2).contiguous(memory_format=LAST)
    whole = run(call_on(device, padded, gamma, history=history, keep=True))
    call = call_on(device, own, gamma, history=past, keep=True, halo=halo, overwrite=overwrite)
    for got, expected in zip(run(call), whole, strict=True):
        assert torch.equal(got, expected.narrow(dim, start, stop - start + 2))


def test_rows_arrive_once_and_before_they_are_read():
    arrived = []
    row = torch.zeros(1, 1, 1, 2, 8)
    halo = HaloRows("height", row, None, lambda: arrived.append(True))
    assert halo.on_their_way[0] is row and not arrived
    assert halo.after is None and arrived == [True]
    assert halo.before is row
    halo.arrive()
    assert arrived == [True]


@pytest.mark.parametrize("kind", ["join", "pairs", "quads"])
@pytest.mark.parametrize("channels,width", [(24, 32), (8, 64), (96, 112)])
def test_channels_that_the_layer_lacks_are_zeros(device, kind, channels, width):
    x, gamma = features(1, channels, 3, 4, 3), gain(channels)
    history = F.pad(
        features(1, channels, 2, 4, 3, dtype=HALF).movedim(1, -1), (0, width - channels)
    )
    history = history.movedim(-1, 1)
    run = getattr(norm_of(device), kind)
    own_history = history[:, :channels].contiguous(memory_format=LAST)
    narrow, kept_narrow = run(call_on(device, x, gamma, history=own_history, keep=True))
    wide, kept = run(call_on(device, x, gamma, history=history, keep=True, channels=width))
    for got, own in ((wide, narrow), (kept, kept_narrow)):
        assert got.shape[1] == width and got.is_contiguous(memory_format=LAST)
        assert not got[:, channels:].any()
        difference = (got[:, :channels].float() - own.float()).abs().max()
        # More lanes: another order of the sum.
        assert difference <= 4e-3


def test_the_norm_alone_and_results_in_bfloat16(device):
    x, gamma = features(3, 384, 1, 3, 4), gain(384)
    y, _ = norm_of(device).join(call_on(device, x, gamma, past=0, silu=False))
    assert close(y.cpu(), expected_join(x, gamma, None, 0, silu=False))
    history = features(3, 384, 2, 3, 4)
    call = call_on(device, x, gamma, history=history, dtype=None)
    y, _ = norm_of(device).join(call)
    assert y.dtype == BF16 and close(y.cpu(), expected_join(x, gamma, history, 2))
    pairs, _ = norm_of(device).pairs(call)
    assert torch.equal(pairs, transformed(y))
    quads, _ = norm_of(device).quads(call)
    assert quads.dtype == BF16 and is_quads_of(quads, y)


def test_zeros_tiny_and_huge_numbers(device):
    """A norm below 1e-12 counts as 1e-12; NaN stays in its pixel."""
    x = features(1, 96, 1, 1, 6, dtype=F32)
    x[..., 0] = 0
    x[..., 1] *= 1e-14
    x[..., 2] *= 1e-6
    x[..., 3] *= 1e15
    x[:, 5, ..., 5] = torch.nan
    gamma = gain(96)
    y, _ = norm_of(device).join(call_on(device, x, gamma, past=0))
    y = y.cpu()
    assert not y[..., 0].any()
    assert close(y[..., 1:5], expected_join(x, gamma, None, 0)[..., 1:5])
    assert y[..., 5].isnan().all()


def test_features_in_another_layout(device):
    """Made dense first; a history too, which is then a copy."""
    x, gamma = features(1, 24, 2, 4, 3), gain(24)
    history = features(1, 24, 2, 4, 3, dtype=HALF)
    norm = norm_of(device)
    expected, _ = norm.join(call_on(device, x, gamma, history=history))
    y, _ = norm.join(call_on(device, x.contiguous(), gamma, history=history.contiguous()))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_threads_may_run_in_any_order(emulated, frames):
    """Where the new history takes the place of the old one, too."""
    x, gamma = features(2, 160, frames, 5, 3), gain(160)
    history = features(2, 160, 2, 5, 3, dtype=HALF)
    norm = norm_of(x.device)
    for run in (norm.join, norm.pairs, norm.quads):
        for overwrite in (False, True):

            def compute(run=run, overwrite=overwrite):
                options = {"keep": True, "overwrite": overwrite}
                return run(call_on(x.device, x, gamma, history=history.clone(), **options))

            emulated.in_every_order(compute)


REFUSED = {
    "multiples of 8": {"x": features(1, 12, 1, 1, 1)},
    "multiples": {"channels": 16},
    "no norm of": {"dtype": F32},
    "frames of the past": {"past": 3},
    "a history": {"history": torch.zeros(1, 24, 2, 1, 2, dtype=HALF)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_it_is_not_made_for_is_refused(message):
    call = call_on(torch.device("cpu"), features(1, 24, 1, 1, 1), gain(24))
    with pytest.raises(ValueError, match=message):
        make_norm("sm_86").join(call._replace(**REFUSED[message]))


def test_a_norm_is_made_once():
    assert make_norm("sm_86") is make_norm("sm_86") is not make_norm("sm_80")
    assert make_norm("sm_86").family == "cuda"


# The source knows cards before and after Ampere, and nothing else.
COMPILED = [
    pytest.param(code, entry, marks=pytest.mark.full if is_long else ())
    for code in (*CARDS, "compute_86")
    for entry in ("norm_join", "norm_pairs", "norm_quads")
    for is_long in (code not in ("sm_75", "sm_90", "compute_86"),)
]


@pytest.mark.parametrize("machine_code,entry", COMPILED)
def test_compiles_for(entry, machine_code):
    """Turing too, which has no instructions for bfloat16, but reads it."""
    try:
        driver.nvrtc_version()
    except OSError as error:
        pytest.skip(f"no NVRTC here (pip install nvidia-cuda-nvrtc): {error}")
    used = [(True, ""), (False, "height"), (True, "width")]
    for silu, halo in used[:1] if entry == "norm_quads" else used:
        variant = Variant(entry, 96, 96, BF16, HALF, 2, silu, halo)
        made = program(variant, machine_code)
        assert driver.compile_source(made.source, dict(made.defines), machine_code, None)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [*WIDTHS, 24])
@pytest.mark.parametrize("frames", [1, 4])
def test_as_tritons(channels, frames):
    """One unit in the last place at most, and that rarely: the exponentials differ."""
    pytest.importorskip("triton", reason="triton is not installed here: pip install triton")
    from wan_vae.kernels.triton.norm import norm_silu_join

    device = torch.device("cuda")
    x, gamma = features(1, channels, frames, 37, 50), gain(channels)
    call = call_on(device, x, gamma)
    ours, theirs = (run(call)[0].float() for run in (norm_of(device).join, norm_silu_join))
    info = torch.finfo(HALF)
    error = (ours - theirs).abs()
    assert (error <= info.eps * theirs.abs().clamp(min=info.smallest_normal)).all()
    assert (error > 0).float().mean() < 1e-2


@pytest.mark.gpu
def test_tensors_beyond_two_to_the_31_numbers(poisoned_outputs):
    """The last pixels of a plane of 2.2e9 numbers, where a card has room for it."""
    device = torch.device("cuda")
    frames, size = 3, (2900, 2600)
    need = 2 * 96 * size[0] * size[1] * (2 * frames + 6)
    if torch.cuda.mem_get_info()[0] < need + (2 << 30):
        pytest.skip(f"needs {need >> 30} GiB of GPU memory")
    x = torch.randn((1, frames, *size, 96), device=device, dtype=HALF).permute(0, 4, 1, 2, 3)
    gamma = gain(96)
    y, _ = norm_of(device).pairs(call_on(device, x, gamma))
    assert y.numel() > 1 << 31
    corner = x[..., -3:, -5:]
    part, _ = norm_of(device).pairs(call_on(device, corner, gamma))
    assert torch.equal(y[..., -3:, -5:], part)
