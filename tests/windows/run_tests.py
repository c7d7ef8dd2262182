"""Runs the unit tests under Windows' Python (README.md), one process for each file.

Each start takes some fifteen seconds, so the fast set is one process.

    python tests/windows/run_tests.py [--fast] [--torch VERSION] [FILE]...

Sets up what is missing first. Prints a line for each file; 1 if one failed or ended without a
summary. --fast: the files of FAST alone.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
# Only what hangs takes so long.
PATIENCE_S = 1200
# What Windows decides and what needs no process of its own: paths, files that are open, names,
# drives, line ends, memory formats. In the order in which a fault would be noticed.
FAST = ("test_files", "test_platforms", "test_image_sink", "test_layout", "test_latent_kinds")
# Files that cannot run there, and why.
LEFT_OUT: dict[str, str] = {}
# pytest's last line: "40 passed, 2 skipped in 3.21s".
SUMMARY = re.compile(r"^=* ?((?:\d+ \w+(?:, )?)+) in [\d.]+s", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What became of a file of tests. summary: pytest's own, "" if there is none."""

    name: str
    summary: str
    output: str
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether tests passed and none failed."""
        return "passed" in self.summary and not re.search(r"failed|error", self.summary)

    @property
    def line(self) -> str:
        """One line for the console."""
        state = "ok    " if self.is_right else "FAILED"
        return f"{state} {self.name:28} {self.summary or 'no summary'} ({self.seconds:.0f} s)"


def summary_of(output: str) -> str:
    """The counts in pytest's summary, "" if the process did not get that far."""
    found = SUMMARY.findall(output)
    return found[-1] if found else ""


def run_files(name: str, paths: Sequence[Path], torch: str | None) -> Outcome:
    """Run files of tests in one process."""
    chosen = [] if torch is None else ["--torch", torch]
    began = time.monotonic()
    done = subprocess.run(
        [
            *(HERE / "run.sh", "--seconds", str(PATIENCE_S), *chosen),
            *("-m", "pytest", *(path.relative_to(REPOSITORY).as_posix() for path in paths)),
            *("-q", "-rs", "-p", "no:cacheprovider"),
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    return Outcome(name, summary_of(done.stdout), done.stdout, time.monotonic() - began)


def wanted(names: list[Path], fast: bool) -> list[Path]:
    """The files to run. Raises SystemExit for one that is not there."""
    folder = REPOSITORY / "tests" / "unit"
    if fast:
        return [folder / f"{name}.py" for name in FAST]
    if not names:
        found = sorted(folder.rglob("test_*.py"))
        return [p for p in found if p.stem not in LEFT_OUT and not p.stem.endswith("_gpu")]
    missing = [str(name) for name in names if not name.is_file()]
    if missing:
        raise SystemExit(f"no such file: {', '.join(missing)}")
    return [name.resolve() for name in names]


def main() -> int:
    """Set up, run, print."""
    parser = argparse.ArgumentParser(description="The unit tests under Windows' Python and Wine.")
    parser.add_argument("--fast", action="store_true", help="five files, in one process")
    parser.add_argument("--torch", help="a version of PyTorch (default: that of setup.sh)")
    parser.add_argument("file", nargs="*", type=Path)
    args = parser.parse_args()
    files = wanted(args.file, args.fast)
    chosen = [] if args.torch is None else ["--torch", args.torch]
    subprocess.run([HERE / "setup.sh", *chosen], check=True)
    groups = [("the fast set", files)] if args.fast else [(path.stem, [path]) for path in files]
    outcomes = []
    for name, paths in groups:
        outcome = run_files(name, paths, args.torch)
        outcomes.append(outcome)
        print(outcome.line, flush=True)
        if not outcome.is_right:
            print(outcome.output, flush=True)
    for name, reason in LEFT_OUT.items():
        print(f"left out: {name}: {reason}")
    failed = [outcome.name for outcome in outcomes if not outcome.is_right]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} runs passed under Windows' Python")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
