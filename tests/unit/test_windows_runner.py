"""What the runner of the tests under Windows takes for a passed file."""

import pytest

from tests.windows import run_tests
from tests.windows.run_tests import FAST, LEFT_OUT, REPOSITORY, Outcome, summary_of


@pytest.mark.parametrize(
    "output, summary, is_right",
    [
        ("....\n4 passed in 1.20s\n", "4 passed", True),
        (
            "..s\n2 passed, 1 skipped in 80.10s (0:01:20)\nwine: crash\n",
            "2 passed, 1 skipped",
            True,
        ),
        ("F.\n1 failed, 1 passed in 2.00s\n", "1 failed, 1 passed", False),
        ("1 passed, 1 error in 2.00s\n", "1 passed, 1 error", False),
        ("....\n", "", False),
        ("3 skipped in 0.10s\n", "3 skipped", False),
        ("E  said '9 passed in 1.00s'\n", "", False),
    ],
)
def test_a_file_passed_if_its_summary_says_so(output, summary, is_right):
    assert summary_of(output) == summary
    assert Outcome("test_x", summary_of(output), output, 1.0).is_right is is_right


def test_the_files_in_folders_run_too():
    names = {path.stem for path in run_tests.wanted([], fast=False)}
    assert {"test_files", "test_kinds", "test_checkpoints"} <= names


@pytest.mark.parametrize("name", [*FAST, *LEFT_OUT])
def test_named_files_are_there(name):
    assert (REPOSITORY / "tests" / "unit" / f"{name}.py").is_file()
