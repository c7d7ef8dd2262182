"""The predictions of docs/cards.md: what the script prints, and arithmetic that can be checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import card_predictions
from benchmarks.card_predictions import CARDS, H100, H100_DECODE_MS, Card, Pass, decode_ms

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs/cards.md"
_START, _END = "the script -->\n", "<!-- end of predictions -->"


@pytest.fixture(scope="module")
def work() -> list[Pass]:
    return card_predictions.passes()


def test_the_page_quotes_what_the_script_prints():
    text = PAGE.read_text(encoding="utf-8")
    quoted = text[text.index(_START) + len(_START) : text.index(_END)]
    assert quoted == f"{card_predictions.table()}\n\n{card_predictions.counted()}\n"
    assert "None was measured on its card." in text and "doctor --share" in text
    for card in CARDS:
        assert card.name in quoted


def test_the_products_are_those_of_a_decode(work):
    """docs/performance.md: all direct convolutions take 810 ms at 785 TFLOP/s."""
    direct = sum(one.flops * (1.5 if one.is_wide else 1) for one in work) / 1e12
    assert direct == pytest.approx(0.810 * 785, rel=0.04)
    # The last stage: 96 channels at full size, as in a head of three.
    head = [one for one in work if one.flops == 2 * 27 * 96 * 3 * 81 * 720 * 1280]
    assert len(head) == 1 and head[0].moved_bytes == (2 * 96 + 4 * 3) * 81 * 720 * 1280
    assert not head[0].is_wide


def test_each_pass_takes_the_longer_of_products_and_bytes():
    card = Card("one", float16_sums=2, float32_sums=1, memory=1000, source="")
    busy, wide, moving = Pass(1e12, 1), Pass(1e12, 1, is_wide=True), Pass(1, 1e12)
    assert decode_ms(card, [busy], 0.5) == pytest.approx(2000)
    assert decode_ms(card, [wide], 0.5, True) == pytest.approx(1000)
    assert decode_ms(card, [busy], 0.5, True) == pytest.approx(2000)
    memory = card_predictions.MEMORY_EFFICIENCY
    assert decode_ms(card, [moving, busy], 0.5) == pytest.approx(1000 / memory + 2000)


def test_the_measured_card_is_predicted_as_measured(work):
    efficiency = card_predictions.calibrated(work)
    assert decode_ms(H100, work, efficiency) == pytest.approx(H100_DECODE_MS, rel=1e-3)
    assert 0.3 < efficiency < 0.9


def test_the_script_runs_alone_and_refuses_an_impossible_efficiency():
    command = [sys.executable, str(REPOSITORY / "benchmarks/card_predictions.py"), "--efficiency"]
    done = subprocess.run([*command, "0.5"], capture_output=True, text=True, check=True)
    assert "predicted at 50%, float32 sums" in done.stdout
    wrong = subprocess.run([*command, "1.5"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "expected a fraction" in wrong.stderr
