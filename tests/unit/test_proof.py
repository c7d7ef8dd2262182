"""The proof catches planted wrong and racy kernels; its book survives damage and company."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch

from wan_vae.kernels.proof.prove import ProofBook, Verdict, prove

X = torch.randn(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ENVIRONMENT = {"device": "a card", "torch": "2"}


def reference() -> torch.Tensor:
    return X * 2


def right() -> torch.Tensor:
    return (X * 2).half()


def test_a_right_kernel_is_right():
    verdict = prove(right, reference, 1e-3)
    assert verdict.right
    assert verdict.reason == ""
    assert 0 < verdict.error < 5e-4


def wrong_by_a_tile() -> torch.Tensor:
    y = right()
    y[0, :, 0, :4, :4] = y[0, :, 0, 4:8, :4]
    return y


def one_bad_value() -> torch.Tensor:
    y = right()
    y[1, 3, 2, 5, 5] += 0.2
    return y


def unwritten() -> torch.Tensor:
    y = right()
    y[:, :, :, -1] = float("nan")
    return y


def wrong_shape() -> torch.Tensor:
    return right()[:, :, :2]


def swapped_axes() -> torch.Tensor:
    return right().transpose(3, 4)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (wrong_by_a_tile, "relative error"),
        (one_bad_value, "one value is off"),
        (unwritten, "unwritten"),
        (wrong_shape, "shape"),
        (swapped_axes, "relative error"),
    ],
)
def test_a_wrong_kernel_is_caught(kernel, words):
    verdict = prove(kernel, reference, 1e-3)
    assert not verdict.right
    assert words in verdict.reason


def test_a_racy_kernel_is_caught():
    runs = iter(range(10))

    def racy() -> torch.Tensor:
        y = right()
        # The last bit of one value, once: far inside the bound, but not the same bits.
        if next(runs) == 1:
            y.view(torch.int16).view(-1)[77] ^= 1
        return y

    verdict = prove(racy, reference, 1e-3)
    assert not verdict.right
    assert "1 of 12288" in verdict.reason and "race" in verdict.reason


def test_a_kernel_that_does_not_compile_is_off_with_its_reason():
    def broken():
        raise RuntimeError("out of resource: shared memory\nand a long story")

    verdict = prove(broken, reference, 1e-3, failures=(RuntimeError,))
    assert verdict == Verdict(False, "RuntimeError: out of resource: shared memory")


def test_an_unexpected_error_is_not_swallowed():
    def broken():
        raise KeyError("a bug of ours")

    with pytest.raises(KeyError):
        prove(broken, reference, 1e-3, failures=(RuntimeError,))


def test_running_out_of_memory_is_no_verdict():
    def full():
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        prove(full, reference, 1e-3, failures=(RuntimeError,))


def never() -> Verdict:
    raise AssertionError("this key was proven before")


def test_the_book_asks_once_and_the_next_process_not_at_all(tmp_path):
    book = ProofBook(ENVIRONMENT, tmp_path)
    assert book.verdict("a", lambda: Verdict(True, "", 1e-4)).right
    assert book.verdict("a", never).right
    again = ProofBook(ENVIRONMENT, tmp_path)
    assert again.verdict("a", never) == Verdict(True, "", 1e-4)
    assert again.notes == []


def test_another_environment_proves_anew(tmp_path):
    ProofBook(ENVIRONMENT, tmp_path).verdict("a", lambda: Verdict(True, "", 1e-4))
    other = ProofBook(ENVIRONMENT | {"torch": "3"}, tmp_path)
    assert len(other) == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace("proof/1", "proof/0"),
        lambda text: text.replace('"right": false', '"right": true'),
        lambda text: text.replace('"right": false', '"right": 1'),
        lambda text: text.replace("a card", "another card"),
        lambda text: json.dumps(json.loads(text) | {"verdicts": {"a": {"right": True}}}),
        lambda text: "\x00\xff",
    ],
)
def test_a_damaged_book_is_as_good_as_none(damage, tmp_path):
    book = ProofBook(ENVIRONMENT, tmp_path)
    book.verdict("a", lambda: Verdict(False, "wrong", 0.5))
    book.path.write_text(damage(book.path.read_text()), encoding="latin-1")
    again = ProofBook(ENVIRONMENT, tmp_path)
    assert len(again) == 0
    assert "proven anew" in again.notes[0]
    assert not again.verdict("a", lambda: Verdict(False, "still wrong")).right


def test_a_folder_that_cannot_be_written_is_said_and_harmless(tmp_path):
    (tmp_path / "file").write_text("in the way")
    book = ProofBook(ENVIRONMENT, tmp_path / "file" / "folder")
    assert book.verdict("a", lambda: Verdict(True)).right
    assert book.verdict("a", never).right
    assert any("not kept" in note for note in book.notes)


def _prove_many(folder, names):
    for name in names:
        ProofBook(ENVIRONMENT, folder).verdict(name, lambda: Verdict(True, "", 1e-4))


def test_processes_side_by_side_leave_a_readable_book(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_prove_many, args=(tmp_path, [f"{w}-{i}" for i in range(20)]))
        for w in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    book = ProofBook(ENVIRONMENT, tmp_path)
    assert book.notes == []
    # A verdict that two writers raced for may be lost (it is proven again); no file is damaged.
    assert len(book) >= 20
    assert [p.name for p in tmp_path.iterdir()] == [book.path.name]
