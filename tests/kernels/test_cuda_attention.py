"""Attention in CUDA C++: on a CPU by the emulation, and the same on an NVIDIA card."""

from __future__ import annotations

import pytest
import torch

from wan_vae.kernels.cuda import driver
from wan_vae.kernels.cuda.attention import (
    ATTENTION_KERNELS,
    Tile,
    Variant,
    attention,
    program,
    tiles_for,
)
from wan_vae.kernels.device import CARDS, Device, nvidia
from wan_vae.kernels.kernel import BuildError
from wan_vae.kernels.proof.cases import prove_kernel
from wan_vae.ops.opset import CallSize
from wan_vae.ops.problem import AttentionProblem, LayerWeights

HALF, BF16 = torch.float16, torch.bfloat16
WIDTHS = (32, 64, 96, 128, 160, 192, 256, 384, 512, 640, 1024)
# On the CPU each is compiled once: slices with zeros, one part and several, both shapes of tile.
EMULATED = [(c, i) for c in (32, 160, 384, 1024) for i in (0, 1)]
CODES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
(KERNEL,) = ATTENTION_KERNELS


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, poisoned_outputs) -> torch.device:
    """Where the kernels run: under the emulation on the CPU."""
    if request.param == "cpu":
        request.getfixturevalue("emulated")
    torch.manual_seed(0)
    return torch.device(request.param)


def code_of(device: torch.device) -> str:
    return "sm_86" if device.type == "cpu" else Device.of(device).machine_code


def heads(frames: int, queries: int, keys: int, channels: int, size: float = 1.0):
    """q, k and v as the network has them, views of tensors with three times the channels: q of one
    with `queries` pixels. size: of the scores, roughly."""
    rows = [torch.randn(frames, n, 3 * channels, device="cpu") for n in (queries, keys)]
    q = (size * rows[0]).to(HALF).split(channels, 2)[0]
    return q, *rows[1].to(HALF).split(channels, 2)[1:]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """In float32, without TF32."""
    q, k, v = q.float(), k.float(), v.float()
    return (q @ k.transpose(1, 2) / q.shape[2] ** 0.5).softmax(2) @ v


def moved(device: torch.device, *views: torch.Tensor) -> list[torch.Tensor]:
    """Copies on `device` with the same strides, NaN between and behind what the views have."""
    made = []
    for x in views:
        n, rows, c = x.shape
        room = torch.full((n, rows + 3, x.stride(1)), torch.nan, dtype=x.dtype, device=device)
        made.append(room[:, :rows, :c].copy_(x))
    return made


