"""The proof catches planted wrong and racy kernels; its cache survives damage and company."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch

from wan_vae.kernels.proof import cache as cache_module
from wan_vae.kernels.proof.cache import ProofCache
from wan_vae.kernels.proof.choice import EAGER, Choice, fastest
from wan_vae.kernels.proof.prove import Verdict, prove

X = torch.randn(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ENVIRONMENT = {"device": "a card", "torch": "2"}
CHOICE = Choice("a", {"a": 2.5, EAGER: 5.0}, {"b": "wrong"})


def reference() -> torch.Tensor:
    return X * 2


def right() -> torch.Tensor:
    return (X * 2).half()


def test_a_right_kernel_is_right():
    verdict = prove(right, reference, 1e-3)
    assert verdict.passed
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
    assert not verdict.passed
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
    assert not verdict.passed
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


def test_the_cache_asks_once_and_the_next_process_not_at_all(tmp_path):
    cache = ProofCache(ENVIRONMENT, tmp_path)
    assert cache.verdict("a", lambda: Verdict(True, "", 1e-4)).passed
    assert cache.verdict("a", never).passed
    again = ProofCache(ENVIRONMENT, tmp_path)
    assert again.verdict("a", never) == Verdict(True, "", 1e-4)
    assert again.notes == []


def test_another_environment_proves_again(tmp_path):
    ProofCache(ENVIRONMENT, tmp_path).verdict("a", lambda: Verdict(True, "", 1e-4))
    other = ProofCache(ENVIRONMENT | {"torch": "3"}, tmp_path)
    assert len(other) == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace("proof/3", "proof/4"),
        lambda text: text.replace('"passed": false', '"passed": true'),
        lambda text: text.replace('"passed": false', '"passed": 1'),
        lambda text: text.replace("a card", "another card"),
        lambda text: json.dumps(json.loads(text) | {"verdicts": {"a": {"passed": True}}}),
        lambda text: text.replace('"winner": "a"', '"winner": "b"'),
        lambda text: text.replace("2.5", "-2.5"),
        lambda text: text.replace("2.5", "NaN"),
        lambda text: json.dumps(json.loads(text) | {"choices": {"x": {"winner": "eager"}}}),
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "choices"}),
        lambda text: "\x00\xff",
    ],
)
def test_a_damaged_file_is_as_good_as_none(damage, tmp_path):
    cache = ProofCache(ENVIRONMENT, tmp_path)
    cache.verdict("a", lambda: Verdict(False, "wrong", 0.5))
    cache.keep_choice("x", CHOICE)
    cache.path.write_text(damage(cache.path.read_text()), encoding="latin-1")
    again = ProofCache(ENVIRONMENT, tmp_path)
    assert len(again) == 0 and again.choice("x") is None
    assert len(again.notes) == 1 and "proven again" in again.notes[0]
    assert not again.verdict("a", lambda: Verdict(False, "still wrong")).passed


@pytest.mark.parametrize("schema", ["wan_vae.proof/1", "wan_vae.proof/2"])
def test_a_file_of_an_older_version_is_replaced_without_being_believed(schema, tmp_path):
    """Its keys mean something else, its verdicts have another field, or it holds no choices."""
    cache = ProofCache(ENVIRONMENT, tmp_path)
    old = {
        "schema": schema,
        "environment": ENVIRONMENT,
        "verdicts": {"a": {"right": True, "reason": "", "error": 1e-4}},
    }
    assert cache.path is not None
    cache.path.write_text(json.dumps(old))
    again = ProofCache(ENVIRONMENT, tmp_path)
    assert len(again) == 0 and again.notes == []
    assert not again.verdict("a", lambda: Verdict(False, "wrong")).passed
    assert again.notes == []
    content = json.loads(cache.path.read_text())
    assert content["schema"] == "wan_vae.proof/3" and content["verdicts"].keys() == {"a"}
    assert ProofCache(ENVIRONMENT, tmp_path).verdict("a", never) == Verdict(False, "wrong")


def test_a_folder_that_cannot_be_written_is_said_and_harmless(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = ProofCache(ENVIRONMENT, tmp_path / "file" / "folder")
    assert cache.verdict("a", lambda: Verdict(True)).passed
    assert cache.verdict("a", never).passed
    assert any("not kept" in note for note in cache.notes)


def test_verdicts_that_are_found_together_are_written_together(tmp_path, monkeypatch):
    """Each write is of the whole file, and each parse."""
    written, parsed = [], []
    write, loads = cache_module.write_whole, json.loads
    monkeypatch.setattr(
        cache_module, "write_whole", lambda path, text: written.append(path) or write(path, text)
    )
    monkeypatch.setattr(cache_module.json, "loads", lambda text: parsed.append(1) or loads(text))
    cache = ProofCache(ENVIRONMENT, tmp_path)
    with cache.gathered():
        for name in "abcde":
            assert cache.choice(name) is None
            cache.verdict(name, lambda: Verdict(True, "", 1e-4))
        assert written == [] == parsed
        cache.keep_choice("x", CHOICE)
        assert len(written) == 1
        for name in "fgh":
            cache.verdict(name, lambda: Verdict(True, "", 1e-4))
            assert cache.choice(name) is None
    assert len(written) == 2 and len(parsed) == 1
    assert len(ProofCache(ENVIRONMENT, tmp_path)) == 8
    with pytest.raises(KeyError), cache.gathered():
        cache.verdict("i", lambda: Verdict(True, "", 1e-4))
        raise KeyError("an error of somebody's")
    assert len(ProofCache(ENVIRONMENT, tmp_path)) == 9, "what was found before an error is kept"


def test_choices_are_kept_with_their_times(tmp_path):
    cache = ProofCache(ENVIRONMENT, tmp_path)
    assert cache.choice("x") is None
    assert cache.keep_choice("x", CHOICE) == CHOICE
    assert ProofCache(ENVIRONMENT, tmp_path).choice("x") == CHOICE


def test_the_choice_of_the_first_process_counts(tmp_path):
    """Two that start side by side may measure different winners, which have different bits."""
    first, second = ProofCache(ENVIRONMENT, tmp_path), ProofCache(ENVIRONMENT, tmp_path)
    first.keep_choice("x", CHOICE)
    assert second.choice("x") == CHOICE  # written since it read the file
    third = ProofCache(ENVIRONMENT, tmp_path)
    other = Choice("b", {"b": 1.0, EAGER: 2.0})
    assert third.keep_choice("x", other) == CHOICE
    second.verdict("a", lambda: Verdict(True, "", 1e-4))
    assert ProofCache(ENVIRONMENT, tmp_path).choice("x") == CHOICE


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({"a": 1.0, "b": 0.96, EAGER: 3.0}, "a"),  # noise
        ({"a": 1.0, "b": 0.94, EAGER: 3.0}, "b"),
        ({"a": 1.0, "b": 0.9, "c": 0.87, EAGER: 3.0}, "b"),  # c is within noise of b
        ({"a": 1.0, "b": 0.96, "c": 0.93, EAGER: 3.0}, "c"),
        ({"a": 1.0, EAGER: 0.88}, "a"),  # for its bits
        ({"a": 1.0, EAGER: 0.86}, EAGER),
        ({"a": 2.0, "b": 1.0, EAGER: 0.9}, "b"),
        ({"a": 0.09, EAGER: 0.05}, "a"),  # a launch, not a layer
    ],
)
def test_the_fastest_wins_beyond_noise(times, winner):
    assert fastest(times) == winner


def _prove_many(folder, names):
    for name in names:
        ProofCache(ENVIRONMENT, folder).verdict(name, lambda: Verdict(True, "", 1e-4))


def test_processes_side_by_side_leave_a_readable_file(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_prove_many, args=(tmp_path, [f"{w}-{i}" for i in range(20)]))
        for w in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    cache = ProofCache(ENVIRONMENT, tmp_path)
    assert cache.notes == []
    # Verdicts for which two writers raced may be lost (they are proven again), as many as the
    # scheduler likes; no file is damaged.
    assert len(cache) >= 1
    assert [p.name for p in tmp_path.iterdir()] == [cache.path.name]
