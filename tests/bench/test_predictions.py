"""Predictions for cards that nobody measured: counted work, arithmetic, and the page of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks import card_predictions
from benchmarks.card_predictions import (
    CARDS,
    CHECKS,
    FLOAT_SUMS,
    HALF_SUMS,
    MODEL,
    PAIRS_ONLY,
    PICTURES,
    TABLES,
    TWO_DIMENSIONAL,
    with_tables,
)
from benchmarks.readme_numbers import problems
from benchmarks.suite.cases import CASES
from benchmarks.suite.predictions import (
    Card,
    Form,
    Model,
    Share,
    Way,
    Work,
    decode_layers,
    decode_work,
)
from wan_vae.chunking import Chunk
from wan_vae.kernels.cuda.kernels import KERNELS, NormConvMma
from wan_vae.kernels.device import CARDS as CARDS_OF_KERNELS
from wan_vae.network import architecture
from wan_vae.ops.opset import CallSize, Workspace
from wan_vae.planning.peak import DecodeMemory, DecoderWalk

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cards.md").read_text(encoding="utf-8")
P720 = CASES["wan2.1-720p-81"]
# The second convolution of the last block: 96 channels of 81 frames of 720p, with a residual.
LAST = "decoder.upsamples.14.residual.6"
FRAME_BYTES = 96 * 720 * 1280 * 2


def work_of(name: str, way: Way, case: str = "wan2.1-720p-81") -> Work:
    (found,) = [work for work in decode_work(CASES[case], way) if work.name == name]
    return found


# -- counting --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folded:
    """An up-sampler that a kernel runs: the memory plan then counts its folded weight."""

    family: str = "cuda"

    def workspace(self, size: CallSize) -> Workspace:
        return Workspace()


@pytest.mark.parametrize("case", ["wan2.1-720p-81", "wan2.2-720p-121", "wan2.1-1024-image"])
def test_products_of_all_layers_are_those_of_the_plans_walk(case):
    config, latent = CASES[case].config, CASES[case].latent
    ups = [stage.up for stage in architecture.stages(config) if stage.up is not None]
    layers = {up.conv: Folded() for up in ups}
    memory = DecodeMemory(config, latent, torch.bfloat16, "channels_last_3d", layers)
    whole = Chunk(0, latent[2], is_first=True, is_last=True)
    walked = DecoderWalk(memory, whole, latent[3], None).peak_of_picture().work
    counted = sum(site.problem.flops(size) for site, size in decode_layers(CASES[case]))
    assert counted == 2 * walked


def test_every_layer_is_worked_once():
    names = [work.name for work in decode_work(P720, FLOAT_SUMS)]
    assert len(set(names)) == len(names)
    assert {site.name for site, _ in decode_layers(P720)} <= set(names)


def test_one_layer_by_hand():
    """81 frames are 41 pairs or 21 quads. A pair has four transformed frames, a quad six."""
    of_a_frame = 2 * 27 * 96 * 96 * 720 * 1280
    quads = work_of(LAST, FLOAT_SUMS)
    assert (quads.form, quads.flops) == ("quads", 84 * of_a_frame // 2)
    # Operand, residual, result.
    assert 2 * quads.moved_bytes == (3 + 2 + 2) * 81 * FRAME_BYTES
    # For four frames: 4 and a history of 2 read, 6 and a history of 2 written.
    norm = work_of(f"{LAST}: norm", FLOAT_SUMS)
    assert (norm.flops, norm.moved_bytes) == (0, 14 * 81 * FRAME_BYTES // 4)

    direct = 82 * of_a_frame
    along_time, in_2d = work_of(LAST, PAIRS_ONLY), work_of(LAST, TWO_DIMENSIONAL)
    assert (along_time.form, along_time.flops) == ("direct", direct * 2 // 3)
    assert (in_2d.form, in_2d.flops) == ("2d", direct * 4 // 9)
    # Operand, residual, result.
    assert along_time.moved_bytes == in_2d.moved_bytes == (2 + 1 + 1) * 81 * FRAME_BYTES
    # For four frames: 4 and a history of 2 read, 8 and a history of 2 written.
    norm = work_of(f"{LAST}: norm", PAIRS_ONLY)
    assert (norm.flops, norm.moved_bytes) == (0, 16 * 81 * FRAME_BYTES // 4)


def test_quads_are_for_the_layers_that_make_four_frames_as_in_the_kernels():
    card, quads = CARDS_OF_KERNELS["RTX 4090"], 0
    kernel = next(kernel for kernel in KERNELS if isinstance(kernel, NormConvMma))
    for site, _ in decode_layers(P720):
        if site.problem.operation == "norm_conv3d":
            first = kernel.candidates(site.problem, card)[0]
            is_quads = work_of(site.name, FLOAT_SUMS).form == "quads"
            assert is_quads == first.startswith("winograd4_"), site.name
            assert work_of(site.name, PAIRS_ONLY).form == "direct"
            quads += is_quads
    assert quads == 12, "two stages of three blocks"


def test_the_head_counts_whole_columns_and_float32_pixels():
    head = work_of("decoder.head.2", TWO_DIMENSIONAL)
    assert (head.form, head.flops) == ("direct", 2 * 27 * 96 * 8 * 81 * 720 * 1280)
    read = FRAME_BYTES * (4 + 2) * 81 // 4
    assert head.moved_bytes == read + 3 * 81 * 720 * 1280 * 4


def test_a_layer_has_the_kernels_that_exist_for_it():
    no_pairs = "decoder.middle.0.residual.2"
    assert work_of(LAST, HALF_SUMS).half_sums
    assert work_of(no_pairs, HALF_SUMS).half_sums
    assert not work_of(LAST, FLOAT_SUMS).half_sums
    assert not work_of("decoder.head.2", HALF_SUMS).half_sums
    assert work_of(no_pairs, TWO_DIMENSIONAL).form == "direct"
    # Channels that are no multiple of a wide tile.
    for way in (HALF_SUMS, TWO_DIMENSIONAL):
        narrow = decode_work(CASES["wan2.1-narrow"], way)
        assert {work.form for work in narrow} == {"copy", "direct", "quads", "attention"}
        assert not any(work.half_sums for work in narrow)


# -- arithmetic ------------------------------------------------------------------------------------

# 100 TFLOP/s by sums of float32 at 500 products a cycle, twice that by float16; 1 TB/s.
ROUND = Card("round", 100, 1.0, 200, 100, 1000, "made up")
SHARES = (
    Share("direct", False, 500, 0.5, "made up"),
    Share("direct", False, 2000, 0.25, "made up"),
    Share("direct", True, 1000, 0.8, "made up"),
)


def test_a_time_is_the_slower_of_arithmetic_and_memory():
    model = Model(SHARES, memory_share=0.5)
    assert model.work_ms(Work("a", "direct", 10**12, 10**9), ROUND) == pytest.approx(20)
    assert model.work_ms(Work("a", "direct", 10**12, 10**9, True), ROUND) == pytest.approx(6.25)
    assert model.work_ms(Work("a", "direct", 10**12, 10**10 + 10**9), ROUND) == pytest.approx(22)
    assert model.work_ms(Work("a", "copy", 0, 10**9), ROUND) == pytest.approx(2)


@pytest.mark.parametrize(("rate", "share"), [(256, 0.5), (990, 0.5), (1010, 0.25), (9999, 0.25)])
def test_a_share_is_that_of_the_nearest_rate(rate, share):
    assert Model(SHARES, 0.5).share("direct", False, rate) == share


def test_a_form_without_a_share_is_an_error():
    with pytest.raises(ValueError, match="'2d'"):
        Model(SHARES, 0.5).share("2d", False, 500)


# -- cards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_rates_are_multiprocessors_by_clock_by_products_a_cycle(card):
    products = {"A100 (40 GB)": (1024, 1024), "L40S": (512, 512), "RX 7900 XTX": (256, 256)}
    half, single = products.get(card.name, (512, 256))
    assert card.products_a_cycle(True) == pytest.approx(half, rel=0.015)
    assert card.products_a_cycle(False) == pytest.approx(single, rel=0.015)


def test_on_geforce_sums_of_float16_gain_most_and_two_dimensions_less():
    for card in CARDS:
        if card.name.startswith("RTX"):
            single, half, flat = (
                MODEL.decode_ms(P720, way, card) for way in (FLOAT_SUMS, HALF_SUMS, TWO_DIMENSIONAL)
            )
            assert half < flat < single


# -- what was measured, and the page ---------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: f"{c.kernels}, {c.picture}")
def test_measured_times_are_those_of_their_results_file(check):
    text = f"{check.measured_ms:.0f} ms"
    if ".json" in check.source:
        assert problems(f"{text}\n<!-- measured\n{text} = {check.source}\n-->\n") == []
    else:
        assert "kept no file" in check.source


def test_the_model_comes_near_what_was_measured():
    for check in CHECKS:
        found = MODEL.decode_ms(PICTURES[check.picture], check.way, check.card)
        assert 0.95 < check.measured_ms / found < 1.2


def test_the_page_has_the_tables_that_the_script_prints(capsys):
    named = re.findall(r"<!-- table: (\w+) -->", PAGE)
    assert sorted(named) == sorted(TABLES)
    assert with_tables(PAGE) == PAGE, "today's tables are those of the page"
    tables = re.findall(r"<!-- table: \w+ -->\n(.*?)\n<!-- end of table -->", PAGE, re.DOTALL)
    assert card_predictions.main([]) == 0
    printed = capsys.readouterr().out
    assert len(tables) == len(TABLES) and all(table in printed for table in tables)


def test_tables_are_put_into_the_page(monkeypatch, tmp_path):
    monkeypatch.setattr(card_predictions, "PAGE", tmp_path / "cards.md")
    old = "a\n\n<!-- table: rates -->\n| old |\n<!-- end of table -->\n\nb\n"
    card_predictions.PAGE.write_text(old, encoding="utf-8")
    assert card_predictions.main(["--write"]) == 0
    assert card_predictions.PAGE.read_text(encoding="utf-8") == old.replace(
        "| old |", card_predictions.rates()
    )


def test_heading_caption_and_table_say_that_nothing_was_measured():
    words = "PREDICTION, NOT MEASURED"
    assert PAGE.splitlines()[0].endswith(words)
    table = card_predictions.predictions()
    before = PAGE.split(table)[0]
    assert words in before.rpartition("\n## ")[2]
    assert table.startswith("| PREDICTED seconds")


def test_every_form_that_runs_has_a_share_and_no_other():
    forms: set[tuple[Form, bool]] = {
        (work.form, work.half_sums)
        for case in PICTURES.values()
        for way in (FLOAT_SUMS, HALF_SUMS, TWO_DIMENSIONAL)
        for work in decode_work(case, way)
        if work.flops
    }
    assert forms == {(share.form, share.half_sums) for share in MODEL.shares}