def run(device: torch.device, tile: Tile, *views: torch.Tensor) -> torch.Tensor:
    variant = Variant(views[0].shape[2], tile)
    return attention(*moved(device, *views), variant, code_of(device))


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative; not finite if a result is not."""
    return float((y.float().cpu() - expected.cpu()).norm() / expected.norm())


@pytest.mark.parametrize("channels,tile", EMULATED)
@pytest.mark.parametrize("queries,keys", [(71, 131), (1, 1), (64, 128), (65, 129), (3, 320)])
def test_against_float32(request, device, channels, tile, queries, keys):
    views = heads(2, queries, keys, channels, size=2)
    y = run(device, tiles_for(channels)[tile], *views)
    assert y.shape == (2, queries, channels) and y.dtype == HALF and y.is_contiguous()
    assert error(y, exact(*views)) < 4e-4
    if device.type == "cpu":
        assert request.getfixturevalue("emulated").conflicts == 0


@pytest.mark.gpu
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("tile", [0, 1])
def test_all_widths_and_tiles(channels, tile):
    views = heads(3, 203, 517, channels, size=2)
    y = run(torch.device("cuda"), tiles_for(channels)[tile], *views)
    assert error(y, exact(*views)) < 4e-4


@pytest.mark.parametrize("direction", [1, -1])
def test_scores_that_grow_with_each_block_of_keys_or_shrink(device, direction):
    """Each block raises the maximum of some queries by far, or of none."""
    q, k, v = heads(1, 65, 321, 384)
    q[:, ::2] = q[:, ::2].abs()
    k = k.abs() * torch.linspace(0.01, 3, 321)[:: direction if direction > 0 else 1, None].to(HALF)
    k = k if direction > 0 else k.flip(1)
    y = run(device, tiles_for(384)[0], q, k, v)
    assert error(y, exact(q, k, v)) < 4e-4


@pytest.mark.parametrize("channels", [384, 1024])
def test_a_querys_bits_do_not_depend_on_the_other_queries(device, channels):
    """Nor on its place in a program: a shard has some rows of a frame."""
    tile = tiles_for(channels)[0]
    q, k, v = heads(1, 2 * tile.queries + 7, 150, channels, size=2)
    whole = run(device, tile, q, k, v)
    for start, stop in ((0, 1), (3, tile.queries + 5), (tile.queries, 2 * tile.queries + 7)):
        part = run(device, tile, q[:, start:stop], k, v)
        assert torch.equal(part, whole[:, start:stop])
    assert torch.equal(run(device, tile, q.flip(1), k, v), whole.flip(1))


def test_frames_do_not_depend_on_each_other(device):
    q, k, v = heads(3, 40, 70, 160)
    tile = tiles_for(160)[0]
    whole = run(device, tile, q, k, v)
    for frame in range(3):
        one = slice(frame, frame + 1)
        assert torch.equal(run(device, tile, q[one], k[one], v[one]), whole[one])


def test_inputs_in_any_layout(device):
    """Views that the kernel cannot read as they are: of channels first, and not aligned."""
    q, k, v = (x.to(device) for x in heads(2, 9, 20, 32))
    variant = Variant(32, tiles_for(32)[0])
    expected = attention(q, k, v, variant, code_of(device))
    wide = torch.zeros(2, 20, 36, dtype=HALF, device=device)
    wide[..., 1:33] = v
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    y = attention(q, k, wide[..., 1:33], variant, code_of(device))
    assert torch.equal(y, expected)


def test_what_is_not_a_number_stays_with_its_query(device):
    q, k, v = heads(1, 9, 70, 32)
    q[0, 4, 3] = torch.nan
    y = run(device, tiles_for(32)[0], q, k, v)[0]
    assert y[4].isnan().all()
    assert not torch.cat([y[:4], y[5:]]).isnan().any()


@pytest.mark.parametrize("channels", [160, 1024])
def test_threads_may_run_in_any_order(emulated, channels):
    views = heads(2, 35, 131, channels)
    emulated.in_every_order(lambda: run(torch.device("cpu"), tiles_for(channels)[0], *views))


def test_turing_computes_the_same(emulated):
    """Its copies wait for memory, its tensor cores take two steps."""
    views = heads(1, 35, 131, 384)
    variant = Variant(384, tiles_for(384)[1])
    y = attention(*views, variant, "sm_75")
    assert error(y, exact(*views)) < 4e-4


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("channels", [64, pytest.param(384, marks=pytest.mark.gpu)])
def test_the_whole_layer_passes_its_proof(device, channels, dtype):
    """Norm, queries / keys / values, attention and projection; see `proof/cases.py`."""
    card = Device.of(device) if device.type == "cuda" else CARDS["RTX 3060"]
    problem = AttentionProblem(channels, dtype)
    for config in KERNEL.candidates(problem, card):
        verdict = prove_kernel(KERNEL, problem, config, card, device, None)
        assert verdict.passed, verdict


def test_the_layer_says_what_memory_it_takes(emulated):
    problem = AttentionProblem(32, BF16)
    weights = LayerWeights(
        torch.randn(96, 32, 1, 1), None, torch.ones(32, 1, 1), torch.randn(32, 32, 1, 1)
    )
    layer = KERNEL.prepare(weights, problem, "m64_n64", CARDS["RTX 3060"])
    assert (layer.kernel, layer.config, layer.family) == ("mma", "m64_n64", "cuda")
    made = layer.norm(torch.randn(3, 32, 5, 7).to(BF16))
    workspace = layer.workspace(CallSize(1, 3, 5, 7))
    assert workspace.operand_bytes == made.numel() * made.itemsize


def test_candidates_fit_the_card():
    def of(channels: int, card: Device):
        return KERNEL.candidates(AttentionProblem(channels, HALF), card)

    assert of(384, CARDS["RTX 4090"]) == of(384, CARDS["H100"]) == ["m64_n64", "m32_n64"]
    assert of(1024, CARDS["RTX 4090"]) == ["m32_n128", "m16_n128"]
    assert of(384, CARDS["RTX 2060"]) == ["m32_n64"]
    for channels in WIDTHS:
        for card in CARDS.values():
            if card.vendor == "nvidia":
                assert of(channels, card), (channels, card)
        assert of(channels, CARDS["RTX 2060"])[-1] == tiles_for(channels)[1].name
        for tile in tiles_for(channels):
            variant = Variant(channels, tile)
            assert variant.stages >= 3 and variant.shared_bytes <= tile.shared_kib * 1024


def test_what_it_is_not_made_for_is_refused():
    variant = Variant(32, tiles_for(32)[0])
    q, k, v = heads(1, 2, 3, 32)
    for wrong in ((q.float(), k, v), (q, k[:, :0], v[:, :0]), heads(1, 2, 3, 64)):
        with pytest.raises(ValueError, match="attention of"):
            attention(*wrong, variant, "sm_86")
    with pytest.raises(ValueError, match="no configuration"):
        KERNEL.build(AttentionProblem(32, HALF), "m1_n1", CARDS["RTX 3060"])
    reason = KERNEL.requires.unmet(CARDS["RTX 3060"], AttentionProblem(2048, HALF))
    assert reason == "needs at most 1024 output channels, the layer has 2048"


@pytest.fixture
def nvrtc():
    try:
        driver.nvrtc_version()
    except OSError as error:
        pytest.skip(f"no NVRTC here (pip install nvidia-cuda-nvrtc): {error}")


# The source tells cards before Ampere from later ones, and nothing else.
COMPILED = [
    pytest.param(code, channels, marks=pytest.mark.full if is_long else ())
    for code in (*CODES, "compute_86", "sm_75")
    for channels in (160, 384, 1024)
    for is_long in (code not in ("sm_75", "sm_90", "compute_86"),)
]


@pytest.mark.parametrize("machine_code,channels", COMPILED)
def test_compiles_for(nvrtc, machine_code, channels):
    tile = tiles_for(channels)[machine_code == "sm_75"]
    made = program(Variant(channels, tile), machine_code)
    assert driver.compile_source(made.source, dict(made.defines), machine_code, None)


@pytest.mark.parametrize(
    "card,dtype",
    [
        (nvidia("a card", (8, 6), 30), BF16),
        (nvidia("H100", (9, 0), 132).imitating((8, 6)), BF16),
        (nvidia("Turing", (7, 5), 30), HALF),
    ],
)
def test_build_compiles_all_that_a_layer_launches(nvrtc, own_proofs, card, dtype):
    KERNEL.build(AttentionProblem(64, dtype), "m32_n64", card)


def test_what_turing_cannot_write_is_refused(nvrtc, own_proofs):
    with pytest.raises(BuildError, match="NVRTC"):
        KERNEL.build(AttentionProblem(64, BF16), "m32_n64", nvidia("Turing", (7, 5), 30))


# Wan 2.1 at 720p, at 480p and on one of two shards; Wan 2.2 at 720p.
@pytest.mark.gpu
@pytest.mark.parametrize(
    "channels,frames,queries,keys",
    [(384, 2, 14400, 14400), (384, 4, 6240, 6240), (384, 1, 7200, 14400), (1024, 2, 3520, 3520)],
)
def test_real_sizes(channels, frames, queries, keys, poisoned_outputs):
    torch.manual_seed(0)
    device = torch.device("cuda")
    q, k, v = moved(device, *heads(frames, queries, keys, channels, size=3))
    for tile in tiles_for(channels):
        variant = Variant(channels, tile)
        y = attention(q, k, v, variant, code_of(device))
        for frame in range(frames):
            rows = slice(queries // 3, queries // 3 + 500)
            expected = exact(q[frame, rows][None], k[frame][None], v[frame][None])
            assert error(y[frame, rows][None], expected) < 6e-4
        assert y.isfinite().all()
        for _ in range(10):
            assert torch.equal(attention(q, k, v, variant, code_of(device)), y)
