"""A decode on paper: the products that our kernels do, the bytes that they move, and how long a
card that we do not have takes for them.

Products and bytes are counted from the layers of the network (tests hold them to the memory plan's
walk). The rates of a card are its maker's, and the shares of them that a kernel reaches were
measured on a Hopper card. So a time is a prediction: nothing here was run on such a card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Literal

import torch

from wan_vae.config import WanVAEConfig
from wan_vae.kernels.cuda import conv3x3_mma
from wan_vae.kernels.winograd import DIRECT, PAIRS, QUADS
from wan_vae.network import architecture
from wan_vae.network.model import WanVAEModel
from wan_vae.network.sites import decoder_sites
from wan_vae.ops.opset import CallSize
from wan_vae.ops.problem import (
    AttentionProblem,
    HeadProblem,
    LayerSite,
    NormConvProblem,
    UpsampleProblem,
)

from .cases import Case

# copy: no products. direct: also F(2,3) along time, whose loop is the same with two thirds of the
# products. quads: F(4,3) along time. 2d: F(2,3) along time and rows.
Form = Literal["copy", "direct", "quads", "2d", "attention"]

_ITEMSIZE = torch.bfloat16.itemsize  # of features; operands behind a norm are float16
_PIXEL_ITEMSIZE = torch.float32.itemsize
# The tensor cores make 8 output channels at a time.
_COLUMNS = 8
# New frames of a layer in one pass: four, or where a latent frame is one frame the two of a chunk.
# So does the plan of 720p.
_PASS_FRAMES, _PASS_LATENT_FRAMES = 4, 2
_HISTORY_FRAMES = 2


@dataclass(frozen=True)
class Way:
    """Which of our kernels run. half_sums: products are summed in float16 where a kernel can.
    two_dimensional: Winograd along time and rows where a kernel can. quads: F(4,3) along time where
    a layer makes four frames of a latent frame, as our kernels do since 2026-11-29."""

    name: str
    half_sums: bool = False
    two_dimensional: bool = False
    quads: bool = True


@dataclass(frozen=True)
class Card:
    """A card as its maker describes it.

    multiprocessors: also AMD's compute units. boost_ghz: the clock of the rates.
    half_sums_tflops, float_sums_tflops: dense products of float16 a second, with sums of float16
    and of float32; a multiply-add is two. gigabytes_per_s: of the memory. source: of these numbers.
    runs_our_kernels: False where a time says what a kernel would take that does not exist.
    """

    name: str
    multiprocessors: int
    boost_ghz: float
    half_sums_tflops: float
    float_sums_tflops: float
    gigabytes_per_s: float
    source: str
    runs_our_kernels: bool = True

    @property
    def gains_by_half_sums(self) -> bool:
        """Whether sums of float16 are faster."""
        return self.half_sums_tflops > self.float_sums_tflops

    def tflops(self, half_sums: bool) -> float:
        """The rate with sums of this dtype."""
        return self.half_sums_tflops if half_sums else self.float_sums_tflops

    def products_a_cycle(self, half_sums: bool) -> float:
        """Multiply-adds of a multiprocessor in a cycle."""
        return self.tflops(half_sums) * 1e3 / (2 * self.multiprocessors * self.boost_ghz)


@dataclass(frozen=True)
class Share:
    """What part of the tensor cores' rate a form reaches where they do `products_a_cycle`.

    The faster they are, the smaller it is, because all that is not a product takes as long as
    before. half_sums: with sums of float16.
    """

    form: Form
    half_sums: bool
    products_a_cycle: float
    share: float
    source: str


@dataclass(frozen=True)
class Work:
    """What one kernel does in a whole decode.

    flops: of the products that are really done, a multiply-add being two. moved_bytes: read and
    written. half_sums: as in `Share`.
    """

    name: str
    form: Form
    flops: int
    moved_bytes: int
    half_sums: bool = False


@dataclass(frozen=True)
class Model:
    """How near to a card's rates a kernel comes. memory_share: of the memory's bandwidth."""

    shares: tuple[Share, ...]
    memory_share: float

    def share(self, form: Form, half_sums: bool, products_a_cycle: float) -> float:
        """That of the rate which is nearest, in ratio. Raises ValueError for an unmeasured form."""
        fitting = [s for s in self.shares if (s.form, s.half_sums) == (form, half_sums)]
        if not fitting:
            raise ValueError(f"no share is known of the form {form!r}, half sums {half_sums}")
        return min(fitting, key=lambda s: abs(log(s.products_a_cycle / products_a_cycle))).share

    def work_ms(self, work: Work, card: Card) -> float:
        """The slower of arithmetic and memory."""
        memory = work.moved_bytes / (card.gigabytes_per_s * 1e6 * self.memory_share)
        if not work.flops:
            return memory
        share = self.share(work.form, work.half_sums, card.products_a_cycle(work.half_sums))
        return max(memory, work.flops / (card.tflops(work.half_sums) * 1e9 * share))

    def decode_ms(self, case: Case, way: Way, card: Card) -> float:
        """All layers of a decode, one after the other."""
        return sum(self.work_ms(work, card) for work in decode_work(case, way))


def decode_layers(case: Case) -> Iterator[tuple[LayerSite, CallSize]]:
    """The layers of a decode of `case` in order, with the size of their input over all frames."""
    with torch.device("meta"):
        model = WanVAEModel(case.config).to(torch.bfloat16)
    batch, _, frames, rows, cols = case.latent
    only_frame = frames == 1
    for site in decoder_sites(model, only_frame):
        if site.name.endswith(".time_conv"):
            # The first frame passes it by; each of the others becomes two.
            if not only_frame:
                yield site, CallSize(batch, frames - 1, rows, cols)
                frames = 2 * frames - 1
            continue
        yield site, CallSize(batch, frames, rows, cols, only_frame)
        if isinstance(site.problem, UpsampleProblem):
            rows, cols = 2 * rows, 2 * cols


def decode_work(case: Case, way: Way) -> list[Work]:
    """Everything that the kernels of `way` do in a decode of `case`. Weights are not counted: they
    stay in the cache."""
    residuals = {block.conv2 for block in _blocks(case.config)}
    found: list[Work] = []
    for site, size in decode_layers(case):
        problem = site.problem
        if isinstance(problem, NormConvProblem | HeadProblem):
            found += _behind_norm(site.name, problem, size, way, site.name in residuals)
        elif isinstance(problem, AttentionProblem):
            # Features are normed; queries, keys and values made and read; the result projected onto
            # the features.
            moved = (2 + 4 + 4 + 3) * _feature_bytes(problem.channels, size)
            found.append(Work(site.name, "attention", problem.flops(size), moved))
        else:
            made = size
            if isinstance(problem, UpsampleProblem):
                made = replace(size, rows=2 * size.rows, cols=2 * size.cols)
            written = _feature_bytes(problem.out_channels, made)
            moved = _feature_bytes(problem.in_channels, size) + written
            found.append(Work(site.name, "direct", problem.flops(size), moved))
            if site.name.endswith(".time_conv"):
                found.append(Work(f"{site.name}: frames in their order", "copy", 0, 2 * written))
    return found + _stage_shortcuts(case)


def _behind_norm(
    name: str, problem: NormConvProblem | HeadProblem, size: CallSize, way: Way, residual: bool
) -> list[Work]:
    """Norm with SiLU, then the 3x3x3 convolution."""
    is_head = isinstance(problem, HeadProblem)
    is_2d = (
        way.two_dimensional
        and problem.frames > 1
        and not is_head
        and bool(conv3x3_mma.configs("winograd2d", problem.out_channels))
    )
    config_form: conv3x3_mma.Form = "direct1" if size.only_frame else "direct3"
    transform = DIRECT
    if problem.frames > 1 and not is_head:
        transform, config_form = PAIRS, "winograd"
        if problem.frames == QUADS.frames and way.quads and not is_2d:
            transform, config_form = QUADS, "winograd4"
    past = 0 if size.only_frame else _HISTORY_FRAMES
    frame = _feature_bytes(problem.in_channels, replace(size, frames=1))

    # The norm reads the new frames and the history, and writes the operand and the new history.
    new = min(size.frames, _PASS_FRAMES if problem.frames > 1 else _PASS_LATENT_FRAMES)
    operand = transform.operand_frames(new, past)
    normed = frame * (new + past + operand + past) * size.frames // new

    configs = conv3x3_mma.configs(config_form, problem.out_channels)
    half_sums = way.half_sums and not is_head and not is_2d and bool(conv3x3_mma.half_sums(configs))
    columns = -(-problem.out_channels // _COLUMNS) * _COLUMNS
    frames = transform.groups(size.frames) * transform.frames
    flops = replace(problem, out_channels=columns).flops(replace(size, frames=frames))
    if is_2d:
        flops = flops * 4 // 9
    elif transform != DIRECT:
        # Of three taps.
        flops = flops * transform.products // (3 * transform.frames)
    itemsize = _PIXEL_ITEMSIZE if is_head else _ITEMSIZE
    written = _feature_bytes(problem.out_channels, size) // _ITEMSIZE * itemsize
    read = frame * operand * size.frames // new + (written if residual else 0)
    form: Form = "2d" if is_2d else "quads" if transform == QUADS else "direct"
    return [
        Work(f"{name}: norm", "copy", 0, normed),
        Work(name, form, flops, read + written, half_sums),
    ]


def _stage_shortcuts(case: Case) -> list[Work]:
    """Wan 2.2's shortcuts around stages: written, then added to the features."""
    batch, _, frames, rows, cols = case.latent
    found: list[Work] = []
    for i, stage in enumerate(architecture.stages(case.config)):
        if stage.temporal:
            frames = 2 * frames - 1
        if stage.up is not None:
            rows, cols = 2 * rows, 2 * cols
        if stage.shortcut:
            size = _feature_bytes(stage.channels, CallSize(batch, frames, rows, cols))
            found.append(Work(f"shortcut of stage {i}", "copy", 0, 4 * size))
    return found


def _blocks(config: WanVAEConfig) -> Sequence[architecture.Block]:
    stages = architecture.stages(config)
    return *architecture.middle_blocks(config), *(b for stage in stages for b in stage.blocks)


def _feature_bytes(channels: int, size: CallSize) -> int:
    return channels * size.batch * size.frames * size.rows * size.cols * _ITEMSIZE
